"""GPTQ with searched block scales, and block coordinate descent after it.

One matrix at a time. W: (N, K) is rounded to Q, and with D = Q - W and the second moments H = E[x x^T] of
its inputs the error of its output is ``tr(D H D^T)``.

* **GPTQ** (arXiv 2210.17323): columns are rounded from left to right, and what each one loses is made up
  by those after it, as well as continuous values could. With the Cholesky factor ``H^-1 = U^T U`` (U upper
  triangular) column j of the updated weights gives ``e = (w_j - q_j) / U_jj``, columns k > j get
  ``w_k -= e U_jk``, and the whole error is the sum of all ``e^2``.
* **Search as it goes**, on the updated weights, in one of two ways. ``block`` takes the scale of least
  ``dw^T H_bb dw`` under the block's own 16 x 16 part of H, as metric `hessian` does. ``feedback`` rounds the
  block with every candidate and takes the least sum of ``e^2``, which is what the scale costs in the end if
  later columns make up for it as continuous values could; that fits the calibration text more closely.
* **Descent.** Afterwards, one block at a time with all others fixed, the error is a quadratic form in the
  block's own 16 values with the minimum ``t = W_b - (D H_b - D_b H_bb) H_bb^-1``. The block is rounded again
  from there, as above with U of ``H_bb^-1``, with every candidate scale; it is kept where it lowers the
  error, so no pass can raise it. A tie keeps what was there.

The tie rule and the candidates are those of search.py; elements are rounded as formats.py rounds them.
"""

from dataclasses import dataclass

import torch

from vllm_scalesearch.formats import (
    BlockFormat,
    QuantizedTensor,
    decode_e2m1,
    e2m1_codes,
    pack_e2m1,
    round_to_e2m1,
    unpack_e2m1,
)
from vllm_scalesearch.search import ScalePolicy, quantize

# Columns whose updates reach the rest of the matrix together; a multiple of every block size.
_LAZY_COLUMNS = 128
# Candidates x rows x block worked on at once on the CPU.
_CHUNK_VALUES = 1 << 18


SCALES = ("before", "block", "feedback")


