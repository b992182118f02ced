"""``python -m vllm_scalesearch.demo``: a real language model with searched NVFP4 weights, on this machine.

Prints answers of SmolLM2-135M-Instruct served by vLLM with ``quantization="scalesearch"``, then what
quantization did to its linear weights.
"""

import os
import time
from pathlib import Path

# In this process: starts in a third of the time that a separate engine process takes.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What color is the sky on a clear day?",
)


def measure_weights(model: Path) -> list[tuple[str, str]]:
    """Rows of a table: size and normalised error of the model's linear weights."""
    import torch
    from safetensors import safe_open
    from tqdm import tqdm

    from vllm_scalesearch.search import quantize

    before = after = 0
    error = {"absmax": 0.0, "paper": 0.0}
    norm = 0.0
    with safe_open(model / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.endswith("_proj.weight")]  # noqa: SIM118
        for name in tqdm(names, desc="measuring the error of the weights", unit="matrix"):
            weight = weights.get_tensor(name)
            norm += weight.double().square().sum().item()
            for policy in error:
                quantized = quantize(weight, policy=policy)
                error[policy] += torch.dist(weight.double(), quantized.dequantize().double()).item() ** 2
            before += weight.nbytes
            after += quantized.nbytes
    absmax, searched = error["absmax"] / norm, error["paper"] / norm
    return [
        ("linear weights, bf16", f"{before / 1e6:.1f} MB"),
        ("linear weights, NVFP4", f"{after / 1e6:.1f} MB ({before / after:.2f} times smaller)"),
        ("normalised error, scales from the maximum", f"{absmax:.5f}"),
        ("normalised error, scales searched", f"{searched:.5f} ({1 - searched / absmax:.1%} less)"),
    ]


def main() -> None:
    from vllm_scalesearch import smollm2

    model = smollm2.fetch()
    print("starting vLLM with quantization='scalesearch' (weights searched while loading)", flush=True)
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(str(model), quantization="scalesearch", enforce_eager=True, max_model_len=2048)
    loaded = time.perf_counter() - start

    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    start = time.perf_counter()
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=64))
    elapsed = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)

    rows = measure_weights(model)
    rows += [
        ("start of the engine, weights quantized", f"{loaded:.1f} s"),
        (f"generation, {len(PROMPTS)} prompts at once", f"{tokens / elapsed:.1f} tokens/s"),
    ]
    print()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        print(f"> {prompt}\n{output.outputs[0].text.strip()}\n")
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    print(
        "\nSmolLM2-135M-Instruct; its weights come from a Q4_1 GGUF and were rounded to another 4-bit "
        "grid before.\nOn the CPU the weights are kept dequantized for speed; option "
        '"cpu_storage": "packed" keeps the NVFP4 bytes.'
    )


if __name__ == "__main__":
    main()
