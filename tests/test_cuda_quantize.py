"""The CUDA quantizer: its packed search emulated and its source compiled on the CPU, its bits on a GPU."""

import numpy as np
import pytest
import torch
from values import distributions, generator, same_bits, unkind

from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.formats import (
    MXFP4,
    NVFP4,
    decode_e4m3,
    finite_amax,
    swizzle_scales,
    tensor_scale_of,
    unswizzle_scales,
)
from vllm_scalesearch.ops import cuda_quantize, gpu_quantize, quantize
from vllm_scalesearch.search import ScalePolicy, _candidate_errors
from vllm_scalesearch.search import quantize as reference

DTYPES = (torch.bfloat16, torch.float16)
POLICIES = (
    "absmax", "fast", "paper", "exact", "offsets:3", "offsets:-8,-3,8", "offsets:1,2,3", "window:-8,7",
    "window:0,8", "offsets:-20,0,9", "offsets:-200,200",
)  # fmt: skip


# --- the packed search ---------------------------------------------------------------------------


def _fma16(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp16 a * b + c, rounded once: fp64 holds the product, and the sum but for its very last bits."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)


def _ambiguity(x: torch.Tensor, tensor_scale: torch.Tensor, policy: str) -> tuple[float, int]:
    """What the packed search leaves to the exact one, and how often it is wrong.

    x: (B, 16) fp32 blocks with bf16 or fp16 values. Returns the share of blocks with more than one candidate
    left, of those that the packed search takes, and the number of blocks whose winner is not left.
    Every packed instruction of `approximate_search` is done by numpy in fp16.
    """
    offsets = ScalePolicy.of(policy).offsets(NVFP4)
    reciprocal = 1.0 / tensor_scale
    y = x.abs() * reciprocal
    base = NVFP4.absmax_codes(y.amax(dim=-1))
    taken = (base >= 8 - min(offsets[0], 0)) & (y.amax(dim=-1) / 6 <= 464)
    x, y, base = x[taken], y[taken], base[taken]
    codes = ScalePolicy.of(policy).candidate_codes(y.amax(dim=-1), NVFP4)
    errors = _candidate_errors(y, x, decode_e4m3(codes), "mse", None)
    winner = torch.where(errors == errors.amin(dim=0), codes, 127).amin(dim=0)

    mantissa, exponent = torch.frexp(reciprocal)
    m, r = mantissa.float() * 2, exponent.int() - 1
    binade = (base >> 3) - 7
    a = torch.ldexp(x.abs().double(), r - binade.unsqueeze(-1) - 2).numpy().astype(np.float16)
    norm = np.zeros((len(a), 2), np.float16)
    for i in range(0, 16, 2):
        norm = _fma16(a[:, i : i + 2], a[:, i : i + 2], norm)
    norm = norm[:, 0] + norm[:, 1]
    approximate, r_error, s_error = [], 0, 0
    for number, code in enumerate(codes):
        relative = torch.ldexp(decode_e4m3(code), -binade)
        exact_r, exact_s = (m / relative / 4096).numpy(), (relative / m * -4096).numpy()
        big_r, minus_s = exact_r.astype(np.float16)[:, None], exact_s.astype(np.float16)[:, None]
        r_error = np.maximum(r_error, np.abs(big_r[:, 0] / exact_r - 1) * 2048)
        s_error = np.maximum(s_error, np.abs(minus_s[:, 0] / exact_s - 1) * 2048)
        q = ((a * big_r).view(np.uint16) + 0x100) & 0xFE00
        if offsets[number] < 0:
            q = np.minimum(q, 0x0E00)
        d = _fma16(q.view(np.float16), minus_s, a)
        error = np.zeros((len(a), 2), np.float16)
        for i in range(0, 16, 2):
            error = _fma16(d[:, i : i + 2], d[:, i : i + 2], error)
        error = error[:, 0] + error[:, 1]
        if number:
            error[(codes[number] == codes[number - 1]).numpy()] = np.nan
        approximate.append(error)
    approximate = np.stack(approximate).astype(np.float32)
    least, norm = np.nanmin(approximate, axis=0), norm.astype(np.float32)
    delta = (1.75 * r_error + 1) / 2048
    of_least, big_b, big_c = 1.0129 * (1 + delta / (0.25 - delta) ** 2), 2.03 / 2048, 1 / 32768
    assert (of_least < 1.0175**2).all() and (s_error <= 1).all()
    limit = of_least * least + 2 * 1.0175 * big_b * s_error * np.sqrt(least * norm) + big_b**2 * norm + big_c
    left = approximate <= (limit * 1.001).astype(np.float16).astype(np.float32)
    correct = (left & (codes == winner).numpy()).any(axis=0)
    return float((left.sum(axis=0) > 1).sum() / max(1, len(a))), int((~correct).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["fast", "paper", "exact", "window:-8,7"])
def test_the_packed_search_never_loses_the_winner(policy, dtype):
    for name, blocks in distributions(2000, seed=3).items():
        x = blocks.to(dtype).float()
        scales = map(torch.tensor, (0.0123, 2.0**-9, 1 / 16, 1.0))
        for tensor_scale in (tensor_scale_of(finite_amax(x)), *scales):
            share, wrong = _ambiguity(x, tensor_scale, policy)
            assert wrong == 0, (name, tensor_scale)
            assert name != "normal" or share < 0.3


def test_tables_of_a_scale_that_is_a_power_of_two() -> None:
    """What nvfp4_search.cuh has the compiler compute from integers, beside fp16's own rounding."""
    for base in range(8, 127):
        for code in range(max(base - 8, 8), min(base + 8, 126) + 1):
            eighths, binade = 8 + code % 8, code // 8 - base // 8
            r = (3 - binade) << 10
            if eighths > 8:
                r = ((2 - binade) << 10) + (32768 + eighths) // (2 * eighths) - 1024
            s = 0x8000 | (27 + binade) << 10 | code % 8 << 7
            relative = eighths / 8 * 2.0**binade
            expected = np.array([2.0**-12 / relative, -(2.0**12) * relative], np.float64).astype(np.float16)
            assert [r, s] == expected.view(np.uint16).tolist()


# --- compiling and launching ---------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"])
def test_source_compiles(arch):
    for policy, dtype, scale, outputs in (
        ("absmax", torch.bfloat16, cuda_quantize.TENSOR, {"packed": True}),
        ("paper", torch.bfloat16, cuda_quantize.TENSOR, {"packed": True, "flat": True}),
        ("paper", torch.float16, cuda_quantize.ROW, {"packed": True, "swizzled": True}),
        ("exact", torch.bfloat16, cuda_quantize.COMPUTED, {"packed": False, "values": True}),
        ("offsets:-20,0,9", torch.float16, cuda_quantize.COMPUTED, {"packed": True, "values": True}),
    ):
        macros = cuda_quantize.defines(cuda_quantize.offsets_of(policy), dtype, scale, 256, **outputs)
        assert compile_kernel("quantize_nvfp4.cu", "quantize_nvfp4", macros, arch)[1:4] == b"ELF"


@pytest.mark.parametrize("rows", [1, 3, 64, 4096])
@pytest.mark.parametrize("blocks", [1, 5, 64, 256, 257, 512, 1792, 5000])
def test_plans_cover_all_blocks_once(rows, blocks):
    for scale in (cuda_quantize.ROW, cuda_quantize.COMPUTED):
        for processors in (1, 84, 132):
            plan = cuda_quantize.plan(rows, blocks, scale, processors, 9)
            assert plan.grid[0] == rows and plan.share <= 2048
            assert (plan.grid[1] - 1) * plan.share < blocks <= plan.grid[1] * plan.share


def test_plans_of_all_rows_are_whole_waves():
    for rows, blocks, expected in ((1, 1, 1), (3, 100, 2), (1, 256 * 528, 528), (4096, 512, 528)):
        plan = cuda_quantize.plan(rows, blocks, cuda_quantize.TENSOR, 132, 9)
        assert plan.grid == (expected, 1, 1)
    assert cuda_quantize.plan(8192, 512, cuda_quantize.TENSOR, 132, 1).grid == (4 * 8 * 132, 1, 1)
    for policy in ("window:-8,7", "window:-7,8", "offsets:-20,0,9"):
        offsets = cuda_quantize.offsets_of(policy)
        assert 4 * (cuda_quantize.shared_bytes(offsets, plan.threads) + 1024) <= 227 * 1024


def test_what_the_kernel_cannot_do_is_refused():
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    for policy in ("full", "4over6", "window:-8,8", ScalePolicy("paper", "wmse")):
        with pytest.raises(ValueError, match="CUDA quantizer"):
            cuda_quantize.quantize_values(x, policy)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        cuda_quantize.quantize_values(x.float(), "paper")
    with pytest.raises(ValueError, match="two dimensions"):
        cuda_quantize.quantize_values(x[0], "paper")
    with pytest.raises(ValueError, match="CUDA tensor"):
        cuda_quantize.quantize_values(x, "paper")


# --- on a GPU ------------------------------------------------------------------------------------


def _check_packed(x, policy, tensor_scale=None, per_row=False, swizzled=False):
    expected = reference(x, NVFP4, policy, per_row=per_row, tensor_scale=tensor_scale)
    packed, scales, got_scale = cuda_quantize.quantize_packed(x, policy, tensor_scale, per_row, swizzled)
    assert same_bits(got_scale, expected.tensor_scale)
    expected_scales = swizzle_scales(expected.scales) if swizzled else expected.scales
    wrong = (scales.view(torch.uint8) != expected_scales.view(torch.uint8)).sum()
    assert same_bits(scales, expected_scales), f"{int(wrong)} of {scales.numel()} scales"
    assert torch.equal(packed, expected.packed), f"{int((packed != expected.packed).sum())} bytes"
    if swizzled:
        assert same_bits(unswizzle_scales(scales, *expected.scales.shape), expected.scales)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_packed_is_the_reference(policy, dtype):
    for shape in ((64, 512), (1, 16), (130, 80), (3, 4096), (5, 33 * 1024)):
        x = unkind(*shape, dtype).cuda()
        row_scale = torch.rand(shape[0], 1, device="cuda", generator=generator(0, "cuda")) + 1e-3
        scales = [torch.tensor(scale, device="cuda") for scale in (1e-3, 0.37, 2.0**-126, 3e38)]
        for tensor_scale in (None, *scales, row_scale):
            for swizzled in (False, True):
                _check_packed(x, policy, tensor_scale, swizzled=swizzled)
        _check_packed(x, policy, per_row=True)
        _check_packed(x, policy, per_row=True, swizzled=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_values_are_the_reference(policy, dtype):
    for shape in ((64, 512), (1, 16), (130, 80), (3, 4096), (5, 33 * 1024)):
        x = unkind(*shape, dtype).cuda()
        values, residual = cuda_quantize.quantize_values(x, policy)
        expected = quantize._reference(x, "nvfp4", policy)
        assert same_bits(values, expected[0]) and same_bits(residual, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["absmax", "fast", "paper", "exact"])
def test_a_hundred_million_values(policy, dtype):
    for seed in range(3):
        for blocks in distributions(1 << 18, seed, "cuda").values():
            _check_packed(blocks.view(1024, 4096).to(dtype), policy, per_row=seed == 1)


@pytest.mark.gpu
def test_rows_apart_and_views():
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    for view in (x[:, :512], x[::3, 16:272], x[:, 1:513], x.t(), x[:0], x[:, :0]):
        for per_row in (False, True):
            packed, scales, _ = cuda_quantize.quantize_packed(view, "paper", per_row=per_row)
            if view.numel():
                _check_packed(view, "paper", per_row=per_row)
            assert packed.shape == (view.shape[0], view.shape[1] // 2)
            assert scales.shape == (view.shape[0], view.shape[1] // 16)


@pytest.mark.gpu
def test_captured_in_a_graph():
    x = torch.randn(32, 4096, device="cuda", dtype=torch.bfloat16)
    cuda_quantize.quantize_values(x, "paper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, residual = cuda_quantize.quantize_values(x, "paper")
    x.copy_(torch.randn_like(x))
    graph.replay()
    expected = quantize._reference(x, "nvfp4", "paper")
    assert same_bits(values, expected[0]) and same_bits(residual, expected[1])


def test_which_kernel_takes_what():
    large = torch.empty(2048, 4096, dtype=torch.bfloat16, device="meta")
    uses = gpu_quantize.uses_cuda_kernel
    assert all(uses(large, NVFP4, policy) for policy in ("fast", "paper", "exact", "window:-1,1"))
    assert not any(uses(large, NVFP4, policy) for policy in ("absmax", "full", "4over6", "offsets:0,12"))
    assert not uses(large, MXFP4, "paper")
    assert not uses(large.float(), NVFP4, "paper")
    assert not uses(large[:32], NVFP4, "paper")


@pytest.mark.gpu
def test_the_chosen_kernel_gives_the_references_bits():
    for rows in (32, 1100):  # Triton's, and this one
        x = unkind(rows, 4096, torch.bfloat16).cuda()
        assert gpu_quantize.uses_cuda_kernel(x, NVFP4, "paper") == (rows > 1000)
        expected = reference(x, NVFP4, "paper")
        for scale in (None, expected.tensor_scale):
            packed, scales, got = gpu_quantize.quantize_packed(x, NVFP4, "paper", scale)
            assert torch.equal(packed, expected.packed) and same_bits(got, expected.tensor_scale)
            assert same_bits(scales, expected.scales)
        values, residual = gpu_quantize.quantize_values(x, NVFP4, "paper")
        expected = quantize._reference(x, "nvfp4", "paper")
        assert same_bits(values, expected[0]) and same_bits(residual, expected[1])
