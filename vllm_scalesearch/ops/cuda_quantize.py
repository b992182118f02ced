"""NVFP4 with searched block scales as one CUDA kernel, kernels/quantize_nvfp4.cu: the bits of search.py.

For bf16 and fp16 on any GPU from sm_80 on, metric ``mse`` and policies made of at most 16 offsets. Nothing
here waits for the device, and all of it can be captured in a CUDA graph after a first call, which compiles.
"""

import functools
from dataclasses import dataclass

import torch

from vllm_scalesearch.cuda_kernels import kernel
from vllm_scalesearch.formats import NVFP4, finite_amax, tensor_scale_of
from vllm_scalesearch.search import ScalePolicy

MAX_CANDIDATES = 16

# Where the kernel has the tensor scale from.
TENSOR, ROW, COMPUTED = 0, 1, 2

_DTYPES = (torch.bfloat16, torch.float16)
_THREADS = 256
_LONGEST_SHARE = 2048  # blocks of a row: eight a thread, so that those left to the exact search fill warps
_RESIDENT = 4  # thread blocks that a multiprocessor holds at a time
_RESIDENT_ABSMAX = 8  # where there is nothing to search
_HEADER_BYTES = 640
_THREAD_BYTES = 96  # queues, and copies of two blocks


def offsets_of(policy: ScalePolicy | str) -> tuple[int, ...]:
    """Candidates as offsets from the absmax code. Raises ValueError for what this kernel does not know."""
    policy = ScalePolicy.of(policy)
    offsets = policy.offsets(NVFP4)
    if policy.metric != "mse":
        raise ValueError(f"the CUDA quantizer minimises 'mse', not {policy.metric!r}")
    if offsets is None or len(offsets) > MAX_CANDIDATES:
        raise ValueError(
            f"the CUDA quantizer tries at most {MAX_CANDIDATES} offsets, not policy {policy.rule!r}"
        )
    return offsets


