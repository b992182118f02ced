"""Experts of mixtures of experts on a CUDA GPU, through vLLM's kernels."""

import pytest
from conftest import prompt_logprobs
from moe_layers import GPU_MIXTRAL, PROMPTS, check_model, experts_classes

# Widths that the kernels take without much padding.
GPU_QWEN = dict(hidden_size=256, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
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


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("label", GPU_CONFIGS)
def test_gpu_layers_are_the_references(engine, tiny, label):
    options, backend = GPU_CONFIGS[label]
    model = tiny("Qwen3Moe", **GPU_QWEN)
    llm = engine(model, options, moe_backend=backend, linear_backend="marlin")
    classes = llm.apply_model(experts_classes)[0]
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
