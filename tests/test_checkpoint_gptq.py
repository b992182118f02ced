"""GPTQ, its search, descent and target against direct solutions for small matrices, in fp64."""

import itertools
import os

import interpreter
import pytest
import torch

from vllm_scalesearch.checkpoint.gptq import GptqOptions, damped, gptq, inverse_factor, output_error, refine
from vllm_scalesearch.checkpoint.matrices import Recipe, quantize_together, target
from vllm_scalesearch.checkpoint.moments import InputMoments, block_moments
from vllm_scalesearch.formats import NVFP4, decode_e2m1, finite_amax, tensor_scale_of, unpack_e2m1
from vllm_scalesearch.search import ScalePolicy, quantize

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def problem(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs' second moments, and the tensor scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(4 * width, width, generator=generator) @ mix
    return weight, inputs.t() @ inputs / len(inputs), tensor_scale_of(finite_amax(weight))


def nearest(values: torch.Tensor) -> torch.Tensor:
    index = (values.abs().unsqueeze(-1) - GRID).abs().argmin(-1)
    return GRID[index].copysign(values)


def direct_gptq(weight: torch.Tensor, h: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Optimal brain quantization from left to right: each step solves for the columns that are left."""
    left, out = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for j in range(weight.shape[1]):
        out[:, j] = nearest(left[:, j] / scales[:, j]) * scales[:, j]
        rest = slice(j + 1, None)
        # The best continuous answer to an error in column j: -H_rr^-1 H_rj times it.
        answer = torch.linalg.solve(h[rest, rest], h[rest, j])
        left[:, rest] += (left[:, j] - out[:, j]).unsqueeze(1) * answer
    return out


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_kernel_on_the_cpu():
    interpreter.run_tests(__file__, ("kernel_against_torch",), 1)


@pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="runs on a GPU, and on the CPU in the interpreter"
)
@pytest.mark.parametrize("rows", [5, 40])
def test_kernel_against_torch(rows):
    from vllm_scalesearch.checkpoint.gptq import _feedback
    from vllm_scalesearch.ops.triton_round_block import round_block

    device = "cpu" if INTERPRETED else "cuda"
    weight, h, scale = problem(rows, 16)
    factor = inverse_factor(damped(h, 0.01)).float()
    work = weight / scale
    codes = ScalePolicy("window:-2,2").candidate_codes(work.abs().amax(1), NVFP4)
    scales = NVFP4.decode_scales(codes)
    values, errors, losses = _feedback(work, factor, scales)
    found = round_block(work.to(device), factor.to(device), scales.to(device))
    found_values, found_errors, best, loss = (tensor.cpu() for tensor in found)
    index = best.long().unsqueeze(0)
    # Sums in another order: the chosen loss is the least up to rounding, and all else follows the choice.
    torch.testing.assert_close(losses.gather(0, index)[0], losses.amin(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, losses.amin(0), rtol=1e-4, atol=0)
    for mine, theirs in ((values, found_values), (errors, found_errors)):
        chosen = mine.gather(0, index.unsqueeze(1).expand(1, 16, rows))[0].t()
        torch.testing.assert_close(theirs, chosen, rtol=1e-4, atol=1e-4)


def test_inverse_factor():
    h = damped(problem(1, 24)[1], 0.01)
    factor = inverse_factor(h)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(h))


@pytest.mark.parametrize("width", [32, 160])  # within the columns that are updated together, and beyond
def test_gptq_is_the_direct_solution(width):
    weight, h, scale = problem(8, width)
    before = quantize(weight, NVFP4, "paper", tensor_scale=scale)
    found = gptq(weight, h, NVFP4, "paper", scale, GptqOptions(0.01, "before"), before.scales.view(torch.uint8))
    assert torch.equal(found.scales.view(torch.uint8), before.scales.view(torch.uint8))
    scales = (before.scales.double() * scale.double()).repeat_interleave(16, 1)
    expected = direct_gptq(weight, damped(h, 0.01), scales)
    # One rounding that falls the other way in fp32 changes all after it in its row.
    same = ((found.dequantize().double() - expected).abs() < 1e-5).all(1)
    assert same.float().mean() >= 7 / 8
    assert output_error(weight, found.dequantize(), h) < 0.8 * output_error(weight, before.dequantize(), h)


def test_search_as_it_goes_takes_the_scale_of_least_error():
    weight, h, scale = problem(6, 16)
    h64 = damped(h, 0.01)
    found = gptq(weight, h, NVFP4, "window:-4,4", scale, GptqOptions(0.01, "feedback"))
    codes = ScalePolicy("window:-4,4").candidate_codes(weight.abs().amax(1) / scale, NVFP4)
    errors = []
    for candidate in codes:
        scales = (NVFP4.decode_scales(candidate).double() * scale.double()).unsqueeze(1).expand(-1, 16)
        difference = direct_gptq(weight, h64, scales) - weight.double()
        errors.append(((difference @ h64) * difference).sum(1))
    best = torch.stack(errors).argmin(0)
    assert torch.equal(found.scales.view(torch.uint8).flatten().int(), codes.gather(0, best.unsqueeze(0))[0])


def test_block_search_as_it_goes_is_that_of_metric_hessian_on_updated_weights():
    weight, h, scale = problem(6, 32)
    found = gptq(weight, h, NVFP4, "window:-6,6", scale, GptqOptions(0.01, "block"))
    h64 = damped(h, 0.01)
    first = found.dequantize()[:, :16].double() - weight[:, :16].double()
    left = weight[:, 16:].double() - first @ torch.linalg.solve(h64[16:, 16:], h64[16:, :16]).t()
    policy = ScalePolicy("window:-6,6", "hessian")
    expected = quantize(
        left.float(), NVFP4, policy, tensor_scale=scale, importance=h64[16:, 16:].float().unsqueeze(0)
    )
    assert torch.equal(found.scales.view(torch.uint8)[:, 1:], expected.scales.view(torch.uint8))


def test_hessian_search_against_all_candidates():
    weight, h, scale = problem(5, 32, seed=1)
    policy = ScalePolicy("window:-6,6", "hessian")
    found = quantize(weight, NVFP4, policy, tensor_scale=scale, importance=block_moments(h, 16))
    for row, block in itertools.product(range(5), range(2)):
        part = slice(16 * block, 16 * block + 16)
        values = weight[row, part].double()
        own = h[part, part].double()
        codes = policy.candidate_codes((values.abs().amax() / scale).reshape(1).float(), NVFP4).flatten()
        errors = []
        for code in codes:
            s = NVFP4.decode_scales(code.reshape(1)).double() * scale.double()
            difference = nearest(values / s) * s - values
            errors.append(difference @ own @ difference)
        assert found.scales.view(torch.uint8)[row, block] == codes[torch.stack(errors).argmin()]


def test_descent_never_raises_the_error_and_ends_where_no_block_can_do_better():
    weight, h, scale = problem(16, 48, seed=2)
    h64 = damped(h, 0.05)
    start = quantize(
        weight, NVFP4, ScalePolicy("paper", "hessian"), tensor_scale=scale, importance=block_moments(h, 16)
    )
    errors = [output_error(weight, start.dequantize(), h64)]
    for passes in (1, 2, 40):
        found = refine(weight, h, start, "paper", GptqOptions(0.05, descent=passes))
        errors.append(output_error(weight, found.dequantize(), h64))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]
    # No single code of the end can be changed for the better by the pass that changed nothing.
    again = refine(weight, h, found, "paper", GptqOptions(0.05, descent=1))
    assert torch.equal(again.packed, found.packed)


def test_descent_keeps_scales_that_are_fixed():
    weight, h, scale = problem(4, 32)
    start = quantize(weight, NVFP4, "absmax", tensor_scale=scale)
    found = refine(weight, h, start, "absmax", GptqOptions(0.01, "before", descent=2))
    assert torch.equal(found.scales.view(torch.uint8), start.scales.view(torch.uint8))
    assert output_error(weight, found.dequantize(), h) < output_error(weight, start.dequantize(), h)


def test_channels_that_were_never_active_and_bad_moments():
    weight, h, scale = problem(4, 32)
    h[5], h[:, 5] = 0, 0
    assert torch.isfinite(gptq(weight, h, NVFP4, "paper", scale).dequantize()).all()
    dead = gptq(weight, torch.zeros(32, 32), NVFP4, "paper", scale)
    elements = decode_e2m1(unpack_e2m1(dead.packed))
    assert torch.isfinite(elements).all()
    h[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq(weight, h, NVFP4, "paper", scale)
    with pytest.raises(ValueError, match="width 32 needs H"):
        gptq(weight, h[:16, :16], NVFP4, "paper", scale)


def test_target_is_the_least_squares_solution():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 32, generator=generator)
    inputs = torch.randn(400, 32, generator=generator)
    original = inputs + 0.3 * torch.randn(400, 32, generator=generator) + 0.2 * inputs.roll(1, 1)
    moments = InputMoments(32, "cpu", True)
    moments.add(inputs[:150], original=original[:150])
    moments.add(inputs[150:], original=original[150:])
    expected = torch.linalg.lstsq(inputs.double(), original.double() @ weight.double().t()).solution.t()
    torch.testing.assert_close(target(weight, moments, 1.0, 1e-9).double(), expected, atol=1e-4, rtol=1e-4)
    half = target(weight, moments, 0.5, 1e-9)
    torch.testing.assert_close(half.double(), (weight + expected) / 2, atol=1e-4, rtol=1e-4)
    assert torch.equal(target(weight, moments, 0.0, 0.01), weight)


def test_moments():
    inputs = torch.randn(300, 16, generator=torch.Generator().manual_seed(4))
    weights = torch.rand(300)
    moments = InputMoments(16, "cpu", False)
    moments.add(inputs[:100], token_weights=weights[:100])
    moments.add(inputs[100:], token_weights=weights[100:])
    expected = (inputs * weights.unsqueeze(1)).t() @ inputs / weights.sum()
    torch.testing.assert_close(moments.hessian, expected, atol=1e-5, rtol=1e-5)
    assert moments.tokens == 300 and moments.amax == inputs.abs().max() and moments.cross is None
    with pytest.raises(ValueError, match="no token"):
        _ = InputMoments(16, "cpu", False).hessian
    with pytest.raises(ValueError, match="NaN"):
        moments.add(torch.full((1, 16), torch.nan))


def test_too_few_tokens_fall_back_and_say_so():
    weight, _, _ = problem(4, 32)
    moments = InputMoments(32, "cpu", False)
    moments.add(torch.randn(10, 32))
    found = quantize_together({"m": weight}, {"m": Recipe("paper", "hessian", descent=2)}, moments)["m"]
    assert found.fallback == "saw 10 tokens, fewer than 256"
    assert found.recipe.metric == "mse" and found.recipe.descent == 0
    assert torch.equal(found.weight.packed, quantize(weight, NVFP4, "paper").packed)


def test_every_metric_lowers_the_output_error():
    weight, h, _ = problem(32, 64, seed=5)
    chol = torch.linalg.cholesky(h)
    moments = InputMoments(64, "cpu", False)
    moments.add(torch.randn(4000, 64, generator=torch.Generator().manual_seed(6)) @ chol.t())
    recipes = {
        "mse": Recipe("paper"),
        "wmse": Recipe("paper", "wmse"),
        "hessian": Recipe("window:-6,6", "hessian"),
        "descent": Recipe("window:-6,6", "hessian", descent=3),
        "feedback": Recipe("window:-6,6", gptq="feedback"),
        "block": Recipe("window:-6,6", gptq="block"),
        "before": Recipe("window:-6,6", gptq="before"),
    }
    error = {
        name: quantize_together({"m": weight}, {"m": recipe}, moments)["m"] for name, recipe in recipes.items()
    }
    assert all(found.error < found.absmax_error for found in error.values())
    assert error["descent"].error < error["hessian"].error < error["mse"].error
    assert max(error["feedback"].error, error["block"].error) < error["before"].error < error["mse"].error


def test_recipes_that_make_no_sense():
    with pytest.raises(ValueError, match="unknown metric"):
        Recipe(metric="best")
    with pytest.raises(ValueError, match="unknown scale policy"):
        Recipe("paperr")
    with pytest.raises(ValueError, match="--correction 2"):
        Recipe(correction=2)
    with pytest.raises(ValueError, match="--gptq later: choose from before, block, feedback"):
        Recipe(gptq="later")
    with pytest.raises(ValueError, match="m: metric 'hessian' needs calibration"):
        quantize_together({"m": torch.ones(2, 16)}, {"m": Recipe(metric="hessian")}, None)
