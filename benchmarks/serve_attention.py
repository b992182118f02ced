"""Prompt and output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by its KV cache.

    python benchmarks/serve_attention.py [--layers 8] [--only NAME,...] [--cases 32x8192 ...]
    python benchmarks/serve_attention.py --cases --fixed-gib 20 --lengths 8192 32768
    python benchmarks/serve_attention.py --combine FILE ...

Dummy weights, torch.compile and CUDA graphs, each engine in a process of its own, which take turns
(engines.py). A case is requests x prompt tokens; all are sent at once. The prompt's rate is that until each has
its first token; the output's is of a step's time from there until the first one has its `OUTPUT` tokens, the
median of `WINDOWS` turns. How long kernels run in a step is then looked at in a few more, under a profiler: the
rest of a step's time is the host's.

With --fixed-gib all engines have the same memory for their KV cache, and besides the cases each serves as many
requests of the given lengths at once as fit, by vLLM's own count of blocks (`Capacity`).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import kernel_time
import llama_like
import torch
from report import RESULTS, table, write

CASES = ("1x8192", "32x2048", "32x8192", "16x32768")
OURS = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
VARIANTS = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "SCALESEARCH": OURS,
    "SCALESEARCH and weights": OURS | {"quantization": "scalesearch"},
    "FlashInfer nvfp4": {"attention_backend": "FLASHINFER", "kv_cache_dtype": "nvfp4"},
    "int4_per_token_head": {"kv_cache_dtype": "int4_per_token_head"},
}
# Of a layer and token, K and V of 8 heads of 128; what is packed to 4 bits takes less than 1400.
CACHE_BYTES = {"bf16": llama_like.CACHE_BYTES, "fp8": llama_like.CACHE_BYTES // 2}
OUTPUT = 512
WINDOWS = 8
RESUMED = 6  # steps of a turn that are not timed: results that were waiting, and a GPU that was idle
PROFILED = 24  # steps
BATCHED = 8192  # max_num_batched_tokens
# Steps that are measured when a batch takes long to start, and the largest batch.
MEASURED, MOST_REQUESTS = 96, 320


class Overfull(Exception):
    """The cache did not hold all requests of a case at once."""


@dataclass(frozen=True)
class Capacity:
    """How many requests a KV cache holds.

    blocks: of the pool that all groups share. groups: tokens of a block, window (None: all tokens are kept) and
    blocks that are kept at the start of each.
    """

    blocks: int
    groups: list[tuple[int, int | None, int]]

    def request(self, tokens: int, in_flight: int = 0) -> int:
        """Blocks that a request of so many tokens holds at most while `in_flight` of them are computed."""
        total = 0
        for block, window, sink in self.groups:
            whole = -(-tokens // block)
            kept = whole if window is None else sink + -(-(window - 1 + in_flight) // block) + 1
            total += min(whole, kept)
        return total

    def batch(self, length: int) -> tuple[int, int, int]:
        """The most prompts of `length` tokens that can be decoded together, `length`, and tokens to generate.

        vLLM admits the last one when its whole prompt fits, with what it may hold of a window while two
        steps are in flight. The first must not be done before the last has started.
        """
        admission = self.request(length, 2 * BATCHED) - self.request(length)
        found = None
        for batch in range(1, MOST_REQUESTS + 1):
            # Each request that decodes takes a token of a step's budget.
            output = -(-batch * length // (BATCHED - batch)) + MEASURED
            # One block is never used, and steps are prepared a token ahead.
            if batch * self.request(length + output + 2) + admission + 1 > self.blocks:
                break
            found = batch, length, output
        if found is None:
            raise SystemExit(f"a prompt of {length} tokens does not fit in {self.blocks} blocks")
        return found


def capacity(worker: Any) -> tuple[int, list[tuple[int, int | None, int]]]:
    """What `Capacity` is made of, from an engine's worker (`LLM.collective_rpc`)."""
    config = worker.model_runner.kv_cache_config
    specs = [group.kv_cache_spec for group in config.kv_cache_groups]
    groups = [
        (spec.block_size, getattr(spec, "sliding_window", None), getattr(spec, "sink_blocks", 0))
        for spec in specs
    ]
    return config.num_blocks, groups


