"""Triton's product on FP4 units: what it is compiled to, the numbers around its MMA, and when it is chosen.

There are no such units here, and Triton's interpreter reads E4M3 scales as E8M0. So the MMA is looked for in
what the compiler makes of the kernel, and the kernel runs, in the interpreter or on a GPU without FP4
units, with that one statement replaced by a product of decoded values.
"""

import functools
import os
import re
import subprocess
import sys
import types

import pytest
import torch
import triton
from torch.library import opcheck
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from values import normal, tokens

from vllm_scalesearch.formats import decode_e2m1, pack_e2m1, swizzle_scales, unswizzle_scales
from vllm_scalesearch.ops import fp4_product as module
from vllm_scalesearch.ops.fp4_product import Tile, fp4_product, tile_for
from vllm_scalesearch.ops.quantize import quantize_packed
from vllm_scalesearch.options import LayerOptions
from vllm_scalesearch.search import quantize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:  # the interpreter's process runs the kernel alone and need not wait for vLLM
    import layers
    from conftest import prompt_logprobs
    from pretended_gpu import W4A4, choose

    from vllm_scalesearch import linear

DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BIAS = pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
# Widths of an odd number of blocks, of half an MMA, and of whole ones; one output, odd ones, several tiles.
SHAPES = [(1, 16), (7, 48), (64, 128), (33, 80), (131, 272), (200, 576)]
ROWS = (1, 2, 31, 64, 65, 128, 129, 130)


def operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, policy: str = "fast") -> tuple:
    """What `fp4_product` takes for these, on x's device."""
    quantized = quantize(weight, policy="paper")
    stored = (quantized.packed, swizzle_scales(quantized.scales), quantized.tensor_scale, bias)
    stored = tuple(t if t is None else t.to(x.device) for t in stored)
    return (*quantize_packed(x, "nvfp4", policy), *stored, x.dtype)


def assert_close(
    got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, policy: str = "fast"
) -> None:
    """One rounding away from the fp64 product of what the reference quantizes.

    Sums of K products in fp32, whatever their order, are 2**-24 * K of the sum of magnitudes off, three
    scalings and the bias 2**-24 each.
    """
    a = quantize(x, policy=policy, per_row=True).dequantize().double()
    b = quantize(weight, policy="paper").dequantize().double()
    magnitude, expected = a.abs() @ b.abs().T, a @ b.T
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    sums = (x.shape[1] + 4) * 2**-24 * magnitude
    unit = torch.finfo(got.dtype).eps / 2
    bound = unit * (expected.abs() + sums) + sums + torch.finfo(got.dtype).smallest_normal * unit
    assert got.shape == expected.shape and got.dtype == x.dtype
    assert ((got.double() - expected).abs() <= bound).all()


def case(
    shape: tuple[int, int], dtype: torch.dtype, with_bias: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = (normal(*shape, seed=1) * 0.05).to(dtype)
    return weight, normal(shape[0], seed=2).to(dtype) if with_bias else None


# --- the operator on the CPU ---------------------------------------------------------------------


@DTYPE
@BIAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_is_the_product_of_the_reference(shape, with_bias, dtype):
    weight, bias = case(shape, dtype, with_bias)
    for rows in ROWS:
        x = tokens(rows, shape[1], dtype)
        assert_close(fp4_product(*operands(x, weight, bias)), x, weight, bias)


def test_every_number_of_rows():
    weight, bias = case((48, 80), torch.bfloat16, True)
    x = tokens(130, 80, torch.bfloat16)
    for rows in range(131):
        got = fp4_product(*operands(x[:rows], weight, bias))
        assert got.shape == (rows, 48)
        assert_close(got, x[:rows], weight, bias)


def test_operator_is_well_formed():
    # Not test_schema, which cannot compare E4M3 tensors; what it looks for is looked for here.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for rows, bias in ((5, None), (1, normal(40)), (130, normal(40).bfloat16())):
        arguments = operands(normal(rows, 80).bfloat16(), normal(40, 80).bfloat16(), bias)
        before = [t.clone() for t in arguments if isinstance(t, torch.Tensor)]
        opcheck(torch.ops.vllm_scalesearch.fp4_product.default, arguments, test_utils=checks)
        after = [t for t in arguments if isinstance(t, torch.Tensor)]
        assert all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(before, after, strict=True)
            if a.dim()
        )


