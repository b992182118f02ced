"""The searched quantizers as one Triton kernel: the bits of search.py, in one pass over the input.

A program searches tiles of blocks (triton_blocks.py) of one row and writes what is asked for: packed
codes and block scales, dequantized values, or both. What comes before a linear layer (SiLU-and-mul,
RMSNorm) can be computed on the way in. Divisions are `tl.div_rn`: Triton's ``/`` is approximate in
fp32, and only silu, which has no exact definition, uses it.

Metric ``mse`` only. Nothing here waits for the device: all of it can be captured in a CUDA graph.
Dispatch between this and the reference is the caller's (ops/quantize.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_scalesearch.formats import _FOLD_RANGE, E2M1_MAX, E4M3_MAX, BlockFormat, tensor_scale_of
from vllm_scalesearch.ops.triton_blocks import (
    INTERPRETED,
    SIGN,
    bits_of,
    element_unit,
    elements,
    finite_magnitude_bits,
    from_bits,
    has_e2m1,
    narrow,
    narrow_exact,
    packed_words,
    power_of_two,
    rule_of,
    scale_pair,
    store_tile,
    widen,
    winners,
)
from vllm_scalesearch.search import ScalePolicy

_TENSOR_SCALE = tl.constexpr(1.0 / (E2M1_MAX * E4M3_MAX))
_SMALLEST_TENSOR_SCALE = tl.constexpr(2.0**-126)

# A thread holds one block of 16 or 32 values; 8 warps hold the whole of a row of 4096 (NVFP4), which
# is then read once. Longer rows go through tiles of 4 warps, so that registers suffice for two
# programs or more on each scheduler.
_MAX_WARPS, _LOOP_WARPS = 8, 4
# Programs that fill a large GPU a few times over: with fewer rows, several programs share a row, and
# each finds the row's scale for itself.
_PROGRAMS = 512
_AMAX_VALUES = 4096  # read at once by each program while it looks for the row's scale


# --- what is quantized ---------------------------------------------------------------------------


@triton.jit
def _norm_input(x_ptr, addend_ptr, columns, mask):
    """fp32 x, plus the residual stream where there is one."""
    x = widen(tl.load(x_ptr + columns, mask=mask, other=0.0))
    if addend_ptr is not None:
        x += widen(tl.load(addend_ptr + columns, mask=mask, other=0.0))
    return x


@triton.jit
def _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, mask, SOURCE: tl.constexpr):
    """The values to quantize at `columns` of a row, rounded to x's dtype, in fp32."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if SOURCE == "silu_mul":
        gate = widen(tl.load(x_ptr + columns, mask=mask, other=0.0))
        up = widen(tl.load(x_ptr + width + columns, mask=mask, other=0.0))
        silu = widen(narrow(gate / (1.0 + tl.exp(-gate)), DTYPE))
        return widen(narrow(silu * up, DTYPE))
    elif SOURCE == "rms_norm":
        WEIGHT: tl.constexpr = weight_ptr.dtype.element_ty
        weight = widen(tl.load(weight_ptr + columns, mask=mask, other=0.0))
        x = _norm_input(x_ptr, addend_ptr, columns, mask) * inverse_rms
        x = widen(narrow(widen(narrow(x, WEIGHT)) * weight, WEIGHT))
        return widen(narrow(x, DTYPE))
    else:
        return widen(tl.load(x_ptr + columns, mask=mask, other=0.0))


@triton.jit
def _load_tile(
    x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, mask, SOURCE: tl.constexpr,
    TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """`_load` as a tile. columns: (TILE, 8), each block's first eight; mask: (TILE, 1)."""
    a = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, mask, SOURCE)
    b = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns + 8, mask, SOURCE)
    if SUB == 4:
        c = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns + 16, mask, SOURCE)
        d = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns + 24, mask, SOURCE)
        return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (TILE, 8, SUB))
    else:
        return tl.join(a, b)


@triton.jit
def _tensor_scale_of_bits(amax_bits):
    """As `tensor_scale_of`, of the bits of finite magnitudes."""
    tensor_scale = tl.maximum(from_bits(amax_bits) * _TENSOR_SCALE, _SMALLEST_TENSOR_SCALE)
    return tl.where(amax_bits > 0, tensor_scale, 1.0)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _amax_kernel(x_ptr, x_stride, amax_bits_ptr, width, WIDE: tl.constexpr):
    """The bits of the largest finite magnitude of all rows, into one int32 that starts at 0."""
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride
    amax = tl.zeros((WIDE,), tl.int32)
    for start in range(0, width, WIDE):
        columns = start + tl.arange(0, WIDE)
        x = widen(tl.load(x_ptr + columns, mask=columns < width, other=0.0))
        amax = tl.maximum(amax, finite_magnitude_bits(x))
    tl.atomic_max(amax_bits_ptr, tl.max(amax, 0))


