"""``vllm-scalesearch quantize``: write a calibrated NVFP4 checkpoint of a model."""

import argparse
from pathlib import Path
from typing import Any

# A wider window than `paper` pays where the error is weighted (README, accuracy).
_WIDE = "window:-6,6"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "quantize",
        help="write an NVFP4 checkpoint with searched scales",
        description="Quantize a bf16 or fp16 checkpoint to NVFP4 in compressed-tensors' layout, which vLLM "
        "loads with or without this package. With calibration text the search minimises the error of each "
        "layer's output; without, that of its weights.",
    )
    parser.add_argument("model", help="a folder or a Hugging Face hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--weights",
        metavar="POLICY",
        help=f"which scales are tried: absmax, 4over6, fast, paper, exact, full, window:LO,HI or "
        f"offsets:A,B,...; default: {_WIDE} with calibration, exact without",
    )
    parser.add_argument(
        "--metric",
        choices=("mse", "wmse", "hessian"),
        help="what the search minimises; default: hessian with calibration, mse without",
    )
    parser.add_argument(
        "--gptq",
        nargs="?",
        const="block",
        choices=("before", "block", "feedback"),
        help="round with error feedback (GPTQ); scales are chosen before, by --metric, or as it goes, by the "
        "error of the block (default) or by what is left of it after feedback",
    )
    parser.add_argument(
        "--descent",
        type=int,
        help="passes of block coordinate descent on the output error; default: 3 with metric hessian, else 0",
    )
    parser.add_argument(
        "--correction",
        type=float,
        help="how much weights make up for errors of the layers before, 0 to 1; default: 0.5 with metric "
        "hessian, else 0",
    )
    parser.add_argument(
        "--damping",
        type=float,
        default=0.03,
        help="added to second moments, part of their mean (default: 0.03)",
    )
    parser.add_argument(
        "--smooth",
        type=float,
        help="strength of channel scales folded into norms, 0 to 1; default: 0.5 with --activations and "
        "calibration by metric hessian, else 0",
    )
    parser.add_argument(
        "--activations",
        metavar="POLICY",
        help="quantize inputs too (W4A4); the policy is what calibration assumes of the server: absmax for "
        "vLLM alone",
    )
    parser.add_argument("--calibration", metavar="FILE|DATASET", help="a text file, or NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("--samples", type=int, default=64, help="windows of calibration text (default: 64)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument(
        "--ignore", metavar="PATTERN", action="append", default=[], help="matrices left alone; repeatable"
    )
    parser.add_argument(
        "--override",
        metavar=("PATTERN", "KEY=VALUE,..."),
        nargs=2,
        action="append",
        default=[],
        help="other weights=, metric=, gptq=, descent=, correction= for some matrices; repeatable",
    )
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Quantize. Raises ValueError for options that do not fit and for all that cannot be read or written."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from vllm_scalesearch.checkpoint.calibration import windows
    from vllm_scalesearch.checkpoint.run import Run

    options = _options(arguments)
    model = _folder(arguments.model)
    tokens = None
    if arguments.calibration is not None:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=arguments.trust_remote_code)
        tokens = windows(tokenizer, arguments.calibration, arguments.samples, arguments.length)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    origin = {"model": arguments.model, "calibration": None}
    if tokens is not None:
        origin["calibration"] = (
            f"{tokens.shape[0]} x {tokens.shape[1]} tokens of {Path(arguments.calibration).name}"
        )
    work = Run(
        model,
        arguments.output,
        options,
        tokens,
        device,
        arguments.resume,
        arguments.trust_remote_code,
        origin,
    )
    bar: tqdm | None = None

    def progress(done: int, total: int, name: str) -> None:
        nonlocal bar
        if bar is None:  # what a run did before it was resumed does not count for the time left
            bar = tqdm(total=total, initial=done, unit="step", disable=None)
        bar.set_description(name or "done", refresh=False)
        bar.update(done - bar.n)

    try:
        report = work.run(progress)
    finally:
        if bar is not None:
            bar.close()
    print(_table(report))
    print(f"{arguments.output}: {report['scheme']}, {len(report['layers'])} matrices")


def _options(arguments: argparse.Namespace):
    from vllm_scalesearch.checkpoint.matrices import Recipe
    from vllm_scalesearch.checkpoint.run import QuantizeOptions

    calibrated = arguments.calibration is not None
    metric = arguments.metric or ("hessian" if calibrated else "mse")
    thorough = metric == "hessian" and arguments.gptq is None
    recipe = Recipe(
        weights=arguments.weights or (_WIDE if calibrated else "exact"),
        metric=metric,
        gptq=arguments.gptq,
        descent=(3 if thorough else 0) if arguments.descent is None else arguments.descent,
        damping=arguments.damping,
        correction=(0.5 if thorough else 0.0) if arguments.correction is None else arguments.correction,
    )
    smooth = arguments.smooth
    if smooth is None:
        smooth = 0.5 if thorough and arguments.activations is not None else 0.0
    overrides = tuple((pattern, _changes(pattern, text)) for pattern, text in arguments.override)
    return QuantizeOptions(recipe, overrides, tuple(arguments.ignore), arguments.activations, smooth)


def _changes(pattern: str, text: str) -> dict[str, Any]:
    """``weights=window:-3,7,metric=mse`` as a mapping; a comma within a value is kept."""
    kinds = {"weights": str, "metric": str, "gptq": str, "descent": int, "correction": float}
    changes: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if equals:
            changes[key] = value
        elif changes:
            changes[list(changes)[-1]] += f",{part}"
        else:
            raise ValueError(f"--override {pattern} {text}: expected KEY=VALUE,...")
    unknown = [key for key in changes if key not in kinds]
    if unknown:
        raise ValueError(f"--override {pattern}: unknown {', '.join(unknown)}; there are {', '.join(kinds)}")
    try:
        return {key: kinds[key](value) for key, value in changes.items()}
    except ValueError as error:
        raise ValueError(f"--override {pattern} {text}: {error}") from None


def _folder(model: str) -> Path:
    """The model's folder; that of a hub id is fetched, or found in the cache when offline."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise ValueError(f"{model}: there is no such folder, and it is no hub id (ORGANISATION/NAME)")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except Exception as error:  # a dozen classes of three libraries; all mean that it is not to be had
        raise ValueError(f"{model}: is no folder here, and the hub does not give it: {error}") from error


def _table(report: dict[str, Any]) -> str:
    """Errors by kind of matrix, and whatever was not done as asked."""
    import re

    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in report["layers"]:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", entry["name"]), []).append(entry)
    lines = [f"{'error, ' + report['error']:<44} {'absmax':>9} {'chosen':>9}  metric"]
    for kind, entries in kinds.items():
        plain = sum(entry["absmax_error"] for entry in entries) / len(entries)
        chosen = sum(entry["error"] for entry in entries) / len(entries)
        metrics = ", ".join(
            sorted({entry["metric"] + (f" gptq {entry['gptq']}" if entry["gptq"] else "") for entry in entries})
        )
        lines.append(f"{kind:<44} {plain:9.5f} {chosen:9.5f}  {metrics}")
    lines += [f"{e['name']}: metric mse, because it {e['fallback']}" for e in report["layers"] if e["fallback"]]
    lines += [f"{name}: not quantized: {why}" for name, why in report["not_quantized"].items()]
    return "\n".join(lines)
