"""Products of few rows with NVFP4 weights on GPUs without FP4 units: kernels/w4a16_decode.cu.

The kernel streams the copy of the weights that vLLM's own kernels for larger products keep, so one copy
serves all: Humming's on Hopper and Marlin's elsewhere (humming-kernels 0.1.17, vLLM 0.32.0). With N
outputs, a multiple of 64, and K inputs, of 32:

* codes, int32 (K / 16, 2 N): the code of output n and input k lies in row k // 16, in word
  ``n // 64 * 128 + (n % 8 * 4 + k % 8 // 2) * 4 + n % 64 // 16`` of it and there in nibble
  ``k % 2 * 4 + n // 8 % 2 * 2 + k // 8 % 2``;
* scales, 8 bits (K / 16, N): the scale of output n and block k // 16 lies in column
  ``n // 64 * 64 + n % 8 * 8 + n % 64 // 8`` of row k // 16.
"""

import functools
from dataclasses import dataclass

import torch

from vllm_scalesearch.cuda_kernels import Kernel, kernel
from vllm_scalesearch.formats import QuantizedTensor
from vllm_scalesearch.ops.w4a16_plan import INPUT_STEP, MAX_ROWS, OUTPUT_TILE, Plan, plan

# A piece's dequantized values should stay in the L2, but cuBLAS wants some width.
_PIECE_BYTES, _PIECE_OUTPUTS = 24 << 20, 2048

# How a kernel reads scale bytes.
E4M3 = 0  # codes of 8 and more, or blocks of zeros: what nearly every tensor has
E4M3_SUBNORMAL = 1  # any codes
MARLIN = 2  # bits 14 to 7 of fp16(scale * f * 2^7), f a power of two; two columns of each four swapped

# Blocks that share a tile without a cluster meet in memory that no other stream may use meanwhile.
_STREAMS = 4


@dataclass(frozen=True)
class TiledWeight:
    """NVFP4 weights (outputs, inputs) in the layout of this module, padded with zeros.

    codes: int32 (padded inputs / 16, 2 * padded outputs). scales: 8 bits (padded inputs / 16, padded
    outputs). tensor_scale: fp32, one element. encoding: E4M3, E4M3_SUBNORMAL or MARLIN. factor: what
    tensor_scale has to be multiplied by to be the weights' own, E4M3 scales given as they are.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    encoding: int
    factor: float
    outputs: int
    inputs: int

    @property
    def multiplier(self) -> float:
        """What the kernels' products still have to be multiplied by, besides tensor_scale."""
        # They make their floats 2^7 too small; Marlin's tensor scale has that in it.
        return self.factor if self.encoding == MARLIN else self.factor * 2.0**7

    @property
    def padded_outputs(self) -> int:
        return self.codes.shape[1] // 2

    @property
    def padded_inputs(self) -> int:
        return self.codes.shape[0] * 16


