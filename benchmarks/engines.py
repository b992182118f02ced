"""Engines in processes of their own: they start side by side and are measured one after the other.

Starting takes minutes of CPU time each; what is measured runs alone, once all are up. A benchmark's script is
run again for each engine, with ``--measure MODEL ARGUMENTS RESULT``.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_measure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)


def run_measure(given: list[str], measure: Callable[[str, dict, Callable[[], None]], Any]) -> None:
    """In an engine's process. measure: takes model, engine arguments, and what it calls when that is up."""
    model, engine, result = given
    result = Path(result)

    def ready() -> None:
        result.with_suffix(".ready").touch()
        while not result.with_suffix(".go").exists():
            time.sleep(0.1)

    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(measure(model, json.loads(engine), ready)))
    partial.rename(result)


def side_by_side(
    script: str, work: Path, engines: dict[str, tuple[Path, dict]], found: Callable[[str, Any, list[str]], None]
) -> None:
    """Start all engines, measure one after the other. found: takes a name, what it measured, and its log."""
    results = {name: work / f"{index}.json" for index, name in enumerate(engines)}
    runs = {}
    try:
        for name, (model, engine) in engines.items():
            command = [sys.executable, script, "--measure", str(model), json.dumps(engine), str(results[name])]
            with results[name].with_suffix(".log").open("w") as log:
                runs[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        for name, run in runs.items():
            _wait_for(results[name].with_suffix(".ready"), run, name, results[name])
        for name, run in runs.items():
            results[name].with_suffix(".go").touch()
            _wait_for(results[name], run, name, results[name])
            run.wait()
            log = results[name].with_suffix(".log").read_text().splitlines()
            found(name, json.loads(results[name].read_text()), log)
    finally:
        for run in runs.values():
            run.kill()


def _wait_for(file: Path, run: subprocess.Popen, name: str, result: Path) -> None:
    """Wait until `file` exists. Raises SystemExit with the end of the log if the process ended before."""
    while not file.exists():
        if run.poll() is not None and not file.exists():
            raise SystemExit(f"{name}:\n{result.with_suffix('.log').read_text()[-6000:]}")
        time.sleep(0.1)