def defines(
    offsets: tuple[int, ...], dtype: torch.dtype, scale: int, threads: int, *,
    packed: bool, swizzled: bool = False, values: bool = False, flat: bool = False,
) -> tuple[str, ...]:  # fmt: skip
    """Macros of the kernel. scale: TENSOR, ROW or COMPUTED. flat: TENSOR, and one row only."""
    return (
        f"HALF={int(dtype == torch.float16)}", f"COUNT={len(offsets)}",
        f"OFFSETS={','.join(map(str, offsets))}",
        f"LOWEST={offsets[0]}", f"HIGHEST={offsets[-1]}", f"SCALE={scale}", f"FLAT={int(flat)}",
        f"PACKED={(1 + swizzled) * packed}", f"VALUES={int(values)}", f"THREADS={threads}",
    )  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How blocks are dealt out to `grid` thread blocks of `threads`: in turns, or `share` of a row to each."""

    threads: int
    share: int
    grid: tuple[int, int, int]


@functools.cache
def plan(rows: int, blocks: int, scale: int, processors: int, candidates: int) -> Plan:
    """The plan for rows of `blocks` blocks. processors: the GPU's multiprocessors. candidates: of a block."""
    fill = processors * (_RESIDENT if candidates > 1 else _RESIDENT_ABSMAX)
    if scale == TENSOR:
        # A search empties its queues at a thread block's end: one wave of blocks has the fewest part-full ones.
        waves = 1 if candidates > 1 else 4
        return Plan(_THREADS, 0, (min(-(-rows * blocks // _THREADS), waves * fill), 1, 1))
    threads = next((threads for threads in (64, 128) if blocks <= threads), _THREADS)
    parts = max(min(-(-blocks // threads), fill // rows), -(-blocks // _LONGEST_SHARE), 1)
    rounds = -(-blocks // (parts * threads))
    share = rounds * threads
    return Plan(threads, share, (rows, -(-blocks // share), 1))


def table_bytes(offsets: tuple[int, ...]) -> int:
    """What the packed search looks up for these candidates; see nvfp4_search.cuh."""
    packed_search = len(offsets) > 1 and offsets[0] >= -8 and offsets[-1] <= 8
    table_rows = 8 + max(offsets[-1], 0) if packed_search else 0
    return table_rows * ((len(offsets) + 1) // 2 | 1) * 16


def shared_bytes(offsets: tuple[int, ...], threads: int) -> int:
    """Dynamic shared memory of a thread block; see the kernel."""
    if len(offsets) == 1:
        return _HEADER_BYTES
    table = table_bytes(offsets)
    return _HEADER_BYTES + (128 * 8 + 128 + 3 * table if table else 0) + threads * _THREAD_BYTES


def _run(
    x: torch.Tensor,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None,
    *,
    packed: bool = False,
    swizzled: bool = False,
    values: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """(packed, scales, tensor scale, values, residual) of x's rows; None for what is not computed."""
    offsets = offsets_of(policy)
    if x.dtype not in _DTYPES:
        raise ValueError(f"quantize: expected bf16 or fp16, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"quantize: expected two dimensions, got shape {tuple(x.shape)}")
    if not x.is_cuda:
        raise ValueError(f"quantize: expected a CUDA tensor, got one on {x.device}")
    rows, width = x.shape
    NVFP4.check_width(width, "quantize")
    blocks = width // NVFP4.block_size
    if rows * blocks >= 2**31 - 2**20 or width >= 2**31:  # a whole grid further is still an int
        raise ValueError(f"quantize: {tuple(x.shape)} are too many values for one call")
    scale = COMPUTED
    if tensor_scale is not None:
        if tensor_scale.dtype != torch.float32 or tensor_scale.shape not in ((), (1,), (rows, 1)):
            raise ValueError(
                f"quantize: expected an fp32 tensor scale, a scalar or ({rows}, 1), got "
                f"{tuple(tensor_scale.shape)}, {tensor_scale.dtype}"
            )
        scale = ROW if tensor_scale.dim() == 2 else TENSOR
        tensor_scale = tensor_scale.contiguous()
    if x.stride(1) != 1 or x.stride(0) % 8 or not 0 <= x.stride(0) < 2**31 or x.data_ptr() % 16:
        x = x.contiguous()

    codes = scales = dequantized = residual = None
    if packed:
        codes = x.new_empty(rows, width // 2, dtype=torch.uint8)
        padded = (-(-rows // 128) * 128, -(-blocks // 4) * 4) if swizzled else (rows, blocks)
        new = x.new_empty if padded == (rows, blocks) else x.new_zeros  # what pads is zero
        scales = new(padded, dtype=torch.uint8)
    if scale == COMPUTED:
        tensor_scale = x.new_empty(rows, 1, dtype=torch.float32)
    if values:
        dequantized = x.new_empty(rows, width)
        residual = x.new_empty(tensor_scale.shape, dtype=torch.float32)
    if rows and width:
        flat = scale == TENSOR and not swizzled and x.is_contiguous()
        if flat:
            rows, blocks = 1, rows * blocks
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
        chosen = plan(rows, blocks, scale, processors, len(offsets))
        macros = defines(
            offsets, x.dtype, scale, chosen.threads, packed=packed, swizzled=swizzled, values=values, flat=flat
        )
        run = kernel("quantize_nvfp4.cu", "quantize_nvfp4", macros, x.device)
        run(
            chosen.grid, chosen.threads, shared_bytes(offsets, chosen.threads),
            x, tensor_scale, codes, scales, dequantized, residual, x.stride(0), rows, blocks, chosen.share,
        )  # fmt: skip
    if packed:
        scales = scales.view(NVFP4.scale_dtype)
    return codes, scales, tensor_scale, dequantized, residual


def quantize_packed(
    x: torch.Tensor,
    policy: ScalePolicy | str,
    tensor_scale: torch.Tensor | None = None,
    per_row: bool = False,
    swizzled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed codes and block scales, as `search.quantize` gives them.

    x: (R, K) bf16 or fp16 on the GPU, K a multiple of 16. tensor_scale: fp32, a scalar or (R, 1), at least
    2**-126; None: computed, for each row (by the same launch) if `per_row`, or else for all (by a pass before).
    Returns packed (R, K // 2) uint8; scales (R, K // 16) float8_e4m3fn, or if `swizzled` the padded tiles
    of `swizzle_scales`; and the tensor scale, fp32, a scalar or (R, 1).
    Raises ValueError for other shapes, dtypes, devices and policies, and KernelBuildError.
    """
    if tensor_scale is None and not per_row:
        offsets_of(policy)
        tensor_scale = tensor_scale_of(finite_amax(x))
    codes, scales, tensor_scale, _, _ = _run(x, policy, tensor_scale, packed=True, swizzled=swizzled)
    return codes, scales, tensor_scale


def quantize_values(x: torch.Tensor, policy: ScalePolicy | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized rows, each with its own tensor scale: what ops/quantize.py defines.

    x: (R, K) bf16 or fp16 on the GPU, K a multiple of 16. Returns values (R, K) in x's dtype and residual
    (R, 1) fp32. Raises ValueError for other shapes, dtypes, devices and policies, and KernelBuildError.
    """
    _, _, _, values, residual = _run(x, policy, None, values=True)
    return values, residual
