"""kernels/kv_write.cu: the bits of the reference's pages."""

import re
from dataclasses import replace

import pytest
import torch
from attention_batches import (
    BF16,
    FP16,
    LONG,
    LONG_DECODE,
    REQUESTS,
    build,
    check_write,
    like,
    matrix_of,
    on_device,
)
from values import same_bits, unkind

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_kv_write, cuda_transform_query
from vllm_scalesearch.ops.step import Step


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_it_compiles_without_a_gpu(dim: int, arch: str) -> None:
    dtype, options = FP16 if dim == 96 else BF16, AttentionOptions(v="offsets:-3,2,9")
    for tokens, matrix in ((100_000, True), (100, True), (100, False)):
        rows = cuda_kv_write.plan(tokens, 8, dim, 132).rows
        macros = cuda_kv_write.defines(PageLayout(64, dim, "tokens"), 16, options, dtype, rows, matrix)
        assert compile_kernel("kv_write.cu", "kv_write", macros, arch)[1:4] == b"ELF"
    macros = cuda_kv_write.defines(PageLayout(64, dim, "tokens"), 16, options, dtype, 1, True, True)
    assert compile_kernel("kv_write.cu", "kv_write", macros, arch)[1:4] == b"ELF"


@pytest.mark.parametrize("dim", range(32, 257, 32))
def test_plans_fit(dim: int) -> None:
    """A block's warps share out the columns, and three blocks fit a multiprocessor of an H100."""
    options = AttentionOptions(k="exact", v="window:-8,7")
    for tokens in (1, 128, 100_000):
        plan = cuda_kv_write.plan(tokens, 8, dim, 132)
        assert plan.threads % 32 == 0 and 16 * plan.rows <= plan.threads <= 512
        assert dim % plan.columns == 0 and plan.columns % (plan.threads // 32 * 8) == 0
        assert cuda_kv_write.shared_bytes(plan, dim, options, True) <= 227 * 1024 // 3


def test_parts_of_a_matrix_add_up_to_it() -> None:
    matrix = torch.randn(2, 64, 64)
    parts = cuda_kv_write.parts_of(matrix).double()
    assert parts.shape == (2, 2, 3, 8, 8, 4, 8)
    whole = parts.sum(2).unflatten(-1, (4, 2)).permute(0, 1, 5, 4, 6, 2, 3).reshape(2, 64, 64)
    assert (whole - matrix).abs().max() <= matrix.abs().max() * 2**-24


SIZES = {
    "64": dict(dim=64, heads=3, block_size=16),
    "96": dict(dim=96, heads=1, block_size=32),
    "96, fp16": dict(dim=96, heads=2, block_size=48, dtype=FP16),
    "128": dict(dim=128, heads=2, block_size=64),
    "128, fp16": dict(dim=128, heads=1, block_size=128, dtype=FP16),
    "256": dict(dim=256, heads=1, block_size=64),
    "256, fp16": dict(dim=256, heads=1, block_size=16, dtype=FP16),
}
POLICIES = {
    "paper": {},
    "fast, absmax": dict(k="fast", v="absmax", v_scale=1 / 16),
    "exact, set": dict(k="exact", v="offsets:-3,2,9", v_scale=4.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of few tokens and of many a block."""
    monkeypatch.setattr(cuda_kv_write, "multiprocessors", lambda device: 1 if many else 1 << 20)
    batch = build(REQUESTS, AttentionOptions(v_scale=1 / 16), padding=3, **SIZES[size])
    heads = batch.k.shape[1]
    check_write(batch, None, batch.k, batch.v, cuda_kv_write.write)
    check_write(batch, matrix_of(heads, batch.layout.head_size), batch.k, batch.v, cuda_kv_write.write)


@pytest.mark.gpu
@pytest.mark.parametrize("policies", POLICIES)
def test_policies(policies: str) -> None:
    for requests in (LONG, LONG_DECODE):
        batch = build(
            requests, AttentionOptions(**POLICIES[policies]), dim=128, heads=1, block_size=64, padding=2
        )
        check_write(batch, matrix_of(1, 128), batch.k, batch.v, cuda_kv_write.write)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [0, 1 << 10], ids=["all rows by one", "each by its own"])
@pytest.mark.parametrize("group", [1, 5])
@pytest.mark.parametrize("size", SIZES)
def test_queries(size: str, group: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformed by the same launch, to the bits of their own kernel; pages are as without."""
    monkeypatch.setattr(cuda_kv_write, "_QUERY_BLOCKS", blocks)
    batch = build(LONG_DECODE, AttentionOptions(v_scale=1 / 16), padding=3, **SIZES[size])
    heads, dim, tokens = batch.k.shape[1], batch.layout.head_size, len(batch.needed_step.slots)
    k_matrix = matrix_of(heads, dim)
    q_matrix = k_matrix.roll(1, -1).cuda()
    # A view, as the parts of a fused projection are, with more rows than the step has tokens.
    together = torch.randn(tokens + 5, heads * group + 2, dim, generator=torch.Generator().manual_seed(2))
    q = together.to(batch.k.dtype).cuda()[:, 1:-1]
    expected, _ = cuda_transform_query.transform_query(q, q_matrix, AttentionOptions(q=None))

    def write(*arguments) -> None:
        found = cuda_kv_write.write(*arguments, q, q_matrix)
        assert found.shape == q.shape and same_bits(found[:tokens], expected[:tokens])

    for _ in range(2):  # split first, and then launched early
        check_write(batch, k_matrix, batch.k, batch.v, write)


@pytest.mark.gpu
def test_queries_that_do_not_fit_are_refused() -> None:
    batch = build(LONG_DECODE, AttentionOptions(), dim=64, heads=2)
    step, matrix = on_device(batch.needed_step), matrix_of(2, 64).cuda()
    pages, full, k, v = (x.cuda() for x in (batch.needed_pages, batch.needed_full, batch.k, batch.v))
    for q, keys, said in (
        (torch.zeros(len(k), 3, 64), matrix, "3 query heads cannot share 2 KV heads"),
        (torch.zeros(1, 4, 64), matrix, "queries (1, 4, 64)"),
        (torch.zeros(len(k), 4, 64), None, "keys must be transformed too"),
        (torch.zeros(len(k), 4, 32), matrix, "heads of 64 channels"),
    ):
        q = q.bfloat16().cuda()
        with pytest.raises(ValueError, match=re.escape(said)):
            cuda_kv_write.write(pages, full, batch.layout, step, k, v, keys, batch.options, q, matrix)


@pytest.mark.gpu
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    "policy", ["absmax", "fast", "paper", "exact", "window:-8,7", "offsets:3", "offsets:-20,0,9"]
)
def test_searches(policy: str, dtype: torch.dtype, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are hard to decide, zeros, NaN and denormals, from below the least scale to above all."""
    monkeypatch.setattr(cuda_kv_write, "multiprocessors", lambda device: 1 if many else 1 << 20)
    tokens, heads, dim = 512, 2, 96
    for v_scale in (1 / 16, 64.0):
        options = AttentionOptions(k=policy, v=policy, v_scale=v_scale)
        batch = build([(0, tokens)], options, dim=dim, heads=heads, block_size=32, dtype=dtype)
        # Blocks of keys lie along channels, and those of values along tokens.
        sizes = 2.0 ** (torch.arange(tokens) % 29 - 14)
        k = (unkind(tokens, heads * dim, dtype) * sizes[:, None]).to(dtype).view(tokens, heads, dim)
        v = unkind(heads * dim, tokens, dtype) * sizes[: heads * dim, None]
        check_write(batch, None, k, v.to(dtype).t().reshape(tokens, heads, dim), cuda_kv_write.write)


@pytest.mark.gpu
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_it_waits_for_the_kernels_in_front(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be launched while they run: keys, values and slots come from the kernel just before it."""
    monkeypatch.setattr(cuda_kv_write, "multiprocessors", lambda device: 1 if many else 1 << 20)
    batch = build(LONG, AttentionOptions(), dim=128, heads=2, block_size=64)
    step, matrix = on_device(batch.needed_step), matrix_of(2, 128).cuda()
    source = torch.stack((batch.k, batch.v)).cuda()
    found = torch.zeros_like(source)
    slots = torch.stack((step.slots, step.full_slots))
    early = replace(step, slots=torch.full_like(slots[0], -1), full_slots=torch.full_like(slots[0], -1))

    def write(step: Step, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pages, full = like(batch.needed_pages), like(batch.needed_full)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if step is early:
                early.slots.copy_(slots[0])
                early.full_slots.copy_(slots[1])
                torch.mul(source, 1, out=found)
            cuda_kv_write.write(pages, full, batch.layout, step, k, v, matrix, batch.options)
        graph.replay()
        torch.cuda.synchronize()
        return pages, full

    cuda_kv_write.write(  # compiles, and splits the matrix
        like(batch.needed_pages), like(batch.needed_full), batch.layout, step, *source, matrix, batch.options
    )
    expected = write(step, *source)
    for _ in range(10):
        found.zero_()
        early.slots.fill_(-1)
        early.full_slots.fill_(-1)
        assert all(map(same_bits, write(early, *found), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_unkind_values(dtype: torch.dtype) -> None:
    options = AttentionOptions(v_scale=2.0**-20)
    batch = build([(3, 61), (0, 32)], options, heads=1, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    span = (-140, 127) if dtype == BF16 else (-24, 15)
    size = torch.randint(*span, (len(batch.k), 1, batch.k.shape[2] // 16), generator=rng)
    k = torch.ldexp(batch.k.float(), size.repeat_interleave(16, -1) // 2).to(dtype)
    v = torch.ldexp(batch.v.float(), size.repeat_interleave(16, -1)).to(dtype)
    for x, bad in ((k, torch.inf), (v, torch.nan), (v, -torch.inf)):
        x.view(-1)[torch.randint(0, x.numel(), (20,), generator=rng)] = bad
        x.view(-1)[torch.randint(0, x.numel(), (500,), generator=rng)] = -0.0
    v[5:9] = torch.finfo(dtype).max
    check_write(batch, None, k, v, cuda_kv_write.write)


@pytest.mark.gpu
def test_what_it_does_not_do_has_a_reason() -> None:
    device = torch.device("cuda")
    for options, said in (
        (dict(k="full"), "'full' of K"),
        (dict(v="4over6"), "'4over6' of V"),
        (dict(v_scale=0.3), "power of two"),
    ):
        assert said in cuda_kv_write.unsupported(
            PageLayout(64, 128, "tokens"), AttentionOptions(**options), device
        )
    assert "head_dim" in cuda_kv_write.unsupported(
        PageLayout(64, 128, "head_dim"), AttentionOptions(v_group="head_dim"), device
    )
