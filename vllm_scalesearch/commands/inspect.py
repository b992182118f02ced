"""``vllm-scalesearch inspect``: what a checkpoint's NVFP4 weights look like, and what they lost."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        help="errors and scales of an NVFP4 checkpoint, layer by layer",
        description="Read an NVFP4 checkpoint of compressed-tensors or ModelOpt, ours or another's, print its "
        "layers, and write them with plots to one HTML file. With --against, errors, the scales that were "
        "chosen, and what saturates as well.",
    )
    parser.add_argument("checkpoint", type=Path, help="a folder with *.safetensors")
    parser.add_argument("--against", help="the model that it was made from, a folder or a Hugging Face hub id")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="default: CHECKPOINT-inspect.html in the current folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every layer's numbers there as well")
    parser.add_argument("--layers", action="store_true", help="print every layer, not only the ten worst")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Inspect a checkpoint. Raises ValueError for files that are not what they should be."""
    from dataclasses import asdict

    from tqdm import tqdm

    from vllm_scalesearch import inspection, inspection_html, report

    folder = arguments.checkpoint
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")
    html = arguments.html or Path(f"{folder.resolve().name}-inspect.html")
    for option, path in (("--html", html), ("--json", arguments.json)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: there is no folder {path.absolute().parent}")
    against = None if arguments.against is None else _folder_of(arguments.against)
    total = len(inspection.layer_names(inspection.Tensors(folder)))
    reports = list(tqdm(inspection.inspect(folder, against), total=total, desc="inspect", unit="layer"))

    print_tables(reports, arguments.layers)
    source = "by itself" if against is None else f"compared with {against.resolve().name}"
    report.write_text(html, inspection_html.page(folder.resolve().name, source, reports))
    print(f"\nwritten: {html}")
    if arguments.json is not None:
        layers = [{**asdict(each), "ratio": each.ratio} for each in reports]
        report.write_json(arguments.json, {"checkpoint": folder.resolve().name, "layers": layers})
        print(f"written: {arguments.json}")


def _folder_of(model: str) -> Path:
    """The folder of a model, fetched from the hub if it is none."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"--against {model}: no such folder, and not fetched from the hub: {error}") from None


def print_tables(reports: list[Any], every_layer: bool) -> None:
    """Print layers by kind, and the ten worst or all.

    reports: of `inspection.LayerReport`, all compared with an original or none.
    """
    from vllm_scalesearch import inspection, report

    compared = reports[0].error is not None
    kinds: dict[str, list[Any]] = {}
    for each in reports:
        kinds.setdefault(inspection.kind_of(each.name), []).append(each)
    rows = [[kind, len(members), *_cells(members, compared)] for kind, members in kinds.items()]
    rows.append(["all", len(reports), *_cells(reports, compared)])
    print()
    print(report.table(["layers", "count", *_header(compared)], rows))
    if compared:
        print("\nblocks by offset from the absmax code:")
        print(_histogram(inspection.total_offsets(reports)))
        unrelated = [each.name for each in reports if each.unrelated]
        if unrelated:
            print(
                f"\n{len(unrelated)} matrices are no approximation of the original ({unrelated[0]}, ...): "
                "permuted or rotated before quantization, or of another model. Their errors mean nothing."
            )
        rescaled = sum(each.rescaled for each in reports)
        if rescaled:
            print(
                f"\n{rescaled} matrices have scales of channels folded in, and so had the original to compare."
            )
    if compared and not every_layer:
        print("\nthe ten worst layers:")
        _print_layers(inspection.worst(reports), compared)
    if every_layer:
        print()
        _print_layers(reports, compared)


def _print_layers(reports: list[Any], compared: bool) -> None:
    from vllm_scalesearch import report

    rows = [[each.name, "x".join(map(str, each.shape)), *_cells([each], compared)] for each in reports]
    print(report.table(["layer", "shape", *_header(compared)], rows))


def _header(compared: bool) -> list[str]:
    return ["error", "absmax", "against it", "saturated", "zero"] if compared else ["scale 448", "zero"]


def _cells(reports: list[Any], compared: bool) -> list[str]:
    from vllm_scalesearch.inspection import mean_error, share

    zero = f"{share(reports, 'zero'):.2%}"
    if not compared:
        return [f"{share(reports, 'largest_scale'):.2%}", zero]
    stored, absmax = mean_error(reports), mean_error(reports, "absmax_error")
    against = f"{stored / absmax - 1:+.1%}" if absmax else "-"
    return [f"{stored:.5f}", f"{absmax:.5f}", against, f"{share(reports, 'saturated'):.2%}", zero]


def _histogram(offsets: Any) -> str:
    """Lines with a bar each; offsets that fewer than one block in 1000 has stand together at the ends."""
    whole = sum(offsets.values())
    if not whole:
        return "none: every block is zero"
    common = [offset for offset, count in offsets.items() if count >= whole / 1000]
    low, high = min(common), max(common)
    lines = [(f"{offset:+d}" if offset else "0", offsets.get(offset, 0)) for offset in range(low, high + 1)]
    below = sum(count for offset, count in offsets.items() if offset < low)
    above = sum(count for offset, count in offsets.items() if offset > high)
    lines = [*([("lower", below)] if below else []), *lines, *([("higher", above)] if above else [])]
    most = max(count for _, count in lines)
    return "\n".join(
        f"{label:>7} {count / whole:7.2%} {'#' * round(50 * count / most)}".rstrip() for label, count in lines
    )
