"""R: its files, its calibration on first use, and the command that calibrates it from a text."""

import contextlib
import json
import os
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from served import SERVED, assert_is_the_definition, generate, random_prompt

from vllm_scalesearch import cli, reduction_files
from vllm_scalesearch.transforms import SecondMoments, magnitude_reduction

LAYER = "model.layers.1.self_attn.attn"


RANDOM = {**SERVED, "additional_config": {"scalesearch": {"attention": {"r": "random"}}}}


def messages(log):
    return [record.getMessage() for record in log.records]


def some_reduction(heads=4, dim=32):
    torch.manual_seed(0)
    moments = SecondMoments(heads, dim)
    moments.add(torch.randn(200, 2 * heads, dim) * torch.rand(dim), torch.randn(200, heads, dim))
    return magnitude_reduction(moments.q, moments.k)


def test_a_rank_reads_its_heads(tmp_path):
    reduction = some_reduction()
    file = tmp_path / "there" / "r.safetensors"
    reduction_files.save(file, {LAYER: reduction}, "a test")
    assert [f.name for f in file.parent.iterdir()] == ["r.safetensors"]
    for first, count in ((0, 4), (2, 2), (3, 1)):
        got, source = reduction_files.load(file, LAYER, first, count, 32)
        assert source == "a test"
        for part in ("r", "r_inverse_t", "condition", "fallback"):
            assert torch.equal(getattr(got, part), getattr(reduction, part)[first : first + count])
    assert reduction_files.load(file, "model.layers.7.self_attn.attn", 0, 4, 32)[0] is None


def test_a_rank_reads_no_more_than_its_heads(tmp_path, monkeypatch):
    reductions = {LAYER: some_reduction(), "model.layers.0.self_attn.attn": some_reduction()}
    file = tmp_path / "r.safetensors"
    reduction_files.save(file, reductions, "a test")
    read = {}

    class Part:
        def __init__(self, name, part):
            self.name, self.part, self.get_shape = name, part, part.get_shape

        def __getitem__(self, index):
            read[self.name] = self.part[index]
            return read[self.name]

    @contextlib.contextmanager
    def watched(path, framework):
        """Without `get_tensor`, which reads a tensor as a whole."""
        with safe_open(path, framework) as opened:
            yield types.SimpleNamespace(
                metadata=opened.metadata, keys=opened.keys, get_slice=lambda n: Part(n, opened.get_slice(n))
            )

    monkeypatch.setattr(reduction_files, "safe_open", watched)
    reduction_files.load(file, LAYER, 1, 2, 32)
    assert sorted(read) == [f"{LAYER}.{part}" for part in ("condition", "fallback", "r", "r_inverse_t")]
    assert all(len(tensor) == 2 for tensor in read.values())


@pytest.mark.parametrize(("heads", "dim"), [(5, 32), (4, 64)])
def test_r_of_another_model_is_an_error(tmp_path, heads, dim):
    file = tmp_path / "r.safetensors"
    reduction_files.save(file, {LAYER: some_reduction()}, "a test")
    with pytest.raises(ValueError, match=r"R of another model.*has 4 KV heads of 32"):
        reduction_files.load(file, LAYER, 0, heads, dim)


def test_other_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .* with R"):
        reduction_files.load(tmp_path / "none", LAYER, 0, 4, 32)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no file of calibrate-attention"):
        reduction_files.load(tmp_path / "other.safetensors", LAYER, 0, 4, 32)


