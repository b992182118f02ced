"""Watches the linear layers of a model inside vLLM and recomputes them by the reference, in fp64.

Log probabilities cannot judge quantized inputs sharply: a value that bf16 noise moves across a
rounding boundary moves by a whole step, and the layers after it make more of that. Each layer's
output from its own input can.
"""

import io
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from vllm_scalesearch.formats import FORMATS
from vllm_scalesearch.search import quantize

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def record(model: torch.nn.Module) -> None:
    """Keep input and output of each linear layer of the first and the last block (`LLM.apply_model`)."""
    blocks = model.model.layers
    for block in (blocks[0], blocks[-1]):
        for module in block.modules():
            if type(module).__name__.endswith("ParallelLinear"):
                module.register_forward_hook(_keep)


def _keep(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
    if inputs[0].shape[0] > 8:  # a prompt, not a generated token
        module.kept = {"input": inputs[0].clone(), "output": output[0].clone()}


def collect(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """What `record` kept, with the stored codes and scales where they are kept packed."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "kept"):
            found[name] = dict(module.kept)
            if module.weight.dtype == torch.uint8 and module.weight.device.type == "cpu":
                found[name] |= {
                    "packed": module.weight.clone(),
                    "scales": module.weight_scale.clone(),
                    "tensor_scale": module.weight_global_scale.clone(),
                }
    return found


def stored(model: torch.nn.Module) -> bytes:
    """Packed codes, block scales and tensor scale of every layer that keeps them, as `torch.save` writes.
    Experts have two entries, of one tensor scale an expert: ``NAME.w13`` and ``NAME.w2``.

    Bytes, because what vLLM makes of tensors on their way from a worker depends on their dtype.
    """
    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_global_scale"):
            tensors[name] = (module.weight.data, module.weight_scale.data, module.weight_global_scale.data)
        for part in ("w13", "w2"):
            if hasattr(module, f"{part}_weight_scale"):
                kinds = ("weight", "weight_scale", "weight_scale_2")
                tensors[f"{name}.{part}"] = tuple(getattr(module, f"{part}_{kind}").data for kind in kinds)
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def checkpoint_tensor(model: Path, layer: str, kind: str = "weight") -> torch.Tensor | None:
    """The checkpoint's weight or bias of a vLLM layer, fused as vLLM fuses it; None if there is none."""
    parent, _, last = layer.rpartition(".")
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = [f"{parent}.{part}.{kind}" for part in FUSED.get(last, (last,))]
        if not set(names) <= set(weights.keys()):
            return None
        return torch.cat([weights.get_tensor(name) for name in names])


def check(
    model: Path, layers: dict[str, dict[str, torch.Tensor]], options: dict[str, Any], bound: float
) -> None:
    """Assert that each recorded layer multiplied what the reference quantizes its input and weight to."""
    assert layers
    fmt = FORMATS[options.get("format", "nvfp4")]
    activations = options.get("activations")
    for name, layer in layers.items():
        layer = {key: tensor.cpu() for key, tensor in layer.items()}
        x = layer["input"].double()
        if activations is not None:
            x = quantize(layer["input"], fmt, activations, per_row=fmt.has_tensor_scale).dequantize().double()
        weight = quantize(checkpoint_tensor(model, name), fmt, options.get("weights", "paper"))
        expected = x @ weight.dequantize().double().t()
        bias = checkpoint_tensor(model, name, "bias")
        if bias is not None:
            expected += bias.double()
        error = (layer["output"].double() - expected).norm() / expected.norm()
        assert error < bound, (name, error)
