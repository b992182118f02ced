"""Prompt and output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by its KV cache.

    python benchmarks/serve_attention.py [--layers 8] [--only NAME,...] [--cases 32x8192 ...]

Dummy weights, torch.compile and CUDA graphs, each engine in a process of its own (engines.py). A case is
requests x prompt tokens; all are sent at once. The prompt's rate is that until each has its first token; the
output's rate is from there until the first one is done.
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

CASES = ("32x2048", "32x8192", "16x32768")
OURS = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
VARIANTS = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "SCALESEARCH": OURS,
    "SCALESEARCH and weights": OURS | {"quantization": "scalesearch"},
    "int4_per_token_head": {"kv_cache_dtype": "int4_per_token_head"},
}
# Of a layer and token, K and V of 8 heads of 128.
CACHE_BYTES = {"bf16": 4096, "fp8": 2048}
OUTPUT = 192


def measure(model: str, arguments: dict, ready: Callable[[], None]) -> dict[str, dict[str, float]]:
    from vllm import LLM, SamplingParams

    cases = arguments.pop("cases")
    batches = sorted({1, 2, *(int(case.split("x")[0]) for case in cases)})
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        load_format="dummy",
        max_model_len=33792,
        max_num_batched_tokens=8192,
        max_num_seqs=batches[-1],
        gpu_memory_utilization=0.05,  # what is checked, not what is taken
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": batches},
        **arguments,
    )
    capacity = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    ready()
    generator = torch.Generator().manual_seed(0)
    engine, found = llm.llm_engine, {}
    for case in ["2x256", *cases]:
        batch, length = map(int, case.split("x"))
        params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True, detokenize=False)
        for i in range(batch):
            tokens = torch.randint(10, 1000, (length,), generator=generator).tolist()
            engine.add_request(f"{case}-{i}", {"prompt_token_ids": tokens}, params)
        counts, start, first, last = {}, time.perf_counter(), None, None
        while engine.has_unfinished_requests():
            for output in engine.step():
                counts[output.request_id] = len(output.outputs[0].token_ids)
                if output.finished and first is not None and last is None:
                    last = time.perf_counter(), sum(counts.values())
            if first is None and len(counts) == batch:
                first = time.perf_counter(), sum(counts.values())
        found[case] = {
            "prompt_tokens_per_s": batch * length / (first[0] - start),
            "output_tokens_per_s": (last[1] - first[1]) / (last[0] - first[0]),
        }
    del found["2x256"]
    return found | {"blocks": capacity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--name", default="serve_attention", help="of the file under results/")
    engines.add_measure_option(parser)
    args = parser.parse_args()
    if args.measure:
        engines.run_measure(args.measure, measure)
        return
    sizes = [map(int, case.split("x")) for case in args.cases]
    most = max(batch * (length + OUTPUT + 64) for batch, length in sizes)
    found = {}

    def keep(name: str, result: dict, log: list[str]) -> None:
        found[name] = result
        print(name, result, *[line for line in log if "scalesearch." in line][:4], sep="\n  ", flush=True)
        write(args.name, {"layers": args.layers, "runs": found})

    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        llama_like.write_config(model, args.layers)
        chosen = {}
        for name in args.only.split(","):
            size = int(most * args.layers * CACHE_BYTES.get(name, 1400) * 1.05) + (1 << 28)
            chosen[name] = model, VARIANTS[name] | {"cases": args.cases, "kv_cache_memory_bytes": size}
        engines.side_by_side(__file__, Path(work), chosen, keep)
    rows = []
    for name, result in found.items():
        cells = [result[case] for case in args.cases]
        rows.append(
            [name, *(f"{c['prompt_tokens_per_s']:.0f} / {c['output_tokens_per_s']:.0f}" for c in cells)]
        )
    table(["cache", *args.cases], rows)


if __name__ == "__main__":
    main()
