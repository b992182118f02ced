"""The search against a slow scalar implementation of its definition, and the properties it promises.

The scalar implementation below is written from the docstring of search.py: Python floats, rounded to
fp32 after each operation, one block and one candidate at a time.
"""

import itertools
import math
import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_scalesearch import search
from vllm_scalesearch.formats import FORMATS, MXFP4, NVFP4, BlockFormat, QuantizedTensor, unpack_e2m1
from vllm_scalesearch.search import METRICS, POLICIES, ScalePolicy, quantize

BOTH = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
OFFSETS = {
    "absmax": {"nvfp4": [0], "mxfp4": [0]},
    "fast": {"nvfp4": [-1, 0, 4, 5], "mxfp4": [0, 1]},
    "paper": {"nvfp4": range(-2, 7), "mxfp4": [0, 1]},
    "exact": {"nvfp4": range(-3, 8), "mxfp4": [-1, 0, 1]},
}


# --- the definition, slowly ----------------------------------------------------------------------


def f32(value: float) -> float:
    """`value` rounded to fp32.

    For one sum, product or quotient of two fp32 numbers, fp64 and this give what fp32 gives.
    """
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def nearest(values: list[float], x: float) -> int:
    """Index of the value nearest to x, saturating; of two equally near, the even index."""
    x = min(x, values[-1])
    return min(range(len(values)), key=lambda i: (abs(values[i] - x), i % 2))


def tree_sum(terms: list[float]) -> float:
    while len(terms) > 1:
        terms = [f32(a + b) for a, b in zip(terms[0::2], terms[1::2], strict=True)]
    return terms[0]


def candidates_of(rule: str, amax: float, fmt: BlockFormat) -> list[int]:
    if rule == "full":
        return list(range(fmt.min_code, fmt.max_code + 1))
    if fmt is NVFP4:
        c0 = nearest(E4M3, f32(amax * f32(1 / 6)))
    else:
        c0 = math.frexp(amax)[1] - 1 - 2 + 127 if amax > 0 else 0
    if rule == "4over6":
        codes = [c0, nearest(E4M3, f32(amax / 4))]
    elif rule in OFFSETS:
        codes = [c0 + offset for offset in OFFSETS[rule][fmt.name]]
    else:
        numbers = [int(n) for n in rule.split(":")[1].split(",")]
        offsets = range(numbers[0], numbers[1] + 1) if rule.startswith("window") else numbers
        codes = [c0 + offset for offset in offsets]
    return sorted({min(max(code, fmt.min_code), fmt.max_code) for code in codes})


def scalar_block(x: list[float], tensor_scale: float, fmt: BlockFormat, rule: str) -> tuple[list[int], int]:
    """Element codes and scale code of one block."""
    if not all(map(math.isfinite, x)):
        return [0] * len(x), fmt.nan_code
    y = [f32(abs(v) * f32(1 / tensor_scale)) for v in x]
    unit = 1.0
    candidates = candidates_of(rule, max(y), fmt)
    if fmt is MXFP4:
        unit = 2.0 ** (min(max(candidates_of("absmax", max(y), fmt)[0], 0), 252) - 127)
        y = [f32(v / unit) for v in y]
    best = None
    for code in candidates:
        scale = E4M3[code] if fmt is NVFP4 else 2.0 ** (code - 127) / unit
        q = [nearest(E2M1, f32(v * f32(1 / scale))) for v in y]
        d = [f32(f32(scale * E2M1[i]) - v) for i, v in zip(q, y, strict=True)]
        error = tree_sum([f32(v * v) for v in d])
        if best is None or error < best[0]:
            best = error, code, q
    _, code, q = best
    return [i | (8 if math.copysign(1, v) < 0 else 0) for i, v in zip(q, x, strict=True)], code


def scalar_tensor_scale(values: list[float]) -> float:
    amax = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return max(f32(amax * f32(1 / 2688)), 2.0**-126) if amax > 0 else 1.0


