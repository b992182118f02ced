"""Batches of requests whose tokens lie in the paged cache, and what kernels must make of them.

Batches lie on the CPU, where the references run; `like` and `on_device` copy them to where kernels run.
What a step must not read is filled with NaN: packed bytes 0x7F, which is E4M3's NaN, and 16-bit NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from interpreter import DEVICE
from values import same_bits

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_kv_write
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.transforms import head_transform

NAN_BYTE = 0x7F
BF16, FP16 = torch.bfloat16, torch.float16
SENTINEL = 7.0
# Attention to quantized keys and values, of which but few are in full precision.
KV = dict(q=None, p=None, recent=16)
# Tokens before the step and of it: within a tile, across tiles, to a tile's end, one token of either kind.
REQUESTS = [(0, 5), (37, 1), (15, 1), (30, 19), (0, 16), (1, 46), (1, 47)]
# For a GPU, the latter of one query each.
LONG = [(1000, 1), (37, 300), (0, 513), (4000, 1), (2100, 17), (15, 1), (0, 1), (127, 129)]
LONG_DECODE = [(n, 1) for n in (0, 1, 15, 16, 31, 63, 64, 511, 1000, 2047, 2048, 4095)]


def strided(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """Pages (blocks, heads, ...) between which something else lies; it starts as NaN."""
    pages = torch.empty(shape[0], shape[1] + 1, *shape[2:], dtype=dtype, device=device)[:, : shape[1]]
    return pages.fill_(NAN_BYTE if dtype == torch.uint8 else torch.nan)


def like(pages: torch.Tensor, device: str = DEVICE) -> torch.Tensor:
    """A copy with gaps between pages."""
    return strided(tuple(pages.shape), pages.dtype, device).copy_(pages)


@dataclass
class Batch:
    """A step whose tokens are in the cache, on the CPU.

    pages, full, step: everything of every token. needed_pages, needed_full, needed_step: only what attention
    reads, and what packs the tiles of V that the step completes. k, v: (T, Hkv, D), of the step's tokens.
    """

    options: AttentionOptions
    layout: PageLayout
    pages: torch.Tensor
    full: torch.Tensor
    step: Step
    needed_pages: torch.Tensor
    needed_full: torch.Tensor
    needed_step: Step
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def tokens(self) -> int:
        return int(self.step.query_start_loc[-1])


def on_device(step: Step) -> Step:
    tensors = {name: x.to(DEVICE) for name, x in vars(step).items() if isinstance(x, torch.Tensor)}
    return replace(step, **tensors)


def tables(counts: list[int], width: int, rng: torch.Generator) -> tuple[torch.Tensor, int]:
    """Blocks of each request (B, width), in random order and none twice, and how many blocks there are.

    Block 0 is nobody's. Past its own blocks, a row names others that exist.
    """
    total = sum(counts) + 3
    order = torch.randperm(total - 1, generator=rng) + 1
    table = torch.randint(0, total, (len(counts), width), generator=rng)
    for row, blocks in zip(table, order.split([*counts, total - 1 - sum(counts)])[:-1], strict=True):
        row[: len(blocks)] = blocks
    return table.int(), total


def build(
    requests: list[tuple[int, int]],
    options: AttentionOptions,
    *,
    heads: int = 2,
    group: int = 2,
    dim: int = 64,
    dtype: torch.dtype = BF16,
    block_size: int = 16,
    padding: int = 0,
    seed: int = 0,
    nan_keys: Sequence[int] = (),
    nan_values: Sequence[int] = (),
) -> Batch:
    """Requests of (tokens before the step, tokens of the step), and `padding` requests and tokens without.

    nan_keys, nan_values: tokens of all requests, one after the other, that have a NaN.
    """
    rng = torch.Generator().manual_seed(seed)
    layout = PageLayout(block_size, dim, options.v_group)
    full_size = block_size // 4
    lengths = [sum(request) for request in requests]
    table, blocks = tables([-(-n // block_size) for n in lengths], -(-max(lengths) // block_size) + 2, rng)
    full_table, full_blocks = tables(
        [-(-n // full_size) for n in lengths], -(-max(lengths) // full_size) + 2, rng
    )
    pages = strided((blocks, heads, block_size, layout.bytes_per_token), torch.uint8, "cpu")
    full = strided((full_blocks, heads, full_size, 2 * dim), dtype, "cpu")

    def slots(table: torch.Tensor, size: int, first: list[int]) -> torch.Tensor:
        tokens = [torch.arange(a, b) for a, b in zip(first, lengths, strict=True)]
        return torch.cat(
            [row[t // size].long() * size + t % size for row, t in zip(table, tokens, strict=True)]
        )

    def starts(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *counts]).cumsum(0).int()

    # All tokens, in one step. Channels of several sizes, and for keys a direction that queries look at, so
    # that P is neither flat nor one token's.
    count = sum(lengths)
    k, v = (torch.randn(count, heads, dim, generator=rng) for _ in range(2))
    v = (v * torch.linspace(-1, 1, dim).exp2()).to(dtype)
    k = (k + 0.5 * torch.randn(count, 1, 1, generator=rng)).to(dtype)
    k[list(nan_keys), :, 3] = v[list(nan_values), :, 3] = torch.nan
    whole = Step(
        starts(lengths), torch.tensor(lengths).int(), table, full_table,
        slots(table, block_size, [0] * len(lengths)), slots(full_table, full_size, [0] * len(lengths)),
        max(lengths),
    )  # fmt: skip
    paged_attention.write(pages, full, layout, whole, k, v, None, options)

    counts = [queries for _, queries in requests]
    first = [context for context, _ in requests]
    query_start_loc = torch.cat((starts(counts), torch.full((padding,), sum(counts)).int()))
    step = Step(
        query_start_loc,
        torch.tensor(lengths + [0] * padding).int(),
        torch.cat((table, table[:1].expand(padding, -1))),
        torch.cat((full_table, full_table[:1].expand(padding, -1))),
        torch.cat((slots(table, block_size, first), torch.full((padding,), -1))),
        torch.cat((slots(full_table, full_size, first), torch.full((padding,), -1))),
        max(counts),
    )
    rows = torch.cat([torch.arange(n - c, n) + n0 for n, c, n0 in zip(
        lengths, counts, [0, *torch.tensor(lengths).cumsum(0).tolist()], strict=False)])  # fmt: skip
    extra = torch.full((padding, heads, dim), torch.nan).to(dtype)
    q = torch.randn(len(rows) + padding, heads * group, dim, generator=rng).to(dtype)
    batch = Batch(
        options, layout, pages, full, step, strided(tuple(pages.shape), torch.uint8, "cpu"),
        strided(tuple(full.shape), dtype, "cpu"), step, q, torch.cat((k[rows], extra)),
        torch.cat((v[rows], extra)),
    )  # fmt: skip
    _keep_needed(batch, requests)
    return batch


def _keep_needed(batch: Batch, requests: list[tuple[int, int]]) -> None:
    options, step, size = batch.options, batch.step, batch.full.shape[2]
    full_table = torch.zeros_like(step.full_block_table)
    parts = list(zip(batch.layout.parts(batch.needed_pages), batch.layout.parts(batch.pages), strict=True))
    for request, (context, queries) in enumerate(requests):
        token = torch.arange(context + queries)
        boundary = options.boundary(torch.arange(context, context + queries))
        seen = token >= 0
        if options.sliding_window is not None:
            seen = token >= context + 1 - options.sliding_window
        stored = token[(token >= options.sink) & (token < boundary[-1]) & seen]
        packed = step.block_table[request, stored // batch.layout.block_size].long()
        offset = stored % batch.layout.block_size
        for i, (to, source) in enumerate(parts):
            at = offset // BLOCK if i >= 2 and options.v_group == "tokens" else offset
            to[packed, :, at] = source[packed, :, at]
        whole = ((token < options.sink) | (token >= boundary[0])) & seen
        if options.v_group == "tokens":
            whole |= token >= context // BLOCK * BLOCK
        kept = token[whole]
        pages = step.full_block_table[request, kept // size].long()
        batch.needed_full[pages, :, kept % size] = batch.full[pages, :, kept % size]
        full_table[request, kept // size] = pages.int()
    batch.needed_step = replace(step, full_block_table=full_table)


# --- what is written -----------------------------------------------------------------------------


def matrix_of(heads: int, dim: int) -> torch.Tensor:
    """H, times something well conditioned, in fp32."""
    rng = torch.Generator().manual_seed(5)
    mix = torch.eye(dim) + 0.1 * torch.randn(heads, dim, dim, generator=rng)
    return (mix.double() @ head_transform(heads, dim, None, True).k_matrix).float()


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers of their 16-bit dtype a and b are apart, at most."""
    a, b = (x.contiguous().view(torch.int16).int() for x in (a, b))
    a, b = (torch.where(x < 0, -(x & 0x7FFF), x) for x in (a, b))
    return int((a - b).abs().max())