def scale_encoding(weight: QuantizedTensor) -> int:
    """E4M3, or E4M3_SUBNORMAL when a block that is not all zeros has a subnormal scale. Waits for
    the device."""
    codes = weight.scales.view(torch.uint8)
    magnitudes = weight.packed & 0x77
    filled = magnitudes.unflatten(-1, (-1, weight.format.block_size // 2)).any(dim=-1)
    return E4M3_SUBNORMAL if bool(((codes < 8) & filled).any()) else E4M3


def dense_rows(outputs: int, inputs: int, marlin: bool) -> int:
    """From how many rows on dequantizing the weights for cuBLAS costs less than what Marlin's or Humming's
    kernel is slower than it on Hopper; with Humming interpolated between multiples of 1024 rows
    (benchmarks/NOTES.md).
    """
    if marlin:
        return 1024
    return 1792 if outputs * inputs <= 64 << 20 else 2560


class _Workspaces:
    """Sums of blocks that share a tile without a cluster: floats, and a zero for each tile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._floats = 0
        self._used: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spare: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._retired: list[tuple[torch.Tensor, torch.Tensor]] = []  # captured graphs still write there

    def _new(self) -> tuple[torch.Tensor, torch.Tensor]:
        # vLLM makes 16 bits the default dtype while it loads a model.
        sums = torch.empty(self._floats, dtype=torch.float32, device=self._device)
        return sums, torch.zeros(1024, dtype=torch.int32, device=self._device)

    def reserve(self, floats: int) -> None:
        """Make room for `floats` sums on `_STREAMS` streams."""
        if self._floats < floats:
            self._floats = floats
            self._retired += [*self._used.values(), *self._spare]
            self._used.clear()
            self._spare = [self._new() for _ in range(_STREAMS)]

    def of(self, stream: torch.cuda.Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream's own. Raises RuntimeError when a graph is captured on one stream too many."""
        if stream.cuda_stream not in self._used:
            if not self._spare and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"w4a16: decode products were captured on more than {_STREAMS} streams; run one "
                    "on this stream before the capture"
                )
            self._used[stream.cuda_stream] = self._spare.pop() if self._spare else self._new()
        return self._used[stream.cuda_stream]


@functools.cache
def _workspaces(device: torch.device) -> _Workspaces:
    return _Workspaces(device)


def _plan_for(rows: int, weight: TiledWeight) -> Plan:
    device = torch.cuda.get_device_properties(weight.codes.device)
    return plan(
        rows, weight.padded_outputs, weight.padded_inputs, device.multi_processor_count,
        device.shared_memory_per_block_optin, device.major >= 9,
    )  # fmt: skip


def _kernel_for(plan: Plan, weight: TiledWeight, dtype: torch.dtype) -> Kernel:
    defines = plan.defines(dtype, weight.encoding)
    return kernel("w4a16_decode.cu", "w4a16_decode", defines, weight.codes.device)


def _tiles(plan: Plan, weight: TiledWeight) -> int:
    return -(-weight.padded_outputs // (OUTPUT_TILE * plan.groups))


def _sums_needed(plan: Plan, weight: TiledWeight) -> int:
    if plan.cluster or plan.splits == 1:
        return 0
    return _tiles(plan, weight) * plan.splits * OUTPUT_TILE * plan.groups * plan.tokens


def prepare(weight: TiledWeight, dtype: torch.dtype) -> None:
    """Compile and load what `product` will run for this weight, and reserve its memory.

    Call it for every weight before a CUDA graph is captured. Raises KernelBuildError.
    """
    for rows in range(8, MAX_ROWS + 1, 8):
        chosen = _plan_for(rows, weight)
        _kernel_for(chosen, weight, dtype)
        _workspaces(weight.codes.device).reserve(_sums_needed(chosen, weight))


def product(
    x: torch.Tensor,
    weight: TiledWeight,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    cut: Plan | None = None,
) -> torch.Tensor:
    """``x @ W.T * row_scale + bias``: fp32 up to one rounding at the end, the same bits at every run.

    x: (M, K) bf16 or fp16 on the GPU, M at most `MAX_ROWS`. bias: (N,) in x's dtype. row_scale: fp32,
    M values. cut: instead of what `plan` says, to measure others. Returns (M, N) in x's dtype. Raises
    ValueError for other shapes and dtypes.
    """
    if x.dim() != 2 or x.shape[1] != weight.inputs or not 0 < x.shape[0] <= MAX_ROWS:
        raise ValueError(f"w4a16: expected x of 1 to {MAX_ROWS} rows by {weight.inputs}, got {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"w4a16: expected bf16 or fp16 activations, got {x.dtype}")
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)  # the kernel copies 16 aligned bytes at a time
    rows = x.shape[0]
    chosen = cut or _plan_for(rows, weight)
    if chosen.tokens < rows:
        raise ValueError(f"w4a16: a plan for {chosen.tokens} rows at most, got {rows}")
    run = _kernel_for(chosen, weight, x.dtype)
    out = x.new_empty(rows, weight.outputs)
    needed = _sums_needed(chosen, weight)
    sums = arrived = None
    if needed:
        workspaces = _workspaces(x.device)
        workspaces.reserve(needed)
        sums, arrived = workspaces.of(torch.cuda.current_stream(x.device))
    run(
        (_tiles(chosen, weight), chosen.splits, 1), chosen.threads, chosen.shared_bytes,
        x, weight.codes, weight.scales, weight.tensor_scale, bias, row_scale, out, sums, arrived,
        weight.multiplier, rows, weight.outputs, weight.inputs, x.stride(0), weight.padded_outputs,
        weight.padded_inputs, -(-weight.padded_inputs // INPUT_STEP // chosen.splits),
        cluster=chosen.cluster, early=torch.cuda.get_device_capability(x.device)[0] >= 9,
    )  # fmt: skip
    return out


def dequantize(
    weight: TiledWeight, dtype: torch.dtype, first: int = 0, last: int | None = None
) -> torch.Tensor:
    """Rows `first` to `last` (multiples of 64, or the end) as dense values, (last - first, K) in `dtype`.

    The weights are these values times `multiplier` and the tensor scale; no rounding takes place.
    """
    last = weight.outputs if last is None else last
    out = torch.empty(last - first, weight.inputs, dtype=dtype, device=weight.codes.device)
    defines = (f"HALF={int(dtype == torch.float16)}", f"SCALES={weight.encoding}")
    run = kernel("w4a16_dequantize.cu", "w4a16_dequantize", defines, weight.codes.device)
    grid = (-(-weight.inputs // 64), -(-(last - first) // OUTPUT_TILE), 1)
    run(
        grid, 128, 64 * 144, weight.codes, weight.scales, out, weight.outputs, weight.inputs,
        weight.padded_outputs, weight.padded_inputs, first // OUTPUT_TILE,
    )  # fmt: skip
    return out


def dense_product(
    x: torch.Tensor,
    weight: TiledWeight,
    alpha: float,
    bias: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ W.T * row_scale + bias`` for many rows: pieces of the weights dequantized, then cuBLAS.

    x: (M, K) bf16 or fp16. alpha: ``multiplier * tensor_scale`` as a number. bias, row_scale: as in
    `product`. Rounds to x's dtype after the product and, where there is one, after bias and row_scale.
    """
    out = x.new_empty(x.shape[0], weight.outputs)
    step = max(_PIECE_OUTPUTS, _PIECE_BYTES // (2 * weight.inputs) // OUTPUT_TILE * OUTPUT_TILE)
    for first in range(0, weight.outputs, step):
        last = min(first + step, weight.outputs)
        part = out[:, first:last]
        torch.addmm(part, x, dequantize(weight, x.dtype, first, last).t(), beta=0, alpha=alpha, out=part)
    if row_scale is not None:
        scaled = out.float() * row_scale
        out = (scaled if bias is None else scaled + bias).to(x.dtype)
    elif bias is not None:
        out += bias
    return out