def test_large_rows_under_a_small_weight_do_not_overflow():
    x = torch.full((2, 576), 2.0**127, dtype=torch.bfloat16)
    weight = torch.full((3, 576), 2.0**-120, dtype=torch.bfloat16)
    got = fp4_product(*operands(x, weight, None))
    assert torch.allclose(got.double(), torch.full((2, 3), 576 * 2.0**7).double(), rtol=2**-7)


def test_operator_says_what_is_wrong():
    good = operands(normal(3, 80).bfloat16(), normal(40, 80).bfloat16(), normal(40))
    fp4_product(*good)
    wrong = {
        "x": good[0].view(torch.int8),
        "x_scales": good[1][:, :4],
        "row_scale": good[2][:2],
        "weight": torch.zeros(40, 80, dtype=torch.uint8)[:, ::2],
        "weight_scales": good[4].view(torch.uint8),
        "weight_scale": torch.ones(2),
        "bias": normal(39),
        "bf16 or fp16": torch.float32,
    }
    for i, (name, value) in enumerate(wrong.items()):
        with pytest.raises(ValueError, match=rf"fp4_product: .*{name}"):
            fp4_product(*good[:i], value, *good[i + 1 :])
    with pytest.raises(ValueError, match="bias must be of a floating dtype"):
        fp4_product(*good[:6], torch.ones(40, dtype=torch.int32), torch.bfloat16)
    with pytest.raises(ValueError, match="multiple of nvfp4's block of 16"):
        packed = torch.zeros(1, 4, dtype=torch.uint8)
        scales = torch.zeros(128, 4, dtype=torch.uint8).view(torch.float8_e4m3fn)
        fp4_product(packed, scales, torch.ones(1, 1), packed, scales, torch.ones(1), None, torch.float16)


# --- the layer's product -------------------------------------------------------------------------


def loaded(weight: torch.Tensor) -> "tuple[linear._TritonFp4Product, torch.nn.Module]":
    product, layer = linear._TritonFp4Product(), torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = weight.shape
    product.load(layer, quantize(weight, policy="paper"))
    return product, layer


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 0)], ids=str)
def test_leading_dimensions_and_strides(leading):
    weight, bias = case((40, 80), torch.bfloat16, True)
    product, layer = loaded(weight)
    x = normal(*leading, 240, seed=3).to(torch.bfloat16)[..., 80:160]
    got = product.apply_quantized(layer, x, "nvfp4", "fast", bias)
    assert got.shape == (*leading, 40)
    assert_close(got.reshape(-1, 40), x.reshape(-1, 80), weight, bias)


def test_rows_that_are_not_finite_stay_among_themselves():
    weight, _ = case((40, 80), torch.bfloat16, False)
    product, layer = loaded(weight)
    x = tokens(5, 80, torch.bfloat16)
    x[1, 3], x[2, 70] = torch.inf, torch.nan
    got = product.apply_quantized(layer, x, "nvfp4", "fast", None)
    assert got[1:3].isnan().all() and got[[0, 3, 4]].isfinite().all()


def test_compiles_to_one_graph():
    weight, bias = case((40, 80), torch.bfloat16, True)
    product, layer = loaded(weight)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return product.apply_quantized(layer, x * 2, "nvfp4", "fast", bias)

    for rows in (4, 7, 130):
        x = tokens(rows, 80, torch.bfloat16)
        assert torch.equal(compiled(x), product.apply_quantized(layer, x * 2, "nvfp4", "fast", bias))
    assert len(graphs) == 1


