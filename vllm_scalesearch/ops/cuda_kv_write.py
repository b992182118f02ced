"""Writing the paged cache in CUDA C++, V along tokens: kernels/kv_write.cu, the bits of kv_pages.py.

The Triton kernels (triton_kv_write.py) do everything else. Nothing here waits for the device, and all of it can
be captured in a CUDA graph after a first call, which compiles and splits the matrix.
"""

import functools
from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.cuda_kernels import Kernel, kernel
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.cuda_quantize import MAX_CANDIDATES
from vllm_scalesearch.ops.triton_kv_write import _checked_matrix, check_cache, check_tokens
from vllm_scalesearch.search import ScalePolicy

if TYPE_CHECKING:
    from vllm_scalesearch.ops.paged_attention import Step

_PARTS = 3
# Bytes before a block's keys in shared memory.
_INVERSES = 512


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
    return None


def rows_of(tokens: int, heads: int, head_size: int, dtype: torch.dtype, processors: int) -> int:
    """Of how many times 16 tokens a block takes keys: several where that leaves blocks enough."""
    most = 4 if head_size <= 128 and dtype == torch.bfloat16 else 2
    return most if tokens * heads >= 16 * most * 2 * processors else 1


def defines(
    layout: PageLayout, full_page: int, options: AttentionOptions, dtype: torch.dtype, rows: int, matrix: bool
) -> tuple[str, ...]:
    """Macros of the kernel."""
    offsets = [ScalePolicy.of(policy).offsets(NVFP4) for policy in (options.k, options.v)]
    return (
        f"D={layout.head_size}", f"HALF={int(dtype == torch.float16)}", f"ROWS={rows}",
        f"PAGE={layout.block_size}", f"FULL_PAGE={full_page}", f"MATRIX={int(matrix)}",
        f"K_COUNT={len(offsets[0])}", f"K_OFFSETS={','.join(map(str, offsets[0]))}",
        f"V_COUNT={len(offsets[1])}", f"V_OFFSETS={','.join(map(str, offsets[1]))}",
    )  # fmt: skip


def parts_of(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix for each KV head, as operands of a product of bf16 fragments.

    matrix: (H, D, D) fp32. Returns (H, D / 32, 3, D / 8, 8, 4, 8) bf16: three parts, whose sum is the matrix to
    24 bits; of 32 rows and 8 columns, lane 4 g + t has rows 8 t to 8 t + 7 of column g.
    """
    heads, dim, _ = matrix.shape
    parts, rest = [], matrix.float()
    for _ in range(_PARTS):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    tiles = torch.stack(parts, 1).view(heads, _PARTS, dim // 32, 4, 8, dim // 8, 8)
    return tiles.permute(0, 2, 1, 5, 6, 3, 4).contiguous()


_split: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _parts(matrix: torch.Tensor) -> torch.Tensor:
    if matrix not in _split:
        _split[matrix] = parts_of(matrix)
    return _split[matrix]


def write(
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: "Step",
    k: torch.Tensor,
    v: torch.Tensor,
    k_matrix: torch.Tensor | None,
    options: AttentionOptions,
) -> None:
    """`triton_kv_write.transform_and_write`, where `unsupported` names no reason against it.

    k_matrix must not be changed in place: what it is split into is kept with it.
    """
    check_cache(pages, full, layout, options)
    heads, dim, tokens = pages.shape[1], layout.head_size, len(step.slots)
    check_tokens(k, v, tokens, heads, dim, full.dtype)
    _checked_matrix(k_matrix, heads, dim)
    if pages.stride(0) % 4 or full.stride(0) % 8 or full.stride(1) % 8 or full.data_ptr() % 16:
        raise ValueError(f"KV cache: 16-bit pages must lie at multiples of 16 bytes, strides {full.stride()}")
    if not tokens:
        return
    k, v = (
        x
        if x.stride(2) == 1 and not (x.stride(0) % 8 or x.stride(1) % 8 or x.data_ptr() % 16)
        else x.contiguous()
        for x in (k, v)
    )
    rows = rows_of(tokens, heads, dim, k.dtype, _multiprocessors(k.device))
    run = _kernel(defines(layout, full.shape[2], options, k.dtype, rows, k_matrix is not None), k.device)
    requests = len(step.seq_lens)
    key_blocks = -(-tokens // (16 * rows))
    run(
        (key_blocks + tokens // BLOCK + requests, heads, 1), dim, _INVERSES + 16 * rows * (2 * dim + 16),
        pages, full, step.slots, step.full_slots, k, v, None if k_matrix is None else _parts(k_matrix),
        step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
        1.0 / float(options.v_scale), tokens, requests, key_blocks, k.stride(0), k.stride(1), v.stride(0),
        v.stride(1), pages.stride(0), pages.stride(1), full.stride(0), full.stride(1),
        step.block_table.stride(0), step.full_block_table.stride(0),
    )  # fmt: skip


@functools.cache
def _kernel(macros: tuple[str, ...], device: torch.device) -> Kernel:
    return kernel("kv_write.cu", "kv_write", macros, device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
