"""Reading and writing safetensors one tensor at a time, with every way that can go wrong named.

A file is 8 bytes of header length, a JSON header and the tensors' bytes (safetensors' format description).
It is read here with plain reads instead of a memory map, so that a model of any size takes the memory of
the tensors that are in work, and a file that ends early is an error and not a crash.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_UMASK = os.umask(0)
os.umask(_UMASK)
_LARGEST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


class CheckpointReader:
    """The tensors of a model's folder, read one by one.

    Raises ValueError that names the file and what to do for a missing or unreadable file, one that is cut
    short or is no safetensors file, and an index that does not fit its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        index = folder / INDEX
        if index.is_file():
            mapping = _read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise ValueError(f"{index}: there is no 'weight_map' in it; fetch the file again")
            files = {folder / name for name in mapping.values()}
        elif (folder / SINGLE).is_file():
            mapping, files = None, {folder / SINGLE}
        else:
            raise ValueError(
                f"{folder}: neither {INDEX} nor {SINGLE} is there; only safetensors models are read"
            )
        for file in sorted(files):
            for name, entry in _header(file).items():
                if name in self._entries:
                    raise ValueError(f"{file}: tensor {name} is in {self._entries[name].file.name} as well")
                self._entries[name] = entry
        for name, file in (mapping or {}).items():
            if name not in self._entries or self._entries[name].file.name != file:
                found = (
                    f"in {self._entries[name].file.name}" if name in self._entries else "in none of its files"
                )
                raise ValueError(f"{index}: says that {name} is in {file}, but it is {found}; fetch both again")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        return self._entries[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU, in memory of its own.

        Raises ValueError when there is none, and when its file has become unreadable or shorter.
        """
        if name not in self._entries:
            raise ValueError(f"{self.folder}: there is no tensor {name}")
        entry = self._entries[name]
        out = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
            with _open(entry.file) as file:
                file.seek(entry.start)
                if file.readinto(view) != entry.nbytes:
                    raise ValueError(f"{entry.file}: ends inside tensor {name}; fetch the file again")
        return out

    def fingerprint(self) -> list[list]:
        """File names and sizes, to tell whether a run that is resumed reads what it began with."""
        files = sorted({entry.file for entry in self._entries.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _open(file: Path):
    try:
        return open(file, "rb", buffering=0)
    except FileNotFoundError:
        raise ValueError(f"{file}: the file is missing; fetch it again") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None


def _read_json(file: Path) -> dict:
    try:
        with _open(file) as handle:
            content = json.loads(handle.readall())
    except ValueError as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file}: is no JSON ({error}); fetch the file again") from None
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object, found {type(content).__name__}; fetch the file again"
        )
    return content


def _header(file: Path) -> dict[str, _Entry]:
    with _open(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        raw = handle.read(8)
        length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else -1
        if not 0 < length <= min(_LARGEST_HEADER, size - 8):
            raise ValueError(f"{file}: is no safetensors file, or cut short; fetch the file again")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: its header is damaged ({error}); fetch the file again") from None
    entries = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
            count = torch.Size(shape).numel()
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{file}: the header's entry of {name} is damaged; fetch the file again") from None
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: {name} is of type {dtype}, which is not supported")
        if start < 0 or end - start != count * _DTYPES[dtype].itemsize:
            raise ValueError(f"{file}: {name} takes {end - start} bytes, which {dtype} {shape} does not fit")
        if 8 + length + end > size:
            raise ValueError(
                f"{file}: has {size} bytes, but {name} ends at {8 + length + end}: it is cut short; fetch it"
            )
        entries[name] = _Entry(file, _DTYPES[dtype], shape, 8 + length + start, end - start)
    return entries


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` once the block has ended without an error.

    The bytes are on the disk before the name is. Raises ValueError that names `path` when they cannot be
    written, as on a full disk.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        os.replace(partial, path)
        _sync_folder(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # safetensors has an error of its own, which holds the system's words.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise ValueError(
                f"{path}: cannot be written ({error}); free space or choose another place, then use --resume"
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all. Raises ValueError when it cannot be written."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    with writing(path) as partial:
        save_file(ready, partial, {"format": "pt"})


def write_json(path: Path, content: object) -> None:
    """Write JSON, whole or not at all. Raises ValueError when it cannot be written."""
    with writing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError that names the file when it is missing, unreadable or something else."""
    return _read_json(path)
