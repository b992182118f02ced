"""The Triton quantizers give the reference's bits.

Kernels run on CUDA tensors where there is a GPU, and in Triton's interpreter on the CPU otherwise.
The interpreter has to be chosen before triton is imported, so `test_on_the_cpu` runs this file again,
in processes of their own.
"""

import re
import subprocess

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import COMPILES, DEVICE, INTERPRETED, RUNS_KERNELS
from search_cases import blocks, rules, rules_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from values import generator, normal, same_bits

from vllm_scalesearch.formats import (
    MXFP4,
    NVFP4,
    BlockFormat,
    decode_e4m3,
    encode_e4m3,
    finite_amax,
    swizzle_scales,
    tensor_scale_of,
)
from vllm_scalesearch.ops import triton_blocks, triton_quantize
from vllm_scalesearch.search import ScalePolicy, quantize

FORMAT = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


# --- on the CPU ----------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_on_the_cpu() -> None:
    """All tests that run kernels, in the interpreter; one process for each format."""
    interpreter.run_tests(__file__, ("mxfp4", "not mxfp4"), 20)


# --- data ----------------------------------------------------------------------------------------


def unkind(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of whole groups of 32 values of every kind that treats a search unkindly."""
    groups = normal(rows * width // 32, 32)
    pick = torch.randint(0, 32, (len(groups), 1), generator=generator(1))
    at = torch.arange(32)
    big, tiny = (3e4, 3e-7) if dtype == torch.float16 else (3e37, 1e-41)
    kinds = [
        lambda x: x,
        lambda x: x * 1e-4,  # the smallest scales
        lambda x: x * 3e-6,  # below them
        lambda x: torch.where(at == pick[: len(x)], x * 300, x),  # an outlier
        lambda x: torch.where(at == pick[: len(x)], x, 0.0),  # alone
        lambda x: x[:, :1].expand(-1, 32),  # all equal
        lambda x: torch.zeros_like(x),
        lambda x: torch.zeros_like(x).copysign(x),
        lambda x: (x * 2).round() / 2,  # ties
        lambda x: (x * 4).round() / 4 * 1.25,
        lambda x: (x * 2).exp(),
        lambda x: x * tiny,  # denormals
        lambda x: torch.where(at == pick[: len(x)], torch.inf, x).copysign(x),
        lambda x: torch.where(at == pick[: len(x)], torch.nan, x),
        lambda x: torch.where(at == 31 - pick[: len(x)], -0.0, x),
    ]
    for i, kind in enumerate(kinds):
        groups[i :: len(kinds)] = kind(groups[i :: len(kinds)])
    x = groups[torch.randperm(len(groups), generator=generator(2))].view(rows, width)
    if rows > 1:
        x[1] *= big / x[1][x[1].isfinite()].abs().amax()
    return x.to(dtype).to(DEVICE)


def check_packed(x, fmt, rule, tensor_scale=None, per_row=False, swizzled=False) -> None:
    expected = quantize(x, fmt, rule, per_row=per_row, tensor_scale=tensor_scale)
    packed, scales, used = triton_quantize.quantize_packed(x, fmt, rule, tensor_scale, per_row, swizzled)
    assert same_bits(used, expected.tensor_scale)
    assert same_bits(scales, swizzle_scales(expected.scales) if swizzled else expected.scales)
    assert same_bits(packed, expected.packed)


def check_values(values, residual, x, fmt, rule) -> None:
    """They are those of x quantized by row."""
    expected, expected_residual = quantize(x, fmt, rule, per_row=True).values(x.dtype)
    assert same_bits(residual, expected_residual.expand(len(x), 1))
    assert same_bits(values, expected)


# --- the parts that rounding depends on ----------------------------------------------------------


@triton.jit
def _codec_kernel(x_ptr, code_ptr, scale_ptr, reciprocal_ptr, half_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    code = triton_blocks.encode_e4m3(x)
    scale = triton_blocks.decode_e4m3(tl.maximum(code, 1))
    tl.store(code_ptr + at, code)
    tl.store(scale_ptr + at, scale)
    tl.store(reciprocal_ptr + at, triton_blocks.reciprocal_of_e4m3(scale))
    tl.store(half_ptr + at, triton_blocks.narrow(x, tl.bfloat16))


@RUNS_KERNELS
def test_scales_and_bf16_are_rounded_as_torch_rounds() -> None:
    # All fp32 numbers >= 0 of which the lower 16 bits are 0, 1, half, or next to half: every E4M3
    # value and tie, every bf16 value and tie, and their neighbours.
    upper = torch.arange(0x7F80, dtype=torch.int32)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    bits = ((upper << 16) + lower.unsqueeze(-1)).flatten()
    size = 1 << (16 if INTERPRETED else 10)
    x = torch.cat((bits, bits.new_zeros(-len(bits) % size))).view(torch.float32).to(DEVICE)
    code, scale, reciprocal = x.int(), torch.empty_like(x), torch.empty_like(x)
    half = x.bfloat16()
    half.zero_()
    _codec_kernel[(len(x) // size,)](x, code, scale, reciprocal, half, SIZE=size, enable_fp_fusion=False)
    expected = encode_e4m3(x.cpu()).int()
    assert torch.equal(code.cpu(), expected)
    assert expected.unique().tolist() == list(range(127))
    assert torch.equal(scale.cpu(), decode_e4m3(expected.clamp(min=1)))
    assert torch.equal(reciprocal.cpu(), 1.0 / scale.cpu())
    assert torch.equal(half.cpu(), x.cpu().bfloat16())


# --- quantizers ----------------------------------------------------------------------------------


def some_rules(fmt: BlockFormat) -> st.SearchStrategy[str]:
    """Any rule, or a named one where each rule has to be compiled."""
    if INTERPRETED:
        return rules(fmt)
    return st.sampled_from([rule for rule in rules_of(fmt) if rule != "full"])


def named(value: BlockFormat | str) -> str:
    return value if isinstance(value, str) else value.name


@RUNS_KERNELS
@DTYPE
@pytest.mark.parametrize(
    ("fmt", "rule"),
    [
        (fmt, rule)
        for fmt in (NVFP4, MXFP4)
        for rule in (*rules_of(fmt), "offsets:200", "offsets:-255,-200,255")
        if rule != "full"
    ],
    ids=named,
)
def test_every_policy_gives_the_bits_of_the_reference(fmt: BlockFormat, rule: str, dtype: torch.dtype) -> None:
    x = unkind(2, 4096, dtype)
    check_packed(x, fmt, rule)
    check_packed(x, fmt, rule, per_row=True)
    check_values(*triton_quantize.quantize_values(x, fmt, rule), x, fmt, rule)


@RUNS_KERNELS
@FORMAT
def test_all_scales_give_the_bits_of_the_reference(fmt: BlockFormat) -> None:
    # A second for each row in the interpreter, hence one row of one dtype.
    check_packed(unkind(1, 1024, torch.bfloat16), fmt, "full")


@RUNS_KERNELS
@settings(deadline=None, max_examples=40 if INTERPRETED else 300)
@given(data=st.data(), per_row=st.booleans())
@FORMAT
def test_any_blocks_give_the_bits_of_the_reference(fmt, data, per_row) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    drawn = data.draw(st.lists(blocks(-149, 124), min_size=4, max_size=4))
    x = torch.tensor(drawn).to(dtype).view(1, 128).to(DEVICE)
    check_packed(x, fmt, data.draw(some_rules(fmt)), per_row=per_row)


@RUNS_KERNELS
@settings(deadline=None, max_examples=40 if INTERPRETED else 300)
@given(data=st.data(), exponent=st.integers(-60, 60))
def test_given_scales_give_the_bits_of_the_reference(data, exponent) -> None:
    x = torch.tensor(data.draw(st.lists(blocks(-60, 60), min_size=4, max_size=4))).view(2, 64).to(DEVICE)
    tensor_scale = torch.tensor([[1.3 * 2.0**exponent], [0.9]], device=DEVICE)
    if data.draw(st.booleans()):
        tensor_scale = tensor_scale[0, 0]
    check_packed(x, NVFP4, data.draw(some_rules(NVFP4)), tensor_scale)


@RUNS_KERNELS
@pytest.mark.parametrize("rule", ["absmax", "4over6", "paper"])
@pytest.mark.parametrize("tensor_scale", [1.0, 1.3, 3.7e-5])
def test_products_with_reciprocals_give_the_bits_of_the_reference(tensor_scale: float, rule: str) -> None:
    # Under every scale: the largest value, what lies between two elements, and the fp32 neighbours.
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat((ties, torch.nextafter(ties, torch.tensor(torch.inf))))
    x = decode_e4m3(torch.arange(1, 127)).unsqueeze(-1) * ties * tensor_scale
    x = x.view(1, -1).to(DEVICE)
    check_packed(x, NVFP4, rule, torch.tensor(tensor_scale, device=DEVICE))


@RUNS_KERNELS
def test_errors_are_added_neighbours_first() -> None:
    # As in test_search.py: both scales leave the same squares at other places, and only the order of
    # the rounded sum tells them apart.
    rng = generator()
    below, above = torch.tensor([[1.0, 1.25], [1.875, 2.0], [2.5, 3.0], [3.75, 4.0]]).repeat(2, 1).T
    middle, half = (below + above) / 2, (above - below) / 2
    shift = half * torch.randint(1, 2**16, (256, 8), generator=rng) / 2**17
    pairs = torch.cat((middle + shift, middle - shift), dim=-1)
    x = torch.stack([row[torch.randperm(16, generator=rng)] for row in pairs]).view(1, -1).to(DEVICE)
    check_packed(x, NVFP4, "offsets:6,8", torch.tensor(1.0, device=DEVICE))


@RUNS_KERNELS
@DTYPE
@FORMAT
def test_rows_of_any_size_are_folded_as_the_reference_folds(fmt: BlockFormat, dtype: torch.dtype) -> None:
    largest = torch.tensor([[torch.finfo(dtype).smallest_normal / 4], [1e-6], [1.0], [torch.finfo(dtype).max]])
    x = (normal(4, 64).clamp(-1, 1) * largest).to(dtype).to(DEVICE)
    check_values(*triton_quantize.quantize_values(x, fmt, "paper"), x, fmt, "paper")


@RUNS_KERNELS
def test_values_far_beyond_a_given_scale_give_the_bits_of_the_reference() -> None:
    # Around the bound of 2**40, where it decides how the smaller errors round.
    exponent = torch.randint(30, 44, (1, 16 * 4096), generator=generator())
    x = torch.ldexp(1 + torch.rand(exponent.shape, generator=generator()), exponent).to(DEVICE)
    check_packed(x, NVFP4, "offsets:-6,-4,-2,0", torch.tensor(1.0, device=DEVICE))
    x = torch.full((1, 64), 1e30, device=DEVICE)  # x / scale is infinite
    x[0, 1::3] = 1e-10
    check_packed(x, NVFP4, "paper", torch.tensor(1e-10, device=DEVICE))


@RUNS_KERNELS
@pytest.mark.parametrize("programs", [1, 512])
@pytest.mark.parametrize("tail", [0, 1, 7])
@FORMAT
def test_long_rows_are_worked_on_in_tiles(fmt, tail, programs, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 128 blocks, all by one program or each by its own.
    monkeypatch.setattr(triton_quantize, "_PROGRAMS", programs)
    width = fmt.block_size * (128 * 3 + tail)
    x = unkind(2, width + width % 32, torch.bfloat16)[:, :width]
    check_packed(x, fmt, "fast", per_row=True, swizzled=True)
    check_values(*triton_quantize.quantize_values(x, fmt, "fast"), x, fmt, "fast")


@RUNS_KERNELS
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (3, 96), (3, 544), (130, 32)])
@FORMAT
def test_swizzled_scales_are_padded_with_zeros(fmt: BlockFormat, rows: int, width: int) -> None:
    check_packed(unkind(rows, width, torch.bfloat16), fmt, "absmax", swizzled=True)


@RUNS_KERNELS
@FORMAT
@pytest.mark.parametrize("layout", ["columns of a wider tensor", "every other row", "transposed"])
def test_strided_input_is_quantized_like_its_copy(layout: str, fmt: BlockFormat) -> None:
    if layout == "columns of a wider tensor":
        x = unkind(3, 192, torch.bfloat16)[:, 64:128]
    elif layout == "every other row":
        x = unkind(6, 64, torch.bfloat16)[::2]
    else:
        x = unkind(64, 32, torch.bfloat16).t()[:3]
    check_packed(x, fmt, "paper", per_row=True)
    check_packed(x, fmt, "paper")
    check_values(*triton_quantize.quantize_values(x, fmt, "paper"), x, fmt, "paper")


@RUNS_KERNELS
@FORMAT
def test_one_pass_gives_codes_and_values(fmt: BlockFormat) -> None:
    x = unkind(2, 256, torch.bfloat16)
    result = triton_quantize.run(x, fmt, "paper", packed=True, values=True, activation=True)
    expected = quantize(x, fmt, "paper", per_row=True)
    assert same_bits(result.packed, expected.packed)
    assert same_bits(result.scales, expected.scales)
    assert same_bits(result.activation, x)
    check_values(result.values, result.residual, x, fmt, "paper")


@RUNS_KERNELS
@DTYPE
def test_tensor_scale_is_that_of_the_finite_values(dtype: torch.dtype) -> None:
    for x in (
        unkind(2, 9024, dtype),
        unkind(2, 96, dtype)[:1, 5:],
        torch.full((2, 64), torch.nan, dtype=dtype, device=DEVICE),
        torch.full((2, 64), 1e-7, dtype=dtype, device=DEVICE),
        torch.empty(0, 64, dtype=dtype, device=DEVICE),
    ):
        assert same_bits(triton_quantize.tensor_scale(x), tensor_scale_of(finite_amax(x)))


@RUNS_KERNELS
@FORMAT
def test_no_rows_give_no_rows(fmt: BlockFormat) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE)
    for per_row in (False, True):
        check_packed(x, fmt, "paper", per_row=per_row)
    values, residual = triton_quantize.quantize_values(x, fmt, "paper")
    assert (values.shape, residual.shape) == ((0, 64), (0, 1))


# --- fused with what comes before ----------------------------------------------------------------


def check_fused(result, fmt, rule, reference, dtype) -> None:
    """`result` quantizes its own activation as the reference does, and that is near `reference`."""
    own = result.activation
    expected = quantize(own, fmt, rule, per_row=True)
    assert same_bits(result.packed, expected.packed)
    assert same_bits(result.scales, expected.scales)
    check_values(result.values, result.residual, own, fmt, rule)
    assert torch.equal(own.isfinite(), reference.isfinite())
    # Functions that differ in their last fp32 bits round to the same or to neighbouring numbers.
    rtol = max(2 * torch.finfo(dtype).eps, 2**-18)
    torch.testing.assert_close(own, reference, rtol=rtol, atol=1e-37, equal_nan=True)
    if dtype != torch.float32:
        assert (own == reference)[reference.isfinite()].float().mean() > 0.99


# Rows of one tile and of several.
ROWS = pytest.mark.parametrize(
    ("blocks_in_row", "dtype"),
    [(3, torch.bfloat16), (3, torch.float16), (3, torch.float32), (300, torch.bfloat16)],
    ids=str,
)


@RUNS_KERNELS
@ROWS
@FORMAT
def test_silu_mul(fmt: BlockFormat, blocks_in_row: int, dtype: torch.dtype) -> None:
    width = fmt.block_size * blocks_in_row
    x = normal(2, 2 * width) * 3
    x[0, 5], x[1, width + 7], x[0, 40], x[1, 9] = torch.nan, torch.inf, -200.0, 100.0
    x = x.to(dtype).to(DEVICE)
    reference = torch.nn.functional.silu(x[:, :width]) * x[:, width:]  # SiluAndMul.forward_native
    result = triton_quantize.run(x, fmt, "fast", source="silu_mul", packed=True, values=True, activation=True)
    check_fused(result, fmt, "fast", reference, dtype)
    values, residual = triton_quantize.silu_mul_quantize_values(x, fmt, "fast")
    assert same_bits(values, result.values)
    assert same_bits(residual, result.residual)
    packed, scales, _ = triton_quantize.silu_mul_quantize_packed(x, fmt, "fast", swizzled=True)
    assert same_bits(packed, result.packed)
    assert same_bits(scales, swizzle_scales(result.scales))


@RUNS_KERNELS
@ROWS
@pytest.mark.parametrize("with_residual", [False, True], ids=["norm", "add and norm"])
@FORMAT
def test_rms_norm(fmt: BlockFormat, blocks_in_row: int, with_residual: bool, dtype: torch.dtype) -> None:
    width, eps = fmt.block_size * blocks_in_row, 1e-5
    x = (normal(3, width) * torch.tensor([[1e-3], [1.0], [50.0]])).to(dtype).to(DEVICE)
    addend = normal(3, width, seed=1).to(dtype).to(DEVICE) if with_residual else None
    weight = normal(width, seed=2).to(dtype).to(DEVICE)
    # vLLM's ir.ops.rms_norm and fused_add_rms_norm.
    y = x.float() if addend is None else x.float() + addend.float()
    stream = y.to(dtype)
    y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps)
    reference = y.to(dtype) * weight
    result = triton_quantize.run(
        x, fmt, "fast", source="rms_norm", packed=True, values=True, activation=True,
        weight=weight, eps=eps, addend=addend,
    )  # fmt: skip
    check_fused(result, fmt, "fast", reference, dtype)
    values, residual, new = triton_quantize.rms_norm_quantize_values(x, weight, eps, fmt, "fast", addend)
    assert same_bits(values, result.values)
    assert same_bits(residual, result.residual)
    packed, scales, _, same_new = triton_quantize.rms_norm_quantize_packed(x, weight, eps, fmt, "fast", addend)
    assert same_bits(packed, result.packed)
    assert same_bits(scales, result.scales)
    if with_residual:
        assert same_bits(new, stream)
        assert same_bits(same_new, stream)
    else:
        assert new is None
        assert same_new is None


@RUNS_KERNELS
def test_rms_norm_rounds_in_the_dtype_of_the_weight() -> None:
    x, weight = normal(2, 64).bfloat16().to(DEVICE), normal(64, seed=1).to(DEVICE)
    result = triton_quantize.run(
        x, NVFP4, "fast", source="rms_norm", values=True, activation=True, weight=weight, eps=1e-5
    )
    y = x.float()
    reference = (y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-5) * weight).bfloat16()
    assert (result.activation == reference).float().mean() > 0.99
    check_values(result.values, result.residual, result.activation, NVFP4, "fast")


# --- errors --------------------------------------------------------------------------------------


@RUNS_KERNELS
def test_wrong_arguments_say_why() -> None:
    x = normal(2, 64).to(DEVICE)
    run, packed = triton_quantize.run, triton_quantize.quantize_packed
    with pytest.raises(ValueError, match=r"bf16, fp16 or fp32.*int32"):
        packed(x.int(), NVFP4, "paper")
    with pytest.raises(ValueError, match="two dimensions"):
        packed(x[0], NVFP4, "paper", per_row=True)
    with pytest.raises(ValueError, match="72 is not a multiple of nvfp4's block of 16"):
        packed(normal(2, 72).to(DEVICE), NVFP4, "paper")
    with pytest.raises(ValueError, match="'best'"):
        packed(x, NVFP4, "best")
    with pytest.raises(ValueError, match="4over6"):
        packed(x[:0], MXFP4, "4over6")
    with pytest.raises(ValueError, match="'mse', not 'wmse'"):
        packed(x, NVFP4, ScalePolicy("paper", "wmse"))
    with pytest.raises(ValueError, match="mxfp4 has no tensor scale"):
        packed(x, MXFP4, "paper", torch.ones((), device=DEVICE))
    with pytest.raises(ValueError, match=r"a scalar or \(2, 1\), got \(2,\)"):
        packed(x, NVFP4, "paper", torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match="float64"):
        packed(x, NVFP4, "paper", torch.ones((), dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="'gelu'"):
        run(x, NVFP4, "paper", source="gelu", values=True)
    with pytest.raises(ValueError, match="gate and an up"):
        run(x[:, :63], NVFP4, "paper", source="silu_mul", values=True)
    with pytest.raises(ValueError, match="weight"):
        run(x, NVFP4, "paper", source="rms_norm", values=True)
    with pytest.raises(ValueError, match=r"weight \(64,\), got \(32,\)"):
        run(x, NVFP4, "paper", source="rms_norm", values=True, weight=x[0, :32], eps=1e-5)
    with pytest.raises(ValueError, match="residual stream"):
        run(x, NVFP4, "paper", values=True, addend=x)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        triton_quantize.quantize_values(normal(2, 64), NVFP4, "paper")


# --- what is compiled ----------------------------------------------------------------------------


def compiled(arch: int, fmt: BlockFormat = NVFP4, rule: str = "paper", **arguments):
    """The kernel with all its outputs for rows of 4096 bf16 values, compiled without a GPU."""
    kernel = triton_quantize._quantize_kernel
    scale = "computed" if fmt.has_tensor_scale else "none"
    arguments = {"scale": scale, "hw_e2m1": arch >= 100, **arguments}
    constants, warps, _ = triton_quantize.constants(fmt, rule, torch.bfloat16, 4096, **arguments)
    types = dict(
        x_ptr="*bf16", x_stride="i32", addend_stride="i32", eps="fp32", packed_ptr="*i32", scales_ptr="*u8",
        values_ptr="*bf16", residual_ptr="*fp32", width="i32", tiles_per_program="i32",
    )  # fmt: skip
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(i,): constants.get(name) for i, name in enumerate(names) if name not in types},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in ("x_stride", "width") or types.get(name, "").startswith("*")
        },
    )
    options = dict(num_warps=warps, enable_fp_fusion=False)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@COMPILES
@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize(("fmt", "rule"), [(NVFP4, "paper"), (MXFP4, "offsets:-1,1")], ids=["nvfp4", "mxfp4"])
def test_ptx_computes_what_the_definition_says(fmt: BlockFormat, rule: str, arch: int) -> None:
    ptx = compiled(arch, fmt, rule).asm["ptx"]
    assert f".target sm_{arch}a" in ptx
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) == (arch >= 100)
    for inexact in (".approx", "div.full", ".ftz"):
        assert inexact not in ptx
    # Each fma is one that the kernel asks for, so none was made of a square and the sum of the error:
    # s * q - |y|, the rounding of elements without hardware for it, and NVFP4's reciprocals.
    candidates = ScalePolicy(rule).candidate_count(fmt)
    expected = candidates * fmt.block_size
    if arch < 100:
        expected += (candidates + 1) * fmt.block_size
    if fmt is NVFP4:
        expected += (candidates + 1) * 6
    found = re.findall(r"fma\.rn\.f32(x2)?\s", ptx)
    assert sum(2 if packed else 1 for packed in found) == expected


@COMPILES
@pytest.mark.parametrize("rule", ["absmax", "fast", "paper", "exact", "full"])
@FORMAT
def test_everything_stays_in_registers(fmt: BlockFormat, rule: str, tmp_path) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled(90, fmt, rule).asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert (used["STACK"], used["LOCAL"]) == (0, 0)
    # 128 registers leave room for 16 warps on a multiprocessor; NVFP4 takes about 60, MXFP4 80.
    assert used["REG"] <= (80 if fmt is NVFP4 else 128)
    # What a thread needs of a block it has: only the row's amax goes through shared memory.
    assert fmt is NVFP4 or "SHARED:0" in usage


# --- on a GPU ------------------------------------------------------------------------------------

SIZE = 1 << 24  # values of each distribution; six of them make 10**8
DISTRIBUTIONS = {
    "normal": lambda x: x.normal_(),
    "laplace": lambda x: x.exponential_() * torch.randn_like(x).sign(),
    "student-t": lambda x: x.normal_() / torch.randn(5, *x.shape, device=x.device).square().mean(0).sqrt(),
    "uniform": lambda x: x.uniform_(-1, 1),
    "lognormal": lambda x: x.log_normal_(0, 2) * torch.randn_like(x).sign(),
    "mixed blocks": lambda x: x.normal_() * (6 * torch.randn_like(x[:, ::16])).exp().repeat_interleave(16, 1),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@FORMAT
def test_many_values_give_the_bits_of_the_reference(fmt, distribution, dtype) -> None:
    torch.manual_seed(0)
    for width in (4096, 14336):
        x = torch.empty(SIZE // 2 // width, width, device="cuda")
        x = DISTRIBUTIONS[distribution](x).to(dtype)
        for rule in ("paper", "exact", "fast"):
            check_packed(x, fmt, rule, per_row=True)
        check_packed(x, fmt, "paper")
        check_values(*triton_quantize.quantize_values(x, fmt, "paper"), x, fmt, "paper")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 3000])
@pytest.mark.parametrize("width", [576, 4096, 8192, 28672, 32768])
@FORMAT
def test_rows_of_any_width_on_a_gpu(fmt, width, rows) -> None:
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    check_packed(x, fmt, "paper", per_row=True, swizzled=True)
    check_values(*triton_quantize.quantize_values(x, fmt, "paper"), x, fmt, "paper")


@pytest.mark.gpu
@FORMAT
def test_capture_in_a_cuda_graph(fmt: BlockFormat) -> None:
    x = torch.randn(32, 8192, device="cuda", dtype=torch.bfloat16)

    def everything():
        return (
            *triton_quantize.quantize_values(x, fmt, "paper"),
            *triton_quantize.quantize_packed(x, fmt, "paper", swizzled=True),
            *triton_quantize.silu_mul_quantize_values(x, fmt, "paper"),
            *triton_quantize.rms_norm_quantize_values(x, x[0], 1e-5, fmt, "paper", residual=x),
        )

    everything()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, expected in zip(captured, everything(), strict=True):
        assert same_bits(got, expected)