# How many tiles depends on the number of rows, and that must not compile anything anew.
@triton.jit(do_not_specialize=["tiles_per_program"])
def _quantize_kernel(
    x_ptr, x_stride, addend_ptr, addend_stride, weight_ptr, eps,
    tensor_scale_ptr, row_scale_ptr, packed_ptr, scales_ptr, values_ptr, residual_ptr, activation_ptr, sum_ptr,
    width, tiles_per_program,
    BLOCK: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
    SOURCE: tl.constexpr, SCALE: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr,
    SWIZZLED: tl.constexpr, SINGLE: tl.constexpr, FOLD_LOW: tl.constexpr, FOLD_HIGH: tl.constexpr,
    HW_E2M1: tl.constexpr,
):  # fmt: skip
    """Program (row, part) quantizes `tiles_per_program` tiles of TILE blocks of one row.

    Pointers that are None are inputs that there are not, and outputs that nobody wants.
    SCALE: "none" (MXFP4), "tensor" or "row" (read from tensor_scale_ptr), "computed" (each row's
    own). SINGLE: one tile is the whole row, so it is read once.
    """
    SUB: tl.constexpr = BLOCK // 8
    IS_NVFP4: tl.constexpr = BLOCK == 16
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    blocks = width // BLOCK
    x_ptr += row * x_stride
    if addend_ptr is not None:
        addend_ptr += row * addend_stride

    in_tile = tl.arange(0, TILE)
    tile_columns = (in_tile * BLOCK)[:, None] + tl.arange(0, 8)[None, :]

    # The row's statistics: every program of a row finds the same ones.
    inverse_rms = 1.0
    if SOURCE == "rms_norm":
        squares = tl.zeros((WIDE,), tl.float32)
        for start in range(0, width, WIDE):
            columns = start + tl.arange(0, WIDE)
            z = _norm_input(x_ptr, addend_ptr, columns, columns < width)
            squares += z * z
        mean = tl.div_rn(tl.sum(squares, 0), width.to(tl.float32))
        inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    if SINGLE:
        x_single = _load_tile(
            x_ptr, addend_ptr, weight_ptr, inverse_rms, width, tile_columns, (in_tile < blocks)[:, None],
            SOURCE, TILE, SUB,
        )  # fmt: skip
    tensor_scale = tl.full((), 1.0, tl.float32)
    if SCALE == "tensor":
        tensor_scale = tl.load(tensor_scale_ptr)
    if SCALE == "row":
        tensor_scale = tl.load(tensor_scale_ptr + row)
    if SCALE == "computed":
        if SINGLE:
            row_amax = tl.max(tl.max(tl.max(finite_magnitude_bits(x_single), 2), 1), 0)
        else:
            wide_amax = tl.zeros((WIDE,), tl.int32)
            for start in range(0, width, WIDE):
                columns = start + tl.arange(0, WIDE)
                x = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, columns < width, SOURCE)
                wide_amax = tl.maximum(wide_amax, finite_magnitude_bits(x))
            row_amax = tl.max(wide_amax, 0)
        tensor_scale = _tensor_scale_of_bits(row_amax)
        if row_scale_ptr is not None:
            tl.store(row_scale_ptr + row, tensor_scale, mask=part == 0)
    reciprocal = tl.div_rn(1.0, tensor_scale)
    if values_ptr is not None:
        # As `BlockFormat.fold_exponent`; MXFP4's is a constant, given as both ends of the range.
        fold = ((bits_of(tensor_scale) >> 23) & 0xFF) - 127
        fold = tl.minimum(tl.maximum(fold, FOLD_LOW), FOLD_HIGH)
        fold_power = power_of_two(fold)
        tl.store(residual_ptr + row, tensor_scale * power_of_two(-fold), mask=part == 0)

    first, last = 0, 1
    if not SINGLE:
        first = part * tiles_per_program
        last = tl.minimum(first + tiles_per_program, tl.cdiv(blocks, TILE))
    for tile in range(first, last):
        block = tile * TILE + in_tile
        inside = block < blocks
        columns = tile * TILE * BLOCK + tile_columns
        mask = inside[:, None]
        if SINGLE:
            x = x_single
        else:
            x = _load_tile(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, mask, SOURCE, TILE, SUB)
        if activation_ptr is not None:
            store_tile(activation_ptr + row * width, narrow_exact(x, DTYPE), columns, mask, TILE, SUB)
        if sum_ptr is not None:
            for eight in tl.static_range(SUB):
                z = _norm_input(x_ptr, addend_ptr, columns + eight * 8, mask)
                tl.store(sum_ptr + row * width + columns + eight * 8, narrow(z, DTYPE), mask=mask)

        y, unit, best, finite = winners(
            x, reciprocal, SCALE != "computed", RULE, OFFSETS, IS_NVFP4, HW_E2M1, TILE, SUB
        )
        scale, scale_reciprocal = scale_pair(best, unit, IS_NVFP4)

        sign = bits_of(x) & SIGN
        if packed_ptr is not None:
            words = packed_words(y, sign, scale_reciprocal, finite, HW_E2M1, TILE, SUB)
            at = (row * blocks + block)[:, None] * SUB + tl.arange(0, SUB)[None, :]
            tl.store(packed_ptr + at, words, mask=mask)
            code = tl.where(finite, best, 0x7F if IS_NVFP4 else 0xFF)
            if SWIZZLED:
                tiles = row // 128 * tl.cdiv(blocks, 4) + block // 4
                at = tiles * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
            else:
                at = row * blocks + block
            tl.store(scales_ptr + at, code.to(tl.uint8), mask=inside)
        if values_ptr is not None:
            q = elements(y, scale_reciprocal, HW_E2M1) * element_unit(HW_E2M1)
            if not IS_NVFP4:
                scale = tl.where(best > 0, from_bits(best << 23), 5.877471754111438e-39)  # 2**-127
            scale = tl.where(finite, scale * fold_power, float("nan"))
            signed = from_bits(bits_of(q * scale[:, None, None]) | sign)
            store_tile(values_ptr + row * width, narrow_exact(signed, DTYPE), columns, mask, TILE, SUB)


