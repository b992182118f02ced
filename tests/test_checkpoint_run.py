"""`vllm-scalesearch quantize` on tiny models: what it writes, killed and resumed, little memory, full disk."""

import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from vllm_scalesearch import cli
from vllm_scalesearch.checkpoint import files
from vllm_scalesearch.checkpoint.files import CheckpointReader
from vllm_scalesearch.checkpoint.matrices import Recipe
from vllm_scalesearch.checkpoint.model import LayerRunner, ModelSkeleton
from vllm_scalesearch.checkpoint.run import REPORT, QuantizeOptions, Run
from vllm_scalesearch.formats import NVFP4, QuantizedTensor
from vllm_scalesearch.search import quantize

HESSIAN = Recipe("window:-6,6", "hessian", descent=1, correction=0.5)
MOE = {
    "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "Qwen3Moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
}


def tokens(samples: int = 3, length: int = 96) -> torch.Tensor:
    return torch.randint(0, 512, (samples, length), generator=torch.Generator().manual_seed(0))


def run(model: Path, out: Path, options=QuantizeOptions(), ids=None, **more) -> dict:  # noqa: B008
    return Run(model, out, options, ids, torch.device("cpu"), **more).run()


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def stored(folder: Path) -> dict[str, QuantizedTensor]:
    reader = CheckpointReader(folder)
    found = {}
    for name in reader.names():
        if name.endswith(".weight_packed"):
            module = name.removesuffix(".weight_packed")
            scale = 1.0 / reader.tensor(f"{module}.weight_global_scale")
            found[module] = QuantizedTensor(
                reader.tensor(name), reader.tensor(f"{module}.weight_scale"), scale.reshape(()), NVFP4
            )
    return found


def with_weights_of(out: Path | None, model: Path) -> torch.nn.Module:
    """The model in fp32, with what a quantized checkpoint of it dequantizes to."""
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(
        False
    )
    if out is not None:
        reader = CheckpointReader(out)
        for name, parameter in network.named_parameters():
            if name in reader:
                parameter.data = reader.tensor(name).float()
        for module, weight in stored(out).items():
            network.get_submodule(module).weight.data = weight.dequantize()
    return network


@pytest.fixture(scope="module")
def small(tiny):
    return tiny("Llama", hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)


# --- what is written -------------------------------------------------------------------------------


def test_without_calibration_codes_are_the_search_of_the_weights(tiny, tmp_path):
    model = tiny("Llama")
    report = run(model, tmp_path / "out", QuantizeOptions(Recipe("exact")))
    weights, found = load_file(model / "model.safetensors"), stored(tmp_path / "out")
    assert len(found) == 14 == len(report["layers"])
    for layer in range(2):
        for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)):
            names = [name for name in found if f".{layer}." in name and name.rpartition(".")[2] in group]
            assert len(names) == len(group)
            assert len({float(found[name].tensor_scale) for name in names}) == 1
            for name in names:
                expected = quantize(
                    weights[f"{name}.weight"], NVFP4, "exact", tensor_scale=found[name].tensor_scale
                )
                assert torch.equal(found[name].packed, expected.packed)
                assert torch.equal(found[name].scales.view(torch.uint8), expected.scales.view(torch.uint8))
    reader = CheckpointReader(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(reader.tensor(name), weights[name])
    assert not (tmp_path / "out.partial").exists()


def test_layout_is_that_of_compressed_tensors(tiny, tmp_path):
    out = tmp_path / "out"
    run(tiny("Llama"), out, QuantizeOptions(HESSIAN, activations="absmax", smooth=0.5), tokens())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    assert config["ignore"] == ["lm_head"]
    reader = CheckpointReader(out)
    for module, weight in stored(out).items():
        names = NVFP4PackedCompressor.compression_param_names(scheme)
        tensors = {name: reader.tensor(f"{module}.{name}") for name in names}
        assert tensors["input_global_scale"].shape == (1,) and tensors["input_global_scale"] > 0
        # In its own fp32 arithmetic it must be our value, up to the rounding of one division.
        tensors["weight_packed"] = tensors["weight_packed"].clone()
        theirs = NVFP4PackedCompressor.decompress(tensors, scheme)["weight"]
        torch.testing.assert_close(theirs.float(), weight.dequantize(), atol=0, rtol=2**-7)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(reader.names())
    assert (out / "generation_config.json").exists()


def test_static_input_scale_is_that_of_the_largest_input(small, tmp_path):
    run(small, tmp_path / "out", QuantizeOptions(Recipe("exact"), activations="paper"), tokens())
    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    seen = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _m, x: seen.append(x[0].abs().max())
    )
    with torch.no_grad():
        for row in tokens():
            model(row[None])
    scale = CheckpointReader(tmp_path / "out").tensor("model.layers.0.self_attn.q_proj.input_global_scale")
    torch.testing.assert_close(scale[0], 2688 / torch.stack(seen).max(), rtol=1e-4, atol=0)


