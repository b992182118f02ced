"""A model split over two GPUs, with torch.compile, CUDA graphs and NCCL, against the whole one on one GPU.

Each engine runs in processes of its own; those of one test start side by side. Should a machine's links between
GPUs not bear one of vLLM's ways to add up, TWO_GPUS_ARGUMENTS is laid over the arguments of the split engines:
``TWO_GPUS_ARGUMENTS='{"disable_custom_all_reduce": true}' pytest test_two_gpus.py``. By default vLLM chooses.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_layers import GPU_MIXTRAL
from safetensors.torch import load_file, save_file
from split_engines import run_split, shard_rows

from vllm_scalesearch import reduction_files
from vllm_scalesearch.transforms import SecondMoments, magnitude_reduction

# Chunks of 64 tokens, so that prompts read the cache; by default its newest 64 tokens are not packed yet.
SERVED = {"attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4", "max_num_batched_tokens": 64}
WEIGHTS = {"quantization": "scalesearch"}
COMMON = {"quantization": None, "max_num_seqs": 8, "max_model_len": 256, "tokens": 24}
GPU = {
    "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 29,
    "enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
}  # fmt: skip
# vLLM's choice on Hopper, Humming, compiles each new shape for a minute; which kernel runs is not the point.
MARLIN = {**GPU, "linear_backend": "marlin"}
TENSORS = {"tensor_parallel_size": 2}
LAYERS = {"pipeline_parallel_size": 2}
EXPERTS = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
# Sums over ranks are rounded in another order, and what is quantized after them falls to another code where it
# lay near a midpoint. Log probabilities of a prompt's tokens may differ by MEAN in the mean, those of generated
# ones by NEAR each, and two tokens closer than that may change places. On the CPU, SmolLM2's prompt differed by
# 0.04 (quantized weights) and 0.05 (and cache) in the mean, 0.24 at most.
MEAN, NEAR = 0.1, 0.5
# Of random models, where a rounding sends a token to another expert: there by 0.05 in the mean, 0.8 at most.
RANDOM_MEAN, RANDOM_NEAR = 0.15, 1.0
CONTINUED = [
    "The capital of France is Paris. " * 30 + "The capital of Germany is",
    "Once upon a time, in a small village by the sea, there lived",
    "Water boils at 100 degrees Celsius, and it freezes at",
]
SCORED = """The lighthouse was built in 1871 on a rock that the sea covers twice a day. Its first keeper, a
retired sailor from Bergen, lived there with his wife and two daughters for almost thirty years. Every evening
he climbed the 112 steps to light the lamp, and every morning he climbed them again to put it out. When the
company sent a letter to say that an electric motor would now do his work, he answered that the motor could not
see the ships. They came anyway, with cables and a generator, in the spring of 1902. The old man watched the new
light turn for one whole night from the beach, and told his daughters that it was a good light, but that it did
not know what it was for. Today the building is a museum, and visitors may climb the stairs at low tide."""
RANDOM_PROMPTS = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(1)).tolist()
HEADS, KV_HEADS, DIM = 9, 3, 64  # of SmolLM2-135M

two_gpus = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
on_the_cpu = [pytest.mark.vllm, pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM's CPU build")]


def run_all(
    folder: Path, model: Path, options: dict[str, Any], splits: dict[str, dict[str, Any]], **arguments: Any
) -> dict[str, dict[str, Any]]:
    """What `run_split` returns for each of `splits` and, as ``whole``, for none. options: the plugin's."""
    arguments = {**COMMON, **arguments}
    laid_over = json.loads(os.environ.get("TWO_GPUS_ARGUMENTS", "{}"))
    engines = {"whole": arguments} | {
        name: {**arguments, **split, **laid_over} for name, split in splits.items()
    }
    with ThreadPoolExecutor(len(engines) if torch.cuda.is_available() else 1) as pool:
        runs = {
            name: pool.submit(run_split, folder / name, model, options, **engine)
            for name, engine in engines.items()
        }
    return {name: run.result() for name, run in runs.items()}