def check(
    x: torch.Tensor,
    fmt: BlockFormat,
    rule: str,
    per_row: bool = False,
    tensor_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """quantize() gives the codes and scales of the scalar implementation, bit for bit. x: (R, K)."""
    got = quantize(x, fmt, rule, per_row=per_row, tensor_scale=tensor_scale)
    rows = x.tolist()
    if fmt is MXFP4:
        expected_ts = 1.0
    elif tensor_scale is not None:
        expected_ts = tensor_scale.tolist()
    elif per_row:
        expected_ts = [[scalar_tensor_scale(row)] for row in rows]
    else:
        expected_ts = scalar_tensor_scale([v for row in rows for v in row])
    assert got.tensor_scale.tolist() == expected_ts

    for i, row in enumerate(rows):
        ts = expected_ts[i][0] if isinstance(expected_ts, list) else expected_ts
        starts = range(0, len(row), fmt.block_size)
        blocks = [scalar_block(row[s : s + fmt.block_size], ts, fmt, rule) for s in starts]
        assert got.scales[i].view(torch.uint8).tolist() == [code for _, code in blocks]
        assert unpack_e2m1(got.packed[i]).tolist() == [code for codes, _ in blocks for code in codes]
    return got


# --- data ----------------------------------------------------------------------------------------


def normalized_mse(x: torch.Tensor, quantized: QuantizedTensor) -> float:
    """Squared error over the squared norm, in fp64."""
    reference = x.double()
    error = (reference - quantized.dequantize().double()).square().sum()
    return (error / reference.square().sum()).item()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def laplace(*shape: int) -> torch.Tensor:
    return normal(*shape).sign() * torch.empty(shape).exponential_(generator=generator(1))


def student_t5(*shape: int) -> torch.Tensor:
    return normal(*shape) / (normal(*shape, 5, seed=1).square().mean(-1)).sqrt()


def scale_codes(quantized: QuantizedTensor) -> torch.Tensor:
    return quantized.scales.view(torch.uint8).int()


def block_errors(x: torch.Tensor, quantized: QuantizedTensor) -> torch.Tensor:
    """Squared error of each block, fp64."""
    error = (x.double() - quantized.dequantize().double()).square()
    return error.unflatten(-1, (-1, quantized.format.block_size)).sum(-1)


@st.composite
def blocks(draw: st.DrawFn, low: int, high: int) -> list[float]:
    """32 values of magnitudes up to about 2**high: of any kind that treats the search unkindly."""
    kind = draw(st.sampled_from(["zero", "one nonzero", "any floats", "normal", "on the grid", "non-finite"]))
    power = 2.0 ** draw(st.integers(low, high))
    if kind == "zero":
        return [draw(st.sampled_from([0.0, -0.0]))] * 32
    if kind == "any floats":
        bound = f32(power)
        return draw(st.lists(st.floats(-bound, bound, width=32), min_size=32, max_size=32))
    values = [v * power for v in normal(32, seed=draw(st.integers(0, 2**20))).clamp_(-1.9, 1.9).tolist()]
    position = draw(st.integers(0, 31))
    if kind == "one nonzero":
        return [v if i == position else 0.0 for i, v in enumerate(values)]
    if kind == "on the grid":  # halves and eighths: errors that are zero or equal
        return [power * draw(st.sampled_from([0.0, 0.125, -0.25, 0.5, -0.75, 1.0, 1.5])) for _ in values]
    if kind == "non-finite":
        values[position] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return values


def rules_of(fmt: BlockFormat) -> list[str]:
    explicit = ["window:-1,1", "window:2,4", "offsets:5", "offsets:7,-4,0,7"]
    return [rule for rule in (*POLICIES, *explicit) if rule != "4over6" or fmt is NVFP4]


def rules(fmt: BlockFormat) -> st.SearchStrategy[str]:
    named = [rule for rule in rules_of(fmt) if rule != "full"]
    offsets = st.lists(st.integers(-12, 12), min_size=1, max_size=5)
    return st.one_of(
        st.sampled_from(named),
        st.tuples(st.integers(-9, 0), st.integers(0, 9)).map(lambda window: "window:{},{}".format(*window)),
        offsets.map(lambda numbers: "offsets:" + ",".join(map(str, numbers))),
    )


# --- the search is its definition ----------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "rule"), [(f, r) for f in (NVFP4, MXFP4) for r in rules_of(f)])
def test_every_policy_follows_the_definition(fmt: BlockFormat, rule: str) -> None:
    x = normal(2, 64) if rule == "full" else normal(16, 128)
    check(x * 3.7, fmt, rule)


@BOTH
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_input_follows_the_definition(dtype: torch.dtype, per_row: bool, fmt: BlockFormat) -> None:
    spread = torch.tensor([[1e-3], [1.0], [30.0], [4e3]])
    check((student_t5(4, 128) * spread).to(dtype), fmt, "paper", per_row)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), per_row=st.booleans())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@BOTH
