"""Damaged checkpoints: each is an error that names the file, and leaves nothing that looks complete."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_scalesearch.checkpoint.files import CheckpointReader, write_tensors
from vllm_scalesearch.checkpoint.run import QuantizeOptions, Run

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tiny, tmp_path):
    """A writable copy of a tiny model in two shards with an index."""
    source, folder = tiny("Llama"), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file)
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def quantize(folder: Path, out: Path) -> None:
    Run(folder, out, QuantizeOptions(), None, torch.device("cpu")).run()


def test_reader_gives_what_safetensors_gives(sharded):
    reader = CheckpointReader(sharded)
    expected = load_file(sharded / "a.safetensors") | load_file(sharded / "b.safetensors")
    assert set(reader.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert (reader.shape(name), reader.dtype(name)) == (tuple(tensor.shape), tensor.dtype)


def test_reader_of_empty_and_scalar_tensors(tmp_path):
    save_file({"none": torch.zeros(0, 4), "one": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.tensor("none").shape == (0, 4) and reader.tensor("one") == 2


def truncate(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder):
    file = folder / "b.safetensors"
    content = bytearray(file.read_bytes())
    content[10:20] = b"\x00" * 10
    file.write_bytes(content)


def no_safetensors(folder):
    (folder / "b.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def unreadable(folder):
    # Root may read every file, but nobody a folder.
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").mkdir()


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def swapped(index):
    index["weight_map"]["model.norm.weight"] = {
        "a.safetensors": "b.safetensors",
        "b.safetensors": "a.safetensors",
    }[index["weight_map"]["model.norm.weight"]]


DAMAGE = {
    "truncated": (truncate, "b.safetensors: .*cut short"),
    "header": (damage_header, "b.safetensors: its header is damaged"),
    "other format": (no_safetensors, "b.safetensors: is no safetensors file"),
    "missing": (lambda f: (f / "b.safetensors").unlink(), "b.safetensors: the file is missing"),
    "unreadable": (unreadable, "b.safetensors: cannot be read"),
    "index names another file": (lambda f: edit_index(f, swapped), "index.json: says that model.norm.weight"),
    "index names no tensor": (
        lambda f: edit_index(f, lambda i: i["weight_map"].update({"x": "a.safetensors"})),
        "index.json: says that x is in a.safetensors",
    ),
    "index is no JSON": (lambda f: (f / INDEX).write_text("{"), "index.json: is no JSON"),
    "index without map": (lambda f: edit_index(f, dict.clear), "index.json: there is no 'weight_map'"),
    "no tensors": (lambda f: (f / INDEX).unlink(), "neither model.safetensors.index.json nor"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoint_is_named(sharded, tmp_path, kind):
    change, words = DAMAGE[kind]
    change(sharded)
    with pytest.raises(ValueError, match=words):
        quantize(sharded, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/config.json")) or [*tmp_path.glob("*/config.json")] == [
        sharded / "config.json"
    ]


def test_shard_that_shrinks_while_it_is_read(sharded):
    reader = CheckpointReader(sharded)
    truncate(sharded)
    last = max(reader.names(), key=lambda n: (reader._entries[n].file.name, reader._entries[n].start))
    with pytest.raises(ValueError, match=rf"b.safetensors: ends inside tensor {last}"):
        reader.tensor(last)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "no tensor model.layers.1.mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(4, 128)}),
            r"up_proj.weight is \(4, 128\), but by config.json it must be \(256, 128\)",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan),
            "model.layers.1.mlp.up_proj: the checkpoint's weight holds NaN",
        ),
    ],
)
def test_wrong_tensor_is_named_and_nothing_looks_complete(tiny, tmp_path, change, words):
    source, folder = tiny("Llama"), tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()


def test_written_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/x.safetensors: cannot be written .* use --resume"):
        write_tensors(tmp_path / "nowhere" / "x.safetensors", {"a": torch.zeros(2)})
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))
