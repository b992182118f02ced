"""Block floating point formats: element and scale codecs, packing and layouts, in plain torch.

This file is the definition. A kernel elsewhere in the package is right when it produces the same
codes and the same scales.

A value is stored as ``element * block_scale * tensor_scale``:

=======  =====  ===========  ==================  =============  ===============================
format   block  element      block scale         tensor scale   source
=======  =====  ===========  ==================  =============  ===============================
NVFP4    16     E2M1         E4M3, codes 1..126  fp32           arXiv 2605.12464, section 2
MXFP4    32     E2M1         E8M0, codes 0..252  none           OCP Microscaling Formats (MX) 1.0
=======  =====  ===========  ==================  =============  ===============================

Blocks lie along the last dimension. An element times its block scale has at most six significant
bits, so it is exact in bf16, in fp16 (see `QuantizedTensor.values`) and in fp32.

Special values, once and for every format:

* rounding to E2M1 and to E4M3 is to nearest, ties to even, and saturates;
* the sign of zero is kept, so code 8 is minus zero;
* a block with a NaN or an infinity in it is stored as codes 0 under a NaN scale (E4M3 0x7F, E8M0
  0xFF) and dequantizes to NaN throughout. Tensor scales look at the finite values only, so the
  other blocks of that tensor keep their meaning;
* no E4M3 scale of zero is ever written; an all-zero block takes its policy's smallest candidate.
"""

import functools
from dataclasses import dataclass

import torch

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E8M0_NAN = 0xFF
E8M0_BIAS = 127

_SIXTH = 1.0 / 6.0
_EXPONENT = torch.tensor(0x7F800000, dtype=torch.int32)  # as a tensor: torch vectorizes that, not an int
# 1 / 2**-126 is still finite in fp32, so a tensor of denormals keeps a usable reciprocal.
_SMALLEST_TENSOR_SCALE = 2.0**-126
# Dequantized values are kept as element * block_scale * 2**e with e near log2(tensor_scale): exact,
# and of the size of the original values, so that products neither overflow nor lose small results.
# Every element * E4M3 is a multiple of 2**-10 and fp16 resolves 2**-24, hence the bound of -14.
_FOLD_RANGE = {torch.float16: (-14, 4), torch.bfloat16: (-100, 116), torch.float32: (-100, 116)}


# --- elements ------------------------------------------------------------------------------------


def round_to_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
    """Round non-negative fp32 values to the E2M1 grid: nearest, ties to even, saturating at 6.

    magnitude: any shape, fp32, >= 0. Returns the same shape and dtype.
    """
    clamped = magnitude.clamp(max=E2M1_MAX)
    # Steps are half the value's power of two, and 0.5 below 1. Adding and subtracting 1.5 * 2**22
    # powers of two, where fp32 numbers lie one step apart, rounds to nearest even.
    power = (clamped.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_(min=1.0)
    magic = power.mul_(1.5 * 2**22)
    return clamped.add_(magic).sub_(magic)


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, 0..15; bit 3 is the sign) of fp32 values, rounded as `round_to_e2m1` does.

    Raises ValueError for NaN, which E2M1 cannot hold.
    """
    if torch.isnan(x).any():
        raise ValueError("encode_e2m1: the input holds NaN, which E2M1 has no code for")
    return e2m1_codes(round_to_e2m1(x.float().abs()).copysign_(x))


def e2m1_codes(elements: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, 0..15) of fp32 values that lie on the grid already."""
    magnitude = elements.abs()
    # For 1 and above, the code is the exponent and the first mantissa bit of the fp32 pattern.
    upper = (magnitude.view(torch.int32) >> 22) - 252
    codes = torch.where(magnitude < 1, (magnitude * 2).to(torch.int32), upper)
    return (codes | (torch.signbit(elements).to(torch.int32) << 3)).to(torch.uint8)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of E2M1 codes (uint8, 0..15)."""
    low = codes.to(torch.int32) & 7
    magnitude = torch.where(low < 2, low * 0.5, ((low + 252) << 22).view(torch.float32))
    return torch.where(codes >= 8, -magnitude, magnitude)


@functools.cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The two values of each packed byte as one integer: (256,), of twice the dtype's size."""
    byte = torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(-1)
    pairs = decode_e2m1(unpack_e2m1(byte)).to(dtype)
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32).squeeze(-1)


