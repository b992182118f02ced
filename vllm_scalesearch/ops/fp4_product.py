"""NVFP4 times NVFP4 on the GPU's FP4 units, by Triton: for GPUs where no other FP4 GEMM takes our inputs.

`tl.dot_scaled` is Triton's block-scaled product; for E2M1 codes with E4M3 scales it becomes
``tcgen05.mma.kind::mxf4nvf4.block_scale`` on sm_100a and ``mma.sync.kind::mxf4nvf4.block_scale`` on sm_120a
(PTX ISA, warp-level and tcgen05 block scaling). Operands are those of `ops.quantize.quantize_packed`;
scales are read where they lie, in the 128x4 tiles of `formats.swizzle_scales`. Unlike the GEMMs of vLLM and
FlashInfer, all scales and the bias are applied to the fp32 sums, so a result is rounded once.

**Compiled for sm_100a, sm_103a and sm_120a (tests/test_fp4_product.py), not run on any of them**, and its
tile sizes are not tuned. What runs elsewhere, on other GPUs and in Triton's interpreter, is the same kernel
with one statement exchanged: it decodes codes and scales to fp16, which holds their products exactly, for
`tl.dot`. That checks addresses, masks and the epilogue; no layer uses it.

Not imported where Triton is not needed: it is no dependency of this package.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_scalesearch.formats import NVFP4, QuantizedTensor, unswizzle_scales

# Triton 3.6, that of vLLM 0.32, fails on E4M3 scales for 9.0, 11.0 and 12.1.
FP4_CAPABILITIES = ((10, 0), (10, 3), (12, 0))

_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define(
    "fp4_product(Tensor x, Tensor x_scales, Tensor row_scale, Tensor weight, Tensor weight_scales, "
    "Tensor weight_scale, Tensor? bias, ScalarType dtype) -> Tensor"
)


def fp4_product(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x @ weight.T + bias`` of two NVFP4 matrices, accumulated in fp32 and rounded once.

    x: (R, K // 2) uint8 and x_scales: (R', S') float8_e4m3fn, the K // 16 block scales of a row in the padded
    tiles of `swizzle_scales`. row_scale: (R, 1) fp32, a tensor scale for each row. All three are what
    `quantize_packed` returns. weight: (N, K // 2) uint8, weight_scales: (N', S') float8_e4m3fn, swizzled, and
    weight_scale: fp32, one element. bias: (N,) of any floating dtype. dtype: bf16 or fp16.
    K is a multiple of 16; R may be 0; all tensors are contiguous. Returns (R, N) in `dtype`.

    A kernel on a CUDA GPU, torch on the CPU. One operator for torch.compile; nothing in it waits for the
    device, so a CUDA graph can capture it. Raises ValueError for operands that do not fit together.
    """
    return torch.ops.vllm_scalesearch.fp4_product(
        x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype
    )


# --- the kernel ----------------------------------------------------------------------------------


