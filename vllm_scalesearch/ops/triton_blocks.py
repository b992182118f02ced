"""What Triton's kernels do with scale blocks: the search with the bits of search.py, packing, tiles of blocks.

A thread holds whole blocks in registers and tries the candidates one after the other. Metric ``mse`` only.

What makes the bits those of the reference:

* `s * q` has six significant bits, so `fma(q, -s, y)` is the reference's product and difference, but
  for the sign. No other product is contracted: kernels are compiled with ``enable_fp_fusion=False``.
* The error is added in pairs, neighbours first; each `tl.sum` over two is one addition.
* Reciprocals are Newton's steps that end at the correctly rounded one, and denormals are kept.
* Conversions that the interpreter or older GPUs do not round properly (E4M3, bf16) are integer
  arithmetic, so ``TRITON_INTERPRET=1`` on the CPU checks what the GPU runs.
"""

import torch
import triton
import triton.language as tl

from vllm_scalesearch.formats import BlockFormat
from vllm_scalesearch.search import ScalePolicy

SIGN = tl.constexpr(-0x80000000)
_EXPONENT = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIXTH = tl.constexpr(1.0 / 6.0)


# --- bits ----------------------------------------------------------------------------------------


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(exponent):
    """2**exponent, fp32, for exponents of normal numbers."""
    return from_bits((exponent + 127) << 23)


