"""Prefill of prompts on a GPU, over keys and values that are made dense first.

With ``prefill="full_precision"`` all queries of a chunk see the same keys and values: the sink and everything
from the first query's recent window on in 16 bits, the rest as stored. So they are gathered once, dense and in
16 bits, and vLLM's FlashAttention does the rest. With ``prefill="stored"`` each query sees its own, and kernels
of our own attend to them (ops/cuda_prompt_attention.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention
from vllm_scalesearch.ops.step import Step

# From so many queries of a request on, gathering its context is worth it; below, it is read packed.
LEAST_QUERIES = 33


@dataclass(frozen=True)
class Group:
    """Requests whose keys and values are dense at the same time.

    requests: of the batch. queries: their tokens. query_start_loc, k_start_loc: (n + 1,) int32, where each
    request's queries and keys begin among the group's. tokens: at least the number of keys. max_query_len,
    max_seq_len: at least the largest of a request. context: some request has tokens before this step's.
    """

    requests: slice
    queries: slice
    query_start_loc: torch.Tensor
    k_start_loc: torch.Tensor
    tokens: int
    max_query_len: int
    max_seq_len: int
    context: bool


def plan(
    query_start_loc: torch.Tensor, query_starts: list[int], seq_lens: torch.Tensor, lengths: list[int],
    first: int, budget: int,
) -> list[Group]:  # fmt: skip
    """Groups of the requests from `first` on, each of at most `budget` tokens or of one request.

    query_start_loc (B + 1,), seq_lens (B,): int32, on the device; query_starts: the former on the host, and
    lengths: at least the latter, exact for requests without context.
    """
    groups, begin = [], first
    while begin < len(lengths):
        end, tokens = begin + 1, lengths[begin]
        while end < len(lengths) and tokens + lengths[end] <= budget:
            tokens += lengths[end]
            end += 1
        counts = [query_starts[r + 1] - query_starts[r] for r in range(begin, end)]
        k_start_loc = torch.zeros(end - begin + 1, dtype=torch.int32, device=seq_lens.device)
        torch.cumsum(seq_lens[begin:end], 0, out=k_start_loc[1:])
        groups.append(
            Group(
                slice(begin, end),
                slice(query_starts[begin], query_starts[end]),
                query_start_loc[begin : end + 1] - query_starts[begin],
                k_start_loc,
                tokens,
                max(counts),
                max(lengths[begin:end]),
                any(n > c for n, c in zip(lengths[begin:end], counts, strict=True)),
            )
        )
        begin = end
    return groups


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    group: Group,
    q_matrix: torch.Tensor | None,
    options: AttentionOptions,
    output: torch.Tensor,
    flash_attention: Callable[..., None],
) -> None:
    """Attention of a group's queries, into its rows of `output`. Not ``options.own_chunk`` takes what
    `cuda_prompt_attention.unsupported` names no reason against.

    q, output: (T, Hq, D), k, v: (T, Hkv, D), of the whole step, q and k before the transform. pages, full:
    what the cache holds, this step's tokens included. flash_attention: takes q, k, v, output, the group and the
    options.
    """
    from vllm_scalesearch.ops import cuda_prompt_attention, triton_kv_gather

    rows = group.queries
    requests = step.part(group.requests, group.max_query_len)
    if not options.own_chunk:
        q, q_stored = paged_attention.transform_query(q[rows], q_matrix, options)
        cuda_prompt_attention.attend(
            q, q_stored, pages, full, layout, replace(requests, query_start_loc=group.query_start_loc), options,
            output[rows], group.k_start_loc, group.tokens,
        )  # fmt: skip
        return
    if not group.context:
        # R and H leave scores as they are, so there is nothing to transform.
        flash_attention(q[rows], k[rows], v[rows], output[rows], group, options)
        return
    q, _ = paged_attention.transform_query(q[rows], q_matrix, options)
    keys, values = (
        torch.empty(group.tokens, pages.shape[1], layout.head_size, dtype=full.dtype, device=full.device)
        for _ in range(2)
    )
    triton_kv_gather.gather(
        pages, full, layout, requests, options, keys, values, group.k_start_loc, group.tokens,
    )  # fmt: skip
    flash_attention(q, keys, values, output[rows], group, options)
