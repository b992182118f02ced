"""The searched quantizers behind one function each: the reference on the CPU, kernels on a CUDA GPU.

`quantize_values` is for the input of a matrix product at run time, the W4A4 path of machines without FP4
units: the result holds exactly the numbers that an FP4 tensor core would multiply, so the product that
follows has NVFP4 numerics. `quantize_weight` makes what is stored.
"""

import torch

from vllm_scalesearch.formats import BlockFormat, QuantizedTensor, finite_amax, format_named, tensor_scale_of
from vllm_scalesearch.search import ScalePolicy, quantize, searched_rows

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


def quantize_weight(
    x: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None = None,
) -> QuantizedTensor:
    """`search.quantize` with metric ``mse``, by a kernel where x is on a CUDA GPU; the same bits.

    x: (..., K). tensor_scale: NVFP4's, fp32, a scalar or (..., 1); None: one for all of x.
    Raises what `search.quantize` raises.
    """
    if x.device.type != "cuda":
        return quantize(x, fmt, policy, tensor_scale=tensor_scale)
    from vllm_scalesearch.ops import triton_quantize

    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    by_row = None if tensor_scale is None or tensor_scale.dim() == 0 else tensor_scale.reshape(-1, 1)
    packed, scales, used = triton_quantize.quantize_packed(
        rows, fmt, policy, tensor_scale if by_row is None else by_row
    )
    return QuantizedTensor(
        packed.view(*x.shape[:-1], packed.shape[-1]),
        scales.view(*x.shape[:-1], scales.shape[-1]),
        used if by_row is None else tensor_scale,
        fmt,
    )


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


def _cuda(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    from vllm_scalesearch.ops import triton_quantize

    fmt = format_named(format)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    values, residual = triton_quantize.quantize_values(rows, fmt, policy)
    return values.view(x.shape), residual.view(*x.shape[:-1], 1)


def _fake(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_LIB.impl("quantize_values", _reference, "CPU")
_LIB.impl("quantize_values", _cuda, "CUDA")
torch.library.register_fake("vllm_scalesearch::quantize_values", _fake, lib=_LIB)
