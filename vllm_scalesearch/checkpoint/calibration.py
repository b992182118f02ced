"""Calibration text: from a file, or a data set of the Hugging Face hub, to windows of token ids."""

from pathlib import Path

import torch

_NEEDED = "give --calibration a text file, or a data set as NAME[:CONFIG[:SPLIT]]"


def windows(tokenizer, source: str, samples: int, length: int) -> torch.Tensor:
    """Token ids (samples, length), int64, of consecutive windows of a text.

    source: path of a UTF-8 text file, or a data set `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (split
    `train` unless given) with a column `text`, which needs the package `datasets`.
    Raises ValueError for a text that is too short or missing, with the number of tokens that there are.
    """
    for name, value in (("--samples", samples), ("--length", length)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be at least 1")
    needed = samples * length
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--calibration {source}: is no UTF-8 text ({error})") from None
        ids = tokenizer(text, add_special_tokens=False).input_ids
    elif path.suffix in (".txt", ".json", ".jsonl", ".parquet") or path.is_absolute():
        raise ValueError(f"--calibration {source}: there is no such file; {_NEEDED}")
    else:
        ids = _from_dataset(tokenizer, source, needed)
    if len(ids) < needed:
        raise ValueError(
            f"--calibration {source} has {len(ids)} tokens, fewer than --samples {samples} of --length {length}"
        )
    return torch.tensor(ids[:needed], dtype=torch.int64).view(samples, length)


def _from_dataset(tokenizer, source: str, needed: int) -> list[int]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"--calibration {source}: is no file, and data sets need the package 'datasets'; {_NEEDED}"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"--calibration {source}: cannot be loaded ({error}); {_NEEDED}") from None
    ids: list[int] = []
    for row in rows:
        if "text" not in row:
            raise ValueError(f"--calibration {source}: has columns {', '.join(row)} and none called 'text'")
        ids += tokenizer(row["text"], add_special_tokens=False).input_ids
        if len(ids) >= needed:
            break
    return ids
