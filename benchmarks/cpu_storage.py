"""What keeping weights dense or packed, and the NVFP4 cache, cost on the CPU: memory, and tokens a second.

    python benchmarks/cpu_storage.py [--model DIR]

Each configuration runs in a process of its own, eagerly. Peak
memory is the process's largest resident set, which also holds Python, torch, the memory
mapped checkpoint and 1 GiB of KV cache, the same for all.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import report

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def weights(**options: str) -> dict[str, Any]:
    return {"quantization": "scalesearch", "additional_config": {"scalesearch": options}}


CACHE = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
# Arguments of the engine.
CONFIGS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "w4a16, dense": weights(),
    "w4a16, packed": weights(cpu_storage="packed"),
    "w4a4, dense": weights(activations="paper"),
    "w4a4 fast, dense": weights(activations="fast"),
    "bf16, NVFP4 cache": CACHE,
    "w4a16, dense, NVFP4 cache": weights() | CACHE,
}
BATCHES = (1, 8)
NEW_TOKENS = {"w4a16, packed": 16}


def run(model: Path, label: str) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(str(model), enforce_eager=True, max_model_len=1024, disable_log_stats=True, **CONFIGS[label])
    result: dict[str, Any] = {"start_s": time.perf_counter() - start}
    new = NEW_TOKENS.get(label, 64)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for batch in BATCHES:
        prompts = [{"prompt_token_ids": [1 + i, *range(100, 131)]} for i in range(batch)]
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)  # warm up
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        result[f"tokens_per_s_batch_{batch}"] = batch * new / (time.perf_counter() - start)
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a bf16 folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--only", choices=list(CONFIGS), help="run one configuration and print its JSON last")
    args = parser.parse_args()

    from vllm_scalesearch import smollm2

    model = args.model or smollm2.fetch()
    if args.only:
        print(json.dumps(run(model, args.only)))
        return
    rows, results = [], {}
    for label in CONFIGS:
        command = [sys.executable, __file__, "--model", str(model), "--only", label]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[label] = found = json.loads(output.splitlines()[-1])
        rates = [f"{found[f'tokens_per_s_batch_{batch}']:.1f}" for batch in BATCHES]
        rows.append([label, *rates, f"{found['start_s']:.1f}", f"{found['peak_memory_mb']:.0f}"])
        print(f"{label}: done", flush=True)
    print()
    header = ["", *(f"tokens/s, batch {batch}" for batch in BATCHES), "start, s", "peak memory, MB"]
    report.table(header, rows)
    report.write("cpu_storage", {"model": model.name, "runs": results})


if __name__ == "__main__":
    main()
