"""Output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by how its linear layers are kept.

    python benchmarks/serve.py [--layers 8] [--only NAME,...]

Random weights, torch.compile and CUDA graphs, each engine in a process of its own. They start side by
side, which takes minutes of CPU time each, and once all are up they are measured one after the other, so
that whatever runs then runs alone. Prompts of 128 random tokens, 128 tokens generated; the time is that of
decoding alone, the difference between generating 129 tokens and one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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


def measure(model: str, arguments: dict, ready: Path, go: Path) -> dict[int, float]:
    """Output tokens a second of each batch, once `go` exists; `ready` says that the engine is up."""
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
    ready.touch()
    while not go.exists():
        time.sleep(0.1)
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
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, engine, result = arguments.measure
        result = Path(result)
        found = measure(model, json.loads(engine), result.with_suffix(".ready"), result.with_suffix(".go"))
        partial = result.with_suffix(".part")
        partial.write_text(json.dumps(found))
        partial.rename(result)
        return
    names = arguments.only.split(",")
    found = {}
    with tempfile.TemporaryDirectory() as work:
        models = {}
        for kind in ("bf16", "nvfp4"):
            models[kind] = Path(work) / kind
            llama_like.make(models[kind], arguments.layers, kind == "nvfp4")
        torch.cuda.empty_cache()
        results = [Path(work) / f"{index}.json" for index in range(len(names))]
        runs = [start(*VARIANTS[name], models, result) for name, result in zip(names, results, strict=True)]
        try:
            for name, run, result in zip(names, runs, results, strict=True):
                wait_for(result.with_suffix(".ready"), run, name, result)
            for name, run, result in zip(names, runs, results, strict=True):
                result.with_suffix(".go").touch()
                wait_for(result, run, name, result)
                run.wait()
                found[name] = json.loads(result.read_text())
                log = result.with_suffix(".log").read_text().splitlines()
                print(
                    name, found[name], *[line for line in log if "scalesearch:" in line], sep="\n  ", flush=True
                )
                write("serve", {"layers": arguments.layers, "tokens_per_s": found})  # what is there stays
        finally:
            for run in runs:
                run.kill()
    rows = [[name, *[f"{line[str(batch)]:.0f}" for batch in BATCHES]] for name, line in found.items()]
    table(["linear layers", *[f"batch {batch}" for batch in BATCHES]], rows)


def start(kind: str, engine: dict, models: dict[str, Path], result: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--measure", str(models[kind]), json.dumps(engine), str(result)]
    with result.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait_for(file: Path, run: subprocess.Popen, name: str, result: Path) -> None:
    """Wait until `file` exists. Raises SystemExit with the end of the log if the process ended before."""
    while not file.exists():
        if run.poll() is not None and not file.exists():
            raise SystemExit(f"{name}:\n{result.with_suffix('.log').read_text()[-6000:]}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
