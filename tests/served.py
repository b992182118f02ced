"""Engines with attention backend SCALESEARCH, and the definition that their layers are held to."""

import torch

from vllm_scalesearch.attention_reference import attention

# Every token beyond sink and window is read back from packed pages.
ATTENTION = {"r": "none", "recent": 16}
SERVED = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}


def start(engine, model, attention=None, **arguments):
    options = {"scalesearch": {"attention": {**ATTENTION, **(attention or {})}}}
    return engine(model, additional_config=options, **{**SERVED, **arguments})


def generate(llm, prompts, tokens=4, **sampling):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, **sampling)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(o.outputs[0].token_ids) for o in llm.generate(requests, params, use_tqdm=False)]


def random_prompt(length, seed=0, vocabulary=512):
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_is_the_definition(calls, impls):
    """A request's chunks together against attention over the whole of it, to the rounding of the output."""
    assert calls
    for layer, chunks in calls.items():
        reference = impls[layer].reference
        q, k, v = (torch.cat(parts) for parts in list(zip(*chunks, strict=True))[:3])
        context = 0
        for part in chunks:
            end = context + len(part[0])
            expected = attention(q[context:end], k[:end], v[:end], reference, torch.float32)
            # Scores and outputs have the same operands to the bit, so what is left is the order of fp32
            # sums and one rounding of the output; and, where Q or P is quantized, a value that falls to the
            # other side of a rounding now and then.
            # A kernel rounds P to 16 bits besides.
            eps = torch.finfo(part[3].dtype).eps * (2 if part[3].is_cuda else 1)
            error = (part[3].float() - expected).norm() / expected.norm()
            assert error < (2e-2 if reference.p is not None else eps), (layer, context, error)
            context = end
