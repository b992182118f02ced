"""Channel scales moved from a layer's inputs into its weights, where the model as a whole stays the same.

A block of 16 inputs shares a scale, so one large channel costs the others their resolution, and in W4A4 that
is most of the error. Dividing channel j of the input by s_j and multiplying column j of the weights by it
changes no output. The division costs nothing where it can be folded into what makes the input: the weight of
an RMSNorm or LayerNorm, or the rows of `up_proj` before `down_proj`. SmoothQuant (arXiv 2211.10438)
takes ``s_j = max|x_j|^a / max|W_j|^(1-a)``; here both are root mean squares, to the same power:

    s_j = (rms(x_j) / rms(W_j))^strength

A fold is kept only if the layer's output for a sample is what it was; norms whose weight is stored
otherwise (as 1 + w) and inputs that something else reads as well are found that way and left alone.
"""

import torch
from torch import nn

from vllm_scalesearch.checkpoint.model import Group, LayerRunner

# fp32 rounding of a whole layer stays far below this; a fold that is wrong, far above.
_TOLERANCE = 1e-3


def smooth_layer(
    runner: LayerRunner,
    parameters: dict[str, torch.Tensor],
    groups: list[Group],
    mean_squares: dict[Group, torch.Tensor],
    strength: float,
    sample: torch.Tensor,
    stored_dtype: torch.dtype,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A layer's parameters with channel scales folded.

    parameters: by name, fp32. mean_squares: (K,) E[x^2] of each group's input. sample: hidden states to
    check with, (1, length, hidden). stored_dtype: what the norms are stored in: scales are chosen so that
    nothing is rounded twice. Returns new parameters and the names of the layers whose inputs were scaled.
    """
    expected = runner.run(parameters, sample)
    norms = _norms_before(runner, parameters, groups, sample)
    smoothed = []
    for group in groups:
        if group.expert or group not in mean_squares:
            continue
        changed = _folded(parameters, group, norms.get(group), mean_squares[group], strength, stored_dtype)
        if changed is None:
            continue
        trial = {**parameters, **changed}
        found = runner.run(trial, sample)
        if (found - expected).norm() <= _TOLERANCE * expected.norm() and torch.isfinite(found).all():
            parameters = trial
            smoothed += group.names
    return parameters, smoothed


def _folded(
    parameters: dict[str, torch.Tensor],
    group: Group,
    norm: str | None,
    mean_square: torch.Tensor,
    strength: float,
    stored_dtype: torch.dtype,
) -> dict[str, torch.Tensor] | None:
    """The parameters that a fold changes, or None where there is nothing to fold into."""
    weights = [parameters[f"{name}.weight"] for name in group.names]
    columns = sum(weight.float().square().sum(0) for weight in weights)
    if norm is not None:
        makers = {f"{norm}.weight": 0}
        if f"{norm}.bias" in parameters:
            makers[f"{norm}.bias"] = 0
    elif len(group.names) == 1 and group.names[0].endswith("down_proj"):
        up = group.names[0].removesuffix("down_proj") + "up_proj"
        if f"{up}.weight" not in parameters:
            return None
        makers = {f"{up}.weight": 0}
        if f"{up}.bias" in parameters:
            makers[f"{up}.bias"] = 0
    else:
        return None
    usable = (mean_square > 0) & (columns > 0)
    ratio = torch.where(usable, mean_square / columns.clamp(min=1e-30), 1.0).clamp(min=1e-30)
    log = ratio.log() * (strength / 2)
    scale = torch.where(usable, (log - log[usable].mean()).exp(), 1.0) if usable.any() else torch.ones_like(log)
    if norm is not None:
        # The weights take exactly what the stored norm lost.
        before = parameters[f"{norm}.weight"].float()
        after = (before / scale).to(stored_dtype).float()
        scale = torch.where((after != 0) & (before != 0), before / after, 1.0)
    if (scale == 1).all():
        return None
    changed = {}
    for name in makers:
        shape = (-1,) + (1,) * (parameters[name].ndim - 1)
        changed[name] = parameters[name] / scale.view(shape)
    for name, weight in zip(group.names, weights, strict=True):
        changed[f"{name}.weight"] = weight * scale
    return changed


def _norms_before(
    runner: LayerRunner, parameters: dict[str, torch.Tensor], groups: list[Group], sample: torch.Tensor
) -> dict[Group, str]:
    """The norm whose output is a group's input, by group."""
    made: list[tuple[str, torch.Tensor]] = []
    found: dict[Group, str] = {}

    def keep(name: str):
        return lambda _module, _inputs, out: made.append((name, out))

    def look(group: Group):
        def watched(x: torch.Tensor, _multiplied: torch.Tensor) -> None:
            for name, out in made:
                if out is x or (out.data_ptr() == x.data_ptr() and out.shape == x.shape):
                    found[group] = name

        return watched

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in runner.module.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1
    ]
    try:
        runner.run(parameters, sample, watched={g.names[0]: look(g) for g in groups if not g.expert})
    finally:
        for handle in handles:
            handle.remove()
    return found
