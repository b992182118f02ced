"""The searched quantizers behind one function each: the reference on the CPU, kernels on a CUDA GPU.

`quantize_values` is for the input of a matrix product at run time, the W4A4 path of machines without FP4
units: the result holds exactly the numbers that an FP4 tensor core would multiply, so the product that
follows has NVFP4 numerics. `quantize_packed` gives the same numbers as an FP4 tensor core reads them.
`quantize_weight` makes what is stored.
"""

import math

import torch

from vllm_scalesearch.formats import (
    BlockFormat,
    QuantizedTensor,
    finite_amax,
    format_named,
    swizzle_scales,
    tensor_scale_of,
)
from vllm_scalesearch.search import ScalePolicy, quantize, searched_rows

_LIB = torch.library.Library("vllm_scalesearch", "FRAGMENT")
_LIB.define("quantize_values(Tensor x, str format, str policy) -> (Tensor, Tensor)")
_LIB.define(
    "quantize_packed(Tensor x, str format, str policy) -> "
    "(Tensor packed, Tensor swizzled_scales, Tensor row_scale)"
)


def quantize_values(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows with a searched scale per block and one tensor scale per row.

    x: (..., K) bf16 or fp16. format: ``nvfp4`` or ``mxfp4``. policy: rule of a `ScalePolicy`.
    Returns values (..., K) in x's dtype and residual (..., 1) fp32; ``values * residual`` is the
    quantized input (`QuantizedTensor.values`). Opaque to torch.compile, so that no compiler fuses
    the search into arithmetic that rounds otherwise than the reference.
    """
    return torch.ops.vllm_scalesearch.quantize_values(x, format, policy)


def quantize_packed(
    x: torch.Tensor, format: str, policy: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize rows as `quantize_values` does, into what a block-scaled FP4 MMA reads.

    x: (..., K) bf16 or fp16, R rows in all. format: ``nvfp4`` or ``mxfp4``. policy: rule of a
    `ScalePolicy`. Returns packed (R, K // 2) uint8; the block scales (R, K // block) as the padded 128x4
    tiles of `swizzle_scales`, in the format's scale dtype; and row_scale (R, 1) fp32, the tensor scale of
    each row, 1 for mxfp4. Opaque to torch.compile, like `quantize_values`.
    Raises ValueError for an unknown format or policy and a K of incomplete blocks.
    """
    return torch.ops.vllm_scalesearch.quantize_packed(x, format, policy)


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
    from vllm_scalesearch.ops import gpu_quantize

    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    by_row = None if tensor_scale is None or tensor_scale.dim() == 0 else tensor_scale.reshape(-1, 1)
    packed, scales, used = gpu_quantize.quantize_packed(
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
    from vllm_scalesearch.ops import gpu_quantize

    fmt = format_named(format)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    values, residual = gpu_quantize.quantize_values(rows, fmt, policy)
    return values.view(x.shape), residual.view(*x.shape[:-1], 1)


def _fake(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


_LIB.impl("quantize_values", _reference, "CPU")
_LIB.impl("quantize_values", _cuda, "CUDA")
torch.library.register_fake("vllm_scalesearch::quantize_values", _fake, lib=_LIB)


def _packed_reference(
    x: torch.Tensor, format: str, policy: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    quantized = quantize(rows, format_named(format), policy, per_row=True)
    row_scale = quantized.tensor_scale.expand(len(rows), 1).contiguous()
    return quantized.packed, swizzle_scales(quantized.scales), row_scale


def _packed_cuda(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vllm_scalesearch.ops import gpu_quantize

    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    packed, scales, row_scale = gpu_quantize.quantize_packed(
        rows, format_named(format), policy, per_row=True, swizzled=True
    )
    return packed, scales, row_scale.expand(len(rows), 1).contiguous()


def _packed_fake(x: torch.Tensor, format: str, policy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    fmt = format_named(format)
    rows, width = math.prod(x.shape[:-1]), x.shape[-1]
    fmt.check_width(width, "quantize_packed")
    tiles = ((rows + 127) // 128 * 128, (width // fmt.block_size + 3) // 4 * 4)
    return (
        x.new_empty((rows, width // 2), dtype=torch.uint8),
        x.new_empty(tiles, dtype=fmt.scale_dtype),
        x.new_empty((rows, 1), dtype=torch.float32),
    )


_LIB.impl("quantize_packed", _packed_reference, "CPU")
_LIB.impl("quantize_packed", _packed_cuda, "CUDA")
torch.library.register_fake("vllm_scalesearch::quantize_packed", _packed_fake, lib=_LIB)
