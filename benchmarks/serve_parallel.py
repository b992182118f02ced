"""Prompt and output tokens a second of 16 Llama-3.1-8B layers in vLLM, on one GPU and split over two.

    python benchmarks/serve_parallel.py [--layers 16] [--only NAME,...]

Dummy weights, torch.compile and CUDA graphs, each engine in a process of its own (engines.py), measured one
after the other. Prompts of 1024 random tokens, all sent at once; the output's rate is that between the first
token of the last request and the end of the first.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import llama_like
from report import table, write
from serve_attention import run_case

BATCHES = (1, 32)
PROMPT, OUTPUT = 1024, 128
OURS = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
KINDS = {"bf16": {}, "SCALESEARCH": OURS, "SCALESEARCH and weights": OURS | {"quantization": "scalesearch"}}
VARIANTS = {
    f"{name}, {ranks} GPU{'s' * (ranks > 1)}": kind | {"tensor_parallel_size": ranks}
    for name, kind in KINDS.items()
    for ranks in (1, 2)
}


def measure(model: str, arguments: dict, ready: Callable[[], None]) -> dict[str, Any]:
    from vllm import LLM

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=2048,
        max_num_batched_tokens=8192,
        max_num_seqs=BATCHES[-1],
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=3 << 30,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": [1, 2, *BATCHES[1:]]},
        **arguments,
    )
    ready()
    engine = llm.llm_engine
    run_case(engine, "warm-up", 2, PROMPT, OUTPUT)
    return {str(batch): run_case(engine, f"{batch}", batch, PROMPT, OUTPUT) for batch in BATCHES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", default=";".join(VARIANTS), help="separated by ;")
    engines.add_measure_option(parser)
    args = parser.parse_args()
    if args.measure:
        engines.run_measure(args.measure, measure)
        return
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    found: dict[str, Any] = {}

    def keep(name: str, result: dict, log: list[str]) -> None:
        found[name] = result
        print(name, result, sep="\n  ", flush=True)
        write("serve_parallel", {"layers": args.layers, "prompt": PROMPT, "output": OUTPUT, "runs": found})

    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        llama_like.write_config(model, args.layers)
        chosen = {name: (model, VARIANTS[name]) for name in args.only.split(";")}
        failed = engines.side_by_side(__file__, Path(work), chosen, keep)
    rows = [
        [name, *(f"{c['prompt_tokens_per_s']:.0f} / {c['output_tokens_per_s']:.0f}" for c in run.values())]
        for name, run in found.items()
    ]
    table(["prompt / output tokens a second", *(f"batch {batch}" for batch in BATCHES)], rows)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
