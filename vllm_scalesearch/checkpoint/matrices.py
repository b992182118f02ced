"""From matrices that read one input to their codes: tensor scale, target, search, feedback, descent."""

from dataclasses import dataclass, replace

import torch

from vllm_scalesearch.checkpoint.gptq import SCALES, GptqOptions, damped, gptq, output_error, refine
from vllm_scalesearch.checkpoint.layout import stored_scale
from vllm_scalesearch.checkpoint.moments import MIN_TOKENS, InputMoments, block_moments
from vllm_scalesearch.formats import NVFP4, QuantizedTensor, finite_amax, tensor_scale_of
from vllm_scalesearch.search import METRICS, ScalePolicy, quantize


@dataclass(frozen=True)
class Recipe:
    """How a matrix is quantized.

    weights: rule of a `ScalePolicy`. metric: what the search minimises. gptq: None, or round with error
    feedback and scales chosen ``before`` by `metric`, or as it goes, by ``block`` or ``feedback`` (gptq.py).
    descent: passes of block coordinate descent afterwards. damping: see `gptq.GptqOptions`.
    correction: how much of the difference between what the unquantized model gives a layer and what the
    quantized one does is made up for by the weights' target, 0 to 1 (`target`).
    """

    weights: str = "paper"
    metric: str = "mse"
    gptq: str | None = None
    descent: int = 0
    damping: float = 0.03
    correction: float = 0.0

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; there are {', '.join(METRICS)}")
        ScalePolicy(self.weights).check_format(NVFP4)
        if self.gptq is not None and self.gptq not in SCALES:
            raise ValueError(f"--gptq {self.gptq}: choose from {', '.join(SCALES)}")
        for name, low, high in (("correction", 0, 1), ("damping", 0, 10), ("descent", 0, 1000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name} {getattr(self, name)}: must lie within {low} to {high}")

    @property
    def calibrated(self) -> bool:
        """Whether it needs second moments of the inputs."""
        return self.metric != "mse" or self.gptq is not None or self.descent > 0 or self.correction > 0

    def without_moments(self) -> "Recipe":
        """What is done for matrices that saw too few tokens."""
        return replace(self, metric="mse", gptq=None, descent=0, correction=0.0)


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix and how well it came out.

    weight: its codes. recipe: what was done in the end. fallback: why that is not what was asked for, or None.
    error, absmax_error: relative squared error with the chosen scales and with absmax ones: of the output,
    ``tr(D H D^T) / tr(W H W^T)``, where there are moments, else of the weights.
    """

    weight: QuantizedTensor
    recipe: Recipe
    fallback: str | None
    error: float
    absmax_error: float


def target(weight: torch.Tensor, moments: InputMoments, correction: float, damping: float) -> torch.Tensor:
    """The matrix that is rounded: W, moved so that inputs with errors in them give better outputs.

    With x the input that the layer gets and y the one of the unquantized model, ``|W y - V x|^2`` is least
    for ``V = W + W E[(y - x) x^T] E[x x^T]^-1`` (the normal equations; arXiv 2504.02692 takes it as the
    target of GPTQ). All of that step fits the calibration text too closely; `correction` is the part of it
    that is taken. weight: (N, K); returns (N, K) fp32.
    """
    if correction == 0 or moments.cross is None:
        return weight.float()
    h = damped(moments.hessian, damping)
    step = torch.linalg.solve(h, moments.cross.double().t() @ weight.double().t()).t()
    return weight.float() + correction * step.float()


def quantize_together(
    weights: dict[str, torch.Tensor], recipes: dict[str, Recipe], moments: InputMoments | None
) -> dict[str, Quantized]:
    """Quantize matrices that read the same input, with one tensor scale.

    weights: (N, K) of any float dtype by name. recipes: for each. moments: of the input; None without
    calibration. Raises ValueError that names the matrix for NaN or infinity in it, and for a recipe that
    needs moments where there are none.
    """
    used, fallback = dict(recipes), None
    if moments is not None and moments.tokens < MIN_TOKENS:
        fallback = f"saw {moments.tokens} tokens, fewer than {MIN_TOKENS}"
        used = {name: recipe.without_moments() for name, recipe in recipes.items()}
    targets = {}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}: the checkpoint's weight holds NaN or infinity")
        recipe = used[name]
        if recipe.calibrated and moments is None:
            raise ValueError(f"{name}: metric {recipe.metric!r} needs calibration; give --calibration")
        targets[name] = (
            target(weight, moments, recipe.correction, recipe.damping) if moments else weight.float()
        )
    amax = torch.stack([finite_amax(t) for t in targets.values()]).amax()
    scale = stored_scale(tensor_scale_of(amax))[1]
    hessian = moments.hessian if moments is not None and moments.tokens else None
    return {
        name: _quantize(
            targets[name], used[name], scale, hessian, fallback if recipes[name].calibrated else None
        )
        for name in weights
    }


def _quantize(
    weight: torch.Tensor,
    recipe: Recipe,
    scale: torch.Tensor,
    hessian: torch.Tensor | None,
    fallback: str | None,
) -> Quantized:
    options = GptqOptions(recipe.damping, recipe.gptq or "block", recipe.descent)
    if recipe.gptq is not None:
        before = None
        if recipe.gptq == "before":
            before = _searched(weight, recipe, scale, hessian).scales.view(torch.uint8)
        found = gptq(weight, hessian, NVFP4, recipe.weights, scale, options, before)
    else:
        found = _searched(weight, recipe, scale, hessian)
        if recipe.descent:
            found = refine(weight, hessian, found, recipe.weights, options)
    plain = quantize(weight, NVFP4, "absmax", tensor_scale=scale)
    return Quantized(
        found, recipe, fallback, _error(weight, found, hessian), _error(weight, plain, hessian)
    )  # fmt: skip


def _searched(
    weight: torch.Tensor, recipe: Recipe, scale: torch.Tensor, hessian: torch.Tensor | None
) -> QuantizedTensor:
    importance = None
    if recipe.metric == "wmse":
        importance = hessian.diagonal().contiguous()
    elif recipe.metric == "hessian":
        importance = block_moments(hessian, NVFP4.block_size)
    policy = ScalePolicy(recipe.weights, recipe.metric)
    return quantize(weight, NVFP4, policy, tensor_scale=scale, importance=importance)


def _error(weight: torch.Tensor, quantized: QuantizedTensor, hessian: torch.Tensor | None) -> float:
    if hessian is None:
        hessian = torch.eye(weight.shape[1], device=weight.device)
    whole = output_error(weight, torch.zeros_like(weight), hessian)
    return output_error(weight, quantized.dequantize(), hessian) / whole if whole > 0 else 0.0
