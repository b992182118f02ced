"""Writing the paged cache in CUDA C++, V along tokens: kernels/kv_write.cu, the bits of kv_pages.py.

The Triton kernels (triton_kv_write.py) do everything else. Nothing here waits for the device, and all of it can
be captured in a CUDA graph after a first call, which compiles and splits the matrix.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.cuda_kernels import Kernel, kernel, readable
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.cuda_quantize import MAX_CANDIDATES, table_bytes
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.ops.triton_kv_write import check_cache, check_queries, check_tokens, checked_matrix
from vllm_scalesearch.search import ScalePolicy

_PARTS = 3
# Blocks of a multiprocessor that transform queries; where there are more rows, each has several times 16.
_QUERY_BLOCKS = 4


def unsupported(layout: PageLayout, options: AttentionOptions, device: torch.device) -> str | None:
    """Why the kernel cannot write a layer's cache, or None if it can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if layout.v_group != "tokens":
        return f"V is grouped along {layout.v_group}, and it packs tiles along tokens"
    if layout.head_size > 256:
        return f"head_size {layout.head_size} is more than 256"
    for name in ("k", "v"):
        offsets = ScalePolicy.of(getattr(options, name)).offsets(NVFP4)
        if offsets is None or len(offsets) > MAX_CANDIDATES:
            return (
                f"policy {getattr(options, name)!r} of {name.upper()} is not at most {MAX_CANDIDATES} offsets"
            )
    if math.frexp(float(options.v_scale))[0] != 0.5:
        return f"v_scale {options.v_scale} is not a power of two"
    return None


@dataclass(frozen=True)
class Plan:
    """How a launch is dealt out; as the kernel has it.

    rows: of how many times 16 tokens a block takes keys, and of how many tiles values. columns: of a block of
    keys. threads: of a block.
    """

    rows: int
    columns: int
    threads: int


_FEW = Plan(1, 32, 128)


