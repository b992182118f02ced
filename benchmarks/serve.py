"""Output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by how its linear layers are kept.

    python benchmarks/serve.py [--layers 8] [--only NAME,...]

Random weights, torch.compile and CUDA graphs, each engine in a process of its own (engines.py). Prompts of
128 random tokens, 128 tokens generated; the time is that of decoding alone, the difference between generating
129 tokens and one.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import engines
import llama_like
import torch
from report import table, write

BATCHES = (1, 32, 128)
PROMPT, OUTPUT = 128, 128
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


def measure(model: str, arguments: dict, ready: Callable[[], None]) -> dict[int, float]:
    """Output tokens a second of each batch."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=1024,
        gpu_memory_utilization=0.15,
        kv_cache_memory_bytes=4 << 30,  # nothing to profile while other engines start
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **arguments,
    )
    ready()
    found = {}
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        tokens = torch.randint(10, 1000, (batch, PROMPT), generator=generator).tolist()
        prompts = [{"prompt_token_ids": prompt} for prompt in tokens]

        def seconds(outputs: int, prompts=prompts) -> float:
            parameters = SamplingParams(
                max_tokens=outputs, min_tokens=outputs, temperature=0, ignore_eos=True, detokenize=False
            )
            torch.cuda.synchronize()
            start = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            return time.perf_counter() - start

        seconds(2)
        rounds = [seconds(OUTPUT + 1) - seconds(1) for _ in range(3)]
        found[batch] = batch * OUTPUT / sorted(rounds)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(VARIANTS))
    engines.add_measure_option(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        engines.run_measure(arguments.measure, measure)
        return
    found = {}

    def keep(name: str, result: dict, log: list[str]) -> None:
        found[name] = result
        print(name, result, *[line for line in log if "scalesearch:" in line], sep="\n  ", flush=True)
        write("serve", {"layers": arguments.layers, "tokens_per_s": found})  # what is there stays

    with tempfile.TemporaryDirectory() as work:
        models = {}
        for kind in ("bf16", "nvfp4"):
            models[kind] = Path(work) / kind
            llama_like.make(models[kind], arguments.layers, kind == "nvfp4")
        torch.cuda.empty_cache()
        chosen = {name: (models[VARIANTS[name][0]], VARIANTS[name][1]) for name in arguments.only.split(",")}
        failed = engines.side_by_side(__file__, Path(work), chosen, keep)
    rows = [[name, *[f"{line[str(batch)]:.0f}" for batch in BATCHES]] for name, line in found.items()]
    table(["linear layers", *[f"batch {batch}" for batch in BATCHES]], rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
