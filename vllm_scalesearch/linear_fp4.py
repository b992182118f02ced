"""vLLM's FP4 GEMMs, fed with inputs that the search has quantized.

vLLM's kernels for NVFP4 weights and inputs (vllm/model_executor/kernels/linear/nvfp4, 0.32.0) quantize
their input themselves: from each block's maximum, under one tensor scale that is known beforehand. Here
vLLM chooses among them and they prepare the weights; what they call last, the GEMM, is called directly,
with codes and scales of `ops.quantize.quantize_packed`.

**None of this has been run on a GPU with FP4 units.** tests/test_fp4.py runs it on the CPU with the GEMM
replaced by one in torch that reads the same operands; the quantizer's PTX for these GPUs is checked in
tests/test_triton_quantize.py.
"""

import math

import torch
from torch.nn import Parameter

from vllm_scalesearch.formats import E2M1_MAX, E4M3_MAX, QuantizedTensor
from vllm_scalesearch.vllm_api import (
    CutlassNvFp4LinearKernel,
    FlashInferB12xNvFp4LinearKernel,
    FlashInferCudnnNvFp4LinearKernel,
    FlashInferCuteDslNvFp4LinearKernel,
    FlashInferCutlassNvFp4LinearKernel,
    NvFp4LinearKernel,
    current_platform,
    cutlass_scaled_fp4_mm,
    flashinfer_scaled_fp4_mm,
    get_current_vllm_config,
    init_logger,
    init_nvfp4_linear_kernel,
    nvfp4_weight_padding_bytes,
    pad_nvfp4_activation_for_cutlass,
)

logger = init_logger("vllm.scalesearch.linear_fp4")

# The kernels whose GEMM takes inputs as `quantize_packed` gives them, for any number of rows, and FlashInfer's
# name of it. FlashInfer's TensorRT-LLM wants 8x4 tiles of scales for few rows and has no fp16.
_FLASHINFER_BACKENDS = {
    FlashInferCuteDslNvFp4LinearKernel: "cute-dsl",
    FlashInferCutlassNvFp4LinearKernel: "cutlass",
    FlashInferCudnnNvFp4LinearKernel: "cudnn",
    FlashInferB12xNvFp4LinearKernel: "b12x",
}
_KERNELS = (CutlassNvFp4LinearKernel, *_FLASHINFER_BACKENDS)


def native_fp4_kernel() -> tuple[NvFp4LinearKernel | None, str]:
    """vLLM's kernel for products of NVFP4 weights and inputs on this GPU, or None; and the reason.

    The choice is vLLM's (`init_nvfp4_linear_kernel`; its option ``--linear-backend`` and what is installed
    take part in it), on GPUs of compute capability 10.0 and newer, which have FP4 units. None where it
    falls on a kernel that cannot be fed with quantized inputs. Raises what vLLM raises for a backend that was
    asked for and cannot be had.
    """
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        return None, "this is not a CUDA GPU"
    if capability < (10, 0):
        return None, f"compute capability {capability.as_version_str()} has no FP4 units"
    kernel = init_nvfp4_linear_kernel()
    if type(kernel) not in _KERNELS:
        return None, f"vLLM's choice for FP4 products, {type(kernel).__name__}, takes no quantized inputs"
    return kernel, f"its choice for FP4 products on compute capability {capability.as_version_str()}"


def uses_triton_product(reason: str) -> tuple[bool, str]:
    """Whether `ops.fp4_product` multiplies where `native_fp4_kernel` gave None and `reason`; and the reason.

    It does on GPUs with FP4 units that Triton compiles it for, unless ``--linear-backend`` asks for a kernel by
    name: that is then used, with inputs of 16 bits.
    """
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None or capability < (10, 0):
        return False, reason
    if get_current_vllm_config().kernel_config.linear_backend != "auto":
        return False, reason
    from vllm_scalesearch.ops.fp4_product import FP4_CAPABILITIES  # imports Triton

    if tuple(capability) not in FP4_CAPABILITIES:
        version = capability.as_version_str()
        return False, f"{reason}, and this package's Triton kernel is not for compute capability {version}"
    return True, reason


def result_exponent(width: int) -> int:
    """The e of the GEMM's alpha ``2**-e``: with it no product of `width` values leaves fp16.

    Codes times block scales reach 6 * 448 in magnitude on either side, so a sum of K products stays within
    ``K * 2688**2 * 2**-e <= 65504``.
    """
    largest = width * (E2M1_MAX * E4M3_MAX) ** 2
    return math.ceil(math.log2(largest / torch.finfo(torch.float16).max))


def load(kernel: NvFp4LinearKernel, layer: torch.nn.Module, weight: QuantizedTensor) -> None:
    """Give `layer` the NVFP4 weight (N, K) as `multiply` reads it.

    layer: with input_size_per_partition K and output_size_per_partition N. vLLM's kernel pads codes with
    zeros to multiples of 32 both ways and scales to tiles of 128x4, which it swizzles.
    """
    layer.weight = Parameter(weight.packed, requires_grad=False)
    layer.weight_scale = Parameter(weight.scales, requires_grad=False)
    layer.weight_global_scale = Parameter(weight.tensor_scale, requires_grad=False)
    kernel.process_weights_after_loading(layer)
    outputs, width = weight.packed.shape[0], 2 * weight.packed.shape[1]
    padded = (layer.weight.shape[0], 2 * layer.weight.shape[1])
    if padded != (outputs, width):
        logger.info_once(
            "scalesearch: weights of %d x %d are padded with zeros to %d x %d, and inputs at every use to "
            "the same width, because %s takes multiples of 32",
            outputs, width, *padded, type(kernel).__name__,
        )  # fmt: skip
    exponent = result_exponent(width)
    alpha = torch.full((1,), 2.0**-exponent, dtype=torch.float32, device=weight.packed.device)
    layer.register_buffer("alpha", alpha, persistent=False)
    layer.register_buffer("result_scale", weight.tensor_scale * 2.0**exponent, persistent=False)


def multiply(
    kernel: NvFp4LinearKernel,
    layer: torch.nn.Module,
    packed: torch.Tensor,
    swizzled_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``x @ W.T`` of codes times block scales, to be multiplied by layer.result_scale and x's row scales.

    packed (R, K // 2) uint8 and swizzled_scales: of `quantize_packed`, R > 0. Returns (R, N) bf16 or fp16.

    The GEMMs accumulate in fp32, multiply by one alpha and round to bf16 or fp16: FlashInfer's `mm_fp4` and
    vLLM's `cutlass_scaled_fp4_mm` refuse fp32 results. So a result is rounded here and once more after its
    scales. Tensor scales in alpha would let fp16 overflow or vanish; alpha is a power of two that depends on K
    alone (`result_exponent`), which costs no rounding. What fp16 then holds with fewer than 11 bits lies
    below 2**-14, which is 2**-29 of the largest result that K values can have.
    """
    packed = pad_nvfp4_activation_for_cutlass(packed, nvfp4_weight_padding_bytes(layer))
    operands = (packed, layer.weight, swizzled_scales, layer.weight_scale, layer.alpha, dtype)
    if type(kernel) is CutlassNvFp4LinearKernel:
        out = cutlass_scaled_fp4_mm(*operands)
    else:
        out = flashinfer_scaled_fp4_mm(*operands, backend=_FLASHINFER_BACKENDS[type(kernel)])
    return out[:, : layer.output_size_per_partition]