def plan(tokens: int, heads: int, head_size: int, processors: int) -> Plan:
    """Several rows where that leaves blocks enough."""
    most, columns = (4, 16) if head_size <= 128 else (2, 32)  # columns: of a warp
    if tokens * heads < 16 * most * 2 * processors:
        return _FEW
    return Plan(most, head_size, 32 * head_size // columns)


def shared_bytes(chosen: Plan, head_size: int, options: AttentionOptions, matrix: bool) -> int:
    """Dynamic shared memory of a block of kv_write.cu."""
    tokens = 16 * chosen.rows
    place = max(24 * tokens, 16 * chosen.rows + 8 * tokens)
    return row_bytes(chosen, head_size, _offsets(options), place, matrix)


def row_bytes(chosen: Plan, head_size: int, offsets: list[tuple[int, ...]], place: int, matrix: bool) -> int:
    """What head_blocks.cuh's `Memory` takes, with its queue. place: bytes of the kernel's own."""
    tokens = 16 * chosen.rows
    steps = -(-chosen.rows * head_size // chosen.threads)
    lookup = max(max(16, table_bytes(x)) + 512 + 16 * (-(-len(x) // 4)) for x in offsets)
    place = -(-place // 4) * 4
    queue = 4 * steps * chosen.threads * max(map(len, offsets))
    parts = 16 * (head_size // 32 * _PARTS * chosen.threads if matrix and chosen.rows == 1 else 1)
    counts = 16 * -(-steps // 4)
    before = -(-(tokens * (2 * head_size + 16) + lookup + place + counts) // 16) * 16
    return before + max(queue, parts)


def _offsets(options: AttentionOptions) -> list[tuple[int, ...]]:
    return [ScalePolicy.of(policy).offsets(NVFP4) for policy in (options.k, options.v)]


def defines(
    layout: PageLayout,
    full_page: int,
    options: AttentionOptions,
    dtype: torch.dtype,
    rows: int,
    matrix: bool,
    queries: bool = False,
) -> tuple[str, ...]:
    """Macros of the kernel."""
    k, v = (",".join(map(str, offsets)) for offsets in _offsets(options))
    return (
        f"D={layout.head_size}", f"HALF={int(dtype == torch.float16)}", f"ROWS={rows}",
        f"PAGE={layout.block_size}", f"FULL_PAGE={full_page}", f"MATRIX={int(matrix)}",
        f"QUERIES={int(queries)}", f"K_OFFSETS={k}", f"V_OFFSETS={v}",
    )  # fmt: skip


def parts_of(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix for each KV head, as operands of a product of bf16 fragments.

    matrix: (H, D, D) fp32. Returns (H, D / 32, 3, D / 8, 8, 4, 8) bf16: three parts, whose sum is the matrix to
    24 bits; of 32 rows and 8 columns, lane 4 g + t has rows 8 i + 2 t and the next, i = 0 to 3, of column g.
    """
    heads, dim, _ = matrix.shape
    parts, rest = [], matrix.float()
    for _ in range(_PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    tiles = torch.stack(parts, 1).view(heads, _PARTS, dim // 32, 4, 4, 2, dim // 8, 8)
    return tiles.permute(0, 2, 1, 6, 7, 4, 3, 5).flatten(-2).contiguous()


def group_of(query_heads: int, heads: int) -> int:
    """Query heads of a KV head. Raises ValueError where KV heads do not have equally many."""
    if query_heads % heads:
        raise ValueError(f"{query_heads} query heads cannot share {heads} KV heads")
    return query_heads // heads


_split: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def split(matrix: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor | None, bool]:
    """`parts_of` a matrix, kept with it; and whether a kernel may read them before those in front are done.

    Those that split the matrix must not be among them.
    """
    early = torch.cuda.get_device_capability(device)[0] >= 9 and (matrix is None or matrix in _split)
    if matrix is not None and matrix not in _split:
        _split[matrix] = parts_of(matrix)
    return None if matrix is None else _split[matrix], early


def write(
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    k: torch.Tensor,
    v: torch.Tensor,
    k_matrix: torch.Tensor | None,
    options: AttentionOptions,
    q: torch.Tensor | None = None,
    q_matrix: torch.Tensor | None = None,
    begin_next: bool = False,
) -> torch.Tensor | None:
    """`triton_kv_write.transform_and_write`, where `unsupported` names no reason against it.

    q: (T, Hq, D), queries to be transformed in the same launch. Returns them, times q_matrix (Hkv, D, D) where
    there is one; what is past the step's tokens is not defined. begin_next: a kernel behind this one that is
    launched early may begin while it runs.
    Matrices, both or neither, must not be changed in place: what they are split into is kept with them.
    """
    check_cache(pages, full, layout, options)
    heads, dim, tokens = pages.shape[1], layout.head_size, len(step.slots)
    check_tokens(k, v, tokens, heads, dim, full.dtype)
    for each in (k_matrix, q_matrix):
        checked_matrix(each, heads, dim)
    if pages.stride(0) % 4 or full.stride(0) % 8 or full.stride(1) % 8 or full.data_ptr() % 16:
        raise ValueError(f"KV cache: 16-bit pages must lie at multiples of 16 bytes, strides {full.stride()}")
    if not tokens:
        return q
    k, v = readable(k), readable(v)
    parts, early = split(k_matrix, k.device)
    transformed, queries = q, _NO_QUERIES
    if q is None or q_matrix is None:
        chosen = plan(tokens, heads, dim, multiprocessors(k.device))
    else:
        if k_matrix is None:
            raise ValueError("queries have a matrix and keys have none: keys must be transformed too")
        chosen = _FEW  # of a decoding step
        transformed, queries, q_early = _queries(q, q_matrix, tokens, k.dtype, dim // chosen.columns)
        early = early and q_early
    requests, single = len(step.seq_lens), step.max_query_len == 1
    key_blocks = -(-tokens // (16 * chosen.rows)) * (dim // chosen.columns)
    value_blocks = -(-(requests if single else tokens // BLOCK + requests) // chosen.rows)
    query_blocks = queries[3]
    blocks = key_blocks + value_blocks + query_blocks
    matrix = k_matrix is not None
    run = _kernel(
        defines(layout, full.shape[2], options, k.dtype, chosen.rows, matrix, query_blocks > 0), k.device
    )
    run(
        (heads, blocks, 1) if chosen.rows == 1 else (blocks, heads, 1),
        chosen.threads, shared_bytes(chosen, dim, options, matrix),
        pages, full, step.slots, step.full_slots, k, v, parts,
        step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
        1.0 / float(options.v_scale), int(single), tokens, requests, key_blocks, k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), pages.stride(0), pages.stride(1), full.stride(0), full.stride(1),
        step.block_table.stride(0), step.full_block_table.stride(0), *queries,
        int(begin_next),
        early=early,
    )  # fmt: skip
    return transformed


# The kernel's arguments: q, transformed, matrix, blocks, query heads, group and strides.
_NO_QUERIES = (None, None, None, 0, 0, 1, 0, 0)


def _queries(
    q: torch.Tensor, q_matrix: torch.Tensor, tokens: int, dtype: torch.dtype, groups: int
) -> tuple[torch.Tensor, tuple, bool]:
    """Where transformed queries go, the kernel's arguments, and whether the matrix may be read early.

    groups: blocks of a row. Raises ValueError for queries that do not fit.
    """
    check_queries(q)
    heads, dim = q_matrix.shape[:2]
    if len(q) < tokens or q.shape[2] != dim or q.dtype != dtype:
        raise ValueError(
            f"queries {tuple(q.shape)} {q.dtype}: expected {tokens} tokens or more, with heads of {dim} "
            f"channels in {dtype}"
        )
    group = group_of(q.shape[1], heads)
    parts, early = split(q_matrix, q.device)
    q, transformed = readable(q), torch.empty_like(q, memory_format=torch.contiguous_format)
    most = max(_QUERY_BLOCKS * multiprocessors(q.device) // (heads * groups), 1)
    blocks = groups * min(-(-tokens * group // 16), most)
    arguments = (q, transformed, parts, blocks, q.shape[1], group, q.stride(0), q.stride(1))
    return transformed, arguments, early


@functools.cache
def _kernel(macros: tuple[str, ...], device: torch.device) -> Kernel:
    return kernel("kv_write.cu", "kv_write", macros, device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
