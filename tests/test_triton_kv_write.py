"""The Triton kernels that write the paged cache, and transform queries, give the reference's bits.

Kernels run on CUDA tensors where there is a GPU, and in Triton's interpreter on the CPU otherwise.
The interpreter has to be chosen before triton is imported, so `test_on_the_cpu` runs this file again,
in processes of their own. The references run on the CPU; batches are those of attention_batches.py.
"""

import interpreter
import pytest
import torch
from attention_batches import BF16, FP16, REQUESTS, build, check_write, matrix_of
from interpreter import COMPILES, DEVICE, INTERPRETED, RUNS_KERNELS
from triton_compiled import SHARED_MEMORY, compiled, spilled
from values import same_bits

from vllm_scalesearch.attention_reference import AttentionOptions, fake_quantized
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_kv_write


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_on_the_cpu() -> None:
    """All tests that run kernels, in the interpreter, in two processes."""
    interpreter.run_tests(__file__, ("head", "not head"), 5)


# --- writing -------------------------------------------------------------------------------------

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


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        triton_kv_write.transform_query(torch.zeros(1, 1, 64, dtype=BF16), None, AttentionOptions())


# --- what is compiled ----------------------------------------------------------------------------


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
