"""Every name that this package takes from vLLM, as read in and tried with vLLM 0.32.0.

Importing this module imports vLLM; `formats`, `search`, `options` and `ops` never do.
"""

from collections.abc import Callable
from typing import Any

from vllm._custom_ops import cutlass_scaled_fp4_mm
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import (
    get_pp_group,
    get_tp_group,
)
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.kernels import linear as linear_kernels
from vllm.model_executor.kernels.linear import init_mxfp4_linear_kernel, init_nvfp4_linear_kernel
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.kernels.linear.nvfp4.cutlass import CutlassNvFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.flashinfer import (
    FlashInferB12xNvFp4LinearKernel,
    FlashInferCudnnNvFp4LinearKernel,
    FlashInferCuteDslNvFp4LinearKernel,
    FlashInferCutlassNvFp4LinearKernel,
)
from vllm.model_executor.kernels.linear.nvfp4.humming import HummingNvFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.experts.fused_humming_moe import HummingIndexedExperts
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts, fused_marlin_moe
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEActivationFormat,
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEKernel,
)
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import (
    Mxfp4MoeBackend,
    convert_weight_to_mxfp4_moe_kernel_format,
    make_mxfp4_moe_kernel,
    make_mxfp4_moe_quant_config,
    mxfp4_round_up_hidden_size_and_intermediate_size,
)
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import (
    NvFp4MoeBackend,
    convert_to_nvfp4_moe_kernel_format,
    make_nvfp4_moe_kernel,
    make_nvfp4_moe_quant_config,
    select_nvfp4_moe_backend,
)
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
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
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    CompressedTensorsMoEMethod,
    compressed_tensors_moe_w4a4_nvfp4,
)
from vllm.model_executor.layers.quantization.online.moe_base import OnlineMoEMethodBase
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import (
    nvfp4_weight_padding_bytes,
    pad_nvfp4_activation_for_cutlass,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    amax_for_moe_weight_quant,
    amax_for_tp_weight_quant,
    kMxfp4Static,
    kNvfp4Static,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform
from vllm.utils.flashinfer import flashinfer_scaled_fp4_mm
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from vllm_scalesearch.pipeline import follow_current_stream


def flash_attention(head_size: int) -> tuple[Callable[..., Any], int]:
    """vLLM's FlashAttention for CUDA, and the version of it that runs this head size here."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size)
    if version is None:
        raise RuntimeError(f"vLLM's FlashAttention does not run on this GPU with head_size {head_size}")
    return flash_attn_varlen_func, version


def order_pipeline() -> None:
    """In a stage of a pipeline on CUDA: see pipeline.py. Elsewhere nothing."""
    if current_platform.is_cuda() and get_pp_group().world_size > 1:
        from vllm.v1.worker.gpu.pp_utils import PPHandler

        follow_current_stream(PPHandler)


__all__ = [
    "ApplyMoEActivationConfig",
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionType",
    "CommonAttentionMetadata",
    "CompressedTensorsMoEMethod",
    "CutlassNvFp4LinearKernel",
    "FlashInferB12xNvFp4LinearKernel",
    "FlashInferCudnnNvFp4LinearKernel",
    "FlashInferCuteDslNvFp4LinearKernel",
    "FlashInferCutlassNvFp4LinearKernel",
    "FusedMoEActivationFormat",
    "FusedMoEConfig",
    "FusedMoEExperts",
    "FusedMoEExpertsModular",
    "FusedMoEKernel",
    "FusedMoEQuantConfig",
    "HummingIndexedExperts",
    "HummingNvFp4LinearKernel",
    "KVCacheBlock",
    "KVCacheLayout",
    "LinearBase",
    "LinearMethodBase",
    "MarlinExperts",
    "MarlinNvFp4LinearKernel",
    "MoEActivation",
    "ModelWeightParameter",
    "MultipleOf",
    "Mxfp4MoeBackend",
    "NvFp4LinearKernel",
    "NvFp4LinearLayerConfig",
    "NvFp4MoeBackend",
    "OnlineMoEMethodBase",
    "ParallelLMHead",
    "PlatformEnum",
    "QuantizationConfig",
    "ReplicatedLinear",
    "RoutedExperts",
    "SlidingWindowManager",
    "SlidingWindowSpec",
    "TopKWeightAndReduceNoOP",
    "UnquantizedEmbeddingMethod",
    "UnquantizedFusedMoEMethod",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "amax_for_moe_weight_quant",
    "amax_for_tp_weight_quant",
    "apply_moe_activation",
    "compressed_tensors_moe_w4a4_nvfp4",
    "convert_to_nvfp4_moe_kernel_format",
    "convert_weight_to_mxfp4_moe_kernel_format",
    "current_platform",
    "cutlass_scaled_fp4_mm",
    "dispatch_cpu_unquantized_gemm",
    "flash_attention",
    "flashinfer_scaled_fp4_mm",
    "fused_marlin_moe",
    "get_attention_context",
    "get_current_vllm_config",
    "get_current_vllm_config_or_none",
    "get_forward_context",
    "get_kv_quant_mode",
    "get_pp_group",
    "get_tp_group",
    "init_logger",
    "init_mxfp4_linear_kernel",
    "init_nvfp4_linear_kernel",
    "initialize_online_processing",
    "kMxfp4Static",
    "kNvfp4Static",
    "linear_kernels",
    "make_mxfp4_moe_kernel",
    "make_mxfp4_moe_quant_config",
    "make_nvfp4_moe_kernel",
    "make_nvfp4_moe_quant_config",
    "maybe_make_prepare_finalize",
    "mxfp4_round_up_hidden_size_and_intermediate_size",
    "nvfp4_weight_padding_bytes",
    "order_pipeline",
    "pad_nvfp4_activation_for_cutlass",
    "register_all_kvcache_specs",
    "register_kv_cache_spec",
    "register_quantization_config",
    "register_weight_loader_v2_supported_method",
    "replace_parameter",
    "resolve_block_hashes",
    "select_nvfp4_moe_backend",
    "set_forward_context",
    "split_decodes_and_prefills",
]