def test_calibration_lowers_the_error_of_the_model(tiny, tmp_path):
    model = tiny("Llama", initializer_range=0.05)
    held_out = torch.randint(0, 512, (4, 96), generator=torch.Generator().manual_seed(9))
    original = with_weights_of(None, model)(held_out).logits
    errors = {}
    for name, options, ids in (
        ("absmax", QuantizeOptions(Recipe("absmax")), None),
        ("exact", QuantizeOptions(Recipe("exact")), None),
        ("hessian", QuantizeOptions(HESSIAN), tokens(32, 128)),
    ):
        run(model, tmp_path / name, options, ids)
        network = with_weights_of(tmp_path / name, model)
        errors[name] = float((network(held_out).logits - original).square().mean())
    assert errors["hessian"] < 0.8 * errors["exact"] < 0.8 * errors["absmax"], errors


def test_computing_in_bf16_as_on_a_gpu(tiny, tmp_path, monkeypatch):
    def skeleton(self, trust_remote_code):
        config = transformers.AutoConfig.from_pretrained(self.model)
        return ModelSkeleton(self.reader, config, torch.bfloat16, self.device)

    options = QuantizeOptions(HESSIAN, activations="paper", smooth=0.5)
    fp32 = run(tiny("Llama"), tmp_path / "fp32", options, tokens())
    monkeypatch.setattr(Run, "_skeleton", skeleton)
    bf16 = run(tiny("Llama"), tmp_path / "bf16", options, tokens())
    for mine, theirs in zip(fp32["layers"], bf16["layers"], strict=True):
        assert mine["smoothed"] == theirs["smoothed"]
        assert abs(mine["error"] - theirs["error"]) < 0.1 * mine["error"]


