"""Attention over the paged cache: the definition's arithmetic on the CPU, kernels on a CUDA GPU.

A step has a batch of requests, each with its newest tokens as queries and all its tokens in the cache,
those queries included. Everything is read from the cache.
"""

from dataclasses import replace
from itertools import pairwise

import torch

from vllm_scalesearch import kv_pages
from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions, Operands, attend
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cpu_decode
from vllm_scalesearch.ops.quantize import quantize_weight
from vllm_scalesearch.ops.step import Step


def write(
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

    pages, full: see kv_pages.py. k, v: (T, Hkv, D), T at least the step's tokens. k_matrix: (Hkv, D, D)
    fp32, or None to leave keys as they are.
    """
    if pages.device.type == "cuda":
        from vllm_scalesearch.ops import cuda_kv_write, triton_kv_write

        write_on_cuda = triton_kv_write.transform_and_write
        if cuda_kv_write.unsupported(layout, options, pages.device) is None:
            write_on_cuda = cuda_kv_write.write
        write_on_cuda(pages, full, layout, step, k, v, k_matrix, options)
        return
    count = len(step.slots)
    k, v = k[:count], v[:count]
    if k_matrix is not None:
        k = transformed(k, k_matrix)
    kv_pages.write(
        pages, full, layout, step.slots, step.full_slots, k, v, options.k, options.v, options.v_scale
    )
    if layout.v_group == "tokens":
        slots, values = _complete_tiles(full, layout, step)
        if len(slots):
            kv_pages.write_tiles(pages, layout, slots, values, options.v, options.v_scale)


def _complete_tiles(full: torch.Tensor, layout: PageLayout, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of V that this step's tokens complete: first slots (tiles,), and values (tiles, 16, Hkv, D)."""
    slots, values = [], []
    starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    for request, length in enumerate(lengths):
        context = length - (starts[request + 1] - starts[request])
        for tile in range(context // BLOCK, length // BLOCK):
            tokens = torch.arange(tile * BLOCK, (tile + 1) * BLOCK)
            values.append(_full(full, step.full_block_table[request], tokens)[..., layout.head_size :])
            slots.append(_slot(step.block_table[request], tile * BLOCK, layout.block_size))
    if not slots:
        return torch.empty(0, dtype=torch.int64), torch.empty(0)
    return torch.stack(slots), torch.stack(values)


def _slot(table: torch.Tensor, token: int, block_size: int) -> torch.Tensor:
    return table[token // block_size].long() * block_size + token % block_size


def _full(full: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Full-precision keys and values of `tokens` of one request: (tokens, Hkv, 2 * D)."""
    size = full.shape[2]
    return full[table[tokens // size].long(), :, tokens % size]


def attention(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    q_matrix: torch.Tensor | None,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """Transform a step's queries, and attend to the cache, into `output`.

    q: (T, Hq, D) bf16 or fp16. q_matrix: (Hkv, D, D) fp32, or None. output: (T, Hq, D) in q's dtype; rows
    past the step's tokens are left alone. The arithmetic is fp32.
    """
    if pages.device.type == "cuda":
        _attention_on_cuda(q, pages, full, layout, step, q_matrix, options, output)
        return
    if q_matrix is not None:
        q = transformed(q, q_matrix)
    starts, lengths = step.query_start_loc.tolist(), step.seq_lens.tolist()
    counts = [stop - start for start, stop in pairwise(starts)]
    single = [request for request, count in enumerate(counts) if count == 1]
    if single and options.q is None and options.p is None:
        # One decoding step of many requests: the same arithmetic, once for all of them.
        requests = torch.tensor(single)
        rows = step.query_start_loc[requests].long()
        output[rows] = cpu_decode.decode(q[rows], pages, full, layout, step, requests, options).to(output.dtype)
        counts = [0 if count == 1 else count for count in counts]
    for request, length in enumerate(lengths):
        if not counts[request]:
            continue
        rows = slice(starts[request], starts[request + 1])
        heads = pages.shape[1]
        queries = q[rows].float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        operands = _operands(queries, pages, full, layout, step, request, length, options)
        # Where P stays as it is, the width of a tile changes nothing but rounding.
        wide = options if options.p is not None else replace(options, kv_tile=-(-length // BLOCK) * BLOCK)
        output[rows] = attend(operands, wide).permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)


def write_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    q_matrix: torch.Tensor | None,
    k_matrix: torch.Tensor | None,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """`write`, then `attention`; in a decoding step in CUDA the launch that writes transforms queries too."""
    if pages.device.type == "cuda" and kernel_for(layout, options, step.max_query_len, pages.device) == "cuda":
        from vllm_scalesearch.ops import cuda_kv_write, cuda_paged_decode

        if cuda_kv_write.unsupported(layout, options, pages.device) is None:
            begin_next = cuda_paged_decode.begins_early(q.shape[1] // pages.shape[1])
            q = cuda_kv_write.write(pages, full, layout, step, k, v, k_matrix, options, q, q_matrix, begin_next)
            cuda_paged_decode.decode(q, pages, full, layout, step, options, output)
            return
    write(pages, full, layout, step, k, v, k_matrix, options)
    attention(q, pages, full, layout, step, q_matrix, options, output)


def kernel_for(layout: PageLayout, options: AttentionOptions, queries: int, device: torch.device) -> str:
    """Which kernel attends to the cache on a CUDA GPU, where no request has more than `queries` queries.

    ``fp4``: ops/triton_fp4_attention.py. ``cuda``: ops/cuda_paged_decode.py. ``triton``:
    ops/triton_paged_attention.py.
    """
    from vllm_scalesearch.ops import cuda_paged_decode, triton_fp4_attention

    fp4_units = torch.cuda.get_device_capability(device) in triton_fp4_attention.FP4_CAPABILITIES
    if fp4_units and triton_fp4_attention.unsupported(layout, options) is None:
        return "fp4"
    if queries == 1 and cuda_paged_decode.unsupported(layout, options, device) is None:
        return "cuda"
    return "triton"


def transform_query(
    q: torch.Tensor, q_matrix: torch.Tensor | None, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_kv_write.transform_query` on a CUDA GPU, by the kernel that is there for it."""
    from vllm_scalesearch.ops import cuda_transform_query, triton_kv_write

    if cuda_transform_query.unsupported(q.shape[2], options, q.device) is None:
        return cuda_transform_query.transform_query(q, q_matrix, options)
    return triton_kv_write.transform_query(q, q_matrix, options)


def _attention_on_cuda(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    q_matrix: torch.Tensor | None,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    from vllm_scalesearch.ops import (
        cuda_paged_decode,
        triton_fp4_attention,
        triton_paged_attention,
    )

    kernel = kernel_for(layout, options, step.max_query_len, pages.device)
    if kernel == "fp4":  # packs its queries itself
        q, _ = transform_query(q, q_matrix, replace(options, q=None))
        triton_fp4_attention.attention(q, pages, full, layout, step, options, output)
        return
    q, q_stored = transform_query(q, q_matrix, options)
    if kernel == "cuda":
        cuda_paged_decode.decode(q, pages, full, layout, step, options, output)
    else:
        triton_paged_attention.attention(q, q_stored, pages, full, layout, step, options, output)


def _operands(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    request: int,
    length: int,
    options: AttentionOptions,
) -> Operands:
    dim = layout.head_size
    context = length - q.shape[2]
    blocks = step.block_table[request, : -(-length // layout.block_size)].long()
    k_stored, v_stored = (x[:, :length] for x in kv_pages.read(pages, layout, blocks, options.v_scale))
    boundary = options.boundary(torch.arange(context, length))
    first = int(boundary[0])
    visible = 0 if options.sliding_window is None else max(0, context + 1 - options.sliding_window)
    # What is stored for nobody, or seen by nobody, may hold anything, NaN too.
    for x in (k_stored, v_stored):
        x[:, :visible] = 0
        x[:, int(boundary[-1]) :] = 0
    tokens = torch.arange(length)
    tokens = tokens[((tokens < options.sink) | (tokens >= first)) & (tokens >= visible)]
    k = torch.zeros_like(k_stored)
    v = torch.zeros_like(v_stored)
    kept = _full(full, step.full_block_table[request], tokens).float().transpose(0, 1)
    k[:, tokens], v[:, tokens] = kept[..., :dim], kept[..., dim:]
    return Operands(q, _quantized(q, options), k, k_stored, v, v_stored)


def _quantized(q: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    if options.q is None:
        return q
    return quantize_weight(q.contiguous(), NVFP4, options.q, torch.ones((), device=q.device)).dequantize()


def transformed(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Queries or keys times their KV head's matrix, in fp32, rounded to x's dtype.

    x: (T, H, D) bf16 or fp16. matrix: (Hkv, D, D) fp32; H is a multiple of Hkv, head h belongs to
    ``h // (H // Hkv)``.
    """
    heads = matrix.shape[0]
    grouped = x.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2).float()  # (Hkv, T * group, D)
    product = torch.bmm(grouped, matrix).to(x.dtype)
    return product.view(heads, len(x), -1, x.shape[2]).transpose(0, 1).flatten(1, 2)
