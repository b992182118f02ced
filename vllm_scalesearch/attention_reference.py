"""ScaleSearchAttention in plain torch: the definition that every attention kernel is held to.

Method: "Search Your Block Floating Point Scales!", arXiv 2605.12464. Causal attention with grouped
query heads, of one sequence, whose Q, K, V and P are NVFP4 with searched block scales (search.py), each
grouped in 16s along the reduction dimension of its product. It walks over the keys tile by tile, as a
kernel with an online softmax does, because that is what P's quantization depends on.

**What a query sees: positions only.** A token j at or before the query's position p is in one of two
states, which depend on j, p and the options and on nothing else:

* *full precision*: ``j < sink``, or ``j >= boundary(p)``;
* *stored*: all others, quantized once.

``boundary(p) = max(p + 1 - recent, 0)``: exactly the newest `recent` tokens, p itself included, are in
full precision. With V grouped along tokens the boundary is rounded down to a multiple of 16, so that the
block that is incomplete at p, and any block that reaches into the recent window, is in full precision as
a whole. State is a token's, for its key and its value alike and whatever the policies: a cache keeps both
in one place, and runs that quantize only one of the two compare. So, unless ``own_chunk`` is set, neither
the sequence's later tokens, nor how it is cut into chunks, nor what else runs beside it changes an output
beyond rounding.

**Products.** Full-precision tokens meet the unquantized q and P, since a product with a bf16 operand runs
in bf16; stored tokens meet the quantized ones. With ``i`` the query, in the given arithmetic:

1. ``q' = q R^-T H``, ``k' = k R H`` (transforms.py; v is left alone), rounded to `transform_dtype` if given.
2. Stored tokens: ``k^ = NVFP4(k')`` along head_dim, ``v^ = NVFP4(v)`` along head_dim or along tokens:
   16 consecutive tokens, the first a multiple of 16, of one channel. Sink tokens that share a block with
   stored ones take part in that block's search. ``q^ = NVFP4(q')`` along head_dim.
3. For each tile of `kv_tile` tokens, at multiples of `kv_tile`, ascending: scores ``s_j`` are
   ``softmax_scale * q^ k^_j`` or ``softmax_scale * q' k'_j``, then ``cap * tanh(s / cap)``; invisible
   tokens get minus infinity. ``m' = max(m, ceil(log2(e) max s_j))``, ``p_j = 2^(log2(e) s_j - m')``, and
   ``n' = max(n, ceil(log2(e) max s_j))`` of stored tokens alone.
4. ``p^ = NVFP4(p)`` of the tile's stored tokens, in 16s along tokens, the others as zeros. Two levels: the
   tensor scale of a row is ``2^(n' - m') / 1024``, whatever the sink's scores are, and it is undone after the
   product. One level: it is 1, and block scales use only E4M3's values up to 1/6.
5. ``l = l * 2^(m - m') + sum_stored p^_j + sum_full p_j``, so that what values are weighed by sums up to 1.
   SageAttention3 (arXiv 2505.11594), on which the paper builds, sums the unquantized p_j.
6. ``o = o * 2^(m - m') + sum_stored p^_j v^_j + sum_full p_j v_j``; at the end ``o / l``.

**P's two levels.** SageAttention3's tensor scale makes a row's largest p of the tile 6 * 448. Here it is a
power of two and follows the largest stored p so far, which makes that at most 1024. So a later, larger
maximum multiplies P by a power of two and leaves its codes as they are: they do not depend on where tiles
begin, nor on a chunk's other tokens, unless a block scale leaves E4M3's range, below 2**-13 of the row's
largest. And there is room above: scales that are searched may be larger than that of the maximum.

**Tensor scales** of q, k and v are constants, 1 unless given, because a token in a cache is never looked
at again when a larger one arrives. E4M3 block scales alone then span what matters: with a scale of 1,
values above 6 * 448 = 2688 saturate; blocks whose maximum is below 6 * 2**-6 = 0.094 have subnormal block
scales and lose precision, until at 6 * 2**-9 = 0.012 the block scale stays at its least and elements are
multiples of 2**-10. After R, queries and keys are of one size, far from both ends. A model whose values
are that small needs a smaller `v_scale`.

Quantization itself is search.py's, in fp32, whatever the arithmetic around it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.search import ScalePolicy, quantize
from vllm_scalesearch.transforms import MagnitudeReduction, head_transform

BLOCK = NVFP4.block_size
V_GROUPS = ("tokens", "head_dim")
LOG2_E = math.log2(math.e)
# At two levels, what the largest stored P of a row is at most, in units of its tensor scale.
P_LEVELS = 1024


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """Everything that the definition leaves open. The defaults are the paper's algorithm without R.

    q, k, v, p: scale policy (a `ScalePolicy` with metric mse, or its rule), or None: that operand stays
        as it is.
    hadamard: multiply queries and keys by H.
    reduction: R of each KV head of this layer, or None.
    v_group: ``tokens`` or ``head_dim``, the direction in which V's blocks lie.
    sink: how many of the first tokens are in full precision.
    recent: how many of the newest tokens are, the query's own included.
    incomplete: with V along tokens, keep the incomplete block in full precision. False is for ablation
        and takes ``recent=0``: every block is stored, and a query sees its own block as quantized from
        the block's tokens up to the query, the rest being zeros.
    two_level_p: give each row of P a tensor scale of its own.
    q_scale, k_scale, v_scale: tensor scales, a number or (Hkv,) fp32, at least 2**-126.
    softmax_scale: what scores are multiplied by; None is ``head_dim ** -0.5``.
    sliding_window: a query sees the newest `sliding_window` tokens only, itself included (vLLM's and
        transformers' meaning). Sink tokens outside it are not seen either.
    own_chunk: queries that are computed together all have the boundary of the first of them, so that all
        tokens from the first query's recent window on are in full precision for each. Then all queries of
        a chunk see the same keys and values, which one pass of any dense attention kernel can take. More
        accurate for prompts, and it ends the rule above: an output then depends on how the prompt was cut
        into chunks.
    logits_soft_cap: scores become ``cap * tanh(score / cap)``.
    kv_tile: tokens a step of the online softmax takes, a multiple of 16.
    transform_dtype: round q' and k' to this dtype, as a kernel does that keeps them in 16 bits. None
        leaves them in the arithmetic's precision.
    Raises ValueError for values outside these.
    """

    q: ScalePolicy | str | None = "paper"
    k: ScalePolicy | str | None = "paper"
    v: ScalePolicy | str | None = "paper"
    p: ScalePolicy | str | None = "paper"
    hadamard: bool = True
    reduction: MagnitudeReduction | None = None
    v_group: str = "tokens"
    sink: int = 16
    recent: int = 0
    incomplete: bool = True
    two_level_p: bool = True
    own_chunk: bool = False
    q_scale: float | torch.Tensor = 1.0
    k_scale: float | torch.Tensor = 1.0
    v_scale: float | torch.Tensor = 1.0
    softmax_scale: float | None = None
    sliding_window: int | None = None
    logits_soft_cap: float | None = None
    kv_tile: int = 64
    transform_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "p"):
            policy = getattr(self, name)
            if policy is not None and ScalePolicy.of(policy).metric != "mse":
                raise ValueError(f"policy of {name}: attention has no importance to weigh errors by; use mse")
        if self.v_group not in V_GROUPS:
            raise ValueError(f"unknown v_group {self.v_group!r}; there are {', '.join(V_GROUPS)}")
        if self.sink < 0 or self.recent < 0:
            raise ValueError(f"sink and recent are counts of tokens, got {self.sink} and {self.recent}")
        if not self.incomplete and self.recent:
            raise ValueError(f"incomplete=False stores every token, so recent must be 0, got {self.recent}")
        if self.kv_tile < BLOCK or self.kv_tile % BLOCK:
            raise ValueError(f"kv_tile must be a multiple of {BLOCK}, got {self.kv_tile}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"a sliding window holds at least the query itself, got {self.sliding_window}")
        if self.logits_soft_cap is not None and self.logits_soft_cap <= 0:
            raise ValueError(f"logits_soft_cap must be above 0, got {self.logits_soft_cap}")

    @property
    def p_levels(self) -> float:
        """P's tensor scales are powers of two over this."""
        return P_LEVELS if self.p is not None and self.two_level_p else 1.0

    def exp2_scales(self, head_size: int) -> tuple[float, float]:
        """What kernels with exponents of two multiply scores by, and the soft cap in their units, or 0.

        With a cap a score becomes ``cap * (1 - 2 / (exp2(x) + 1))``, which is ``cap * tanh(x / 2 / log2(e))``.
        """
        scale = head_size**-0.5 if self.softmax_scale is None else self.softmax_scale
        scale *= LOG2_E
        if self.logits_soft_cap is None:
            return scale, 0.0
        return scale * 2 / self.logits_soft_cap, self.logits_soft_cap * LOG2_E

    def boundary(self, positions: torch.Tensor) -> torch.Tensor:
        """First token that is in full precision for being new, for queries at `positions` (int64), which
        ascend and are computed together."""
        return self.boundary_alone(positions[:1].expand(len(positions)) if self.own_chunk else positions)

    def boundary_alone(self, positions: torch.Tensor) -> torch.Tensor:
        """The same for queries that are each the first one of their chunk."""
        boundary = (positions + 1 - self.recent).clamp(min=0)
        if self.v_group == "tokens" and self.incomplete:
            boundary = boundary // BLOCK * BLOCK
        return boundary


UNQUANTIZED = AttentionOptions(q=None, k=None, v=None, p=None, hadamard=False)


@torch.no_grad()
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: AttentionOptions,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Attention of the last Tq of a sequence's T tokens.

    q: (Tq, Hq, D), post-RoPE, at positions T - Tq to T - 1. k, v: (T, Hkv, D), of the whole sequence.
    Any float dtype; query head h reads KV head ``h // (Hq // Hkv)``. D must be a multiple of 16 where an
    operand is quantized along it.
    dtype: fp32 or fp64, of all arithmetic outside quantization.
    Returns (Tq, Hq, D) in `dtype`. Raises ValueError for shapes or a dtype that do not fit.
    """
    _check(q, k, v, dtype)
    q = q.to(dtype).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)
    k, v = k.to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)
    transform = head_transform(k.shape[0], k.shape[2], options.reduction, options.hadamard)
    if transform is not None:
        q, k = q @ transform.q_matrix.to(q).unsqueeze(1), k @ transform.k_matrix.to(k)
        if options.transform_dtype is not None:
            q, k = q.to(options.transform_dtype).to(v), k.to(options.transform_dtype).to(v)
    operands = Operands(
        q,
        fake_quantized(q, options.q, options.q_scale),
        k,
        fake_quantized(k, options.k, options.k_scale),
        v,
        quantized_values(v, options),
    )
    return attend(operands, options).permute(2, 0, 1, 3).flatten(1, 2)


@dataclass(frozen=True)
class Operands:
    """One sequence's transformed operands, heads first, in full precision and as stored.

    q, q_stored: (Hkv, group, Tq, D), of the last Tq positions. k, k_stored, v, v_stored: (Hkv, T, D).
    All in the dtype of the arithmetic. What no query sees in one of the two forms may be anything finite.
    """

    q: torch.Tensor
    q_stored: torch.Tensor
    k: torch.Tensor
    k_stored: torch.Tensor
    v: torch.Tensor
    v_stored: torch.Tensor


def attend(operands: Operands, options: AttentionOptions) -> torch.Tensor:
    """Steps 3 to 6 of the definition, for operands that are quantized already: (Hkv, group, Tq, D).

    Of `options`, the policies of q, k and v, their scales and the transforms are not looked at, but for
    ``incomplete=False``.
    """
    layout = _Sequence(operands, options)
    q = operands.q
    maximum = q.new_full((*q.shape[:-1], 1), -torch.inf)
    stored_maximum = maximum.clone()
    total = torch.zeros_like(maximum)
    output = torch.zeros_like(q)
    tokens, context = operands.k.shape[1], operands.k.shape[1] - q.shape[2]
    for start in range(0, tokens, options.kv_tile):
        stop = min(start + options.kv_tile, tokens)
        # Each of these queries sees at least one token of the tile, so its maximum is finite.
        end = tokens if options.sliding_window is None else stop - 1 + options.sliding_window
        rows = slice(max(start - context, 0), max(end - context, 0))
        if rows.start >= rows.stop:
            continue
        scores, stored = layout.scores(rows, start, stop)
        scores *= LOG2_E
        new_maximum = torch.maximum(maximum[:, :, rows], scores.amax(-1, keepdim=True).ceil())
        p = torch.exp2(scores - new_maximum)
        decay = torch.exp2(maximum[:, :, rows] - new_maximum)
        maximum[:, :, rows] = new_maximum
        largest = scores.masked_fill(~stored, -torch.inf).amax(-1, keepdim=True).ceil()
        stored_maximum[:, :, rows] = torch.maximum(stored_maximum[:, :, rows], largest)
        levels = torch.exp2(stored_maximum[:, :, rows] - new_maximum)
        values, weight = layout.values(p, stored, levels, rows, start, stop)
        total[:, :, rows] = total[:, :, rows] * decay + weight
        output[:, :, rows] = output[:, :, rows] * decay + values
    return output / total


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"attention: the arithmetic is fp32 or fp64, not {dtype}")
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: expected q (Tq, Hq, D) and k, v (T, Hkv, D), got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1] or len(q) > len(k):
        raise ValueError(
            f"attention: {q.shape[1]} query heads cannot share {k.shape[1]} KV heads, or {len(q)} queries are "
            f"more than {len(k)} tokens"
        )


def fake_quantized(
    x: torch.Tensor, policy: ScalePolicy | str | None, tensor_scale: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """`x` (heads, ..., K) as NVFP4 along its last dimension holds it, in x's dtype; x itself for None.

    tensor_scale: a number, (heads,), or (heads, ..., 1). In fp64 the result is exact, in fp32 it is
    rounded once, by the tensor scale. Raises ValueError for a (heads,) of another length.
    """
    if policy is None:
        return x
    scale = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
    if scale.ndim == 1:
        if len(scale) != len(x):
            raise ValueError(f"{len(scale)} tensor scales for {len(x)} KV heads")
        scale = scale.view(-1, *[1] * (x.ndim - 1)).expand(*x.shape[:-1], 1)
    values, residual = quantize(x.float(), NVFP4, policy, tensor_scale=scale).values(torch.float32)
    return values.to(x.dtype) * residual.to(x.dtype)


def quantized_values(v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """V as stored: v (Hkv, T, D) in its dtype. Along tokens, tokens past the last whole block stay."""
    if options.v_group == "head_dim":
        return fake_quantized(v, options.v, options.v_scale)
    whole = v.shape[1] // BLOCK * BLOCK
    stored = fake_quantized(v[:, :whole].mT.contiguous(), options.v, options.v_scale).mT
    return torch.cat((stored, v[:, whole:]), dim=1)


class _Sequence:
    """Operands with what each query sees of them."""

    def __init__(self, operands: Operands, options: AttentionOptions) -> None:
        self.operands, self.options = operands, options
        tokens, queries = operands.k.shape[1], operands.q.shape[2]
        self.positions = torch.arange(tokens - queries, tokens, device=operands.q.device)
        self.boundary = options.boundary(self.positions)

    def scores(self, rows: slice, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (Hkv, group, rows, tile), and which of them are of stored tokens: (rows, tile) bool."""
        options, operands = self.options, self.operands
        tokens = torch.arange(start, stop, device=operands.q.device)
        positions = self.positions[rows].unsqueeze(-1)
        visible = tokens <= positions
        if options.sliding_window is not None:
            visible &= tokens > positions - options.sliding_window
        stored = (tokens >= options.sink) & (tokens < self.boundary[rows].unsqueeze(-1)) & visible
        full = operands.q[:, :, rows] @ operands.k[:, start:stop].mT.unsqueeze(1)
        scores = operands.q_stored[:, :, rows] @ operands.k_stored[:, start:stop].mT.unsqueeze(1)
        scores = torch.where(stored, scores, full)
        scores *= operands.q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
        if options.logits_soft_cap is not None:
            scores = options.logits_soft_cap * torch.tanh(scores / options.logits_soft_cap)
        return scores.masked_fill_(~visible, -torch.inf), stored

    def values(
        self, p: torch.Tensor, stored: torch.Tensor, levels: torch.Tensor, rows: slice, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """P times V of one tile, and the sum of P: p (Hkv, group, rows, tile) to (..., D) and (..., 1).

        levels: (..., 1), what no stored p is above, or 0 where no token was stored so far.
        """
        options, operands = self.options, self.operands
        full = p * ~stored
        result, total = full @ operands.v[:, start:stop].unsqueeze(1), full.sum(-1, keepdim=True)
        # Nothing else of P is quantized; a tile of sink and new tokens only has no such row.
        some = stored.any(-1).nonzero().flatten()
        if not len(some):
            return result, total
        p = quantized_p((p * stored)[:, :, some], levels[:, :, some], options)
        total[:, :, some] += p.sum(-1, keepdim=True)
        positions = self.positions[rows][some]
        if options.v is not None and options.v_group == "tokens" and not options.incomplete:
            p, own = self._own_block(p, positions, start)
            result[:, :, some] += own
        result[:, :, some] += p @ operands.v_stored[:, start:stop].unsqueeze(1)
        return result, total

    def _own_block(
        self, p: torch.Tensor, positions: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take out of P what falls into the query's own block, and multiply that by the block as
        quantized from the tokens up to the query.

        p: (Hkv, group, rows, tile). Returns the rest of p, and (Hkv, group, rows, D).
        """
        inside = (positions < start + p.shape[-1]).unsqueeze(-1)
        tokens = positions.unsqueeze(-1) // BLOCK * BLOCK + torch.arange(BLOCK, device=p.device)
        seen = inside & (tokens <= positions.unsqueeze(-1))
        v = self.operands.v
        blocks = v[:, tokens.clamp(max=v.shape[1] - 1)] * seen.unsqueeze(-1)  # (Hkv, rows, 16, D)
        blocks = fake_quantized(blocks.mT.contiguous(), self.options.v, self.options.v_scale)
        columns = torch.where(seen, tokens - start, 0)
        own = p.gather(-1, columns.expand(*p.shape[:2], -1, -1)) * seen
        rest = p * ~(inside & (torch.arange(p.shape[-1], device=p.device) >= tokens[:, :1] - start))
        return rest, torch.einsum("hgrt,hrdt->hgrd", own, blocks)


def quantized_p(p: torch.Tensor, levels: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """A tile of P as the product with stored V sees it: p (..., rows, tile) >= 0, in its own dtype.

    levels: (..., rows, 1), powers of two that no p of a row exceeds, or 0 for rows of zeros.
    A tile whose width is not whole blocks, at the end of the sequence, is completed with zeros.
    """
    if options.p is None:
        return p
    width = p.shape[-1]
    padded = F.pad(p, (0, -width % BLOCK))
    scale = 1.0
    if options.two_level_p:
        scale = (levels.float() / P_LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    return fake_quantized(padded, options.p, scale)[..., :width]
