"""The transform of queries in CUDA C++: kernels/transform_queries.cu.

The Triton kernel (triton_kv_write.py) does everything else. Nothing here waits for the device, and all of it
can be captured in a CUDA graph after a first call, which compiles and splits the matrix.
"""

import functools

import torch

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import Kernel, kernel, readable
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.ops.cuda_kv_write import group_of, multiprocessors, plan, row_bytes, split
from vllm_scalesearch.ops.cuda_quantize import MAX_CANDIDATES
from vllm_scalesearch.ops.triton_kv_write import check_queries, checked_matrix
from vllm_scalesearch.search import ScalePolicy


def unsupported(head_size: int, options: AttentionOptions, device: torch.device) -> str | None:
    """Why the kernel cannot transform a layer's queries, or None if it can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if head_size > 256 or head_size % 32:
        return f"head_size {head_size} is not a multiple of 32 up to 256"
    offsets = () if options.q is None else ScalePolicy.of(options.q).offsets(NVFP4)
    if offsets is None or len(offsets) > MAX_CANDIDATES:
        return f"policy {options.q!r} of Q is not at most {MAX_CANDIDATES} offsets"
    return None


def defines(
    head_size: int, options: AttentionOptions, dtype: torch.dtype, rows: int, matrix: bool
) -> tuple[str, ...]:
    """Macros of the kernel."""
    macros = (
        f"D={head_size}", f"HALF={int(dtype == torch.float16)}", f"ROWS={rows}", f"MATRIX={int(matrix)}",
        f"QUANTIZED={int(options.q is not None)}",
    )  # fmt: skip
    if options.q is None:
        return macros
    return (*macros, f"OFFSETS={','.join(map(str, ScalePolicy.of(options.q).offsets(NVFP4)))}")


def transform_query(
    q: torch.Tensor, q_matrix: torch.Tensor | None, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_kv_write.transform_query`, where `unsupported` names no reason against it.

    q_matrix must not be changed in place: what it is split into is kept with it.
    """
    check_queries(q)
    if q_matrix is None and options.q is None:
        return q, q
    tokens, query_heads, dim = q.shape
    heads = query_heads if q_matrix is None else q_matrix.shape[0]
    group = group_of(query_heads, heads)
    checked_matrix(q_matrix, heads, dim)
    q = readable(q)
    transformed = q if q_matrix is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stored = transformed if options.q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return transformed, stored
    parts, early = split(q_matrix, q.device)
    chosen = plan(tokens * group, heads, dim, multiprocessors(q.device))
    run = _kernel(defines(dim, options, q.dtype, chosen.rows, q_matrix is not None), q.device)
    offsets = () if options.q is None else ScalePolicy.of(options.q).offsets(NVFP4)
    blocks = -(-tokens * group // (16 * chosen.rows)) * (dim // chosen.columns)
    run(
        (heads, blocks, 1) if chosen.rows == 1 else (blocks, heads, 1),
        chosen.threads, row_bytes(chosen, dim, [offsets or (0,)], 1, q_matrix is not None),
        q, transformed if q_matrix is not None else None, stored if options.q is not None else None, parts,
        tokens, query_heads, group, q.stride(0), q.stride(1),
        early=early,
    )  # fmt: skip
    return transformed, stored


@functools.cache
def _kernel(macros: tuple[str, ...], device: torch.device) -> Kernel:
    return kernel("transform_queries.cu", "transform_queries", macros, device)
