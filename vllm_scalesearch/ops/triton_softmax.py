"""What the attention kernels in Triton share: which tokens a block of rows sees, and the steps of the softmax.

A block of rows is the query heads of one KV head for some queries of one request.
"""

import functools

import torch
import triton
import triton.language as tl

from vllm_scalesearch.attention_reference import P_LEVELS

# Units of a quantized P, and of its products, at two levels.
P_UNITS = tl.constexpr(float(P_LEVELS))


# --- what a block of rows sees -------------------------------------------------------------------


@triton.jit
def rows_of_block(
    first_query, queries, context, length, GROUP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr
):
    """The rows of QUERIES queries of a request, from first_query on, in each of a KV head's GROUP query heads.

    queries, context, length: the request's queries, the tokens before them, and all tokens. Returns the rows'
    queries, which of them there are, and their positions, (ROWS,) each; and the first and last position of all.
    """
    row = tl.arange(0, ROWS)
    query = first_query + row // GROUP
    valid = (row < QUERIES * GROUP) & (query < queries)
    first_position = context + first_query
    last_position = tl.minimum(first_position + QUERIES, length) - 1
    position = tl.minimum(context + query, last_position)
    return query, valid, position, first_position, last_position


@triton.jit
def window_of_block(first_position, last_position, WINDOW: tl.constexpr):
    """From which token on some row sees them, and from which on each row that is not before them does."""
    low = 0
    seen_by_all = 0
    if WINDOW > 0:
        low = tl.maximum(first_position + 1 - WINDOW, 0)
        seen_by_all = tl.maximum(last_position + 1 - WINDOW, 0)
    return low, seen_by_all


@triton.jit
def pure_tiles(first, last, seen_by_all, first_boundary, SINK: tl.constexpr, TILE: tl.constexpr):
    """Of the tiles in [first, last), the range of those that are stored for all rows, to the last token."""
    pure_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(seen_by_all, SINK), TILE), first), last)
    pure_last = tl.minimum(tl.maximum(first_boundary // TILE, pure_first), last)
    return pure_first, pure_last


@triton.jit
def visible_and_stored(token, position, boundary, SINK: tl.constexpr, WINDOW: tl.constexpr):
    """Which of a tile's tokens each row sees, and which it has as stored: twice (ROWS, TILE) bool."""
    visible = token[None, :] <= position[:, None]
    if WINDOW > 0:
        visible &= token[None, :] > position[:, None] - WINDOW
    stored = (token >= SINK)[None, :] & (token[None, :] < boundary[:, None])
    return visible, stored


# --- steps of the softmax ------------------------------------------------------------------------


@triton.jit
def scaled(scores, scale, cap, SOFT_CAP: tl.constexpr):
    """Scores in units of log(2): times `scale`, or cap * tanh of half of that."""
    if SOFT_CAP:
        return cap * (1.0 - 2.0 / (tl.exp2(scores * scale) + 1.0))
    else:
        return scores * scale


@triton.jit
def softmax_step(scores, maximum, total, output, SUMS: tl.constexpr):
    """P of a tile's scores, and the row's maximum, a whole number, total and output brought up to it.

    SUMS: add P to the total.
    """
    new = tl.maximum(maximum, tl.ceil(tl.max(scores, 1)))
    # A row that has seen nothing yet has no maximum.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - base[:, None])
    decay = tl.exp2(maximum - base)
    total *= decay
    if SUMS:
        total += tl.sum(p, 1)
    return p, new, total, output * decay[:, None]


@triton.jit
def levels(maximum, stored_maximum):
    """What rows of P are multiplied by before they are quantized at two levels, and what undoes it."""
    # A row that has seen nothing stored has no P here. What is 2**100 below the rest may lose bits.
    apart = tl.where(stored_maximum == float("-inf"), 0.0, tl.minimum(maximum - stored_maximum, 100.0))
    return tl.exp2(apart) * P_UNITS, tl.exp2(-apart)


# --- launching -----------------------------------------------------------------------------------


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; on the CPU, where the interpreter runs, Hopper's."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
