"""The Triton kernels of the paged cache: writing it gives the reference's bits, attention its values.

Kernels run on CUDA tensors where there is a GPU, and in Triton's interpreter on the CPU otherwise.
The interpreter has to be chosen before triton is imported, so `test_on_the_cpu` runs this file again,
in processes of their own. The references run on the CPU.

What a step must not read is filled with NaN: packed bytes 0x7F, which is E4M3's NaN, and 16-bit NaN.
"""

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import interpreter
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions, fake_quantized
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_blocks, triton_kv_write, triton_paged_attention
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.transforms import head_transform

INTERPRETED = triton_blocks.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_KERNELS = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU; test_on_the_cpu runs it"
)
NAN_BYTE = 0x7F
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_on_the_cpu() -> None:
    """All tests that run kernels, in the interpreter, in two processes."""
    interpreter.run_tests(__file__, ("gives_the_values", "not gives_the_values"), 10)


# --- data ----------------------------------------------------------------------------------------


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


# --- writing -------------------------------------------------------------------------------------


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, where NaN is NaN."""
    if a.is_floating_point():
        a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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


WRITES = {
    "head_dim": dict(options=dict(v_group="head_dim", v_scale=1 / 16)),
    "tokens": dict(options=dict(v_group="tokens", v_scale=1 / 16), block_size=64),
    "tokens, tiles over four 16-bit pages": dict(options=dict(v_group="tokens", v="fast", k="4over6")),
    "tokens, 16-bit pages of two tiles": dict(options=dict(v_group="tokens"), block_size=128, heads=1),
    "fp16": dict(options=dict(v_group="head_dim", v="absmax"), dtype=FP16, block_size=48),
    "fp16, tokens": dict(options=dict(v_group="tokens", v_scale=4.0, k="exact"), dtype=FP16, block_size=32),
    "heads of 96": dict(options=dict(v_group="head_dim"), dim=96, heads=1),
    "heads of 96, tokens": dict(options=dict(v_group="tokens"), dim=96, heads=1, block_size=32),
    "heads of 256": dict(options=dict(v_group="head_dim"), dim=256, heads=1),
    "heads of 128": dict(options=dict(v_group="head_dim"), dim=128),
}  # fmt: skip
# Tokens before the step and of it: within a tile, across tiles, to a tile's end, one token of either kind.
REQUESTS = [(0, 5), (37, 1), (15, 1), (30, 19), (0, 16), (1, 46), (1, 47)]


@RUNS_KERNELS
@pytest.mark.parametrize("case", WRITES)
def test_pages_have_the_bits_of_the_reference(case: str) -> None:
    arguments = dict(WRITES[case])
    options = AttentionOptions(**arguments.pop("options"))
    batch = build(REQUESTS, options, padding=3, **arguments)
    check_write(batch, None, batch.k, batch.v)
    check_write(batch, matrix_of(batch.k.shape[1], batch.layout.head_size), batch.k, batch.v)


@RUNS_KERNELS
@pytest.mark.parametrize("v_group", ["head_dim", "tokens"])
def test_unkind_values_have_the_bits_of_the_reference(v_group: str) -> None:
    options = AttentionOptions(v_group=v_group, v_scale=2.0**-20)
    batch = build([(3, 61), (0, 32)], options, heads=1)
    rng = torch.Generator().manual_seed(1)
    size = torch.randint(-140, 127, (len(batch.k), 1, batch.k.shape[2] // 16), generator=rng)
    k = torch.ldexp(batch.k.float(), size.repeat_interleave(16, -1) // 2).to(BF16)
    v = torch.ldexp(batch.v.float(), size.repeat_interleave(16, -1)).to(BF16)
    for x, bad in ((k, torch.inf), (v, torch.nan), (v, -torch.inf)):
        x.view(-1)[torch.randint(0, x.numel(), (20,), generator=rng)] = bad
        x.view(-1)[torch.randint(0, x.numel(), (500,), generator=rng)] = -0.0
    v[5:9] = 3e38
    check_write(batch, None, k, v)


@RUNS_KERNELS
def test_many_tokens_are_written_like_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kv_write, "_MANY_ROWS", 0)
    batch = build([(3, 70), (0, 32)], AttentionOptions(v_group="tokens", v="fast", k="fast"), heads=1)
    check_write(batch, matrix_of(1, 64), batch.k, batch.v)


@RUNS_KERNELS
def test_pages_at_any_word_are_written_and_read() -> None:
    options = AttentionOptions(v_group="tokens", q=None, p=None, k="fast", v="fast")
    batch = build([(40, 3)], options, heads=1)
    blocks, _, *page = batch.pages.shape
    stride = page[0] * page[1] + 4
    flat = torch.full((blocks * stride + 4,), NAN_BYTE, dtype=torch.uint8, device=DEVICE)
    pages = flat.as_strided(batch.pages.shape, (stride, stride, page[1], 1), 4).copy_(batch.needed_pages)
    step = on_device(batch.needed_step)
    full, k, v = like(batch.needed_full), batch.k.to(DEVICE), batch.v.to(DEVICE)
    triton_kv_write.transform_and_write(pages, full, batch.layout, step, k, v, None, options)
    expected = like(batch.needed_pages, "cpu")
    paged_attention.write(
        expected, batch.needed_full, batch.layout, batch.needed_step, batch.k, batch.v, None, options
    )
    assert torch.equal(pages.cpu(), expected)
    check_attention(batch, pages=pages)


# --- queries -------------------------------------------------------------------------------------


@RUNS_KERNELS
@pytest.mark.parametrize(
    ("dim", "dtype", "policy", "heads", "group"),
    [(64, BF16, "paper", 2, 3), (128, FP16, "fast", 1, 4), (96, BF16, "paper", 1, 1), (64, BF16, None, 2, 2)],
)
def test_queries_are_transformed_and_quantized(dim, dtype, policy, heads, group) -> None:
    rng = torch.Generator().manual_seed(2)
    q = torch.randn(13, heads * group, 2 * dim, generator=rng).to(dtype)[..., :dim]
    options = AttentionOptions(q=policy)
    matrix = matrix_of(heads, dim)
    got, stored = triton_kv_write.transform_query(q.to(DEVICE), matrix.to(DEVICE), options)
    got, stored = got.cpu(), stored.cpu()
    expected = paged_attention.transformed(q, matrix)
    assert (got.float() - expected.float()).abs().max() <= expected.float().abs().max() * torch.finfo(dtype).eps
    assert (got != expected).float().mean() < 0.02
    assert same_bits(stored, fake_quantized(got.float(), policy).to(dtype))
    # Without a matrix, queries are as they came.
    same, stored = triton_kv_write.transform_query(q.to(DEVICE), None, options)
    assert same_bits(same.cpu(), q)
    assert same_bits(stored.cpu(), fake_quantized(q.float(), policy).to(dtype))


# --- attention -----------------------------------------------------------------------------------


def check_attention(batch: Batch, pages: torch.Tensor | None = None) -> None:
    """Attention to what is needed only, against the reference on all there is."""
    q, q_stored = triton_kv_write.transform_query(batch.q.to(DEVICE), None, batch.options)
    output = torch.full_like(q, SENTINEL)
    triton_paged_attention.attention(
        q, q_stored, like(batch.needed_pages) if pages is None else pages, like(batch.needed_full),
        batch.layout, on_device(batch.needed_step), batch.options, output,
    )  # fmt: skip
    check_output(output, batch)


SENTINEL = 7.0


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


KV = dict(q=None, p=None, recent=16)
# Mixed lengths; contexts shorter than a block; one query and several; a request that is all sink.
MIXED = [(70, 1), (0, 5), (130, 21), (9, 3), (0, 37), (100, 2)]
DECODE = [(200, 1), (63, 1), (64, 1), (15, 1), (0, 1), (143, 1)]

CASES = {
    "head_dim": dict(options=dict(KV, v_group="head_dim", v_scale=1 / 16), requests=MIXED),
    "tokens": dict(options=dict(KV, v_group="tokens", v_scale=1 / 16), requests=MIXED),
    "paper": dict(options=dict(v_group="tokens"), requests=MIXED),
    "paper, one level, head_dim": dict(
        options=dict(v_group="head_dim", two_level_p=False, recent=5, p="fast"), requests=[(70, 1), (50, 21)]
    ),
    "q alone": dict(options=dict(v_group="tokens", p=None, sink=3), requests=[(70, 4)], dim=96, group=1),
    "p alone, fp16": dict(options=dict(v_group="tokens", q=None), requests=[(90, 9)], dtype=FP16, heads=1),
    "fp16": dict(options=dict(KV, v_group="tokens", v_scale=4.0), requests=MIXED, dtype=FP16, heads=1),
    "decode": dict(options=dict(KV, v_group="head_dim"), requests=DECODE, group=4),
    "decode, tokens, group of 3": dict(
        options=dict(KV, v_group="tokens", recent=1, sink=0), requests=DECODE, group=3, block_size=32, heads=1
    ),
    "decode, paper": dict(options=dict(v_group="tokens"), requests=DECODE, block_size=64, heads=1),
    "several queries, split": dict(
        options=dict(KV, v_group="head_dim", sliding_window=90), requests=[(190, 3), (10, 2)]
    ),
    "own chunk": dict(options=dict(KV, v_group="tokens", own_chunk=True), requests=MIXED, block_size=48),
    "own chunk, paper": dict(
        options=dict(v_group="head_dim", own_chunk=True), requests=[(77, 30), (0, 70)], heads=1
    ),
    "window": dict(
        options=dict(KV, v_group="tokens", sliding_window=40), requests=[(130, 21), (9, 3), (200, 1)]
    ),
    "window within the recent ones": dict(
        options=dict(KV, v_group="head_dim", sliding_window=7), requests=[(70, 9), (64, 1)], heads=1
    ),
    "window, paper": dict(
        options=dict(v_group="tokens", sliding_window=70, logits_soft_cap=5.0), requests=[(130, 9)], heads=1
    ),
    "soft cap": dict(
        options=dict(KV, v_group="head_dim", logits_soft_cap=2.0, softmax_scale=0.3), requests=[(70, 20)],
        heads=1,
    ),
    "sink of many tiles": dict(options=dict(KV, v_group="tokens", sink=70), requests=[(200, 20)], heads=1),
    "one query head a KV head": dict(options=dict(KV, v_group="tokens"), requests=[(50, 6)], group=1),
    "tiles of 32, paper": dict(options=dict(v_group="head_dim", kv_tile=32), requests=[(80, 6)], heads=1),
    "heads of 128": dict(
        options=dict(KV, v_group="head_dim"), requests=[(90, 3), (9, 1)], dim=128, heads=1, block_size=64
    ),
    "heads of 256": dict(options=dict(KV, v_group="tokens"), requests=[(90, 3)], dim=256, heads=1),
    "heads of 96, head_dim": dict(
        options=dict(KV, v_group="head_dim"), requests=[(90, 3)], dim=96, heads=1, block_size=32
    ),
}  # fmt: skip


@RUNS_KERNELS
@pytest.mark.parametrize("case", CASES)
def test_attention_gives_the_values_of_the_reference(case: str) -> None:
    arguments = dict(CASES[case])
    options = AttentionOptions(**arguments.pop("options"))
    check_attention(build(arguments.pop("requests"), options, padding=2, **arguments))


@RUNS_KERNELS
@pytest.mark.parametrize("options", [dict(KV, v_group="head_dim"), dict(v_group="tokens", p="fast")], ids=str)
def test_nan_reaches_those_that_see_it(options: dict) -> None:
    # A key, and a value, of request 0 and 1 that are stored; the former in a tile of stored tokens only.
    requests = [(150, 2), (60, 3), (90, 2)]
    batch = build(requests, AttentionOptions(**options), heads=1, nan_keys=[70], nan_values=[152 + 20])
    q, q_stored = triton_kv_write.transform_query(batch.q.to(DEVICE), None, batch.options)
    output = torch.full_like(q, SENTINEL)
    triton_paged_attention.attention(
        q, q_stored, like(batch.needed_pages), like(batch.needed_full), batch.layout,
        on_device(batch.needed_step), batch.options, output,
    )  # fmt: skip
    expected = torch.empty_like(batch.q)
    paged_attention.attention(
        batch.q, batch.pages, batch.full, batch.layout, batch.step, None, batch.options, expected
    )
    assert expected.isnan().any(-1).flatten(1).all(1).tolist() == [True] * 5 + [False] * 2
    assert torch.equal(output.cpu().isnan(), expected.isnan())


@RUNS_KERNELS
def test_decoding_is_shared_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = []
    kernel = triton_paged_attention._merge_kernel
    monkeypatch.setattr(triton_paged_attention, "_merge_kernel", _Recorder(kernel, merges))
    check_attention(build([(200, 1), (500, 1)], AttentionOptions(**KV), heads=1))
    assert merges == [4]
    check_attention(build([(500, 1)], AttentionOptions(), heads=1))
    assert merges == [4, 4]


class _Recorder:
    """A kernel that notes the segments it is launched for."""

    def __init__(self, kernel, launches: list[int]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append(arguments[6])
            return self.kernel[grid](*arguments, **constants)

        return launch


@RUNS_KERNELS
def test_what_follows_the_written_cache_is_attention_to_it() -> None:
    # Both kernels, one after the other, as a step runs them.
    options = AttentionOptions(v_group="tokens", q=None, p=None, v_scale=1 / 16)
    batch = build([(60, 5), (0, 33)], options, padding=1)
    pages, full, step = like(batch.needed_pages), like(batch.needed_full), on_device(batch.needed_step)
    for part in batch.layout.parts(pages)[2:]:
        part[batch.step.block_table[0, 3].item()] = NAN_BYTE  # the tile of tokens 48 to 63
    triton_kv_write.transform_and_write(
        pages, full, batch.layout, step, batch.k.to(DEVICE), batch.v.to(DEVICE), None, options
    )
    check_attention(batch, pages=pages)


# --- errors --------------------------------------------------------------------------------------


@RUNS_KERNELS
def test_wrong_arguments_say_why() -> None:
    options = AttentionOptions(v_group="head_dim", k="fast", v="fast", q=None, p=None)
    batch = build([(0, 4)], options, heads=1)
    pages, full, step = like(batch.pages), like(batch.full), on_device(batch.step)
    q, k, v = batch.q.to(DEVICE), batch.k.to(DEVICE), batch.v.to(DEVICE)

    def write(k=k, matrix=None, options=options, pages=pages, full=full) -> None:
        triton_kv_write.transform_and_write(pages, full, batch.layout, step, k, v, matrix, options)

    def attend(q=q, options=options, output=q) -> None:
        triton_paged_attention.attention(q, q, pages, full, batch.layout, step, options, output)

    with pytest.raises(ValueError, match="expected k of at least"):
        write(k[:2])
    with pytest.raises(ValueError, match="k's last dimension must be contiguous"):
        write(k.repeat_interleave(2, -1)[..., ::2])
    with pytest.raises(ValueError, match=r"a matrix \(1, 64, 64\) fp32"):
        write(matrix=torch.eye(64, device=DEVICE))
    with pytest.raises(ValueError, match="need a policy"):
        write(options=replace(options, v=None))
    with pytest.raises(ValueError, match="along head_dim, the options along tokens"):
        write(options=replace(options, v_group="tokens"))
    with pytest.raises(ValueError, match="a number as v_scale"):
        write(options=replace(options, v_scale=torch.ones(1)))
    with pytest.raises(ValueError, match=r"takes 1.0 as k_scale"):
        write(options=replace(options, k_scale=2.0))
    with pytest.raises(ValueError, match="incomplete=False"):
        write(options=replace(options, incomplete=False))
    with pytest.raises(ValueError, match="expected bf16 or fp16"):
        write(full=full.float())
    with pytest.raises(ValueError, match="kv_tile=48"):
        attend(options=replace(options, kv_tile=48))
    with pytest.raises(ValueError, match="expected q_stored and output like q"):
        attend(output=q[:1])
    with pytest.raises(ValueError, match="do not fit pages"):
        attend(q=q.half(), output=q)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        triton_kv_write.transform_query(q.float(), None, options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        triton_kv_write.transform_query(torch.zeros(1, 1, 64, dtype=BF16), None, AttentionOptions())


# --- what is compiled ----------------------------------------------------------------------------

COMPILES = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
# Arguments that are not pointers to the packed pages (u8), the model's values or fp32 or i32 scalars.
TYPES = dict(
    pages_ptr="*u8", slots_ptr="*i64", full_slots_ptr="*i64", query_start_loc_ptr="*i32", seq_lens_ptr="*i32",
    block_table_ptr="*i32", full_block_table_ptr="*i32", matrix_ptr="*fp32", partial_ptr="*fp32",
    maximum_ptr="*fp32", total_ptr="*fp32", v_scale="fp32", score_scale="fp32", cap="fp32", unit="fp32",
)  # fmt: skip


def compiled(kernel, constants: dict, arch: int, dtype: str = "bf16", **launch):
    """A kernel compiled without a GPU, its strides and pointers divisible by 16."""
    names = kernel.arg_names
    types = {
        name: TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
        if name not in constants
    }
    aligned = [
        name
        for name, kind in types.items()
        if kind[0] == "*" or (name.endswith(("stride", "words")) and "table" not in name)
    ]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False, **launch}
    )


def spilled(binary, path) -> int:
    """Bytes of stack of a thread, which hold what registers do not."""
    path.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


# The least that a program may have of shared memory, among GPUs from 8.0 on; and what Hopper has.
SHARED_MEMORY, HOPPER_SHARED_MEMORY = 99 * 1024, 227 * 1024


@COMPILES
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("operands", "v_group", "max_query_len"),
    [("kv", "head_dim", 1), ("kv", "tokens", 1024), ("qkvp", "tokens", 1), ("qkvp", "head_dim", 1024)],
)
def test_attention_compiles_without_a_gpu(operands, v_group, max_query_len, arch, tmp_path) -> None:
    options = AttentionOptions(**KV, v_group=v_group) if operands == "kv" else AttentionOptions(v_group=v_group)
    constants, launch = triton_paged_attention.attention_constants(
        PageLayout(64, 128, v_group), 16, options, 4, max_query_len, divmod(arch, 10)
    )
    constants["SHARED"] = max_query_len == 1
    if not constants["SHARED"]:
        constants |= dict(partial_ptr=None, maximum_ptr=None, total_ptr=None)
    binary = compiled(triton_paged_attention._attention_kernel, constants, arch, **launch)
    assert f".target sm_{arch}" in binary.asm["ptx"]
    assert binary.metadata.shared <= (SHARED_MEMORY if arch == 80 else HOPPER_SHARED_MEMORY)
    assert spilled(binary, tmp_path / "kernel.cubin") <= 128  # 32 registers


@COMPILES
def test_merging_compiles_without_a_gpu() -> None:
    assert compiled(triton_paged_attention._merge_kernel, dict(D=96, WIDE=128, MOST=64), 80).asm["cubin"]


@COMPILES
def test_attention_compiles_for_blackwell() -> None:
    options = AttentionOptions(v_group="tokens", p="fast")
    constants, launch = triton_paged_attention.attention_constants(
        PageLayout(16, 64, "tokens"), 4, options, 2, 1, (10, 0)
    )
    binary = compiled(triton_paged_attention._attention_kernel, {**constants, "SHARED": False}, 100, **launch)
    assert "cvt.rn.satfinite.e2m1x2.f32" in binary.asm["ptx"]


@COMPILES
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_writing_compiles_without_a_gpu(arch, tmp_path) -> None:
    layout, options = PageLayout(64, 128, "tokens"), AttentionOptions(v_group="tokens")
    constants = triton_kv_write.write_constants(layout, 16, options, 64, arch >= 100)
    queries = triton_kv_write.query_constants(4, 128, options, 64, arch >= 100)
    kernels = [
        (triton_kv_write._write_kernel, constants),
        (triton_kv_write._write_kernel, {**constants, "matrix_ptr": None}),
        (triton_kv_write._write_tiles_kernel, triton_kv_write.tile_constants(constants)),
        (triton_kv_write._transform_query_kernel, queries),
    ]
    for kernel, constants in kernels:
        binary = compiled(kernel, constants, arch, num_warps=triton_kv_write.warps(16 * 128))
        assert binary.metadata.shared <= SHARED_MEMORY
        assert spilled(binary, tmp_path / "kernel.cubin") == 0
        assert ("cvt.rn.satfinite.e2m1x2.f32" in binary.asm["ptx"]) == (arch >= 100)
        assert ".ftz" not in binary.asm["ptx"]


# --- on a GPU ------------------------------------------------------------------------------------

LONG = [(1000, 1), (37, 300), (0, 513), (4000, 1), (2100, 17), (15, 1), (0, 1), (127, 129)]
LONG_DECODE = [(n, 1) for n in (0, 1, 15, 16, 31, 63, 64, 511, 1000, 2047, 2048, 4095)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operands", "v_group", "dtype"),
    [("kv", "head_dim", BF16), ("kv", "tokens", FP16), ("qkvp", "head_dim", FP16), ("qkvp", "tokens", BF16)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dim", "group", "heads", "block_size"), [(64, 3, 3, 16), (96, 1, 2, 32), (128, 4, 2, 64), (256, 8, 1, 128)]
)
def test_long_requests_on_a_gpu(dim, group, heads, block_size, operands, v_group, dtype) -> None:
    policies = KV if operands == "kv" else dict(q="fast", p="fast")
    options = AttentionOptions(**policies, k="fast", v="fast", v_group=v_group, v_scale=1 / 16)
    sizes = dict(dim=dim, group=group, heads=heads, block_size=block_size, dtype=dtype)
    for requests in (LONG, LONG_DECODE):
        batch = build(requests, options, padding=5, **sizes)
        check_write(batch, matrix_of(heads, dim), batch.k, batch.v)
        check_attention(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["kv", "qkvp"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(own_chunk=True),
        dict(sliding_window=500),
        dict(sliding_window=64, logits_soft_cap=3.0),
        dict(sink=0, recent=1),
        dict(sink=200, recent=300),
        dict(two_level_p=False, kv_tile=128),
    ],
    ids=str,
)
def test_options_on_a_gpu(changes, operands) -> None:
    policies = KV if operands == "kv" else dict(q="paper", p="paper")
    v_group = "tokens" if operands == "kv" else "head_dim"
    options = AttentionOptions(**{**policies, **changes}, k="fast", v="fast", v_group=v_group)
    for requests in (LONG, LONG_DECODE):
        check_attention(build(requests, options, dim=128, group=4, heads=1, block_size=64))


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["kv", "qkvp"])
def test_capture_in_a_cuda_graph(operands) -> None:
    policies = KV if operands == "kv" else {}
    options = AttentionOptions(**policies, k="fast", v="fast", v_group="tokens")
    sizes = dict(dim=128, heads=2, group=4, block_size=32)
    batches = [
        build([(40, 1), (0, 1), (15, 1), (300, 1), (64, 1)], options, **sizes),
        build([(1000, 1), (47, 1), (9, 1)], options, padding=2, seed=1, **sizes),
        build([(3, 1), (2000, 1), (31, 1), (500, 1)], options, padding=1, seed=2, **sizes),
    ]

    def buffer(name: str, of: str | None = None) -> torch.Tensor:
        """One that holds each batch's."""
        tensors = [getattr(batch if of is None else getattr(batch, of), name) for batch in batches]
        shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
        if tensors[0].ndim == 4:
            return strided(tuple(shape), tensors[0].dtype, DEVICE)
        return torch.zeros(shape, dtype=tensors[0].dtype, device=DEVICE)

    def fill(to: torch.Tensor, source: torch.Tensor) -> None:
        to[tuple(slice(n) for n in source.shape)] = source.to(DEVICE)

    step = replace(
        batches[0].needed_step,
        **{
            name: buffer(name, "needed_step")
            for name, x in vars(batches[0].needed_step).items()
            if isinstance(x, torch.Tensor)
        },
    )
    pages, full, q, k, v = (buffer(name) for name in ("needed_pages", "needed_full", "q", "k", "v"))
    output = torch.empty_like(q)

    def load(batch: Batch) -> None:
        for name, x in vars(step).items():
            if isinstance(x, torch.Tensor):
                fill(x, getattr(batch.needed_step, name))
        for to, name in ((pages, "needed_pages"), (full, "needed_full"), (q, "q"), (k, "k"), (v, "v")):
            fill(to, getattr(batch, name))
        output.fill_(SENTINEL)

    def run() -> None:
        triton_kv_write.transform_and_write(pages, full, batches[0].layout, step, k, v, None, options)
        transformed, stored = triton_kv_write.transform_query(q, None, options)
        triton_paged_attention.attention(
            transformed, stored, pages, full, batches[0].layout, step, options, output
        )

    load(batches[0])
    run()  # compiles
    check_output(output, batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch in (*batches[1:], batches[0]):
        load(batch)
        graph.replay()
        check_output(output, batch)
