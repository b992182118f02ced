"""What a quantized KV cache costs in vLLM: perplexity and KL divergence with the cache really read back.

    python benchmarks/kv_perplexity.py --text wikitext-2/test.txt [--windows 8] [--length 2048]

A prompt that is prefilled in one piece attends to its own keys and values before they are in the cache, so
each run prefills in chunks of a stated size (`max_num_batched_tokens`, one request at a time) and reads what
was cached for all tokens before the chunk. A chunk of 1 is decoding, token by token, of the first window
alone. Perplexity is compared with the bf16 cache token by token (mean difference and its standard error).
The KL divergence from bf16 is over the 64 likeliest tokens that both runs return, with all other tokens as
one, which is a lower bound of the whole.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import report
import torch
from perplexity import add_text_options, load_windows

from vllm_scalesearch import evaluation

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

# Stands for the file that --text-r names.
TEXT_R = "text"


def ours(**attention: Any) -> dict[str, Any]:
    options = {"scalesearch": {"attention": attention}}
    return {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4", "additional_config": options}


# Each run: arguments of the engine, and the sizes of chunks.
RUNS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "bf16": ({}, (2048, 1)),
    "fp8": ({"kv_cache_dtype": "fp8"}, (2048, 64, 16, 1)),
    "int4_per_token_head": ({"kv_cache_dtype": "int4_per_token_head"}, (64, 16)),
    "K and V (default)": (ours(), (2048, 256, 64, 16, 1)),
    "K and V, own chunk in bf16": (ours(prefill="full_precision"), (2048, 64, 16)),
    "K and V, as stored": (ours(prefill="stored"), (2048, 64, 16)),
    "Q, K, V and P": (ours(operands="qkvp"), (64, 16)),
    "K and V, R from text": (ours(r=TEXT_R), (64,)),
    "K and V, R from random ids": (ours(r="random"), (64, 16)),
    "K and V, absmax, R from random ids": (ours(r="random", k="absmax", v="absmax"), (64,)),
    "K and V, 16 newest, R from random ids": (ours(r="random", recent=16), (64, 16)),
    "K and V, 128 newest, R from random ids": (ours(r="random", recent=128), (64,)),
    "K and V, V's tensor scale 1, R from random ids": (ours(r="random", v_scale=1.0), (64,)),
    "K and V, V along tokens, R from random ids": (ours(r="random", v_group="tokens"), (64, 16)),
    "Q, K, V and P, R from random ids": (ours(r="random", operands="qkvp"), (64, 16)),
    "Q, K, V and P, along tokens, R from random ids": (
        ours(r="random", operands="qkvp", v_group="tokens"),
        (64, 16),
    ),
}


def scores(model: Path, engine: dict[str, Any], chunk: int, windows: list[list[int]]) -> evaluation.Scores:
    if torch.cuda.is_available():
        engine = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.2, **engine}
    return evaluation.score(model, {"enforce_eager": True, **engine}, windows, chunk=chunk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.set_defaults(length=2048)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), help="default: all")
    parser.add_argument("--chunks", nargs="+", type=int, help="only these sizes of chunks")
    parser.add_argument("--text-r", type=Path, help="what calibrate-attention --text wrote, for its run")
    parser.add_argument("--name", default="kv_perplexity", help="of the file under results/")
    parser.add_argument("--combine", nargs="+", help="run nothing: put these files under results/ together")
    args = parser.parse_args()
    if args.combine:
        combine(args.combine, args.name)
        return

    labels = [label for label in args.runs or RUNS if args.text_r or label != "K and V, R from text"]
    model, windows = load_windows(args)
    results, references = [], {}
    description = {"model": model.name, "text": args.text.name, "length": args.length, "windows": args.windows}
    runs = [
        (label, chunk)
        for label in dict.fromkeys(["bf16", *labels])
        for chunk in RUNS[label][1]
        if not args.chunks or chunk in args.chunks or (label, chunk) == ("bf16", 2048)
    ]
    for label, chunk in runs:
        alone = chunk == 1
        text = windows[:1] if alone else windows
        engine = RUNS[label][0]
        if label == "K and V, R from text":
            engine = ours(r=str(args.text_r.absolute()))
        run = scores(model, engine, min(chunk, args.length), text)
        if label == "bf16":
            references[alone] = run
        over = evaluation.compare(references[alone], run)
        found = {
            "cache": label,
            "chunk": chunk,
            "tokens": len(run.losses),
            "perplexity": run.perplexity,
            "nats_over_bf16": over["nats"],
            "standard_error": over["nats_error"],
            "kl_nats": over["kl"],
            "kl_standard_error": over["kl_error"],
        }
        results.append(found)
        print(*cells(found), sep="  ", flush=True)
        report.write(args.name, {**description, "runs": results})
    print()
    report.table(HEADER, [cells(found) for found in results])


HEADER = ["cache", "chunk", "tokens", "perplexity", "over bf16", "KL from bf16, mnat"]


def cells(found: dict[str, Any]) -> list[str]:
    return [
        found["cache"],
        str(found["chunk"]),
        str(found["tokens"]),
        f"{found['perplexity']:.3f}",
        f"{math.expm1(found['nats_over_bf16']):+.2%} +- {found['standard_error']:.2%}",
        f"{1e3 * found['kl_nats']:.2f} +- {1e3 * found['kl_standard_error']:.2f}",
    ]


def combine(names: list[str], name: str) -> None:
    """Write the runs of several files, of the same text and machine, as one. Raises SystemExit otherwise."""
    files = [json.loads((report.RESULTS / f"{each}.json").read_text()) for each in names]
    whole = files[0]
    runs = {}
    for file in files:
        for key in ("model", "text", "length", "windows"):
            if file["results"][key] != whole["results"][key]:
                raise SystemExit(f"{names}: {key} differs, so their runs do not compare")
        runs |= {(run["cache"], run["chunk"]): run for run in file["results"]["runs"]}
    ordered = [runs[label, chunk] for label in RUNS for chunk in RUNS[label][1] if (label, chunk) in runs]
    whole["results"]["runs"] = ordered
    (report.RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    report.table(HEADER, [cells(run) for run in ordered])


if __name__ == "__main__":
    main()