def test_changed_weights_are_another_model(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    before = reduction_files.cached_file(str(tmp_path), None, "config")
    (tmp_path / reduction_files.FILE_NAME).parent.mkdir()
    (tmp_path / reduction_files.FILE_NAME).write_bytes(b"R is none of the weights")
    assert reduction_files.cached_file(str(tmp_path), None, "config") == before
    os.utime(weights, ns=(1, 1))
    changed = reduction_files.cached_file(str(tmp_path), None, "config")
    assert len({before, changed, reduction_files.cached_file(str(tmp_path), None, "other")}) == 3


@pytest.mark.vllm
def test_r_is_calibrated_once_and_then_read(engine, tiny, tmp_path, monkeypatch, vllm_log, recorded):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny("Llama", head_dim=64)
    texts = []
    for run in range(2):
        llm = engine(model, **RANDOM)
        texts.append(generate(llm, [random_prompt(100)]))
        (file,) = (tmp_path / "vllm-scalesearch" / "attention").iterdir()
        said = [m for m in messages(vllm_log) if "scalesearch: R " in m]
        assert ("R calibrated from 4096 random tokens" if run == 0 else f"R from {file}") in said[-1]
    assert texts[0] == texts[1]
    calls, impls = recorded
    for name, impl in impls.items():
        assert torch.equal(impl.reference.reduction.r, reduction_files.load(file, name, 0, 2, 64)[0].r)
        assert not impl.reference.reduction.fallback.any()
    first_run = {name: chunks[: len(chunks) // 2] for name, chunks in calls.items()}
    assert_is_the_definition(first_run, impls)


@pytest.mark.vllm
def test_calibration_is_that_of_the_moments(engine, tiny, tmp_path, monkeypatch):
    """R makes the second moments of what the layers saw equal, as the formula says."""
    from vllm_scalesearch.model_reductions import ModelReductions

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: dict[str, list] = {}
    collect = ModelReductions.collect

    def record(self, impl, q, k, v, output):
        seen.setdefault(impl.layer_name, []).append((q.clone(), k.clone()))
        return collect(self, impl, q, k, v, output)

    monkeypatch.setattr(ModelReductions, "collect", record)
    llm = engine(tiny("Llama", head_dim=64), **RANDOM)
    generate(llm, [random_prompt(20)])
    (file,) = (tmp_path / "vllm-scalesearch" / "attention").iterdir()
    assert len(seen) == 2
    for name, parts in seen.items():
        q, k = (torch.cat(part).double() for part in zip(*parts, strict=True))
        assert len(q) == 4096
        r = reduction_files.load(file, name, 0, 2, 64)[0]
        k_moved = torch.einsum("thd,hde->the", k, r.r)
        q_moved = torch.einsum("thgd,hde->thge", q.unflatten(1, (2, 2)), r.r_inverse_t)
        m_k = torch.einsum("thd,the->hde", k_moved, k_moved)
        m_q = torch.einsum("thgd,thge->hde", q_moved, q_moved)
        assert (m_k - m_q).norm() < 1e-9 * m_k.norm()


@pytest.mark.vllm
def test_without_a_file_there_is_h_alone(engine, tiny, tmp_path, monkeypatch, vllm_log, recorded):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generate(engine(tiny("Llama", head_dim=64), **SERVED), [random_prompt(100)])
    assert all(impl.reference.reduction is None and impl.reference.hadamard for impl in recorded[1].values())
    assert any("no R for this model, H alone" in message for message in messages(vllm_log))
    assert_is_the_definition(*recorded)


@pytest.mark.vllm
def test_a_file_that_is_not_there_is_an_error(engine, tiny, tmp_path):
    options = {"scalesearch": {"attention": {"r": str(tmp_path / "none.safetensors")}}}
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.safetensors with R"):
        engine(tiny("Llama", head_dim=64), **SERVED, additional_config=options)


@pytest.mark.vllm
def test_the_command_writes_r_beside_the_model(engine, tiny, smollm2, tmp_path, monkeypatch, vllm_log):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny("Llama", head_dim=64, vocab_size=49152).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    for file in smollm2.glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    text = tmp_path / "text.txt"
    text.write_text(" ".join(map(str, range(2000))))
    cli.main(["calibrate-attention", str(model), "--text", str(text), "--tokens", "600"])
    assert (model / reduction_files.FILE_NAME).is_file()
    assert (
        reduction_files.load(model / reduction_files.FILE_NAME, LAYER, 0, 2, 64)[1] == "600 tokens of text.txt"
    )
    generate(engine(model, **SERVED), [random_prompt(20)])
    assert any("600 tokens of text.txt" in message for message in messages(vllm_log))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--tokens", "10"], "--tokens 10: R needs"),
    ],
)
def test_the_command_refuses(tmp_path, arguments, message, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit, match=message):
        cli.main(["calibrate-attention", str(tmp_path), *arguments])
