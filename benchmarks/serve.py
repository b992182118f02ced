"""Output tokens a second of a Llama-3.1-8B-shaped model in vLLM, by how its linear layers are kept.

    python benchmarks/serve.py [--layers 8] [--only NAME,...]

Random weights, torch.compile and CUDA graphs, one engine after the other, each in a process of its own.
Prompts of 128 random tokens, 128 tokens generated; the time is that of decoding alone, the difference
between generating 129 tokens and one.
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


def measure(model: str, arguments: dict) -> dict:
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        max_model_len=1024,
        gpu_memory_utilization=0.7,
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **arguments,
    )
    found = {"start_s": time.perf_counter() - begin, "tokens_per_s": {}}
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
        found["tokens_per_s"][batch] = batch * OUTPUT / sorted(rounds)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, engine, result = arguments.measure
        Path(result).write_text(json.dumps(measure(model, json.loads(engine))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as work:
        models = {}
        for kind in ("bf16", "nvfp4"):
            models[kind] = Path(work) / kind
            llama_like.make(models[kind], arguments.layers, kind == "nvfp4")
        torch.cuda.empty_cache()
        for name in arguments.only.split(","):
            kind, engine = VARIANTS[name]
            result = Path(work) / "result.json"
            command = [
                sys.executable,
                __file__,
                "--measure",
                str(models[kind]),
                json.dumps(engine),
                str(result),
            ]
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if run.returncode:
                raise SystemExit(f"{name}:\n{run.stdout[-6000:]}")
            found[name] = json.loads(result.read_text())
            lines = [line for line in run.stdout.splitlines() if "scalesearch:" in line]
            print(name, found[name], *lines, sep="\n  ", flush=True)
            write("serve", {"layers": arguments.layers, "variants": found})  # what is there stays
    rows = [
        [name, *[f"{line['tokens_per_s'][str(batch)]:.0f}" for batch in BATCHES], f"{line['start_s']:.0f}"]
        for name, line in found.items()
    ]
    table(["linear layers", *[f"batch {batch}" for batch in BATCHES], "start, s"], rows)


if __name__ == "__main__":
    main()
