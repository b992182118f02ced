"""The search against a slow scalar implementation of its definition, and what must not change its result.

The scalar implementation below is written from the docstring of search.py: Python floats, rounded to
fp32 after each operation, one block and one candidate at a time.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from search_cases import BOTH, blocks, f32, importance_of, rules, rules_of, scale_codes, student_t5
from values import generator, normal

from vllm_scalesearch import search
from vllm_scalesearch.formats import FORMATS, MXFP4, NVFP4, BlockFormat, QuantizedTensor, unpack_e2m1
from vllm_scalesearch.search import METRICS, ScalePolicy, quantize

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
OFFSETS = {
    "absmax": {"nvfp4": [0], "mxfp4": [0]},
    "fast": {"nvfp4": [-1, 0, 4, 5], "mxfp4": [0, 1]},
    "paper": {"nvfp4": range(-2, 7), "mxfp4": [0, 1]},
    "exact": {"nvfp4": range(-3, 8), "mxfp4": [-1, 0, 1]},
}


# --- the definition, slowly ----------------------------------------------------------------------


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
