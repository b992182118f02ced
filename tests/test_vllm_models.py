"""The quantization config on small random models: layers of every kind, options, and bad input."""

import io
import json
import shutil
from pathlib import Path

import layers
import pytest
import torch
from conftest import prompt_logprobs
from fake_quant import fake_quantized, token_logprobs

from vllm_scalesearch.formats import finite_amax, tensor_scale_of
from vllm_scalesearch.search import quantize

pytestmark = pytest.mark.vllm

PROMPTS = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()


def assert_same(got: torch.Tensor, expected: torch.Tensor, unquantized: torch.Tensor) -> None:
    """bf16 noise is all that separates the two: under a fifth of what quantization changes."""
    noise, effect = (got - expected).abs().mean().item(), (unquantized - expected).abs().mean().item()
    assert noise < 0.2 * effect, (noise, effect)


def _linear_methods(model: torch.nn.Module) -> dict[str, str]:
    return {
        name: type(module.quant_method).__name__
        for name, module in model.named_modules()
        if hasattr(module, "quant_method")
    }


def _with_weight(model: Path, folder: Path, name: str, change) -> Path:
    """A copy of a model whose tensor `name` went through `change`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _with_config(model: Path, folder: Path, **changes) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def assert_layers(llm, model: Path, options: dict, bound: float) -> None:
    """Each layer of one prompt's forward pass, against the reference."""
    llm.apply_model(layers.record)
    prompt_logprobs(llm, PROMPTS[:1])
    layers.check(model, llm.apply_model(layers.collect)[0], options, bound)


@pytest.mark.parametrize("options", [{}, {"format": "mxfp4"}], ids=["nvfp4", "mxfp4"])
def test_logprobs_are_those_of_the_reference(engine, tiny, options):
    model = tiny("Qwen2")
    got = prompt_logprobs(engine(model, options), PROMPTS)
    expected = token_logprobs(fake_quantized(model, **options), PROMPTS)
    assert_same(got, expected, token_logprobs(fake_quantized(model, weights=None), PROMPTS))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activations": "paper"},
        {"activations": "paper", "cpu_storage": "packed"},
        {"format": "mxfp4", "activations": "paper"},
        {"weights": "offsets:-1,0,4,5", "activations": "absmax"},
    ],
    ids=["w4a16", "w4a4", "packed", "mxfp4", "policies"],
)
def test_biases_and_fused_layers(engine, tiny, options):
    """Qwen2 has biases on q, k and v, which come after both scales."""
    model = tiny("Qwen2")
    assert_layers(engine(model, options), model, options, bound=2**-8)


@pytest.mark.parametrize("options", [{}, {"activations": "paper"}], ids=["w4a16", "w4a4"])
def test_fp16_checkpoint(engine, tiny, options):
    model = tiny("Llama", dtype=torch.float16)
    llm = engine(model, options)
    assert llm.llm_engine.model_config.dtype == torch.float16
    assert_layers(llm, model, options, bound=2**-11)


def test_ignore_and_overrides(engine, tiny):
    options = {
        "ignore": ["layers.0.mlp"],
        "overrides": {"re:.*self_attn": {"weights": "absmax"}, "o_proj": {"format": "mxfp4"}},
        "cpu_storage": "packed",
    }
    llm = engine(tiny("Llama"), options)
    methods = llm.apply_model(_linear_methods)[0]
    assert methods["model.layers.0.mlp.gate_up_proj"] == "FullPrecisionLinearMethod"
    assert methods["model.layers.0.mlp.down_proj"] == "FullPrecisionLinearMethod"
    assert methods["model.layers.1.mlp.down_proj"] == "ScaleSearchLinearMethod"

    def attention_weights(model: torch.nn.Module):
        attention = model.model.layers[0].self_attn
        return attention.qkv_proj.weight.clone(), attention.o_proj.weight_scale.dtype

    packed, scale_dtype = llm.apply_model(attention_weights)[0]
    assert scale_dtype == torch.float8_e8m0fnu
    reference = fake_quantized(tiny("Llama"), weights=None)
    attention = reference.model.layers[0].self_attn
    weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).detach()
    expected = quantize(weight.bfloat16(), policy="absmax", tensor_scale=tensor_scale_of(finite_amax(weight)))
    assert torch.equal(packed, expected.packed)


def test_output_head_on_request(engine, tiny):
    llm = engine(tiny("Llama"), {"lm_head": True})
    assert llm.apply_model(_linear_methods)[0]["lm_head"] == "ScaleSearchLinearMethod"
    got = prompt_logprobs(llm, PROMPTS)
    reference = fake_quantized(tiny("Llama"))
    head_in_full = token_logprobs(reference, PROMPTS)
    reference.lm_head.weight.data = quantize(reference.lm_head.weight.data).dequantize()
    assert_same(got, token_logprobs(reference, PROMPTS), head_in_full)


def test_lm_head_and_embeddings_are_left_alone(engine, tiny):
    methods = engine(tiny("Llama"), {}).apply_model(_linear_methods)[0]
    assert methods["lm_head"] == methods["model.embed_tokens"] == "UnquantizedEmbeddingMethod"


