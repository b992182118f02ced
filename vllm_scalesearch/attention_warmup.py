"""Compiling the attention kernels of a GPU before the first request comes.

They are compiled, or read from the cache, when they first run. That takes seconds, of a request that has
nothing to do with it, so each variant that a layer may need is run once while the model is loaded.
"""

import itertools
from collections.abc import Callable

import torch

from vllm_scalesearch import attention_prefill
from vllm_scalesearch.attention_prefill import LEAST_QUERIES
from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_cache import RATIO
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention
from vllm_scalesearch.ops.step import Step

# Tokens before the step, of one request: some are stored, and keys are shared out to several programs; or none.
_CONTEXTS = (512, 0)
# Queries of a step: one, as drafts and short prompts have, a short chunk, and enough to fill any GPU.
_QUERIES = (1, 2, 4, 16, LEAST_QUERIES - 1, LEAST_QUERIES, 8192)


def warm_up(
    layout: PageLayout,
    heads: int,
    kv_heads: int,
    q_matrix: torch.Tensor | None,
    k_matrix: torch.Tensor | None,
    options: AttentionOptions,
    dtype: torch.dtype,
    dense: bool,
    flash_attention: Callable[..., None],
    device: torch.device,
) -> None:
    """Run every kernel of a layer on a cache of its own.

    heads: query heads. dense: chunks go to `attention_prefill.attend`, which the arguments are for.
    """
    for queries, context in itertools.product(_QUERIES, _CONTEXTS):
        length, size = context + queries, layout.block_size // RATIO
        positions = torch.arange(context, length, device=device)
        pages, full = -(-length // layout.block_size), -(-length // size)
        packed = torch.zeros(
            pages, kv_heads, layout.block_size, layout.bytes_per_token, dtype=torch.uint8, device=device
        )
        kept = torch.zeros(full, kv_heads, size, 2 * layout.head_size, dtype=dtype, device=device)
        starts = torch.tensor([0, queries], dtype=torch.int32, device=device)
        lengths = torch.tensor([length], dtype=torch.int32, device=device)
        tables = (torch.arange(n, dtype=torch.int32, device=device).unsqueeze(0) for n in (pages, full))
        step = Step(starts, lengths, *tables, positions, positions, queries)
        q = torch.zeros(queries, heads, layout.head_size, dtype=dtype, device=device)
        k, v = (torch.zeros(queries, kv_heads, layout.head_size, dtype=dtype, device=device) for _ in range(2))
        output = torch.empty_like(q)
        if not dense or queries < LEAST_QUERIES:
            paged_attention.write_and_attend(
                q, k, v, packed, kept, layout, step, q_matrix, k_matrix, options, output
            )
            continue
        paged_attention.write(packed, kept, layout, step, k, v, k_matrix, options)
        groups = attention_prefill.plan(starts, [0, queries], lengths, [length], 0, length)
        for group in groups:
            attention_prefill.attend(
                q, k, v, packed, kept, layout, step, group, q_matrix, options, output, flash_attention
            )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
