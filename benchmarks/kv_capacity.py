"""How many tokens fit in one memory budget: vLLM's own line about its KV cache, for each kind of cache.

    python benchmarks/kv_capacity.py [--gib 4] [--lengths 32768 131072]

Layers of Llama-3.1-8B's shape with dummy weights. vLLM states the capacity for requests of the model's whole
length, and counts for each of them the most blocks that it may hold at any time. For SCALESEARCH that includes
16-bit blocks for all tokens of two steps of prefill, which only the requests have that are being prefilled.
"""

import argparse
import gc
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import llama_like
import report
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

OURS = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}


def ours(**attention: Any) -> dict[str, Any]:
    return OURS | {"additional_config": {"scalesearch": {"attention": {"r": "none", **attention}}}}


CACHES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"kv_cache_dtype": "fp8"},
    "SCALESEARCH": ours(),
    "SCALESEARCH, V along tokens": ours(v_group="tokens"),
    "SCALESEARCH, 16 newest": ours(recent=16),
    "SCALESEARCH, blocks of 16": ours() | {"block_size": 16},
    "SCALESEARCH, blocks of 128": ours() | {"block_size": 128},
}


def capacity(model: Path, engine: dict[str, Any], size: int, length: int, batched: int) -> int:
    """Tokens, as vLLM logs them."""
    from vllm import LLM
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    configure_logging_if_needed(LoggingConfig())  # an engine would, and drop the handler
    logging.getLogger("vllm").addHandler(handler)
    llm = LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length,
        max_num_batched_tokens=batched,
        kv_cache_memory_bytes=size,
        **engine,
    )
    logging.getLogger("vllm").removeHandler(handler)
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    (tokens,) = {m[1] for line in lines if (m := re.search(r"KV cache size: ([\d,]+) tokens", line))}
    return int(tokens.replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072], help="max_model_len")
    parser.add_argument("--batched", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--caches", nargs="+", choices=list(CACHES), default=list(CACHES))
    args = parser.parse_args()
    found: dict[int, dict[str, int]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        llama_like.write_config(model, args.layers)
        for length in args.lengths:
            tokens = found[length] = {}
            for label in args.caches:
                tokens[label] = capacity(model, CACHES[label], int(args.gib * 2**30), length, args.batched)
                share = f"{tokens[label] / tokens['bf16']:.2f}x" if "bf16" in tokens else ""
                rows.append([length, label, f"{tokens[label]:,}", share])
                print(*rows[-1], flush=True)
    print()
    report.table(["max_model_len", "cache", "tokens", "of bf16"], rows)
    report.write("kv_capacity", {**vars(args), "tokens": found})


if __name__ == "__main__":
    main()
