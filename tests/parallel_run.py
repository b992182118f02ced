"""Run by test_vllm_parallel.py and test_two_gpus.py as its own process: what a split engine holds and says.

    python parallel_run.py ARGUMENTS.json OUT.pt

ARGUMENTS holds the keyword arguments of `LLM`, under "prompts" token ids (without any, the model is only
loaded), and under "tokens" how many to generate after each, by default none. OUT holds what each rank stores of
its layers, the prompts' log probabilities, and of each generated token its id and the log probabilities of the
two likeliest.
"""

import io
import json
import os
import sys
from typing import Any

import layers
import torch
from conftest import prompt_logprobs


def generated(llm: Any, prompts: list[list[int]], tokens: int) -> list[list[tuple[int, dict[int, float]]]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        [
            (token, {other: found.logprob for other, found in likeliest.items()})
            for token, likeliest in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]


def main() -> None:
    from vllm import LLM

    with open(sys.argv[1]) as file:
        arguments = json.load(file)
    prompts, tokens = arguments.pop("prompts"), arguments.pop("tokens", 0)
    llm = LLM(**{"enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True, **arguments})
    keep = layers.decoded if torch.cuda.is_available() else layers.stored
    stored = [torch.load(io.BytesIO(rank)) for rank in llm.apply_model(keep)]
    logprobs = prompt_logprobs(llm, prompts) if prompts else None
    texts = generated(llm, prompts, tokens) if tokens else None
    llm.llm_engine.engine_core.shutdown()
    torch.save({"stored": stored, "logprobs": logprobs, "texts": texts}, f"{sys.argv[2]}.partial")
    os.rename(f"{sys.argv[2]}.partial", sys.argv[2])


if __name__ == "__main__":
    main()
