"""Second moments of a layer's inputs, gathered a batch at a time."""

import torch

# Fewer tokens than this say too little about a block's 16 x 16 moments (136 numbers).
MIN_TOKENS = 256


class InputMoments:
    """E[x x^T] of the inputs x that a group of matrices will see, and what their outputs should be instead.

    hessian: (K, K) fp32. cross: (K, K) fp32, E[(y - x) x^T], where y is the input that the unquantized model
    gives; None unless asked for. amax: the largest magnitude of the inputs before they are quantized.
    tokens: how many were seen.
    """

    def __init__(self, width: int, device: torch.device | str, with_cross: bool) -> None:
        self.tokens = 0
        self.amax = 0.0
        self._weight = 0.0
        self._hessian = torch.zeros(width, width, device=device)
        self._cross = torch.zeros(width, width, device=device) if with_cross else None

    def add(
        self,
        inputs: torch.Tensor,
        quantized: torch.Tensor | None = None,
        original: torch.Tensor | None = None,
        token_weights: torch.Tensor | None = None,
    ) -> None:
        """Add a batch. All (T, K), any float dtype.

        inputs: as they arrive. quantized: as they are multiplied, if that differs. original: those of the
        unquantized model. token_weights: (T,), how much each token counts.
        Raises ValueError for NaN or infinity, which would spoil every other token's part.
        """
        x = (inputs if quantized is None else quantized).float()
        if not torch.isfinite(x).all():
            raise ValueError("calibration: a layer's input holds NaN or infinity")
        weighted = x if token_weights is None else x * token_weights.float().unsqueeze(1)
        self._hessian += weighted.t() @ x
        if self._cross is not None:
            self._cross += (original.float() - x).t() @ weighted
        self._weight += float(len(x) if token_weights is None else token_weights.double().sum())
        self.tokens += len(x)
        if len(x):
            self.amax = max(self.amax, float(inputs.abs().max()))

    @property
    def hessian(self) -> torch.Tensor:
        """(K, K) fp32. Raises ValueError before the first token."""
        return self._mean(self._hessian)

    @property
    def cross(self) -> torch.Tensor | None:
        """(K, K) fp32, or None. Raises ValueError before the first token."""
        return None if self._cross is None else self._mean(self._cross)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        if not self.tokens:
            raise ValueError("second moments: no token was added")
        return total / self._weight


def block_moments(hessian: torch.Tensor, block: int) -> torch.Tensor:
    """The (K // block, block, block) diagonal blocks of (K, K) second moments, for metric `hessian`."""
    return torch.stack([hessian[i : i + block, i : i + block] for i in range(0, hessian.shape[0], block)])