def decode_packed(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values (..., K) in bf16, fp16 or fp32 of packed codes (..., K // 2); exact."""
    pairs = _pair_table(dtype, packed.device).index_select(0, packed.flatten().int())
    return pairs.view(dtype).view(*packed.shape[:-1], 2 * packed.shape[-1])


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes (..., K) uint8 two to a byte, even index in the low nibble: (..., K // 2) uint8."""
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_e2m1: last dimension must be even, got shape {tuple(codes.shape)}")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_e2m1`: (..., K // 2) uint8 to (..., K) uint8 codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


# --- block scales --------------------------------------------------------------------------------


def encode_e4m3(x: torch.Tensor) -> torch.Tensor:
    """E4M3 codes (uint8) of non-negative fp32 values; above 448 they saturate, NaN stays NaN."""
    return x.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values of E4M3 codes (uint8)."""
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """fp32 values 2**(code - 127) of E8M0 codes (uint8); 0xFF is NaN."""
    exponent = (codes.to(torch.int32) - E8M0_BIAS).clamp(max=127)
    value = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return torch.where(codes == E8M0_NAN, torch.full_like(value, torch.nan), value)


@dataclass(frozen=True)
class BlockFormat:
    """What a search needs to know of a format. Use the instances `NVFP4` and `MXFP4`."""

    name: str
    block_size: int
    scale_dtype: torch.dtype
    min_code: int
    max_code: int
    nan_code: int
    has_tensor_scale: bool

    def absmax_codes(self, amax: torch.Tensor, divisor: float = E2M1_MAX) -> torch.Tensor:
        """Scale code (int32) that the block's maximum alone would choose, before clamping.

        amax: fp32, the block maxima divided by the tensor scale. NVFP4: ``E4M3(amax * fp32(1/6))``,
        or amax over another `divisor`. MXFP4: ``floor(log2(amax)) - 2 + 127``, as OCP MX 1.0 (6.3).
        """
        if self.scale_dtype == torch.float8_e4m3fn:
            reciprocal = _SIXTH if divisor == E2M1_MAX else 1.0 / divisor
            return encode_e4m3(amax * reciprocal).to(torch.int32)
        if divisor != E2M1_MAX:
            raise ValueError(f"{self.name} has power-of-two scales: its divisor cannot be {divisor}")
        exponent = torch.frexp(amax).exponent.to(torch.int32) - 1  # floor(log2); frexp is in [.5, 1)
        return torch.where(amax > 0, exponent - 2 + E8M0_BIAS, 0)

    def decode_scales(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 block scales of integer codes (any integer dtype)."""
        decode = decode_e4m3 if self.scale_dtype == torch.float8_e4m3fn else decode_e8m0
        return decode(codes)

    def fold_exponent(self, tensor_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The power of two (int32) to fold into values of `dtype`; see `QuantizedTensor.values`.

        Raises ValueError for a dtype that cannot hold dequantized values exactly.
        """
        if dtype not in _FOLD_RANGE:
            raise ValueError(f"dequantized values need bf16, fp16 or fp32, not {dtype}")
        exponent = torch.frexp(tensor_scale).exponent.to(torch.int32) - 1
        if not self.has_tensor_scale:
            # 4 * 2**14, which the search may choose for values near fp16's end, overflows fp16.
            return exponent - (1 if dtype == torch.float16 else 0)
        return exponent.clamp(*_FOLD_RANGE[dtype])

    def check_width(self, width: int, what: str) -> None:
        """Raise ValueError naming `what` when `width` does not consist of whole blocks."""
        if width % self.block_size:
            raise ValueError(
                f"{what}: the input width {width} is not a multiple of {self.name}'s block of {self.block_size}"
            )


NVFP4 = BlockFormat("nvfp4", 16, torch.float8_e4m3fn, 1, 126, E4M3_NAN, True)
# 6 * 2**126 is no fp32 number any more, so the two largest E8M0 scales are decoded but not written.
MXFP4 = BlockFormat("mxfp4", 32, torch.float8_e8m0fnu, 0, 252, E8M0_NAN, False)
FORMATS = {fmt.name: fmt for fmt in (NVFP4, MXFP4)}


def format_named(name: str) -> BlockFormat:
    """The format called `name`. Raises ValueError that lists the formats for anything else."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


# --- tensor scale --------------------------------------------------------------------------------


def finite_amax(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Largest finite magnitude of `x`, fp32: a scalar, or along `dim` (kept with size 1)."""
    magnitude = x.abs()
    magnitude = torch.where(torch.isfinite(magnitude), magnitude, 0)
    if dim is None:
        return (magnitude.amax() if magnitude.numel() else magnitude.new_zeros(())).float()
    return magnitude.amax(dim, keepdim=True).float()


def tensor_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """fp32 tensor scale that maps `amax` to the largest NVFP4 value: ``amax * fp32(1 / (6 * 448))``.

    A product and no quotient: torch divides by a number exactly on the CPU and through a reciprocal
    on the GPU, and the bits should not depend on that. Zero gives 1, and nothing gives less than
    2**-126, whose reciprocal is still finite.
    """
    scale = (amax.float() * (1.0 / (E2M1_MAX * E4M3_MAX))).clamp(min=_SMALLEST_TENSOR_SCALE)
    return torch.where(amax > 0, scale, torch.ones_like(scale))


# --- quantized tensors ---------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor (..., K) in a block format.

    packed: (..., K // 2) uint8, two E2M1 codes a byte, even index low.
    scales: (..., K // block_size), float8_e4m3fn or float8_e8m0fnu.
    tensor_scale: fp32, a scalar or (..., 1) for one scale a row; 1 for formats without.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    format: BlockFormat

    @property
    def nbytes(self) -> int:
        """Bytes of codes, block scales and tensor scale."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales, self.tensor_scale))

    def values(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact values without rounding, as ``(values, residual)``.

        values: (..., K) in `dtype` (bf16, fp16 or fp32), element * block_scale * 2**e.
        residual: fp32, ``tensor_scale * 2**-e``, shaped like tensor_scale; in [1, 2) unless
        clamped. The tensor is ``values * residual``; a matrix product may use `values` and multiply
        its result by `residual`. What fp16 cannot hold are MXFP4 values below 2**-22.
        """
        exponent = self.format.fold_exponent(self.tensor_scale, dtype)
        # fp16 holds the products, but not every scale on the way to them.
        work = torch.float32 if dtype == torch.float16 else dtype
        blocks = decode_packed(self.packed, work).view(*self.scales.shape, self.format.block_size)
        scales = torch.ldexp(self.format.decode_scales(self.scales.view(torch.uint8)), exponent)
        values = blocks.mul_(scales.to(work).unsqueeze(-1)).flatten(-2).to(dtype)
        return values, self.residual(dtype)

    def residual(self, dtype: torch.dtype) -> torch.Tensor:
        """What is left to multiply `values(dtype)` by; fp32, shaped like tensor_scale."""
        return torch.ldexp(self.tensor_scale, -self.format.fold_exponent(self.tensor_scale, dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The tensor, (..., K), rounded once to `dtype` after multiplying by the tensor scale."""
        values, residual = self.values(torch.float32)
        return (values * residual).to(dtype)


# --- scale layout of the block-scaled tensor cores -----------------------------------------------


def swizzle_scales(scales: torch.Tensor) -> torch.Tensor:
    """Reorder block scales (M, S) into the 128x4 tiles that Blackwell's FP4 MMA reads.

    Rows are padded with zeros to a multiple of 128 and columns to a multiple of 4. Row r and column
    c of a tile lie at byte ``(r % 32) * 16 + (r // 32) * 4 + c`` of its 512 (PTX ISA, block-scaled
    tcgen05.mma; cuBLAS, 1D block scaling factors layout). Returns (M', S') of the same dtype.
    """
    rows, cols = scales.shape
    padded_rows, padded_cols = -(-rows // 128) * 128, -(-cols // 4) * 4
    padded = torch.zeros(padded_rows, padded_cols, dtype=torch.uint8, device=scales.device)
    padded[:rows, :cols] = scales.view(torch.uint8)
    tiles = padded.view(padded_rows // 128, 4, 32, padded_cols // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.contiguous().view(padded_rows, padded_cols).view(scales.dtype)


def unswizzle_scales(swizzled: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Undo `swizzle_scales`: the (rows, cols) scales out of their padded 128x4 tiles."""
    padded_rows, padded_cols = swizzled.shape
    if padded_rows % 128 or padded_cols % 4 or rows > padded_rows or cols > padded_cols:
        raise ValueError(
            f"unswizzle_scales: expected whole 128x4 tiles that cover ({rows}, {cols}), got "
            f"{tuple(swizzled.shape)}"
        )
    tiles = swizzled.view(torch.uint8).view(padded_rows // 128, padded_cols // 4, 32, 4, 4)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(padded_rows, padded_cols)
    return plain[:rows, :cols].contiguous().view(swizzled.dtype)
