"""NVFP4 checkpoints by other tools, with their own methods, for the peer rows of accuracy.py.

    PEER/bin/python benchmarks/peer_checkpoints.py NAME --model BF16 --calibration valid.txt -o FOLDER

Runs in an environment of the tool's own, which needs neither vLLM nor this package:

    python -m venv llmcompressor
    llmcompressor/bin/pip install llmcompressor==0.14.0.1
    python -m venv modelopt
    modelopt/bin/pip install nvidia-modelopt==0.47.0 transformers==5.24.0 accelerate==1.15.0 requests

Calibration: the first `--samples` windows of `--length` tokens of the text, the same that
`vllm-scalesearch quantize` reads. What each tool does with them is its own default, but for what stands in
this file. The output head stays in 16 bits.

Two of ModelOpt's quantizers exist as Triton kernels only. On a machine without a GPU this script puts plain
torch in their place, with the same rounding.
"""

import argparse
import copy
from pathlib import Path

import torch

# Each: the tool, its method, and whether inputs are quantized as well.
PEERS = {
    f"{tool}-{method}-{scheme}": (tool, method, scheme)
    for tool, methods in {
        "llmcompressor": ("plain", "gptq"),
        "modelopt": ("max", "mse", "local_hessian"),
    }.items()
    for method in methods
    for scheme in ("w4a16", "w4a4")
}


def windows(model: Path, text: Path, samples: int, length: int) -> list[list[int]]:
    """The first windows of the text's tokens. Raises SystemExit for a text that is too short."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(text.read_text()).input_ids
    if len(ids) < samples * length:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than {samples} samples of {length}")
    return [ids[i * length : (i + 1) * length] for i in range(samples)]


def by_llmcompressor(model: Path, method: str, scheme: str, samples: list[list[int]], output: Path) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    modifier = {"plain": QuantizationModifier, "gptq": GPTQModifier}[method]
    preset = {"w4a16": "NVFP4A16", "w4a4": "NVFP4"}[scheme]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    oneshot(
        model=network,
        dataset=Dataset.from_list(rows),
        recipe=modifier(targets="Linear", scheme=preset, ignore=["lm_head"]),
        max_seq_length=len(samples[0]),
        num_calibration_samples=len(samples),
        shuffle_calibration_samples=False,
    )
    network.save_pretrained(output, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def by_modelopt(model: Path, method: str, scheme: str, samples: list[list[int]], output: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = copy.deepcopy(
        {
            "max": mtq.NVFP4_DEFAULT_CFG,
            "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
            "local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
        }[method]
    )
    if scheme == "w4a16":
        config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def forward(network: torch.nn.Module) -> None:
        for ids in samples:
            network(torch.tensor([ids]))

    if not torch.cuda.is_available():
        replace_triton_quantizers()
    mtq.quantize(network, config, forward)
    mtq.print_quant_summary(network, output.parent)
    with torch.inference_mode():
        export_hf_checkpoint(network, export_dir=output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def replace_triton_quantizers() -> None:
    """ModelOpt's NVFP4 fake quantizers in torch, as in its kernels/quantization/common/nvfp4_quant.py."""
    from types import SimpleNamespace

    from modelopt.torch.quantization import tensor_quant

    def to_e2m1(magnitude: torch.Tensor) -> torch.Tensor:
        # Nearest, ties to even: steps of 0.5 below 2, of 1 below 4, of 2 up to 6.
        fine, middle, coarse = (magnitude * 2).round() / 2, magnitude.round(), (magnitude / 2).round() * 2
        return torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse)).clamp(max=6)

    def fake_quantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        safe = torch.where(scales > 0, scales, 1)
        return (to_e2m1(blocks.abs() / safe) * safe).copysign(blocks).where(scales > 0, 0)

    def static(x, amax, global_amax=None, quantize_block_scales=True, fp8_max=448.0, out_dtype=None):
        scales = amax.float() / 6
        if quantize_block_scales:
            largest = scales.amax() if global_amax is None else global_amax.float() * (448 / fp8_max) / 6
            scales = tensor_quant.scaled_e4m3_impl(scales, largest)
        quantized = fake_quantize(x.float().reshape(amax.numel(), -1), scales.reshape(-1, 1))
        return quantized.view(x.shape).to(out_dtype or x.dtype)

    def dynamic(x, block_size, amax, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits):
        if (num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) != (4, 2, 8, 4):
            raise NotImplementedError("only NVFP4 is replaced")
        blocks = x.float().reshape(-1, block_size)
        tensor_scale = (amax.float().amax() / (6 * 448)).clamp(min=1e-12)
        scales = (blocks.abs().amax(1, keepdim=True) / (6 * tensor_scale)).clamp(max=448)
        scales = scales.to(torch.float8_e4m3fn).float() * tensor_scale
        scales = torch.where(scales >= 1e-5, scales, 1)
        return fake_quantize(blocks, scales).view(x.shape).to(x.dtype)

    tensor_quant.triton_kernel = SimpleNamespace(IS_AVAILABLE=True, static_blockwise_fp4_fake_quant=static)
    tensor_quant.dynamic_block_quantize_op = dynamic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("--model", type=Path, required=True, help="a bf16 folder")
    parser.add_argument("--calibration", type=Path, required=True, help="a text file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    args = parser.parse_args()
    tool, method, scheme = PEERS[args.name]
    make = {"llmcompressor": by_llmcompressor, "modelopt": by_modelopt}[tool]
    torch.manual_seed(0)
    make(
        args.model,
        method,
        scheme,
        windows(args.model, args.calibration, args.samples, args.length),
        args.output,
    )


if __name__ == "__main__":
    main()