def run_case(
    llm: Any, name: str, batch: int, length: int, output: int, profiled: int = 0,
    turn: Callable[[Any], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Rates of `batch` prompts of `length` random tokens; what kernels take of a step, over `profiled` more.

    turn: waits for this engine's turn (engines.py), before each of `WINDOWS` parts of the output. Raises
    Overfull where one was done before all had started, and where not all were decoded in every step from
    there on.
    """
    from vllm import SamplingParams

    engine, generator = llm.llm_engine, torch.Generator().manual_seed(batch)
    most = output + 2 * profiled  # the engine is ahead of what was asked for
    params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=True, detokenize=False)
    ids = [f"{name}-{i}" for i in range(batch)]
    for request in ids:
        tokens = torch.randint(10, 1000, (length,), generator=generator).tolist()
        engine.add_request(request, {"prompt_token_ids": tokens}, params)
    counts: dict[str, int] = {}

    def steps(number: int) -> None:
        while number:
            outputs = engine.step()
            counts.update({output.request_id: len(output.outputs[0].token_ids) for output in outputs})
            number -= bool(outputs)

    try:
        start = time.perf_counter()
        while len(counts) < batch and max(counts.values(), default=0) < output:
            steps(1)
        prompts_s = time.perf_counter() - start
        windows, resumed = (WINDOWS, RESUMED) if turn else (1, 0)
        each = (output - max(counts.values())) // windows - resumed
        if len(counts) < batch or each < 1:
            raise Overfull(
                f"{name}: a request had {max(counts.values())} tokens when {len(counts)} had started"
            )
        window_ms = []
        for _ in range(windows):
            if turn:
                turn(llm)
                steps(resumed)
            tokens, start = sum(counts.values()), time.perf_counter()
            steps(each)
            window_ms.append((time.perf_counter() - start) * 1e3 / each)
            tokens = sum(counts.values()) - tokens
            if tokens < 0.99 * each * batch:
                raise Overfull(f"{name}: {tokens / each:.1f} tokens a step, so requests were preempted")
        kernels = None
        if profiled:
            llm.collective_rpc(kernel_time.start)
            steps(profiled)
            kernels, counted = llm.collective_rpc(kernel_time.stop)[0]
    finally:
        engine.abort_request(ids)
        while engine.has_unfinished_requests():
            engine.step()
    step_ms = statistics.median(window_ms)
    return {
        "batch": batch,
        "prompt_tokens_per_s": batch * length / prompts_s,
        "output_tokens_per_s": batch / step_ms * 1e3,
        "step_ms": step_ms,
        "window_ms": window_ms,
    } | ({} if kernels is None else {"kernels_ms": kernels / counted})


def measure(model: str, arguments: dict, turn: Callable[..., None]) -> dict[str, Any]:
    """Runs of each case, and of each length with as many requests as fit."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is sent to the worker
    from vllm import LLM

    cases, lengths = arguments.pop("cases"), arguments.pop("lengths")
    sizes = {case: tuple(map(int, case.split("x"))) for case in cases}
    batches = {1, 2, *(batch for batch, _ in sizes.values())}
    if lengths:  # how many requests fit is not known yet
        batches |= set(range(16, MOST_REQUESTS + 1, 16))
    arguments = {
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "max_model_len": 33792,
        "max_num_batched_tokens": BATCHED,
        "max_num_seqs": max(batches),
        "gpu_memory_utilization": 0.05,  # what is checked, not what is taken
        "enable_prefix_caching": False,
        "compilation_config": {"cudagraph_capture_sizes": sorted(batches)},
    } | arguments
    llm = LLM(model, **arguments)
    found = Capacity(*llm.collective_rpc(capacity)[0])
    turn(llm)
    run_case(llm, "warm-up", 2, 256, OUTPUT, PROFILED)
    run_case(llm, "long warm-up", 2, BATCHED + 500, 8)
    for batch in sorted({batch for batch, _ in sizes.values()}):  # kernels of vLLM's that depend on it
        run_case(llm, f"warm-up of {batch}", batch, 256, 64)
    plan = [("cases", case, *size, OUTPUT, PROFILED, turn) for case, size in sizes.items()]
    plan += [("fixed", length, *found.batch(length)) for length in lengths]
    runs: dict[str, dict[Any, Any]] = {"cases": {}, "fixed": {}, "failed": {}}
    for part, case, batch, length, *how in plan:
        turn(llm)
        try:
            runs[part][case] = run_case(llm, f"{batch}x{length}", batch, length, *how)
        except Overfull as error:
            runs["failed"][case] = str(error)
        print(case, runs[part].get(case, runs["failed"].get(case)), flush=True)
    return {"blocks": found.blocks} | runs


def show(results: dict[str, Any]) -> None:
    """Tables of prompt / output tokens a second."""
    for part, title in (
        ("cases", "cache"),
        ("fixed", f"cache of {results['fixed_gib']} GiB, by prompt length"),
    ):
        columns = list(dict.fromkeys(case for run in results["runs"].values() for case in run[part]))
        rows = []
        for name, run in results["runs"].items():
            cells = [run[part].get(case) for case in columns]
            rows.append([name, *(_cell(cell, part == "fixed") for cell in cells)])
        if columns:
            table([title, *columns], rows)
    columns = list(dict.fromkeys(case for run in results["runs"].values() for case in run["cases"]))
    rows = []
    for name, run in results["runs"].items():
        cells = (run["cases"].get(case) for case in columns)
        rows.append([name, *(f"{c['step_ms']:.2f} ({c['kernels_ms']:.2f})" if c else "" for c in cells)])
    if columns:
        table(["ms a step (kernels)", *columns], rows)


def _cell(rates: dict[str, float] | None, with_batch: bool) -> str:
    if rates is None:
        return ""
    text = f"{rates['prompt_tokens_per_s']:.0f} / {rates['output_tokens_per_s']:.0f}"
    return f"{rates['batch']} x {text}" if with_batch else text


def combine(names: list[str], name: str) -> None:
    """Write the runs of several files, of equal settings and GPUs, as one. Raises SystemExit otherwise."""
    files = [json.loads((RESULTS / f"{each}.json").read_text()) for each in names]
    whole, runs = files[0], {}
    gib = {file["results"]["fixed_gib"] for file in files} - {None}
    if len(gib) > 1:
        raise SystemExit(f"{names}: caches of {sorted(gib)} GiB, so their runs do not compare")
    for file in files:
        for key, of in (("layers", "results"), ("gpu", "environment")):
            if file[of].get(key) != whole[of].get(key):
                raise SystemExit(f"{names}: {key} differs, so their runs do not compare")
        for variant, run in file["results"]["runs"].items():
            before = runs.get(variant, {"cases": {}, "fixed": {}})
            runs[variant] = run | {part: before[part] | run[part] for part in ("cases", "fixed")}
    whole["results"] |= {
        "fixed_gib": next(iter(gib), None),
        "runs": {variant: runs[variant] for variant in VARIANTS if variant in runs},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    show(whole["results"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--cases", nargs="*", default=CASES, help="requests x prompt tokens; may be none")
    parser.add_argument("--fixed-gib", type=float, help="of the KV cache, for --lengths as well")
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[8192, 32768], help="of prompts, with --fixed-gib"
    )
    engines.add_at_once_option(parser)
    parser.add_argument("--name", default="serve_attention", help="of the file under results/")
    parser.add_argument("--combine", nargs="+", help="run nothing: put these files under results/ together")
    engines.add_measure_option(parser)
    args = parser.parse_args()
    if args.measure:
        engines.run_measure(args.measure, measure)
        return
    if args.combine:
        combine(args.combine, args.name)
        return
    unknown = [name for name in args.only.split(",") if name not in VARIANTS]
    if unknown:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(VARIANTS)}")
    lengths = args.lengths if args.fixed_gib else []
    sizes = [map(int, case.split("x")) for case in args.cases]
    most = max((batch * (length + OUTPUT + PROFILED + 64) for batch, length in sizes), default=0)
    results = {"layers": args.layers, "fixed_gib": args.fixed_gib, "runs": {}}

    def keep(name: str, result: dict, log: list[str]) -> None:
        results["runs"][name] = result
        print(name, result, *[line for line in log if "scalesearch." in line][:4], sep="\n  ", flush=True)
        write(args.name, results)

    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        llama_like.write_config(model, args.layers)
        chosen, taken = {}, {}
        for name in args.only.split(","):
            size = int(most * args.layers * CACHE_BYTES.get(name, 1400) * 1.05) + (1 << 28)
            if args.fixed_gib:
                size = int(args.fixed_gib * 2**30)
            taken[name] = size / 2**30 + llama_like.engine_gib(args.layers)
            chosen[name] = model, VARIANTS[name] | {
                "cases": args.cases, "lengths": lengths, "kv_cache_memory_bytes": size,
            }  # fmt: skip
        groups = engines.groups_of(taken, args.at_once)
        failed = engines.side_by_side(__file__, Path(work), chosen, keep, groups)
    show(results)
    failed += [error for run in results["runs"].values() for error in run["failed"].values()]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