@triton.jit
def _scale_rows(ptr, row, column_tiles):
    """Where the scales of rows `row` begin in swizzled 128x4 tiles, column_tiles of them side by side."""
    tile_row = (row // 128).to(tl.int64) * column_tiles
    return ptr + (tile_row * 512 + row % 32 * 16 + row % 128 // 32 * 4)[:, None]


@triton.jit
def _scales(rows_ptr, first, column_tiles, COLUMNS: tl.constexpr):
    """E4M3 codes of block scales first to first + COLUMNS: (rows, COLUMNS) uint8, zero past the last tile."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    # Rows need no mask: tiles of the kernel divide 128, and the swizzled ones are whole.
    return tl.load(rows_ptr + (column // 4 * 512 + column % 4), mask=column // 4 < column_tiles, other=0)


@triton.jit
def _codes(rows_ptr, row_mask, first, width, BYTES: tl.constexpr):
    """Bytes first to first + BYTES of packed rows: (rows, BYTES) uint8, zero outside of the matrix."""
    byte = first + tl.arange(0, BYTES)
    return tl.load(rows_ptr + byte[None, :], mask=row_mask[:, None] & (byte < width)[None, :], other=0)


@triton.jit
def _e2m1(nibble):
    """fp16 of E2M1 codes 0..15: their bits in fp16's places, whose exponent has a bias larger by 14."""
    bits = ((nibble & 7).to(tl.int16) << 9) | ((nibble & 8).to(tl.int16) << 12)
    return bits.to(tl.float16, bitcast=True) * 16384.0


@triton.jit
def _e4m3(code):
    """fp16 of E4M3 codes 0..127, likewise with a bias larger by 8; 127 is NaN."""
    value = (code.to(tl.int16) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where(code == 127, float("nan"), value).to(tl.float16)


@triton.jit
def decode(codes, scales, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes times block scales in fp16, exactly: (ROWS, 16 * BLOCKS)."""
    elements = tl.join(_e2m1(codes & 15), _e2m1(codes >> 4)).reshape(ROWS, BLOCKS, 16)
    return (elements * _e4m3(scales)[:, :, None]).reshape(ROWS, BLOCKS * 16)


@triton.jit(do_not_specialize=["rows"])
def _fp4_product_kernel(
    x_ptr, x_scales_ptr, row_scale_ptr, weight_ptr, weight_scales_ptr, weight_scale_ptr, bias_ptr, out_ptr,
    rows, outputs, units,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FP4_UNITS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N outputs of `fp4_product`; a row of codes has units * UNIT bytes."""
    width = units * UNIT
    column_tiles = (width + 31) // 32
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < rows, n < outputs
    x_rows = x_ptr + (m.to(tl.int64) * width)[:, None]
    weight_rows = weight_ptr + (n.to(tl.int64) * width)[:, None]
    x_scale_rows = _scale_rows(x_scales_ptr, m, column_tiles)
    weight_scale_rows = _scale_rows(weight_scales_ptr, n, column_tiles)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_K // 2):
        x = _codes(x_rows, m_mask, first, width, BLOCK_K // 2)
        weight = _codes(weight_rows, n_mask, first, width, BLOCK_K // 2)
        x_scales = _scales(x_scale_rows, first // 8, column_tiles, BLOCK_K // 16)
        weight_scales = _scales(weight_scale_rows, first // 8, column_tiles, BLOCK_K // 16)
        if FP4_UNITS:
            x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
            weight_scales = weight_scales.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot_scaled(x, x_scales, "e2m1", tl.trans(weight), weight_scales, "e2m1", acc)
        else:
            decoded = decode(weight, weight_scales, BLOCK_N, BLOCK_K // 16)
            acc = tl.dot(decode(x, x_scales, BLOCK_M, BLOCK_K // 16), tl.trans(decoded), acc)

    row_scale = tl.load(row_scale_ptr + m, mask=m_mask, other=0.0)
    # The weight's scale first: what comes of it is at most K * 2688 times the weight's largest value, while
    # rows of large inputs would let the sums overflow.
    acc = acc * tl.load(weight_scale_ptr) * row_scale[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (m.to(tl.int64) * outputs)[:, None] + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


# --- its launch ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """What one program computes; rows and outputs are powers of two up to 128."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    fp4_units: bool


def tile_for(rows: int, capability: tuple[int, int]) -> Tile:
    """The tile for `rows` rows of inputs on a GPU of this compute capability.

    Few rows take fewer outputs a program, so that more of the GPU's multiprocessors read weights. These
    are tiles that compile without spills, not the outcome of measurements.
    """
    if capability not in FP4_CAPABILITIES:
        return Tile(64, 64, 128, 4, False)
    if capability[0] == 10:
        # tcgen05's block-scaled MMA has 128 rows; with fewer, Triton multiplies decoded values instead.
        return Tile(128, 64 if rows <= 128 else 128, 256, 4, True)
    if rows <= 64:
        return Tile(16 if rows <= 16 else 64, 64, 256, 4, True)
    return Tile(128, 128, 128, 8, True)


def constants(tile: Tile, inputs: int) -> dict[str, int | bool]:
    """The kernel's compile-time arguments for K = `inputs`."""
    return dict(
        UNIT=16 if inputs % 32 == 0 else 8,  # rows of codes aligned to 16 bytes are read 16 at a time
        BLOCK_M=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.inputs, FP4_UNITS=tile.fp4_units,
    )  # fmt: skip


def launch(
    tile: Tile,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`fp4_product` by the kernel with this tile, on a CUDA GPU or in Triton's interpreter."""
    _check(x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype)
    rows, outputs, inputs = len(x), len(weight), 2 * x.shape[1]
    out = x.new_empty((rows, outputs), dtype=dtype)
    if rows == 0:
        return out
    fixed = constants(tile, inputs)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(outputs, tile.outputs))
    _fp4_product_kernel[grid](
        x, x_scales.view(torch.uint8), row_scale, weight, weight_scales.view(torch.uint8), weight_scale,
        bias, out, rows, outputs, inputs // 2 // fixed["UNIT"], **fixed,
        num_warps=tile.warps, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _check(x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype) -> None:
    rows, outputs, inputs = len(x), len(weight), 2 * x.shape[-1]
    columns = -(-inputs // 64) * 4
    # name: tensor, its dtype, its shape
    operands = {
        "x": (x, torch.uint8, (rows, inputs // 2)),
        "x_scales": (x_scales, torch.float8_e4m3fn, (-(-rows // 128) * 128, columns)),
        "row_scale": (row_scale, torch.float32, (rows, 1)),
        "weight": (weight, torch.uint8, (outputs, inputs // 2)),
        "weight_scales": (weight_scales, torch.float8_e4m3fn, (-(-outputs // 128) * 128, columns)),
        "weight_scale": (weight_scale, torch.float32, tuple(weight_scale.shape)),
    }
    if bias is not None:
        operands["bias"] = (bias, bias.dtype, (outputs,))
    for name, (tensor, expected, shape) in operands.items():
        if tensor.dtype != expected or tuple(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(
                f"fp4_product: {name} must be {expected}, contiguous and of shape {shape}, but is "
                f"{tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
            )
        if tensor.device != x.device:
            raise ValueError(f"fp4_product: {name} is on {tensor.device} and x on {x.device}")
    if weight_scale.numel() != 1:
        raise ValueError(f"fp4_product: weight_scale must be one number, not of shape {weight_scale.shape}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"fp4_product: bias must be of a floating dtype, not {bias.dtype}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"fp4_product: the result can be bf16 or fp16, not {dtype}")
    NVFP4.check_width(inputs, "fp4_product")


def _reference(x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype) -> torch.Tensor:
    _check(x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype)

    def values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        plain = unswizzle_scales(scales, len(packed), packed.shape[1] // 8)
        return QuantizedTensor(packed, plain, torch.ones(()), NVFP4).dequantize()

    out = values(x, x_scales) @ values(weight, weight_scales).T
    out = out * weight_scale.reshape(()) * row_scale
    return (out if bias is None else out + bias.float()).to(dtype)


def _cuda(x, *operands) -> torch.Tensor:
    # Triton launches on the current device, which need not be x's.
    with torch.cuda.device(x.device):
        return launch(tile_for(len(x), torch.cuda.get_device_capability()), x, *operands)


def _fake(x, x_scales, row_scale, weight, weight_scales, weight_scale, bias, dtype) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype)


_LIB.impl("fp4_product", _reference, "CPU")
_LIB.impl("fp4_product", _cuda, "CUDA")
torch.library.register_fake("vllm_scalesearch::fp4_product", _fake, lib=_LIB)