@triton.jit
def widen(x):
    """fp32 of bf16, fp16 or fp32."""
    if x.dtype == tl.bfloat16:
        return from_bits(x.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 rounded to nearest even in dtype."""
    if dtype == tl.bfloat16:
        bits = bits_of(x)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)
        return (rounded >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def narrow_exact(x, dtype: tl.constexpr):
    """fp32 that bf16 holds exactly, or NaN, in bf16; rounded to nearest even in another dtype."""
    if dtype == tl.bfloat16:
        return (bits_of(x) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def finite_magnitude_bits(x):
    """Bits of |x|, 0 where x is not finite. Ordered as the magnitudes are."""
    bits = bits_of(x) & _MAGNITUDE
    return tl.where(bits < _EXPONENT, bits, 0)


# --- block scales --------------------------------------------------------------------------------


@triton.jit
def encode_e4m3(x):
    """E4M3 code (int32) of fp32 x >= 0: to nearest even, saturating at 448."""
    x = tl.minimum(x, 448.0)
    # A step is an eighth of the value's power of two, 2**-9 below 2**-6. Adding and subtracting
    # 1.5 * 2**20 powers, where fp32 numbers lie one step apart, rounds to nearest even.
    magic = from_bits(bits_of(tl.maximum(x, 0.015625)) & _EXPONENT) * 1572864.0
    rounded = (x + magic) - magic
    # 2**-6, the smallest normal E4M3, becomes fp32's: then the codes are the leading bits.
    return bits_of(rounded * 7.52316384526264e-37) >> 20  # 2**-120


@triton.jit
def decode_e4m3(code):
    return from_bits(code << 20) * 1.329227995784916e36  # 2**120


@triton.jit
def _floor_log2(x):
    """floor(log2(x)), int32, of fp32 x > 0, denormals included."""
    small = x < 1.1754943508222875e-38  # 2**-126
    scaled = tl.where(small, x * 18446744073709551616.0, x)  # 2**64
    return ((bits_of(scaled) >> 23) & 0xFF) - tl.where(small, 127 + 64, 127)


@triton.jit
def reciprocal_of_e4m3(scale):
    """1 / scale, correctly rounded, of the fp32 value of an E4M3 code from 1 to 126.

    A first guess that is 10 % off at most, and three of Newton's steps: exact for all 126, without a
    division's branches and its call for other numbers (tests/test_triton_quantize.py tries each).
    """
    r = from_bits(0x7EF2C000 - bits_of(scale))
    for _ in tl.static_range(3):
        # Not -scale, which Triton computes as a difference.
        r = tl.fma(r, tl.fma(scale * -1.0, r, 1.0), r)
    return r


@triton.jit
def scale_pair(code, unit, IS_NVFP4: tl.constexpr):
    """The scale of a code, and its reciprocal; MXFP4's relative to `unit`, as in search.py."""
    if IS_NVFP4:
        scale = decode_e4m3(code)
        return scale, reciprocal_of_e4m3(scale)
    else:
        exponent = tl.minimum(tl.maximum(code - unit, -60), 60)
        return power_of_two(exponent), power_of_two(-exponent)


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
def elements(y, reciprocal, HW_E2M1: tl.constexpr):
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
        power = from_bits(bits_of(tl.maximum(t, 1.0)) & _EXPONENT)
        return tl.fma(t, 2.384185791015625e-07, power) - power


@triton.jit
def element_unit(HW_E2M1: tl.constexpr):
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
    scale, reciprocal = scale_pair(code, unit, IS_NVFP4)
    q = elements(y, reciprocal, HW_E2M1)
    wide = tl.broadcast_to((scale * -element_unit(HW_E2M1))[:, None, None], (TILE, 8, SUB))
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
        four = tl.minimum(tl.maximum(encode_e4m3(amax * 0.25), MIN), MAX)
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
def winners(
    x, reciprocal, BOUNDED: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr, IS_NVFP4: tl.constexpr,
    HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """The search of the blocks x (TILE, 8, SUB) fp32, from values to the scales that win.

    reciprocal: of NVFP4's tensor scale. BOUNDED: that scale does not come from x, which may then exceed it
    by any factor. Returns magnitudes y as `_search` takes them, MXFP4's unit, the winning scale codes
    (TILE,) int32, and which blocks hold finite values only, (TILE,) bool.
    """
    magnitude_bits = bits_of(x) & _MAGNITUDE
    y = from_bits(magnitude_bits)
    amax_bits = tl.max(tl.max(magnitude_bits, 2), 1)
    finite = amax_bits < _EXPONENT
    amax = from_bits(amax_bits)
    if IS_NVFP4:
        y *= reciprocal
        amax *= reciprocal
        if BOUNDED:
            # 2**40: as in search.py, so that errors stay finite under any scale. (Codes of amax
            # end far below.)
            y = tl.minimum(y, 1099511627776.0)
        base = encode_e4m3(amax * _SIXTH)
        unit = base
    else:
        base = tl.where(amax > 0, _floor_log2(amax) + 125, 0)
        unit = tl.minimum(tl.maximum(base, 0), 252)
        y = y * power_of_two(127 - unit)[:, None, None]
    best = _search(y, amax, base, unit, RULE, OFFSETS, IS_NVFP4, HW_E2M1, TILE, SUB)
    return y, unit, best, finite


@triton.jit
def packed_words(
    y, sign, scale_reciprocal, finite, HW_E2M1: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr
):
    """E2M1 codes of the blocks y under the scales that won, eight an int32: (TILE, SUB).

    sign: fp32 sign bits of the values, (TILE, 8, SUB) int32.
    """
    if HW_E2M1:
        t = from_bits(bits_of(y * scale_reciprocal[:, None, None]) | sign)
        low, high = tl.split(tl.permute(tl.reshape(t, (TILE, 4, 2, SUB)), (0, 1, 3, 2)))
        parts = _encode_pair_hw(low, high) << (tl.arange(0, 4) * 8)[None, :, None]
    else:
        # 1 becomes fp32's smallest normal, 2**-126: then the codes are the leading bits.
        q = elements(y, scale_reciprocal, HW_E2M1)
        code = (bits_of(q * 4.930380657631324e-32) >> 22) | ((sign >> 28) & 8)
        parts = code << (tl.arange(0, 8) * 4)[None, :, None]
    return tl.where(finite[:, None], tl.sum(parts, 1), 0)


@triton.jit
def block_values(y, best, finite, HW_E2M1: tl.constexpr):
    """Magnitudes of the blocks y as NVFP4 under the scales that won, tensor scale apart; fp32 and exact."""
    scale, reciprocal = scale_pair(best, best, True)
    q = elements(y, reciprocal, HW_E2M1) * element_unit(HW_E2M1)
    return q * tl.where(finite, scale, float("nan"))[:, None, None]


# --- tiles ---------------------------------------------------------------------------------------

# A tile is (TILE, 8, SUB), and value i of its block b is [b, i % 8, i // 8]: joined from loads of
# (TILE, 8), since the 8 values of such a row lie in one thread, and then so does the block. (Loads of
# more dimensions are spread over threads in ways that change between versions of Triton.)


@triton.jit
def load_tile(ptr, columns, mask):
    """Blocks of 16 as a tile (TILE, 8, 2) in fp32.

    columns: (TILE, 8), where each block's first eight values lie; mask: (TILE, 1), of blocks.
    """
    a = widen(tl.load(ptr + columns, mask=mask, other=0.0))
    b = widen(tl.load(ptr + columns + 8, mask=mask, other=0.0))
    return tl.join(a, b)


@triton.jit
def store_tile(ptr, x, columns, mask, TILE: tl.constexpr, SUB: tl.constexpr):
    """A tile x (TILE, 8, SUB) to memory. columns, mask: as `load_tile` has them."""
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


@triton.jit
def as_blocks(x, BLOCKS: tl.constexpr):
    """Values in rows of whole blocks of 16, as a tile of blocks (BLOCKS, 8, 2)."""
    return tl.permute(tl.reshape(x, (BLOCKS, 2, 8)), (0, 2, 1))


@triton.jit
def as_rows(x, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Undo `as_blocks`."""
    return tl.reshape(tl.permute(x, (0, 2, 1)), (ROWS, WIDE))


# --- launching -----------------------------------------------------------------------------------

INTERPRETED = not isinstance(bits_of, triton.JITFunction)


def has_e2m1(device: torch.device) -> bool:
    """HW_E2M1: whether the device converts to E2M1 (PTX ISA, cvt: compute capability 10.0 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def rule_of(fmt: BlockFormat, policy: ScalePolicy | str) -> tuple[str, tuple[int, ...]]:
    """The candidates as RULE and OFFSETS: ``offsets`` and which, ``4over6`` or ``full``.

    Raises ValueError for policies that `winners` does not know.
    """
    policy = ScalePolicy.of(policy)
    policy.check_format(fmt)
    if policy.metric != "mse":
        raise ValueError(f"the Triton quantizer minimises 'mse', not {policy.metric!r}")
    offsets = policy.offsets(fmt)
    return (policy.rule, ()) if offsets is None else ("offsets", offsets)
