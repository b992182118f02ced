"""What searches are tried on: values, importance, and rules."""

import math
import struct

import pytest
import torch
from hypothesis import strategies as st
from values import normal

from vllm_scalesearch.formats import MXFP4, NVFP4, BlockFormat, QuantizedTensor
from vllm_scalesearch.search import POLICIES

BOTH = pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=lambda fmt: fmt.name)


def f32(value: float) -> float:
    """`value` rounded to fp32.

    For one sum, product or quotient of two fp32 numbers, fp64 and this give what fp32 gives.
    """
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def student_t5(*shape: int) -> torch.Tensor:
    return normal(*shape) / (normal(*shape, 5, seed=1).square().mean(-1)).sqrt()


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


def scale_codes(quantized: QuantizedTensor) -> torch.Tensor:
    return quantized.scales.view(torch.uint8).int()


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