def check_write(
    batch: Batch,
    k_matrix: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    write: Callable[..., None] = triton_kv_write.transform_and_write,
) -> None:
    """Write k and v (T, Hkv, D, on the CPU) to the slots of the step, in pages with what they need only."""
    pages, full = like(batch.needed_pages), like(batch.needed_full)
    step, count = batch.needed_step, batch.tokens
    # As they come out of one product: strided in token and head.
    together = torch.cat((k, v), dim=-1).to(DEVICE)
    dim = batch.layout.head_size
    write(
        pages, full, batch.layout, on_device(step), together[..., :dim], together[..., dim:],
        None if k_matrix is None else k_matrix.to(DEVICE), batch.options,
    )  # fmt: skip
    pages, full = pages.cpu(), full.cpu()
    slots = step.full_slots[:count]
    written = full[slots // full.shape[2], :, slots % full.shape[2]]
    transformed = written[..., :dim]
    if k_matrix is None:
        assert same_bits(transformed, k[:count])
    else:
        expected = paged_attention.transformed(k[:count], k_matrix)
        # A tie between two 16-bit numbers may go either way, and where products cancel, fp32 itself has
        # fewer bits than a number's last place.
        scale = expected.float().abs().amax(-1, keepdim=True)
        near_zero = expected.float().abs() < scale * 2**-4
        assert ulps(*(torch.where(near_zero, 0, x) for x in (transformed, expected))) <= 1
        assert ((transformed.float() - expected.float()).abs() <= scale * torch.finfo(k.dtype).eps * 2**-4)[
            near_zero
        ].all()
        assert (transformed != expected).float().mean() < 0.02
    expected_pages, expected_full = like(batch.needed_pages, "cpu"), like(batch.needed_full, "cpu")
    padded = torch.cat((transformed, k[count:]))
    paged_attention.write(expected_pages, expected_full, batch.layout, step, padded, v, None, batch.options)
    assert same_bits(full, expected_full)
    assert same_bits(pages, expected_pages)


# --- what attention gives ------------------------------------------------------------------------


def check_output(output: torch.Tensor, batch: Batch) -> None:
    """Attention's output (T, Hq, D), which held SENTINEL, against the reference.

    Rounding alone sets them apart. With u the unit roundoff of the dtype, rounding P changes a row of outputs
    by at most u * sqrt(sum P**2) of its values' size, which is a row's own size for random values, and rounding
    the output by at most u; both are uniform, so each is u / sqrt(3) at most in the mean: 1.5 u in all.
    Quantized P has no rounding of its own, but what fp32 rounds otherwise (the order of sums, exp) moves p by
    some 2**-18 of itself. Where it lies that near to a tie of two elements, as one of 10**4 does, the element
    moves by a step, up to a third of it; of a row of N such p, that is 0.3 / sqrt(N). So most rows are as
    above, and almost all within 2 %.
    """
    count, output = batch.tokens, output.cpu()
    u = torch.finfo(output.dtype).eps / 2
    output = output.float()
    expected = torch.full_like(output, SENTINEL)
    paged_attention.attention(
        batch.q, batch.pages, batch.full, batch.layout, batch.step, None, batch.options, expected
    )
    assert torch.equal(output[count:], expected[count:])
    assert output.isfinite().all()
    error, expected = output[:count] - expected[:count], expected[:count]
    relative = error.square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
    if batch.options.p is None:
        assert relative.max() <= 1.5 * u, relative.max() / u
    else:
        # With one level, P's block scales are coarse, and so are the steps.
        bounds = torch.tensor([1.5 * u, 0.02 if batch.options.two_level_p else 0.04, 0.1])
        quantiles = relative.flatten().quantile(torch.tensor([0.5, 0.98, 1.0]))
        assert (quantiles <= bounds).all(), quantiles
