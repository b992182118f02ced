"""Attention over the paged cache with both products on the GPU's FP4 units, by Triton: for Blackwell.

triton_paged_attention.py decodes what is stored to 16 bits. Here stored keys meet packed queries, and packed
P meets stored values, as E2M1 codes with E4M3 scales: `tl.dot_scaled`, which becomes
``tcgen05.mma.kind::mxf4nvf4.block_scale`` on sm_100a and ``mma.sync.kind::mxf4nvf4.block_scale`` on sm_120a.
So Q and P have to be quantized, and V has to lie along tokens, the direction in which its product sums. The
arithmetic is the definition's (attention_reference.py): sink and recent tokens are multiplied in 16 bits, with
the 16-bit pages, the unquantized q and the unquantized P.

A program has a block of rows and walks over all the keys of its request, as there; keys are never shared
among programs, because a quantized P depends on the running maximum from the first tile on. It packs its
queries itself, before the first tile: no other program needs them, so a kernel of its own would only add a
trip through memory. Codes of the pages lie in the order of another instruction's operands (kv_pages.py); they
are put into theirs in registers, two codes a byte.

**Compiled for sm_100a and sm_120a (tests/test_fp4_attention.py), not run on either**, and its tile sizes are
not tuned: they are such that Triton emits that MMA. What runs elsewhere is the same kernel with
one function exchanged, as in fp4_product.py: it decodes codes and scales to fp16, exactly, for `tl.dot`. That
was run in Triton's interpreter only; nothing here has been timed.
"""

import torch
import triton
import triton.language as tl

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.fp4_product import FP4_CAPABILITIES, decode
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.ops.triton_blocks import (
    SIGN,
    as_blocks,
    as_rows,
    bits_of,
    block_values,
    narrow,
    packed_words,
    scale_pair,
    widen,
    winners,
)
from vllm_scalesearch.ops.triton_kv_write import check_cache, check_queries, page_constants, rule_constants
from vllm_scalesearch.ops.triton_pages import (
    block_of_program,
    boundary_of,
    dot,
    full_rows,
    load_where,
    page_of,
    rounded,
)
from vllm_scalesearch.ops.triton_softmax import (
    P_UNITS,
    capability_of,
    levels,
    pure_tiles,
    rows_of_block,
    scaled,
    softmax_step,
    visible_and_stored,
    window_of_block,
)

# Values that one MMA sums over: head_dim is filled up to it, and a tile of tokens has as many at least.
_MMA_DEPTH = 64

# Triton 3.6, that of vLLM 0.32, does not compile for sm_100a a `tl.dot_scaled` in a loop that starts from a
# constant zero: its OptimizeAccumulatorInit takes the operands' scales for accumulators that need no value.
# 3.9 does; those between were not tried.
_NEEDS_OPAQUE_ZERO = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


# --- operands ------------------------------------------------------------------------------------


