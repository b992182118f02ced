"""What Triton's kernels read the paged cache with: a program's part of a step, and tokens as 16-bit operands.

Stored keys and values are decoded in registers to 16 bits, ``E2M1 * E4M3 * 2**-8``, which is exact in bf16 and
fp16; `STORED_UNIT` undoes the power of two.
"""

import triton
import triton.language as tl

from vllm_scalesearch.ops.triton_blocks import INTERPRETED, decode_e4m3, from_bits, narrow, narrow_exact, widen

# The interpreter multiplies bf16 as integers, and does not round to it.
_EMULATED = tl.constexpr(INTERPRETED)
# A stored value is its operand times this; so far below it, no product on the way leaves fp32.
STORED_UNIT = tl.constexpr(256.0)


# --- a program's part of a step ------------------------------------------------------------------


@triton.jit
def request_of_block(query_start_loc_ptr, block, requests, SIZE: tl.constexpr):
    """The request that a block of up to SIZE queries belongs to.

    Request r has the blocks from ``query_start_loc[r] // SIZE + r`` on, which are as many as it can need or
    one more; so all requests have at most ``tokens // SIZE + requests``, whatever their lengths are.
    """
    low = 0
    high = requests
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // SIZE + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def block_of_program(start_loc_ptr, requests, SIZE: tl.constexpr):
    """What a program has: its request, where the request's items begin, how many there are, and its first one.

    start_loc_ptr: (requests + 1,), sums of the requests' items. Programs have SIZE items each, in the order of
    `request_of_block`; in one that has none, the first one is past their number.
    """
    request = request_of_block(start_loc_ptr, tl.program_id(0), requests, SIZE)
    start = tl.load(start_loc_ptr + request)
    count = tl.load(start_loc_ptr + request + 1) - start
    return request, start, count, (tl.program_id(0) - (start // SIZE + request)) * SIZE


@triton.jit
def boundary_of(position, context, RECENT: tl.constexpr, ROUNDED: tl.constexpr, OWN_CHUNK: tl.constexpr):
    """`AttentionOptions.boundary`, of queries from position `context` on."""
    if OWN_CHUNK:
        position = tl.minimum(position, context)
    boundary = tl.maximum(position + 1 - RECENT, 0)
    if ROUNDED:
        boundary = boundary // 16 * 16
    return boundary


# --- 16-bit operands -----------------------------------------------------------------------------


@triton.jit
def dot(a, b):
    """(M, K) times (K, N), 16 bits each: fp32."""
    if _EMULATED:
        return tl.dot(widen(a), widen(b), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 rounded to nearest even in DTYPE."""
    if _EMULATED:
        return narrow(x, DTYPE)
    else:
        return x.to(DTYPE)


# --- tokens of the pages -------------------------------------------------------------------------


@triton.jit
def _operand_scale(code):
    """What E2M1 bits in the place of fp32's lead to, under E4M3 codes: 2**126 of the code's value, / 256."""
    scale = decode_e4m3(code) * 3.323069989690122e35  # 2**118
    return tl.where(code == 0x7F, float("nan"), scale)


@triton.jit
def _value(word, scale, INDEX: tl.constexpr):
    """Element INDEX of the eight in each word, times its scale, fp32."""
    # Exponent and mantissa, at fp32's: the element times 2**-126, denormal for 0.5.
    LEFT: tl.constexpr = 22 - 4 * INDEX
    bits = (word << LEFT) if LEFT >= 0 else (word >> (-LEFT))
    sign = (word << (28 - 4 * INDEX)) & -0x80000000
    return from_bits((bits & 0x01C00000) | sign) * scale


@triton.jit
def _decoded(word, scales):
    """fp32 values of words of eight E2M1 codes: (*words, 2, 2, 2), a word's four bytes, then their nibbles.

    scales: in words' shape, the scale code of the low nibbles in the low byte, of the high ones in the next.
    """
    low = _operand_scale(scales & 0xFF)
    high = _operand_scale(scales >> 8)
    # Joined so that the last bit of an element's index comes last; a thread has all eight.
    even = tl.join(
        tl.join(_value(word, low, 0), _value(word, low, 4)), tl.join(_value(word, low, 2), _value(word, low, 6))
    )
    odd = tl.join(
        tl.join(_value(word, high, 1), _value(word, high, 5)),
        tl.join(_value(word, high, 3), _value(word, high, 7)),
    )
    return tl.join(even, odd)


@triton.jit
def load_where(pointers, mask, MASKED: tl.constexpr):
    """What lies there; MASKED: where the mask is set, and 0 elsewhere."""
    return tl.load(pointers, mask=mask if MASKED else None, other=0 if MASKED else None)


@triton.jit
def page_of(table_ptr, token, keep, page_words, PAGE: tl.constexpr, MASKED: tl.constexpr):
    """Where the pages of tokens begin, in 32-bit words; MASKED: of those that are kept."""
    return load_where(table_ptr + token // PAGE, keep, MASKED).to(tl.int64) * page_words


@triton.jit
def _stored_rows(
    codes_ptr, scales_ptr, table_ptr, token, keep, page_words, D: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stored tokens whose blocks lie along head_dim: (TILE, WIDE), 0 where not kept.

    scales_ptr: of pairs of scales, 16 bits.
    """
    PAIRS: tl.constexpr = WIDE // 32
    word = tl.arange(0, WIDE // 8)
    pair = word % PAIRS
    mask = (pair < D // 32)[None, :]
    page = page_of(table_ptr, token, keep, page_words, PAGE, MASKED)
    if MASKED:
        mask &= keep[:, None]
    codes = codes_ptr + (page + token % PAGE * (D // 8))[:, None] + (word // PAIRS * (D // 32) + pair)[None, :]
    scales = scales_ptr + (page * 2 + token % PAGE * (D // 32))[:, None] + pair[None, :]
    codes = load_where(codes, mask, MASKED or D != WIDE)
    scales = load_where(scales, mask, MASKED or D != WIDE)
    # Words (4 of a row, of each pair of blocks), bytes, nibbles: to channels.
    values = tl.reshape(_decoded(codes, scales.to(tl.int32)), (TILE, 4, PAIRS, 4, 2))
    values = tl.reshape(tl.permute(values, (0, 2, 4, 1, 3)), (TILE, WIDE))
    # Rounded last, since Triton 3.6 fails on a reshape right in front of an operand on Hopper.
    return narrow_exact(values, DTYPE)


@triton.jit
def _stored_columns(
    codes_ptr, scales_ptr, table_ptr, start, low, high, page_words, D: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """TILE stored values from token `start`, whose blocks lie along tokens: (TILE, WIDE).

    Those of 16 tokens of which none is in [low, high) are 0. scales_ptr: of pairs of scales, 16 bits.
    """
    GROUPS: tl.constexpr = D // 16
    CHUNK: tl.constexpr = 4 if WIDE >= 64 else 2
    CHUNKS: tl.constexpr = WIDE // 16 // CHUNK
    word = tl.arange(0, 2 * WIDE)
    chunk = word // (32 * CHUNK)
    lane = word // CHUNK % 32
    group = chunk * CHUNK + word % CHUNK
    if D != WIDE:
        # The last chunk may have fewer groups.
        word = chunk * 128 + lane * tl.minimum(GROUPS - chunk * 4, 4) + word % CHUNK
    token = start + tl.arange(0, TILE // 16) * 16
    mask = (group < GROUPS)[None, :]
    keep = (token + 16 > low) & (token < high)
    page = page_of(table_ptr, token, keep, page_words, PAGE, MASKED)
    if MASKED:
        mask &= keep[:, None]
    tile = token % PAGE // 16
    codes = codes_ptr + (page + tile * (2 * D))[:, None] + word[None, :]
    scales = scales_ptr + (page * 2 + tile * (D // 2))[:, None] + (lane // 4 * GROUPS + group)[None, :]
    codes = load_where(codes, mask, MASKED or D != WIDE)
    scales = load_where(scales, mask, MASKED or D != WIDE)
    # Tiles, words (chunk, lane's row and column, group), bytes, nibbles: to channels and tokens.
    values = tl.reshape(_decoded(codes, scales.to(tl.int32)), (TILE // 16, CHUNKS, 8, 4, CHUNK, 4, 2))
    values = tl.reshape(tl.permute(values, (1, 4, 6, 2, 0, 3, 5)), (WIDE, TILE))
    return tl.trans(narrow_exact(values, DTYPE))


@triton.jit
def stored_tile(
    codes_ptr, scales_ptr, table_ptr, start, low, high, page_words, K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr, V_SCALES: tl.constexpr, V_ALONG_TOKENS: tl.constexpr, D: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stored keys and values of a tile from token `start`, twice (TILE, WIDE).

    MASKED: only those in [low, high) lie there; the others are 0 or, with V along tokens, may be finite.
    """
    token = start + tl.arange(0, TILE)
    keep = (token >= low) & (token < high)
    k = _stored_rows(
        codes_ptr, scales_ptr + K_SCALES // 2, table_ptr, token, keep, page_words, D, WIDE, PAGE, TILE, MASKED,
        DTYPE,
    )  # fmt: skip
    codes_ptr += V_CODES // 4
    scales_ptr += V_SCALES // 2
    if V_ALONG_TOKENS:
        v = _stored_columns(
            codes_ptr, scales_ptr, table_ptr, start, low, high, page_words, D, WIDE, PAGE, TILE, MASKED, DTYPE
        )
    else:
        v = _stored_rows(
            codes_ptr, scales_ptr, table_ptr, token, keep, page_words, D, WIDE, PAGE, TILE, MASKED, DTYPE
        )
    return k, v


@triton.jit
def full_rows(
    full_ptr, table_ptr, token, keep, full_stride, D: tl.constexpr, WIDE: tl.constexpr, FULL_PAGE: tl.constexpr
):
    """Keys, or values, of 16-bit pages: (TILE, WIDE), 0 where not kept."""
    column = tl.arange(0, WIDE)
    page = tl.load(table_ptr + token // FULL_PAGE, mask=keep, other=0).to(tl.int64) * full_stride
    at = (page + token % FULL_PAGE * (2 * D))[:, None] + column[None, :]
    return tl.load(full_ptr + at, mask=keep[:, None] & (column < D)[None, :], other=0.0)
