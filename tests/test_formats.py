"""Codecs, packing, tensor scales and layouts against arithmetic written independently of the package."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_scalesearch.formats import (
    FORMATS,
    MXFP4,
    NVFP4,
    QuantizedTensor,
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    decode_packed,
    encode_e2m1,
    encode_e4m3,
    finite_amax,
    pack_e2m1,
    round_to_e2m1,
    swizzle_scales,
    tensor_scale_of,
    unpack_e2m1,
    unswizzle_scales,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def nearest(values: list[float], x: float) -> int:
    """Index of the value nearest to x; of two equally near, the one with the even index (mantissa)."""
    return min(range(len(values)), key=lambda i: (abs(values[i] - x), i % 2))


def neighbours(x: float) -> list[float]:
    """x and the fp32 numbers just below and above it."""
    at = torch.tensor(x)
    return [torch.nextafter(at, torch.tensor(to)).item() for to in (-math.inf, math.inf)] + [x]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


# --- elements ------------------------------------------------------------------------------------


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert round_to_e2m1(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert encode_e2m1(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert encode_e2m1(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_rounding_is_to_nearest() -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(E2M1)]
    edges = [y for x in (*middles, *E2M1[1:]) for y in neighbours(x)]
    x = torch.tensor([*edges, *torch.linspace(0, 7, 2001).tolist(), 2.0**-149, 2.0**-126])
    expected = [nearest(E2M1, value) for value in x.tolist()]
    assert round_to_e2m1(x).tolist() == [E2M1[i] for i in expected]
    assert encode_e2m1(x).tolist() == expected
    # Code 8 is minus zero, so what rounds to zero keeps its sign.
    assert encode_e2m1(-x).tolist() == [i + 8 for i in expected]


def test_elements_saturate() -> None:
    x = torch.tensor([6.5, 7.0, 1e9, 3e38, math.inf])
    assert encode_e2m1(x).tolist() == [7] * 5
    assert encode_e2m1(-x).tolist() == [15] * 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sign_of_zero_is_kept(dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert encode_e2m1(zeros).tolist() == [0, 8]
    assert torch.signbit(decode_e2m1(torch.tensor([0, 8], dtype=torch.uint8))).tolist() == [False, True]
    packed = torch.tensor([0x80], dtype=torch.uint8)
    assert torch.signbit(decode_packed(packed, dtype)).tolist() == [False, True]


def test_nan_has_no_code() -> None:
    with pytest.raises(ValueError, match="NaN"):
        encode_e2m1(torch.tensor([1.0, math.nan]))


def test_all_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == E2M1 + [-x for x in E2M1]
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)


# --- packing -------------------------------------------------------------------------------------


def test_low_nibble_comes_first() -> None:
    codes = torch.tensor([[0x1, 0x2, 0x3, 0x4, 0xF, 0x0, 0x0, 0xF, 0x8, 0x7, 0x9, 0x9, 0xA, 0xB, 0xC, 0xD]])
    expected = [[0x21, 0x43, 0x0F, 0xF0, 0x78, 0x99, 0xBA, 0xDC]]
    assert pack_e2m1(codes.to(torch.uint8)).tolist() == expected


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 15), min_size=32, max_size=32), min_size=1, max_size=3))
def test_unpack_inverts_pack(rows: list[list[int]]) -> None:
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_e2m1(codes)
    assert packed.shape == (len(rows), 16)
    assert torch.equal(unpack_e2m1(packed), codes)


def test_pack_needs_an_even_width() -> None:
    with pytest.raises(ValueError, match=r"even.*\(2, 3\)"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_packed_is_unpack_then_decode(dtype: torch.dtype) -> None:
    packed = ALL_CODES.view(2, 4, 32)
    expected = decode_e2m1(unpack_e2m1(packed)).to(dtype)
    assert same_bits(decode_packed(packed, dtype), expected)


# --- block scales --------------------------------------------------------------------------------


def test_e4m3_decodes_every_code() -> None:
    decoded = decode_e4m3(ALL_CODES)
    assert decoded[:127].tolist() == E4M3
    assert decoded[128:255].tolist() == [-x for x in E4M3]
    assert decoded[[127, 255]].isnan().all()


def test_e4m3_encodes_to_nearest_even_and_saturates() -> None:
    middles = [(a + b) / 2 for a, b in itertools.pairwise(E4M3)]
    x = [*E4M3, *(y for m in middles for y in neighbours(m)), 2.0**-149, 449.0, 480.0, 1e30, math.inf]
    assert encode_e4m3(torch.tensor(x)).tolist() == [nearest(E4M3, min(value, 448.0)) for value in x]
    assert encode_e4m3(torch.tensor([math.nan])).tolist() == [0x7F]


def test_e8m0_decodes_every_code() -> None:
    decoded = decode_e8m0(ALL_CODES)
    assert decoded[:255].tolist() == [math.ldexp(1.0, code - 127) for code in range(255)]
    assert decoded[255].isnan()


def test_formats_are_the_published_ones() -> None:
    assert FORMATS == {"nvfp4": NVFP4, "mxfp4": MXFP4}
    assert (NVFP4.block_size, NVFP4.min_code, NVFP4.max_code, NVFP4.nan_code) == (16, 1, 126, 0x7F)
    assert (MXFP4.block_size, MXFP4.min_code, MXFP4.max_code, MXFP4.nan_code) == (32, 0, 252, 0xFF)
    for fmt in FORMATS.values():
        # The dtype that the scales are stored in decodes as the format's own codec does.
        stored = ALL_CODES.view(fmt.scale_dtype).float()
        torch.testing.assert_close(stored, fmt.decode_scales(ALL_CODES), rtol=0, atol=0, equal_nan=True)


def test_check_width_names_both_numbers() -> None:
    NVFP4.check_width(48, "q_proj")
    with pytest.raises(ValueError, match=r"q_proj: .*48.*mxfp4.*32"):
        MXFP4.check_width(48, "q_proj")


def test_mxfp4_absmax_is_the_power_of_two_below() -> None:
    powers = [math.ldexp(1.0, e) for e in range(-149, 128)]
    amax = [x for power in powers for x in neighbours(power) if x > 0]
    exact_floor = [math.frexp(x)[1] - 1 for x in amax]
    assert MXFP4.absmax_codes(torch.tensor(amax)).tolist() == [e - 2 + 127 for e in exact_floor]
    assert MXFP4.absmax_codes(torch.zeros(1)).tolist() == [0]
    with pytest.raises(ValueError, match="power-of-two"):
        MXFP4.absmax_codes(torch.ones(1), 4.0)


def test_nvfp4_absmax_is_the_nearest_scale() -> None:
    # 6 * 448 reaches the largest scale, 7 lies past the middle of 1.125 and 1.25 when divided by 6.
    amax = torch.tensor([2688.0, 1e9, 6.0, 7.0, 3.0, 0.0])
    assert NVFP4.absmax_codes(amax).tolist() == [126, 126, 56, 57, 48, 0]
    assert NVFP4.absmax_codes(amax, 4.0).tolist() == [126, 126, 60, 62, 52, 0]


# --- exactness -----------------------------------------------------------------------------------


def every_product(fmt_name: str, scale_codes: list[int], tensor_scale: torch.Tensor) -> QuantizedTensor:
    """One row for each scale code, with all 16 element codes in it."""
    fmt = FORMATS[fmt_name]
    codes = torch.arange(fmt.block_size, dtype=torch.uint8) % 16
    scales = torch.tensor(scale_codes, dtype=torch.uint8).unsqueeze(-1)
    packed = pack_e2m1(codes).expand(len(scale_codes), -1).contiguous()
    return QuantizedTensor(packed, scales.view(fmt.scale_dtype), tensor_scale, fmt)


def products(fmt_name: str, scale_codes: list[int]) -> torch.Tensor:
    """element * block_scale of `every_product`, fp64."""
    scales = [E4M3[c] if fmt_name == "nvfp4" else 2.0 ** (c - 127) for c in scale_codes]
    elements = (E2M1 + [-x for x in E2M1]) * (FORMATS[fmt_name].block_size // 16)
    return torch.tensor(elements, dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64).unsqueeze(-1)


def test_every_nvfp4_product_is_exact_in_16_bits() -> None:
    exact = products("nvfp4", list(range(1, 127)))
    assert torch.equal(exact.to(torch.bfloat16).double(), exact)
    for fold in (-14, 4):
        folded = exact * 2.0**fold
        assert torch.equal(folded.to(torch.float16).double(), folded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tensor_scale", [2.0**-126, 3e-30, 2.0**-14, 1e-4, 0.37, 1.0, 23.0, 1e30])
def test_nvfp4_values_are_exact(tensor_scale: float, dtype: torch.dtype) -> None:
    codes = list(range(1, 127))
    quantized = every_product("nvfp4", codes, torch.tensor(tensor_scale))
    values, residual = quantized.values(dtype)
    exact = products("nvfp4", codes) * torch.tensor(tensor_scale).double()
    assert values.dtype == dtype
    assert residual.dtype == torch.float32
    assert torch.equal(values.double() * residual.double(), exact)
    assert torch.equal(quantized.residual(dtype), residual)
    # Each is rounded once, so they agree in every bit.
    assert same_bits(values.float() * residual, quantized.dequantize())
    assert same_bits(quantized.dequantize(), exact.float())


def test_dequantize_rounds_to_the_dtype_asked_for() -> None:
    quantized = every_product("nvfp4", [40, 90], torch.tensor(0.37))
    exact = products("nvfp4", [40, 90]) * torch.tensor(0.37).double()
    assert same_bits(quantized.dequantize(torch.bfloat16), exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residual_lies_in_one_to_two_unless_clamped(dtype: torch.dtype) -> None:
    inside = torch.tensor([2.0**-14, 1e-4, 0.37, 1.0, 1.999, 23.0])
    scaled = torch.ldexp(inside, -NVFP4.fold_exponent(inside, dtype))
    assert ((scaled >= 1) & (scaled < 2)).all()
    assert torch.equal(torch.ldexp(scaled, NVFP4.fold_exponent(inside, dtype)), inside)


def test_values_need_a_dtype_that_holds_them() -> None:
    with pytest.raises(ValueError, match="float64"):
        every_product("nvfp4", [56], torch.tensor(1.0)).values(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_values_are_exact(dtype: torch.dtype) -> None:
    # fp16 holds scales from 2**-22 to 2**13; above 2**125 an element of 6 leaves fp32.
    codes = list(range(105, 141) if dtype == torch.float16 else range(0, 253))
    quantized = every_product("mxfp4", codes, torch.tensor(1.0))
    values, residual = quantized.values(dtype)
    # In fp16 values are halved, since 4 * 2**14 is a value that a search may choose.
    assert residual.item() == (2.0 if dtype == torch.float16 else 1.0)
    assert torch.equal(values.double() * residual.double(), products("mxfp4", codes))
    assert same_bits(values.float() * residual, quantized.dequantize())


def test_small_mxfp4_values_that_fp16_can_hold_are_exact() -> None:
    # Here the scale, folded, is no fp16 number, but many of its products are.
    codes = list(range(100, 106))
    values, residual = every_product("mxfp4", codes, torch.tensor(1.0)).values(torch.float16)
    exact = products("mxfp4", codes) / residual.double()
    held = exact.to(torch.float16).double() == exact
    assert held[products("mxfp4", codes).abs() >= 2.0**-22].all()
    assert torch.equal(values.double()[held], exact[held])


def test_nan_scale_makes_its_block_nan() -> None:
    for fmt, ordinary in ((NVFP4, 56), (MXFP4, 127)):
        quantized = every_product(fmt.name, [fmt.nan_code, ordinary], torch.tensor(1.0))
        assert quantized.dequantize()[0].isnan().all()
        assert not quantized.dequantize()[1].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_scale_a_row(dtype: torch.dtype) -> None:
    codes = [1, 56, 126]
    tensor_scale = torch.tensor([[2.0**-126], [0.37], [1e30]])
    quantized = every_product("nvfp4", codes, tensor_scale)
    values, residual = quantized.values(dtype)
    assert residual.shape == (3, 1)
    exact = products("nvfp4", codes) * tensor_scale.double()
    assert torch.equal(values.double() * residual.double(), exact)
    assert same_bits(quantized.dequantize(), exact.float())


def test_nbytes_counts_codes_and_both_scales() -> None:
    codes, scales = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8)
    assert QuantizedTensor(codes, scales.view(NVFP4.scale_dtype), torch.ones(()), NVFP4).nbytes == 96 + 12 + 4
    assert (
        QuantizedTensor(codes, scales.view(NVFP4.scale_dtype), torch.ones(3, 1), NVFP4).nbytes == 96 + 12 + 12
    )


# --- tensor scale --------------------------------------------------------------------------------


def test_finite_amax_passes_over_nan_and_infinity() -> None:
    x = torch.tensor([[1.0, -3.0, math.nan, 2.0], [math.inf, -math.inf, 0.5, -0.25], [math.nan] * 4])
    assert finite_amax(x).item() == 3.0
    assert finite_amax(x, dim=-1).tolist() == [[3.0], [0.5], [0.0]]
    assert finite_amax(torch.empty(0, 4)).item() == 0.0
    assert finite_amax(x.to(torch.float16)).dtype == torch.float32


def test_tensor_scale_maps_the_maximum_to_the_largest_value() -> None:
    smallest = 2.0**-126
    amax = torch.tensor([2688.0, 1.0, 0.0, 2.0**-149, smallest, 2688 * smallest, 3e38])
    expected = torch.tensor([1.0, 1 / 2688, 1.0, smallest, smallest, smallest, 3e38 / 2688])
    scale = tensor_scale_of(amax)
    assert torch.equal(scale, expected)
    assert torch.isfinite(1 / scale).all()


# --- scale layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (128, 4), (130, 6), (300, 9)])
@pytest.mark.parametrize("dtype", [NVFP4.scale_dtype, MXFP4.scale_dtype, torch.uint8], ids=str)
def test_swizzle_follows_its_formula(rows: int, cols: int, dtype: torch.dtype) -> None:
    # No byte is zero, so that the zeros of the padding can be told apart.
    scales = (torch.arange(rows * cols) % 255 + 1).to(torch.uint8).view(rows, cols)
    swizzled = swizzle_scales(scales.view(dtype))
    tile_rows, tile_cols = -(-rows // 128), -(-cols // 4)
    assert swizzled.dtype == dtype
    assert swizzled.shape == (tile_rows * 128, tile_cols * 4)

    expected = [0] * (tile_rows * tile_cols * 512)
    for row in range(rows):
        for col in range(cols):
            tile = row // 128 * tile_cols + col // 4
            r, c = row % 128, col % 4
            expected[tile * 512 + (r % 32) * 16 + (r // 32) * 4 + c] = scales[row, col].item()
    assert swizzled.view(torch.uint8).flatten().tolist() == expected

    back = unswizzle_scales(swizzled, rows, cols)
    assert back.dtype == dtype
    assert torch.equal(back.view(torch.uint8), scales)


def test_unswizzle_needs_whole_tiles_that_cover_the_scales() -> None:
    with pytest.raises(ValueError, match=r"\(129, 4\).*\(128, 4\)"):
        unswizzle_scales(torch.zeros(128, 4, dtype=torch.uint8), 129, 4)
    with pytest.raises(ValueError, match="whole 128x4 tiles"):
        unswizzle_scales(torch.zeros(100, 4, dtype=torch.uint8), 100, 4)
