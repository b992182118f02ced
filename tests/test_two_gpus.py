"""A model split over two GPUs, with torch.compile, CUDA graphs and NCCL, against the whole one on one GPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_moe import GPU_MIXTRAL
from test_vllm_parallel import PROMPTS, run_split, shard_rows

SERVED = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4"}
# vLLM's choice on Hopper, Humming, compiles each new shape for a minute; which kernel runs is not the point.
WEIGHTS = {"quantization": "scalesearch", "linear_backend": "marlin"}
GPU = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 29, "tokens": 24}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4]}}
TENSORS = {"tensor_parallel_size": 2}
LAYERS = {"pipeline_parallel_size": 2}
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
# Sums over ranks are rounded in another order, and what is quantized after them falls to another code where it
# lay near a midpoint. Two tokens closer than this may change places, and log probabilities differ by less.
NEAR = 0.25
TEXTS = [
    "The capital of France is Paris. " * 12 + "The capital of Germany is",
    "Once upon a time, in a small village by the sea, there lived",
]
HEADS, KV_HEADS, DIM = 9, 3, 64  # of SmolLM2-135M


def with_one_more_kv_head(smollm2: Path, folder: Path) -> Path:
    """The same function with heads that two ranks can divide: the fourth KV head and its queries are zero."""
    tensors = load_file(smollm2 / "model.safetensors")
    group = HEADS // KV_HEADS
    for name, tensor in tensors.items():
        rows = {"q_proj": group * DIM, "k_proj": DIM, "v_proj": DIM}.get(name.split(".")[-2])
        if rows is not None:
            tensors[name] = torch.cat((tensor, tensor.new_zeros(rows, tensor.shape[1])))
        elif name.split(".")[-2] == "o_proj":
            tensors[name] = torch.cat((tensor, tensor.new_zeros(len(tensor), group * DIM)), dim=1)
    shutil.copytree(smollm2, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": HEADS + group, "num_key_value_heads": KV_HEADS + 1, "head_dim": DIM}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_more_heads_change_nothing(smollm2, tmp_path):
    """What the tests on two GPUs rely on, without one."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([PROMPTS[0][:16]])
    logits = []
    for folder in (smollm2, with_one_more_kv_head(smollm2, tmp_path / "model")):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(network(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


def assert_close(got: dict[str, Any], expected: dict[str, Any], mean: float = 0.05) -> None:
    """The same numbers for the prompts, and the same text up to two tokens that are as good as equal."""
    assert (got["logprobs"] - expected["logprobs"]).abs().mean() < mean
    for ours, theirs in zip(got["texts"], expected["texts"], strict=True):
        for (token, found), (other, likeliest) in zip(ours, theirs, strict=True):
            if token != other:
                first, second = sorted(likeliest.values(), reverse=True)[:2]
                assert first - second < NEAR, (ours, theirs)
                break
            assert abs(found[token] - likeliest[other]) < NEAR


def assert_shards(got: dict[str, Any], expected: dict[str, Any], widths: dict[str, list[int]]) -> None:
    """Each rank holds its part of the values that one GPU holds, under the same tensor scale."""
    (whole,) = expected["stored"]
    assert whole and len(got["stored"]) == 2
    for rank, stored in enumerate(got["stored"]):
        assert stored.keys() == whole.keys()
        for name, (values, scale) in stored.items():
            all_values, all_scale = whole[name]
            assert torch.equal(scale, all_scale), name
            last = name.split(".")[-1]
            part = (
                shard_rows(all_values, widths[last], rank) if last in widths else all_values.chunk(2, 1)[rank]
            )
            assert torch.equal(values, part), (name, rank)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.gpu
@pytest.mark.vllm
@two_gpus
@pytest.mark.parametrize("options", [WEIGHTS, SERVED, WEIGHTS | SERVED], ids=["weights", "attention", "both"])
def test_smollm2(smollm2, tmp_path, options):
    from transformers import AutoTokenizer

    model = with_one_more_kv_head(smollm2, tmp_path / "model")
    prompts = AutoTokenizer.from_pretrained(smollm2)(TEXTS).input_ids
    prompts = [prompt[: min(map(len, prompts))] for prompt in prompts] if options is WEIGHTS else prompts[:1]
    arguments = {"quantization": None, "prompts": prompts, **GPU, **GRAPHS, **options}
    whole = run_split(tmp_path / "whole", model, {}, **arguments)
    split = run_split(tmp_path / "tensors", model, {}, **arguments, **TENSORS)
    assert_close(split, whole)
    if "quantization" in options:
        width = (HEADS + HEADS // KV_HEADS) * DIM
        widths = {"qkv_proj": [width, width // 3, width // 3], "gate_up_proj": [1536, 1536]}
        assert_shards(split, whole, widths)
    layers = run_split(tmp_path / "layers", model, {}, **arguments, **LAYERS)
    assert_close(layers, whole)
    if "quantization" in options:
        held = [stored.keys() for stored in layers["stored"]]
        assert not held[0] & held[1] and held[0] | held[1] == whole["stored"][0].keys()
        for stored in layers["stored"]:
            for name, tensors in stored.items():
                assert all(map(torch.equal, tensors, whole["stored"][0][name]))


@pytest.mark.gpu
@pytest.mark.vllm
@two_gpus
def test_experts(tiny, tmp_path):
    model = tiny("Mixtral", num_attention_heads=4, num_key_value_heads=2, head_dim=64, **GPU_MIXTRAL)
    options = {**WEIGHTS, **SERVED, "moe_backend": "marlin", "prompts": PROMPTS, **GPU}
    whole = run_split(tmp_path / "whole", model, {}, **options)
    assert_close(run_split(tmp_path / "tensors", model, {}, **options, **TENSORS), whole, 0.1)
    assert_close(run_split(tmp_path / "experts", model, {}, **options, **EXPERTS), whole, 0.1)


@pytest.mark.gpu
@pytest.mark.vllm
@two_gpus
@pytest.mark.parametrize("kv_heads", [1, 8])
def test_kv_heads(tiny, tmp_path, monkeypatch, kv_heads):
    """One KV head, which both ranks hold, and four for each; R comes from what the ranks saw together."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny("Llama", hidden_size=256, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64)
    options = {
        **SERVED, "quantization": None, "prompts": PROMPTS, "max_num_batched_tokens": 16, **GPU,
        "additional_config": {"scalesearch": {"attention": {"r": "random", "recent": 16}}},
    }  # fmt: skip
    whole = run_split(tmp_path / "whole", model, {}, **options)
    # Both read the file of R that the first run wrote, each rank its own heads.
    assert_close(run_split(tmp_path / "tensors", model, {}, **options, **TENSORS), whole, 0.1)
