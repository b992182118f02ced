"""What every benchmark shares: tables, and JSON results with the machine and versions they come from."""

from pathlib import Path
from typing import Any

from vllm_scalesearch import report
from vllm_scalesearch.report import environment

__all__ = ["RESULTS", "environment", "table", "write"]

RESULTS = Path(__file__).parent / "results"


def write(name: str, results: Any) -> None:
    """Write ``results/NAME.json`` with the environment; whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    report.write_json(path, results)
    print(f"\nwritten: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table; numbers come formatted."""
    print(report.table(header, rows))
