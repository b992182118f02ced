"""Output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by how its linear layers are kept.

    python benchmarks/serve.py [--layers 8] [--only NAME,...] [--name serve]

Weights are vLLM's dummy ones, or random NVFP4 in a checkpoint; torch.compile and CUDA graphs, each engine in
a process of its own, which take turns (engines.py). Prompts of 128 random tokens, 128 tokens generated; the
time is that of decoding, the difference between generating 129 tokens and one, the median of `ROUNDS`. Beside
it how long kernels run in a step, by the same difference under a profiler: the rest of it is the host's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import kernel_time
import llama_like
import torch
from report import table, write

BATCHES = (1, 32, 128)
PROMPT, OUTPUT, PROFILED = 128, 128, 32
ROUNDS = 7
CACHED = 50_000  # tokens that a cache holds; 128 requests have 33,000
SCALESEARCH = {"quantization": "scalesearch"}
VARIANTS = {
    "bf16": ("bf16", {}),
    "fp8": ("bf16", {"quantization": "fp8"}),
    "nvfp4 Marlin": ("nvfp4", {"linear_backend": "marlin"}),
    "nvfp4 Humming": ("nvfp4", {"linear_backend": "humming"}),
    "scalesearch W4A16": ("bf16", SCALESEARCH),
    "scalesearch W4A4": (
        "bf16", SCALESEARCH | {"additional_config": {"scalesearch": {"activations": "paper"}}}
    ),
}  # fmt: skip


def measure(model: str, arguments: dict, turn: Callable[..., None]) -> dict[str, dict[int, Any]]:
    """Of each batch: output tokens a second, those of each round, and ms of kernels a step."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the worker
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=1024,
        gpu_memory_utilization=0.15,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **arguments,
    )
    turn(llm)
    generator = torch.Generator().manual_seed(0)
    prompts = {}
    for batch in BATCHES:
        tokens = torch.randint(10, 1000, (batch, PROMPT), generator=generator).tolist()
        prompts[batch] = [{"prompt_token_ids": prompt} for prompt in tokens]

    def seconds(batch: int, outputs: int) -> float:
        parameters = SamplingParams(
            max_tokens=outputs, min_tokens=outputs, temperature=0, ignore_eos=True, detokenize=False
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        llm.generate(prompts[batch], parameters, use_tqdm=False)
        return time.perf_counter() - start

    def kernels(batch: int, outputs: int) -> float:
        llm.collective_rpc(kernel_time.start)
        seconds(batch, outputs)
        return llm.collective_rpc(kernel_time.stop)[0][0]

    for batch in BATCHES:
        seconds(batch, 2)
    rounds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for _ in range(ROUNDS):
        for batch, rates in rounds.items():
            turn(llm)
            rates.append(batch * OUTPUT / (seconds(batch, OUTPUT + 1) - seconds(batch, 1)))
    turn(llm)
    return {
        "tokens_per_s": {batch: statistics.median(rates) for batch, rates in rounds.items()},
        "rounds": rounds,
        "kernels_ms": {b: (kernels(b, PROFILED + 1) - kernels(b, 1)) / PROFILED for b in BATCHES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(VARIANTS))
    engines.add_measure_option(parser)
    engines.add_at_once_option(parser)
    parser.add_argument("--name", default="serve", help="of the file under results/")
    arguments = parser.parse_args()
    if arguments.measure:
        engines.run_measure(arguments.measure, measure)
        return
    found = {}

    def keep(name: str, result: dict, log: list[str]) -> None:
        found[name] = result
        print(name, result, *[line for line in log if "scalesearch:" in line], sep="\n  ", flush=True)
        results = {part: {name: run[part] for name, run in found.items()} for part in result}
        write(arguments.name, {"layers": arguments.layers} | results)  # what is there stays

    with tempfile.TemporaryDirectory() as work:
        models = {kind: Path(work) / kind for kind in ("bf16", "nvfp4")}
        llama_like.write_config(models["bf16"], arguments.layers)
        llama_like.make_nvfp4(models["nvfp4"], arguments.layers)
        torch.cuda.empty_cache()
        # Given, so that there is nothing to profile while other engines start.
        cache = arguments.layers * llama_like.CACHE_BYTES * CACHED
        chosen, taken = {}, {}
        for name in arguments.only.split(","):
            kind, engine = VARIANTS[name]
            load = "dummy" if kind == "bf16" else "auto"
            chosen[name] = models[kind], engine | {"kv_cache_memory_bytes": cache, "load_format": load}
            taken[name] = cache / 2**30 + llama_like.engine_gib(arguments.layers, kind == "nvfp4")
        groups = engines.groups_of(taken, arguments.at_once)
        failed = engines.side_by_side(__file__, Path(work), chosen, keep, groups)
    for part, title, digits in (
        ("tokens_per_s", "output tokens a second", 0),
        ("kernels_ms", "kernels' ms a step", 3),
    ):
        rows = [[name, *[f"{run[part][str(b)]:.{digits}f}" for b in BATCHES]] for name, run in found.items()]
        table([title, *[f"batch {batch}" for batch in BATCHES]], rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
