"""NVFP4 checkpoints in vLLM on the CPU: compressed-tensors' and ModelOpt's, weights alone and with inputs."""

import json
from pathlib import Path

import layers
import pytest
import torch
from conftest import prompt_logprobs
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_scalesearch.checkpoint import layout
from vllm_scalesearch.formats import NVFP4, finite_amax, tensor_scale_of
from vllm_scalesearch.search import quantize

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM has kernels for GPUs"),
]
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
# The largest input that the static scale holds; larger ones saturate.
INPUT_AMAX = 6.0


def linear_weights(model: Path) -> dict[str, torch.Tensor]:
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def quantized_weights(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """Every linear layer's matrix, with one tensor scale for those that vLLM fuses."""
    found = {}
    for block in range(2):
        for group in FUSED:
            names = [
                name.removesuffix(".weight")
                for name in weights
                if name.startswith(f"model.layers.{block}.") and name.split(".")[-2] in group
            ]
            amax = torch.stack([finite_amax(weights[f"{name}.weight"]) for name in names]).amax()
            scale = tensor_scale_of(amax)
            found |= {n: quantize(weights[f"{n}.weight"], NVFP4, "paper", tensor_scale=scale) for n in names}
    return found


def write_checkpoint(model: Path, folder: Path, by: str, inputs: bool) -> Path:
    folder.mkdir()
    weights, config = linear_weights(model), json.loads((model / "config.json").read_text())
    for name, weight in quantized_weights(weights).items():
        del weights[f"{name}.weight"]
        if by == "compressed-tensors":
            weights |= layout.weight_tensors(name, weight)
            weights |= layout.input_tensors(name, INPUT_AMAX) if inputs else {}
            continue
        weights |= {
            f"{name}.weight": weight.packed,
            f"{name}.weight_scale": weight.scales,
            f"{name}.weight_scale_2": weight.tensor_scale.reshape(()).clone(),
        }
        if inputs:
            weights[f"{name}.input_scale"] = tensor_scale_of(torch.tensor(INPUT_AMAX))
    if by == "compressed-tensors":
        config["quantization_config"] = layout.quantization_config(["lm_head"], inputs)
    else:
        config["quantization_config"] = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4" if inputs else "W4A16_NVFP4",
            "group_size": 16,
            "ignore": ["lm_head"],
        }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("by", "inputs"), [("compressed-tensors", False), ("compressed-tensors", True), ("modelopt", True)]
)
def test_each_layer_multiplies_what_the_checkpoint_holds(engine, tiny, tmp_path, by, inputs):
    """Every layer's output from its own input, recomputed in fp64."""
    model = tiny("Llama")
    prompt = torch.randint(512, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    llm = engine(write_checkpoint(model, tmp_path / "out", by, inputs))
    llm.apply_model(layers.record)
    prompt_logprobs(llm, [prompt])
    (recorded,) = llm.apply_model(layers.collect)
    quantized = quantized_weights(linear_weights(model))
    scale = tensor_scale_of(torch.tensor(INPUT_AMAX))
    assert len(recorded) == 8
    for name, layer in recorded.items():
        parent, _, last = name.rpartition(".")
        parts = [f"{parent}.{part}" for part in layers.FUSED.get(last, (last,))]
        weight = torch.cat([quantized[part].dequantize() for part in parts]).double()
        x = layer["input"].double()
        if inputs:
            x = quantize(layer["input"], NVFP4, "absmax", tensor_scale=scale).dequantize().double()
        expected = x @ weight.t()
        error = (layer["output"].double() - expected).norm() / expected.norm()
        assert error < 2**-7, (name, error)


def fake_layer(dtype: torch.dtype, input_scale: float | None) -> tuple[torch.nn.Module, torch.Tensor]:
    """What vLLM's schemes hand to a kernel, and the dequantized weight."""
    weight = quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * 3, NVFP4, "paper")
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.packed, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales, requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(weight.tensor_scale, requires_grad=False)
    layer.params_dtype = dtype
    if input_scale is not None:
        layer.input_global_scale = torch.nn.Parameter(torch.tensor(input_scale), requires_grad=False)
    return layer, weight.dequantize().double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_scale", [None, 0.003])
def test_the_product_is_the_exact_one_rounded_once(dtype, input_scale):
    from vllm_scalesearch.cpu_nvfp4 import CpuNvFp4LinearKernel
    from vllm_scalesearch.vllm_api import NvFp4LinearLayerConfig

    layer, weight = fake_layer(dtype, input_scale)
    kernel = CpuNvFp4LinearKernel(NvFp4LinearLayerConfig())
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(32, generator=torch.Generator().manual_seed(3)).to(dtype)
    inputs = x.double()
    if input_scale is not None:
        inputs = quantize(x, NVFP4, "absmax", tensor_scale=torch.tensor(input_scale)).dequantize().double()
    expected = inputs @ weight.t() + bias.double()
    found = kernel.apply_weights(layer, x, bias).double()
    # The product is rounded to 16 bits before its scales, and once after them.
    unit = torch.finfo(dtype).eps
    assert ((found - expected).abs() <= unit * (expected.abs() + 2 * (expected - bias.double()).abs())).all()


def test_it_is_registered_once():
    from vllm_scalesearch.cpu_nvfp4 import CpuNvFp4LinearKernel
    from vllm_scalesearch.plugin import register
    from vllm_scalesearch.vllm_api import PlatformEnum, linear_kernels

    register()
    register()
    assert linear_kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] == [CpuNvFp4LinearKernel]
    for use_a16 in (False, True):
        assert type(linear_kernels.init_nvfp4_linear_kernel(use_a16)) is CpuNvFp4LinearKernel
