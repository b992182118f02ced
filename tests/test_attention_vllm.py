"""Attention backend SCALESEARCH in real vLLM on the CPU: what its layers compute is the definition's attention
over what they were given, and no scheduling changes it."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import assert_is_the_definition, generate, random_prompt, start

from vllm_scalesearch.attention_reference import attention

pytestmark = pytest.mark.vllm

# What two runs may differ by in log probability, from sums in another order: logits are bf16, of which those
# between 16 and 32 are an eighth apart. 0.07 at most was seen.
NEAR = 0.25


@pytest.fixture(scope="module")
def first_layers(smollm2, tmp_path_factory):
    """SmolLM2 cut off after eight of its thirty layers: texts without sense, in a quarter of the time."""
    layers, folder = 8, tmp_path_factory.mktemp("smollm2")
    config = json.loads((smollm2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = load_file(smollm2 / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".")[2]) < layers}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def generate_scored(llm, prompts, tokens):
    """Of each prompt the tokens generated, each with the log probabilities of the two likeliest."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=2)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    texts = [
        [
            (token, {other: found.logprob for other, found in likeliest.items()})
            for token, likeliest in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]
    return texts, [o.num_cached_tokens for o in outputs]


def assert_same_text(got, expected):
    """The same tokens with the same log probabilities, up to where the two likeliest are as good as equal.

    Which of those comes first is rounding's choice, on this machine or that; not much may hang on it.
    """
    same = 0
    for ours, theirs in zip(got, expected, strict=True):
        for (token, found), (other, likeliest) in zip(ours, theirs, strict=True):
            if token != other:
                assert found.keys() == likeliest.keys(), (ours, theirs)
                assert abs(likeliest[token] - likeliest[other]) < NEAR, (ours, theirs)
                break
            assert abs(found[token] - likeliest[other]) < NEAR, (ours, theirs)
            same += 1
    assert same >= sum(map(len, expected)) / 2


WHOLE = {"operands": "qkvp"}
TOKENS = {"v_group": "tokens"}
MISTRAL = ("Mistral", {"sliding_window": 40})
GEMMA = (
    "Gemma2",
    {
        "attn_logit_softcapping": 5.0,
        "sliding_window": 48,
        "query_pre_attn_scalar": 64,
        "tie_word_embeddings": True,
    },
)


@pytest.mark.parametrize(
    ("architecture", "config", "attention_options", "arguments"),
    [
        ("Llama", {"head_dim": 64}, {}, {}),
        ("Llama", {"head_dim": 64}, TOKENS, {}),
        ("Llama", {"head_dim": 64}, WHOLE, {}),
        ("Llama", {"head_dim": 64}, {**WHOLE, **TOKENS, "two_level_p": False}, {"block_size": 32}),
        ("Llama", {"head_dim": 64}, {"prefill": "full_precision"}, {"block_size": 16}),
        ("Llama", {"head_dim": 64}, {**TOKENS, "prefill": "full_precision"}, {"block_size": 16}),
        ("Llama", {"head_dim": 96}, {"sink": 40, "recent": 1}, {"block_size": 128}),
        ("Llama", {"head_dim": 128, "num_key_value_heads": 1}, {"recent": 50}, {"block_size": 48}),
        ("Llama", {"head_dim": 256}, {"k": "absmax", "v": "fast", "hadamard": False}, {"dtype": "float16"}),
        (*MISTRAL, {}, {"block_size": 16}),
        (*MISTRAL, {**TOKENS, "sink": 0}, {}),
        (*GEMMA, {}, {}),
    ],
)
@pytest.mark.parametrize("chunk", [20, 256])
def test_layers_compute_the_definition(
    engine, tiny, recorded, architecture, config, attention_options, arguments, chunk
):
    config = {"head_dim": 64, **config}
    llm = start(engine, tiny(architecture, **config), attention_options, max_num_batched_tokens=chunk,
                enable_prefix_caching=False, **arguments)  # fmt: skip
    generate(llm, [random_prompt(150)], tokens=20)
    assert_is_the_definition(*recorded)


def test_short_requests_and_full_precision_everywhere(engine, tiny, recorded):
    calls, impls = recorded
    llm = start(engine, tiny("Llama", head_dim=64), {"sink": 200})
    generate(llm, [random_prompt(3)], tokens=30)
    assert_is_the_definition(calls, impls)
    for layer, chunks in calls.items():
        q, k, v, output = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        plain = dataclasses.replace(impls[layer].reference, k=None, v=None)
        expected = attention(q, k, v, plain, torch.float32)
        assert (output.float() - expected).norm() / expected.norm() < torch.finfo(output.dtype).eps


