"""Watches the experts of a small random model inside vLLM and recomputes them by the reference, in fp64.

With quantized inputs a layer is judged in two steps, by the rows that it quantized for its second product:
a value that bf16 noise moves across a rounding boundary of the first would hide what the second does.
"""

import io
import types
from pathlib import Path
from typing import Any

import layers
import torch
from conftest import prompt_logprobs
from safetensors import safe_open

from vllm_scalesearch.formats import FORMATS
from vllm_scalesearch.search import quantize

PROMPTS = torch.randint(512, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()
QWEN = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2)
# Of widths that a GPU's kernels take without much padding.
GPU_MIXTRAL = dict(hidden_size=256, num_local_experts=4, num_experts_per_tok=2)
# Of the norm. Results of products and activations are rounded a few times, in bf16 each to 2**-9.
BOUND = 2**-7


def checkpoint_experts(model: Path, name: str) -> dict[str, torch.Tensor]:
    """w13 (E, 2 * N, K) and w2 (E, K, N) of the experts that vLLM calls `name`, of a one-file checkpoint."""
    prefix = name.removesuffix(".routed_experts")
    gate, up, down = ("w1", "w3", "w2") if "block_sparse_moe" in name else ("gate_proj", "up_proj", "down_proj")
    with safe_open(model / "model.safetensors", "pt") as weights:
        count = len({key for key in weights.keys() if key.startswith(prefix) and f".{down}." in key})  # noqa: SIM118

        def tensor(expert: int, part: str) -> torch.Tensor:
            return weights.get_tensor(f"{prefix}.{expert}.{part}.weight")

        w13 = [torch.cat([tensor(e, gate), tensor(e, up)]) for e in range(count)]
        return {"w13": torch.stack(w13), "w2": torch.stack([tensor(e, down) for e in range(count)])}


def record(model: torch.nn.Module) -> None:
    """Keep what goes into and comes out of each layer of experts on a prompt (`LLM.apply_model`), and
    every input that is quantized on the way."""
    from vllm_scalesearch import moe_method

    for module in model.modules():
        if type(module).__name__ == "RoutedExperts":
            module.forward_modular = _keeping(module, module.forward_modular, moe_method)


def _keeping(module: torch.nn.Module, forward: Any, moe_method: types.ModuleType) -> Any:
    def run(**call: Any) -> torch.Tensor:
        seen = []
        original = moe_method.quantize_values

        def quantize_and_keep(x: torch.Tensor, *args: str):
            seen.append(x.cpu().clone())
            return original(x, *args)

        moe_method.quantize_values = quantize_and_keep
        try:
            inputs = {key: call[key].cpu().clone() for key in ("x", "topk_weights", "topk_ids")}
            out = forward(**call)
        finally:
            moe_method.quantize_values = original
        if len(inputs["x"]) > 8:  # a prompt, not a generated token
            module.kept = {**inputs, "output": out.cpu().clone(), "seen": seen}
        return out

    return run


