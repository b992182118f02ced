"""compressed-tensors' `nvfp4-pack-quantized`, the layout that vLLM and others load without this package.

Names and conventions are those of compressed-tensors 0.17.0 (`compressors/nvfp4/base.py`, presets NVFP4A16
and NVFP4 in `quantization/quant_scheme.py`): for a module ``M``

* ``M.weight_packed`` (N, K // 2) uint8, even column in the low nibble;
* ``M.weight_scale`` (N, K // 16) float8_e4m3fn, the block scales;
* ``M.weight_global_scale`` (1,) fp32, the *reciprocal* of our tensor scale: ``448 * 6 / amax`` for the
  tensor scale ``amax / (448 * 6)``;
* with quantized inputs (W4A4) ``M.input_global_scale`` (1,) fp32, ``448 * 6 / amax`` of the inputs.

A dequantized weight is ``element * weight_scale / weight_global_scale``. vLLM inverts the global scale
in fp32 and gives fused matrices (q, k and v; gate and up) the largest one of theirs, so they must share it.
"""

import torch

from vllm_scalesearch.formats import NVFP4, QuantizedTensor, tensor_scale_of

FORMAT = "nvfp4-pack-quantized"
_ARGS = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "dynamic": False,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}


def stored_scale(tensor_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp32 reciprocal that is stored for a tensor scale, and the tensor scale that a reader gets from it.

    Search with the second: it may differ from the first in the last bit, and is what will be multiplied by.
    """
    reciprocal = 1.0 / tensor_scale.float()
    return reciprocal, 1.0 / reciprocal


def weight_tensors(module: str, weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors of one quantized matrix by name. weight: (N, K) NVFP4 with one tensor scale.

    Raises ValueError for another format, and for a scale per row.
    """
    if weight.format is not NVFP4:
        raise ValueError(f"{module}: {FORMAT} holds nvfp4, not {weight.format.name}")
    if weight.tensor_scale.numel() != 1:
        raise ValueError(
            f"{module}: {FORMAT} holds one tensor scale a matrix, got {weight.tensor_scale.numel()}"
        )
    return {
        f"{module}.weight_packed": weight.packed,
        f"{module}.weight_scale": weight.scales,
        f"{module}.weight_global_scale": (1.0 / weight.tensor_scale.float()).reshape(1),
    }


def input_tensors(module: str, amax: float) -> dict[str, torch.Tensor]:
    """The static scale of a module's inputs by name; amax: their largest magnitude in calibration."""
    return {f"{module}.input_global_scale": (1.0 / tensor_scale_of(torch.tensor(amax))).reshape(1)}


def quantization_config(ignore: list[str], quantized_inputs: bool) -> dict:
    """`quantization_config` of config.json. ignore: names of the matrices left in full precision."""
    inputs = {**_ARGS, "dynamic": "local", "observer": "static_minmax"} if quantized_inputs else None
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": dict(_ARGS),
                "input_activations": inputs,
                "output_activations": None,
                "format": FORMAT,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def already_quantized(config: dict, folder_files: list[str], tensor_names: list[str]) -> str | None:
    """How a checkpoint is quantized already, in words, or None.

    config: its config.json. folder_files: names of files beside it. tensor_names: of its tensors.
    """
    found = config.get("quantization_config")
    if isinstance(found, dict):
        return str(found.get("quant_method") or found.get("quant_algo") or "quantization_config in config.json")
    if "hf_quant_config.json" in folder_files:
        return "modelopt, by hf_quant_config.json"
    for suffix in (".weight_packed", ".weight_scale", ".weight_scale_inv", ".qweight", ".weight_global_scale"):
        name = next((name for name in tensor_names if name.endswith(suffix)), None)
        if name is not None:
            return f"tensor {name}"
    return None