# --- launching -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """What `run` computed; None for what was not asked for.

    packed: (R, K // 2) uint8. scales: (R, K // block) in the format's scale dtype, or its 128x4 tiles
    (`swizzle_scales`). tensor_scale: fp32, a scalar or (R, 1). values: (R, K) in x's dtype, and
    residual: (R, 1) fp32, as `QuantizedTensor.values`. activation: (R, K), what was quantized.
    stream: (R, K), the new residual stream.
    """

    packed: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    tensor_scale: torch.Tensor | None = None
    values: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    activation: torch.Tensor | None = None
    stream: torch.Tensor | None = None


def _check_input(x: torch.Tensor, what: str) -> None:
    if x.dtype not in _FOLD_RANGE:
        raise ValueError(f"{what}: expected bf16, fp16 or fp32, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{what}: expected two dimensions, got shape {tuple(x.shape)}")
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"{what}: on {x.device} this runs only in Triton's interpreter (TRITON_INTERPRET=1)")


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its rows are contiguous, or else its copy; rows may be any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def constants(
    fmt: BlockFormat, policy: ScalePolicy | str, dtype: torch.dtype, width: int, *,
    source: str = "plain", scale: str = "computed", swizzled: bool = False, hw_e2m1: bool = False,
) -> tuple[dict, int, int]:  # fmt: skip
    """How `_quantize_kernel` is compiled: its constants, its warps, and tiles of each row.

    source: ``plain``, ``silu_mul`` or ``rms_norm``. scale: ``none``, ``tensor``, ``row`` or
    ``computed``. Raises ValueError for policies that this kernel does not know.
    """
    blocks = width // fmt.block_size
    warps = max(1, triton.next_power_of_2(blocks) // 32)
    single = warps <= _MAX_WARPS
    if not single:
        warps = _LOOP_WARPS
    tile = 32 * warps
    fold = _FOLD_RANGE[dtype] if fmt.has_tensor_scale else ((-1 if dtype == torch.float16 else 0),) * 2
    rule, offsets = rule_of(fmt, policy)
    compiled = dict(
        BLOCK=fmt.block_size,
        TILE=tile,
        WIDE=_AMAX_VALUES,
        SOURCE=source,
        SCALE=scale,
        RULE=rule,
        OFFSETS=offsets,
        SWIZZLED=swizzled,
        SINGLE=single,
        FOLD_LOW=fold[0],
        FOLD_HIGH=fold[1],
        HW_E2M1=hw_e2m1,
    )
    return compiled, warps, triton.cdiv(blocks, tile)


def tensor_scale(x: torch.Tensor) -> torch.Tensor:
    """The fp32 scalar ``tensor_scale_of(finite_amax(x))`` of x (R, K), reading x once."""
    _check_input(x, "tensor_scale")
    x = _contiguous_rows(x)
    amax_bits = torch.zeros((), dtype=torch.int32, device=x.device)
    if x.numel():
        _amax_kernel[(x.shape[0],)](x, x.stride(0), amax_bits, x.shape[1], WIDE=_AMAX_VALUES)
    return tensor_scale_of(amax_bits.view(torch.float32))


def run(
    x: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy | str,
    *,
    source: str = "plain",
    packed: bool = False,
    values: bool = False,
    activation: bool = False,
    tensor_scale: torch.Tensor | None = None,
    swizzled: bool = False,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
    addend: torch.Tensor | None = None,
) -> Quantized:
    """Everything that the kernel does; the functions below are its usual combinations.

    x: (R, K), or (R, 2 K) for ``silu_mul``; bf16, fp16 or fp32; K a multiple of the block.
    source: ``plain``; ``silu_mul``, as `silu_mul_quantize_values`; ``rms_norm``, as
        `rms_norm_quantize_values`, with weight (K,), eps and, for the residual stream, addend (R, K).
    packed, values, activation: the outputs wanted.
    tensor_scale: NVFP4's, fp32, a scalar or (R, 1); None: each row's own, computed here.
    Raises ValueError for other shapes, dtypes, devices and policies.
    """
    _check_input(x, "quantize")
    if source not in ("plain", "silu_mul", "rms_norm"):
        raise ValueError(f"unknown source {source!r}; there are plain, silu_mul, rms_norm")
    rows, width = x.shape[0], x.shape[1] // (2 if source == "silu_mul" else 1)
    if source == "silu_mul" and x.shape[1] % 2:
        raise ValueError(f"silu_mul: expected a gate and an up half, got a width of {x.shape[1]}")
    fmt.check_width(width, "quantize")
    if (source == "rms_norm") != (weight is not None):
        raise ValueError("a weight is what source 'rms_norm' needs, and no other takes")
    if weight is not None and (weight.shape != (width,) or weight.dtype not in _FOLD_RANGE):
        raise ValueError(f"rms_norm: expected weight ({width},), got {tuple(weight.shape)}, {weight.dtype}")
    if addend is not None and (source != "rms_norm" or addend.shape != x.shape or addend.dtype != x.dtype):
        raise ValueError("a residual stream goes with 'rms_norm', in x's shape and dtype")
    scale = "computed" if fmt.has_tensor_scale else "none"
    if tensor_scale is not None:
        if not fmt.has_tensor_scale:
            raise ValueError(f"quantize: {fmt.name} has no tensor scale")
        if tensor_scale.dtype != torch.float32 or tensor_scale.shape not in ((), (1,), (rows, 1)):
            raise ValueError(
                f"quantize: expected an fp32 tensor scale, a scalar or ({rows}, 1), got "
                f"{tuple(tensor_scale.shape)}, {tensor_scale.dtype}"
            )
        scale = "row" if tensor_scale.dim() == 2 else "tensor"
        tensor_scale = tensor_scale.contiguous()

    x = _contiguous_rows(x)
    addend = None if addend is None else _contiguous_rows(addend)
    weight = None if weight is None else weight.contiguous()
    blocks = width // fmt.block_size
    packed_codes = scales = dequantized = residual = row_scale = kept = stream = None
    if packed:
        packed_codes = x.new_empty(rows, width // 2, dtype=torch.uint8)
        if swizzled:
            shape = (triton.cdiv(rows, 128) * 128, triton.cdiv(blocks, 4) * 4)
            new = x.new_empty if shape == (rows, blocks) else x.new_zeros  # what pads is zero
            scales = new(shape, dtype=torch.uint8)
        else:
            scales = x.new_empty(rows, blocks, dtype=torch.uint8)
        if scale == "computed":
            row_scale = x.new_empty(rows, 1, dtype=torch.float32)
    if values:
        dequantized = x.new_empty(rows, width)
        residual = x.new_empty(rows, 1, dtype=torch.float32)
    if activation:
        kept = x.new_empty(rows, width)
    if addend is not None:
        stream = x.new_empty(rows, width)

    if rows and width:
        hw_e2m1 = has_e2m1(x.device)
        compiled, warps, tiles = constants(
            fmt, policy, x.dtype, width, source=source, scale=scale, swizzled=swizzled, hw_e2m1=hw_e2m1
        )
        each = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, rows)))
        words = None if packed_codes is None else packed_codes.view(torch.int32)
        _quantize_kernel[(rows, triton.cdiv(tiles, each))](
            x, x.stride(0), addend, 0 if addend is None else addend.stride(0), weight, eps,
            tensor_scale, row_scale, words, scales, dequantized, residual, kept, stream,
            width, each, **compiled, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        rule_of(fmt, policy)
    if packed:
        scales = scales.view(fmt.scale_dtype)
        if tensor_scale is None:
            tensor_scale = row_scale if fmt.has_tensor_scale else x.new_ones((), dtype=torch.float32)
    return Quantized(packed_codes, scales, tensor_scale, dequantized, residual, kept, stream)


def quantize_packed(
    x: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None = None,
    per_row: bool = False,
    swizzled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes and block scales, as `search.quantize` gives them.

    x: (R, K) bf16, fp16 or fp32. tensor_scale: NVFP4's, fp32, a scalar or (R, 1); None: computed,
    for each row (in the same pass) if `per_row`, or else for all (in a pass before).
    Returns packed (R, K // 2) uint8; scales (R, K // block), or if `swizzled` the padded tiles of
    `swizzle_scales`; and the tensor scale, fp32, a scalar or (R, 1).
    Raises ValueError for other shapes, dtypes, devices and policies.
    """
    if fmt.has_tensor_scale and tensor_scale is None and not per_row:
        tensor_scale = _tensor_scale(x)
    result = run(x, fmt, policy, packed=True, tensor_scale=tensor_scale, swizzled=swizzled)
    return result.packed, result.scales, result.tensor_scale


_tensor_scale = tensor_scale  # for functions with an argument of that name


def quantize_values(
    x: torch.Tensor, fmt: BlockFormat, policy: ScalePolicy | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized rows, each with its own tensor scale: what ops/quantize.py defines.

    x: (R, K) bf16, fp16 or fp32. Returns values (R, K) in x's dtype and residual (R, 1) fp32.
    Raises ValueError for other shapes, dtypes, devices and policies.
    """
    result = run(x, fmt, policy, values=True)
    return result.values, result.residual


def silu_mul_quantize_values(
    x: torch.Tensor, fmt: BlockFormat, policy: ScalePolicy | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_values` of ``silu(gate) * up`` for x (R, 2 K) = gate beside up.

    Rounds as vLLM 0.32's `SiluAndMul.forward_native`: silu in fp32, rounded to x's dtype, times up,
    rounded to x's dtype. The exponential is the GPU's, so the last bit of silu may differ.
    """
    result = run(x, fmt, policy, source="silu_mul", values=True)
    return result.values, result.residual


def silu_mul_quantize_packed(
    x: torch.Tensor, fmt: BlockFormat, policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None = None, swizzled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`quantize_packed` of what `silu_mul_quantize_values` quantizes; by row without a tensor scale."""
    result = run(x, fmt, policy, source="silu_mul", packed=True, tensor_scale=tensor_scale, swizzled=swizzled)
    return result.packed, result.scales, result.tensor_scale


def rms_norm_quantize_values(
    x: torch.Tensor, weight: torch.Tensor, eps: float, fmt: BlockFormat, policy: ScalePolicy | str,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`quantize_values` of RMSNorm(x), or of RMSNorm(x + residual).

    x, residual: (R, K) bf16, fp16 or fp32; weight: (K,).
    Returns values (R, K), their residual scale (R, 1) fp32, and ``x + residual`` (R, K), the new
    residual stream, or None.
    Rounds as vLLM 0.32's `ir.ops.rms_norm` and `fused_add_rms_norm`, which `RMSNorm.forward_native`
    calls: sum, mean and normalization in fp32 (on the sum before it is rounded for the stream);
    rounded to the weight's dtype; times weight, rounded to that dtype; rounded to x's dtype.
    """
    result = run(x, fmt, policy, source="rms_norm", values=True, weight=weight, eps=eps, addend=residual)
    return result.values, result.residual, result.stream


def rms_norm_quantize_packed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, fmt: BlockFormat, policy: ScalePolicy | str,
    residual: torch.Tensor | None = None, tensor_scale: torch.Tensor | None = None, swizzled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`quantize_packed` of what `rms_norm_quantize_values` quantizes; by row without a tensor scale.

    Returns packed codes, block scales, tensor scale, and the new residual stream or None.
    """
    result = run(
        x, fmt, policy, source="rms_norm", packed=True, tensor_scale=tensor_scale, swizzled=swizzled,
        weight=weight, eps=eps, addend=residual,
    )  # fmt: skip
    return result.packed, result.scales, result.tensor_scale, result.stream
