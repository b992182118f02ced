"""NVFP4 checkpoints on the CPU: what vLLM has for GPUs only.

vLLM 0.32 loads compressed-tensors' and ModelOpt's NVFP4 checkpoints on the CPU up to the choice of a kernel,
and stops there: its list of NVFP4 kernels has none for that platform. This one dequantizes the weights once,
exactly, to 16 bits, as quantization `scalesearch` does (`cpu_storage`: dense). Inputs of W4A4 checkpoints are
quantized as the GPU kernels quantize them: by the block's maximum, under the checkpoint's static tensor scale.

Nor has it one for experts. Those of compressed-tensors' W4A16 checkpoints run as quantization `scalesearch`
runs its own (`moe_cpu.CpuExperts`).
"""

import torch
from torch.nn import Parameter

from vllm_scalesearch.formats import NVFP4, QuantizedTensor
from vllm_scalesearch.moe_cpu import CpuMoEMethod
from vllm_scalesearch.options import ExpertOptions, LayerOptions
from vllm_scalesearch.search import ScalePolicy, quantize
from vllm_scalesearch.vllm_api import (
    CompressedTensorsMoEMethod,
    FusedMoEConfig,
    FusedMoEQuantConfig,
    NvFp4LinearKernel,
    NvFp4LinearLayerConfig,
    PlatformEnum,
    compressed_tensors_moe_w4a4_nvfp4,
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


class CpuNvFp4MoEMethod(compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod):
    """Experts of a compressed-tensors W4A16 checkpoint, loaded as vLLM loads them and dequantized once.

    Raises NotImplementedError for quantized inputs (W4A4).
    """

    def __init__(self, moe: FusedMoEConfig, layer_name: str | None = None, use_a16: bool = False) -> None:
        if not use_a16:
            raise NotImplementedError(
                f"{layer_name}: experts with quantized inputs (W4A4) do not run on the CPU; use W4A16"
            )
        CompressedTensorsMoEMethod.__init__(self, moe)  # vLLM's class would choose a kernel, and find none
        self.group_size, self.use_a16, self.use_global_sf = NVFP4.block_size, True, False
        layer = LayerOptions()
        self.options = ExpertOptions(layer, layer)
        self.cpu = CpuMoEMethod(self.options, moe, layer_name or "", lambda: None, "dense")

    @property
    def supports_eplb(self) -> bool:
        return False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """layer: of w13 and w2, weight_packed (E, N, K // 2) uint8, weight_scale (E, N, K // 16) float8_e4m3fn
        and weight_global_scale, which divides: (E,) fp32, or one each for gate and up, of which vLLM takes the
        first."""
        for name in ("w13", "w2"):
            packed = getattr(layer, f"{name}_weight_packed").data
            scales = getattr(layer, f"{name}_weight_scale").data
            tensor_scale = 1.0 / getattr(layer, f"{name}_weight_global_scale").data.view(len(packed), -1)[:, 0]
            weight = torch.empty(*packed.shape[:2], 2 * packed.shape[2], dtype=layer.params_dtype)
            layer.register_parameter(f"{name}_weight", Parameter(weight, requires_grad=False))
            stored = QuantizedTensor(packed, scales, tensor_scale, NVFP4)
            for part in ("packed", "scale", "global_scale"):
                delattr(layer, f"{name}_weight_{part}")
            self.cpu.store(layer, name, weight, stored)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.cpu.moe_quant_config = self.moe_quant_config
        self.moe_kernel = self.cpu.make_kernel(layer)
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return self.cpu.get_fused_moe_quant_config(layer)


def register() -> None:
    """Give vLLM the kernels on the CPU; elsewhere, and when called again, nothing changes."""
    if not current_platform.is_cpu():
        return
    possible = linear_kernels._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, [])
    if CpuNvFp4LinearKernel not in possible:
        possible.append(CpuNvFp4LinearKernel)
    # For W4A16 vLLM asks no list: without an NVIDIA GPU it takes this name, which the CPU never has.
    linear_kernels.MarlinNvFp4LinearKernel = CpuNvFp4LinearKernel
    compressed_tensors_moe_w4a4_nvfp4.CompressedTensorsW4A4Nvfp4MoEMethod = CpuNvFp4MoEMethod
