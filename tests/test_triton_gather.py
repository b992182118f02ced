"""Gathering the paged cache in Triton gives what the pages hold, bit for bit.

As in test_triton_attention.py, kernels run on CUDA tensors where there is a GPU, and
otherwise in the interpreter, in a process of its own; what must not be read is NaN.
"""

from dataclasses import replace

import interpreter
import pytest
import torch
import triton_compiled
from attention_batches import (
    BF16,
    FP16,
    KV,
    LONG,
    LONG_DECODE,
    NAN_BYTE,
    SENTINEL,
    Batch,
    build,
    like,
    on_device,
)
from interpreter import COMPILES, DEVICE, INTERPRETED, RUNS_KERNELS
from triton_compiled import compiled, spilled
from values import same_bits

from vllm_scalesearch import kv_pages
from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_kv_gather

# Rows of the outputs past those that are gathered.
SPARE = 40


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU itself")
def test_on_the_cpu() -> None:
    """All tests that run the kernel, in the interpreter."""
    interpreter.run_tests(__file__, ("not gpu",), 12)


def starts(batch: Batch) -> torch.Tensor:
    return torch.cat((torch.zeros(1), batch.step.seq_lens.cumsum(0))).int()


def empty(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs for a batch and more, strided in token and head."""
    heads, dim = batch.pages.shape[1], batch.layout.head_size
    count = int(batch.step.seq_lens.sum()) + SPARE
    both = torch.full((count, heads, 2 * dim), SENTINEL, dtype=batch.full.dtype, device=DEVICE)
    return both[..., :dim], both[..., dim:]


def expected(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What is gathered of a batch, from everything there is."""
    options, step, dtype = batch.options, batch.step, batch.full.dtype
    keys, values = [], []
    for request, length in enumerate(step.seq_lens.tolist()):
        if not length:
            continue
        context = length - int(step.query_start_loc[request + 1] - step.query_start_loc[request])
        boundary = options.boundary(torch.arange(context, length))[0]
        token = torch.arange(length)
        stored = ((token >= options.sink) & (token < boundary))[:, None, None]
        seen = token >= 0
        if options.sliding_window is not None:
            seen = token > context - options.sliding_window
        blocks = step.block_table[request, : -(-length // batch.layout.block_size)].long()
        whole = paged_attention._full(batch.full, step.full_block_table[request], token).chunk(2, -1)
        packed = kv_pages.read(batch.pages, batch.layout, blocks, options.v_scale)
        for to, full, x in zip((keys, values), whole, packed, strict=True):
            x = torch.where(stored, x[:, :length].transpose(0, 1).to(dtype), full)
            to.append(torch.where(seen[:, None, None], x, 0))
    return torch.cat(keys), torch.cat(values)


def check(batch: Batch, k: torch.Tensor, v: torch.Tensor) -> None:
    for got, gathered in zip((k, v), expected(batch), strict=True):
        assert same_bits(got[:-SPARE].cpu(), gathered)
        assert (got[-SPARE:] == SENTINEL).all()


def check_gather(batch: Batch) -> None:
    """Gather what is needed only."""
    k, v = empty(batch)
    triton_kv_gather.gather(
        like(batch.needed_pages), like(batch.needed_full), batch.layout, on_device(batch.needed_step),
        batch.options, k, v, starts(batch).to(DEVICE), len(k) - SPARE,
    )  # fmt: skip
    check(batch, k, v)


# Contexts and chunks of less than a tile and more; requests of sink, or of full precision, only.
MIXED = [(70, 1), (0, 5), (130, 21), (9, 3), (0, 37), (100, 2), (63, 33)]

CASES = {
    "head_dim": dict(options=dict(v_group="head_dim", v_scale=1 / 16, own_chunk=True)),
    "tokens": dict(options=dict(v_group="tokens", v_scale=1 / 16, own_chunk=True)),
    "boundaries that differ": dict(options=dict(v_group="tokens", recent=20)),
    "tokens, no sink": dict(options=dict(v_group="tokens", sink=0, recent=0), block_size=64, heads=1),
    "odd sink": dict(options=dict(v_group="head_dim", sink=37, recent=3), block_size=48, heads=1),
    "sink up to the boundary": dict(options=dict(v_group="tokens", sink=90), heads=1),
    "window": dict(options=dict(v_group="tokens", sliding_window=40), block_size=32),
    "window within the recent ones": dict(options=dict(v_group="head_dim", sliding_window=7), heads=1),
    "window over the sink": dict(options=dict(v_group="head_dim", sliding_window=75), heads=1),
    "fp16": dict(options=dict(v_group="tokens", v_scale=4.0), dtype=FP16, heads=1),
    "heads of 96": dict(options=dict(v_group="head_dim"), dim=96, heads=1, block_size=32),
    "heads of 96, tokens": dict(options=dict(v_group="tokens"), dim=96, heads=1),
    "heads of 128, tokens": dict(options=dict(v_group="tokens"), dim=128, heads=1, block_size=64),
    "heads of 256": dict(options=dict(v_group="head_dim"), dim=256, heads=1),
}  # fmt: skip


@RUNS_KERNELS
@pytest.mark.parametrize("case", CASES)
def test_gathers_what_the_pages_hold(case: str) -> None:
    arguments = dict(CASES[case])
    options = AttentionOptions(**KV | dict(k="absmax", v="absmax") | arguments.pop("options"))
    check_gather(build(MIXED, options, padding=2, **arguments))


@RUNS_KERNELS
@pytest.mark.parametrize("v_group", ["head_dim", "tokens"])
@pytest.mark.parametrize(
    ("dtype", "v_scale"), [(BF16, 2.0**-100), (BF16, 2.0**100), (FP16, 2.0**-18), (FP16, 2.0**8)], ids=str
)
def test_all_codes_and_scales_are_gathered(v_group, dtype, v_scale) -> None:
    """NaN among them, and values that are subnormal or infinite in fp16."""
    options = AttentionOptions(**KV, k="absmax", v="absmax", v_group=v_group)
    batch = build([(150, 3)], options, heads=1, dtype=dtype, block_size=32)
    rng = torch.Generator().manual_seed(3)
    batch.pages.copy_(torch.randint(0, 256, batch.pages.shape, generator=rng))
    for scales in batch.layout.parts(batch.pages)[1::2]:
        scales &= 0x7F
        scales[torch.rand(scales.shape, generator=rng) < 1 / 16] = NAN_BYTE
    batch = replace(batch, options=replace(options, v_scale=v_scale), needed_pages=batch.pages)
    k, v = expected(batch)
    assert k.isnan().any() and v.isnan().any() and (v == 0).any()
    assert v.isinf().any() == (dtype == FP16 and v_scale > 1)
    check_gather(batch)


@RUNS_KERNELS
def test_wrong_arguments_say_why() -> None:
    options = AttentionOptions(**KV, k="absmax", v="absmax", v_group="head_dim")
    batch = build([(20, 4), (3, 2)], options, heads=1)
    step, (k, v), start = on_device(batch.step), empty(batch), starts(batch).to(DEVICE)

    def gather(k=k, v=v, start=start, step=step, options=options, tokens=29) -> None:
        triton_kv_gather.gather(
            like(batch.pages), like(batch.full), batch.layout, step, options, k, v, start, tokens
        )

    gather()
    with pytest.raises(ValueError, match=r"expected k_out of at least \(29, 1, 64\) torch.bfloat16"):
        gather(k=k[:28])
    with pytest.raises(ValueError, match="expected v_out of"):
        gather(v=v[..., :32])
    with pytest.raises(ValueError, match=r"expected v_out of .* torch.float16"):
        gather(v=v.half())
    with pytest.raises(ValueError, match="k_out's last dimension must be contiguous"):
        gather(k=k.repeat_interleave(2, -1)[..., ::2])
    with pytest.raises(ValueError, match=r"expected k_start_loc \(3,\), got \(2,\)"):
        gather(start=start[:2])
    with pytest.raises(ValueError, match="k_start_loc must be contiguous int32"):
        gather(start=start.long())
    with pytest.raises(ValueError, match=r"expected query_start_loc \(3,\)"):
        gather(step=replace(step, query_start_loc=step.query_start_loc[1:]))
    with pytest.raises(ValueError, match=r"expected block_table \(2, _\)"):
        gather(step=replace(step, block_table=step.block_table[:1]))
    with pytest.raises(ValueError, match="full_block_table must be contiguous int32"):
        gather(step=replace(step, full_block_table=step.full_block_table.long()))
    with pytest.raises(ValueError, match="k_start_loc is on meta"):
        gather(start=start.to("meta"))
    with pytest.raises(ValueError, match="along head_dim, the options along tokens"):
        gather(options=replace(options, v_group="tokens"))


@COMPILES
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("v_group", ["head_dim", "tokens"])
def test_compiles_without_a_gpu(v_group, arch, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(triton_compiled.TYPES, "k_start_loc_ptr", "*i32")
    options = AttentionOptions(**KV, v_group=v_group, own_chunk=True)
    constants = triton_kv_gather.gather_constants(PageLayout(64, 128, v_group), 16, options)
    warps = triton_kv_gather.gather_warps(128)
    binary = compiled(triton_kv_gather._gather_kernel, constants, arch, num_warps=warps)
    assert f".target sm_{arch}" in binary.asm["ptx"]
    assert ".ftz" not in binary.asm["ptx"]
    assert binary.metadata.shared <= 16 * 1024
    assert spilled(binary, tmp_path / "kernel.cubin") == 0


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("v_group", ["head_dim", "tokens"])
@pytest.mark.parametrize(
    ("dim", "heads", "block_size"), [(64, 3, 16), (96, 2, 32), (128, 2, 64), (256, 1, 128)]
)
def test_long_requests_on_a_gpu(dim, heads, block_size, v_group, dtype) -> None:
    options = AttentionOptions(**KV, k="fast", v="fast", v_group=v_group, v_scale=1 / 16, own_chunk=True)
    for requests in (LONG, LONG_DECODE):
        for window in (None, 500):
            changed = replace(options, sliding_window=window)
            sizes = dict(dim=dim, heads=heads, block_size=block_size, dtype=dtype)
            check_gather(build(requests, changed, padding=5, **sizes))


@pytest.mark.gpu
def test_capture_in_a_cuda_graph() -> None:
    options = AttentionOptions(**KV, k="fast", v="fast", v_group="tokens", own_chunk=True)
    batch = build([(300, 40), (0, 70), (1000, 3)], options, dim=128, block_size=32)
    pages, full, step = like(batch.needed_pages), like(batch.needed_full), on_device(batch.needed_step)
    (k, v), start = empty(batch), starts(batch).to(DEVICE)

    def run() -> None:
        triton_kv_gather.gather(pages, full, batch.layout, step, options, k, v, start, len(k) - SPARE)

    run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # The same shapes, in another order.
    other = [2, 0, 1]
    query_start_loc = batch.step.query_start_loc
    counts = query_start_loc.diff()[other]
    tables = {
        name: getattr(batch.step, name)[other] for name in ("seq_lens", "block_table", "full_block_table")
    }
    changed = replace(
        batch, step=replace(batch.step, query_start_loc=torch.tensor([0, *counts]).cumsum(0).int(), **tables)
    )
    for name in ("query_start_loc", *tables):
        getattr(step, name).copy_(getattr(changed.step, name))
    start.copy_(starts(changed))
    for x in (k, v):
        x.fill_(SENTINEL)
    graph.replay()
    check(changed, k, v)
