"""The searched quantizers as one Triton kernel: the bits of search.py, in one pass over the input.

A thread holds whole blocks in registers, tries the candidates one after the other, and writes what
is asked for: packed codes and block scales, dequantized values, or both. What comes before a linear
layer (SiLU-and-mul, RMSNorm) can be computed on the way in.

What makes the bits those of the reference:

* `s * q` has six significant bits, so `fma(q, -s, y)` is the reference's product and difference, but
  for the sign. No other product is contracted: the kernel is compiled with ``enable_fp_fusion=False``.
* The error is added in pairs, neighbours first; each `tl.sum` over two is one addition.
* Divisions are `tl.div_rn` (Triton's ``/`` is approximate in fp32; only silu, which has no exact
  definition, uses it), and denormals are kept.
* Conversions that the interpreter or older GPUs do not round properly (E4M3, bf16) are integer
  arithmetic, so ``TRITON_INTERPRET=1`` on the CPU checks what the GPU runs.

Metric ``mse`` only. Nothing here waits for the device: all of it can be captured in a CUDA graph.
Dispatch between this and the reference is the caller's (ops/quantize.py).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_scalesearch.formats import _FOLD_RANGE, E2M1_MAX, E4M3_MAX, BlockFormat, tensor_scale_of
from vllm_scalesearch.search import ScalePolicy

_EXPONENT = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_SIXTH = tl.constexpr(1.0 / 6.0)
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


# --- bits ----------------------------------------------------------------------------------------


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(exponent):
    """2**exponent, fp32, for exponents of normal numbers."""
    return _from_bits((exponent + 127) << 23)


@triton.jit
def _widen(x):
    """fp32 of bf16, fp16 or fp32."""
    if x.dtype == tl.bfloat16:
        return _from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """fp32 rounded to nearest even in dtype."""
    if dtype == tl.bfloat16:
        bits = _bits(x)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _narrow_exact(x, dtype: tl.constexpr):
    """fp32 that bf16 holds exactly, or NaN, in bf16; rounded to nearest even in another dtype."""
    if dtype == tl.bfloat16:
        return (_bits(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _finite_magnitude_bits(x):
    """Bits of |x|, 0 where x is not finite. Ordered as the magnitudes are."""
    bits = _bits(x) & _MAGNITUDE
    return tl.where(bits < _EXPONENT, bits, 0)


# --- block scales --------------------------------------------------------------------------------


@triton.jit
def _encode_e4m3(x):
    """E4M3 code (int32) of fp32 x >= 0: to nearest even, saturating at 448."""
    x = tl.minimum(x, 448.0)
    # A step is an eighth of the value's power of two, 2**-9 below 2**-6. Adding and subtracting
    # 1.5 * 2**20 powers, where fp32 numbers lie one step apart, rounds to nearest even.
    magic = _from_bits(_bits(tl.maximum(x, 0.015625)) & _EXPONENT) * 1572864.0
    rounded = (x + magic) - magic
    # 2**-6, the smallest normal E4M3, becomes fp32's: then the codes are the leading bits.
    return _bits(rounded * 7.52316384526264e-37) >> 20  # 2**-120


@triton.jit
def _decode_e4m3(code):
    return _from_bits(code << 20) * 1.329227995784916e36  # 2**120


@triton.jit
def _floor_log2(x):
    """floor(log2(x)), int32, of fp32 x > 0, denormals included."""
    small = x < 1.1754943508222875e-38  # 2**-126
    scaled = tl.where(small, x * 18446744073709551616.0, x)  # 2**64
    return ((_bits(scaled) >> 23) & 0xFF) - tl.where(small, 127 + 64, 127)


@triton.jit
def _reciprocal_of_e4m3(scale):
    """1 / scale, correctly rounded, of the fp32 value of an E4M3 code from 1 to 126.

    A first guess that is 10 % off at most, and three of Newton's steps: exact for all 126, without a
    division's branches and its call for other numbers (tests/test_triton_quantize.py tries each).
    """
    r = _from_bits(0x7EF2C000 - _bits(scale))
    for _ in tl.static_range(3):
        # Not -scale, which Triton computes as a difference.
        r = tl.fma(r, tl.fma(scale * -1.0, r, 1.0), r)
    return r


@triton.jit
def _scale_pair(code, unit, IS_NVFP4: tl.constexpr):
    """The scale of a code, and its reciprocal; MXFP4's relative to `unit`, as in search.py."""
    if IS_NVFP4:
        scale = _decode_e4m3(code)
        return scale, _reciprocal_of_e4m3(scale)
    else:
        exponent = tl.minimum(tl.maximum(code - unit, -60), 60)
        return _power_of_two(exponent), _power_of_two(-exponent)


