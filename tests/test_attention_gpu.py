"""Attention backend SCALESEARCH on a CUDA GPU, with torch.compile and CUDA graphs."""

import pytest
from served import SERVED

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

TOKENS = 32
PROMPTS = [
    "The capital of France is Paris. " * 30 + "The capital of Germany is",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at 100 degrees Celsius, and it freezes at",
    "The first three prime numbers are 2, 3 and 5. The next three are",
]
# Two tokens closer than this may change places: products of bf16 weights depend on the batch's size.
NEAR = 0.25


def generate(llm, prompts):
    """Of each prompt, the tokens and the log probabilities of the two likeliest at each."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, logprobs=2)
    return [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]


def assert_same(got, expected):
    """The same tokens up to the first place where the two likeliest are as good as equal."""
    for a, b in zip(got, expected, strict=True):
        for i, (token, other) in enumerate(zip(a.token_ids, b.token_ids, strict=True)):
            first, second = sorted((found.logprob for found in b.logprobs[i].values()), reverse=True)[:2]
            if token != other:
                assert first - second < NEAR, (i, a.text, b.text)
                break
            assert abs(a.logprobs[i][token].logprob - b.logprobs[i][other].logprob) < NEAR


@pytest.mark.parametrize(
    "attention", [{}, {"prefill": "stored"}, {"operands": "qkvp"}], ids=["kv", "stored", "qkvp"]
)
def test_text_with_cuda_graphs(engine, smollm2, attention):
    """Alone, batched, in chunks and after prefix hits, compiled and captured: the text of the eager run."""
    options = {"scalesearch": {"attention": {"r": "none", **attention}}}
    common = dict(SERVED, additional_config=options, max_model_len=1024)
    llm = engine(smollm2, **common, enable_prefix_caching=False)
    expected = [generate(llm, [prompt])[0] for prompt in PROMPTS]
    assert "Berlin" in expected[0].text
    assert_same(generate(llm, PROMPTS), expected)
    llm = engine(
        smollm2,
        **common,
        enforce_eager=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]},
        max_num_batched_tokens=64,
        max_num_seqs=8,
    )
    assert_same([generate(llm, [prompt])[0] for prompt in PROMPTS], expected)
    assert_same(generate(llm, PROMPTS), expected)
    assert_same(generate(llm, PROMPTS[:1]), expected[:1])  # its prefix is cached by now
