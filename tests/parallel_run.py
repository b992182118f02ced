"""Run by test_vllm_parallel.py as its own process: a split engine, its stored codes and its logprobs.

    python parallel_run.py ARGUMENTS.json OUT.pt

ARGUMENTS holds the keyword arguments of `LLM` and, under "prompts", token ids; without any, the model
is only loaded.
"""

import io
import json
import os
import sys

import layers
import torch
from conftest import prompt_logprobs


def main() -> None:
    from vllm import LLM

    with open(sys.argv[1]) as file:
        arguments = json.load(file)
    prompts = arguments.pop("prompts")
    llm = LLM(enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, **arguments)
    stored = [torch.load(io.BytesIO(rank)) for rank in llm.apply_model(layers.stored)]
    logprobs = prompt_logprobs(llm, prompts) if prompts else None
    llm.llm_engine.engine_core.shutdown()
    torch.save({"stored": stored, "logprobs": logprobs}, f"{sys.argv[2]}.partial")
    os.rename(f"{sys.argv[2]}.partial", sys.argv[2])


if __name__ == "__main__":
    main()
