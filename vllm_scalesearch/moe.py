"""Experts of mixtures of experts whose weights, and inputs where asked, are in a searched block format.

A layer of E experts computes, for each of the k experts that its router gives a token,
``y = act(x @ w13.T) @ w2.T``, and sums the k results by the router's weights. w13 holds the gate and the
up projection (w1 and w3), one above the other; they share a tensor scale, as every kernel expects.

The numbers, on every machine: products of exactly dequantized values with fp32 accumulation, rounded to
16 bits; their scales are applied in fp32; what the activation gives is rounded to 16 bits and, with
quantized inputs, is quantized again with one tensor scale a row (under tensor parallelism, that of the
rank's part of the row, as for every layer whose input is split). Kernels differ in the order of additions
and in how often they round to 16 bits on the way.

Who multiplies:

* on the CPU, torch, expert by expert (`CpuExperts`). vLLM's fused CPU kernel cannot: the tensor scale
  of w13 is no number of 16 bits and belongs between its product and its activation, and so do scales
  of quantized inputs;
* on a GPU, weights only, NVFP4: the kernel of vLLM's choice, Marlin or Humming;
* on a GPU, with quantized inputs: the same kernels, called with quantized values and with the quantizer
  in the place of the activation (`SearchedMarlinExperts`, `SearchedHummingExperts`). vLLM's kernels for
  FP4 units quantize the second input themselves, by its maximum, and are not used;
* on a GPU, MXFP4: Marlin.
"""

from collections.abc import Callable

from vllm_scalesearch.moe_cpu import CpuMoEMethod
from vllm_scalesearch.moe_gpu import Mxfp4MoEMethod, Nvfp4MoEMethod
from vllm_scalesearch.options import ExpertOptions
from vllm_scalesearch.vllm_api import (
    OnlineMoEMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    current_platform,
    init_logger,
)

logger = init_logger("vllm.scalesearch.moe")


def expert_names(layer: RoutedExperts, prefix: str) -> tuple[list[str], list[str]]:
    """Checkpoint names of all experts' gate and up projections, and of their down projections.

    Those of every rank's experts, so that patterns mean the same everywhere.
    """
    first = [name for name in (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name) if name is not None]
    experts = range(layer.moe_config.num_logical_experts)
    w13 = [f"{prefix}.{expert}.{name}" for expert in experts for name in first]
    return w13, [f"{prefix}.{expert}.{layer.ckpt_down_proj_name}" for expert in experts]


def experts_method(
    options: ExpertOptions,
    layer: RoutedExperts,
    prefix: str,
    cpu_storage: str,
    check_model: Callable[[], None],
) -> OnlineMoEMethodBase | UnquantizedFusedMoEMethod:
    """The method of one layer of experts that options select.

    options, cpu_storage: see options.py. prefix: the layer's name. check_model: called before weights
    are quantized, when all layers of the model are built.

    A layer of which an input width on this rank is no multiple of the block stays in full precision,
    and a warning names it. Raises ValueError for experts with biases, and where no kernel can run what
    the options ask for.
    """
    config = layer.moe_config
    if config.has_bias:
        raise ValueError(
            f"scalesearch: the experts of {prefix} have biases, for which vLLM's NVFP4 kernels have no "
            "place; add the layer to option 'ignore'"
        )
    block = options.block_format.block_size
    widths = {"hidden": config.hidden_dim, "intermediate": config.intermediate_size_per_partition}
    for name, width in widths.items():
        if width % block:
            logger.warning(
                "scalesearch: the experts of %s stay in %s: their %s width %d on this rank is not a "
                "multiple of the %s block of %d",
                prefix, layer.params_dtype, name, width, options.block_format.name, block,
            )  # fmt: skip
            return UnquantizedFusedMoEMethod(config)
    if current_platform.is_cpu():
        return CpuMoEMethod(options, config, prefix, check_model, cpu_storage)
    methods = {"nvfp4": Nvfp4MoEMethod, "mxfp4": Mxfp4MoEMethod}
    return methods[options.block_format.name](options, config, prefix, check_model)
