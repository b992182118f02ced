"""Decoding attention over the paged cache on the CPU: one query token a request, neither Q nor P quantized.

The definition's arithmetic (attention_reference.py) but for the order of fp32 sums. Torch multiplies a scale
into sixteen elements slowly, and matrices fast. So the elements of the cache stay as they are: queries are
spread over one row for each scale block, zero in all others, and the sums that a product gives for each block
are multiplied by its scale; P is multiplied by V's scales, for each block apart, before its product. Tokens
in 16 bits are other columns of the same softmax.
"""

import torch

from vllm_scalesearch import kv_pages
from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step


def decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    requests: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """Attention of one query of each of `requests` (R,) int64.

    q: (R, Hq, D), transformed. pages, full: see kv_pages.py. Returns (R, Hq, D) fp32.
    """
    dim = layout.head_size
    scale = dim**-0.5 if options.softmax_scale is None else options.softmax_scale
    q = q.float().unflatten(1, (pages.shape[1], -1)) * scale  # (R, Hkv, group, D)
    lengths = step.seq_lens[requests].long().unsqueeze(1)
    boundary = options.boundary_alone(lengths - 1)
    low = torch.zeros_like(lengths)
    if options.sliding_window is not None:
        low = (lengths - options.sliding_window).clamp_(min=0)

    kept, seen = _full_precision(full, step.full_block_table[requests], lengths, boundary, low, options)
    # What nobody sees may hold anything, NaN too.
    kept_keys, kept_values = kept[..., :dim], kept[..., dim:].masked_fill(~seen[:, None, :, None], 0)
    scores = [_masked(q @ kept_keys.mT, seen, options)]
    last = int(boundary.max())
    if last <= options.sink:  # nothing is read as stored
        return (scores[0].softmax(-1) @ kept_values).flatten(1, 2)

    tables = step.block_table[requests, : -(-last // layout.block_size)].long()
    tokens = torch.arange(last)
    seen = (tokens >= low.clamp(min=options.sink)) & (tokens < boundary)
    if layout.v_group == "tokens":
        keys, values = (
            x.unflatten(1, (len(requests), -1)).transpose(0, 1)[:, :, :last]
            for x in kv_pages.read(pages, layout, tables.flatten(), options.v_scale)
        )  # (R, Hkv, T, D)
        values = values.masked_fill(~seen[:, None, :, None], 0)
        scores.append(_masked(q @ keys.mT, seen, options))
        p, stored_p = _softmax(scores)
        return (p @ kept_values + stored_p @ values).flatten(1, 2)

    keys, k_scales, values, v_scales = kv_pages.read_apart(pages, layout, tables, last)
    if options.v_scale != 1:
        v_scales *= float(options.v_scale)
    v_scales.masked_fill_(~seen[:, None, :, None], 0)
    group, count = q.shape[2], dim // BLOCK
    spread = q.new_zeros(*q.shape[:3], count * dim)
    _blocks(spread, dim).copy_(_channels(q))
    sums = keys @ spread.view(*q.shape[:2], group * count, dim).mT  # (R, Hkv, T, group * count)
    stored_scores = (sums.unflatten(-1, (group, count)) * k_scales.unsqueeze(3)).sum(-1).mT
    scores.append(_masked(stored_scores, seen, options))
    p, stored_p = _softmax(scores)
    weighted = stored_p.unsqueeze(3) * v_scales.mT.unsqueeze(2)  # (R, Hkv, group, count, T)
    output = p @ kept_values
    _channels(output).add_(_blocks((weighted.flatten(2, 3) @ values).view_as(spread), dim))
    return output.flatten(1, 2)


def _full_precision(
    full: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    boundary: torch.Tensor,
    low: torch.Tensor,
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages with sink and newest tokens of each request, (R, Hkv, T, 2 * D) fp32, and which of them are seen.

    tables: (R, V). lengths, boundary, low: (R, 1) int64; `low` is the first token that is seen.
    """
    size = full.shape[2]
    sink = -(-options.sink // size)
    first = (boundary // size).clamp(min=sink)
    newest = int(((lengths - 1) // size - first).max()) + 1
    page = torch.cat((torch.arange(sink).expand(len(lengths), -1), first + torch.arange(max(newest, 0))), dim=1)
    blocks = tables.gather(1, page.clamp(max=tables.shape[1] - 1)).flatten()
    kept = full.index_select(0, blocks).unflatten(0, page.shape).transpose(1, 2).flatten(2, 3).float()
    token = (page.unsqueeze(-1) * size + torch.arange(size)).flatten(1)
    return kept, (token < lengths) & (token >= low) & ((token < options.sink) | (token >= boundary))


def _masked(scores: torch.Tensor, seen: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """scores: (R, Hkv, group, T), softmax scale included. seen: (R, T)."""
    if options.logits_soft_cap is not None:
        scores = options.logits_soft_cap * torch.tanh(scores / options.logits_soft_cap)
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def _softmax(scores: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.cat(scores, dim=-1).softmax(-1).split([x.shape[-1] for x in scores], dim=-1)


def _channels(x: torch.Tensor) -> torch.Tensor:
    """A view of (..., D) channels as (..., t, i, j, half): channel ``32 * j + 16 * half + 4 * t + i``."""
    return x.unflatten(-1, (-1, 2, 4, 4)).movedim((-4, -3), (-2, -1))


def _blocks(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Each block's own channels, a view as `_channels` has them, of (..., D / 16 * D): for each block, which is
    (j, half), all channels in the order of `k_order`."""
    split = x.unflatten(-1, (dim // 32, 2, 4, dim // 32, 4, 2))  # the block's j and half; t, j, i, half
    return split.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-5, dim2=-2)
