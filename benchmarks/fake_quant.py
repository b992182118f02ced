"""A transformers model whose linear layers are quantized by the reference alone: no vLLM, no kernels."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from vllm_scalesearch.formats import FORMATS, finite_amax, tensor_scale_of
from vllm_scalesearch.search import quantize

# Matrices that vLLM fuses share their tensor scale.
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# What a checkpoint with a scale for each of its matrices would do.
SEPARATE = tuple((name,) for group in FUSED for name in group)


def fake_quantized(
    model: Path,
    format: str = "nvfp4",
    weights: str | None = "paper",
    activations: str | None = None,
    groups: tuple[tuple[str, ...], ...] = FUSED,
) -> torch.nn.Module:
    """The model in fp32 with weights, and inputs where asked, replaced by what they dequantize to.

    groups: which matrices of a block share a tensor scale.
    """
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    fmt = FORMATS[format]
    for block in network.model.layers:
        linears = {
            name.rsplit(".", 1)[-1]: module
            for name, module in block.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        for group in groups:
            members = [linears[name] for name in group]
            amax = torch.stack([finite_amax(member.weight) for member in members]).amax()
            scale = tensor_scale_of(amax) if fmt.has_tensor_scale else None
            for member in members:
                if weights is not None:
                    member.weight.data = quantize(
                        member.weight.data, fmt, weights, tensor_scale=scale
                    ).dequantize()
                if activations is not None:
                    member.register_forward_pre_hook(_quantize_input(fmt, activations))
    return network


def _quantize_input(fmt, policy: str):
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return quantize(inputs[0], fmt, policy, per_row=fmt.has_tensor_scale).dequantize()

    return hook


@torch.no_grad()
def token_logprobs(network: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    """As conftest.prompt_logprobs, from a transformers model."""
    ids = torch.tensor(prompts)
    logprobs = network(ids).logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