# --- elements ------------------------------------------------------------------------------------


@triton.jit
def _round_trip_hw(t):
    """fp32 0 <= t < inf rounded to E2M1 by the hardware, two at a time."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 code;
        .reg .b32 pair;
        .reg .b16 low, high;
        cvt.rn.satfinite.e2m1x2.f32 code, $3, $2;
        cvt.rn.f16x2.e2m1x2 pair, code;
        mov.b32 {low, high}, pair;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        }
        """,
        "=r,=r,r,r",
        [t],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _encode_pair_hw(low, high):
    """Two signed fp32 values as one byte of E2M1 codes (int32), low nibble first."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b8 code;
        .reg .b16 wide;
        cvt.rn.satfinite.e2m1x2.f32 code, $2, $1;
        mov.b16 wide, {code, 0};
        cvt.u32.u16 $0, wide;
        }
        """,
        "=r,r,r",
        [low, high],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


# Elements travel as q on GPUs that convert to E2M1, and as q * 2**-22 elsewhere.


@triton.jit
def _round(y, reciprocal, HW_E2M1: tl.constexpr):
    """E2M1(y * reciprocal) as it travels. y: (TILE, 8, SUB) >= 0; reciprocal: (TILE,)."""
    t = y * reciprocal[:, None, None]
    if HW_E2M1:
        return _round_trip_hw(t)
    else:
        # As `round_to_e2m1`: steps are half the value's power of two, and 0.5 below 1. fp32 numbers
        # lie such a step times 2**-22 apart where that power itself is, so it serves as the magic number
        # as it is, if t is added to it times 2**-22. Scaling by powers of two changes no bit, and
        # the product in the fma is exact.
        t = tl.minimum(t, 6.0)
        power = _from_bits(_bits(tl.maximum(t, 1.0)) & _EXPONENT)
        return tl.fma(t, 2.384185791015625e-07, power) - power


@triton.jit
def _element_unit(HW_E2M1: tl.constexpr):
    """What an element is multiplied by to give q."""
    return 1.0 if HW_E2M1 else 4194304.0


@triton.jit
def _tree_sum(x, TILE: tl.constexpr, SUB: tl.constexpr):
    """(TILE, 8, SUB) to (TILE,): value i of a block is [i % 8, i // 8]; a sum of two is one addition."""
    x = tl.sum(tl.reshape(x, (TILE, 4, 2, SUB)), 2)
    x = tl.sum(tl.reshape(x, (TILE, 2, 2, SUB)), 2)
    x = tl.sum(x, 1)
    if SUB == 4:
        x = tl.sum(tl.reshape(x, (TILE, 2, 2)), 2)
    return tl.sum(x, 1)


@triton.jit
def _error(y, code, unit, IS_NVFP4: tl.constexpr, HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr):
    """Squared error (TILE,) of the blocks y under the scales of `code`."""
    scale, reciprocal = _scale_pair(code, unit, IS_NVFP4)
    q = _round(y, reciprocal, HW_E2M1)
    wide = tl.broadcast_to((scale * -_element_unit(HW_E2M1))[:, None, None], (TILE, 8, SUB))
    deviation = tl.fma(q, wide, y)  # |y| - s * q
    return _tree_sum(deviation * deviation, TILE, SUB)


