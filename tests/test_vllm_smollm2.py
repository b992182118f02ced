"""A real language model through vLLM's `LLM`: numbers against the reference, text that makes sense."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import layers
import pytest
import torch
from conftest import prompt_logprobs
from fake_quant import fake_quantized, token_logprobs

from vllm_scalesearch.search import quantize

pytestmark = pytest.mark.vllm

# Mean absolute difference of a token's log probability, in nats. vLLM computes in bf16 and the
# reference in fp32; without any quantization the two differ by 0.043 on this text.
TOLERANCE = 0.08
# Quantized inputs amplify that difference: a value that moves across a rounding boundary moves by a
# whole step. `test_layers_multiply_what_the_reference_quantizes` is the sharp test there.
TOLERANCE_OF_THE_MEAN_W4A4 = 0.2

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()
QUESTIONS = ("What is the capital of France?", "What is the color of the sky?")


@dataclass
class Run:
    """What one engine gave."""

    logprobs: torch.Tensor
    texts: list[str]
    layers: dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids
    return [ids[i * 192 : (i + 1) * 192] for i in range(4)]


CONFIGS = {
    "bf16": None,
    "w4a16": {},
    "packed": {"cpu_storage": "packed"},
    "w4a4": {"activations": "paper"},
    "mxfp4": {"format": "mxfp4"},
}


@pytest.fixture(scope="module")
def runs(smollm2: Path, tokens: list[list[int]]) -> Iterator[dict[str, Run]]:
    """Every configuration once: logprobs of the prompts, greedy answers, some layers."""
    from vllm import LLM, SamplingParams

    results = {}
    for label, options in CONFIGS.items():
        arguments = {} if options is None else {
            "quantization": "scalesearch",
            "additional_config": {"scalesearch": options},
        }  # fmt: skip
        llm = LLM(str(smollm2), enforce_eager=True, max_model_len=512, **arguments)
        llm.apply_model(layers.record)
        logprobs = prompt_logprobs(llm, tokens)
        kept = llm.apply_model(layers.collect)[0]
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        length = 4 if label == "packed" else 24
        answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=length), use_tqdm=False)
        results[label] = Run(logprobs, [answer.outputs[0].text for answer in answers], kept)
        llm.llm_engine.engine_core.shutdown()
    yield results


def _mean_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    print(f"mean difference {(a - b).abs().mean():.4f}")
    return (a - b).abs().mean().item()


def test_unquantized_run_is_the_yardstick(runs, smollm2, tokens):
    reference = token_logprobs(fake_quantized(smollm2, weights=None), tokens)
    assert _mean_difference(runs["bf16"].logprobs, reference) < TOLERANCE


@pytest.mark.parametrize("label, format", [("w4a16", "nvfp4"), ("packed", "nvfp4"), ("mxfp4", "mxfp4")])
def test_logprobs_are_those_of_the_reference(runs, smollm2, tokens, label, format):
    reference = token_logprobs(fake_quantized(smollm2, format), tokens)
    assert _mean_difference(runs[label].logprobs, reference) < TOLERANCE
    # The tolerance means something: quantization moves the logprobs by several times as much.
    assert _mean_difference(runs[label].logprobs, runs["bf16"].logprobs) > 4 * TOLERANCE


def test_logprobs_with_quantized_inputs(runs, smollm2, tokens):
    reference = token_logprobs(fake_quantized(smollm2, activations="paper"), tokens)
    got = runs["w4a4"].logprobs
    assert abs(got.mean() - reference.mean()) < TOLERANCE_OF_THE_MEAN_W4A4
    assert _mean_difference(got, runs["w4a16"].logprobs) > 2 * TOLERANCE


def test_greedy_text_is_sane(runs):
    for label in ("w4a16", "w4a4", "packed"):
        assert "capital of France" in runs[label].texts[0], label
    assert "Paris" in runs["w4a16"].texts[0]


def test_storage_does_not_change_the_result(runs):
    assert _mean_difference(runs["packed"].logprobs, runs["w4a16"].logprobs) < TOLERANCE
    for packed, dense in zip(runs["packed"].texts, runs["w4a16"].texts, strict=True):
        assert dense.startswith(packed)


def test_stored_codes_and_scales_are_those_of_the_reference(runs, smollm2):
    stored = runs["packed"].layers
    assert sorted(name.rsplit(".", 1)[-1] for name in stored) == sorted(
        2 * ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    )
    for name, layer in stored.items():
        expected = quantize(layers.checkpoint_tensor(smollm2, name))
        assert torch.equal(layer["packed"], expected.packed), name
        assert torch.equal(layer["scales"].view(torch.uint8), expected.scales.view(torch.uint8)), name
        assert torch.equal(layer["tensor_scale"], expected.tensor_scale), name


@pytest.mark.parametrize("label", ["w4a16", "packed", "w4a4", "mxfp4"])
def test_layers_multiply_what_the_reference_quantizes(runs, smollm2, label):
    # bf16 rounds the product and then the product times its scale: 2^-9 each at most.
    layers.check(smollm2, runs[label].layers, CONFIGS[label], bound=2**-8)
