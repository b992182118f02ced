"""Attention over the paged cache in Triton: attention_reference.py's arithmetic, with 16-bit products.

A program has a block of rows, which are the query heads of one KV head for some tokens of one request, and
walks over the request's keys in tiles, with an online softmax. The tiles of a row block, ascending, are

* general ones: around the sink, around the boundary of what is stored, and at a sliding window's start.
  What of them is stored comes from the packed pages, the rest from the 16-bit ones, under masks;
* between these, tiles that every row sees as stored, to the last token: packed pages only, no masks.

Stored keys and values are decoded in registers to 16 bits, exactly but for a power of two (triton_pages.py).
V's tensor scale and that power of two are applied to the sum at the end. What P loses on the way to a 16-bit
operand is the only rounding that the definition does not have, and a quantized P loses nothing.

Where there are few programs, several share the keys of a row block, and a second kernel merges what they
found. The maximum is a whole power of two, so that P's codes do not depend on who has which keys.

Grids follow from shapes alone and nothing waits for the device, so all of it can be captured in a CUDA graph.
"""

import functools

import torch
import triton
import triton.language as tl

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.ops.triton_blocks import as_blocks, as_rows, block_values, narrow, narrow_exact, winners
from vllm_scalesearch.ops.triton_kv_write import check_cache, check_queries, page_constants, rule_constants
from vllm_scalesearch.ops.triton_pages import (
    STORED_UNIT,
    block_of_program,
    boundary_of,
    dot,
    full_rows,
    rounded,
    stored_tile,
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

# Row blocks' programs of a multiprocessor that are enough not to share keys, and the fewest tiles that are
# worth a program of their own.
_PROGRAMS_PER_PROCESSOR, _LEAST_TILES, _MAX_SEGMENTS = 4, 2, 64
_LARGE_ROWS = 64  # From so many rows on, a program is large: half as many are enough.


# --- P times stored values -----------------------------------------------------------------------


@triton.jit
def _quantized_p(
    p, ROWS: tl.constexpr, TILE: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr, HW_E2M1: tl.constexpr
):
    """A tile of P as NVFP4: values (ROWS, TILE) fp32, exact in 16 bits, in units of P_UNITS at two levels."""
    BLOCKS: tl.constexpr = ROWS * TILE // 16
    blocks = as_blocks(p, BLOCKS)
    y, _, best, finite = winners(blocks, 1.0, False, RULE, OFFSETS, True, HW_E2M1, BLOCKS, 2)
    return as_rows(block_values(y, best, finite, HW_E2M1), ROWS, TILE)


@triton.jit
def _plus_stored(
    output, total, p, v, maximum, stored_maximum, ROWS: tl.constexpr, TILE: tl.constexpr,
    TWO_LEVELS: tl.constexpr, P_RULE: tl.constexpr, P_OFFSETS: tl.constexpr, HW_E2M1: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """`output` plus P times stored values v (TILE, WIDE), and the total.

    A P that is quantized here is added to the total; another one was before. At two levels, products are in
    units of P_UNITS. stored_maximum: of the rows' scores of stored tokens, a whole number.
    """
    if P_RULE is None:
        return output + dot(rounded(p, DTYPE), v), total
    else:
        if TWO_LEVELS:
            up, down = levels(maximum, stored_maximum)
            quantized = _quantized_p(p * up[:, None], ROWS, TILE, P_RULE, P_OFFSETS, HW_E2M1)
            quantized *= down[:, None]
            total += tl.sum(quantized, 1) * (1.0 / P_UNITS)
            # Exact but for values in fp16 that are 2**20 below the largest.
            return output + dot(rounded(quantized, DTYPE), v), total
        else:
            quantized = _quantized_p(p, ROWS, TILE, P_RULE, P_OFFSETS, HW_E2M1)
            return output + dot(narrow_exact(quantized, DTYPE), v), total + tl.sum(quantized, 1)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["requests", "table_stride", "full_table_stride"],
    # Those of some requests of a step begin anywhere.
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr", "seq_lens_ptr", "block_table_ptr", "full_block_table_ptr",
    ],
)  # fmt: skip
def _attention_kernel(
    q_ptr, q_stored_ptr, pages_ptr, full_ptr, output_ptr, partial_ptr, maximum_ptr, total_ptr,
    query_start_loc_ptr, seq_lens_ptr, block_table_ptr, full_block_table_ptr,
    requests, table_stride, full_table_stride, score_scale, cap, unit,
    q_stride, q_head_stride, q_stored_stride, q_stored_head_stride, output_stride, output_head_stride,
    page_words, head_words, full_stride, full_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    TILE: tl.constexpr, PAGE: tl.constexpr, FULL_PAGE: tl.constexpr, K_SCALES: tl.constexpr,
    V_CODES: tl.constexpr, V_SCALES: tl.constexpr, V_ALONG_TOKENS: tl.constexpr, SINK: tl.constexpr,
    RECENT: tl.constexpr, WINDOW: tl.constexpr, OWN_CHUNK: tl.constexpr, SOFT_CAP: tl.constexpr,
    Q_QUANTIZED: tl.constexpr, P_RULE: tl.constexpr, P_OFFSETS: tl.constexpr, TWO_LEVELS: tl.constexpr,
    SHARED: tl.constexpr, LEAST_TILES: tl.constexpr, HW_E2M1: tl.constexpr,
):  # fmt: skip
    """Program (i, head, segment): QUERIES queries of a request and KV head, over one segment of its keys.

    ROWS >= QUERIES * GROUP. WIDE: D rounded up to a power of two. WINDOW: 0 for none. unit: what the output
    is summed up in units of. SHARED: keys are in several segments, and what is found of each goes to partial
    (T, Hq, segments, D), maximum and total (T, Hq, segments), fp32.
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
    boundary = boundary_of(position, context, RECENT, V_ALONG_TOKENS, OWN_CHUNK)
    first_boundary = boundary_of(first_position, context, RECENT, V_ALONG_TOKENS, OWN_CHUNK)
    last_boundary = boundary_of(last_position, context, RECENT, V_ALONG_TOKENS, OWN_CHUNK)
    low, seen_by_all = window_of_block(first_position, last_position, WINDOW)

    first = low // TILE
    last = tl.cdiv(last_position + 1, TILE)
    segments = tl.num_programs(2)
    segment = tl.program_id(2)
    if SHARED:
        each = tl.maximum(tl.cdiv(last - first, segments), LEAST_TILES)
        first += segment * each
        last = tl.minimum(last, first + each)
    token_row = (start + query).to(tl.int64)
    query_head = head * GROUP + tl.arange(0, ROWS) % GROUP
    if SHARED:
        at = (token_row * (tl.num_programs(1) * GROUP) + query_head) * segments + segment
        if first >= last:
            tl.store(maximum_ptr + at, tl.full((ROWS,), float("-inf"), tl.float32), mask=valid)
            return
    pure_first, pure_last = pure_tiles(first, last, seen_by_all, first_boundary, SINK, TILE)

    column = tl.arange(0, WIDE)
    mask = valid[:, None] & (column < D)[None, :]
    q = tl.load(
        q_ptr + (token_row * q_stride + query_head * q_head_stride)[:, None] + column[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip
    if Q_QUANTIZED:
        at_q = token_row * q_stored_stride + query_head * q_stored_head_stride
        q_stored = tl.load(q_stored_ptr + at_q[:, None] + column[None, :], mask=mask, other=0.0)
    else:
        q_stored = q

    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    full_table_ptr = full_block_table_ptr + request.to(tl.int64) * full_table_stride
    full_ptr += head * full_head_stride
    codes_ptr = pages_ptr.to(tl.pointer_type(tl.int32)) + head * head_words
    scales_ptr = pages_ptr.to(tl.pointer_type(tl.uint16)) + head * head_words * 2

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    stored_maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    output = tl.zeros((ROWS, WIDE), tl.float32)
    stored_scale = score_scale * STORED_UNIT
    inside = tl.arange(0, TILE)
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
            # First the tokens in full precision, so that P of the stored ones, which may be quantized, is
            # relative to the maximum of the whole tile.
            if (bottom < tl.minimum(top, SINK)) | (tl.maximum(bottom, first_boundary) < top):
                keep = (token >= bottom) & (token < top) & ((token < SINK) | (token >= first_boundary))
                k = full_rows(full_ptr, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
                scores = scaled(dot(q, tl.trans(k)), score_scale, cap, SOFT_CAP)
                scores = tl.where(stored | (visible == 0), float("-inf"), scores)
                p, maximum, total, output = softmax_step(scores, maximum, total, output, True)
                v = full_rows(full_ptr + D, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
                output += dot(rounded(p, DTYPE), v) * (1.0 / unit)
            if stored_bottom < stored_top:
                k, v = stored_tile(
                    codes_ptr, scales_ptr, table_ptr, tile * TILE, stored_bottom, stored_top, page_words,
                    K_SCALES, V_CODES, V_SCALES, V_ALONG_TOKENS, D, WIDE, PAGE, TILE, True, DTYPE,
                )  # fmt: skip
                scores = scaled(dot(q_stored, tl.trans(k)), stored_scale, cap, SOFT_CAP)
                scores = tl.where(stored & visible, scores, float("-inf"))
                stored_maximum = tl.maximum(stored_maximum, tl.ceil(tl.max(scores, 1)))
                p, maximum, total, output = softmax_step(scores, maximum, total, output, P_RULE is None)
                output, total = _plus_stored(
                    output, total, p, v, maximum, stored_maximum, ROWS, TILE, TWO_LEVELS, P_RULE, P_OFFSETS,
                    HW_E2M1, DTYPE,
                )  # fmt: skip
        for tile in range(middle, end):
            k, v = stored_tile(
                codes_ptr, scales_ptr, table_ptr, tile * TILE, 0, 0, page_words, K_SCALES,
                V_CODES, V_SCALES, V_ALONG_TOKENS, D, WIDE, PAGE, TILE, False, DTYPE,
            )  # fmt: skip
            scores = scaled(dot(q_stored, tl.trans(k)), stored_scale, cap, SOFT_CAP)
            stored_maximum = tl.maximum(stored_maximum, tl.ceil(tl.max(scores, 1)))
            p, maximum, total, output = softmax_step(scores, maximum, total, output, P_RULE is None)
            output, total = _plus_stored(
                output, total, p, v, maximum, stored_maximum, ROWS, TILE, TWO_LEVELS, P_RULE, P_OFFSETS,
                HW_E2M1, DTYPE,
            )  # fmt: skip

    if SHARED:
        # A NaN is not part of a maximum, but must not pass for a row that has seen nothing.
        tl.store(maximum_ptr + at, tl.where(total == total, maximum, float("nan")), mask=valid)
        tl.store(total_ptr + at, total, mask=valid)
        tl.store(partial_ptr + at[:, None] * D + column[None, :], output, mask=mask)
    else:
        output *= (unit / total)[:, None]
        out = token_row * output_stride + query_head * output_head_stride
        tl.store(output_ptr + out[:, None] + column[None, :], narrow(output, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["requests", "segments"], do_not_specialize_on_alignment=["query_start_loc_ptr"])
def _merge_kernel(
    partial_ptr, maximum_ptr, total_ptr, output_ptr, query_start_loc_ptr, requests, segments, unit,
    output_stride, output_head_stride,
    D: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Program (token, query head) merges what the segments' programs found.

    MOST: a power of two, at least `segments`.
    """
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(query_start_loc_ptr + requests):
        return
    head = tl.program_id(1)
    segment = tl.arange(0, MOST)
    at = (token * tl.num_programs(1) + head) * segments + segment
    maximum = tl.load(maximum_ptr + at, mask=segment < segments, other=float("-inf"))
    some = maximum != float("-inf")
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(tl.load(total_ptr + at, mask=some, other=0.0) * weight, 0)
    column = tl.arange(0, WIDE)
    mask = some[:, None] & (column < D)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * D + column[None, :], mask=mask, other=0.0)
    output = tl.sum(partial * weight[:, None], 0) * (unit / total)
    out = token * output_stride + head.to(tl.int64) * output_head_stride
    DTYPE: tl.constexpr = output_ptr.dtype.element_ty
    tl.store(output_ptr + out + column, narrow(output, DTYPE), mask=column < D)


