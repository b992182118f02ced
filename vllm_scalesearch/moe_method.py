"""What all methods of searched experts do: load, quantize, report. Who multiplies: moe_cpu.py, moe_gpu.py."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_scalesearch.formats import QuantizedTensor, finite_amax, tensor_scale_of
from vllm_scalesearch.loading import checked_loader
from vllm_scalesearch.ops.quantize import quantize_values, quantize_weight
from vllm_scalesearch.options import ExpertOptions
from vllm_scalesearch.vllm_api import (
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEExperts,
    FusedMoEKernel,
    OnlineMoEMethodBase,
    amax_for_moe_weight_quant,
    init_logger,
    replace_parameter,
)

logger = init_logger("vllm.scalesearch.moe")


class ScaleSearchMoEMethod(OnlineMoEMethodBase):
    """Loads bf16 or fp16 experts, quantizes them once they are complete, and runs them.

    The weights wait on the meta device until the checkpoint has delivered all of the layer, so loading
    needs the quantized model and one layer. An expert has one tensor scale for w13 and one for w2, taken
    over all ranks that hold a part of it: codes do not depend on how the model is split.
    """

    experts_cls: type[FusedMoEExperts]

    def __init__(
        self,
        options: ExpertOptions,
        config: FusedMoEConfig,
        prefix: str,
        check_model: Callable[[], None],
    ) -> None:
        """See `experts_method`."""
        super().__init__(config)
        self.options = options
        self.prefix = prefix
        self.check_model = check_model

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        extra_weight_attrs["weight_loader"] = checked_loader(extra_weight_attrs["weight_loader"], self.prefix)
        super().create_weights(
            layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype,
            **extra_weight_attrs,
        )  # fmt: skip
        # Kernels may pad the layer. The checkpoint does not fill the padding, and a layer that waits
        # for it would stay unquantized until all others are there.
        matrix = num_experts * self.moe.hidden_dim_unpadded * self.moe.intermediate_size_per_partition_unpadded
        layer.w13_weight.weight_loader_numel = self.moe.w13_num_shards * matrix
        layer.w2_weight.weight_loader_numel = matrix

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        if getattr(layer, "_already_called_process_weights_after_loading", False):
            return
        self.check_model()
        self._zero_padding(layer)
        for name in ("w13", "w2"):
            weight = getattr(layer, f"{name}_weight").data
            self.store(layer, name, weight, self._quantize(layer, name, weight))
            del weight  # or it would lie beside the other one's
        self.convert(layer)
        if self.moe_kernel is None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            self.moe_kernel = self.make_kernel(layer)
        self.moe_kernel.fused_experts.process_weights_after_loading(layer)
        layer._already_called_process_weights_after_loading = True

    def _quantize(self, layer: torch.nn.Module, name: str, weight: torch.Tensor) -> QuantizedTensor:
        """Quantize the experts (E, N, K) one by one; their tensor scales come as (E,)."""
        fmt = self.options.block_format
        amax = torch.stack([finite_amax(expert) for expert in weight])
        finite = torch.stack([torch.isfinite(expert).all() for expert in weight])
        # All ranks must learn of it, or the others would wait for this one.
        amax = amax_for_moe_weight_quant(torch.where(finite, amax, torch.inf), self.moe.tp_size)
        bad = torch.isinf(amax).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"scalesearch: {self.prefix}: the checkpoint's {name} of expert "
                f"{', '.join(str(_global_expert(layer, expert)) for expert in bad)} holds NaN or infinity"
            )
        tensor_scale = tensor_scale_of(amax) if fmt.has_tensor_scale else torch.ones_like(amax)
        rows = tensor_scale.view(-1, 1, 1).expand(-1, weight.shape[1], 1) if fmt.has_tensor_scale else None
        policy = getattr(self.options, name).weights
        searched = quantize_weight(weight, fmt, policy, rows)
        return QuantizedTensor(searched.packed, searched.scales, tensor_scale, fmt)

    def store(
        self, layer: torch.nn.Module, name: str, weight: torch.Tensor, quantized: QuantizedTensor
    ) -> None:
        """Replace the loaded `weight` of `name` (``w13`` or ``w2``) by the quantized one."""
        fmt = quantized.format
        replace_parameter(layer, f"{name}_weight", quantized.packed)
        scales = quantized.scales if fmt.has_tensor_scale else quantized.scales.view(torch.uint8)
        replace_parameter(layer, f"{name}_weight_scale", scales)
        if fmt.has_tensor_scale:
            replace_parameter(layer, f"{name}_weight_scale_2", quantized.tensor_scale)

    def convert(self, layer: torch.nn.Module) -> None:
        """Bring what `store` left into the form that the kernel reads."""
        raise NotImplementedError

    def make_kernel(self, layer: torch.nn.Module) -> FusedMoEKernel:
        raise NotImplementedError

    def report(self, experts: str, why: str) -> None:
        """Log, once, who multiplies and why."""
        w13, w2 = self.options.activations
        inputs = "inputs not quantized"
        if w13 is not None and w2 is not None:
            inputs = "inputs of both products quantized before them, in torch"
        elif w13 is not None or w2 is not None:
            inputs = f"inputs of {'w13' if w2 is None else 'w2'} alone quantized before it, in torch"
        logger.info_once("scalesearch: experts by %s; %s; %s", experts, inputs, why)


def _global_expert(layer: torch.nn.Module, local: int) -> int:
    """The model's number of a rank's expert."""
    if layer.expert_map is None:
        return local
    return (layer.expert_map == local).nonzero().flatten().tolist()[0]


def check_supported(
    experts_cls: type[FusedMoEExperts], config: FusedMoEConfig, weight_key: Any, prefix: str
) -> None:
    """Raise ValueError, naming the layer and vLLM's reason, where experts cannot run a layer."""
    standard = FusedMoEActivationFormat.Standard
    if config.moe_parallel_config.use_batched_activation_format:
        standard = FusedMoEActivationFormat.BatchedExperts
    supported, reason = experts_cls.is_supported_config(experts_cls, config, weight_key, None, standard)
    if not supported:
        raise ValueError(
            f"scalesearch: {prefix}: {experts_cls.__name__} cannot run its experts ({reason}); "
            "add the layer to option 'ignore'"
        )


def quantized_inputs(
    x: torch.Tensor, format: str, policy: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`quantize_values`, or x as it is and None where inputs are not quantized."""
    return (x, None) if policy is None else quantize_values(x, format, policy)
