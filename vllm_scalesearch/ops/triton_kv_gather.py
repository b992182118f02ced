"""A step's keys and values, of the whole of each request, out of the paged cache and side by side in 16 bits.

That is what attention kernels take that know no packed pages. Where queries that are computed together see
the same keys and values (`AttentionOptions.own_chunk`), what is gathered here is all that they see.

A program has a tile of one request's tokens, of one KV head. It takes them from the packed pages, from the
16-bit ones, or, where a tile has tokens of both kinds, from both under masks.

Grids follow from shapes alone and nothing waits for the device, so all of it can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.ops.triton_blocks import widen
from vllm_scalesearch.ops.triton_kv_write import check_cache, page_constants
from vllm_scalesearch.ops.triton_pages import (
    STORED_UNIT,
    block_of_program,
    boundary_of,
    full_rows,
    rounded,
    stored_tile,
)

# Tokens of a program: a power of two, of whole tiles of V along tokens.
_TILE = 32


@triton.jit(
    do_not_specialize=["requests", "table_stride", "full_table_stride"],
    # Those of some requests of a step begin anywhere.
    do_not_specialize_on_alignment=[
        "k_start_loc_ptr", "query_start_loc_ptr", "block_table_ptr", "full_block_table_ptr",
    ],
)  # fmt: skip
def _gather_kernel(
    pages_ptr, full_ptr, k_ptr, v_ptr, k_start_loc_ptr, query_start_loc_ptr, block_table_ptr,
    full_block_table_ptr, requests, table_stride, full_table_stride, unit,
    k_stride, k_head_stride, v_stride, v_head_stride, page_words, head_words, full_stride, full_head_stride,
    D: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, FULL_PAGE: tl.constexpr,
    K_SCALES: tl.constexpr, V_CODES: tl.constexpr, V_SCALES: tl.constexpr, V_ALONG_TOKENS: tl.constexpr,
    SINK: tl.constexpr, RECENT: tl.constexpr, WINDOW: tl.constexpr, OWN_CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (i, head): TILE tokens of a request. WIDE: D rounded up to a power of two. WINDOW: 0 for none.

    unit: what a stored value is its operand times.
    """
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    request, start, length, bottom = block_of_program(k_start_loc_ptr, requests, TILE)
    if bottom >= length:
        return
    queries = tl.load(query_start_loc_ptr + request + 1) - tl.load(query_start_loc_ptr + request)
    context = length - queries
    head = tl.program_id(1).to(tl.int64)
    boundary = boundary_of(context, context, RECENT, V_ALONG_TOKENS, OWN_CHUNK)
    # Tokens in [low, top) are seen by some query, those of them in [stored_low, stored_top) as stored.
    low = bottom
    if WINDOW > 0:
        low = tl.maximum(low, context + 1 - WINDOW)
    top = tl.minimum(bottom + TILE, length)
    stored_low = tl.maximum(low, SINK)
    stored_top = tl.minimum(top, boundary)

    table_ptr = block_table_ptr + request.to(tl.int64) * table_stride
    full_table_ptr = full_block_table_ptr + request.to(tl.int64) * full_table_stride
    full_ptr += head * full_head_stride
    codes_ptr = pages_ptr.to(tl.pointer_type(tl.int32)) + head * head_words
    scales_ptr = pages_ptr.to(tl.pointer_type(tl.uint16)) + head * head_words * 2
    row = tl.arange(0, TILE)
    column = tl.arange(0, WIDE)
    first = (start + bottom).to(tl.int64)
    k_ptr += first * k_stride + head * k_head_stride
    v_ptr += first * v_stride + head * v_head_stride
    k_at = k_ptr + (row * k_stride)[:, None] + column[None, :]
    v_at = v_ptr + (row * v_stride)[:, None] + column[None, :]
    inside = (column < D)[None, :]
    if (stored_low == bottom) & (stored_top == bottom + TILE):
        k, v = stored_tile(
            codes_ptr, scales_ptr, table_ptr, bottom, 0, 0, page_words, K_SCALES, V_CODES, V_SCALES,
            V_ALONG_TOKENS, D, WIDE, PAGE, TILE, False, DTYPE,
        )  # fmt: skip
        k = rounded(widen(k) * STORED_UNIT, DTYPE)
        v = rounded(widen(v) * unit, DTYPE)
        if D == WIDE:
            tl.store(k_at, k)
            tl.store(v_at, v)
        else:
            tl.store(k_at, k, mask=inside)
            tl.store(v_at, v, mask=inside)
    else:
        token = bottom + row
        stored = (token >= stored_low) & (token < stored_top)
        keep = (token >= low) & (token < top) & (stored == 0)
        mask = ((token < length) & (stored == 0))[:, None] & inside
        k = full_rows(full_ptr, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
        v = full_rows(full_ptr + D, full_table_ptr, token, keep, full_stride, D, WIDE, FULL_PAGE)
        tl.store(k_at, k, mask=mask)
        tl.store(v_at, v, mask=mask)
        if stored_low < stored_top:
            k, v = stored_tile(
                codes_ptr, scales_ptr, table_ptr, bottom, stored_low, stored_top, page_words, K_SCALES,
                V_CODES, V_SCALES, V_ALONG_TOKENS, D, WIDE, PAGE, TILE, True, DTYPE,
            )  # fmt: skip
            mask = stored[:, None] & inside
            tl.store(k_at, rounded(widen(k) * STORED_UNIT, DTYPE), mask=mask)
            tl.store(v_at, rounded(widen(v) * unit, DTYPE), mask=mask)


def gather(
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    options: AttentionOptions,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    k_start_loc: torch.Tensor,
    max_tokens: int,
) -> None:
    """Write keys and values of a step's requests to k_out and v_out, all tokens as first queries see them.

    Token j of request r goes to row ``k_start_loc[r] + j``, in full precision for ``j < options.sink`` and from
    the boundary of the request's first query on, as stored otherwise. Tokens that no query sees, before a
    sliding window, become 0. Rows from ``k_start_loc[B]`` on are left alone.

    pages, full: as `triton_kv_write.transform_and_write` has them. step: each of its B requests has a query,
    or no tokens; only differences of `query_start_loc` count, and its slots are not looked at. k_out, v_out:
    (T, Hkv, D) in full's dtype, T at least max_tokens; the last dimension is contiguous. k_start_loc: (B + 1,)
    int32, sums of ``step.seq_lens`` from 0 on. max_tokens: at least ``k_start_loc[B]``.
    `options.v_scale` is a power of two, so that values are exact, or rounded once in fp16.
    Raises ValueError for other shapes, dtypes, strides, devices and options.
    """
    check_cache(pages, full, layout, options)
    heads, requests = pages.shape[1], len(step.seq_lens)
    for name, x in (("k_out", k_out), ("v_out", v_out)):
        expected = (heads, layout.head_size)
        if x.ndim != 3 or x.shape[1:] != expected or len(x) < max_tokens or x.dtype != full.dtype:
            raise ValueError(
                f"gathering: expected {name} of at least ({max_tokens}, {heads}, {layout.head_size}) "
                f"{full.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        if x.stride(2) != 1:
            raise ValueError(f"gathering: {name}'s last dimension must be contiguous, strides {x.stride()}")
    tables = dict(block_table=step.block_table, full_block_table=step.full_block_table)
    starts = dict(k_start_loc=k_start_loc, query_start_loc=step.query_start_loc)
    for name, x in starts.items():
        if x.shape != (requests + 1,):
            raise ValueError(f"gathering: expected {name} ({requests + 1},), got {tuple(x.shape)}")
    for name, x in tables.items():
        if x.ndim != 2 or len(x) != requests:
            raise ValueError(f"gathering: expected {name} ({requests}, _), got {tuple(x.shape)}")
    for name, x in (starts | tables).items():
        if x.dtype != torch.int32 or x.stride(-1) != 1:
            raise ValueError(f"gathering: {name} must be contiguous int32, is {x.dtype}, strides {x.stride()}")
    others = dict(full=full, k_out=k_out, v_out=v_out) | starts | tables
    for name, x in others.items():
        if x.device != pages.device:
            raise ValueError(f"gathering: {name} is on {x.device}, the pages are on {pages.device}")
    if not requests or not max_tokens:
        return
    constants = gather_constants(layout, full.shape[2], options)
    _gather_kernel[(max_tokens // _TILE + requests, heads)](
        pages, full, k_out, v_out, k_start_loc, step.query_start_loc, step.block_table, step.full_block_table,
        requests, step.block_table.stride(0), step.full_block_table.stride(0),
        float(options.v_scale) * STORED_UNIT.value,
        k_out.stride(0), k_out.stride(1), v_out.stride(0), v_out.stride(1),
        pages.stride(0) // 4, pages.stride(1) // 4, full.stride(0), full.stride(1),
        **constants, num_warps=gather_warps(constants["WIDE"]),
    )  # fmt: skip


def gather_constants(layout: PageLayout, full_page: int, options: AttentionOptions) -> dict:
    """How `_gather_kernel` is compiled."""
    return dict(
        D=layout.head_size,
        WIDE=triton.next_power_of_2(layout.head_size),
        TILE=_TILE,
        **page_constants(layout, full_page),
        SINK=options.sink,
        RECENT=options.recent,
        WINDOW=options.sliding_window or 0,
        OWN_CHUNK=options.own_chunk,
    )


def gather_warps(wide: int) -> int:
    """Warps of a program for heads of this size: at most 32 values of a key a thread."""
    return 4 if wide <= 128 else 8
