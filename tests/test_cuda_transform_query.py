"""kernels/transform_queries.cu: the reference's queries, and the bits of their NVFP4 values."""

import pytest
import torch
from attention_batches import BF16, FP16, matrix_of
from values import same_bits, unkind

from vllm_scalesearch.attention_reference import AttentionOptions, fake_quantized
from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.ops import cuda_kv_write, cuda_transform_query, paged_attention


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_it_compiles_without_a_gpu(dim: int, arch: str) -> None:
    dtype, policy = (FP16, None) if dim == 96 else (BF16, "paper")
    rows = cuda_kv_write.plan(100_000, 8, dim, 132).rows if arch != "sm_80" else 1
    macros = cuda_transform_query.defines(dim, AttentionOptions(q=policy), dtype, rows, True)
    assert compile_kernel("transform_queries.cu", "transform_queries", macros, arch)[1:4] == b"ELF"


@pytest.mark.parametrize(
    ("capability", "head_size", "policy", "expected"),
    [
        ((9, 0), 128, "paper", None),
        ((8, 0), 96, None, None),
        ((7, 5), 128, "paper", "compute capability"),
        ((9, 0), 80, "paper", "head_size 80"),
        ((9, 0), 128, "full", "policy 'full' of Q"),
    ],
)
def test_what_it_does_not_do_has_a_reason(capability, head_size, policy, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    reason = cuda_transform_query.unsupported(head_size, AttentionOptions(q=policy), torch.device("cuda"))
    assert (reason is None) == (expected is None) and (expected or "") in (reason or "")


SIZES = {
    "64, 3 of 9": dict(dim=64, heads=3, group=3),
    "96, alone, fp16": dict(dim=96, heads=2, group=1, dtype=FP16),
    "128, 2 of 8": dict(dim=128, heads=2, group=4),
    "128, fp16": dict(dim=128, heads=1, group=5, dtype=FP16),
    "256": dict(dim=256, heads=2, group=2),
    "256, fp16": dict(dim=256, heads=1, group=2, dtype=FP16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 3000])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("policy", ["paper", "absmax", None])
def test_values(size: str, tokens: int, policy: str | None) -> None:
    given = dict(SIZES[size])
    heads, dim, dtype = given["heads"], given["dim"], given.pop("dtype", BF16)
    options = AttentionOptions(q=policy)
    rng = torch.Generator().manual_seed(3)
    # A view, as the halves of a fused projection are.
    q = torch.randn(tokens, heads * given["group"] + 2, dim, generator=rng).to(dtype)[:, 1:-1]
    matrix = matrix_of(heads, dim)
    on_gpu = q.cuda().new_empty(tokens, q.shape[1] + 2, dim)[:, 1:-1]
    on_gpu.copy_(q)
    matrix_on_gpu = matrix.cuda()
    for _ in range(2):  # split first, and then launched early
        got, stored = (x.cpu() for x in cuda_transform_query.transform_query(on_gpu, matrix_on_gpu, options))
        expected = paged_attention.transformed(q, matrix)
        most = expected.float().abs().max()
        assert (got.float() - expected.float()).abs().max() <= most * torch.finfo(dtype).eps
        assert (got != expected).float().mean() < 0.02
        assert same_bits(stored, got if policy is None else fake_quantized(got.float(), policy).to(dtype))
    same, stored = cuda_transform_query.transform_query(on_gpu, None, options)
    assert same_bits(same.cpu(), q)
    assert same_bits(stored.cpu(), q if policy is None else fake_quantized(q.float(), policy).to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_unkind_values(dtype: torch.dtype) -> None:
    q = unkind(512, 128, dtype).view(-1, 1, 128)
    _, stored = cuda_transform_query.transform_query(q.cuda(), None, AttentionOptions(q="paper"))
    assert same_bits(stored.cpu(), fake_quantized(q.float(), "paper").to(dtype))