def test_any_blocks_follow_the_definition(
    fmt: BlockFormat, dtype: torch.dtype, data: st.DataObject, per_row: bool
) -> None:
    x = torch.tensor(data.draw(st.lists(blocks(-149, 38), min_size=4, max_size=4))).view(2, 64).to(dtype)
    check(x, fmt, data.draw(rules(fmt)), per_row)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), per_row=st.booleans())
@BOTH
def test_huge_blocks_follow_the_definition(fmt: BlockFormat, data: st.DataObject, per_row: bool) -> None:
    x = torch.tensor(data.draw(st.lists(blocks(36, 124), min_size=4, max_size=4))).view(2, 64)
    check(x, fmt, data.draw(rules(fmt)), per_row)


@settings(deadline=None, max_examples=50)
@given(data=st.data(), exponent=st.integers(-60, 60), rows=st.booleans())
def test_given_tensor_scales_follow_the_definition(data: st.DataObject, exponent: int, rows: bool) -> None:
    x = torch.tensor(data.draw(st.lists(blocks(-60, 60), min_size=4, max_size=4))).view(2, 64)
    tensor_scale = torch.tensor([[1.3 * 2.0**exponent], [0.9]]) if rows else torch.tensor(1.3 * 2.0**exponent)
    check(x, NVFP4, data.draw(rules(NVFP4)), tensor_scale=tensor_scale)


@pytest.mark.parametrize("rule", ["absmax", "window:-1,1"])
@pytest.mark.parametrize("tensor_scale", [1.0, 1.3, 3.7e-5])
def test_products_with_reciprocals_follow_the_definition(tensor_scale: float, rule: str) -> None:
    # For every scale: the largest value, and all that lie between two elements, where a division
    # instead of a product with the rounded reciprocal would round some of them to the other side.
    ties = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0] * 2)
    x = torch.tensor(E4M3[1:]).unsqueeze(-1) * ties * tensor_scale
    check(x, NVFP4, rule, tensor_scale=torch.tensor(tensor_scale))


def test_errors_are_added_neighbours_first() -> None:
    # Pairs that mirror each other between a value of scale 1 (code 56) and one of scale 1.25 (code
    # 58) swap their errors when the scale changes. So both scales leave the same squares at other
    # places, and only the order of the rounded sum tells them apart.
    rng = generator()
    below, above = torch.tensor([[1.0, 1.25], [1.875, 2.0], [2.5, 3.0], [3.75, 4.0]]).repeat(2, 1).T
    middle, half = (below + above) / 2, (above - below) / 2
    shift = half * torch.randint(1, 2**16, (64, 8), generator=rng) / 2**17
    pairs = torch.cat((middle + shift, middle - shift), dim=-1)
    x = torch.stack([row[torch.randperm(16, generator=rng)] for row in pairs])
    found = check(x, NVFP4, "offsets:6,8", tensor_scale=torch.tensor(1.0))
    assert scale_codes(found).unique().tolist() == [56, 58]