def collect(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    return {name: module.kept for name, module in model.named_modules() if hasattr(module, "kept")}


def dequantized(weight: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """fp64 of experts (E, N, K), each quantized by itself."""
    fmt, policy = FORMATS[options.get("format", "nvfp4")], options.get("weights", "paper")
    return torch.stack([quantize(expert, fmt, policy).dequantize().double() for expert in weight])


def check(
    kept: dict[str, Any],
    w13: torch.Tensor,
    w2: torch.Tensor,
    options: dict[str, Any],
    bound: float,
    by_expert: bool,
) -> None:
    """Assert that one layer computed what the definition says, of its input and its experts.

    w13, w2: dequantized, fp64. by_expert: whether rows of the second product come expert by expert, or
    token by token. What a kernel has padded its widths with is cut off.
    """
    kept = {**kept, "x": kept["x"][:, : w13.shape[2]], "output": kept["output"][:, : w13.shape[2]]}
    fmt, policy = FORMATS[options.get("format", "nvfp4")], options.get("activations")
    ids, tokens = kept["topk_ids"].long(), torch.arange(len(kept["x"]))
    token = tokens.unsqueeze(1).expand(ids.shape).flatten()
    expert, weight = ids.flatten(), kept["topk_weights"].double().flatten()
    if by_expert:
        order = expert.sort(stable=True).indices
        token, expert, weight = token[order], expert[order], weight[order]

    def through(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return torch.stack([matrices[e] @ row for e, row in zip(expert.tolist(), rows, strict=True)])

    def quantized(x: torch.Tensor) -> torch.Tensor:
        return quantize(x, fmt, policy, per_row=fmt.has_tensor_scale).dequantize().double()

    def weighted_sum(rows: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(kept["x"].shape, dtype=torch.float64)
        return total.index_add_(0, token, through(rows, w2) * weight.unsqueeze(1))

    def error(got: torch.Tensor, expected: torch.Tensor) -> float:
        return ((got.double() - expected).norm() / expected.norm()).item()

    assert len(kept["seen"]) == 0 if policy is None else len(kept["seen"]) > 1
    first = kept["x"].double() if policy is None else quantized(kept["x"])
    gate, up = through(first[token], w13).chunk(2, dim=-1)
    second = torch.nn.functional.silu(gate) * up
    if policy is not None:
        assert torch.equal(kept["seen"][0][:, : w13.shape[2]], kept["x"])
        activated = torch.cat(kept["seen"][1:])[:, : second.shape[1]]
        assert error(activated, second) < bound
        # These tests would see a second input, or a first one, that was not quantized.
        assert error(kept["output"], weighted_sum(activated.double())) > 3 * bound
        plain_gate, plain_up = through(kept["x"].double()[token], w13).chunk(2, dim=-1)
        assert error(activated, torch.nn.functional.silu(plain_gate) * plain_up) > 3 * bound
        second = quantized(activated)
    assert error(kept["output"], weighted_sum(second)) < bound


def check_model(llm: Any, model: Path, options: dict[str, Any], bound: float, by_expert: bool) -> None:
    """`check` each layer of experts on one prompt."""
    llm.apply_model(record)
    prompt_logprobs(llm, PROMPTS[:1])
    found = llm.apply_model(collect)[0]
    assert len(found) == 2
    for name, kept in found.items():
        weights = checkpoint_experts(model, name)
        w13, w2 = dequantized(weights["w13"], options), dequantized(weights["w2"], options)
        check(kept, w13, w2, options, bound, by_expert)


def stored_experts(llm: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    tensors = torch.load(io.BytesIO(llm.apply_model(layers.stored)[0]))
    return {name: stored for name, stored in tensors.items() if name.endswith((".w13", ".w2"))}


def assert_codes(
    stored: tuple[torch.Tensor, ...], weight: torch.Tensor, policy: str, fmt: str = "nvfp4"
) -> None:
    """stored: codes, scales and tensor scales of experts; weight: the experts' (E, N, K)."""
    packed, scales, tensor_scales = stored
    assert len(packed) == len(scales) == len(tensor_scales) == len(weight)
    for expert, matrix in enumerate(weight):
        expected = quantize(matrix, FORMATS[fmt], policy)
        assert torch.equal(packed[expert], expected.packed)
        assert torch.equal(scales[expert].view(torch.uint8), expected.scales.view(torch.uint8))
        assert torch.equal(tensor_scales[expert], expected.tensor_scale)


def quant_methods(model: torch.nn.Module) -> dict[str, str]:
    named = ((name, getattr(module, "quant_method", None)) for name, module in model.named_modules())
    return {name: type(method).__name__ for name, method in named if method is not None}


def experts_classes(model: torch.nn.Module) -> set[str]:
    return {
        type(module.quant_method.moe_kernel.fused_experts).__name__
        for module in model.modules()
        if type(module).__name__ == "RoutedExperts"
    }
