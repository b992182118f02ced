"""Searched experts on a GPU, by vLLM's kernels: NVFP4 by Marlin or Humming, MXFP4 by Marlin."""

from collections.abc import Callable
from typing import Any

import torch

from vllm_scalesearch.moe_method import ScaleSearchMoEMethod, check_supported, quantized_inputs
from vllm_scalesearch.options import ExpertOptions
from vllm_scalesearch.vllm_api import (
    FusedMoEConfig,
    FusedMoEKernel,
    FusedMoEQuantConfig,
    HummingIndexedExperts,
    MarlinExperts,
    MoEActivation,
    Mxfp4MoeBackend,
    NvFp4MoeBackend,
    convert_to_nvfp4_moe_kernel_format,
    convert_weight_to_mxfp4_moe_kernel_format,
    fused_marlin_moe,
    kMxfp4Static,
    kNvfp4Static,
    make_mxfp4_moe_kernel,
    make_mxfp4_moe_quant_config,
    make_nvfp4_moe_kernel,
    make_nvfp4_moe_quant_config,
    mxfp4_round_up_hidden_size_and_intermediate_size,
    replace_parameter,
    select_nvfp4_moe_backend,
)


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
        return quantized_inputs(x, self.format, self.w13_inputs)

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
        values, second_residual = quantized_inputs(out, self.format, self.w2_inputs)
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
            check_supported(searched, config, kNvfp4Static, prefix)
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
        check_supported(self.experts_cls, config, kMxfp4Static, prefix)
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
