"""Checkpoints of `vllm-scalesearch quantize`, and others', in vLLM on the CPU, with the plugin and without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vllm_scalesearch.checkpoint.files import CheckpointReader
from vllm_scalesearch.checkpoint.matrices import Recipe
from vllm_scalesearch.checkpoint.run import QuantizeOptions, Run
from vllm_scalesearch.formats import NVFP4, QuantizedTensor

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

# vLLM without this package. Its list of NVFP4 kernels is empty on the CPU; its own emulation is put there
# with its own function, so all that runs is vLLM's.
_STOCK = f"""
import json, sys
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear import register_linear_kernel
from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
from vllm.platforms import PlatformEnum

register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
llm = LLM(sys.argv[1], max_model_len=256, enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True)
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny model that has learnt to count in steps that depend on the token before.

    A random model has no preference: rounding in another order gives it another text.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=256,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        ids = torch.tensor([counted(*start, 32) for start in torch.randint(0, VOCABULARY, (16, 2)).tolist()])
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(trained, tmp_path_factory):
    """``{"w4a16": folder, "w4a4": folder}`` of it."""
    folder = tmp_path_factory.mktemp("quantized")
    starts = torch.randint(0, VOCABULARY, (8, 2), generator=torch.Generator().manual_seed(0)).tolist()
    ids = torch.tensor([counted(*start, 64) for start in starts])
    recipe = Recipe("window:-6,6", "hessian", descent=1)
    for name, activations in (("w4a16", None), ("w4a4", "absmax")):
        options = QuantizeOptions(recipe, activations=activations, smooth=0.5)
        Run(trained, folder / name, options, ids, torch.device("cpu")).run()
    return {name: folder / name for name in ("w4a16", "w4a4")}


def test_same_text_without_the_plugin(checkpoints, engine):
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    stock = subprocess.run(
        [sys.executable, "-c", _STOCK, str(checkpoints["w4a4"])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert stock.returncode == 0, stock.stderr[-3000:]
    line = next(line for line in stock.stdout.splitlines() if line.startswith("IDS"))
    assert greedy(engine(checkpoints["w4a4"])) == json.loads(line[4:])


def test_weight_only_text_is_that_of_the_dequantized_model(trained, checkpoints, engine):
    reader = CheckpointReader(checkpoints["w4a16"])
    network = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    for name, parameter in network.named_parameters():
        module = name.removesuffix(".weight")
        if name in reader:
            parameter.data = reader.tensor(name)
        else:
            tensors = [reader.tensor(f"{module}.weight_{part}") for part in ("packed", "scale", "global_scale")]
            weight = QuantizedTensor(tensors[0], tensors[1], (1 / tensors[2]).reshape(()), NVFP4)
            parameter.data = weight.dequantize(torch.bfloat16)
    found = greedy(engine(checkpoints["w4a16"]))
    for prompt, ids in zip(PROMPTS, found, strict=True):
        logits = network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(1).tolist() == ids


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
