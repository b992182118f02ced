"""Experts of mixtures of experts: what is stored, what is multiplied, options, splits, and bad input.

Small random models through vLLM on the CPU.
"""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompt_logprobs
from moe_layers import (
    BOUND,
    MIXTRAL,
    PROMPTS,
    QWEN,
    assert_codes,
    check_model,
    checkpoint_experts,
    collect,
    quant_methods,
    record,
    stored_experts,
)
from split_engines import run_split

from vllm_scalesearch.search import quantize

FP16_BOUND = 2**-10


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
