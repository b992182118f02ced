"""kernels/kv_write.cu: the bits of the reference's pages."""

import pytest
import torch
from test_triton_attention import BF16, FP16, LONG, LONG_DECODE, REQUESTS, build, check_write, matrix_of

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_kv_write


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_it_compiles_without_a_gpu(dim: int, arch: str) -> None:
    dtype = FP16 if dim == 96 else BF16
    rows = cuda_kv_write.rows_of(100_000, 8, dim, dtype, 132)
    macros = cuda_kv_write.defines(PageLayout(64, dim, "tokens"), 16, AttentionOptions(), dtype, rows, True)
    assert compile_kernel("kv_write.cu", "kv_write", macros, arch)[1:4] == b"ELF"


def test_parts_of_a_matrix_add_up_to_it() -> None:
    matrix = torch.randn(2, 64, 64)
    parts = cuda_kv_write.parts_of(matrix).double()
    assert parts.shape == (2, 2, 3, 8, 8, 4, 8)
    whole = parts.sum(2).permute(0, 1, 4, 5, 2, 3).reshape(2, 64, 64)
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
    monkeypatch.setattr(cuda_kv_write, "_multiprocessors", lambda device: 1 if many else 1 << 20)
    batch = build(REQUESTS, AttentionOptions(v_scale=1 / 16), padding=3, **SIZES[size])
    heads = batch.k.shape[1]
    check_write(batch, None, batch.k, batch.v, cuda_kv_write.write)
    check_write(batch, matrix_of(heads, batch.layout.head_size), batch.k, batch.v, cuda_kv_write.write)


@pytest.mark.gpu
@pytest.mark.parametrize("policies", POLICIES)
def test_policies(policies: str) -> None:
    for requests in (LONG, LONG_DECODE):
        batch = build(requests, AttentionOptions(**POLICIES[policies]), dim=128, heads=1, block_size=64)
        check_write(batch, matrix_of(1, 128), batch.k, batch.v, cuda_kv_write.write)


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
    for options, said in ((dict(k="full"), "'full' of K"), (dict(v="4over6"), "'4over6' of V")):
        assert said in cuda_kv_write.unsupported(
            PageLayout(64, 128, "tokens"), AttentionOptions(**options), device
        )
    assert "head_dim" in cuda_kv_write.unsupported(
        PageLayout(64, 128, "head_dim"), AttentionOptions(v_group="head_dim"), device
    )
