"""On a CUDA GPU: the reference gives the CPU's bits, and vLLM's kernels multiply what it made."""

import layers
import pytest
import torch
from conftest import prompt_logprobs

from vllm_scalesearch.formats import FORMATS
from vllm_scalesearch.ops.quantize import quantize_values
from vllm_scalesearch.search import quantize

pytestmark = pytest.mark.gpu

PROMPTS = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()


def _data(dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, and rows that are zero, tiny, huge, and not finite."""
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2] *= 1e-30 if dtype != torch.float16 else 1e-6
    x[3] *= 1e30 if dtype != torch.float16 else 1e3
    x[4, 7], x[5, 40] = torch.nan, torch.inf
    x[6, 16:] *= 1e-4
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("policy", ["absmax", "fast", "paper", "exact", "full"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_codes_and_scales_are_those_of_the_cpu(format, policy, dtype):
    fmt, x = FORMATS[format], _data(dtype)
    for per_row in (False, True):
        cpu = quantize(x, fmt, policy, per_row=per_row)
        gpu = quantize(x.cuda(), fmt, policy, per_row=per_row)
        assert torch.equal(gpu.packed.cpu(), cpu.packed)
        assert torch.equal(gpu.scales.cpu().view(torch.uint8), cpu.scales.view(torch.uint8))
        assert torch.equal(gpu.tensor_scale.cpu(), cpu.tensor_scale)


@pytest.mark.parametrize("format", list(FORMATS))
def test_run_time_quantizer_is_the_reference_inside_a_cuda_graph(format):
    x = torch.randn(32, 512, device="cuda", dtype=torch.bfloat16)
    quantize_values(x, format, "paper")  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values, residual = quantize_values(x, format, "paper")
    x.copy_(torch.randn_like(x))
    graph.replay()
    fmt = FORMATS[format]
    expected = quantize(x, fmt, "paper", per_row=fmt.has_tensor_scale).values(x.dtype)
    assert torch.equal(values, expected[0])
    assert torch.equal(residual, expected[1].expand(32, 1))


MARLIN = {"linear_backend": "marlin"}
# Left to itself vLLM 0.32 takes Humming on Hopper, which compiles each new shape for a minute or more:
# hence Marlin where the kernel is not the point.
CONFIGS = {
    "nvfp4 w4a16": ({}, {}),
    "nvfp4 w4a4": ({"activations": "paper"}, {}),
    "nvfp4 w4a16 marlin": ({}, MARLIN),
    "nvfp4 w4a4 marlin": ({"activations": "paper"}, MARLIN),
    "mxfp4 w4a16 marlin": ({"format": "mxfp4"}, MARLIN),
    "mxfp4 w4a4 marlin": ({"format": "mxfp4", "activations": "paper"}, MARLIN),
}
# Of the norm of a layer's output. bf16 rounds the kernel's result and, with quantized inputs, the
# result times their scales; Humming's own error is as large again.
BOUND = 2**-7


def _check(engine, model, label) -> None:
    options, arguments = CONFIGS[label]
    llm = engine(model, options, **arguments)
    llm.apply_model(layers.record)
    for tokens in (48, 12):  # vLLM's kernel, and the decode kernel on its copy of the weights
        prompt_logprobs(llm, [PROMPTS[0][:tokens]])
        layers.check(model, llm.apply_model(layers.collect)[0], options, BOUND)


@pytest.mark.vllm
@pytest.mark.parametrize("label", CONFIGS)
def test_layers_multiply_what_the_reference_quantizes(engine, smollm2, label):
    _check(engine, smollm2, label)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "label", ["nvfp4 w4a16 marlin", "nvfp4 w4a4 marlin", "mxfp4 w4a4 marlin", "nvfp4 w4a4"]
)
def test_biases_come_after_the_scales(engine, tiny, label):
    """Marlin reorders the bias that it is given, and Humming asks for one; neither may be seen."""
    _check(engine, tiny("Qwen2"), label)


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{"activations": "paper"}, {}], ids=["w4a4", "w4a16"])
def test_compiled_and_captured_model_answers(engine, smollm2, options):
    from vllm import SamplingParams

    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    llm = engine(smollm2, options, enforce_eager=False, compilation_config=graphs, **MARLIN)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    assert "Paris" in answer[0].outputs[0].text