def test_ignore_and_override(tiny, tmp_path):
    options = QuantizeOptions(
        Recipe("exact"), (("mlp", {"weights": "absmax"}), ("layers.1.mlp", {"weights": "fast"})), ("o_proj",)
    )
    report = run(tiny("Llama"), tmp_path / "out", options)
    used = {entry["name"]: entry["weights"] for entry in report["layers"]}
    assert used["model.layers.0.mlp.up_proj"] == "absmax" and used["model.layers.1.mlp.up_proj"] == "fast"
    assert used["model.layers.0.self_attn.q_proj"] == "exact"
    assert report["not_quantized"] == {f"model.layers.{i}.self_attn.o_proj": "option --ignore" for i in (0, 1)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", *report["not_quantized"]]
    reader = CheckpointReader(tmp_path / "out")
    assert "model.layers.0.self_attn.o_proj.weight" in reader
    with pytest.raises(ValueError, match="--ignore nothing: matches no matrix"):
        run(tiny("Llama"), tmp_path / "b", QuantizeOptions(ignore=("nothing",)))
    with pytest.raises(ValueError, match=r"--ignore selects .*q_proj but not .*k_proj"):
        run(tiny("Llama"), tmp_path / "c", QuantizeOptions(ignore=("q_proj",)))


def test_width_that_is_no_multiple_of_the_block(tiny, tmp_path):
    report = run(tiny("Llama", intermediate_size=104), tmp_path / "out")
    assert report["not_quantized"] == {
        f"model.layers.{i}.mlp.down_proj": "its width 104 is not a multiple of 16" for i in (0, 1)
    }


# --- models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "more"), [("Qwen2", {}), ("Qwen3", {}), ("Gemma2", {}), *MOE.items()])
def test_layers_run_one_at_a_time_like_the_model(tiny, architecture, more):
    model = tiny(architecture, **more)
    config = transformers.AutoConfig.from_pretrained(model)
    skeleton = ModelSkeleton(CheckpointReader(model), config, torch.float32, torch.device("cpu"))
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokens(2, 64)
    with torch.no_grad():
        expected = [network(row[None], output_hidden_states=True).hidden_states for row in ids]
    for hidden, states in zip(list(skeleton.embedded(ids)), expected, strict=True):
        assert torch.equal(hidden, states[0])
        for index, layer in enumerate(skeleton.layers):
            weights = {name: tensor.float() for name, tensor in skeleton.layer_tensors(layer).items()}
            hidden = skeleton.call(index, weights, hidden)
            if index + 1 < len(skeleton.layers):  # the last state has gone through the last norm
                torch.testing.assert_close(hidden, states[index + 1], atol=1e-4, rtol=1e-4)


def test_groups(tiny):
    model = tiny("Mixtral", **MOE["Mixtral"])
    config = transformers.AutoConfig.from_pretrained(model)
    skeleton = ModelSkeleton(CheckpointReader(model), config, torch.float32, torch.device("cpu"))
    hidden = next(iter(skeleton.embedded(tokens(1, 32))))
    weights = {name: t.float() for name, t in skeleton.layer_tensors(skeleton.layers[0]).items()}
    groups = LayerRunner(skeleton, 0).groups(weights, hidden)
    assert [(g.names, g.stage) for g in groups] == [
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 0),
        (("self_attn.o_proj",), 1),
        *[((f"mlp.experts.{e}.w1", f"mlp.experts.{e}.w3"), 2) for e in range(4)],
        *[((f"mlp.experts.{e}.w2",), 3) for e in range(4)],
    ]


