"""NVFP4 checkpoints on the CPU: the linear kernel that vLLM has for GPUs only.

vLLM 0.32 loads compressed-tensors' and ModelOpt's NVFP4 checkpoints on the CPU up to the choice of a kernel,
and stops there: its list of NVFP4 kernels has none for that platform. This one dequantizes the weights once,
exactly, to 16 bits, as quantization `scalesearch` does (`cpu_storage`: dense). Inputs of W4A4 checkpoints are
quantized as the GPU kernels quantize them: by the block's maximum, under the checkpoint's static tensor scale.
"""

import torch
from torch.nn import Parameter

from vllm_scalesearch.formats import NVFP4, QuantizedTensor
from vllm_scalesearch.search import ScalePolicy, quantize
from vllm_scalesearch.vllm_api import (
    NvFp4LinearKernel,
    NvFp4LinearLayerConfig,
    PlatformEnum,
    current_platform,
    dispatch_cpu_unquantized_gemm,
    linear_kernels,
)

_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define("nvfp4_input_values(Tensor x, Tensor tensor_scale) -> Tensor")


class CpuNvFp4LinearKernel(NvFp4LinearKernel):
    """A product with a dequantized NVFP4 weight, W4A16 and W4A4."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "it is for the CPU")

    @classmethod
    def can_implement(cls, config: NvFp4LinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """layer: weight (N, K // 2) uint8, weight_scale (N, K // 16) float8_e4m3fn, weight_global_scale fp32
        and, for W4A4, input_global_scale fp32; both multiply, as vLLM leaves them there."""
        scale = layer.weight_global_scale.data.float().reshape(())
        stored = QuantizedTensor(layer.weight.data, layer.weight_scale.data, scale, NVFP4)
        values, residual = stored.values(layer.params_dtype)
        del layer.weight_scale
        layer.weight = Parameter(values, requires_grad=False)
        layer.register_buffer("scale_of_output", residual, persistent=False)
        if getattr(layer, "input_global_scale", None) is not None:
            scale = layer.input_global_scale.data.float().reshape(())
            layer.register_buffer("input_tensor_scale", scale, persistent=False)
            exponent = NVFP4.fold_exponent(scale, layer.params_dtype)
            layer.scale_of_output = residual * torch.ldexp(scale, -exponent)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x: (..., K) bf16 or fp16. Returns (..., N) in its dtype."""
        if hasattr(layer, "input_tensor_scale"):
            x = torch.ops.vllm_scalesearch.nvfp4_input_values(x, layer.input_tensor_scale)
        out = layer.cpu_linear(x, layer.weight, None).float() * layer.scale_of_output
        return (out if bias is None else out + bias).to(x.dtype)


def _input_values(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    return quantize(x, NVFP4, ScalePolicy("absmax"), tensor_scale=tensor_scale).values(x.dtype)[0]


def _fake(x: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


# One operator, so that torch.compile fuses nothing into the rounding.
_LIB.impl("nvfp4_input_values", _input_values, "CPU")
torch.library.register_fake("vllm_scalesearch::nvfp4_input_values", _fake, lib=_LIB)


def register() -> None:
    """Give vLLM the kernel on the CPU; elsewhere, and when called again, nothing changes."""
    if not current_platform.is_cpu():
        return
    possible = linear_kernels._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, [])
    if CpuNvFp4LinearKernel not in possible:
        possible.append(CpuNvFp4LinearKernel)
    # For W4A16 vLLM asks no list: without an NVIDIA GPU it takes this name, which the CPU never has.
    linear_kernels.MarlinNvFp4LinearKernel = CpuNvFp4LinearKernel
