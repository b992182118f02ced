"""Files that keep R (transforms.py) of a model: one safetensors file, fp64, one pair of matrices a layer.

Tensors ``LAYER.r`` and ``LAYER.r_inverse_t`` (Hkv, D, D), ``LAYER.condition`` (Hkv,) and ``LAYER.fallback``
(Hkv,) uint8, LAYER being vLLM's name of the attention layer, of all KV heads of the model. The metadata say
what the moments came from.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_scalesearch.paths import cache_dir
from vllm_scalesearch.transforms import MagnitudeReduction

# In a folder of its own: vLLM takes every safetensors file that lies directly in a model's for weights.
FILE_NAME = "scalesearch/attention.safetensors"
_FORMAT = "vllm-scalesearch attention R 1"
_PARTS = ("r", "r_inverse_t", "condition", "fallback")


def save(path: Path, reductions: Mapping[str, MagnitudeReduction], source: str) -> None:
    """Write R of all layers; `source` says in words what it was calibrated from. Nothing is half-written."""
    tensors = {}
    for layer, reduction in reductions.items():
        for part in _PARTS:
            tensor = getattr(reduction, part).cpu().contiguous()
            tensors[f"{layer}.{part}"] = tensor.to(torch.uint8) if part == "fallback" else tensor
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, partial, {"format": _FORMAT, "source": source})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: Path, layer: str, first_head: int, num_heads: int, head_size: int
) -> tuple[MagnitudeReduction | None, str]:
    """R of KV heads `first_head` onwards of one layer, or None where the file has none; and its source.

    Only what is asked for is read. Raises ValueError for a file of another kind or another model, and
    FileNotFoundError where there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"scalesearch: there is no file {path} with R; see calibrate-attention")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"scalesearch: {path} is no file of calibrate-attention: its format is "
                f"{metadata.get('format')!r}, expected {_FORMAT!r}"
            )
        if f"{layer}.r" not in file.keys():  # noqa: SIM118, safe_open is no mapping
            return None, metadata["source"]
        shape = tuple(file.get_slice(f"{layer}.r").get_shape())
        if shape[0] < first_head + num_heads or shape[1:] != (head_size, head_size):
            raise ValueError(
                f"scalesearch: {path} has R of another model: {layer} has {shape[0]} KV heads of {shape[1]} "
                f"there, this rank needs heads {first_head} to {first_head + num_heads - 1} of {head_size}"
            )
        heads = slice(first_head, first_head + num_heads)
        parts = {part: file.get_slice(f"{layer}.{part}")[heads] for part in _PARTS}
    return MagnitudeReduction(**{**parts, "fallback": parts["fallback"].bool()}), metadata["source"]


def cached_file(model: str, revision: str | None, config: str) -> Path:
    """Where R of a model lies in the user's cache.

    model: a folder or a hub id. config: its configuration as text. A folder's weight files count with their
    names, sizes and times, so that changed weights are another model.
    """
    identity = hashlib.sha256()
    folder = Path(model)
    parts = [str(folder.resolve()) if folder.is_dir() else model, revision or "", config]
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors")):
            status = file.stat()
            parts.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    for part in parts:
        identity.update(part.encode() + b"\0")
    return cache_dir() / "attention" / f"{identity.hexdigest()[:20]}.safetensors"