@triton.jit
def _search(
    y, amax, base, unit, RULE: tl.constexpr, OFFSETS: tl.constexpr, IS_NVFP4: tl.constexpr,
    HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """The winning scale codes (TILE,) int32. y: magnitudes; amax: theirs; base: the absmax code."""
    MIN: tl.constexpr = 1 if IS_NVFP4 else 0
    MAX: tl.constexpr = 126 if IS_NVFP4 else 252
    # Candidates ascend, so that a later one must be strictly better.
    if RULE == "full":
        best = tl.full((TILE,), MIN, tl.int32)
        least = _error(y, best, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
        for number in range(MIN + 1, MAX + 1):
            code = tl.zeros((TILE,), tl.int32) + number
            error = _error(y, code, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
            better = error < least
            best = tl.where(better, code, best)
            least = tl.where(better, error, least)
    elif RULE == "4over6":
        six = tl.minimum(tl.maximum(base, MIN), MAX)
        four = tl.minimum(tl.maximum(_encode_e4m3(amax * 0.25), MIN), MAX)
        error_six = _error(y, six, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
        error_four = _error(y, four, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
        best = tl.where(error_four < error_six, four, six)
    else:
        best = tl.minimum(tl.maximum(base + OFFSETS[0], MIN), MAX)
        if len(OFFSETS) > 1:
            least = _error(y, best, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
            for i in tl.static_range(1, len(OFFSETS)):
                code = tl.minimum(tl.maximum(base + OFFSETS[i], MIN), MAX)
                error = _error(y, code, unit, IS_NVFP4, HW_E2M1, TILE, SUB)
                better = error < least
                best = tl.where(better, code, best)
                least = tl.where(better, error, least)
    return best


@triton.jit
def _winners(
    x, reciprocal, BOUNDED: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr, IS_NVFP4: tl.constexpr,
    HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """The search of the blocks x (TILE, 8, SUB) fp32, from values to the scales that win.

    reciprocal: of NVFP4's tensor scale. BOUNDED: that scale does not come from x, which may then exceed it
    by any factor. Returns magnitudes y as `_search` takes them, MXFP4's unit, the winning scale codes
    (TILE,) int32, and which blocks hold finite values only, (TILE,) bool.
    """
    magnitude_bits = _bits(x) & _MAGNITUDE
    y = _from_bits(magnitude_bits)
    amax_bits = tl.max(tl.max(magnitude_bits, 2), 1)
    finite = amax_bits < _EXPONENT
    amax = _from_bits(amax_bits)
    if IS_NVFP4:
        y *= reciprocal
        amax *= reciprocal
        if BOUNDED:
            # 2**40: as in search.py, so that errors stay finite under any scale. (Codes of amax
            # end far below.)
            y = tl.minimum(y, 1099511627776.0)
        base = _encode_e4m3(amax * _SIXTH)
        unit = base
    else:
        base = tl.where(amax > 0, _floor_log2(amax) + 125, 0)
        unit = tl.minimum(tl.maximum(base, 0), 252)
        y = y * _power_of_two(127 - unit)[:, None, None]
    best = _search(y, amax, base, unit, RULE, OFFSETS, IS_NVFP4, HW_E2M1, TILE, SUB)
    return y, unit, best, finite


@triton.jit
def _packed_words(
    y, sign, scale_reciprocal, finite, HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr
):
    """E2M1 codes of the blocks y under the scales that won, eight an int32: (TILE, SUB).

    sign: fp32 sign bits of the values, (TILE, 8, SUB) int32.
    """
    if HW_E2M1:
        t = _from_bits(_bits(y * scale_reciprocal[:, None, None]) | sign)
        low, high = tl.split(tl.permute(tl.reshape(t, (TILE, 4, 2, SUB)), (0, 1, 3, 2)))
        parts = _encode_pair_hw(low, high) << (tl.arange(0, 4) * 8)[None, :, None]
    else:
        # 1 becomes fp32's smallest normal, 2**-126: then the codes are the leading bits.
        q = _round(y, scale_reciprocal, HW_E2M1)
        code = (_bits(q * 4.930380657631324e-32) >> 22) | ((sign >> 28) & 8)
        parts = code << (tl.arange(0, 8) * 4)[None, :, None]
    return tl.where(finite[:, None], tl.sum(parts, 1), 0)


@triton.jit
def _tensor_scale_of_bits(amax_bits):
    """As `tensor_scale_of`, of the bits of finite magnitudes."""
    tensor_scale = tl.maximum(_from_bits(amax_bits) * _TENSOR_SCALE, _SMALLEST_TENSOR_SCALE)
    return tl.where(amax_bits > 0, tensor_scale, 1.0)


# --- what is quantized ---------------------------------------------------------------------------


@triton.jit
def _norm_input(x_ptr, addend_ptr, columns, mask):
    """fp32 x, plus the residual stream where there is one."""
    x = _widen(tl.load(x_ptr + columns, mask=mask, other=0.0))
    if addend_ptr is not None:
        x += _widen(tl.load(addend_ptr + columns, mask=mask, other=0.0))
    return x


@triton.jit
def _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, mask, SOURCE: tl.constexpr):
    """The values to quantize at `columns` of a row, rounded to x's dtype, in fp32."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if SOURCE == "silu_mul":
        gate = _widen(tl.load(x_ptr + columns, mask=mask, other=0.0))
        up = _widen(tl.load(x_ptr + width + columns, mask=mask, other=0.0))
        silu = _widen(_narrow(gate / (1.0 + tl.exp(-gate)), DTYPE))
        return _widen(_narrow(silu * up, DTYPE))
    elif SOURCE == "rms_norm":
        WEIGHT: tl.constexpr = weight_ptr.dtype.element_ty
        weight = _widen(tl.load(weight_ptr + columns, mask=mask, other=0.0))
        x = _norm_input(x_ptr, addend_ptr, columns, mask) * inverse_rms
        x = _widen(_narrow(_widen(_narrow(x, WEIGHT)) * weight, WEIGHT))
        return _widen(_narrow(x, DTYPE))
    else:
        return _widen(tl.load(x_ptr + columns, mask=mask, other=0.0))


# A tile is (TILE, 8, SUB), and value i of its block b is [b, i % 8, i // 8]: joined from loads of
# (TILE, 8), since the 8 values of such a row lie in one thread, and then so does the block. (Loads of
# more dimensions are spread over threads in ways that change between versions of Triton.)


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
def _store_tile(ptr, x, columns, mask, TILE: tl.constexpr, SUB: tl.constexpr):
    """Undo `_load_tile`'s order: x (TILE, 8, SUB) to memory."""
    if SUB == 4:
        even, odd = tl.split(tl.reshape(x, (TILE, 8, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        tl.store(ptr + columns + 16, c, mask=mask)
        tl.store(ptr + columns + 24, d, mask=mask)
    else:
        a, b = tl.split(x)
    tl.store(ptr + columns, a, mask=mask)
    tl.store(ptr + columns + 8, b, mask=mask)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _amax_kernel(x_ptr, x_stride, amax_bits_ptr, width, WIDE: tl.constexpr):
    """The bits of the largest finite magnitude of all rows, into one int32 that starts at 0."""
    x_ptr += tl.program_id(0).to(tl.int64) * x_stride
    amax = tl.zeros((WIDE,), tl.int32)
    for start in range(0, width, WIDE):
        columns = start + tl.arange(0, WIDE)
        x = _widen(tl.load(x_ptr + columns, mask=columns < width, other=0.0))
        amax = tl.maximum(amax, _finite_magnitude_bits(x))
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
            row_amax = tl.max(tl.max(tl.max(_finite_magnitude_bits(x_single), 2), 1), 0)
        else:
            wide_amax = tl.zeros((WIDE,), tl.int32)
            for start in range(0, width, WIDE):
                columns = start + tl.arange(0, WIDE)
                x = _load(x_ptr, addend_ptr, weight_ptr, inverse_rms, width, columns, columns < width, SOURCE)
                wide_amax = tl.maximum(wide_amax, _finite_magnitude_bits(x))
            row_amax = tl.max(wide_amax, 0)
        tensor_scale = _tensor_scale_of_bits(row_amax)
        if row_scale_ptr is not None:
            tl.store(row_scale_ptr + row, tensor_scale, mask=part == 0)
    reciprocal = tl.div_rn(1.0, tensor_scale)
    if values_ptr is not None:
        # As `BlockFormat.fold_exponent`; MXFP4's is a constant, given as both ends of the range.
        fold = ((_bits(tensor_scale) >> 23) & 0xFF) - 127
        fold = tl.minimum(tl.maximum(fold, FOLD_LOW), FOLD_HIGH)
        fold_power = _power_of_two(fold)
        tl.store(residual_ptr + row, tensor_scale * _power_of_two(-fold), mask=part == 0)

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
            _store_tile(activation_ptr + row * width, _narrow_exact(x, DTYPE), columns, mask, TILE, SUB)
        if sum_ptr is not None:
            for eight in tl.static_range(SUB):
                z = _norm_input(x_ptr, addend_ptr, columns + eight * 8, mask)
                tl.store(sum_ptr + row * width + columns + eight * 8, _narrow(z, DTYPE), mask=mask)

        y, unit, best, finite = _winners(
            x, reciprocal, SCALE != "computed", RULE, OFFSETS, IS_NVFP4, HW_E2M1, TILE, SUB
        )
        scale, scale_reciprocal = _scale_pair(best, unit, IS_NVFP4)

        sign = _bits(x) & _SIGN
        if packed_ptr is not None:
            words = _packed_words(y, sign, scale_reciprocal, finite, HW_E2M1, TILE, SUB)
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
            q = _round(y, scale_reciprocal, HW_E2M1) * _element_unit(HW_E2M1)
            if not IS_NVFP4:
                scale = tl.where(best > 0, _from_bits(best << 23), 5.877471754111438e-39)  # 2**-127
            scale = tl.where(finite, scale * fold_power, float("nan"))
            signed = _from_bits(_bits(q * scale[:, None, None]) | sign)
            _store_tile(values_ptr + row * width, _narrow_exact(signed, DTYPE), columns, mask, TILE, SUB)


_INTERPRETED = not isinstance(_quantize_kernel, triton.JITFunction)


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


def _rule(fmt: BlockFormat, policy: ScalePolicy | str) -> tuple[str, tuple[int, ...]]:
    """The candidates as the kernel takes them: ``offsets`` and which, ``4over6`` or ``full``."""
    policy = ScalePolicy.of(policy)
    policy.check_format(fmt)
    if policy.metric != "mse":
        raise ValueError(f"the Triton quantizer minimises 'mse', not {policy.metric!r}")
    offsets = policy.offsets(fmt)
    return (policy.rule, ()) if offsets is None else ("offsets", offsets)


def _check_input(x: torch.Tensor, what: str) -> None:
    if x.dtype not in _FOLD_RANGE:
        raise ValueError(f"{what}: expected bf16, fp16 or fp32, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{what}: expected two dimensions, got shape {tuple(x.shape)}")
    if not (x.is_cuda or _INTERPRETED):
        raise ValueError(f"{what}: on {x.device} this runs only in Triton's interpreter (TRITON_INTERPRET=1)")


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if its rows are contiguous, or else its copy; rows may be any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _has_e2m1(device: torch.device) -> bool:
    """Whether the GPU converts to E2M1: PTX ISA, cvt, compute capability 10.0 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


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
    rule, offsets = _rule(fmt, policy)
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
        hw_e2m1 = _has_e2m1(x.device)
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
        _rule(fmt, policy)
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
