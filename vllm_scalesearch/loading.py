"""What the layers that quantize while loading ask of a checkpoint's tensors."""

import functools
from collections.abc import Callable

import torch

_LOADABLE = (torch.bfloat16, torch.float16, torch.float32)


def checked_loader(weight_loader: Callable, prefix: str) -> Callable:
    """vLLM's `weight_loader` of the layer `prefix`, which raises ValueError for what is no plain weight."""

    @functools.wraps(weight_loader)
    def load(param: torch.Tensor, loaded_weight: torch.Tensor, *args, **kwargs):
        if loaded_weight.dtype not in _LOADABLE:
            raise ValueError(
                f"scalesearch: {prefix}: the checkpoint holds {loaded_weight.dtype} where "
                "bf16, fp16 or fp32 is expected; is it quantized already? Quantize the original"
            )
        return weight_loader(param, loaded_weight, *args, **kwargs)

    return load
