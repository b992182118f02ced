"""Every name that this package takes from vLLM, as read in and tried with vLLM 0.32.0.

Importing this module imports vLLM; `formats`, `search`, `options` and `ops` never do.
"""

from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import init_mxfp4_linear_kernel, init_nvfp4_linear_kernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import amax_for_tp_weight_quant
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.platforms import current_platform

__all__ = [
    "LinearBase",
    "LinearMethodBase",
    "ModelWeightParameter",
    "ParallelLMHead",
    "QuantizationConfig",
    "ReplicatedLinear",
    "RoutedExperts",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "amax_for_tp_weight_quant",
    "current_platform",
    "dispatch_cpu_unquantized_gemm",
    "get_current_vllm_config",
    "get_pp_group",
    "init_logger",
    "init_mxfp4_linear_kernel",
    "init_nvfp4_linear_kernel",
    "initialize_online_processing",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
]
