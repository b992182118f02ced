"""W4A4 on FP4 units: what is handed to the GEMM, what comes of its result, and when it is chosen.

There are no such units here. The GEMM is replaced by one in torch that takes the operands apart, as
the FP4 MMA reads them, and multiplies exactly that; everything around it is vLLM's and ours.
"""

import types

import layers
import pytest
import torch
from conftest import prompt_logprobs
from pretended_gpu import W4A4, choose
from torch.library import opcheck
from values import normal, tokens
from vllm.model_executor.kernels.linear import nvfp4
from vllm.model_executor.kernels.linear.nvfp4 import cutlass, flashinfer

from vllm_scalesearch import linear, linear_fp4
from vllm_scalesearch.formats import FORMATS, decode_e2m1, swizzle_scales, unpack_e2m1, unswizzle_scales
from vllm_scalesearch.linear import _NativeFp4Product
from vllm_scalesearch.ops.quantize import quantize_packed
from vllm_scalesearch.options import LayerOptions
from vllm_scalesearch.search import quantize

KERNELS = {
    "cutlass": cutlass.CutlassNvFp4LinearKernel,
    "flashinfer cute-dsl": flashinfer.FlashInferCuteDslNvFp4LinearKernel,
    "flashinfer cutlass": flashinfer.FlashInferCutlassNvFp4LinearKernel,
    "flashinfer cudnn": flashinfer.FlashInferCudnnNvFp4LinearKernel,
    "flashinfer b12x": flashinfer.FlashInferB12xNvFp4LinearKernel,
}
OPS = torch.ops.vllm_scalesearch
FORMAT = pytest.mark.parametrize("fmt", list(FORMATS))
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


# --- the GEMM in torch ---------------------------------------------------------------------------


