"""The custom ops: the numbers of the reference, whatever the shape, eagerly and under torch.compile."""

import math

import pytest
import torch
from torch.library import opcheck
from values import same_bits

from vllm_scalesearch import search
from vllm_scalesearch.formats import FORMATS, QuantizedTensor
from vllm_scalesearch.ops import packed_linear as packed_linear_module
from vllm_scalesearch.ops.packed_linear import packed_linear
from vllm_scalesearch.ops.quantize import quantize_values
from vllm_scalesearch.search import quantize

FORMAT = pytest.mark.parametrize("fmt", list(FORMATS))
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
LAYOUT = pytest.mark.parametrize(
    "layout", ["columns of a wider tensor", "swapped leading dimensions", "transposed"]
)
OPS = torch.ops.vllm_scalesearch


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activations(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, one of zeros and one with an infinity."""
    x = normal(*shape, dtype=torch.float32)
    rows = x.view(-1, shape[-1])
    rows *= torch.logspace(-3, 3, len(rows)).unsqueeze(-1)
    if len(rows) > 2:
        rows[0] = 0
        rows[1, 5] = -math.inf
    return x.to(dtype)


# --- quantize_values -----------------------------------------------------------------------------


@FORMAT
@DTYPE
@pytest.mark.parametrize("policy", ["absmax", "paper", "full"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (9, 128), (3, 5, 64)], ids=str)
def test_values_are_those_of_quantize(
    shape: tuple[int, ...], policy: str, dtype: torch.dtype, fmt: str
) -> None:
    x = activations(*shape, dtype=dtype)
    before = x.clone()
    values, residual = quantize_values(x, fmt, policy)
    quantized = quantize(x, FORMATS[fmt], policy, per_row=True)
    expected, expected_residual = quantized.values(dtype)
    assert same_bits(values, expected)
    assert residual.shape == (*shape[:-1], 1)
    assert same_bits(residual, expected_residual.expand_as(residual))
    assert same_bits(values.float() * residual, quantized.dequantize())
    assert same_bits(x, before)


@FORMAT
@DTYPE
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)], ids=str)
def test_no_rows(shape: tuple[int, ...], dtype: torch.dtype, fmt: str) -> None:
    values, residual = quantize_values(torch.empty(shape, dtype=dtype), fmt, "paper")
    assert (values.shape, values.dtype) == (shape, dtype)
    assert (residual.shape, residual.dtype) == ((*shape[:-1], 1), torch.float32)


@FORMAT
def test_no_rows_are_those_of_quantize(fmt: str) -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    expected, _ = quantize(x, FORMATS[fmt], per_row=True).values(x.dtype)
    assert same_bits(quantize_values(x, fmt, "paper")[0], expected)


@FORMAT
@DTYPE
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, fmt: str) -> None:
    x = activations(12, 128, dtype=dtype)
    values, residual = quantize_values(x, fmt, "paper")
    for i in range(len(x)):
        alone, alone_residual = quantize_values(x[i : i + 1], fmt, "paper")
        assert same_bits(alone, values[i : i + 1])
        assert same_bits(alone_residual, residual[i : i + 1])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert same_bits(quantize_values(x[order], fmt, "paper")[0], values[order])


def strided(layout: str) -> torch.Tensor:
    if layout == "columns of a wider tensor":
        return normal(6, 192, dtype=torch.bfloat16)[:, 64:128]
    if layout == "swapped leading dimensions":
        return normal(2, 3, 64, dtype=torch.bfloat16).transpose(0, 1)
    return normal(64, 6, dtype=torch.bfloat16).t()


@FORMAT
def test_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    x = activations(12, 128, dtype=torch.bfloat16)
    values, residual = quantize_values(x, fmt, "paper")
    monkeypatch.setattr(search, "_CHUNK_VALUES", {"cpu": 6000, "cuda": 6000})
    parts, parts_residual = quantize_values(x, fmt, "paper")
    assert same_bits(parts, values)
    assert same_bits(parts_residual, residual)


@FORMAT
@LAYOUT
def test_strided_input_is_quantized_like_its_copy(layout: str, fmt: str) -> None:
    x = strided(layout)
    values, residual = quantize_values(x, fmt, "paper")
    expected, expected_residual = quantize_values(x.contiguous(), fmt, "paper")
    assert same_bits(values, expected)
    assert same_bits(residual, expected_residual)


@FORMAT
def test_small_fp16_values_are_those_of_quantize(fmt: str) -> None:
    x = torch.full((1, 64), 2.0**-22, dtype=torch.float16)
    values, residual = quantize_values(x, fmt, "paper")
    assert torch.equal(values.float() * residual, x.float())
    expected, expected_residual = quantize(x, FORMATS[fmt], per_row=True).values(x.dtype)
    assert torch.equal(expected.float() * expected_residual, x.float())


@FORMAT
def test_finite_fp16_input_gives_finite_values(fmt: str) -> None:
    x = torch.full((1, 64), 65504.0, dtype=torch.float16)
    values, residual = quantize_values(x, fmt, "paper")
    assert (values.float() * residual).isfinite().all()


def test_unknown_policy_says_why() -> None:
    with pytest.raises(ValueError, match=r"'best'.*paper"):
        quantize_values(normal(2, 64, dtype=torch.bfloat16), "nvfp4", "best")
    with pytest.raises(ValueError, match=r"4over6.*mxfp4"):
        quantize_values(normal(2, 64, dtype=torch.bfloat16), "mxfp4", "4over6")


# --- packed_linear -------------------------------------------------------------------------------


def weights(rows: int, fmt: str, dtype: torch.dtype) -> QuantizedTensor:
    return quantize(normal(rows, 96, dtype=dtype, seed=3), FORMATS[fmt])


@FORMAT
@DTYPE
@pytest.mark.parametrize("rows", [1, 127, 128, 129, 256, 300])
def test_packed_linear_is_linear_on_the_values(rows: int, dtype: torch.dtype, fmt: str) -> None:
    assert packed_linear_module._ROWS == 128  # the sizes above lie around its multiples
    weight = weights(rows, fmt, dtype)
    values, _ = weight.values(dtype)
    # Small whole numbers: every partial sum is exact in fp32, so the order of the sum does not show.
    x = torch.randint(-4, 5, (5, 96), generator=torch.Generator().manual_seed(4)).to(dtype)
    assert torch.equal(packed_linear(x, weight), torch.nn.functional.linear(x, values))
    assert torch.equal(packed_linear(x, weight), (x.double() @ values.double().T).to(dtype))


@FORMAT
@DTYPE
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3)], ids=str)
def test_packed_linear_keeps_leading_dimensions(leading: tuple, dtype: torch.dtype, fmt: str) -> None:
    weight = weights(200, fmt, dtype)
    x = normal(*leading, 96, dtype=dtype)
    got = packed_linear(x, weight)
    assert (got.shape, got.dtype) == ((*leading, 200), dtype)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight.values(dtype)[0]))


def test_packed_linear_leaves_the_residual_to_the_caller() -> None:
    weight, x = weights(40, "nvfp4", torch.bfloat16), normal(4, 96, dtype=torch.bfloat16)
    product = packed_linear(x, weight).float() * weight.residual(x.dtype)
    torch.testing.assert_close(product, x.float() @ weight.dequantize().T, rtol=2**-8, atol=1e-3)


# --- as operators --------------------------------------------------------------------------------

# Comparing the arguments before and after, test_schema needs arithmetic that FP8 tensors lack.
WITHOUT_SCHEMA = (
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


@FORMAT
@DTYPE
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)], ids=str)
def test_quantize_values_is_a_well_formed_operator(
    shape: tuple[int, ...], dtype: torch.dtype, fmt: str
) -> None:
    opcheck(OPS.quantize_values.default, (normal(*shape, dtype=dtype), fmt, "paper"))


@LAYOUT
def test_fake_announces_the_strides_of_the_result(layout: str) -> None:
    # The compiler plans memory by them.
    arguments = (strided(layout), "nvfp4", "paper")
    opcheck(OPS.quantize_values.default, arguments, test_utils="test_faketensor")


@FORMAT
@DTYPE
def test_packed_linear_is_a_well_formed_operator(dtype: torch.dtype, fmt: str) -> None:
    x, weight = normal(2, 3, 96, dtype=dtype), weights(130, fmt, dtype)
    arguments = (x, weight.packed, weight.scales, weight.tensor_scale, fmt)
    opcheck(OPS.packed_linear.default, arguments, test_utils=WITHOUT_SCHEMA)


@FORMAT
def test_packed_linear_does_not_modify_its_inputs(fmt: str) -> None:
    x, weight = normal(2, 96, dtype=torch.bfloat16), weights(130, fmt, torch.bfloat16)
    inputs = (x, weight.packed, weight.scales.view(torch.uint8), weight.tensor_scale)
    before = [t.clone() for t in inputs]
    packed_linear(x, weight)
    assert all(map(torch.equal, inputs, before))


@FORMAT
def test_both_compile_without_a_graph_break(fmt: str) -> None:
    weight = weights(130, fmt, torch.bfloat16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        values, residual = quantize_values(x * 2, fmt, "paper")
        return packed_linear(values, weight) * residual

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for rows in (1, 4, 7):
        x = normal(rows, 96, dtype=torch.bfloat16, seed=rows)
        assert torch.equal(compiled(x), layer(x))
