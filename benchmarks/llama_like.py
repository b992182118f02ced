"""Models of Llama-3.1-8B's shape and any number of layers: configurations, and random NVFP4 checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4096, 14336, 32, 8, 128, 128256
CACHE_BYTES = 2 * KV_HEADS * HEAD_DIM * 2  # of a layer and token in bf16
LINEAR = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def engine_gib(layers: int, nvfp4: bool = False) -> float:
    """What an engine takes of a GPU besides its KV cache, from a checkpoint in bf16 or NVFP4."""
    return 5.5 + (0.13 if nvfp4 else 0.44) * layers


# The layout that vLLM reads as its own weight-only NVFP4.
_COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
                "group_size": 16, "dynamic": False, "observer": "minmax",
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
}  # fmt: skip


def make_nvfp4(folder: Path, layers: int) -> None:
    """Write a checkpoint of NVFP4 codes and scales as compressed-tensors stores them."""
    folder.mkdir(parents=True)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * scale).bfloat16().cpu()

    def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
        packed = torch.randint(256, (outputs, inputs // 2), device="cuda", generator=generator)
        scales = torch.full((outputs, inputs // 16), 1.0).to(torch.float8_e4m3fn)
        return {
            f"{name}.weight_packed": packed.to(torch.uint8).cpu(),
            f"{name}.weight_scale": scales,
            # Stored as its reciprocal; 3 is about the root mean square of random codes.
            f"{name}.weight_global_scale": torch.full((1,), 3.0 * inputs**0.5),
        }

    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        }
        for name, shape in LINEAR.items():
            tensors |= linear(f"{prefix}.{name}", *shape)
        save_file(tensors, folder / f"model-{layer}.safetensors", metadata={"format": "pt"})
    save_file(
        {
            "model.embed_tokens.weight": normal(VOCABULARY, HIDDEN, scale=0.02),
            "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
            "lm_head.weight": normal(VOCABULARY, HIDDEN, scale=0.02),
        },
        folder / "model-ends.safetensors",
        metadata={"format": "pt"},
    )
    write_config(folder, layers, nvfp4=True)


def write_config(folder: Path, layers: int, nvfp4: bool = False) -> None:
    """config.json alone: enough for vLLM's dummy weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if nvfp4:
        config["quantization_config"] = _COMPRESSED
    (folder / "config.json").write_text(json.dumps(config, indent=1))
