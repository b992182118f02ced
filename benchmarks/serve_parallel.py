"""Prompt and output tokens a second of 16 Llama-3.1-8B layers in vLLM, on one GPU and split over two.

    python benchmarks/serve_parallel.py [--layers 16] [--only NAME,...] [--linear-backend marlin]

Dummy weights, torch.compile and CUDA graphs. Engines run in processes of their own, which take turns
(engines.py). Prompts of 1024 random tokens, all sent at once. The prompt's rate is that until each request has
its first token, the output's that from there until the first one is done; each is the median of three rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import llama_like
from report import table, write
from serve_attention import run_case

BATCHES = (1, 32)
PROMPT, OUTPUT, ROUNDS = 1024, 128, 3
WEIGHTS = {"quantization": "scalesearch"}
CACHE = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
KINDS = {"bf16": {}, "weights": WEIGHTS, "cache": CACHE, "weights and cache": WEIGHTS | CACHE}
VARIANTS = {
    f"{name} TP={ranks}": kind | {"tensor_parallel_size": ranks}
    for name, kind in KINDS.items()
    for ranks in (1, 2)
}
DEFAULT = [name for name in VARIANTS if not name.startswith("cache")]


def measure(model: str, arguments: dict, turn: Callable[..., None]) -> dict[str, Any]:
    """Rates of each batch, as `run_case` gives them."""
    from vllm import LLM

    defaults = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "max_model_len": 2048,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": max(BATCHES),
        "gpu_memory_utilization": 0.05,  # what is checked, not what is taken
        "kv_cache_memory_bytes": 3 << 30,  # a GPU; 32 requests of bf16 take 2.3 of one
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, *BATCHES[1:]]},
    }
    llm = LLM(model, **{**defaults, **arguments})
    turn()
    for batch in BATCHES:
        run_case(llm, f"warm-up {batch}", batch, PROMPT, 16)
    rounds: dict[int, list[dict[str, Any]]] = {batch: [] for batch in BATCHES}
    for i in range(ROUNDS):
        for batch, runs in rounds.items():
            turn()
            runs.append(run_case(llm, f"{batch} {i}", batch, PROMPT, OUTPUT))
    rates = ("batch", "prompt_tokens_per_s", "output_tokens_per_s", "step_ms")
    return {
        str(batch): {key: statistics.median(run[key] for run in runs) for key in rates} | {"rounds": runs}
        for batch, runs in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", default=",".join(DEFAULT), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument(
        "--linear-backend",
        default="marlin",
        help="vLLM's kernel for many rows of quantized weights. 'auto' takes Humming on Hopper, faster for "
        "prompts, which compiles each new shape for about a minute while the engine starts",
    )
    parser.add_argument(
        "--split-arguments", type=json.loads, default={}, metavar="JSON",
        help='laid over the arguments of TP=2 engines, as {"disable_custom_all_reduce": true}',
    )  # fmt: skip
    engines.add_measure_option(parser)
    args = parser.parse_args()
    if args.measure:
        engines.run_measure(args.measure, measure)
        return
    unknown = [name for name in args.only.split(",") if name not in VARIANTS]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(VARIANTS)}")
    # Each engine's process, and what it starts, inherits these.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    results: dict[str, Any] = {
        "layers": args.layers, "prompt": PROMPT, "output": OUTPUT, "linear_backend": args.linear_backend,
        "split_arguments": args.split_arguments, "runs": {},
    }  # fmt: skip

    def keep(name: str, result: dict, log: list[str]) -> None:
        results["runs"][name] = result
        print(name, result, *[line for line in log if "scalesearch:" in line][:4], sep="\n  ", flush=True)
        write("serve_parallel", results)  # what is there stays

    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        llama_like.write_config(model, args.layers)
        chosen = {}
        for name in args.only.split(","):
            engine = dict(VARIANTS[name])
            if "quantization" in engine:
                engine["linear_backend"] = args.linear_backend
            if engine["tensor_parallel_size"] > 1:
                engine |= args.split_arguments
            chosen[name] = model, engine
        failed = engines.side_by_side(__file__, Path(work), chosen, keep)
    rows = [
        [name, *(f"{c['prompt_tokens_per_s']:.0f} / {c['output_tokens_per_s']:.0f}" for c in run.values())]
        for name, run in results["runs"].items()
    ]
    table(["prompt / output tokens a second", *(f"batch {batch}" for batch in BATCHES)], rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