def test_options_of_a_checkpoint_and_of_the_user(engine, tiny, tmp_path):
    """A bf16 checkpoint may say how to quantize it; the user's options are laid over that."""
    model = _with_config(
        tiny("Llama"), tmp_path / "m",
        quantization_config={"quant_method": "scalesearch", "format": "mxfp4", "cpu_storage": "packed"},
    )  # fmt: skip

    def dtypes(model: torch.nn.Module):
        return {module.weight_scale.dtype for module in model.modules() if hasattr(module, "weight_scale")}

    assert engine(model).apply_model(dtypes)[0] == {torch.float8_e8m0fnu}
    llm = engine(model, additional_config={"scalesearch": {"format": "nvfp4"}})
    assert llm.apply_model(dtypes)[0] == {torch.float8_e4m3fn}


def test_width_that_is_no_multiple_of_the_block_stays_in_full_precision(engine, tiny, vllm_log):
    llm = engine(tiny("Llama", intermediate_size=264), {})
    methods = llm.apply_model(_linear_methods)[0]
    assert methods["model.layers.0.mlp.down_proj"] == "FullPrecisionLinearMethod"
    assert methods["model.layers.0.mlp.gate_up_proj"] == "ScaleSearchLinearMethod"
    messages = [record.getMessage() for record in vllm_log.records]
    assert any("model.layers.0.mlp.down_proj stays in" in m and "264" in m and "16" in m for m in messages)
    assert torch.isfinite(prompt_logprobs(llm, PROMPTS)).all()


def test_routers_of_experts_stay_in_full_precision(engine, tiny):
    model = tiny("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    llm = engine(model, {})
    methods = llm.apply_model(_linear_methods)[0]
    assert methods["model.layers.0.self_attn.qkv_proj"] == "ScaleSearchLinearMethod"
    assert methods["model.layers.0.mlp.experts.routed_experts"] == "CpuMoEMethod"
    assert methods["model.layers.0.mlp.gate"] == "FullPrecisionLinearMethod"


def test_one_layer_at_a_time_is_in_full_precision(engine, tiny, monkeypatch):
    """While a layer is quantized, every other one waits on the meta device or is done."""
    from vllm_scalesearch.linear import ScaleSearchLinearMethod

    all_layers, counts = [], []
    create, quantize_layer = ScaleSearchLinearMethod.create_weights, ScaleSearchLinearMethod._quantize

    def create_weights(self, layer, *args, **kwargs):
        all_layers.append(layer)
        create(self, layer, *args, **kwargs)

    def count(self, layer):
        full = [
            other for other in all_layers if other.weight.dtype == torch.bfloat16 and not other.weight.is_meta
        ]
        counts.append(len(full))
        assert full[0] is layer
        return quantize_layer(self, layer)

    monkeypatch.setattr(ScaleSearchLinearMethod, "create_weights", create_weights)
    monkeypatch.setattr(ScaleSearchLinearMethod, "_quantize", count)
    engine(tiny("Llama"), {"cpu_storage": "packed"})
    assert counts == [1] * 8


def test_dummy_weights(engine, tiny):
    """Benchmarks load models without a checkpoint; their layers are quantized all the same."""
    llm = engine(tiny("Llama"), {"cpu_storage": "packed"}, load_format="dummy")
    stored = torch.load(io.BytesIO(llm.apply_model(layers.stored)[0]))
    assert len(stored) == 8 and all(packed.any() for packed, _, _ in stored.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(engine, tiny, tmp_path, value):
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    model = _with_weight(tiny("Llama"), tmp_path / "m", "model.layers.1.mlp.up_proj.weight", spoil)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_up_proj.*NaN or infinity"):
        engine(model, {})


def test_weights_that_are_already_eight_bit(engine, tiny, tmp_path):
    model = _with_weight(
        tiny("Llama"), tmp_path / "m", "model.layers.0.mlp.down_proj.weight",
        lambda weight: weight.to(torch.float8_e4m3fn),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj.*float8_e4m3fn.*quantized already"):
        engine(model, {})


def test_checkpoint_of_another_quantization_method(engine, tiny, tmp_path):
    model = _with_config(
        tiny("Llama"),
        tmp_path / "m",
        quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"},
    )
    with pytest.raises(ValueError, match=r"already quantized \(fp8\)"):
        engine(model, {})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weigths": "paper"}, r"unknown option 'weigths'; there are format, weights, activations"),
        ({"weights": "best"}, r"unknown scale policy 'best'; there are absmax"),
        (
            {"ignore": ["layers.7.mlp"]},
            r"'layers\.7\.mlp' matches no layer.*layers\.\{0\.\.1\}\.mlp\.down_proj",
        ),
        ({"overrides": {"q_proj": {"weights": "full"}}}, r"selects .*q_proj but not .*k_proj"),
    ],
)
def test_bad_options(engine, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        engine(tiny("Llama"), options)


def test_output_head_that_is_tied(engine, tiny):
    with pytest.raises(ValueError, match=r"lm_head is tied to the embeddings|no output head of its own"):
        engine(tiny("Llama", tie_word_embeddings=True), {"lm_head": True})


def test_float32_is_refused(engine, tiny):
    with pytest.raises(ValueError, match=r"float32 is not supported for quantization method scalesearch"):
        engine(tiny("Llama"), {}, dtype="float32")
