"""Rounding one block of every row with error feedback inside it, as one Triton kernel for CUDA GPUs.

`checkpoint.gptq` says what it computes and does the same in torch, with some 16 launches a column; that is
too slow on a GPU for all but very large matrices. Sums are added in another order than torch adds them, so
a choice between two scales of nearly the same error may differ.
"""

import torch
import triton
import triton.language as tl

_ROWS = 32


@triton.jit
def _round_e2m1(x):
    y = tl.minimum(x, 6.0)
    step = tl.where(y < 2.0, 0.5, tl.where(y < 4.0, 1.0, 2.0))
    # Adding and subtracting 1.5 * 2**23 steps rounds to a whole number of them, ties to even.
    magic = step * 12582912.0
    return (y + magic) - magic


@triton.jit
def _feedback(work, factor_ptr, scale, columns, BLOCK: tl.constexpr):
    reciprocal = 1.0 / scale
    left = work
    loss = tl.zeros_like(scale)
    values = tl.zeros_like(work)
    errors = tl.zeros_like(work)
    for j in tl.static_range(BLOCK):
        here = (columns == j)[None, :]
        column = tl.sum(tl.where(here, left, 0.0), 1)
        rounded = _round_e2m1(tl.abs(column) * reciprocal) * scale
        rounded = tl.where(column < 0, -rounded, rounded)
        error = (column - rounded) / tl.load(factor_ptr + j * BLOCK + j)
        loss += error * error
        values = tl.where(here, rounded[:, None], values)
        errors = tl.where(here, error[:, None], errors)
        row = tl.load(factor_ptr + j * BLOCK + columns, mask=columns > j, other=0.0)
        left -= error[:, None] * row[None, :]
    return values, errors, loss


@triton.jit
def _kernel(
    work_ptr, factor_ptr, scales_ptr, values_ptr, errors_ptr, best_ptr, loss_ptr,
    rows_total, candidates, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = rows < rows_total
    place = rows[:, None] * BLOCK + columns[None, :]
    work = tl.load(work_ptr + place, mask=inside[:, None], other=0.0)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int32)
    for c in range(candidates):
        scale = tl.load(scales_ptr + c * rows_total + rows, mask=inside, other=1.0)
        _, _, loss = _feedback(work, factor_ptr, scale, columns, BLOCK)
        better = loss < least
        least = tl.where(better, loss, least)
        best = tl.where(better, c, best)
    scale = tl.load(scales_ptr + best * rows_total + rows, mask=inside, other=1.0)
    values, errors, loss = _feedback(work, factor_ptr, scale, columns, BLOCK)
    tl.store(values_ptr + place, values, mask=inside[:, None])
    tl.store(errors_ptr + place, errors, mask=inside[:, None])
    tl.store(best_ptr + rows, best, mask=inside)
    tl.store(loss_ptr + rows, loss, mask=inside)


def round_block(
    work: torch.Tensor, factor: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a block of every row with each candidate scale and keep the best.

    work: (N, block) fp32 over the tensor scale. factor: (block, block) fp32, upper triangular. scales:
    (C, N) fp32 in ascending order; of equal errors the first wins. Returns values and errors (N, block),
    the index of the chosen candidate (N,) int32 and its sum of squared errors (N,).
    """
    rows, block = work.shape
    work, factor, scales = work.contiguous(), factor.contiguous(), scales.contiguous()
    values, errors = torch.empty_like(work), torch.empty_like(work)
    best = torch.empty(rows, dtype=torch.int32, device=work.device)
    loss = torch.empty(rows, dtype=torch.float32, device=work.device)
    _kernel[(triton.cdiv(rows, _ROWS),)](
        work, factor, scales, values, errors, best, loss, rows, scales.shape[0],
        BLOCK=block, ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
    return values, errors, best, loss
