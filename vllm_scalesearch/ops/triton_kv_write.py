"""Triton kernels in front of attention over the paged cache: transform queries and keys, write the cache.

A program transforms the keys of some tokens of one KV head, writes them and their values to the 16-bit
pages, and writes both as NVFP4 to the packed pages (kv_pages.py), with the search of triton_blocks.py and
so with the bits of search.py. Where V is grouped along tokens, a second launch packs the tiles of V that the
step completes.

The product with a head's matrix is fp32's to some 20 bits: TF32 holds 16-bit keys exactly, and the matrix in
two parts. Rounded to 16 bits it is the fp32 product's rounding, but for values next to a tie.

Grids follow from shapes alone and nothing waits for the device, so all of it can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.ops.triton_blocks import (
    INTERPRETED,
    SIGN,
    as_blocks,
    as_rows,
    bits_of,
    block_values,
    from_bits,
    has_e2m1,
    load_tile,
    narrow,
    narrow_exact,
    packed_words,
    rule_of,
    scale_pair,
    store_tile,
    widen,
    winners,
)
from vllm_scalesearch.ops.triton_pages import request_of_block
from vllm_scalesearch.search import ScalePolicy

# fp32's sign, exponent and the first 10 bits of its mantissa: what TF32 keeps.
_TF32 = tl.constexpr(-(1 << 13))

# Values of a program: rows of 16 for decoding, so that there are programs enough; more for prompts, since
# each program reads a whole matrix.
_MANY_VALUES = 8192
_MANY_ROWS = 1024


# --- parts ---------------------------------------------------------------------------------------


@triton.jit
def _times_matrix(
    x_ptr, rows, keep, matrix_ptr, D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr
):
    """Rows of 16-bit values at ``x_ptr + rows`` times a matrix (D, D) fp32: (ROWS, WIDE) fp32."""
    column = tl.arange(0, WIDE)
    product = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, D, STEP):
        inner = start + tl.arange(0, STEP)
        inside = inner < D
        x = widen(tl.load(x_ptr + rows[:, None] + inner, mask=keep[:, None] & inside[None, :], other=0.0))
        at = inner[:, None] * D + column[None, :]
        matrix = tl.load(matrix_ptr + at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
        high = from_bits(bits_of(matrix) & _TF32)
        product = tl.dot(x, high, product, input_precision="tf32")
        product = tl.dot(x, matrix - high, product, input_precision="tf32")
    return product


@triton.jit
def _write_packed(
    x, reciprocal, codes_ptr, codes, keep_codes, scales_ptr, scales, keep, RULE: tl.constexpr,
    OFFSETS: tl.constexpr, HW_E2M1: tl.constexpr, BLOCKS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Quantize the blocks x; the codes of two together go to four words of `codes`, scales to `scales`.

    Of each 2 * APART blocks, those of the first half go with those of the second, in order; codes
    (BLOCKS // 2, 4) and keep_codes are of such pairs. Byte i of word t holds value 4 t + i of both blocks, the
    first's in its low nibble.
    """
    y, _, best, finite = winners(x, reciprocal, True, RULE, OFFSETS, True, HW_E2M1, BLOCKS, 2)
    _, scale_reciprocal = scale_pair(best, best, True)
    words = packed_words(y, bits_of(x) & SIGN, scale_reciprocal, finite, HW_E2M1, BLOCKS, 2)
    # Four nibbles, each in a byte of its own, and those of the second of two blocks above the first's.
    nibbles = tl.join(words & 0xFFFF, (words >> 16) & 0xFFFF)
    nibbles = (nibbles | (nibbles << 8)) & 0x00FF00FF
    nibbles = (nibbles | (nibbles << 4)) & 0x0F0F0F0F
    nibbles <<= (tl.arange(0, BLOCKS) // APART % 2 * 4)[:, None, None]
    pairs = tl.sum(tl.reshape(nibbles, (BLOCKS // (2 * APART), 2, APART, 4)), 1)
    tl.store(codes_ptr + codes, tl.reshape(pairs, (BLOCKS // 2, 4)), mask=keep_codes[:, None])
    tl.store(scales_ptr + scales, tl.where(finite, best, 0x7F).to(tl.uint8), mask=keep)


# --- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _write_kernel(
    pages_ptr, full_ptr, slots_ptr, full_slots_ptr, k_ptr, v_ptr, matrix_ptr, v_scale, tokens,
    k_stride, k_head_stride, v_stride, v_head_stride, page_words, head_words, full_stride, full_head_stride,
    D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, FULL_PAGE: tl.constexpr,
    K_SCALES: tl.constexpr, V_CODES: tl.constexpr, V_SCALES: tl.constexpr, V_ALONG_TOKENS: tl.constexpr,
    K_RULE: tl.constexpr, K_OFFSETS: tl.constexpr, V_RULE: tl.constexpr, V_OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr, STEP: tl.constexpr, HW_E2M1: tl.constexpr,
):  # fmt: skip
    """Program (i, head) writes TOKENS tokens of one KV head.

    WIDE: D rounded up to a power of two. PAGE, FULL_PAGE: tokens of a packed and of a 16-bit page, whose
    strides are in words of 32 bits and in values. K_SCALES, V_CODES, V_SCALES: `PageLayout.offsets`.
    """
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    EACH: tl.constexpr = WIDE // 16
    BLOCKS: tl.constexpr = TOKENS * EACH
    first = tl.program_id(0) * TOKENS
    head = tl.program_id(1).to(tl.int64)

    block = tl.arange(0, BLOCKS)
    token = first + block // EACH
    channel = block % EACH * 16
    slot = tl.load(slots_ptr + token, mask=token < tokens, other=-1).to(tl.int64)
    keep = (slot >= 0) & (channel < D)
    columns = channel[:, None] + tl.arange(0, 8)[None, :]
    full_slot = tl.load(full_slots_ptr + token, mask=keep, other=0).to(tl.int64)
    full_at = full_slot // FULL_PAGE * full_stride + head * full_head_stride + full_slot % FULL_PAGE * (2 * D)
    full_at = full_at[:, None] + columns

    codes_ptr = pages_ptr.to(tl.pointer_type(tl.int32))
    part = slot // PAGE * page_words + head * head_words
    scale = part * 4 + slot % PAGE * (D // 16) + channel // 16

    # Codes go by pairs of blocks.
    pair = tl.arange(0, BLOCKS // 2)
    token_of_pair = first + pair // (EACH // 2)
    pair %= EACH // 2
    slot = tl.load(slots_ptr + token_of_pair, mask=token_of_pair < tokens, other=-1).to(tl.int64)
    keep_codes = (slot >= 0) & (pair < D // 32)
    code = slot // PAGE * page_words + head * head_words + slot % PAGE * (D // 8) + pair
    code = code[:, None] + (tl.arange(0, 4) * (D // 32))[None, :]

    k_ptr += head * k_head_stride
    if matrix_ptr is not None:
        row = first + tl.arange(0, TOKENS)
        kept = tl.load(slots_ptr + row, mask=row < tokens, other=-1) >= 0
        matrix_ptr += head * (D * D)
        product = _times_matrix(k_ptr, row.to(tl.int64) * k_stride, kept, matrix_ptr, D, WIDE, TOKENS, STEP)
        x = as_blocks(widen(narrow(product, DTYPE)), BLOCKS)
    else:
        rows = token.to(tl.int64)[:, None] * k_stride + columns
        x = load_tile(k_ptr, rows, keep[:, None])
    store_tile(full_ptr, narrow_exact(x, DTYPE), full_at, keep[:, None], BLOCKS, 2)
    _write_packed(
        x, 1.0, codes_ptr, code, keep_codes, pages_ptr + K_SCALES, scale, keep,
        K_RULE, K_OFFSETS, HW_E2M1, BLOCKS, 1,
    )  # fmt: skip

    rows = head * v_head_stride + token.to(tl.int64)[:, None] * v_stride + columns
    x = load_tile(v_ptr, rows, keep[:, None])
    store_tile(full_ptr + D, narrow_exact(x, DTYPE), full_at, keep[:, None], BLOCKS, 2)
    if not V_ALONG_TOKENS:
        _write_packed(
            x, tl.div_rn(1.0, v_scale), codes_ptr + V_CODES // 4, code, keep_codes, pages_ptr + V_SCALES, scale,
            keep, V_RULE, V_OFFSETS, HW_E2M1, BLOCKS, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["requests", "table_stride", "full_table_stride"])
def _write_tiles_kernel(
    pages_ptr, full_ptr, query_start_loc_ptr, seq_lens_ptr, block_table_ptr, full_block_table_ptr, v_scale,
    requests, table_stride, full_table_stride, page_words, head_words, full_stride, full_head_stride,
    D: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, FULL_PAGE: tl.constexpr,
    V_CODES: tl.constexpr, V_SCALES: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr,
    HW_E2M1: tl.constexpr,
):  # fmt: skip
    """Program (i, head) packs at most one tile of V along tokens of one KV head: 16 tokens, all channels."""
    head = tl.program_id(1).to(tl.int64)
    request = request_of_block(query_start_loc_ptr, tl.program_id(0), requests, 16)
    start = tl.load(query_start_loc_ptr + request)
    length = tl.load(seq_lens_ptr + request)
    context = length - (tl.load(query_start_loc_ptr + request + 1) - start)
    tile = context // 16 + tl.program_id(0) - (start // 16 + request)
    if tile * 16 + 16 <= length:
        eight = tl.arange(0, 8)
        channel = tl.arange(0, WIDE)
        keep = channel < D
        full_table_ptr = full_block_table_ptr + request.to(tl.int64) * full_table_stride
        full_ptr += head * full_head_stride + D
        # A page may be smaller than a tile.
        token = tile * 16 + eight
        page = tl.load(full_table_ptr + token // FULL_PAGE).to(tl.int64)
        at = (page * full_stride + token % FULL_PAGE * (2 * D))[None, :] + channel[:, None]
        low = widen(tl.load(full_ptr + at, mask=keep[:, None], other=0.0))
        token += 8
        page = tl.load(full_table_ptr + token // FULL_PAGE).to(tl.int64)
        at = (page * full_stride + token % FULL_PAGE * (2 * D))[None, :] + channel[:, None]
        high = widen(tl.load(full_ptr + at, mask=keep[:, None], other=0.0))

        page = tl.load(block_table_ptr + request.to(tl.int64) * table_stride + tile * 16 // PAGE).to(tl.int64)
        part = page * page_words + head * head_words
        first = tile * 16 % PAGE // 16 * D
        # Channels 16 m + g and 8 more have their codes in the words of pair 8 m + g.
        GROUPS: tl.constexpr = D // 16
        pair = tl.arange(0, WIDE // 2)
        group = pair // 8
        chunk = group // 4
        lane = (pair % 8 * 4)[:, None] + tl.arange(0, 4)[None, :]
        code = lane * tl.minimum(GROUPS - chunk * 4, 4)[:, None] + (chunk * 128 + group % 4)[:, None]
        scale = channel % 8 * (2 * GROUPS) + channel // 16 * 2 + channel // 8 % 2
        _write_packed(
            tl.join(low, high), tl.div_rn(1.0, v_scale),
            pages_ptr.to(tl.pointer_type(tl.int32)) + V_CODES // 4, part + first * 2 + code, group < GROUPS,
            pages_ptr + V_SCALES, part * 4 + first + scale, keep, RULE, OFFSETS, HW_E2M1, WIDE, 8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _transform_query_kernel(
    q_ptr, matrix_ptr, transformed_ptr, stored_ptr, tokens, q_stride, q_head_stride,
    GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, RULE: tl.constexpr, OFFSETS: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, HW_E2M1: tl.constexpr,
):  # fmt: skip
    """Program (i, head) transforms ROWS queries of a KV head's GROUP query heads, token by token."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    keep = token < tokens
    column = tl.arange(0, WIDE)
    mask = keep[:, None] & (column < D)[None, :]
    rows = token * q_stride + query_head * q_head_stride
    out = (token * (tl.num_programs(1) * GROUP) + query_head)[:, None] * D + column[None, :]
    if matrix_ptr is not None:
        product = _times_matrix(q_ptr, rows, keep, matrix_ptr + head * (D * D), D, WIDE, ROWS, STEP)
        transformed = narrow(product, DTYPE)
        tl.store(transformed_ptr + out, transformed, mask=mask)
        x = widen(transformed)
    else:
        x = widen(tl.load(q_ptr + rows[:, None] + column[None, :], mask=mask, other=0.0))
    if stored_ptr is not None:
        BLOCKS: tl.constexpr = ROWS * WIDE // 16
        x = as_blocks(x, BLOCKS)
        y, _, best, finite = winners(x, 1.0, True, RULE, OFFSETS, True, HW_E2M1, BLOCKS, 2)
        values = from_bits(bits_of(block_values(y, best, finite, HW_E2M1)) | (bits_of(x) & SIGN))
        tl.store(stored_ptr + out, narrow_exact(as_rows(values, ROWS, WIDE), DTYPE), mask=mask)


# --- launching -----------------------------------------------------------------------------------


def transform_and_write(
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    k: torch.Tensor,
    v: torch.Tensor,
    k_matrix: torch.Tensor | None,
    options: AttentionOptions,
) -> None:
    """Transform a step's keys, and write its tokens to the cache: packed, and in 16 bits.

    pages: packed (`PageLayout.parts`), (blocks, Hkv, block_size, bytes) uint8. full: (blocks, Hkv, M, 2 * D)
    bf16 or fp16. Of both, the first two dimensions may have any strides, of whole 32-bit words in pages.
    k, v: (T, Hkv, D) in full's dtype, T at least the step's tokens; the last dimension is contiguous.
    k_matrix: (Hkv, D, D) fp32, or None to leave keys as they are.
    Tokens with a negative packed slot are passed over.
    Raises ValueError for other shapes, dtypes, strides, devices and options.
    """
    check_cache(pages, full, layout, options)
    heads, dim, tokens = pages.shape[1], layout.head_size, len(step.slots)
    check_tokens(k, v, tokens, heads, dim, full.dtype)
    for name, x in (("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"KV cache: {name}'s last dimension must be contiguous, strides {x.stride()}")
    matrix = checked_matrix(k_matrix, heads, dim)
    if not tokens:
        return
    constants = write_constants(layout, full.shape[2], options, tokens, has_e2m1(pages.device))
    page_words, head_words = pages.stride(0) // 4, pages.stride(1) // 4
    _write_kernel[(triton.cdiv(tokens, constants["TOKENS"]), heads)](
        pages, full, step.slots, step.full_slots, k, v, matrix, float(options.v_scale), tokens,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        page_words, head_words, full.stride(0), full.stride(1),
        **constants, num_warps=warps(constants["TOKENS"] * constants["WIDE"]), enable_fp_fusion=False,
    )  # fmt: skip
    if layout.v_group == "tokens":
        requests = len(step.seq_lens)
        constants = tile_constants(constants)
        _write_tiles_kernel[(tokens // BLOCK + requests, heads)](
            pages, full, step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
            float(options.v_scale), requests, step.block_table.stride(0), step.full_block_table.stride(0),
            page_words, head_words, full.stride(0), full.stride(1),
            **constants, num_warps=warps(BLOCK * constants["WIDE"]), enable_fp_fusion=False,
        )  # fmt: skip


def transform_query(
    q: torch.Tensor, q_matrix: torch.Tensor | None, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for full-precision keys, and for stored ones: two (T, Hq, D) in q's dtype.

    q: (T, Hq, D) bf16 or fp16, the last dimension contiguous. q_matrix: (Hkv, D, D) fp32, or None to leave
    queries as they are. The second is the first where `options.q` is None, or else its NVFP4 values.
    Raises ValueError for other shapes, dtypes, strides and devices.
    """
    check_queries(q)
    if q_matrix is None and options.q is None:
        return q, q
    heads = q.shape[1] if q_matrix is None else q_matrix.shape[0]
    if q.shape[1] % heads:
        raise ValueError(f"{q.shape[1]} query heads cannot share {heads} KV heads")
    group, dim = q.shape[1] // heads, q.shape[2]
    matrix = checked_matrix(q_matrix, heads, dim)
    transformed = q if matrix is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stored = transformed if options.q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        constants = query_constants(group, dim, options, len(q), has_e2m1(q.device))
        _transform_query_kernel[(triton.cdiv(len(q) * group, constants["ROWS"]), heads)](
            q, matrix, transformed, None if options.q is None else stored, len(q), q.stride(0), q.stride(1),
            **constants, num_warps=warps(constants["ROWS"] * constants["WIDE"]), enable_fp_fusion=False,
        )  # fmt: skip
    return transformed, stored


def check_cache(pages: torch.Tensor, full: torch.Tensor, layout: PageLayout, options: AttentionOptions) -> None:
    """Raise ValueError for pages or options that the kernels do not take."""
    page = (layout.block_size, layout.bytes_per_token)
    fits = pages.ndim == 4 and pages.shape[2:] == page and pages.stride()[2:] == (page[1], 1)
    if not fits or pages.dtype != torch.uint8:
        layout.parts(pages)  # which says why
    heads, dim = pages.shape[1], layout.head_size
    if pages.stride(0) % 4 or pages.stride(1) % 4 or pages.data_ptr() % 4:
        raise ValueError(f"packed KV pages: not aligned to words of 32 bits, strides {pages.stride()}")
    if full.ndim != 4 or full.shape[1] != heads or full.shape[3] != 2 * dim:
        raise ValueError(f"full-precision KV pages: expected (_, {heads}, _, {2 * dim}), got {full.shape}")
    if full.dtype not in (torch.bfloat16, torch.float16) or full.stride()[2:] != (2 * dim, 1):
        raise ValueError(
            f"full-precision KV pages: expected bf16 or fp16 and a head's part that is contiguous, got "
            f"{full.dtype} with strides {full.stride()}"
        )
    if options.k is None or options.v is None:
        raise ValueError("the packed cache holds keys and values as NVFP4: k and v need a policy")
    if options.v_group != layout.v_group:
        raise ValueError(f"the pages have V along {layout.v_group}, the options along {options.v_group}")
    if not options.incomplete:
        raise ValueError("incomplete=False stores tiles that are not whole, which the pages do not hold")
    for name, fixed in (("q_scale", 1.0), ("k_scale", 1.0), ("v_scale", None)):
        value = getattr(options, name)
        if isinstance(value, torch.Tensor) or (fixed is not None and value != fixed):
            raise ValueError(f"attention over pages takes {'a number' if fixed is None else fixed} as {name}")
    _check_device(pages)


def check_tokens(
    k: torch.Tensor, v: torch.Tensor, tokens: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    """Raise ValueError for keys and values that the kernels do not take."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 3 or x.shape[1:] != (heads, dim) or len(x) < tokens or x.dtype != dtype:
            raise ValueError(
                f"KV cache: expected {name} of at least ({tokens}, {heads}, {dim}) {dtype}, got "
                f"{tuple(x.shape)} {x.dtype}"
            )


def check_queries(q: torch.Tensor) -> None:
    """Raise ValueError for queries that the kernels do not take."""
    if q.ndim != 3 or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] % BLOCK:
        raise ValueError(
            f"queries: expected (T, Hq, D) in bf16 or fp16, D a multiple of {BLOCK}, got {tuple(q.shape)} "
            f"{q.dtype}"
        )
    if q.stride(2) != 1:
        raise ValueError(f"queries: the last dimension must be contiguous, strides {q.stride()}")
    _check_device(q)


def _check_device(x: torch.Tensor) -> None:
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"on {x.device} this runs only in Triton's interpreter (TRITON_INTERPRET=1)")


def checked_matrix(matrix: torch.Tensor | None, heads: int, dim: int) -> torch.Tensor | None:
    """The matrix (heads, dim, dim) fp32, contiguous, or None. Raises ValueError for other shapes and dtypes."""
    if matrix is None:
        return None
    if matrix.shape != (heads, dim, dim) or matrix.dtype != torch.float32:
        raise ValueError(
            f"expected a matrix ({heads}, {dim}, {dim}) fp32, got {tuple(matrix.shape)} {matrix.dtype}"
        )
    return matrix.contiguous()


def _sizes(dim: int) -> dict:
    """Constants of a head size. STEP: rows of a matrix that are multiplied at once."""
    return dict(D=dim, WIDE=triton.next_power_of_2(dim), STEP=16 if dim > 128 else min(32, dim))


def _rows(rows: int, dim: int) -> int:
    """Rows of a program, of `rows` in all; all of it stays in registers."""
    return _MANY_VALUES // max(128, triton.next_power_of_2(dim)) if rows > _MANY_ROWS else 16


def warps(values: int) -> int:
    """Warps of a program that quantizes so many values: at most two blocks of 16 a thread."""
    return 8 if values > 2048 else 4


def rule_constants(prefix: str, policy: ScalePolicy | str | None) -> dict:
    """RULE and OFFSETS of an operand's policy (`rule_of`), under names with that prefix."""
    rule, offsets = ("offsets", (0,)) if policy is None else rule_of(NVFP4, policy)
    return {f"{prefix}RULE": rule, f"{prefix}OFFSETS": offsets}


def page_constants(layout: PageLayout, full_page: int) -> dict:
    """What kernels are compiled with of the pages; `full_page` is the tokens of a 16-bit one."""
    _, k_scales, v_codes, v_scales = layout.offsets
    return dict(
        PAGE=layout.block_size,
        FULL_PAGE=full_page,
        K_SCALES=k_scales,
        V_CODES=v_codes,
        V_SCALES=v_scales,
        V_ALONG_TOKENS=layout.v_group == "tokens",
    )


def write_constants(
    layout: PageLayout, full_page: int, options: AttentionOptions, tokens: int, hw_e2m1: bool
) -> dict:
    """How `_write_kernel` is compiled."""
    return dict(
        **_sizes(layout.head_size),
        **page_constants(layout, full_page),
        **rule_constants("K_", options.k),
        **rule_constants("V_", options.v),
        TOKENS=_rows(tokens, layout.head_size),
        HW_E2M1=hw_e2m1,
    )


def tile_constants(constants: dict) -> dict:
    """How `_write_tiles_kernel` is compiled beside a `_write_kernel` of `constants`."""
    names = ("D", "WIDE", "PAGE", "FULL_PAGE", "V_CODES", "V_SCALES", "HW_E2M1")
    return {name: constants[name] for name in names} | dict(
        RULE=constants["V_RULE"], OFFSETS=constants["V_OFFSETS"]
    )


def query_constants(group: int, dim: int, options: AttentionOptions, tokens: int, hw_e2m1: bool) -> dict:
    """How `_transform_query_kernel` is compiled."""
    return dict(
        GROUP=group,
        **_sizes(dim),
        **rule_constants("", options.q),
        ROWS=_rows(tokens * group, dim),
        HW_E2M1=hw_e2m1,
    )
