"""Checkpoints of `vllm-scalesearch quantize`, and others', in vLLM, with the plugin and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import layers
import pytest
import torch
import transformers
from conftest import prompt_logprobs
from safetensors.torch import load_file, save_file

from vllm_scalesearch.checkpoint import layout
from vllm_scalesearch.checkpoint.files import CheckpointReader
from vllm_scalesearch.checkpoint.matrices import Recipe
from vllm_scalesearch.checkpoint.run import QuantizeOptions, Run
from vllm_scalesearch.formats import NVFP4, QuantizedTensor
from vllm_scalesearch.search import quantize

pytestmark = pytest.mark.vllm
VOCABULARY = 64
LENGTH = 24


def counted(first: int, second: int, length: int) -> list[int]:
    """Each token is the last one and one more, and the parity of the one before it."""
    ids = [first, second]
    while len(ids) < length:
        ids.append((ids[-1] + 1 + ids[-2] % 2) % VOCABULARY)
    return ids


# Longer than what the attention backend keeps in 16 bits.
PROMPTS = [counted(3, 9, 100), counted(40, 22, 20)]

# Tokens that the model does not expect, so that small errors show in their log probabilities.
RANDOM_PROMPTS = torch.randint(VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()

# vLLM without this package. Its list of NVFP4 kernels is empty on the CPU; its own emulation is put there
# with its own function, so all that runs is vLLM's.
_STOCK = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.platforms import PlatformEnum, current_platform

if current_platform.is_cpu():
    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
arguments = dict(max_model_len=256, enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True)
llm = LLM(sys.argv[1], **arguments, **json.loads(sys.argv[2]))
assert not any(name.startswith("vllm_scalesearch") for name in sys.modules)
params = SamplingParams(max_tokens={LENGTH}, temperature=0, detokenize=False)
outputs = llm.generate([{{"prompt_token_ids": p}} for p in {PROMPTS}], params, use_tqdm=False)
print("IDS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def greedy(llm) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=LENGTH, temperature=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def stock(folder: Path, **arguments) -> list[list[int]]:
    """What vLLM without this package generates."""
    if torch.cuda.is_available():
        arguments = {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 30, **arguments}
    result = subprocess.run(
        [sys.executable, "-c", _STOCK, str(folder), json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "VLLM_PLUGINS": ""},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("IDS"))
    return json.loads(line[4:])


def train(architecture: str, folder: Path, **sizes) -> Path:
    """A tiny model that has learnt to count in steps that depend on the token before.

    A random model has no preference: rounding in another order gives it another text.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        max_position_embeddings=256, tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        ids = torch.tensor([counted(*start, 32) for start in torch.randint(0, VOCABULARY, (16, 2)).tolist()])
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantized(model: Path, folder: Path, activations: str | None) -> Path:
    starts = torch.randint(0, VOCABULARY, (8, 2), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([counted(*start, 64) for start in starts])
    options = QuantizeOptions(Recipe("window:-6,6", "hessian", descent=1), activations=activations, smooth=0.5)
    Run(model, folder, options, ids, torch.device("cpu")).run()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train("Llama", tmp_path_factory.mktemp("trained"), hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):
    """``{"w4a16": folder, "w4a4": folder}`` of it."""
    folder = tmp_path_factory.mktemp("quantized")
    return {
        name: quantized(trained, folder / name, activations)
        for name, activations in (("w4a16", None), ("w4a4", "absmax"))
    }


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A W4A16 checkpoint of a mixture of experts, of widths that Marlin takes as they are."""
    folder = tmp_path_factory.mktemp("experts")
    sizes = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128)
    model = train("Qwen3Moe", folder / "trained", **sizes, num_experts=4, num_experts_per_tok=2)
    return quantized(model, folder / "w4a16", None)


def stored_weight(reader: CheckpointReader, module: str) -> torch.Tensor:
    """A quantized matrix (N, K) in fp32."""
    packed, scales, divisor = (
        reader.tensor(f"{module}.weight_{part}") for part in ("packed", "scale", "global_scale")
    )
    return QuantizedTensor(packed, scales, (1 / divisor).reshape(()), NVFP4).dequantize()


def dequantized(source: Path, folder: Path) -> torch.nn.Module:
    """What a checkpoint holds as transformers runs it, in fp32. Its inputs are those of W4A16."""
    reader, tensors = CheckpointReader(source), {}
    for name in reader.names():
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            tensors[f"{module}.weight"] = stored_weight(reader, module)
        elif last not in ("weight_scale", "weight_global_scale", "input_global_scale"):
            tensors[name] = reader.tensor(name).float()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def logprobs(network: torch.nn.Module) -> torch.Tensor:
    """`prompt_logprobs` of the random prompts."""
    ids = torch.tensor(RANDOM_PROMPTS)
    found = network(ids).logits.log_softmax(-1)[:, :-1]
    return found.gather(2, ids[:, 1:, None]).squeeze(2)


def assert_text_of(network: torch.nn.Module, found: list[list[int]]) -> None:
    """Each token is the network's likeliest."""
    for prompt, ids in zip(PROMPTS, found, strict=True):
        logits = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == ids


def input_errors(llm, checkpoint: Path, quantized_inputs: bool) -> list[float]:
    """Of each layer's output, relative, from what the layer was given; with its input quantized or not."""
    llm.apply_model(layers.record)
    prompt_logprobs(llm, RANDOM_PROMPTS[:1])
    (recorded,) = llm.apply_model(layers.collect)
    reader, errors = CheckpointReader(checkpoint), []
    for name, layer in recorded.items():
        layer = {key: tensor.cpu() for key, tensor in layer.items()}
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in layers.FUSED.get(last, (last,))]
        x = layer["input"].double()
        if quantized_inputs:
            scale = 1 / reader.tensor(f"{parts[0]}.input_global_scale").reshape(())
            x = quantize(layer["input"], NVFP4, "absmax", tensor_scale=scale).dequantize().double()
        expected = x @ torch.cat([stored_weight(reader, part) for part in parts]).double().t()
        errors.append(((layer["output"].double() - expected).norm() / expected.norm()).item())
    assert len(errors) == 8
    return errors


