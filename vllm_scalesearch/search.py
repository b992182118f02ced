"""ScaleSearch: choose each block's scale by the error that it leaves, not by the block's maximum.

Method: "Search Your Block Floating Point Scales!", arXiv 2605.12464, section 3. This is the
reference, in plain torch, and the specification of every kernel.

The definition, for one block, all arithmetic in fp32 and each operation rounded once:

1. ``y = x * (1 / tensor_scale)``; ``c0`` is the code that absmax scaling takes (formats.py).
2. The candidates are codes derived from ``c0`` by a `ScalePolicy`, clamped to the format's range,
   in ascending order.
3. Candidate scale s: ``q = E2M1(|y| * (1 / s))``, ``d = s * q - |y|`` and the error is the sum of
   ``d * d``, added in a tree: neighbours first, then neighbouring pairs, and so on.
4. The least error wins. **Tie: the smallest code among those of equal error.**
5. The block's codes are the winner's ``q`` with the signs of ``x``.

Where ``|y| / s`` lies exactly between two grid points the product with the rounded reciprocal may
fall on either side; both are equally near. MXFP4 has no tensor scale; there y is x divided by the
power of two of ``c0``, which is exact and keeps the squared errors away from underflow.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_scalesearch.formats import (
    MXFP4,
    NVFP4,
    BlockFormat,
    QuantizedTensor,
    e2m1_codes,
    finite_amax,
    pack_e2m1,
    round_to_e2m1,
    tensor_scale_of,
)

METRICS = ("mse", "wmse", "hessian")

# Offsets from the absmax code. NVFP4: `paper` is the window of arXiv 2605.12464; `exact` holds the
# MSE optimum wherever no code saturates (arXiv 2606.07618) and E4M3 is not subnormal, which leaves
# out blocks some 30,000 times smaller than the tensor's largest value; `fast` is the best set of four by
# benchmarks/quant_error.py. MXFP4: one step up avoids all clipping, and a further step only drops
# grid points, so +1 is the end; two steps down costs the largest value at least (4 - 6/4)^2 = 6.25
# squared units of the absmax scale, more than the others can gain (31 / 16), so -1 is the other end.
_OFFSETS = {
    "absmax": {NVFP4.name: (0,), MXFP4.name: (0,)},
    "fast": {NVFP4.name: (-1, 0, 4, 5), MXFP4.name: (0, 1)},
    "paper": {NVFP4.name: tuple(range(-2, 7)), MXFP4.name: (0, 1)},
    "exact": {NVFP4.name: tuple(range(-3, 8)), MXFP4.name: (-1, 0, 1)},
}
POLICIES = ("absmax", "4over6", "fast", "paper", "exact", "full")
_EXPLICIT = re.compile(r"(window|offsets):([+-]?\d+(?:,[+-]?\d+)*)")
_LARGEST_OFFSET = 255

# Blocks * candidates * block size worked on at once: fits a core's L2 on the CPU, and keeps the
# temporary tensors of a large activation within tens of MB on a GPU.
_CHUNK_VALUES = {"cpu": 1 << 18, "cuda": 1 << 23}


def _numbers(match: re.Match) -> list[int]:
    return [int(number) for number in match[2].split(",")]


@functools.cache
def _offsets_of(rule: str, fmt_name: str) -> tuple[int, ...] | None:
    if rule in _OFFSETS:
        return _OFFSETS[rule][fmt_name]
    match = _EXPLICIT.fullmatch(rule)
    if match is None:
        return None
    numbers = _numbers(match)
    if match[1] == "window":
        return tuple(range(numbers[0], numbers[1] + 1))
    return tuple(sorted(set(numbers)))


@dataclass(frozen=True)
class ScalePolicy:
    """Which scale codes a search tries, and how it measures the error of each.

    rule: a name of `POLICIES`, ``window:LO,HI`` (all offsets from LO to HI) or ``offsets:A,B,...``,
    offsets counted in codes from the absmax code.
    metric: ``mse``; ``wmse`` and ``hessian`` weigh the error by `importance` (see `quantize`).
    """

    rule: str = "paper"
    metric: str = "mse"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; there are {', '.join(METRICS)}")
        if not isinstance(self.rule, str):
            raise ValueError(f"a scale policy is written as text, got {self.rule!r}")
        if self.rule in POLICIES:
            return
        match = _EXPLICIT.fullmatch(self.rule)
        if match is None:
            raise ValueError(
                f"unknown scale policy {self.rule!r}; there are {', '.join(POLICIES)}, "
                "'window:LO,HI' and 'offsets:A,B,...'"
            )
        numbers = _numbers(match)
        if match[1] == "window" and (len(numbers) != 2 or numbers[0] > numbers[1]):
            raise ValueError(f"scale policy {self.rule!r}: a window is 'window:LO,HI' with LO <= HI")
        if max(map(abs, numbers)) > _LARGEST_OFFSET:
            raise ValueError(f"scale policy {self.rule!r}: an offset lies within +-{_LARGEST_OFFSET}")

    @classmethod
    def of(cls, policy: "ScalePolicy | str") -> "ScalePolicy":
        """`policy` itself, or the policy that a rule's text names."""
        return policy if isinstance(policy, ScalePolicy) else cls(policy)

    def check_format(self, fmt: BlockFormat) -> None:
        """Raise ValueError when the rule has no meaning for `fmt`."""
        if self.rule == "4over6" and fmt is not NVFP4:
            raise ValueError(f"policy '4over6' needs fractional scales, which {fmt.name} does not have")

    def offsets(self, fmt: BlockFormat) -> tuple[int, ...] | None:
        """Ascending offsets from the absmax code, or None when the rule is not made of offsets."""
        return _offsets_of(self.rule, fmt.name)

    def candidate_count(self, fmt: BlockFormat) -> int:
        """How many scales are tried for a block."""
        offsets = self.offsets(fmt)
        if offsets is not None:
            return len(offsets)
        return 2 if self.rule == "4over6" else fmt.max_code - fmt.min_code + 1

    def candidate_codes(self, amax: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
        """Candidate scale codes in ascending order, clamped to the format's range.

        amax: (B,) fp32 block maxima over the tensor scale. Returns (candidates, B) int32.
        """
        self.check_format(fmt)
        if self.rule == "full":
            codes = torch.arange(fmt.min_code, fmt.max_code + 1, dtype=torch.int32, device=amax.device)
            return codes.unsqueeze(-1).expand(-1, amax.shape[0])
        base = fmt.absmax_codes(amax)
        if self.rule == "4over6":
            # arXiv 2512.02010: the largest value becomes 6 or 4.
            codes = torch.stack((base, fmt.absmax_codes(amax, 4.0)))
        else:
            offsets = self.offsets(fmt)
            if offsets[-1] - offsets[0] == len(offsets) - 1:  # one operation, not one for each
                window = torch.arange(offsets[0], offsets[-1] + 1, dtype=torch.int32, device=base.device)
                codes = base + window.unsqueeze(-1)
            else:
                codes = torch.stack([base + offset for offset in offsets])
        return codes.clamp_(fmt.min_code, fmt.max_code)


def quantize(
    x: torch.Tensor,
    fmt: BlockFormat = NVFP4,
    policy: ScalePolicy | str = "paper",
    *,
    per_row: bool = False,
    tensor_scale: torch.Tensor | None = None,
    importance: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Quantize `x` along its last dimension with searched block scales.

    x: (..., K) bf16, fp16 or fp32; K a multiple of the block size.
    per_row: one tensor scale for each row of the last dimension instead of one for the tensor.
    tensor_scale: fp32, scalar or (..., 1), at least 2**-126: use this one; larger values saturate.
    importance: for ``wmse`` (K,) fp32 weights E[x^2] of the input channels, for ``hessian``
        (K // block, block, block) fp32 second moments E[x x^T] of each block's channels.
    Raises ValueError for a width that is not whole blocks, for another dtype, and for a metric
    without its importance or the reverse.
    """
    policy = ScalePolicy.of(policy)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"quantize: expected bf16, fp16 or fp32, got {x.dtype}")
    fmt.check_width(x.shape[-1], "quantize")
    _check_importance(importance, policy, x.shape[-1], fmt)
    if fmt.has_tensor_scale:
        if tensor_scale is None:
            tensor_scale = tensor_scale_of(finite_amax(x, dim=-1 if per_row else None))
    elif tensor_scale is not None:
        raise ValueError(f"quantize: {fmt.name} has no tensor scale")
    else:
        tensor_scale = torch.ones((), device=x.device)

    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    packed = torch.empty(rows.shape[0], rows.shape[1] // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows.shape[0], rows.shape[1] // fmt.block_size, dtype=torch.uint8, device=x.device)
    for part, elements, codes in searched_rows(rows, tensor_scale, fmt, policy, importance):
        packed[part] = pack_e2m1(e2m1_codes(elements)).view(elements.shape[0], -1)
        scales[part] = codes
    return QuantizedTensor(
        packed.view(*x.shape[:-1], packed.shape[-1]),
        scales.view(*x.shape[:-1], scales.shape[-1]).view(fmt.scale_dtype),
        tensor_scale.float(),
        fmt,
    )


def searched_rows(
    rows: torch.Tensor,
    tensor_scale: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy,
    importance: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The search itself, a few rows at a time; `quantize` checks and packs around it.

    rows: (R, K). tensor_scale: fp32, a scalar for all rows or (R, 1).
    Yields (slice of rows r, elements (r, K) fp32 on the E2M1 grid, scale codes (r, K // block)
    uint8). Works without waiting for the device, so it can be captured in a CUDA graph.
    """
    reciprocal = (1.0 / tensor_scale).reshape(tensor_scale.numel(), 1).expand(rows.shape[0], 1)
    chunk = _CHUNK_VALUES["cpu" if rows.device.type == "cpu" else "cuda"]
    step = max(1, chunk // max(1, rows.shape[1] * policy.candidate_count(fmt)))
    for start in range(0, rows.shape[0], step):
        part = slice(start, start + step)
        blocks = rows[part].float().reshape(-1, fmt.block_size)
        per_block = reciprocal[part].expand(-1, rows.shape[1] // fmt.block_size).reshape(-1, 1)
        elements, codes = _search_blocks(blocks, per_block, fmt, policy, importance)
        count = len(rows[part])
        yield part, elements.view(count, rows.shape[1]), codes.view(count, -1)


def _check_importance(
    importance: torch.Tensor | None, policy: ScalePolicy, width: int, fmt: BlockFormat
) -> None:
    if policy.metric == "mse":
        if importance is not None:
            raise ValueError("quantize: metric 'mse' takes no importance; use 'wmse' or 'hessian'")
        return
    block = fmt.block_size
    shape = (width,) if policy.metric == "wmse" else (width // block, block, block)
    if importance is None or tuple(importance.shape) != shape:
        got = None if importance is None else tuple(importance.shape)
        raise ValueError(f"quantize: metric {policy.metric!r} needs importance {shape}, got {got}")


def _search_blocks(
    blocks: torch.Tensor,
    reciprocal: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements (B, block) fp32 and scale codes (B,) uint8 of fp32 blocks, `reciprocal` (B, 1) of
    their tensor scale."""
    magnitude = blocks.abs()
    amax = magnitude.amax(dim=-1)
    finite = torch.isfinite(amax)  # amax carries NaN; whatever else such a block gets is replaced
    if fmt.has_tensor_scale:
        # Far above the largest value every element saturates; the bound keeps the error finite.
        magnitude.mul_(reciprocal).clamp_(max=2.0**40)
        amax = (amax * reciprocal.squeeze(-1)).clamp_(max=2.0**40)
    codes = policy.candidate_codes(amax, fmt)
    if not fmt.has_tensor_scale:
        unit = fmt.absmax_codes(amax).clamp_(fmt.min_code, fmt.max_code)
        magnitude = torch.ldexp(magnitude, 127 - unit.unsqueeze(-1))

    def scales_of(codes: torch.Tensor) -> torch.Tensor:
        if fmt.has_tensor_scale:
            return fmt.decode_scales(codes)
        # Beyond 2**+-60 of the absmax scale every element saturates or vanishes.
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), (codes - unit).clamp(-60, 60))

    if codes.shape[0] == 1:
        best = codes[0]
    else:
        error = _candidate_errors(magnitude, blocks, scales_of(codes), policy.metric, importance)
        best = torch.where(error == error.amin(dim=0), codes, fmt.max_code).amin(dim=0)
    elements = round_to_e2m1(magnitude.mul_((1.0 / scales_of(best)).unsqueeze(-1))).copysign_(blocks)
    elements = torch.where(finite.unsqueeze(-1), elements, 0)
    return elements, torch.where(finite, best, fmt.nan_code).to(torch.uint8)


def _candidate_errors(
    magnitude: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    metric: str,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """Error of each candidate: magnitude (B, block), scales (C, B) to (C, B), all fp32.

    The work has the block's elements first and the blocks last, so that every operation runs along
    contiguous memory. `blocks` has the signs of `magnitude`.
    """
    target = magnitude.t().contiguous().unsqueeze(1)  # (block, 1, B)
    deviation = round_to_e2m1(target * (1.0 / scales)).mul_(scales).sub_(target)  # s * q - |y|
    if metric == "hessian":
        sign = torch.sign(blocks).t().unsqueeze(1)
        deviation = (deviation * sign).unflatten(-1, (-1, importance.shape[0]))
        return torch.einsum("icrb,bij,jcrb->crb", deviation, importance, deviation).flatten(1)
    squares = deviation.square_()
    if metric == "wmse":
        weights = importance.view(-1, blocks.shape[-1]).t().unsqueeze(1)  # (block, 1, blocks a row)
        squares = (squares.unflatten(-1, (-1, weights.shape[-1])) * weights.unsqueeze(2)).flatten(2)
    while squares.shape[0] > 1:
        squares = squares[0::2] + squares[1::2]
    return squares[0]