# --- launching -----------------------------------------------------------------------------------


def attention(
    q: torch.Tensor,
    q_stored: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """Attention of a step's transformed queries to the cache, into `output`.

    q, q_stored: (T, Hq, D) bf16 or fp16, of `transform_query`; T may exceed the step's tokens. pages, full:
    as `triton_kv_write.transform_and_write` has them, full in q's dtype. output: (T, Hq, D) in q's dtype,
    the last dimension contiguous; rows past the step's tokens are left alone.
    Raises ValueError for other shapes, dtypes, strides, devices and options, `options.kv_tile` among them,
    which must be a power of two.
    """
    check_cache(pages, full, layout, options)
    check_queries(q)
    check_queries(q_stored)
    heads, dim = pages.shape[1], layout.head_size
    if q.shape[2] != dim or q.shape[1] % heads or not q.dtype == q_stored.dtype == full.dtype == output.dtype:
        raise ValueError(
            f"attention: queries {tuple(q.shape)} {q.dtype} and {q_stored.dtype}, output {output.dtype}, do "
            f"not fit pages of {heads} heads of {dim} in {full.dtype}"
        )
    if q_stored.shape != q.shape or output.shape != q.shape or output.stride(2) != 1:
        raise ValueError(
            f"attention: expected q_stored and output like q {tuple(q.shape)}, got {tuple(q_stored.shape)} and "
            f"{tuple(output.shape)} with strides {output.stride()}"
        )
    tokens, query_heads, requests = len(q), q.shape[1], len(step.seq_lens)
    if not tokens or not requests:
        return
    constants, launch = attention_constants(
        layout, full.shape[2], options, query_heads // heads, step.max_query_len, capability_of(q.device)
    )
    blocks = tokens // constants["QUERIES"] + requests
    table_tiles = triton.cdiv(step.block_table.shape[1] * layout.block_size, constants["TILE"])
    segments = _segments(blocks * heads, constants["ROWS"], table_tiles, _multiprocessors(q.device))
    constants["SHARED"] = segments > 1
    partial = maximum = total = None
    if segments > 1:
        shape = (tokens, query_heads, segments)
        maximum, total, partial = (
            torch.empty(s, dtype=torch.float32, device=q.device) for s in (shape, shape, (*shape, dim))
        )
    score_scale, cap = options.exp2_scales(dim)
    unit = float(options.v_scale) * STORED_UNIT.value / options.p_levels
    _attention_kernel[(blocks, heads, segments)](
        q, q_stored, pages, full, output, partial, maximum, total,
        step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
        requests, step.block_table.stride(0), step.full_block_table.stride(0), score_scale, cap, unit,
        q.stride(0), q.stride(1), q_stored.stride(0), q_stored.stride(1), output.stride(0), output.stride(1),
        pages.stride(0) // 4, pages.stride(1) // 4, full.stride(0), full.stride(1),
        **constants, **launch,
    )  # fmt: skip
    if segments > 1:
        _merge_kernel[(tokens, query_heads)](
            partial, maximum, total, output, step.query_start_loc, requests, segments, unit,
            output.stride(0), output.stride(1),
            D=dim, WIDE=constants["WIDE"], MOST=_MAX_SEGMENTS, num_warps=4,
        )  # fmt: skip


def attention_constants(
    layout: PageLayout,
    full_page: int,
    options: AttentionOptions,
    group: int,
    max_query_len: int,
    capability: tuple[int, int],
) -> tuple[dict, dict]:
    """How `_attention_kernel` is compiled but for SHARED, and its launch options."""
    # With 16, Triton 3.6's product over the tokens of a tile is wrong on Hopper (seen on an H100).
    if options.kv_tile < 32 or options.kv_tile & (options.kv_tile - 1):
        raise ValueError(
            f"the attention kernel takes tiles of a power of two from 32 on, not kv_tile={options.kv_tile}"
        )
    wide = triton.next_power_of_2(layout.head_size)
    # Hopper and data-center Blackwell have room for larger blocks: operands come from shared memory.
    large = capability[0] in (9, 10)
    most = 8192 // max(wide, 128) * (2 if large else 1)
    # Few variants, so that all can be compiled before a request comes (attention_warmup.py).
    rows = next((n for n in (BLOCK, 4 * BLOCK) if n >= group * max_query_len), most)
    rows = max(min(rows, most), triton.next_power_of_2(group))
    constants = dict(
        GROUP=group,
        D=layout.head_size,
        WIDE=wide,
        ROWS=rows,
        QUERIES=rows // group,
        TILE=options.kv_tile,
        **page_constants(layout, full_page),
        SINK=options.sink,
        RECENT=options.recent,
        WINDOW=options.sliding_window or 0,
        OWN_CHUNK=options.own_chunk,
        SOFT_CAP=options.logits_soft_cap is not None,
        Q_QUANTIZED=options.q is not None,
        **(dict(P_RULE=None, P_OFFSETS=()) if options.p is None else rule_constants("P_", options.p)),
        TWO_LEVELS=options.two_level_p,
        LEAST_TILES=_LEAST_TILES,
        HW_E2M1=capability[0] >= 10,
    )
    warps = 8 if wide > 128 or rows >= (128 if large else 64) else 4
    # Elsewhere registers do not suffice to read ahead, nor does shared memory for heads of 256.
    stages = 3 if large or (rows == BLOCK and wide <= 128) else 1
    # The search's products must not be contracted (triton_blocks.py).
    return constants, dict(num_warps=warps, num_stages=stages, enable_fp_fusion=options.p is None)


def _segments(programs: int, rows: int, tiles: int, multiprocessors: int) -> int:
    """Into how many segments the keys of a row block are split: a power of two."""
    enough = multiprocessors * _PROGRAMS_PER_PROCESSOR // (2 if rows >= _LARGE_ROWS else 1)
    segments = min(enough // programs, triton.cdiv(tiles, _LEAST_TILES), _MAX_SEGMENTS)
    return 1 if segments < 2 else 1 << (segments.bit_length() - 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The interpreter, on the CPU, is for tests of what a GPU does.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128