@pytest.mark.vllm
def test_model_through_vllm(engine, tiny, monkeypatch):
    """Fused layers, biases, and a width of an odd number of blocks, in vLLM's own loading and forward pass."""
    monkeypatch.setattr(linear.linear_fp4, "native_fp4_kernel", lambda: (None, "of this test"))
    monkeypatch.setattr(linear.linear_fp4, "uses_triton_product", lambda reason: (True, reason))
    monkeypatch.setattr(linear, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    model, options = tiny("Qwen2", intermediate_size=272), {"activations": "fast"}
    llm = engine(model, options)
    llm.apply_model(layers.record)
    prompt_logprobs(llm, torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(1)).tolist())
    recorded = llm.apply_model(layers.collect)[0]
    assert len(recorded) == 8
    for layer in recorded.values():
        layer.pop("packed", None)
    layers.check(model, recorded, options, 2**-8)


# --- the choice ----------------------------------------------------------------------------------

TRITON = pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0)], ids=str)


@TRITON
def test_triton_multiplies_where_no_other_gemm_takes_our_inputs(on_gpu, said, capability):
    on_gpu(capability, with_cutlass=False)
    assert isinstance(choose(W4A4), linear._TritonFp4Product)
    (line,) = said
    assert "Triton kernel on FP4 units" in line
    assert "vLLM's choice for FP4 products, MarlinNvFp4LinearKernel, takes no quantized inputs" in line


@TRITON
def test_vllms_gemm_comes_first(on_gpu, said, capability):
    on_gpu(capability)
    assert isinstance(choose(W4A4), linear._NativeFp4Product)


@pytest.mark.parametrize("capability", [(11, 0), (12, 1)], ids=str)
def test_gpus_that_triton_does_not_know_multiply_in_16_bits(on_gpu, said, capability):
    on_gpu(capability, with_cutlass=False)
    assert isinstance(choose(W4A4), linear._VllmKernelProduct)
    (line,) = said
    assert "multiplied in 16 bits" in line
    assert "Triton kernel is not for compute capability {}.{}".format(*capability) in line


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_older_gpus_are_as_before(on_gpu, said, capability):
    on_gpu(capability, with_cutlass=False)
    assert isinstance(choose(W4A4), linear._DecodeProduct)
    assert "Triton" not in said[0]


def test_a_kernel_asked_for_by_name_stays(on_gpu, said):
    on_gpu((10, 0), with_cutlass=False, linear_backend="marlin")
    assert isinstance(choose(W4A4), linear._DecodeProduct)


def test_inputs_that_are_not_quantized_stay_in_16_bits(on_gpu, said):
    on_gpu((10, 0), with_cutlass=False)
    assert isinstance(choose(LayerOptions("nvfp4", "paper", None)), linear._VllmKernelProduct)


def test_tiles():
    for capability in module.FP4_CAPABILITIES:
        for rows in (1, 16, 17, 64, 65, 128, 129, 10**5):
            tile = tile_for(rows, capability)
            assert tile.fp4_units and 128 % tile.rows == 0 and 128 % tile.outputs == 0
            assert capability[0] == 12 or tile.rows == 128
    assert not any(tile_for(5, capability).fp4_units for capability in [(8, 0), (9, 0), (11, 0), (12, 1)])


# --- what is compiled ----------------------------------------------------------------------------

COMPILES = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
MMA = {
    # Triton 3.6 and 3.9 write the size of a block differently.
    100: r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(scale_vec::4X|block16)",
    120: r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3",
}