def check_experts(llm, experts: Path, folder: Path) -> None:
    """The text is that of the dequantized model in fp32, and log probabilities are within 0.05 on average."""
    network = dequantized(experts, folder)
    assert_text_of(network, greedy(llm))
    assert (prompt_logprobs(llm, RANDOM_PROMPTS) - logprobs(network)).abs().mean() < 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's kernels for GPUs are tested below")
def test_same_text_without_the_plugin(checkpoints, engine):
    assert greedy(engine(checkpoints["w4a4"])) == stock(checkpoints["w4a4"])


def test_weight_only_text_is_that_of_the_dequantized_model(checkpoints, engine, tmp_path):
    network = dequantized(checkpoints["w4a16"], tmp_path / "dequantized")
    assert_text_of(network, greedy(engine(checkpoints["w4a16"])))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on Marlin there, see below")
def test_experts(experts, engine, tmp_path):
    check_experts(engine(experts), experts, tmp_path / "dequantized")


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM has kernels for GPUs")
def test_experts_with_quantized_inputs_are_refused(experts, engine, tmp_path):
    shutil.copytree(experts, tmp_path / "w4a4")
    config = json.loads((experts / "config.json").read_text())
    config["quantization_config"] = layout.quantization_config(config["quantization_config"]["ignore"], True)
    (tmp_path / "w4a4" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotImplementedError, match=r"layers\.0\.mlp\.experts.*W4A4.*use W4A16"):
        engine(tmp_path / "w4a4")


def as_modelopt(source: Path, folder: Path) -> None:
    """The same codes and scales under ModelOpt's names, whose scales multiply instead of divide."""
    folder.mkdir()
    names = {"weight_packed": "weight", "weight_scale": "weight_scale"}
    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            module, _, last = name.rpartition(".")
            if last in ("weight_global_scale", "input_global_scale"):
                new = "weight_scale_2" if last.startswith("weight") else "input_scale"
                tensors[f"{module}.{new}"] = (1 / tensor).reshape(())
            else:
                tensors[f"{module}.{names.get(last, last)}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False},
                "input_activations": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False},
            }
        },
        "producer": {"name": "modelopt", "version": "0.40"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_others_checkpoints_with_the_attention_backend(checkpoints, engine, tmp_path, vllm_log):
    as_modelopt(checkpoints["w4a4"], tmp_path / "modelopt")
    attention = dict(attention_backend="SCALESEARCH", kv_cache_dtype="nvfp4")
    theirs = greedy(engine(tmp_path / "modelopt", **attention))
    # Other codes than the checkpoint's would give other text than the same codes in the other layout.
    assert greedy(engine(checkpoints["w4a4"], **attention)) == theirs
    assert "SCALESEARCH" in vllm_log.text or "scalesearch" in vllm_log.text
    with pytest.raises(ValueError, match="quantized already"):
        Run(tmp_path / "modelopt", tmp_path / "out", QuantizeOptions(), None, torch.device("cpu"))
    with pytest.raises(Exception, match="already quantized"):
        engine(tmp_path / "modelopt", {})


# --- on a CUDA GPU -------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "backend"),
    # Humming compiles each shape for a minute.
    [("w4a16", "marlin"), ("w4a16", "humming"), ("w4a4", "marlin"), ("w4a4", "emulation")],
)
def test_gpu_same_text_without_the_plugin(checkpoints, engine, tmp_path, scheme, backend):
    found = greedy(engine(checkpoints[scheme], linear_backend=backend))
    assert found == stock(checkpoints[scheme], linear_backend=backend)
    if scheme == "w4a16":
        assert_text_of(dequantized(checkpoints[scheme], tmp_path / "dequantized"), found)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["marlin", "emulation"])
def test_gpu_inputs_of_w4a4(checkpoints, engine, backend):
    """Marlin leaves them in 16 bits; the emulation quantizes them, by the definition of the CPU's kernel."""
    quantized_inputs = backend == "emulation"
    llm = engine(checkpoints["w4a4"], linear_backend=backend)
    assert max(input_errors(llm, checkpoints["w4a4"], quantized_inputs)) < 2**-7
    assert min(input_errors(llm, checkpoints["w4a4"], not quantized_inputs)) > 2**-6


@pytest.mark.gpu
def test_gpu_experts(experts, engine, tmp_path):
    llm = engine(experts, moe_backend="marlin", linear_backend="marlin")
    check_experts(llm, experts, tmp_path / "dequantized")
