"""Perplexity through vLLM, for bf16 and for each way to quantize.

    python benchmarks/perplexity.py --text wikitext-2/test.txt [--windows 8] [--length 1024]

The text is tokenized as a whole and cut into windows that share nothing; the first token of each is
not scored. Beside the perplexity stands the mean difference from bf16 per token with its standard
error, paired token by token, since quantized and bf16 runs see the same text.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import report

from vllm_scalesearch import evaluation

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

CONFIGS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "w4a16 absmax": {"weights": "absmax"},
    "w4a16 4over6": {"weights": "4over6"},
    "w4a16 paper": {"weights": "paper"},
    "w4a16 full": {"weights": "full"},
    "w4a4 absmax": {"weights": "absmax", "activations": "absmax"},
    "w4a4 fast": {"weights": "paper", "activations": "fast"},
    "w4a4 paper": {"weights": "paper", "activations": "paper"},
    "mxfp4 w4a16 absmax": {"format": "mxfp4", "weights": "absmax"},
    "mxfp4 w4a16 paper": {"format": "mxfp4", "weights": "paper"},
}


def engine_arguments(options: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for options of quantization scalesearch, or for none."""
    if options is None:
        return {"enforce_eager": True}
    arguments = {"quantization": "scalesearch", "additional_config": {"scalesearch": options}}
    return {"enforce_eager": True, **arguments}


def add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="a text file, such as WikiText-2's test.txt")
    parser.add_argument("--model", type=Path, help="a bf16 folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")


def load_windows(args: argparse.Namespace) -> tuple[Path, list[list[int]]]:
    """The model's folder, and the windows of token ids that `add_text_options` asks for."""
    from transformers import AutoTokenizer

    from vllm_scalesearch import smollm2

    model = args.model or smollm2.fetch()
    ids = AutoTokenizer.from_pretrained(model)(args.text.read_text()).input_ids
    try:
        return model, evaluation.windows_of(ids, args.length, args.windows)
    except ValueError as error:
        raise SystemExit(f"{args.text}: {error}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    args = parser.parse_args()

    model, windows = load_windows(args)

    rows, results = [], {}
    reference = None
    for label in args.configs:
        found = evaluation.score(model, engine_arguments(CONFIGS[label]), windows, top=0)
        results[label] = {"perplexity": found.perplexity, "tokens": len(found.losses)}
        cells = [label, f"{found.perplexity:.2f}"]
        if label == "bf16":
            reference = found
        elif reference is not None:
            over = evaluation.compare(reference, found)
            mean, error = over["nats"], over["nats_error"]
            results[label] |= {"nats_over_bf16": mean, "standard_error": error}
            cells += [f"{math.exp(mean) - 1:+.1%}", f"{mean:+.4f} +- {error:.4f}"]
        rows.append(cells + [""] * (4 - len(cells)))
        print(f"{label}: perplexity {found.perplexity:.3f}", flush=True)
    print()
    report.table(["", "perplexity", "over bf16", "nats a token over bf16"], rows)
    report.write(
        "perplexity",
        {
            "model": model.name,
            "text": args.text.name,
            "windows": args.windows,
            "length": args.length,
            "runs": results,
        },
    )


if __name__ == "__main__":
    main()