@functools.cache
def compiled(arch: int, tile: Tile, inputs: int, with_bias: bool = True, out: str = "bf16"):
    """The kernel as `launch` would have it compiled for this K, without a GPU."""
    kernel = module._fp4_product_kernel
    fixed = module.constants(tile, inputs)
    pointers = {
        "x_ptr": "*u8", "x_scales_ptr": "*u8", "row_scale_ptr": "*fp32", "weight_ptr": "*u8",
        "weight_scales_ptr": "*u8", "weight_scale_ptr": "*fp32", "out_ptr": f"*{out}",
    }  # fmt: skip
    if with_bias:
        pointers["bias_ptr"] = f"*{out}"
    types = {**pointers, "rows": "i32", "outputs": "i32", "units": "i32"}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(i,): fixed.get(name) for i, name in enumerate(names) if name not in types},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
    )
    options = dict(num_warps=tile.warps, num_stages=3, enable_fp_fusion=False)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


# One number of rows for each tile.
TARGETS = [((10, 0), 1), ((10, 0), 1024), ((10, 3), 1024), ((12, 0), 1), ((12, 0), 64), ((12, 0), 1024)]


@COMPILES
@pytest.mark.parametrize("inputs", [4096, 80])
@pytest.mark.parametrize(("capability", "rows"), TARGETS, ids=str)
def test_it_is_an_fp4_mma_with_block_scales(capability, rows, inputs, tmp_path):
    arch, tile = 10 * capability[0] + capability[1], tile_for(rows, capability)
    asm = compiled(arch, tile, inputs).asm
    assert f".target sm_{arch}a" in asm["ptx"]
    found = re.findall(r"\s((?:tcgen05\.mma|wgmma|mma)\.\S+)", asm["ptx"])
    assert found and all(re.match(MMA[arch // 10 * 10], instruction) for instruction in found)
    # Codes are read 16 bytes at a time where rows are aligned to that, else 8; scales four at a time.
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", asm["ptx"]))
    assert {int(size, 0) for size in copies} == {16 if inputs == 4096 else 8, 4}
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(STACK|LOCAL):(\d+)", usage)}
    assert used == {"STACK": 0, "LOCAL": 0}  # nothing is spilled


@COMPILES
@pytest.mark.parametrize(("with_bias", "out"), [(False, "bf16"), (True, "fp16")])
@pytest.mark.parametrize("arch", [100, 120])
def test_without_bias_and_in_fp16(arch, with_bias, out):
    ptx = compiled(arch, tile_for(1, (arch // 10, 0)), 4096, with_bias, out).asm["ptx"]
    assert re.search(MMA[arch], ptx)


@COMPILES
def test_decoded_values_are_multiplied_without_fp4_units():
    ptx = compiled(90, tile_for(1, (9, 0)), 80).asm["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16" in ptx and "mxf4" not in ptx


# --- the kernel itself, on decoded values --------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs on the GPU itself")
def test_on_the_cpu() -> None:
    """The interpreter has to be chosen before triton is imported: in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "interpreted"]
    result = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


# Tiles with the sides of those for FP4 units, so that these shapes have several and incomplete ones.
DECODED = [Tile(16, 64, 128, 4, False), Tile(128, 128, 256, 4, False)]


@pytest.mark.skipif(not INTERPRETED, reason="test_on_the_cpu runs it")
@pytest.mark.parametrize("tile", DECODED, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (131, 272)], ids=str)
def test_interpreted_kernel(shape, tile):
    for rows, dtype in ((1, torch.float16), (17, torch.float16), (130, torch.float16), (5, torch.bfloat16)):
        weight, bias = case(shape, dtype, rows != 17)
        x = tokens(rows, shape[1], dtype)
        got = module.launch(tile, *operands(x, weight, bias))
        if dtype == torch.float16:
            assert_close(got, x, weight, bias)
        else:  # the interpreter does not round to bf16 as a GPU does
            torch.testing.assert_close(got, fp4_product(*operands(x, weight, bias)), rtol=2**-7, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="test_on_the_cpu runs it")
def test_interpreted_kernel_reads_no_codes_past_the_end_of_a_row():
    """They would be the next row's; whatever the scales are in the padding of their tiles."""
    weight, bias = case((40, 80), torch.float16, True)
    x = tokens(20, 80, torch.float16)
    arguments = list(operands(x, weight, bias))
    expected = module.launch(DECODED[0], *arguments)
    for i in (1, 4):
        tiles = arguments[i].view(torch.uint8)
        plain = unswizzle_scales(tiles, *tiles.shape)
        plain[:, 80 // 16 :] = 126
        arguments[i] = swizzle_scales(plain).view(torch.float8_e4m3fn)
    assert torch.equal(module.launch(DECODED[0], *arguments), expected)


@pytest.mark.skipif(not INTERPRETED, reason="test_on_the_cpu runs it")
def test_interpreted_kernel_decodes_every_code():
    """All codes in both nibbles under all scales, times an identity: results that fp16 holds, hence equal."""
    codes = torch.arange(16, dtype=torch.uint8)
    both = torch.stack((pack_e2m1(codes), pack_e2m1(codes.flip(0)))).repeat_interleave(128, dim=0)
    scales = torch.arange(128, dtype=torch.uint8).repeat(2).view(256, 1).view(torch.float8_e4m3fn)
    identity = pack_e2m1(2 * torch.eye(16, dtype=torch.uint8))  # code 2 is 1
    ones = torch.ones(16, 1).to(torch.float8_e4m3fn)
    arguments = (
        both, swizzle_scales(scales), torch.ones(256, 1), identity, swizzle_scales(ones), torch.ones(1), None,
        torch.float16,
    )  # fmt: skip
    got = module.launch(Tile(128, 16, 64, 4, False), *arguments)
    expected = torch.stack((decode_e2m1(codes), decode_e2m1(codes.flip(0)))).repeat_interleave(128, dim=0)
    expected *= scales.float()
    assert got[[127, 255]].isnan().all() and expected[[127, 255]].isnan().all()
    assert torch.equal(got.nan_to_num().float(), expected.nan_to_num())
    assert torch.equal(fp4_product(*arguments).nan_to_num(), got.nan_to_num())


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@DTYPE
@BIAS
@pytest.mark.parametrize("shape", [*SHAPES, (512, 4096)], ids=str)
def test_kernel_on_a_gpu(shape, with_bias, dtype):
    """On this GPU's FP4 units, or on decoded values where it has none."""
    weight, bias = case(shape, dtype, with_bias)
    for rows in (*ROWS, 300):
        x = tokens(rows, shape[1], dtype)
        got = fp4_product(*operands(x.cuda(), weight, bias))
        assert_close(got.cpu(), x, weight, bias)


@pytest.mark.gpu
def test_rows_that_are_not_finite_stay_among_themselves_on_a_gpu():
    weight, _ = case((131, 272), torch.bfloat16, False)
    x = tokens(130, 272, torch.bfloat16)
    x[1, 3], x[64, 270] = torch.inf, torch.nan
    got = fp4_product(*operands(x.cuda(), weight, None))
    broken = torch.zeros(130, dtype=torch.bool)
    broken[[1, 64]] = True
    assert got[broken.cuda()].isnan().all()
    assert_close(got[~broken.cuda()].cpu(), x[~broken], weight, None)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_kernel_inside_a_cuda_graph(rows):
    weight, bias = case((131, 272), torch.bfloat16, True)
    product, layer = loaded(weight)
    layer.cuda()
    first, second = (normal(rows, 272, seed=seed).to(torch.bfloat16) for seed in (1, 2))
    x, cuda_bias = first.cuda(), bias.cuda()
    product.apply_quantized(layer, x, "nvfp4", "fast", cuda_bias)  # compile
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = product.apply_quantized(layer, x, "nvfp4", "fast", cuda_bias)
    for data in (first, second):
        x.copy_(data)
        graph.replay()
        assert_close(got.cpu(), data, weight, bias)
