"""Attention of prompts over the paged cache in CUDA C++, for Hopper: kernels/prompt_attention.cu.

What each query sees depends on its position alone, as attention_reference.py defines it; Q and P are quantized
where asked. Keys and values of a group of requests are made dense first (kernels/prompt_tiles.cu), once as
stored and once in full precision, in tiles as the tensor cores take them. The Triton kernel
(triton_paged_attention.py) does everything else. Nothing here waits for the device.
"""

import functools

import torch

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import Kernel, kernel, readable
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.search import ScalePolicy

HEAD_SIZES = (64, 128)
TILE = 128
# Candidates of P whose table fits in shared memory beside the tiles, and their offsets from absmax's scale for
# which packed fp16 has the range.
_MAX_CANDIDATES, _MAX_OFFSET = 16, 8
_THREADS, _STAGES = 384, 2


def unsupported(layout: PageLayout, options: AttentionOptions, device: torch.device) -> str | None:
    """Why the kernels cannot run a layer's prompts, or None if they can."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs compute capability 9.0"
    if options.own_chunk:
        return "tokens of a chunk see each other in full precision"
    if layout.v_group != "tokens" or not options.incomplete:
        return f"V is grouped along {layout.v_group}, and it reads tiles along tokens"
    if layout.head_size not in HEAD_SIZES:
        return f"head_size {layout.head_size} is not one of {HEAD_SIZES}"
    if options.logits_soft_cap is not None:
        return "scores have a soft cap"
    if options.p is None:
        return None
    offsets = ScalePolicy.of(options.p).offsets(NVFP4)
    if offsets is None or len(offsets) > _MAX_CANDIDATES or max(map(abs, offsets)) > _MAX_OFFSET:
        return f"policy {options.p!r} of P is not at most {_MAX_CANDIDATES} offsets up to {_MAX_OFFSET}"
    if not options.two_level_p:
        return "P has one level of scales"
    return None


def defines(
    layout: PageLayout, full_page: int, options: AttentionOptions, dtype: torch.dtype
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Macros of prompt_tiles.cu and of prompt_attention.cu."""
    common = (
        f"D={layout.head_size}", f"HALF={int(dtype == torch.float16)}", f"SINK={options.sink}",
        f"RECENT={options.recent}", f"WINDOW={options.sliding_window or 0}",
    )  # fmt: skip
    offsets = () if options.p is None else ScalePolicy.of(options.p).offsets(NVFP4)
    return (
        (*common, f"PAGE={layout.block_size}", f"FULL_PAGE={full_page}"),
        (
            *common, f"Q_QUANTIZED={int(options.q is not None)}", f"P_COUNT={len(offsets)}",
            f"P_OFFSETS={','.join(map(str, offsets))}",
        ),
    )  # fmt: skip


def attend(
    q: torch.Tensor,
    q_stored: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    options: AttentionOptions,
    output: torch.Tensor,
    k_start_loc: torch.Tensor,
    max_tokens: int,
) -> None:
    """Attention of a step's transformed queries, into `output`.

    q, q_stored, output: (T, Hq, D); q_stored as `triton_kv_write.transform_query` has it. pages, full: as
    `triton_kv_write.transform_and_write` has them, full in q's dtype. k_start_loc: (B + 1,) int32, sums of
    ``step.seq_lens`` from 0 on. max_tokens: at least ``k_start_loc[B]``.
    Where `unsupported` names a reason, nothing here is defined.
    Raises ValueError for tensors that do not fit.
    """
    heads, dim = pages.shape[1], layout.head_size
    requests, queries, query_heads = len(step.seq_lens), q.shape[0], q.shape[1]
    for name, x in (("q", q), ("q_stored", q_stored), ("output", output)):
        if x.shape != q.shape or x.dtype != full.dtype or x.shape[2] != dim or x.stride(2) != 1:
            raise ValueError(
                f"attention of prompts: {name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}, "
                f"expected contiguous heads (T, Hq, {dim}) in {full.dtype}"
            )
    if query_heads % heads:
        raise ValueError(f"attention of prompts: {query_heads} query heads cannot share {heads} KV heads")
    if pages.stride(0) % 16 or pages.stride(1) % 16 or full.stride(0) % 8 or full.stride(1) % 8:
        raise ValueError(
            "attention of prompts: pages must lie at multiples of 16 bytes, strides are "
            f"{pages.stride()} and {full.stride()}"
        )
    q, q_stored = readable(q), readable(q_stored)
    gather, attention = _kernels(defines(layout, full.shape[2], options, q.dtype), q.device)
    tiles, query_tiles = (tokens // TILE + requests for tokens in (max_tokens, queries))
    shape = heads, tiles, TILE * dim
    operands = [torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(4)]
    gather(
        (tiles, heads, 2), TILE, 2 * TILE * dim * 2,
        pages, full, *operands, k_start_loc, step.query_start_loc, step.seq_lens, step.block_table,
        step.full_block_table, float(options.v_scale), requests, pages.stride(0), pages.stride(1),
        full.stride(0), full.stride(1), step.block_table.stride(0), step.full_block_table.stride(0),
    )  # fmt: skip
    score_scale, _ = options.exp2_scales(dim)
    attention(
        (query_tiles * query_heads, 1, 1), _THREADS, shared_bytes(dim, options),
        q, q_stored, *operands, output, k_start_loc, step.query_start_loc, step.seq_lens, requests,
        tiles, heads, query_heads // heads, query_tiles, q.stride(0), q.stride(1), q_stored.stride(0),
        q_stored.stride(1), output.stride(0), output.stride(1), score_scale,
    )  # fmt: skip


def shared_bytes(dim: int, options: AttentionOptions) -> int:
    """Of a block: queries once or twice, stages of keys and values, barriers, the table of P's candidates."""
    tile = TILE * dim * 2
    candidates = 0 if options.p is None else len(ScalePolicy.of(options.p).offsets(NVFP4))
    table = 127 * ((candidates + 2) // 2 | 1) * 16 if candidates else 0
    return (1 + (options.q is not None) + 2 * _STAGES) * tile + 1024 + table


@functools.cache
def _kernels(macros: tuple[tuple[str, ...], tuple[str, ...]], device: torch.device) -> tuple[Kernel, Kernel]:
    return (
        kernel("prompt_tiles.cu", "prompt_tiles", macros[0], device),
        kernel("prompt_attention.cu", "prompt_attention", macros[1], device),
    )
