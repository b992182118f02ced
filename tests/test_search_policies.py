"""What the search's policies and metrics promise, and what they refuse."""

import itertools
import re

import pytest
import torch
from search_cases import BOTH, importance_of, scale_codes, student_t5
from values import generator, normal

from vllm_scalesearch.formats import FORMATS, MXFP4, NVFP4, BlockFormat, QuantizedTensor
from vllm_scalesearch.search import METRICS, POLICIES, ScalePolicy, quantize

# --- data and errors -----------------------------------------------------------------------------


def laplace(*shape: int) -> torch.Tensor:
    return normal(*shape).sign() * torch.empty(shape).exponential_(generator=generator(1))


def normalized_mse(x: torch.Tensor, quantized: QuantizedTensor) -> float:
    """Squared error over the squared norm, in fp64."""
    reference = x.double()
    error = (reference - quantized.dequantize().double()).square().sum()
    return (error / reference.square().sum()).item()


def block_errors(x: torch.Tensor, quantized: QuantizedTensor) -> torch.Tensor:
    """Squared error of each block, fp64."""
    error = (x.double() - quantized.dequantize().double()).square()
    return error.unflatten(-1, (-1, quantized.format.block_size)).sum(-1)


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