@triton.jit
def _product(
    a, a_scales, b, b_scales, zero, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FP4_UNITS: tl.constexpr
):
    """NVFP4 (M, K) times the transpose of NVFP4 (N, K): (M, N) fp32.

    Codes are two a byte, low nibble first, and scales one for 16 values; all uint8. zero: 0.0.
    """
    if FP4_UNITS:
        a_scales = a_scales.to(tl.float8e4nv, bitcast=True)
        b_scales = b_scales.to(tl.float8e4nv, bitcast=True)
        accumulator = tl.full((M, N), zero, tl.float32)
        return tl.dot_scaled(a, a_scales, "e2m1", tl.trans(b), b_scales, "e2m1", accumulator)
    else:
        return dot(decode(a, a_scales, M, K // 16), tl.trans(decode(b, b_scales, N, K // 16)))


@triton.jit
def _packed(
    x, BOUNDED: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    HW_E2M1: tl.constexpr,
):  # fmt: skip
    """fp32 (ROWS, WIDE) as NVFP4 under a tensor scale of 1: codes and scales, as `_product` has them, and the
    sums of rows."""
    BLOCKS: tl.constexpr = ROWS * WIDE // 16
    blocks = as_blocks(x, BLOCKS)
    y, _, best, finite = winners(blocks, 1.0, BOUNDED, RULE, OFFSETS, True, HW_E2M1, BLOCKS, 2)
    _, reciprocal = scale_pair(best, best, True)
    words = packed_words(y, bits_of(blocks) & SIGN, reciprocal, finite, HW_E2M1, BLOCKS, 2)
    codes = (words[:, :, None] >> (tl.arange(0, 4) * 8)[None, None, :]) & 0xFF
    scales = tl.where(finite, best, 0x7F)
    return (
        tl.reshape(codes.to(tl.uint8), (ROWS, WIDE // 2)),
        tl.reshape(scales.to(tl.uint8), (ROWS, WIDE // 16)),
        tl.sum(as_rows(block_values(y, best, finite, HW_E2M1), ROWS, WIDE), 1),
    )


@triton.jit
def _natural_bytes(word):
    """Bytes of the codes of a word, whose low and high nibbles are apart: (*words, 2, 2) uint8.

    Of the low nibbles and of the high ones, two bytes each, of two codes that follow each other.
    """
    low = word & 0x0F0F0F0F
    high = (word >> 4) & 0x0F0F0F0F
    low |= low >> 4
    high |= high >> 4
    first = tl.join((low & 0xFF).to(tl.uint8), (high & 0xFF).to(tl.uint8))
    second = tl.join(((low >> 16) & 0xFF).to(tl.uint8), ((high >> 16) & 0xFF).to(tl.uint8))
    return tl.join(first, second)


@triton.jit
def _stored_keys(
    pages_ptr, table_ptr, token, keep, page_words, K_SCALES: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stored keys, codes (TILE, WIDE // 2) and scales (TILE, WIDE // 16); 0 where not kept."""
    PAIRS: tl.constexpr = WIDE // 32
    word = tl.arange(0, WIDE // 8)
    pair = word % PAIRS
    block = tl.arange(0, WIDE // 16)
    mask = (pair < D // 32)[None, :]
    scale_mask = (block < D // 16)[None, :]
    page = page_of(table_ptr, token, keep, page_words, PAGE, MASKED)
    if MASKED:
        mask &= keep[:, None]
        scale_mask &= keep[:, None]
    codes_ptr = pages_ptr.to(tl.pointer_type(tl.int32))
    codes = codes_ptr + (page + token % PAGE * (D // 8))[:, None] + (word // PAIRS * (D // 32) + pair)[None, :]
    scales = pages_ptr + K_SCALES + (page * 4 + token % PAGE * (D // 16))[:, None] + block[None, :]
    codes = load_where(codes, mask, MASKED or D != WIDE)
    scales = load_where(scales, scale_mask, MASKED or D != WIDE)
    # Words (4 of a row, of each pair of blocks), blocks of a pair, bytes.
    codes = tl.reshape(_natural_bytes(codes), (TILE, 4, PAIRS, 2, 2))
    return tl.reshape(tl.permute(codes, (0, 2, 3, 1, 4)), (TILE, WIDE // 2)), scales


@triton.jit
def _stored_values(
    pages_ptr, table_ptr, start, low, high, page_words, V_CODES: tl.constexpr, V_SCALES: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """TILE stored values from token `start`, codes (WIDE, TILE // 2) and scales (WIDE, TILE // 16).

    Those of 16 tokens of which none is in [low, high) are 0.
    """
    GROUPS: tl.constexpr = D // 16
    CHUNKS: tl.constexpr = WIDE // 64
    word = tl.arange(0, 2 * WIDE)
    chunk = word // 128
    lane = word // 4 % 32
    group = chunk * 4 + word % 4
    if D != WIDE:
        # The last chunk may have fewer groups.
        word = chunk * 128 + lane * tl.minimum(GROUPS - chunk * 4, 4) + word % 4
    channel = tl.arange(0, WIDE)
    token = start + tl.arange(0, TILE // 16) * 16
    mask = (group < GROUPS)[None, :]
    scale_mask = (channel < D)[:, None]
    keep = (token + 16 > low) & (token < high)
    page = page_of(table_ptr, token, keep, page_words, PAGE, MASKED)
    if MASKED:
        mask &= keep[:, None]
        scale_mask &= keep[None, :]
    tile = token % PAGE // 16
    codes_ptr = pages_ptr.to(tl.pointer_type(tl.int32)) + V_CODES // 4
    codes = codes_ptr + (page + tile * (2 * D))[:, None] + word[None, :]
    at = channel % 8 * (2 * GROUPS) + channel // 16 * 2 + channel // 8 % 2
    scales = pages_ptr + V_SCALES + (page * 4 + tile * D)[None, :] + at[:, None]
    codes = load_where(codes, mask, MASKED or D != WIDE)
    scales = load_where(scales, scale_mask, MASKED or D != WIDE)
    # Tiles, words (chunk, lane's row and column, group), halves of a group's channels, bytes.
    codes = tl.reshape(_natural_bytes(codes), (TILE // 16, CHUNKS, 8, 4, 4, 2, 2))
    return tl.reshape(tl.permute(codes, (1, 4, 5, 2, 0, 3, 6)), (WIDE, TILE // 2)), scales


@triton.jit
def _plus_stored(
    output, total, p, v, v_scales, maximum, stored_maximum, zero, ROWS: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, TWO_LEVELS: tl.constexpr, P_RULE: tl.constexpr, P_OFFSETS: tl.constexpr,
    HW_E2M1: tl.constexpr, FP4_UNITS: tl.constexpr,
):  # fmt: skip
    """`output` plus P (ROWS, TILE), quantized, times stored values, and the total plus P.

    At two levels, products are in units of P_UNITS.
    """
    if TWO_LEVELS:
        up, down = levels(maximum, stored_maximum)
        codes, scales, sums = _packed(p * up[:, None], False, P_RULE, P_OFFSETS, ROWS, TILE, HW_E2M1)
        product = _product(codes, scales, v, v_scales, zero, ROWS, WIDE, TILE, FP4_UNITS)
        return output + product * down[:, None], total + sums * down * (1.0 / P_UNITS)
    else:
        codes, scales, sums = _packed(p, False, P_RULE, P_OFFSETS, ROWS, TILE, HW_E2M1)
        return output + _product(codes, scales, v, v_scales, zero, ROWS, WIDE, TILE, FP4_UNITS), total + sums


# --- the kernel ----------------------------------------------------------------------------------


@triton.jit
def _queries(q_ptr, rows, valid, D: tl.constexpr, WIDE: tl.constexpr):
    """Queries that begin at `rows`: (ROWS, WIDE), 0 past their end."""
    column = tl.arange(0, WIDE)
    mask = valid[:, None] & (column < D)[None, :]
    return tl.load(q_ptr + rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["requests", "table_stride", "full_table_stride"])
def _fp4_attention_kernel(
    q_ptr, pages_ptr, full_ptr, output_ptr,
    query_start_loc_ptr, seq_lens_ptr, block_table_ptr, full_block_table_ptr,
    requests, table_stride, full_table_stride, score_scale, cap, unit,
    q_stride, q_head_stride, output_stride, output_head_stride,
    page_words, head_words, full_stride, full_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, FULL_PAGE: tl.constexpr, K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr, V_SCALES: tl.constexpr, SINK: tl.constexpr, RECENT: tl.constexpr,
    WINDOW: tl.constexpr, OWN_CHUNK: tl.constexpr, SOFT_CAP: tl.constexpr, Q_RULE: tl.constexpr,
    Q_OFFSETS: tl.constexpr, P_RULE: tl.constexpr, P_OFFSETS: tl.constexpr, TWO_LEVELS: tl.constexpr,
    HW_E2M1: tl.constexpr, FP4_UNITS: tl.constexpr, OPAQUE_ZERO: tl.constexpr,
):  # fmt: skip
    """Program (i, head): QUERIES queries of a request and KV head, over all of its keys.

    ROWS >= QUERIES * GROUP. WIDE: D rounded up to a power of two. WINDOW: 0 for none. unit: what the output
    is summed up in units of, V's tensor scale over P_UNITS at two levels. OPAQUE_ZERO: sums start from a zero
    that the compiler cannot tell to be one (`_NEEDS_OPAQUE_ZERO`).
    """
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    request, start, queries, first_query = block_of_program(query_start_loc_ptr, requests, QUERIES)
    if first_query >= queries:
        return
    length = tl.load(seq_lens_ptr + request)
    context = length - queries
    head = tl.program_id(1).to(tl.int64)

    query, valid, position, first_position, last_position = rows_of_block(
        first_query, queries, context, length, GROUP, ROWS, QUERIES
    )
    boundary = boundary_of(position, context, RECENT, True, OWN_CHUNK)
    first_boundary = boundary_of(first_position, context, RECENT, True, OWN_CHUNK)
    last_boundary = boundary_of(last_position, context, RECENT, True, OWN_CHUNK)
    low, seen_by_all = window_of_block(first_position, last_position, WINDOW)
    first = low // TILE
    last = tl.cdiv(last_position + 1, TILE)
    pure_first, pure_last = pure_tiles(first, last, seen_by_all, first_boundary, SINK, TILE)

    token_row = (start + query).to(tl.int64)
    query_head = head * GROUP + tl.arange(0, ROWS) % GROUP
    q_rows = token_row * q_stride + query_head * q_head_stride
    q, q_scales, _ = _packed(
        widen(_queries(q_ptr, q_rows, valid, D, WIDE)), True, Q_RULE, Q_OFFSETS, ROWS, WIDE, HW_E2M1
    )
    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    full_table_ptr = full_block_table_ptr + request.to(tl.int64) * full_table_stride
    full_ptr += head * full_head_stride
    pages_ptr += head * head_words * 4

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    stored_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, WIDE), tl.float32)
    inside = tl.arange(0, TILE)
    zero = 0.0
    if OPAQUE_ZERO:
        zero = tl.minimum(first_query, 0).to(tl.float32)
    for phase in range(2):
        # General tiles before the pure ones, the pure ones, and general tiles after them.
        begin = tl.where(phase == 0, first, pure_last)
        middle = tl.where(phase == 0, pure_first, last)
        end = tl.where(phase == 0, pure_last, last)
        for tile in range(begin, middle):
            token = tile * TILE + inside
            bottom = tl.maximum(tile * TILE, low)
            top = tl.minimum(tile * TILE + TILE, last_position + 1)
            stored_bottom = tl.maximum(bottom, SINK)
            stored_top = tl.minimum(top, last_boundary)
            visible, stored = visible_and_stored(token, position, boundary, SINK, WINDOW)
            # First the tokens in full precision, so that P of the stored ones is relative to the maximum of
            # the whole tile. Their queries are read anew: these tiles are few, and registers too.
            if (bottom < tl.minimum(top, SINK)) | (tl.maximum(bottom, first_boundary) < top):
                keep = (token >= bottom) & (token < top) & ((token < SINK) | (token >= first_boundary))
                k = full_rows(full_ptr, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
                scores = dot(_queries(q_ptr, q_rows, valid, D, WIDE), tl.trans(k))
                scores = scaled(scores, score_scale, cap, SOFT_CAP)
                scores = tl.where(stored | (visible == 0), float("-inf"), scores)
                p, maximum, total, output = softmax_step(scores, maximum, total, output, True)
                v = full_rows(full_ptr + D, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
                output += dot(rounded(p, DTYPE), v) * (1.0 / unit)
            if stored_bottom < stored_top:
                keep = (token >= stored_bottom) & (token < stored_top)
                k, k_scales = _stored_keys(
                    pages_ptr, table_ptr, token, keep, page_words, K_SCALES, D, WIDE, PAGE, TILE, True
                )
                scores = _product(q, q_scales, k, k_scales, zero, ROWS, TILE, WIDE, FP4_UNITS)
                scores = scaled(scores, score_scale, cap, SOFT_CAP)
                scores = tl.where(stored & visible, scores, float("-inf"))
                stored_maximum = tl.maximum(stored_maximum, tl.ceil(tl.max(scores, 1)))
                p, maximum, total, output = softmax_step(scores, maximum, total, output, False)
                v, v_scales = _stored_values(
                    pages_ptr, table_ptr, tile * TILE, stored_bottom, stored_top, page_words, V_CODES, V_SCALES,
                    D, WIDE, PAGE, TILE, True,
                )  # fmt: skip
                output, total = _plus_stored(
                    output, total, p, v, v_scales, maximum, stored_maximum, zero, ROWS, WIDE, TILE,
                    TWO_LEVELS, P_RULE, P_OFFSETS, HW_E2M1, FP4_UNITS,
                )  # fmt: skip
        for tile in range(middle, end):
            k, k_scales = _stored_keys(
                pages_ptr, table_ptr, tile * TILE + inside, None, page_words, K_SCALES, D, WIDE, PAGE, TILE,
                False,
            )  # fmt: skip
            scores = _product(q, q_scales, k, k_scales, zero, ROWS, TILE, WIDE, FP4_UNITS)
            scores = scaled(scores, score_scale, cap, SOFT_CAP)
            stored_maximum = tl.maximum(stored_maximum, tl.ceil(tl.max(scores, 1)))
            p, maximum, total, output = softmax_step(scores, maximum, total, output, False)
            v, v_scales = _stored_values(
                pages_ptr, table_ptr, tile * TILE, 0, 0, page_words, V_CODES, V_SCALES, D, WIDE, PAGE, TILE,
                False,
            )  # fmt: skip
            output, total = _plus_stored(
                output, total, p, v, v_scales, maximum, stored_maximum, zero, ROWS, WIDE, TILE, TWO_LEVELS,
                P_RULE, P_OFFSETS, HW_E2M1, FP4_UNITS,
            )  # fmt: skip

    output *= (unit / total)[:, None]
    column = tl.arange(0, WIDE)
    out = token_row * output_stride + query_head * output_head_stride
    mask = valid[:, None] & (column < D)[None, :]
    tl.store(output_ptr + out[:, None] + column[None, :], narrow(output, DTYPE), mask=mask)


# --- its launch ----------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """Attention of a step's transformed queries to the cache, into `output`, with FP4 products.

    q: (T, Hq, D) bf16 or fp16, transformed and not quantized; T may exceed the step's tokens. pages, full: as
    `triton_kv_write.transform_and_write` has them, full in q's dtype. output: (T, Hq, D) in q's dtype, the
    last dimension contiguous; rows past the step's tokens are left alone.
    On GPUs whose capability is not in `FP4_CAPABILITIES`, decoded values are multiplied instead.
    Raises ValueError for what `unsupported` names, and for other shapes, dtypes, strides and devices.
    """
    reason = unsupported(layout, options)
    if reason is not None:
        raise ValueError(f"attention on FP4 units: {reason}")
    check_cache(pages, full, layout, options)
    check_queries(q)
    heads, dim = pages.shape[1], layout.head_size
    if q.shape[2] != dim or q.shape[1] % heads or not q.dtype == full.dtype == output.dtype:
        raise ValueError(
            f"attention on FP4 units: queries {tuple(q.shape)} {q.dtype} and output {output.dtype} do not fit "
            f"pages of {heads} heads of {dim} in {full.dtype}"
        )
    if output.shape != q.shape or output.stride(2) != 1:
        raise ValueError(
            f"attention on FP4 units: expected output like q {tuple(q.shape)}, got {tuple(output.shape)} with "
            f"strides {output.stride()}"
        )
    tokens, group, requests = len(q), q.shape[1] // heads, len(step.seq_lens)
    if not tokens or not requests:
        return
    constants, launch = attention_constants(
        layout, full.shape[2], options, group, step.max_query_len, capability_of(q.device)
    )
    score_scale, cap = options.exp2_scales(dim)
    _fp4_attention_kernel[(tokens // constants["QUERIES"] + requests, heads)](
        q, pages, full, output, step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
        requests, step.block_table.stride(0), step.full_block_table.stride(0), score_scale, cap,
        float(options.v_scale) / options.p_levels, q.stride(0), q.stride(1), output.stride(0), output.stride(1),
        pages.stride(0) // 4, pages.stride(1) // 4, full.stride(0), full.stride(1),
        **constants, **launch,
    )  # fmt: skip


def unsupported(layout: PageLayout, options: AttentionOptions) -> str | None:
    """Why this kernel does not take these pages or options, or None."""
    if options.q is None or options.p is None:
        return "both operands of a product are NVFP4, so q and p need a policy"
    if layout.v_group != "tokens":
        return "P times V sums over tokens, so V must be stored along tokens"
    if options.kv_tile < _MMA_DEPTH or options.kv_tile & (options.kv_tile - 1):
        return f"tiles are of a power of two from {_MMA_DEPTH} on, not kv_tile={options.kv_tile}"
    return None


def attention_constants(
    layout: PageLayout,
    full_page: int,
    options: AttentionOptions,
    group: int,
    max_query_len: int,
    capability: tuple[int, int],
) -> tuple[dict, dict]:
    """How `_fp4_attention_kernel` is compiled, and its launch options."""
    fp4_units = capability in FP4_CAPABILITIES
    wide = max(triton.next_power_of_2(layout.head_size), _MMA_DEPTH)
    if fp4_units and capability[0] == 10:
        rows = 128  # of tcgen05's block-scaled MMA; with fewer, Triton multiplies decoded values instead
    else:
        # On sm_120a, sums stay in registers: with more rows, or 4 warps for as many, they do not suffice.
        rows = min(triton.next_power_of_2(group * max_query_len), 64 if wide <= 128 else 32)
    rows = max(rows, triton.next_power_of_2(group), BLOCK)
    pages = page_constants(layout, full_page)
    del pages["V_ALONG_TOKENS"]
    constants = dict(
        GROUP=group,
        D=layout.head_size,
        WIDE=wide,
        ROWS=rows,
        QUERIES=rows // group,
        TILE=options.kv_tile,
        **pages,
        SINK=options.sink,
        RECENT=options.recent,
        WINDOW=options.sliding_window or 0,
        OWN_CHUNK=options.own_chunk,
        SOFT_CAP=options.logits_soft_cap is not None,
        **rule_constants("Q_", options.q),
        **rule_constants("P_", options.p),
        TWO_LEVELS=options.two_level_p,
        HW_E2M1=capability[0] >= 10,
        FP4_UNITS=fp4_units,
        OPAQUE_ZERO=fp4_units and _NEEDS_OPAQUE_ZERO,
    )
    warps = 8 if rows > BLOCK else 4
    # The search's products must not be contracted (triton_blocks.py).
    return constants, dict(num_warps=warps, num_stages=2, enable_fp_fusion=False)