@pytest.mark.parametrize("architecture", MOE)
def test_experts_with_too_few_tokens_are_named(tiny, tmp_path, architecture, capsys):
    options = QuantizeOptions(HESSIAN, activations="absmax", smooth=0.5)
    report = run(tiny(architecture, **MOE[architecture]), tmp_path / "out", options, tokens(4, 120))
    experts = [entry for entry in report["layers"] if ".experts." in entry["name"]]
    assert len(experts) == 2 * 4 * 3
    few = [entry for entry in experts if entry["fallback"]]
    assert few and len(few) < len(experts)
    for entry in experts:
        assert entry["metric"] == ("mse" if entry["fallback"] else "hessian")
        if entry["fallback"]:
            assert int(entry["fallback"].split()[1]) < 256
    assert not any(entry["fallback"] for entry in report["layers"] if ".experts." not in entry["name"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    gate = experts[0]["name"].split(".experts.")[0] + ".gate"
    assert gate in config["ignore"] and "lm_head" in config["ignore"]
    reader = CheckpointReader(tmp_path / "out")
    assert all(f"{entry['name']}.input_global_scale" in reader for entry in report["layers"])


def test_smoothing_keeps_the_model_and_leaves_other_norms_alone(tiny, tmp_path):
    options = QuantizeOptions(Recipe("exact"), smooth=0.5)
    llama = run(tiny("Llama"), tmp_path / "llama", options, tokens())
    smoothed = {entry["name"].rpartition(".")[2] for entry in llama["layers"] if entry["smoothed"]}
    assert smoothed == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    # Gemma's norms multiply by 1 + w; dividing w would be wrong, and is found to be.
    folder = tmp_path / "model"
    folder.mkdir()
    weights = load_file(tiny("Gemma2") / "model.safetensors")
    for name in weights:
        if "norm" in name:
            weights[name] += 0.1  # a new model's are all 0
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_bytes((tiny("Gemma2") / "config.json").read_bytes())
    gemma = run(folder, tmp_path / "gemma", options, tokens())
    assert {entry["name"].rpartition(".")[2] for entry in gemma["layers"] if entry["smoothed"]} == {"down_proj"}
    # The norms are others, the weights make up for it: no more error than without.
    run(tiny("Llama"), tmp_path / "plain", QuantizeOptions(Recipe("exact")), tokens())
    original = with_weights_of(None, tiny("Llama"))(tokens()).logits
    plain, smooth = (
        (with_weights_of(tmp_path / name, tiny("Llama"))(tokens()).logits - original).norm()
        for name in ("plain", "llama")
    )
    assert smooth < 1.2 * plain


# --- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda f, c: c.update(quantization_config={"quant_method": "compressed-tensors"}),
            "compressed-tensors",
        ),
        (lambda f, c: c.update(quantization_config={"quant_algo": "NVFP4"}), "NVFP4"),
        (lambda f, c: (f / "hf_quant_config.json").write_text("{}"), "modelopt, by hf_quant_config.json"),
    ],
)
def test_quantized_checkpoints_are_refused(tiny, tmp_path, change, words):
    folder = tmp_path / "model"
    folder.mkdir()
    source = tiny("Llama")
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    change(folder, config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantized already .*{words}.* Quantize the bf16"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_options_that_need_calibration_and_folders_in_the_way(small, tmp_path):
    with pytest.raises(ValueError, match="need calibration text; give --calibration"):
        run(small, tmp_path / "out", QuantizeOptions(HESSIAN))
    with pytest.raises(ValueError, match="need calibration text"):
        run(small, tmp_path / "out", QuantizeOptions(activations="paper"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is there already"):
        run(small, tmp_path / "out")
    with pytest.raises(ValueError, match="calibration token 512: the model has 512"):
        run(small, tmp_path / "b", QuantizeOptions(HESSIAN), torch.full((1, 8), 512))


# --- killed, out of memory, out of space -------------------------------------------------------------

_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from vllm_scalesearch.checkpoint import files
from vllm_scalesearch.checkpoint.run import QuantizeOptions, Run
from vllm_scalesearch.checkpoint.matrices import Recipe

model, folder = Path(sys.argv[1]), Path(sys.argv[2])
ids = torch.randint(0, 512, (3, 96), generator=torch.Generator().manual_seed(0))
recipe = Recipe("window:-6,6", "hessian", descent=1, correction=0.5)
options = QuantizeOptions(recipe, activations="paper", smooth=0.5)

import transformers
from transformers import LlamaForCausalLM  # here, and not in every process that is killed

def work(out, resume):
    Run(model, out, options, ids, torch.device("cpu"), resume).run()

def child(function):
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    return os.waitpid(pid, 0)[1]

work(folder / "whole", False)
renamed = 0
while True:
    # Once more each time, it is killed just before or just after it gives a file its name.
    def killed():
        real, count = os.replace, 0
        def replace(a, b):
            nonlocal count
            count += 1
            if count > renamed // 2:
                if renamed % 2:
                    real(a, b)
                os.kill(os.getpid(), signal.SIGKILL)
            real(a, b)
        os.replace = replace
        work(folder / f"killed{renamed}", False)
    status = child(killed)
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (folder / f"killed{renamed}").exists()
    assert child(lambda: work(folder / f"killed{renamed}", True)) == 0
    renamed += 7
print(renamed)
"""


def test_killed_and_resumed_is_the_same_byte_for_byte(small, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(small), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path / "whole")
    assert REPORT in expected and "config.json" in expected
    others = sorted(tmp_path.glob("killed*"))
    assert len(others) >= 4
    for folder in others:
        assert contents(folder) == expected, folder.name


def test_resume_asks_for_the_same_run(small, tmp_path, monkeypatch):
    real, count = files.save_file, 0

    def stops(*arguments):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(files, "save_file", stops)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "out")
    monkeypatch.setattr(files, "save_file", real)
    with pytest.raises(ValueError, match=r"out.partial: an unfinished run; continue it with --resume"):
        run(small, tmp_path / "out")
    with pytest.raises(ValueError, match="begun with other options"):
        run(small, tmp_path / "out", QuantizeOptions(Recipe("absmax")), resume=True)
    holder = Run(small, tmp_path / "out", QuantizeOptions(), None, torch.device("cpu"), resume=True)
    with pytest.raises(ValueError, match="another run is at work"):
        run(small, tmp_path / "out", resume=True)
    holder.run()
    run(small, tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_full_disk(small, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # smaller than any shard
    try:
        with pytest.raises(
            ValueError, match=r"out.partial/model-00001-of-00003.safetensors: cannot be written"
        ):
            run(small, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*/config.json")) and not list(tmp_path.glob("*/*.safetensors"))
    run(small, tmp_path / "out", resume=True)
    run(small, tmp_path / "other")
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers
from transformers import LlamaForCausalLM
from vllm_scalesearch.checkpoint.run import QuantizeOptions, Run
from vllm_scalesearch.checkpoint.matrices import Recipe

small, model, out, extra = *map(Path, sys.argv[1:4]), int(sys.argv[4])
options = QuantizeOptions(Recipe("absmax"))
# What libraries take when they are first used, and keep, is there before anything is limited.
Run(small, out.with_name("small"), options, None, torch.device("cpu")).run()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + extra,) * 2)
try:
    torch.empty(sum(file.stat().st_size for file in model.glob("*.safetensors")), dtype=torch.uint8)
    sys.exit("the whole model fits, so this shows nothing")
except RuntimeError:
    pass
Run(model, out, options, None, torch.device("cpu")).run()
"""


def test_model_larger_than_memory(tiny, tmp_path):
    config = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    small, model = (tiny("Llama", num_hidden_layers=layers, **config) for layers in (1, 30))
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    extra = 44 << 20
    assert size > 1.2 * extra
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *map(str, (small, model, tmp_path / "out", extra))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(stored(tmp_path / "out")) == 30 * 7


# --- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_tokenizer(small, tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tokenized")
    for file in small.iterdir():
        (folder / file.name).symlink_to(file)
    vocabulary = {f"w{i}": i for i in range(512)} | {"<unk>": 511}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def test_command(with_tokenizer, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i) % 500}" for i in range(400)))
    arguments = ["quantize", str(with_tokenizer), "--calibration", str(text), "--length", "100", "-o"]
    cli.main(
        [
            *arguments,
            str(tmp_path / "a"),
            "--samples",
            "4",
            "--override",
            "mlp",
            "weights=window:-2,3,metric=wmse",
        ]
    )
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.up_proj" in printed and "wmse" in printed and "hessian" in printed
    report = json.loads((tmp_path / "a" / REPORT).read_text())
    used = {e["name"]: (e["weights"], e["metric"]) for e in report["layers"]}
    assert used["model.layers.0.mlp.up_proj"] == ("window:-2,3", "wmse")
    assert used["model.layers.0.self_attn.q_proj"] == ("window:-6,6", "hessian")
    assert (tmp_path / "a" / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match=r"text.txt has 400 tokens, fewer than --samples 5 of --length 100"):
        cli.main([*arguments, str(tmp_path / "b"), "--samples", "5"])
    with pytest.raises(SystemExit, match="there is no such file"):
        cli.main(["quantize", str(with_tokenizer), "-o", str(tmp_path / "b"), "--calibration", "/no/file.txt"])
    with pytest.raises(SystemExit, match="unknown wieghts"):
        cli.main([*arguments, str(tmp_path / "b"), "--samples", "1", "--override", "mlp", "wieghts=exact"])
    with pytest.raises(SystemExit, match="no such folder"):
        cli.main(["quantize", "/no/model", "-o", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()