@torch.library.custom_op("test_fp4::gemm", mutates_args=())
def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    alpha: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """vLLM's `cutlass_scaled_fp4_mm`, with its checks (csrc/quantization/fp4/nvfp4_scaled_mm_kernels.cu)."""
    (m, n), k = (len(a), len(b)), 2 * a.shape[1]
    assert a.dtype == b.dtype == torch.uint8 and a.shape[1] == b.shape[1]
    assert a_scales.dtype == b_scales.dtype == torch.float8_e4m3fn
    assert alpha.dtype == torch.float32 and alpha.numel() == 1
    assert m > 0 and n % 32 == 0 and k % 32 == 0
    columns = -(-k // 64) * 4
    assert tuple(a_scales.shape) == (-(-m // 128) * 128, columns)
    assert tuple(b_scales.shape) == (-(-n // 128) * 128, columns)
    assert all(t.is_contiguous() for t in (a, b, a_scales, b_scales))
    assert dtype in (torch.bfloat16, torch.float16)

    def values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        elements = decode_e2m1(unpack_e2m1(packed)).double()
        plain = unswizzle_scales(scales, len(packed), k // 16).double()
        return elements * plain.repeat_interleave(16, dim=1)

    return ((values(a, a_scales) @ values(b, b_scales).T).float() * alpha).to(dtype)


@gemm.register_fake
def _(a, b, a_scales, b_scales, alpha, dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both GEMMs in torch, and vLLM's weight preparation on the CPU; FlashInfer's backends asked for."""
    backends = []

    def flashinfer_gemm(*operands, backend: str):
        backends.append(backend)
        return gemm(*operands)

    monkeypatch.setattr(linear_fp4, "cutlass_scaled_fp4_mm", gemm)
    monkeypatch.setattr(linear_fp4, "flashinfer_scaled_fp4_mm", flashinfer_gemm)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)  # at the end of vLLM's swizzle_blockscale
    return backends


def kernel_of(cls: type) -> nvfp4.NvFp4LinearKernel:
    """A kernel of vLLM's without its question whether this machine supports it."""
    return object.__new__(cls)


def layer_of(weight: torch.Tensor, product: _NativeFp4Product, policy: str = "paper") -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = weight.shape
    product.load(layer, quantize(weight, policy=policy))
    return layer


def assert_close(
    got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, policy: str
) -> None:
    """Within the roundings that are allowed for of the fp64 product of what the reference quantizes."""
    a = quantize(x, policy=policy, per_row=True).dequantize().double()
    b = quantize(weight, policy="paper").dequantize().double()
    product = a @ b.T
    expected = product if bias is None else product + bias.double()
    # The GEMM's result is rounded, and the sum that is returned; scales and sums in fp32 are 2**-20 of them.
    unit = torch.finfo(got.dtype).eps / 2
    bound = unit * (product.abs() + expected.abs()) * (1 + unit) + 2**-20 * (a.abs() @ b.T.abs())
    if got.dtype == torch.float16:  # denormals: those of the GEMM's result, under its scales, and of the sum's
        row_scale = quantize(x, policy=policy, per_row=True).tensor_scale.double()
        scale = quantize(weight, policy="paper").tensor_scale.double()
        bound += 2**-25 * (1 + row_scale * scale * 2.0 ** linear_fp4.result_exponent(x.shape[1]))
    assert got.shape == expected.shape and got.dtype == x.dtype
    assert ((got.double() - expected).abs() <= bound).all()


# --- products ------------------------------------------------------------------------------------


@DTYPE
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(64, 128), (128, 576), (40, 80), (1, 16), (200, 48), (33, 64)], ids=str)
def test_product_is_that_of_the_reference(emulated, shape, with_bias, dtype):
    weight = (normal(*shape, seed=1) * 0.05).to(dtype)
    bias = normal(shape[0], seed=2).to(dtype) if with_bias else None
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    layer = layer_of(weight, product)
    for rows in (1, 2, 31, 128, 129, 130):
        x = tokens(rows, shape[1], dtype)
        before = x.clone()
        assert_close(product.apply_quantized(layer, x, "nvfp4", "fast", bias), x, weight, bias, "fast")
        assert torch.equal(x, before)


def test_every_number_of_rows(emulated):
    weight = normal(48, 80, seed=1).to(torch.bfloat16)
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    layer = layer_of(weight, product)
    x = tokens(130, 80, torch.bfloat16)
    whole = product.apply_quantized(layer, x, "nvfp4", "fast", None)
    for rows in range(131):
        got = product.apply_quantized(layer, x[:rows], "nvfp4", "fast", None)
        assert got.shape == (rows, 48) and torch.equal(got, whole[:rows])


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_prepares_weights_for_this_product(emulated, name):
    weight, x = normal(40, 80, seed=1).to(torch.bfloat16), tokens(5, 80, torch.bfloat16)
    product = _NativeFp4Product(kernel_of(KERNELS[name]))
    layer = layer_of(weight, product)
    assert_close(product.apply_quantized(layer, x, "nvfp4", "paper", None), x, weight, None, "paper")
    assert emulated == ([] if name == "cutlass" else [name.removeprefix("flashinfer ")])
    assert torch.equal(
        layer.weight_scale.view(torch.uint8), swizzle_scales(quantize(weight).scales).view(torch.uint8)
    )


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_and_strides(emulated, leading):
    weight = normal(40, 80, seed=1).to(torch.bfloat16)
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    layer = layer_of(weight, product)
    wide = normal(*leading, 240, seed=3).to(torch.bfloat16)
    x = wide[..., 80:160]
    got = product.apply_quantized(layer, x, "nvfp4", "paper", None)
    assert got.shape == (*leading, 40) and got.dtype == x.dtype
    rows = product.apply_quantized(layer, x.reshape(-1, 80), "nvfp4", "paper", None)
    assert torch.equal(got.reshape(-1, 40), rows)


@pytest.mark.parametrize("width", [16, 80, 576, 4096, 14336])
def test_nothing_overflows_in_fp16(emulated, width):
    """The largest products there are: every code 6, every block scale 448, for weights of any size."""
    x = torch.full((2, width), 65504.0, dtype=torch.float16)
    x[1] = 2**-20
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    for size in (1e-4, 1.0, 6e4):
        weight = torch.full((3, width), size, dtype=torch.float16)
        layer = layer_of(weight, product, "absmax")
        packed, scales, _ = quantize_packed(x, "nvfp4", "absmax")
        out = linear_fp4.multiply(product.kernel, layer, packed, scales, torch.float16)
        assert out.isfinite().all()
        assert (out >= 65504 / 2.01).all()  # and no power of two is given away
        got = product.apply_quantized(layer, x, "nvfp4", "absmax", None)
        exact = x[:, :1].double() * width * weight[0, 0].double()
        in_range = exact.expand(2, 3) < 65000
        assert torch.allclose(got.double()[in_range], exact.expand(2, 3)[in_range], rtol=2**-9, atol=2**-24)
        assert got[~in_range].isposinf().all()


def test_rows_that_are_not_finite_stay_among_themselves(emulated):
    weight, x = normal(40, 80, seed=1).to(torch.bfloat16), tokens(5, 80, torch.bfloat16)
    x[1, 3], x[2, 70] = torch.inf, torch.nan
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    layer = layer_of(weight, product)
    got = product.apply_quantized(layer, x, "nvfp4", "paper", None)
    assert got[1:3].isnan().all() and got[[0, 3, 4]].isfinite().all()
    zeros = product.apply_quantized(layer, torch.zeros_like(x), "nvfp4", "paper", None)
    assert torch.equal(zeros, torch.zeros_like(zeros))


def test_padding_is_logged(emulated, vllm_log):
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    with vllm_log.at_level("INFO"):
        layer_of(normal(32, 96), product)
        assert "padded" not in vllm_log.text
        layer_of(normal(37, 112), product)
    assert "37 x 112 are padded with zeros to 64 x 128" in vllm_log.text


def test_compiles_to_one_graph(emulated):
    weight = normal(40, 80, seed=1).to(torch.bfloat16)
    product = _NativeFp4Product(kernel_of(KERNELS["cutlass"]))
    layer = layer_of(weight, product)
    bias = normal(40, seed=2).to(torch.bfloat16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return product.apply_quantized(layer, x * 2, "nvfp4", "paper", bias)

    for rows in (4, 7, 130):
        x = tokens(rows, 80, torch.bfloat16)
        assert torch.equal(compiled(x), product.apply_quantized(layer, x * 2, "nvfp4", "paper", bias))
    assert len(graphs) == 1


@pytest.mark.vllm
def test_model_through_vllm(engine, tiny, emulated, monkeypatch):
    """Fused layers, biases, and a width that has to be padded, in vLLM's own loading and forward pass."""
    kernel = kernel_of(KERNELS["cutlass"])
    monkeypatch.setattr(linear_fp4, "native_fp4_kernel", lambda: (kernel, "of this test"))
    monkeypatch.setattr(linear, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    model, options = tiny("Qwen2", intermediate_size=272), {"activations": "fast"}
    llm = engine(model, options)
    llm.apply_model(layers.record)
    prompts = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(1)).tolist()
    prompt_logprobs(llm, prompts)
    recorded = llm.apply_model(layers.collect)[0]
    assert len(recorded) == 8
    for layer in recorded.values():
        layer.pop("packed", None)
    layers.check(model, recorded, options, 2**-7)


# --- the operator --------------------------------------------------------------------------------


@FORMAT
@DTYPE
@pytest.mark.parametrize("policy", ["absmax", "paper"])
@pytest.mark.parametrize("shape", [(64,), (1, 96), (130, 64), (3, 5, 160), (0, 64)], ids=str)
def test_operator_is_the_reference(shape, policy, dtype, fmt):
    x = tokens(max(1, torch.Size(shape[:-1]).numel()), shape[-1], dtype)[: torch.Size(shape[:-1]).numel()]
    packed, scales, row_scale = quantize_packed(x.view(shape), fmt, policy)
    expected = quantize(x, FORMATS[fmt], policy, per_row=True)
    assert torch.equal(packed, expected.packed)
    assert scales.dtype == FORMATS[fmt].scale_dtype
    assert torch.equal(scales.view(torch.uint8), swizzle_scales(expected.scales).view(torch.uint8))
    assert row_scale.dtype == torch.float32
    assert torch.equal(row_scale, expected.tensor_scale.expand(len(x), 1))


@FORMAT
@DTYPE
@pytest.mark.parametrize("shape", [(64,), (3, 96), (2, 65, 64)], ids=str)
def test_operator_is_well_formed(shape, dtype, fmt):
    opcheck(OPS.quantize_packed.default, (normal(*shape).to(dtype), fmt, "paper"))


@FORMAT
def test_operator_takes_any_strides(fmt):
    x = normal(64, 6).to(torch.bfloat16).t()
    opcheck(OPS.quantize_packed.default, (x, fmt, "paper"), test_utils="test_faketensor")
    got, expected = quantize_packed(x, fmt, "paper"), quantize_packed(x.contiguous(), fmt, "paper")
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True)
    )


def test_operator_says_what_is_wrong():
    x = normal(2, 64).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'best'.*paper"):
        quantize_packed(x, "nvfp4", "best")
    with pytest.raises(ValueError, match="int4"):
        quantize_packed(x, "int4", "paper")
    with pytest.raises(ValueError, match="multiple of nvfp4's block of 16"):
        quantize_packed(x[:, :40], "nvfp4", "paper")


# --- the choice ----------------------------------------------------------------------------------


NATIVE = [
    ((10, 0), False, "cutlass"),
    ((10, 0), True, "flashinfer cute-dsl"),
    ((10, 3), True, "flashinfer cute-dsl"),
    ((11, 0), True, "flashinfer cutlass"),
    ((12, 0), False, "cutlass"),
    ((12, 0), True, "flashinfer cutlass"),
    ((12, 1), True, "flashinfer cutlass"),
]


@pytest.mark.parametrize(("capability", "installed", "name"), NATIVE, ids=str)
def test_fp4_units_are_used(on_gpu, said, capability, installed, name):
    on_gpu(capability, installed)
    product = choose(W4A4)
    assert isinstance(product, _NativeFp4Product) and type(product.kernel) is KERNELS[name]
    (line,) = said
    assert KERNELS[name].__name__ in line and "FP4 units" in line
    assert "compute capability {}.{}".format(*capability) in line


@pytest.mark.parametrize("backend", ["cutlass", "flashinfer_cutlass", "flashinfer_cudnn"])
def test_vllms_option_chooses_among_them(on_gpu, backend):
    on_gpu((10, 0), True, linear_backend=backend)
    assert type(choose(W4A4).kernel) is KERNELS[backend.replace("_", " ")]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=str)
def test_gpus_without_fp4_units_multiply_in_16_bits(on_gpu, said, capability):
    on_gpu(capability, True)
    assert isinstance(choose(W4A4), linear._DecodeProduct)
    reason = "multiplied in 16 bits: compute capability {}.{} has no FP4 units".format(*capability)
    (line,) = said
    assert reason in line and "MarlinNvFp4LinearKernel" in line


@pytest.mark.parametrize("capability", [(11, 0), (12, 1)], ids=str)
def test_without_any_fp4_gemm_the_log_says_why(on_gpu, said, capability):
    on_gpu(capability, with_cutlass=False)
    assert isinstance(choose(W4A4), linear._VllmKernelProduct)
    (line,) = said
    assert "multiplied in 16 bits: vLLM's choice for FP4 products, MarlinNvFp4LinearKernel, takes no" in line


def test_a_kernel_without_quantized_inputs_can_be_asked_for(on_gpu, said):
    on_gpu((10, 0), True, linear_backend="marlin")
    assert isinstance(choose(W4A4), linear._DecodeProduct)
    assert "vLLM's choice for FP4 products, MarlinNvFp4LinearKernel, takes no quantized inputs" in said[0]


@pytest.mark.parametrize("activations", [None, "paper"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_only_nvfp4_inputs_need_fp4_units(on_gpu, said, monkeypatch, format, activations):
    on_gpu((10, 0), True)
    monkeypatch.setattr(linear, "init_mxfp4_linear_kernel", lambda: object())
    product = choose(LayerOptions(format, "paper", activations))
    assert isinstance(product, _NativeFp4Product) == (format == "nvfp4" and activations is not None)
    (line,) = said
    assert ("inputs not quantized" in line) == (activations is None)
    assert ("multiplied in 16 bits: vLLM's FP4 products are for nvfp4, not mxfp4" in line) == (
        format == "mxfp4" and activations is not None
    )


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_operator_on_a_gpu_is_the_reference_inside_a_cuda_graph():
    first, second = (normal(130, 96, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    x = first.cuda()
    quantize_packed(x, "nvfp4", "paper")  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = quantize_packed(x, "nvfp4", "paper")
    for data in (first, second):
        x.copy_(data)
        graph.replay()
        for tensor, expected in zip(got, quantize_packed(data, "nvfp4", "paper"), strict=True):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
@DTYPE
@pytest.mark.parametrize("name", KERNELS)
def test_fp4_units_multiply_what_they_are_given(name, dtype):
    if torch.cuda.get_device_capability() < (10, 0) or not KERNELS[name].is_supported()[0]:
        pytest.skip("needs FP4 units and this GEMM")
    product = _NativeFp4Product(KERNELS[name](nvfp4.NvFp4LinearLayerConfig()))
    for shape in ((256, 576), (40, 80)):
        weight, bias = (normal(*shape, seed=1) * 0.05).to(dtype), normal(shape[0], seed=2).to(dtype)
        layer = layer_of(weight.cuda(), product)
        for rows in (1, 31, 130, 300):
            x = tokens(rows, shape[1], dtype)
            got = product.apply_quantized(layer, x.cuda(), "nvfp4", "paper", bias.cuda())
            assert_close(got.cpu(), x, weight, bias, "paper")
