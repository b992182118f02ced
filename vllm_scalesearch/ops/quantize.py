"""Quantize the input of a matrix product at run time, to values that the product can use as they are.

The W4A4 path of machines without FP4 units: the result holds exactly the numbers that an FP4 tensor
core would multiply, so the product that follows has NVFP4 numerics.
"""

import torch

from vllm_scalesearch.formats import finite_amax, format_named, tensor_scale_of
from vllm_scalesearch.search import ScalePolicy, searched_rows

_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define("quantize_values(Tensor x, str format, str policy) -> (Tensor, Tensor)")


def quantize_values(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows with a searched scale per block and one tensor scale per row.

    x: (..., K) bf16 or fp16. format: ``nvfp4`` or ``mxfp4``. policy: rule of a `ScalePolicy`.
    Returns values (..., K) in x's dtype and residual (..., 1) fp32; ``values * residual`` is the
    quantized input (`QuantizedTensor.values`). Opaque to torch.compile, so that no compiler fuses
    the search into arithmetic that rounds otherwise than the reference.
    """
    return torch.ops.vllm_scalesearch.quantize_values(x, format, policy)


def _reference(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    fmt = format_named(format)
    fmt.check_width(x.shape[-1], "quantize_values")
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    amax = finite_amax(rows, dim=-1)
    tensor_scale = tensor_scale_of(amax) if fmt.has_tensor_scale else torch.ones_like(amax)
    exponent = fmt.fold_exponent(tensor_scale, x.dtype)
    values = rows.new_empty(rows.shape)
    for part, elements, codes in searched_rows(rows, tensor_scale, fmt, ScalePolicy(policy)):
        scales = torch.ldexp(fmt.decode_scales(codes), exponent[part])
        values[part] = (elements.unflatten(-1, (-1, fmt.block_size)) * scales.unsqueeze(-1)).flatten(1)
    residual = torch.ldexp(tensor_scale, -exponent)
    return values.view(x.shape), residual.view(*x.shape[:-1], 1)


def _fake(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_LIB.impl("quantize_values", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_scalesearch::quantize_values", _fake, lib=_LIB)
