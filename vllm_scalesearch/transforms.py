"""Transforms of queries and keys that leave their scores alone and their quantization error smaller.

Two matrices of ScaleSearchAttention (arXiv 2605.12464), applied to post-RoPE row vectors, one pair per
KV head:

* **R, magnitude reduction.** ``q' = q R^-T`` and ``k' = k R`` have the scores of q and k. R is taken
  from second moments ``M_Q = E[q^T q]``, summed over the query heads that share the KV head, and
  ``M_K = E[k^T k]``. With square roots ``M = L^T L`` (upper triangular, the transposed Cholesky factor)
  and the singular value decomposition ``L_Q L_K^T = U S V^T``,

      R = L_K^-1 V S^(1/2)        R^-T = L_K^T V S^(-1/2)

  Then q' (summed over the group) and k' both have the second moment S: ``R^T M_K R = S`` because
  ``L_K R = V S^(1/2)``, and ``R^-1 M_Q R^-T = S^(-1/2) V^T (L_K L_Q^T)(L_Q L_K^T) V S^(-1/2) = S``.
  Other square roots (an orthogonal matrix times L) give the same R up to the signs of its columns.
* **H, incoherence.** An orthonormal Hadamard matrix spreads what is left over all channels; after R,
  ``H^T S H`` has the same value, tr(S) / head_dim, all along its diagonal (within each block of H).

R comes first: ``k'' = k (R H)``, ``q'' = q (R^-T H)``; H is its own inverse-transpose.

Everything here is fp64; what applies the matrices chooses its own precision.
"""

import functools
from dataclasses import dataclass

import torch

# R is applied in fp32, whose relative rounding of 2**-24 grows by R's condition number in the worst
# direction: at 2**12 it is still 2**-12, far below the 2**-4 of a rounding to E2M1.
MAX_CONDITION = 2.0**12


# --- incoherence ---------------------------------------------------------------------------------


@functools.cache
def _sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix


def hadamard(size: int) -> torch.Tensor:
    """Orthonormal, symmetric Hadamard matrix (size, size), fp64.

    Sylvester's construction where `size` is a power of two. Otherwise block diagonal, with blocks of the
    largest power of two that divides `size`: 96 gives three blocks of 32. Raises ValueError where that
    is 1, since the identity mixes nothing.
    """
    block = size & -size
    if size < 2 or block < 2:
        raise ValueError(f"no Hadamard matrix of size {size}: it must be even")
    return torch.block_diag(*[_sylvester(block)] * (size // block)) / block**0.5


# --- magnitude reduction -------------------------------------------------------------------------


class SecondMoments:
    """E[q^T q] summed over a group's query heads, and E[k^T k], of one layer; gathered in fp64.

    Vectors with a NaN or an infinity are refused: one of them would spoil every later batch.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        shape = (num_kv_heads, head_dim, head_dim)
        self._q = torch.zeros(shape, dtype=torch.float64, device=device)
        self._k = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Add a batch of post-RoPE vectors: q (T, Hq, D) and k (T, Hkv, D), any float dtype.

        Query head h belongs to KV head ``h // (Hq // Hkv)``. Raises ValueError for shapes that do not
        fit and for values that are not finite; nothing is added then.
        """
        heads, dim = self._k.shape[:2]
        if q.ndim != 3 or tuple(k.shape) != (len(q), heads, dim) or q.shape[2] != dim or q.shape[1] % heads:
            raise ValueError(
                f"second moments of {heads} KV heads of {dim}: got q {tuple(q.shape)} and k {tuple(k.shape)}"
            )
        q, k = q.to(self._q), k.to(self._k)
        if not (torch.isfinite(q).all() and torch.isfinite(k).all()):
            raise ValueError("second moments: q or k holds NaN or infinity")
        grouped = q.unflatten(1, (heads, -1))
        self._q += torch.einsum("thgd,thge->hde", grouped, grouped)
        self._k += torch.einsum("thd,the->hde", k, k)
        self.tokens += len(q)

    @property
    def q(self) -> torch.Tensor:
        """M_Q, (Hkv, D, D) fp64. Raises ValueError before the first token."""
        return self._mean(self._q)

    @property
    def k(self) -> torch.Tensor:
        """M_K, (Hkv, D, D) fp64. Raises ValueError before the first token."""
        return self._mean(self._k)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        if not self.tokens:
            raise ValueError("second moments: no token was added")
        return total / self.tokens


@dataclass(frozen=True, eq=False)
class MagnitudeReduction:
    """R of each KV head of a layer.

    r: (Hkv, D, D) fp64, for keys: ``k' = k @ r``.
    r_inverse_t: (Hkv, D, D) fp64, for queries: ``q' = q @ r_inverse_t``.
    condition: (Hkv,) fp64, largest over smallest singular value of R as computed; infinity where a
        second moment is singular to working precision, so that there is no R.
    fallback: (Hkv,) bool, heads whose condition exceeded the limit and whose R is the identity.
    """

    r: torch.Tensor
    r_inverse_t: torch.Tensor
    condition: torch.Tensor
    fallback: torch.Tensor

    def __str__(self) -> str:
        heads = self.fallback.nonzero().flatten().tolist()
        if not heads:
            return f"R for all {len(self.fallback)} KV heads, condition up to {self.condition.max():.3g}"
        return f"no R for KV heads {heads} of {len(self.fallback)}: second moments too badly conditioned"


def magnitude_reduction(
    m_q: torch.Tensor, m_k: torch.Tensor, *, max_condition: float = MAX_CONDITION
) -> MagnitudeReduction:
    """R from second moments, by the formula at the top of this file.

    m_q, m_k: (Hkv, D, D), symmetric; computed with in fp64. A head gets the identity instead (see
    `MagnitudeReduction.fallback`) where a moment is not positive definite to fp64's precision, as after
    fewer tokens than head_dim, or where the condition number of R is above `max_condition`. Nothing is
    added to the diagonal to save such a head: how much would be a choice that no error measures.
    Raises ValueError for other shapes and for NaN or infinity.
    """
    if m_q.shape != m_k.shape or m_q.ndim != 3 or m_q.shape[1] != m_q.shape[2]:
        raise ValueError(f"moments must both be (heads, D, D), got {tuple(m_q.shape)} and {tuple(m_k.shape)}")
    m_q, m_k = m_q.double(), m_k.double()
    if not (torch.isfinite(m_q).all() and torch.isfinite(m_k).all()):
        raise ValueError("a second moment holds NaN or infinity")
    eye = torch.eye(m_q.shape[1], dtype=torch.float64, device=m_q.device).expand_as(m_q)
    definite = _is_definite(m_q) & _is_definite(m_k)
    safe = definite.view(-1, 1, 1)
    # linalg.cholesky gives the lower factor C with M = C C^T, so L = C^T.
    l_q = torch.linalg.cholesky(torch.where(safe, m_q, eye)).mT
    l_k = torch.linalg.cholesky(torch.where(safe, m_k, eye)).mT
    _, s, v_t = torch.linalg.svd(l_q @ l_k.mT)
    root = s.sqrt().unsqueeze(-2)
    r = torch.linalg.solve_triangular(l_k, v_t.mT * root, upper=True)
    r_inverse_t = l_k.mT @ v_t.mT / root
    singular = torch.linalg.svdvals(r)
    condition = torch.where(definite, singular[:, 0] / singular[:, -1], torch.inf)
    fallback = ~(condition <= max_condition)
    keep = ~fallback.view(-1, 1, 1)
    return MagnitudeReduction(
        torch.where(keep, r, eye), torch.where(keep, r_inverse_t, eye), condition, fallback
    )


def _is_definite(moments: torch.Tensor) -> torch.Tensor:
    """(Hkv,) bool: the smallest eigenvalue stands clear of what fp64 rounding makes of zero."""
    values = torch.linalg.eigvalsh(moments)
    noise = moments.shape[-1] * torch.finfo(torch.float64).eps
    return values[:, 0] > 16 * noise * values[:, -1]


# --- both ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HeadTransform:
    """R and H as one matrix per KV head: ``k' = k @ k_matrix``, ``q' = q @ q_matrix``.

    Both (Hkv, D, D) fp64; q_matrix is the inverse-transpose of k_matrix.
    """

    k_matrix: torch.Tensor
    q_matrix: torch.Tensor


def head_transform(
    num_kv_heads: int, head_dim: int, reduction: MagnitudeReduction | None, use_hadamard: bool
) -> HeadTransform | None:
    """R (or none) followed by H (or not), or None where neither is asked for.

    Raises ValueError when `reduction` is of another layer: other heads or another head size.
    """
    if reduction is not None and reduction.r.shape[:2] != (num_kv_heads, head_dim):
        raise ValueError(
            f"R is of {reduction.r.shape[0]} KV heads of {reduction.r.shape[1]}, the keys have "
            f"{num_kv_heads} of {head_dim}"
        )
    if reduction is None and not use_hadamard:
        return None
    h = hadamard(head_dim) if use_hadamard else torch.eye(head_dim, dtype=torch.float64)
    if reduction is None:
        return HeadTransform(*[h.expand(num_kv_heads, -1, -1)] * 2)
    h = h.to(reduction.r.device)
    return HeadTransform(reduction.r @ h, reduction.r_inverse_t @ h)
