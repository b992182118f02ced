"""What each way to make an NVFP4 checkpoint costs: perplexity and KL divergence through vLLM.

    python benchmarks/accuracy.py --text wikitext-2/test.txt --calibration wikitext-2/valid.txt --work FOLDER
        [--peers FOLDER] [--rows ROW ...] [--windows 8] [--length 1024] [--samples 16]
    python benchmarks/accuracy.py --combine FILE ... --name NAME

Every row is a checkpoint that `vllm-scalesearch quantize` made in the work folder, or that another tool made
(peer_checkpoints.py, into the peers' folder), and is scored by `vllm-scalesearch eval` against the bf16 model.
Rows are written as they come; a run that was stopped goes on with those that are missing, and a checkpoint
that is in the work folder is not made again. "gap closed" is the part of what `absmax` costs with the same
scheme, in perplexity, that a row saves.

SmolLM2-135M-Instruct, the default, was rounded to another 4-bit grid before (smollm2.py), which flatters all
weight-only rows alike. Inputs of W4A4 rows are quantized by their maximum, as vLLM's kernels do, whoever made
the checkpoint.

On a GPU all rows of a scheme run on one kernel of vLLM's, whoever made them, and several runs with different
--rows and --name can share the work folder and the GPU. Without FP4 units, vLLM 0.32 serves W4A4 checkpoints by
Humming or Marlin, which leave inputs in 16 bits; its emulation, used here, quantizes them everywhere.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch
from peer_checkpoints import PEERS

from vllm_scalesearch import smollm2
from vllm_scalesearch.commands.eval import over_cells

KV = ("--attention-backend", "SCALESEARCH", "--kv-cache-dtype", "nvfp4", "--chunk", "64")
# Of checkpoints on a GPU. Humming, vLLM's choice on Hopper for weights alone, compiles each shape for a minute.
KERNELS = {"w4a16": "marlin", "w4a4": "emulation"}
# Little enough for several engines on a GPU: windows come one at a time.
ON_GPU = ("--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(1 << 30))
WIDE = ("--weights", "window:-6,6")
PLAIN = ("--descent", "0", "--correction", "0", "--smooth", "0")
# How `quantize` chooses weights in each row, and whether it needs calibration for that.
METHODS: dict[str, tuple[tuple[str, ...], bool]] = {
    "absmax": (("--weights", "absmax", "--metric", "mse"), False),
    "4over6": (("--weights", "4over6", "--metric", "mse"), False),
    "mse, paper": (("--weights", "paper", "--metric", "mse"), False),
    "mse, exact": (("--weights", "exact", "--metric", "mse"), False),
    "mse, full": (("--weights", "full", "--metric", "mse"), False),
    "wmse": ((*WIDE, "--metric", "wmse", *PLAIN), True),
    "hessian": ((*WIDE, "--metric", "hessian", *PLAIN), True),
    "gptq+absmax": (("--weights", "absmax", "--metric", "mse", "--gptq", "before", *PLAIN), True),
    "gptq+hessian": ((*WIDE, "--metric", "hessian", "--gptq", *PLAIN), True),
    "default": ((), True),
}


@dataclass(frozen=True)
class Row:
    """scheme: bf16, w4a16 or w4a4. quantize: arguments of the command, None for the model itself.
    peer: name of another tool's checkpoint. evaluate: more arguments of `eval`."""

    scheme: str
    quantize: tuple[str, ...] | None = None
    calibrated: bool = False
    peer: str | None = None
    evaluate: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Name of its checkpoint, the same for rows that differ in how they are evaluated."""
        return self.peer or "_".join((self.scheme, *(a.lstrip("-") for a in self.quantize or ()))).replace(
            ":", ""
        )


def _rows() -> dict[str, Row]:
    rows = {"bf16": Row("bf16")}
    for scheme, inputs in (("w4a16", ()), ("w4a4", ("--activations", "absmax"))):
        for method, (arguments, calibrated) in METHODS.items():
            rows[f"{scheme} {method}"] = Row(scheme, (*arguments, *inputs), calibrated or scheme == "w4a4")
        for name, (tool, method, peer_scheme) in PEERS.items():
            if peer_scheme == scheme:
                rows[f"{scheme} {tool} {method}"] = Row(scheme, peer=name)
    for label in ("bf16", "w4a16 default", "w4a4 default"):
        row = rows[label]
        rows[f"{label}, NVFP4 cache"] = Row(row.scheme, row.quantize, row.calibrated, evaluate=KV)
    return rows


ROWS = _rows()


def command(*arguments: Any) -> None:
    """Run ``vllm-scalesearch`` in a process of its own. Raises SystemExit when it fails."""
    code = "from vllm_scalesearch.cli import main\nif __name__ == '__main__': main()"
    with tempfile.TemporaryDirectory() as folder:
        # A file, because vLLM's processes import the main module again.
        script = Path(folder) / "command.py"
        script.write_text(code + "\n")
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
        result = subprocess.run([sys.executable, str(script), *map(str, arguments)], env=environment)
    if result.returncode:
        raise SystemExit(f"vllm-scalesearch {' '.join(map(str, arguments))} failed")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Other runs that want to make the same file or folder wait meanwhile."""
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def checkpoint(row: Row, args: argparse.Namespace) -> Path:
    """The row's checkpoint, made if it is not there."""
    if row.peer is not None:
        folder = args.peers / row.peer
        if not (folder / "config.json").is_file():
            raise SystemExit(f"{folder}: no checkpoint; make it with peer_checkpoints.py {row.peer}")
        return folder
    if row.quantize is None:
        return args.model
    folder = args.work / row.folder
    with alone(folder):
        if not folder.is_dir():
            calibration = ("--calibration", args.calibration, "--samples", args.samples)
            resume = ("--resume",) if folder.with_name(f"{folder.name}.partial").exists() else ()
            more = (*row.quantize, *(calibration if row.calibrated else ()), *resume)
            command("quantize", args.model, "-o", folder, *more)
    return folder