def assert_close(got: dict[str, Any], expected: dict[str, Any], mean: float = MEAN, near: float = NEAR) -> None:
    """The same numbers for the prompts, up to `mean`, and the same text up to two tokens as good as equal."""
    assert (got["logprobs"] - expected["logprobs"]).abs().mean() < mean
    for ours, theirs in zip(got["texts"], expected["texts"], strict=True):
        for (token, found), (other, likeliest) in zip(ours, theirs, strict=True):
            if token != other:
                first, second = sorted(likeliest.values(), reverse=True)[:2]
                assert first - second < near, (ours, theirs)
                break
            assert abs(found[token] - likeliest[other]) < near


def shard(name: str, whole: torch.Tensor, rank: int, split: dict[str, Any], widths: list[int]) -> torch.Tensor:
    """A rank's part of codes or block scales of the whole layer `name`. widths: rows of q, of k and of v."""
    last = name.rpartition(".")[2]
    if last in ("w13", "w2") and split == EXPERTS:
        return whole.chunk(2)[rank]
    if last == "w13":  # the gate's rows and the up projection's
        return torch.cat([part.chunk(2, 1)[rank] for part in whole.chunk(2, 1)], 1)
    if last == "gate_up_proj":
        return shard_rows(whole, [len(whole) // 2] * 2, rank)
    if last == "qkv_proj":
        if widths[1] == DIM:  # the only KV head, which all ranks have
            return torch.cat([whole[: widths[0]].chunk(2)[rank], whole[widths[0] :]])
        return shard_rows(whole, widths, rank)
    return whole.chunk(2, -1)[rank]


def assert_shards(
    got: dict[str, Any], expected: dict[str, Any], split: dict[str, Any], widths: list[int], count: int
) -> None:
    """Each rank's codes and scales are its part of the whole layer's, under the same tensor scale."""
    (whole,) = expected["quantized"]
    assert len(whole) == count and len(got["quantized"]) == 2
    for rank, quantized in enumerate(got["quantized"]):
        assert quantized.keys() == whole.keys()
        for name, (packed, scales, tensor_scale) in quantized.items():
            of_experts = name.endswith((".w13", ".w2")) and split == EXPERTS
            scale = whole[name][2].chunk(2)[rank] if of_experts else whole[name][2]
            assert torch.equal(tensor_scale, scale), (name, rank)
            parts = [shard(name, tensor.view(torch.uint8), rank, split, widths) for tensor in whole[name][:2]]
            assert torch.equal(packed, parts[0]), (name, rank)
            assert torch.equal(scales.view(torch.uint8), parts[1]), (name, rank)


def assert_layers_shared_out(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Each layer is on one rank, with the codes and scales of the whole model's."""
    (whole,), (first, second) = expected["quantized"], got["quantized"]
    assert first and second and not first.keys() & second.keys()
    together = first | second
    assert together.keys() == whole.keys()
    for name, (packed, scales, tensor_scale) in together.items():
        assert torch.equal(packed, whole[name][0]), name
        assert torch.equal(scales.view(torch.uint8), whole[name][1].view(torch.uint8)), name
        assert torch.equal(tensor_scale, whole[name][2]), name


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

    ids = torch.tensor([RANDOM_PROMPTS[0][:16]])
    logits = []
    for folder in (smollm2, with_one_more_kv_head(smollm2, tmp_path / "model")):
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits.append(network(ids).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()


def smollm2_runs(
    smollm2: Path,
    folder: Path,
    served: dict[str, Any],
    splits: dict[str, dict[str, Any]],
    options: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """`run_all` of SmolLM2 with one more KV head, of which two ranks have two each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = with_one_more_kv_head(smollm2, folder / "model")
    texts = {"prompts": [tokenizer(SCORED).input_ids], "continued": tokenizer(CONTINUED).input_ids}
    runs = run_all(folder, model, options or {}, splits, **texts, **served)
    answer = tokenizer.decode([token for token, _ in runs["whole"]["texts"][0]])
    assert "Berlin" in answer, answer
    return runs


def assert_smollm2_shards(runs: dict[str, dict[str, Any]]) -> None:
    rows = [(HEADS + HEADS // KV_HEADS) * DIM, (KV_HEADS + 1) * DIM, (KV_HEADS + 1) * DIM]
    assert_shards(runs["tensors"], runs["whole"], TENSORS, rows, 4 * 30)


def some_r(file: Path, kv_heads: int) -> str:
    """Write R of two layers, another for each KV head, and return the file's name."""
    torch.manual_seed(0)
    reductions = {}
    for layer in range(2):
        moments = SecondMoments(kv_heads, DIM)
        keys = torch.randn(500, kv_heads, DIM) * torch.rand(kv_heads, DIM)
        moments.add(torch.randn(500, kv_heads, DIM), keys)
        reductions[f"model.layers.{layer}.self_attn.attn"] = magnitude_reduction(moments.q, moments.k)
    reduction_files.save(file, reductions, "a test")
    return str(file)


def assert_r(got: dict[str, Any], file: str, kv_heads: int) -> None:
    """Each rank has R of its own KV heads of `file`."""
    for rank, layers in enumerate(got["r"]):
        assert len(layers) == 2
        for name, r in layers.items():
            first = rank * kv_heads // 2
            expected = reduction_files.load(Path(file), name, first, max(kv_heads // 2, 1), DIM)[0].r
            assert torch.equal(r, expected.to(r.dtype)), (name, rank)


@pytest.mark.parametrize(
    "device",
    [pytest.param({}, id="cpu", marks=on_the_cpu), pytest.param(MARLIN, id="gpus", marks=two_gpus)],
)
@pytest.mark.parametrize(
    ("architecture", "kv_heads", "matrices"), [("Mixtral", 8, 4), ("Llama", 1, 4)], ids=["experts", "mqa"]
)
def test_experts_and_kv_heads(tiny, tmp_path, architecture, kv_heads, matrices, device):
    """Weights and cache: experts with four KV heads a rank, and one KV head that both ranks have."""
    config = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": kv_heads, "head_dim": DIM}
    splits = {"tensors": TENSORS}
    if architecture == "Mixtral":
        config |= GPU_MIXTRAL
        if device:
            splits["experts"] = EXPERTS
            device = {**device, "moe_backend": "marlin"}
    r = some_r(tmp_path / "r.safetensors", kv_heads)
    runs = run_all(
        tmp_path, tiny(architecture, **config), {"attention": {"r": r}}, splits,
        prompts=RANDOM_PROMPTS, continued=RANDOM_PROMPTS, **{**WEIGHTS, **SERVED, **device},
    )  # fmt: skip
    for name, split in splits.items():
        assert_shards(runs[name], runs["whole"], split, [8 * DIM, kv_heads * DIM, kv_heads * DIM], 2 * matrices)
        assert_r(runs[name], r, kv_heads)
        assert_close(runs[name], runs["whole"], RANDOM_MEAN, RANDOM_NEAR)


def on_two_gpus(test: Any) -> Any:
    for mark in two_gpus:
        test = mark(test)
    return test


@on_two_gpus
def test_smollm2_weights(smollm2, tmp_path):
    runs = smollm2_runs(smollm2, tmp_path, {**WEIGHTS, **MARLIN}, {"tensors": TENSORS})
    assert_smollm2_shards(runs)
    assert_close(runs["tensors"], runs["whole"])


@on_two_gpus
def test_smollm2_attention(smollm2, tmp_path):
    runs = smollm2_runs(smollm2, tmp_path, {**SERVED, **GPU}, {"tensors": TENSORS})
    assert_close(runs["tensors"], runs["whole"])


@on_two_gpus
def test_smollm2_weights_and_attention(smollm2, tmp_path):
    """And in two stages, to which prompts come in other chunks: what a query sees must not depend on those."""
    served, splits = {**WEIGHTS, **SERVED, **MARLIN}, {"tensors": TENSORS, "layers": LAYERS}
    runs = smollm2_runs(smollm2, tmp_path, served, splits, {"attention": {"prefill": "stored"}})
    assert_smollm2_shards(runs)
    assert_layers_shared_out(runs["layers"], runs["whole"])
    for split in splits:
        print(split)  # shown where the next line fails
        assert_close(runs[split], runs["whole"])
