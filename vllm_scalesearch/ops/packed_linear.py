"""Matrix product with weights that stay packed: dequantized a few rows at a time at every use.

The CPU's memory-saving path. The numbers are those of the dense path; the cost is the unpacking.
"""

import torch

from vllm_scalesearch.formats import QuantizedTensor, format_named

# Output rows dequantized at once; with K = 4096 that is 1 MiB of bf16, about a core's L2.
_ROWS = 128

_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define("packed_linear(Tensor x, Tensor packed, Tensor scales, Tensor tensor_scale, str format) -> Tensor")


def packed_linear(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """``x @ values.T``, where ``(values, residual) = weight.values(x.dtype)``.

    x: (..., K) bf16 or fp16. weight: (N, K) with one tensor scale. Returns (..., N) in x's dtype,
    accumulated in fp32; the residual is left to the caller, who has other scales to apply with it.
    """
    return torch.ops.vllm_scalesearch.packed_linear(
        x, weight.packed, weight.scales, weight.tensor_scale, weight.format.name
    )


def _reference(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor, format: str
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], packed.shape[0]))
    for start in range(0, packed.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = QuantizedTensor(packed[rows], scales[rows], tensor_scale, format_named(format))
        out[..., rows] = torch.nn.functional.linear(x, part.values(x.dtype)[0])
    return out


def _fake(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, tensor_scale: torch.Tensor, format: str
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


_LIB.impl("packed_linear", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_scalesearch::packed_linear", _fake, lib=_LIB)
