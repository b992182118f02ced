"""``vllm-scalesearch eval``: perplexity through vLLM, and what it lost against a reference run."""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

# What a run of the same model in 16 bits leaves out of the engine options that it is given.
METHOD_OPTIONS = (
    "quantization", "quantization_config", "kv_cache_dtype", "kv_cache_dtype_skip_layers",
    "calculate_kv_scales", "attention_backend", "attention_config", "additional_config", "moe_backend",
    "linear_backend",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="perplexity through vLLM, against a reference run",
        description="Run a text through vLLM and print perplexity, and against a reference run of the same "
        "text the paired difference a token with its standard error and the KL divergence. Options that are "
        "not named here are vLLM's own and go to the engine as in `vllm serve` (--quantization, "
        "--attention-backend, --kv-cache-dtype, --additional-config, --tensor-parallel-size, ...).",
        epilog="example: vllm-scalesearch eval MODEL --text wiki.test.txt --chunk 64 "
        "--attention-backend SCALESEARCH --kv-cache-dtype nvfp4",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a folder or a Hugging Face hub id; before all options")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="a text file")
    source.add_argument(
        "--dataset", help="a data set for datasets.load_dataset; rows are joined by blank lines"
    )
    parser.add_argument("--dataset-config", help="the data set's configuration, such as wikitext-2-raw-v1")
    parser.add_argument("--dataset-split", default="test", help="default: test")
    parser.add_argument("--dataset-column", default="text", help="default: text")
    parser.add_argument("--windows", type=int, help="how many windows; default: all that the text fills")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window (default: 2048)")
    parser.add_argument(
        "--chunk",
        type=int,
        help="prefill so many tokens at a time and read all before them back from the KV cache; "
        "default: whole windows, which never read it",
    )
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument(
        "--reference",
        help="a model to compare with, run without quantization options, or a file of --save-scores; "
        "default: MODEL itself so, or what `quantize` made it from",
    )
    reference.add_argument("--no-reference", action="store_true", help="compare with nothing")
    parser.add_argument(
        "--save-scores", type=Path, metavar="FILE", help="keep this run, as a later --reference"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.set_defaults(run=run, takes_engine_options=True)


def run(arguments: argparse.Namespace, engine_options: list[str]) -> None:
    """Evaluate a model. Raises ValueError for options that do not go together or name nothing."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where vLLM would take nearly all memory

    from vllm_scalesearch import evaluation, report

    for option, path in (("--save-scores", arguments.save_scores), ("--json", arguments.json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.absolute().parent}")
    engine = parse_engine_options(engine_options)
    reference = _reference_of(arguments, engine)
    text = _text_of(arguments)
    windows = evaluation.windows_of(
        _token_ids(arguments.model, engine, text), arguments.length, arguments.windows
    )
    _check_length(arguments.model, engine, arguments.length)

    base = None
    if isinstance(reference, Path):
        base = evaluation.Scores.load(reference)
        if base.text != evaluation.fingerprint(windows):
            raise ValueError(
                f"--reference {reference} was scored on other windows of tokens; "
                "use the text, tokenizer, --length and --windows that it was made with"
            )
    elif reference is not None:
        base = _score(reference, reference_options(engine), windows, arguments.chunk, "reference")
    found = _score(arguments.model, engine, windows, arguments.chunk, "model")
    if arguments.save_scores is not None:
        found.save(arguments.save_scores)

    rows, results = [], {}
    for label, name, scores in (("reference", str(reference), base), ("model", arguments.model, found)):
        if scores is None:
            continue
        results[label] = {
            "name": name,
            "tokens": len(scores.losses),
            "perplexity": scores.perplexity,
            "tokens_per_second": scores.tokens_per_second,
        }
        over = evaluation.compare(base, scores) if label == "model" and base is not None else {}
        results[label] |= over
        rows.append([label, f"{scores.perplexity:.3f}", *over_cells(over), f"{scores.tokens_per_second:.0f}"])
    print()
    print(report.table(["", "perplexity", "over reference", "KL, mnat", "scored tokens/s"], rows))
    print(
        f"{len(windows)} windows of {arguments.length} tokens"
        + (f", prefilled {arguments.chunk} at a time" if arguments.chunk else "")
    )
    if arguments.json is not None:
        about = {
            "text": arguments.dataset or arguments.text.name,
            "windows": len(windows),
            "length": arguments.length,
            "chunk": arguments.chunk,
            "engine": engine,
        }
        report.write_json(arguments.json, {**about, **results})


def over_cells(over: dict[str, float]) -> list[str]:
    """Two cells of a table for what `evaluation.compare` found: perplexity, and KL divergence."""
    if not over:
        return ["", ""]
    kl = f"{1e3 * over['kl']:.2f} +- {1e3 * over['kl_error']:.2f}" if "kl" in over else ""
    return [f"{math.expm1(over['nats']):+.2%} +- {over['nats_error']:.2%}", kl]


def parse_engine_options(options: list[str]) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` from command line options in vLLM's names; those that are given.

    Ends the process with vLLM's own message for an option or a value that vLLM does not know. Raises
    ValueError for options that the evaluation sets itself.
    """
    from dataclasses import fields

    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_scalesearch.evaluation import OWN_OPTIONS

    parser = FlexibleArgumentParser(prog="vllm-scalesearch eval", add_help=False, allow_abbrev=False)
    parser = EngineArgs.add_cli_args(parser)
    defaults, given = parser.parse_args([]), parser.parse_args(options)
    names = [field.name for field in fields(EngineArgs) if hasattr(given, field.name)]
    engine = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(defaults, name)}
    for name in ("model", *OWN_OPTIONS):
        if name in engine:
            instead = "the first argument" if name == "model" else "--chunk"
            raise ValueError(f"--{name.replace('_', '-')} is set by the evaluation; use {instead}")
    return engine


def reference_options(engine: dict[str, Any]) -> dict[str, Any]:
    """The engine options that a 16-bit run of the model takes as well."""
    kept = {name: value for name, value in engine.items() if name not in METHOD_OPTIONS}
    overrides = kept.pop("hf_overrides", None)
    if isinstance(overrides, dict):
        overrides = {key: value for key, value in overrides.items() if key != "quantization_config"}
    return {**kept, "hf_overrides": overrides} if overrides else kept


def _reference_of(arguments: argparse.Namespace, engine: dict[str, Any]) -> str | Path | None:
    """A model, a file of scores, or None."""
    if arguments.no_reference:
        return None
    if arguments.reference is not None:
        path = Path(arguments.reference)
        if path.is_file():
            return path
        if path.suffix == ".safetensors":
            raise ValueError(f"--reference {path}: there is no such file")
        return arguments.reference
    if getattr(_config(arguments.model, engine), "quantization_config", None) is not None:
        origin = _made_from(Path(arguments.model))
        if origin is None:
            raise ValueError(
                f"{arguments.model} is quantized already, so it is no reference for itself; "
                "give the model it was made from as --reference, or --no-reference"
            )
        return origin
    if not any(name in engine for name in (*METHOD_OPTIONS, "hf_overrides")):
        return None  # the model is the reference
    return arguments.model


def _made_from(checkpoint: Path) -> str | None:
    """The model that `vllm-scalesearch quantize` made a checkpoint from, if it says so and is to be had."""
    from vllm_scalesearch.checkpoint.run import REPORT

    if not (checkpoint / REPORT).is_file():
        return None
    origin = json.loads((checkpoint / REPORT).read_text())["options"].get("model")
    # What is no folder here any more may still be a hub id, but no path is.
    gone = origin is not None and not Path(origin).is_dir() and (origin.count("/") != 1 or origin[0] in "./~")
    return None if gone else origin


def _config(model: str, engine: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    trust = engine.get("trust_remote_code", False)
    return AutoConfig.from_pretrained(model, trust_remote_code=trust, revision=engine.get("revision"))


def _check_length(model: str, engine: dict[str, Any], length: int) -> None:
    """vLLM takes prompts that leave room for one more token."""
    most = getattr(_config(model, engine).get_text_config(), "max_position_embeddings", None)
    if most is not None and "hf_overrides" not in engine and length >= most:
        raise ValueError(f"--length {length}: {model} has {most} positions, and one must stay free; use fewer")


def _text_of(arguments: argparse.Namespace) -> str:
    if arguments.text is not None:
        if not arguments.text.is_file():
            raise ValueError(f"--text {arguments.text}: there is no such file")
        return arguments.text.read_text()
    try:
        import datasets
    except ImportError:
        raise ValueError("--dataset needs the package datasets; pip install datasets, or use --text") from None
    found = datasets.load_dataset(arguments.dataset, arguments.dataset_config, split=arguments.dataset_split)
    if arguments.dataset_column not in found.column_names:
        columns = ", ".join(found.column_names)
        raise ValueError(f"--dataset-column {arguments.dataset_column}: {arguments.dataset} has {columns}")
    return "\n\n".join(found[arguments.dataset_column])


def _token_ids(model: str, engine: dict[str, Any], text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        engine.get("tokenizer") or model, trust_remote_code=engine.get("trust_remote_code", False)
    )
    return tokenizer(text).input_ids


def _score(model: str, engine: dict[str, Any], windows: list[list[int]], chunk: int | None, label: str) -> Any:
    from tqdm import tqdm

    from vllm_scalesearch import evaluation

    total = sum(len(window) - 1 for window in windows)
    print(f"{label}: starting vLLM on {model}", flush=True)
    with tqdm(total=total, desc=label, unit="token") as bar:
        return evaluation.score(model, engine, windows, chunk=chunk, progress=bar.update)