def evaluate(label: str, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Score the row's checkpoint against the bf16 model, whose scores are kept in the work folder."""
    reference = args.work / f"bf16-{args.text.stem}-{args.windows}x{args.length}.safetensors"
    common = ("--text", args.text, "--windows", args.windows, "--length", args.length, "--enforce-eager")
    kernel = ()
    if torch.cuda.is_available():
        common = (*common, *ON_GPU)
        kernel = ("--linear-backend", KERNELS[row.scheme]) if row.scheme in KERNELS else ()
    with alone(reference):
        if not reference.is_file():
            command("eval", args.model, *common, "--save-scores", reference)
    folder = checkpoint(row, args)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "row.json"
        command("eval", folder, *common, *kernel, *row.evaluate, "--reference", reference, "--json", out)
        found = json.loads(out.read_text())["results"]["model"]
    del found["name"]
    return {"row": label, **found}


def show(rows: list[dict[str, Any]]) -> None:
    found = {row["row"]: row for row in rows}
    lines = []
    for label in ROWS:
        if label not in found:
            continue
        row = found[label]
        base = found.get(f"{ROWS[label].scheme} absmax")
        gap = ""
        if base is not None and row is not base:
            gap = f"{1 - math.expm1(row['nats']) / math.expm1(base['nats']):.0%}"
        own = [] if label == "bf16" else over_cells(row)
        lines.append([label, f"{row['perplexity']:.2f}", *(own or ["", ""]), gap])
    report.table(["", "perplexity", "over bf16", "KL, mnat", "gap closed"], lines)


def combine(names: list[str], name: str) -> None:
    """Write the rows of several files as one. Raises SystemExit for files of other settings or machines."""
    files = [json.loads((report.RESULTS / f"{each}.json").read_text()) for each in names]
    whole, rows = files[0], {}
    settings = {key: value for key, value in whole["results"].items() if key != "rows"}
    for each, file in zip(names, files, strict=True):
        if {key: value for key, value in file["results"].items() if key != "rows"} != settings:
            raise SystemExit(f"{names[0]} and {each} have other settings, so their rows do not compare")
        if file["environment"].get("gpu") != whole["environment"].get("gpu"):
            raise SystemExit(f"{names[0]} and {each} are of other machines")
        rows |= {row["row"]: row for row in file["results"]["rows"]}
    whole["results"]["rows"] = [rows[label] for label in ROWS if label in rows]
    (report.RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    show(whole["results"]["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="what is scored, such as WikiText-2's test.txt")
    parser.add_argument("--calibration", type=Path, help="another text, such as valid.txt")
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept between runs")
    parser.add_argument(
        "--peers", type=Path, help="folder of peer_checkpoints.py's checkpoints, by their names"
    )
    parser.add_argument("--model", type=Path, help="a bf16 folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 1024 tokens")
    parser.add_argument("--name", default="accuracy", help="of the file under results/")
    parser.add_argument("--combine", nargs="+", help="run nothing: put these files under results/ together")
    args = parser.parse_args()
    if args.combine:
        combine(args.combine, args.name)
        return
    if args.text is None or args.calibration is None or args.work is None:
        parser.error("--text, --calibration and --work are needed")
    args.model = args.model or smollm2.fetch()
    args.work.mkdir(parents=True, exist_ok=True)

    about = {
        "model": args.model.name,
        "text": args.text.name,
        "calibration": f"{args.samples} x 1024 tokens of {args.calibration.name}",
        "windows": args.windows,
        "length": args.length,
    }
    if torch.cuda.is_available():
        about["kernels"] = KERNELS
    done: list[dict[str, Any]] = []
    path = report.RESULTS / f"{args.name}.json"
    if path.is_file():
        before = json.loads(path.read_text())["results"]
        done = before.pop("rows")
        if before != about:
            raise SystemExit(f"{path} holds {before}, not {about}; remove it, or choose another --name")
    wanted = args.rows or [label for label, row in ROWS.items() if row.peer is None or args.peers]
    if args.peers is None and any(ROWS[label].peer for label in wanted):
        raise SystemExit("rows of other tools need --peers FOLDER")
    for label in wanted:
        if any(row["row"] == label for row in done):
            continue
        print(f"\n=== {label}", flush=True)
        done.append(evaluate(label, ROWS[label], args))
        done.sort(key=lambda row: list(ROWS).index(row["row"]))
        report.write(args.name, {**about, "rows": done})
        show(done)
    show(done)


if __name__ == "__main__":
    main()
