"""Which quantizer kernel runs on a CUDA GPU: the one that was measured faster (benchmarks/NOTES.md).

`cuda_quantize` finds the winners in packed half precision and is up to twice as fast where there is much to
search; `triton_quantize` knows every format, policy and dtype and starts sooner.
"""

import torch

from vllm_scalesearch.formats import NVFP4, BlockFormat
from vllm_scalesearch.ops import cuda_quantize, triton_quantize
from vllm_scalesearch.search import ScalePolicy

# Values; the smallest size measured at which the CUDA kernel is not behind is some half a million.
_LARGE = 1 << 22


def uses_cuda_kernel(x: torch.Tensor, fmt: BlockFormat, policy: ScalePolicy | str) -> bool:
    """Whether kernels/quantize_nvfp4.cu takes x (R, K), rather than Triton."""
    policy = ScalePolicy.of(policy)
    offsets = policy.offsets(fmt)
    return (
        fmt is NVFP4
        and policy.metric == "mse"
        and offsets is not None
        and 1 < len(offsets) <= cuda_quantize.MAX_CANDIDATES
        and max(map(abs, offsets)) <= 8  # beyond, it has the slow search only
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.numel() >= _LARGE
    )


def quantize_packed(
    x: torch.Tensor,
    fmt: BlockFormat,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None = None,
    per_row: bool = False,
    swizzled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_quantize.quantize_packed`, by the faster kernel."""
    if not uses_cuda_kernel(x, fmt, policy):
        return triton_quantize.quantize_packed(x, fmt, policy, tensor_scale, per_row, swizzled)
    if tensor_scale is None and not per_row:
        tensor_scale = triton_quantize.tensor_scale(x)
    return cuda_quantize.quantize_packed(x, policy, tensor_scale, per_row, swizzled)


def quantize_values(
    x: torch.Tensor, fmt: BlockFormat, policy: ScalePolicy | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_quantize.quantize_values`, by the faster kernel."""
    if not uses_cuda_kernel(x, fmt, policy):
        return triton_quantize.quantize_values(x, fmt, policy)
    return cuda_quantize.quantize_values(x, policy)