def test_one_block_worked_by_hand() -> None:
    # Absmax takes 1 (code 56): 6 and 5 -> 4, an error of 1. Four codes on, 1.5: 6 and 4.5, 0.25.
    x = torch.tensor([[6.0, -5.0] + [0.0] * 14])
    one = torch.tensor(1.0)
    absmax = quantize(x, NVFP4, "absmax", tensor_scale=one)
    assert scale_codes(absmax).item() == 56
    assert absmax.dequantize()[0, :2].tolist() == [6.0, -4.0]
    found = quantize(x, NVFP4, "offsets:0,4", tensor_scale=one)
    assert scale_codes(found).item() == 60
    assert unpack_e2m1(found.packed)[0, :2].tolist() == [6, 8 + 5]
    assert found.dequantize()[0, :2].tolist() == [6.0, -4.5]


def test_leading_dimensions_are_kept() -> None:
    x = normal(3, 2, 64)
    for fmt in FORMATS.values():
        quantized = quantize(x, fmt, per_row=True)
        flat = quantize(x.view(6, 64), fmt, per_row=True)
        assert quantized.packed.shape == (3, 2, 32)
        assert quantized.scales.shape == (3, 2, 64 // fmt.block_size)
        assert torch.equal(quantized.dequantize(), flat.dequantize().view(3, 2, 64))
    assert quantize(x, NVFP4, per_row=True).tensor_scale.shape == (3, 2, 1)
    assert quantize(x[0, 0], NVFP4).packed.shape == (32,)


def test_transposed_input_is_quantized_like_its_copy() -> None:
    x = normal(64, 48).t()
    expected, got = quantize(x.contiguous()), quantize(x)
    assert torch.equal(got.packed, expected.packed)
    assert torch.equal(scale_codes(got), scale_codes(expected))


@BOTH
def test_no_rows_give_no_rows(fmt: BlockFormat) -> None:
    quantized = quantize(torch.empty(0, 64), fmt, per_row=True)
    assert quantized.packed.shape == (0, 32)
    assert quantized.scales.shape == (0, 64 // fmt.block_size)
    assert quantized.dequantize().shape == (0, 64)


# --- ties, ends of the range, special values -----------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "values", "rule", "code"),
    [
        # Scales 0.5, 0.75, 1 and 1.5 (codes 48, 52, 56, 60) all hold 3 and 1.5 exactly.
        (NVFP4, [3.0, -1.5], "window:0,12", 48),
        (NVFP4, [3.0, -1.5], "offsets:12,8,4", 52),
        (NVFP4, [3.0, -1.5], "offsets:12,8", 56),
        # 5 lies between 4 and 6: scales 1 and 2 (codes 56 and 64) both leave an error of 1.
        (NVFP4, [5.0], "offsets:11,3", 56),
        (MXFP4, [5.0], "offsets:1,0", 127),
        # Every scale holds zeros.
        (NVFP4, [0.0], "paper", 1),
        (NVFP4, [0.0], "full", 1),
        (MXFP4, [0.0], "paper", 0),
        (MXFP4, [0.0], "full", 0),
    ],
)
def test_tie_goes_to_the_smallest_code(fmt: BlockFormat, values: list[float], rule: str, code: int) -> None:
    x = torch.tensor([values + [0.0] * (fmt.block_size - len(values))])
    tensor_scale = torch.tensor(1.0) if fmt is NVFP4 else None
    assert scale_codes(quantize(x, fmt, rule, tensor_scale=tensor_scale)).item() == code


@pytest.mark.parametrize(
    ("fmt", "rule", "code"),
    [
        (NVFP4, "offsets:-200", 1),
        (NVFP4, "offsets:200", 126),
        (MXFP4, "offsets:-255", 0),
        (MXFP4, "offsets:255", 252),
    ],
)
def test_codes_stop_at_the_ends_of_the_range(fmt: BlockFormat, rule: str, code: int) -> None:
    tensor_scale = torch.tensor(1.0) if fmt is NVFP4 else None
    check(normal(1, 64), fmt, rule, tensor_scale=tensor_scale)
    assert (scale_codes(quantize(normal(1, 64), fmt, rule, tensor_scale=tensor_scale)) == code).all()


def test_smallest_blocks_take_the_smallest_code() -> None:
    x = torch.full((1, 16), 2.0**-10)  # half an element at the smallest scale, 2**-9
    quantized = check(x, NVFP4, "paper", tensor_scale=torch.tensor(1.0))
    assert scale_codes(quantized).item() == 1
    assert torch.equal(quantized.dequantize(), x)
    denormal = torch.full((1, 32), 2.0**-128)  # half an element at 2**-127
    quantized = check(denormal, MXFP4, "paper")
    assert scale_codes(quantized).item() == 0
    assert torch.equal(quantized.dequantize(), denormal)


@pytest.mark.parametrize("rule", rules_of(NVFP4))
@pytest.mark.parametrize(("value", "scale"), [(3e3, 1.0), (1e9, 1.0), (3e38, 1.0), (1.0, 1e-6)])
def test_values_beyond_a_given_tensor_scale_saturate(value: float, scale: float, rule: str) -> None:
    x = torch.full((1, 16), value)
    x[0, ::2] *= -1
    quantized = check(x, NVFP4, rule, tensor_scale=torch.tensor(scale))
    assert unpack_e2m1(quantized.packed).tolist() == [[15, 7] * 8]


def test_values_saturate_when_their_quotient_overflows() -> None:
    x = torch.tensor([[1e30, -1e30] + [1e-10] * 14])
    quantized = check(x, NVFP4, "paper", tensor_scale=torch.tensor(1e-10))
    assert unpack_e2m1(quantized.packed)[0, :2].tolist() == [7, 15]


@BOTH
@pytest.mark.parametrize("policy", [ScalePolicy(rule, m) for rule in ("absmax", "paper") for m in METRICS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_block_is_nan_and_alone(bad: float, policy: ScalePolicy, fmt: BlockFormat) -> None:
    importance = importance_of(policy.metric, 128, fmt)
    clean = normal(3, 128)
    clean[1, 5] = 9.0  # the largest value, so that the tensor scale does not depend on the others
    x = clean.clone()
    x[1, fmt.block_size + 3] = bad
    got = quantize(x, fmt, policy, importance=importance)
    expected = quantize(clean, fmt, policy, importance=importance)
    hit = torch.zeros(3, 128 // fmt.block_size, dtype=torch.bool)
    hit[1, 1] = True

    assert torch.equal(got.tensor_scale, expected.tensor_scale)
    assert (scale_codes(got)[hit] == fmt.nan_code).all()
    assert torch.equal(scale_codes(got)[~hit], scale_codes(expected)[~hit])
    codes, wanted = (unpack_e2m1(q.packed).unflatten(-1, (-1, fmt.block_size)) for q in (got, expected))
    assert (codes[hit] == 0).all()
    assert torch.equal(codes[~hit], wanted[~hit])
    assert torch.equal(got.dequantize().unflatten(-1, (-1, fmt.block_size)).isnan().all(-1), hit)
    assert got.dequantize().isnan().sum() == fmt.block_size


# --- what the policies promise -------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("data", [normal, laplace, student_t5])
def test_more_candidates_never_raise_the_error(data, fmt: BlockFormat) -> None:
    x = data(128, 128)
    errors = [block_errors(x, quantize(x, fmt, rule)) for rule in ("absmax", "paper", "exact", "full")]
    for fewer, more in itertools.pairwise(errors):
        assert (more <= fewer * (1 + 1e-5)).all()  # the search compares errors that are rounded to fp32
    assert errors[1].sum() < 0.97 * errors[0].sum()


@BOTH
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("data", [normal, laplace, student_t5])
def test_exact_finds_the_optimum_of_all_codes(data, per_row: bool, fmt: BlockFormat) -> None:
    x = data(64, 256)
    exact, full = (quantize(x, fmt, rule, per_row=per_row) for rule in ("exact", "full"))
    assert torch.equal(scale_codes(exact), scale_codes(full))
    assert torch.equal(exact.packed, full.packed)


def test_exact_finds_the_optimum_of_mxfp4_next_to_one_large_value() -> None:
    # The large value wants its own scale; all the others together want a smaller one.
    rng = generator()
    small = torch.rand(1000, 32, generator=rng) * torch.rand(1000, 1, generator=rng) * 2
    position = torch.randint(0, 32, (1000, 1), generator=rng)
    x = small.scatter(1, position, 4 + 4 * torch.rand(1000, 1, generator=rng))
    x *= torch.exp2(torch.randint(-20, 20, (1000, 1), generator=rng))
    exact, full = (quantize(x, MXFP4, rule) for rule in ("exact", "full"))
    assert torch.equal(scale_codes(exact), scale_codes(full))


@pytest.fixture(scope="module")
def million() -> tuple[torch.Tensor, float]:
    """2**20 normal values and the normalised error that absmax leaves."""
    x = normal(1024, 1024, seed=1234)
    return x, normalized_mse(x, quantize(x, NVFP4, "absmax"))


@pytest.mark.parametrize(
    ("rule", "percent"),
    [
        ("4over6", 16.3),
        ("offsets:0,5", 15.2),
        ("offsets:-1,0,5", 22.0),
        ("fast", 24.6),
        ("offsets:-1,0,1,4,5,6", 26.6),
        ("paper", 27.0),
    ],
)
def test_error_reduction_on_normal_data(million: tuple[torch.Tensor, float], rule: str, percent: float) -> None:
    x, absmax = million
    reduction = 1 - normalized_mse(x, quantize(x, NVFP4, rule)) / absmax
    assert 100 * reduction == pytest.approx(percent, abs=0.3)


# --- metrics -------------------------------------------------------------------------------------


def importance_of(metric: str, width: int, fmt: BlockFormat) -> torch.Tensor | None:
    """Random importance of the shape that `metric` takes."""
    if metric == "mse":
        return None
    inputs = normal(256, width, seed=7) * torch.exp2(normal(width, seed=8) * 2)
    inputs += 0.5 * inputs.roll(1, dims=-1)
    if metric == "wmse":
        return inputs.square().mean(0)
    split = inputs.unflatten(-1, (-1, fmt.block_size))
    return torch.einsum("nbi,nbj->bij", split, split) / len(inputs)


def weighed_errors(x: torch.Tensor, quantized: QuantizedTensor, importance: torch.Tensor) -> torch.Tensor:
    """Error of each block under `importance`, fp64."""
    block = quantized.format.block_size
    if importance.dim() == 1:
        importance = torch.diag_embed(importance.view(-1, block))
    error = (x.double() - quantized.dequantize().double()).unflatten(-1, (-1, block))
    return torch.einsum("rbi,bij,rbj->rb", error, importance.double(), error)


@BOTH
@pytest.mark.parametrize("metric", ["wmse", "hessian"])
def test_weighed_metrics_find_the_least_weighed_error(metric: str, fmt: BlockFormat) -> None:
    x, offsets = normal(64, 128), range(-3, 8)
    importance = importance_of(metric, 128, fmt)
    policy = ScalePolicy(f"window:{offsets[0]},{offsets[-1]}", metric)
    found = weighed_errors(x, quantize(x, fmt, policy, importance=importance), importance)
    each = [weighed_errors(x, quantize(x, fmt, f"offsets:{offset}"), importance) for offset in offsets]
    torch.testing.assert_close(found, torch.stack(each).amin(0), rtol=1e-4, atol=0)
    # The weights matter: the choice by plain squared error is worse.
    plain = weighed_errors(x, quantize(x, fmt, policy.rule), importance)
    assert found.sum() < 0.99 * plain.sum()


@BOTH
def test_equal_weights_choose_as_mse_does(fmt: BlockFormat) -> None:
    x = normal(64, 256)
    plain = quantize(x, fmt, "paper")
    weighed = quantize(x, fmt, ScalePolicy("paper", "wmse"), importance=torch.ones(256))
    assert torch.equal(scale_codes(weighed), scale_codes(plain))
    assert torch.equal(weighed.packed, plain.packed)


@BOTH
def test_hessian_of_white_inputs_chooses_as_mse_does(fmt: BlockFormat) -> None:
    x = normal(64, 256)
    plain = quantize(x, fmt, "paper")
    identity = torch.eye(fmt.block_size).expand(256 // fmt.block_size, -1, -1)
    weighed = quantize(x, fmt, ScalePolicy("paper", "hessian"), importance=identity)
    # The sums are added in another order, so nearly equal candidates may change places.
    torch.testing.assert_close(block_errors(x, weighed), block_errors(x, plain), rtol=1e-5, atol=0)
    assert (scale_codes(weighed) == scale_codes(plain)).float().mean() > 0.98


def test_hessian_sees_the_signs_of_errors() -> None:
    # Inputs that are always equal: only the sum of the errors counts. Scale 1 leaves +0.5 and +0.5
    # for (5.5, 5.5), scale 0.75 -1 and -1; for (5.5, -5.5) they cancel, and the smaller code wins.
    together = torch.zeros(1, 16, 16)
    together[0, :2, :2] = 1.0
    policy = ScalePolicy("offsets:-4,0", "hessian")
    for second, code in ((5.5, 56), (-5.5, 52)):
        x = torch.tensor([[5.5, second] + [0.0] * 14])
        x[0, 15] = 6.0  # its own error does not count
        quantized = quantize(x, NVFP4, policy, tensor_scale=torch.tensor(1.0), importance=together)
        assert scale_codes(quantized).item() == code


@BOTH
@pytest.mark.parametrize("metric", METRICS)
def test_importance_must_fit_the_metric(metric: str, fmt: BlockFormat) -> None:
    x, policy = normal(2, 64), ScalePolicy("paper", metric)
    for other in METRICS:
        importance = importance_of(other, 64, fmt)
        if other == metric:
            quantize(x, fmt, policy, importance=importance)
        else:
            with pytest.raises(ValueError, match=f"metric '{metric}'.* importance"):
                quantize(x, fmt, policy, importance=importance)
    if metric != "mse":
        right, wrong = (importance_of(metric, width, fmt) for width in (64, 128))
        message = f"needs importance {tuple(right.shape)}, got {tuple(wrong.shape)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            quantize(x, fmt, policy, importance=wrong)


# --- policies as text, bad input -----------------------------------------------------------------


UNKNOWN_RULES = ["best", "", "Paper", "window", "window:", "window:a,b", "offsets:", "offsets:1, 2"]


@pytest.mark.parametrize("rule", UNKNOWN_RULES)
def test_unknown_rule_lists_what_there_is(rule: str) -> None:
    with pytest.raises(ValueError) as raised:
        ScalePolicy(rule)
    for known in (repr(rule), *POLICIES, "window:LO,HI", "offsets:A,B"):
        assert known in str(raised.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("window:3,1", "window:3,1.*LO <= HI"),
        ("window:3", "window:3.*LO <= HI"),
        ("window:1,2,3", "window:1,2,3.*LO <= HI"),
        ("offsets:300", r"offsets:300.*\+-255"),
        ("window:-256,0", r"window:-256,0.*\+-255"),
        (3, "as text, got 3"),
        (None, "as text, got None"),
        (["paper"], r"as text, got \['paper'\]"),
    ],
)
def test_wrong_rule_says_why(rule: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalePolicy(rule)
    with pytest.raises(ValueError, match=message):
        quantize(normal(1, 32), NVFP4, rule)


def test_unknown_metric_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'l1'.*mse, wmse, hessian"):
        ScalePolicy("paper", "l1")


def test_four_over_six_needs_fractional_scales() -> None:
    with pytest.raises(ValueError, match=r"4over6.*mxfp4"):
        quantize(normal(1, 32), MXFP4, "4over6")


@pytest.mark.parametrize(
    ("rule", "nvfp4", "mxfp4"),
    [
        ("absmax", (0,), (0,)),
        ("window:-1,2", (-1, 0, 1, 2), (-1, 0, 1, 2)),
        ("offsets:5,-1,+0,5", (-1, 0, 5), (-1, 0, 5)),
        ("paper", tuple(range(-2, 7)), (0, 1)),
        ("exact", tuple(range(-3, 8)), (-1, 0, 1)),
        ("full", None, None),
        ("4over6", None, None),
    ],
)
def test_offsets_of_a_rule(rule: str, nvfp4: tuple | None, mxfp4: tuple | None) -> None:
    policy = ScalePolicy.of(rule)
    assert ScalePolicy.of(policy) is policy
    assert (policy.offsets(NVFP4), policy.offsets(MXFP4)) == (nvfp4, mxfp4)


@pytest.mark.parametrize("rule", [*POLICIES, "window:-1,2", "offsets:5,-1,5"])
def test_candidate_codes_ascend_and_are_counted(rule: str) -> None:
    for fmt in FORMATS.values():
        if (rule, fmt) == ("4over6", MXFP4):
            continue
        policy = ScalePolicy(rule)
        codes = policy.candidate_codes(torch.tensor([0.0, 1e-9, 1.0, 2688.0, 1e9]), fmt)
        assert codes.shape == (policy.candidate_count(fmt), 5)
        assert (codes.diff(dim=0) >= 0).all()
        assert codes.min() >= fmt.min_code
        assert codes.max() <= fmt.max_code


@BOTH
def test_width_must_be_whole_blocks(fmt: BlockFormat) -> None:
    with pytest.raises(ValueError, match=f"40 .*{fmt.name}.*{fmt.block_size}"):
        quantize(normal(2, 40), fmt)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"bf16, fp16 or fp32, got {dtype}"):
        quantize(torch.ones(1, 16).to(dtype))


def test_mxfp4_takes_no_tensor_scale() -> None:
    with pytest.raises(ValueError, match="mxfp4 has no tensor scale"):
        quantize(normal(1, 32), MXFP4, tensor_scale=torch.tensor(1.0))


# --- how it works must not show ------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("metric", ["mse", "wmse"])
@pytest.mark.parametrize("values", [1, 5000])
def test_result_does_not_depend_on_the_chunks(
    monkeypatch: pytest.MonkeyPatch, values: int, metric: str, fmt: BlockFormat
) -> None:
    x, policy, importance = normal(37, 96), ScalePolicy("paper", metric), importance_of(metric, 96, fmt)
    if fmt is NVFP4:
        x[::3] *= 40
    for per_row in (False, True):
        monkeypatch.undo()
        whole = quantize(x, fmt, policy, per_row=per_row, importance=importance)
        monkeypatch.setattr(search, "_CHUNK_VALUES", {"cpu": values, "cuda": values})
        parts = quantize(x, fmt, policy, per_row=per_row, importance=importance)
        assert torch.equal(parts.packed, whole.packed)
        assert torch.equal(scale_codes(parts), scale_codes(whole))


@BOTH
@pytest.mark.parametrize("rule", ["absmax", "paper", "full"])
@pytest.mark.parametrize("metric", METRICS)
def test_inputs_are_not_modified(metric: str, rule: str, fmt: BlockFormat) -> None:
    x, importance = normal(4, 64), importance_of(metric, 64, fmt)
    x[0, 0], x[1, 1] = math.nan, 1e30
    scale = torch.tensor(1.0) if fmt is NVFP4 else None
    given_tensors = [t for t in (x, importance, scale) if t is not None]
    before = [t.clone() for t in given_tensors]
    quantize(x, fmt, ScalePolicy(rule, metric), tensor_scale=scale, importance=importance)
    for tensor, copy in zip(given_tensors, before, strict=True):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