@dataclass(frozen=True)
class GptqOptions:
    """How `gptq` works.

    damping: part of H's mean diagonal that is added to its diagonal.
    scales: ``before``: those that `gptq` is given; ``block`` or ``feedback``: chosen as it goes.
    descent: passes of block coordinate descent afterwards.
    """

    damping: float = 0.01
    scales: str = "block"
    descent: int = 0

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise ValueError(f"GPTQ's scales are chosen {', '.join(SCALES)}, not {self.scales!r}")


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H with `damping` times its mean diagonal added to its diagonal; (K, K), fp64.

    Channels that were never active get the mean diagonal as well, so that H has an inverse.
    Raises ValueError for a matrix with NaN or infinity.
    """
    h = hessian.double().clone()
    if not torch.isfinite(h).all():
        raise ValueError("second moments hold NaN or infinity")
    diagonal = h.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    diagonal += torch.where(diagonal > 0, damping * mean, mean)
    return h


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with ``H^-1 = U^T U``; hessian: (..., K, K) fp64, positive definite.

    Raises torch.linalg.LinAlgError where it is not.
    """
    # H = L L^T reversed in both directions gives H = R R^T with R upper triangular, hence
    # H^-1 = (R^-1)^T R^-1 and U = R^-1, without forming the inverse.
    flipped = torch.linalg.cholesky(hessian.flip(-2, -1)).flip(-2, -1)
    eye = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    return torch.linalg.solve_triangular(flipped, eye, upper=True)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor,
    options: GptqOptions = GptqOptions(),
    scales: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Quantize a matrix with error feedback, by the algorithm at the top of this file.

    weight: (N, K), finite. hessian: (K, K), E[x x^T]. tensor_scale: fp32 scalar, used as it is.
    scales: (N, K // block) block scale codes, uint8, chosen before; needed where `options.scales` says so.
    Raises ValueError for shapes that do not fit, and for moments with NaN or infinity.
    """
    policy = ScalePolicy.of(policy)
    rows, width = weight.shape
    fmt.check_width(width, "gptq")
    if tuple(hessian.shape) != (width, width):
        raise ValueError(f"gptq: a weight of width {width} needs H of that width, got {tuple(hessian.shape)}")
    if options.scales == "before" and (
        scales is None or tuple(scales.shape) != (rows, width // fmt.block_size)
    ):
        raise ValueError("gptq: without search as it goes it needs the scale code of every block")
    h = damped(hessian, options.damping)
    factor = inverse_factor(h).float()
    unit = float(tensor_scale)
    target = weight.float() / unit
    values = torch.empty_like(target)
    codes = torch.empty(rows, width // fmt.block_size, dtype=torch.int32, device=weight.device)
    work = target.clone()
    block, one = fmt.block_size, torch.ones((), device=weight.device)
    for start in range(0, width, _LAZY_COLUMNS):
        end = min(start + _LAZY_COLUMNS, width)
        errors = work.new_empty(rows, end - start)
        for first in range(start, end, block):
            columns = slice(first, first + block)
            fixed = None
            if options.scales == "before":
                fixed = scales[:, first // block].int()
            elif options.scales == "block":
                own = h[columns, columns].float().unsqueeze(0)
                by_block = ScalePolicy(policy.rule, "hessian")
                chosen = quantize(work[:, columns], fmt, by_block, tensor_scale=one, importance=own)
                fixed = chosen.scales.view(torch.uint8).flatten().int()
            found, chosen, error, _ = _round_block(
                work[:, columns], factor[columns, columns], fmt, policy, fixed
            )
            values[:, columns], codes[:, first // block] = found, chosen
            errors[:, first - start : first - start + block] = error
            work[:, first + block : end] -= error @ factor[columns, first + block : end]
        work[:, end:] -= errors @ factor[start:end, end:]
    h = h.float()
    for _ in range(options.descent):
        if not _descend(target, values, codes, h, fmt, policy, options.scales != "before"):
            break
    return _quantized(values, codes, fmt, tensor_scale)


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantized: QuantizedTensor,
    policy: ScalePolicy | str,
    options: GptqOptions,
) -> QuantizedTensor:
    """`options.descent` passes of block coordinate descent on a matrix that is quantized already.

    Shapes as in `gptq`. The output error under the damped H does not rise.
    """
    fmt, policy = quantized.format, ScalePolicy.of(policy)
    h = damped(hessian, options.damping).float()
    target = weight.float() / float(quantized.tensor_scale)
    codes = quantized.scales.view(torch.uint8).int()
    elements = decode_e2m1(unpack_e2m1(quantized.packed)).unflatten(-1, (-1, fmt.block_size))
    values = (elements * fmt.decode_scales(codes).unsqueeze(-1)).flatten(1)
    for _ in range(options.descent):
        if not _descend(target, values, codes, h, fmt, policy, options.scales != "before"):
            break
    return _quantized(values, codes, fmt, quantized.tensor_scale)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H D^T)`` of two (N, K) matrices, D their difference, in fp32."""
    difference = (quantized - weight).float()
    return float(((difference @ hessian.float()) * difference).sum())


def _round_block(
    work: torch.Tensor,
    factor: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy,
    fixed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round one block of every row with error feedback inside the block.

    work: (N, block) fp32 over the tensor scale. factor: (block, block), U of the block.
    fixed: (N,) int32 scale codes, or None to try the policy's candidates.
    Returns values (N, block), codes (N,) int32, errors e (N, block) and their sum of squares (N,).
    """
    step = max(1, _CHUNK_VALUES // (fmt.block_size * policy.candidate_count(fmt)))
    if work.device.type == "cpu" and work.shape[0] > step:
        parts = [
            _round_block(
                work[first : first + step],
                factor,
                fmt,
                policy,
                None if fixed is None else fixed[first : first + step],
            )
            for first in range(0, work.shape[0], step)
        ]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if fixed is None:
        candidates = policy.candidate_codes(work.abs().amax(-1).clamp(max=2.0**40), fmt)
    else:
        candidates = fixed.unsqueeze(0)
    if work.device.type == "cuda":
        from vllm_scalesearch.ops.triton_round_block import round_block

        values, errors, best, loss = round_block(work, factor, fmt.decode_scales(candidates))
        return values, candidates.gather(0, best.long().unsqueeze(0))[0], errors, loss
    if candidates.shape[0] > 1:
        loss = _feedback(work, factor, fmt.decode_scales(candidates))[2]
        best = loss.amin(dim=0)
        chosen = torch.where(loss == best, candidates, fmt.max_code).amin(dim=0)
    else:
        chosen = candidates[0]
    values, errors, loss = _feedback(work, factor, fmt.decode_scales(chosen.unsqueeze(0)))
    return values[0].t(), chosen, errors[0].t(), loss[0]


def _feedback(
    work: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GPTQ inside a block, for candidates beside each other.

    work: (N, block). scales: (C, N). Returns values and errors (C, block, N) and losses (C, N).
    """
    size = work.shape[1]
    # Rows last, so that every operation runs along contiguous memory.
    left = work.t().unsqueeze(0).repeat(scales.shape[0], 1, 1)  # (C, block, N)
    values, errors = torch.empty_like(left), torch.empty_like(left)
    reciprocal = 1.0 / scales
    for j in range(size):
        column = left[:, j]
        rounded = round_to_e2m1((column * reciprocal).abs_()).mul_(scales).copysign_(column)
        error = (column - rounded) / factor[j, j]
        values[:, j], errors[:, j] = rounded, error
        if j + 1 < size:
            left[:, j + 1 :] -= factor[j, j + 1 :].view(1, -1, 1) * error.unsqueeze(1)
    return values, errors, errors.square().sum(1)


def _descend(
    target: torch.Tensor,
    values: torch.Tensor,
    codes: torch.Tensor,
    h: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy,
    research: bool,
) -> bool:
    """One pass over all blocks, in place on `values` and `codes`. Returns whether anything changed."""
    block, width = fmt.block_size, target.shape[1]
    diagonal = torch.stack([h[f : f + block, f : f + block] for f in range(0, width, block)]).double()
    factors, inverses = inverse_factor(diagonal).float(), torch.linalg.inv(diagonal).float()
    difference = values - target
    changed = False
    for index in range(width // block):
        columns = slice(index * block, (index + 1) * block)
        own = h[columns, columns]
        pull = difference @ h[:, columns] - difference[:, columns] @ own
        minimum = target[:, columns] - pull @ inverses[index]
        fixed = None if research else codes[:, index]
        found, chosen, _, loss = _round_block(minimum, factors[index], fmt, policy, fixed)
        before = values[:, columns] - minimum
        better = loss < ((before @ own) * before).sum(1)
        if not better.any():
            continue
        changed = True
        values[:, columns] = torch.where(better.unsqueeze(1), found, values[:, columns])
        codes[:, index] = torch.where(better, chosen, codes[:, index])
        difference[:, columns] = values[:, columns] - target[:, columns]
    return changed


def _quantized(
    values: torch.Tensor, codes: torch.Tensor, fmt: BlockFormat, tensor_scale: torch.Tensor
) -> QuantizedTensor:
    scales = fmt.decode_scales(codes)
    elements = values.unflatten(-1, (-1, fmt.block_size)) / scales.unsqueeze(-1)  # exact
    return QuantizedTensor(
        pack_e2m1(e2m1_codes(elements.flatten(1))),
        codes.to(torch.uint8).view(fmt.scale_dtype),
        tensor_scale.float(),
        fmt,
    )