@pytest.mark.parametrize("attention_options", [{}, TOKENS, WHOLE])
def test_what_pages_held_before_does_not_matter(engine, tiny, attention_options):
    """vLLM is not asked to zero blocks, so a block begins with whatever a request before left there."""
    llm = start(engine, tiny("Llama", head_dim=64), attention_options, max_num_batched_tokens=100,
                enable_prefix_caching=False)  # fmt: skip
    prompts = [random_prompt(length, length) for length in (3, 17, 70, 150)]
    expected, _ = generate_scored(llm, prompts, 40)

    def fill(worker):
        """NaN, in packed pages as scales."""
        layers = worker.model_runner.compilation_config.static_forward_context
        pages = [layer.kv_cache for layer in layers.values() if hasattr(layer, "kv_cache")]
        for page in pages:
            page.view(torch.uint8).fill_(0xFF)
        return len(pages), len([name for name in layers if name.endswith(".attn")])

    pages, attention_layers = llm.collective_rpc(fill)[0]
    assert pages == 2 * attention_layers > 0
    assert generate_scored(llm, prompts, 40)[0] == expected
    assert not llm.llm_engine.engine_core.engine_core.scheduler.needs_kv_cache_zeroing


# few_blocks: room for two of the requests until they need another block.
@pytest.mark.parametrize(
    ("attention_options", "few_blocks"), [({}, 16), (TOKENS, 18)], ids=["head_dim", "tokens"]
)
def test_text_does_not_depend_on_what_runs_beside_it(
    engine, first_layers, attention_options, few_blocks, monkeypatch
):
    """Alone, batched, in small chunks, after preemption and after prefix hits: the same tokens."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, cached = [], []
    preempt = Scheduler._preempt_request
    monkeypatch.setattr(
        Scheduler, "_preempt_request", lambda self, *a, **kw: (preempted.append(1), preempt(self, *a, **kw))[1]
    )
    shared = random_prompt(150, 9, 40000)
    prompts = [shared + random_prompt(20 + 7 * i, 20 + i, 40000) for i in range(4)]
    plain = dict(max_model_len=256, skip_tokenizer_init=True, enable_prefix_caching=False)
    llm = start(engine, first_layers, attention_options, **plain)
    alone = [generate_scored(llm, [prompt], 40)[0][0] for prompt in prompts]
    assert_same_text(generate_scored(llm, prompts, 40)[0], alone)
    llm = start(engine, first_layers, attention_options, max_num_batched_tokens=32, max_num_seqs=4, **plain)
    assert_same_text(generate_scored(llm, prompts, 40)[0], alone)
    llm = start(engine, first_layers, attention_options, num_gpu_blocks_override=few_blocks,
                max_num_batched_tokens=64, max_num_seqs=4, **plain)  # fmt: skip
    assert_same_text(generate_scored(llm, prompts, 40)[0], alone)
    assert preempted
    llm = start(engine, first_layers, attention_options, **{**plain, "enable_prefix_caching": True})
    generate(llm, [shared + random_prompt(5, 77, 40000)], 1)
    for prompt, expected in zip(prompts, alone, strict=True):
        texts, (hit,) = generate_scored(llm, [prompt], 40)
        cached.append(hit)
        assert_same_text(texts, [expected])
    assert min(cached) >= 128


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_cache_dtype": "auto"}, "needs --kv-cache-dtype nvfp4"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers must be empty"),
        ({"block_size": 144}, "block_size 144 is not a multiple of 16 up to 128"),
    ],
)
def test_what_cannot_run_is_refused_with_a_reason(engine, tiny, change, reason):
    with pytest.raises(ValueError, match=reason):
        start(engine, tiny("Llama", head_dim=64), **change)


@pytest.mark.parametrize(
    ("architecture", "config", "reason"),
    [
        ("Llama", {"head_dim": 32}, "head_size 32 is not among"),
        ("Bloom", {"num_attention_heads": 2}, "ALiBi is not supported"),
    ],
)
def test_models_that_cannot_run_are_refused_with_a_reason(engine, tiny, architecture, config, reason):
    with pytest.raises((ValueError, NotImplementedError), match=reason):
        start(engine, tiny(architecture, **config))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about the CPU platform")
def test_other_backends_are_left_alone(engine, tiny):
    """Without the option, and with another backend, the CPU platform is vLLM's own."""
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    assert isinstance(current_platform, CpuPlatform)
    model = tiny("Llama", head_dim=64)
    prompt = random_prompt(40)
    usual = generate(engine(model), [prompt])
    assert generate(engine(model, attention_backend="CPU_ATTN"), [prompt]) == usual
    layers = engine(model).apply_model(_backends)[0]
    assert layers == ["CPU_ATTN", "CPU_ATTN"]


def _backends(model):
    return [m.attn_backend.get_name() for m in model.modules() if hasattr(m, "attn_backend")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sinks": 4}, "unknown option 'sinks'"),
        ({"recent": 0}, "'recent' is a count of tokens, 1 or more"),
        ({"k": "fastest"}, "'k'"),
        ({"operands": "kvp"}, "'operands' is one of kv, qkvp"),
        ({"v_scale": 0.1}, "'v_scale' is a power of two"),
    ],
)
def test_wrong_options_are_errors(engine, tiny, options, message):
    with pytest.raises(ValueError, match=message):
        start(engine, tiny("Llama", head_dim=64), options)


def test_with_quantized_weights(engine, tiny, recorded):
    """Both halves of the plugin in one engine."""
    llm = start(engine, tiny("Llama", head_dim=64), quantization="scalesearch", max_num_batched_tokens=32)
    generate(llm, [random_prompt(100)], tokens=4)
    assert_is_the_definition(*recorded)
