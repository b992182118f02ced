"""What a checkpoint's NVFP4 weights look like, layer by layer, and what quantization did to them.

Reads compressed-tensors' `nvfp4-pack-quantized` (weight_packed, weight_scale, weight_global_scale) and
ModelOpt's NVFP4 (weight, weight_scale, weight_scale_2), whoever wrote them, one layer at a time.

Given the original, every block's scale code is compared with the one that its maximum would have given under
the same tensor scale (`offsets`), and the layer's error with that of `absmax` under a tensor scale of the
matrix's own. Errors are squared and over the squared norm of the original. A calibrated method (`wmse`,
`hessian`, GPTQ) lowers the error of the layer's output and may raise this one.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_scalesearch.formats import (
    NVFP4,
    QuantizedTensor,
    decode_e2m1,
    finite_amax,
    tensor_scale_of,
    unpack_e2m1,
)
from vllm_scalesearch.search import quantize

# Elements beyond it would round up, had E2M1 a next value: 7 lies between 6 and 8.
SATURATES = 7.0
# Above it a matrix is no approximation of the other: permuted, rotated, or of another model.
UNRELATED = 0.5
# Spread (standard deviation of the logarithm) of fitted channel scales from which they count as folded in.
# Rounding alone gives up to 0.06 on SmolLM2-135M, by GPTQ and by a Hessian search.
_FOLDED = 0.1


@dataclass(frozen=True)
class LayerReport:
    """One quantized matrix. Shares are of its blocks; what needs the original is None without it.

    shape: (N, K). tensor_scale: fp32 as a number.
    elements: how often each magnitude of E2M1 is stored, by its code 0..7.
    scale_codes: how many blocks have each E4M3 scale code.
    zero: blocks whose elements are all zero.
    largest_scale: blocks whose scale is 448, the format's largest.
    error, absmax_error: squared error over the original's squared norm, as stored and by `absmax`.
    offsets: how many blocks have a scale so many codes from the one their maximum gives.
    saturated: blocks with a value that the scale clips (beyond 7 of it, where 6 is the largest element).
    rescaled: whether scales of channels were folded in, so that the original was scaled to compare.
    """

    name: str
    shape: tuple[int, int]
    tensor_scale: float
    elements: tuple[int, ...]
    scale_codes: dict[int, int]
    zero: float
    largest_scale: float
    error: float | None = None
    absmax_error: float | None = None
    offsets: dict[int, int] = field(default_factory=dict)
    saturated: float | None = None
    rescaled: bool = False

    @property
    def blocks(self) -> int:
        return self.shape[0] * self.shape[1] // NVFP4.block_size

    @property
    def ratio(self) -> float | None:
        """The stored error over that of `absmax`; None without the original, or where `absmax` leaves none."""
        return self.error / self.absmax_error if self.absmax_error else None

    @property
    def unrelated(self) -> bool:
        """Whether the original is not what was quantized."""
        return self.error is not None and self.error > UNRELATED


class Tensors:
    """The tensors of a folder's safetensors files by name, read when they are asked for.

    Raises ValueError for a folder without such files, and for a file that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: there are no *.safetensors files; expected a checkpoint's folder")
        for path in paths:
            for name in _keys(path):
                self.files.setdefault(name, path)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises ValueError for none of that name."""
        if name not in self.files:
            raise ValueError(f"{self.folder}: there is no tensor {name}")
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch or write it again") from None


# By the suffix of the codes: those of block scales and tensor scale, and whether that one is stored inverted.
_LAYOUTS = {
    "weight_packed": ("weight_scale", "weight_global_scale", True),
    "weight": ("weight_scale", "weight_scale_2", False),
}


def layer_names(tensors: Tensors) -> list[str]:
    """Names of the NVFP4 matrices of a checkpoint, without the suffix, in order of their numbers.

    Raises ValueError when there are none.
    """
    found = []
    for name in tensors:
        base, _, suffix = name.rpartition(".")
        if suffix in _LAYOUTS and all(f"{base}.{part}" in tensors for part in _LAYOUTS[suffix][:2]):
            found.append(base)
    if not found:
        raise ValueError(
            f"{tensors.folder}: no NVFP4 weights; expected compressed-tensors' weight_packed, weight_scale and "
            "weight_global_scale, or ModelOpt's weight, weight_scale and weight_scale_2"
        )
    return sorted(found, key=_numbered)


def _numbered(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def read_layer(tensors: Tensors, name: str) -> QuantizedTensor:
    """The stored matrix (N, K). Raises ValueError for shapes and dtypes that are not NVFP4's."""
    suffix = "weight_packed" if f"{name}.weight_packed" in tensors else "weight"
    scale_name, tensor_scale_name, inverted = _LAYOUTS[suffix]
    packed, scales = tensors.read(f"{name}.{suffix}"), tensors.read(f"{name}.{scale_name}")
    tensor_scale = tensors.read(f"{name}.{tensor_scale_name}").float()
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"{name}.{suffix}: expected a uint8 matrix of packed codes, got {got}")
    expected = (packed.shape[0], 2 * packed.shape[1] // NVFP4.block_size)
    if scales.dtype != torch.float8_e4m3fn or tuple(scales.shape) != expected:
        raise ValueError(
            f"{name}.{scale_name}: expected float8_e4m3fn {expected}, got {scales.dtype} {tuple(scales.shape)}"
        )
    if tensor_scale.numel() != 1 or not (torch.isfinite(tensor_scale) & (tensor_scale > 0)).all():
        got = tensor_scale.flatten().tolist()[:4]
        raise ValueError(f"{name}.{tensor_scale_name}: expected one positive number, got {got}")
    tensor_scale = tensor_scale.reshape(())
    return QuantizedTensor(packed, scales, 1.0 / tensor_scale if inverted else tensor_scale, NVFP4)


def inspect_layer(name: str, stored: QuantizedTensor, original: torch.Tensor | None = None) -> LayerReport:
    """Counts and errors of one matrix.

    stored: (N, K) NVFP4. original: (N, K) bf16, fp16 or fp32, what it was made from.
    Raises ValueError for an original of another shape.
    """
    codes = unpack_e2m1(stored.packed)
    shape = tuple(codes.shape)
    magnitudes = codes & 7
    scale_codes = stored.scales.view(torch.uint8)
    by_block = magnitudes.view(*scale_codes.shape, NVFP4.block_size)
    report = dict(
        name=name,
        shape=shape,
        tensor_scale=stored.tensor_scale.item(),
        elements=tuple(torch.bincount(magnitudes.flatten().int(), minlength=8).tolist()),
        scale_codes=_counts(scale_codes.int()),
        zero=(by_block.amax(-1) == 0).float().mean().item(),
        largest_scale=(scale_codes == NVFP4.max_code).float().mean().item(),
    )
    if original is None:
        return LayerReport(**report)
    if tuple(original.shape) != shape:
        raise ValueError(
            f"{name}: the original is {tuple(original.shape)} where the checkpoint has {shape}; "
            "--against names the model that it was made from"
        )
    dequantized = stored.dequantize()
    original, rescaled = unfolded(dequantized, original.float())
    blocks = original.view(*scale_codes.shape, NVFP4.block_size)
    amax = blocks.abs().amax(-1)
    absmax_codes = NVFP4.absmax_codes(amax / stored.tensor_scale).clamp(NVFP4.min_code, NVFP4.max_code)
    scales = NVFP4.decode_scales(scale_codes) * stored.tensor_scale
    by_absmax = quantize(original, NVFP4, "absmax", tensor_scale=tensor_scale_of(finite_amax(original)))
    norm = original.double().square().sum()
    return LayerReport(
        **report,
        error=_relative(dequantized - original, norm),
        absmax_error=_relative(by_absmax.dequantize() - original, norm),
        # An all-zero block fits every scale, so its offset says nothing.
        offsets=_counts((scale_codes.int() - absmax_codes)[amax > 0]),
        saturated=(amax > SATURATES * scales).float().mean().item(),
        rescaled=rescaled,
    )


def unfolded(stored: torch.Tensor, original: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The original with the channel scales that were folded into it, and whether there are any.

    stored, original: (N, K) fp32. Scales of rows and of columns are fitted by least squares, in turns; where
    they hardly differ from each other, or leave the matrices unrelated, the original is returned as it is.
    """
    rows = torch.ones(original.shape[0], 1)
    for _ in range(3):
        columns = _fit(stored, original * rows, 0)
        rows = _fit(stored, original * columns, 1)
    scaled = original * rows * columns
    folded = any(_spread(scales) > _FOLDED for scales in (rows, columns))
    related = (stored - scaled).square().sum() < UNRELATED * scaled.square().sum()
    return (scaled, True) if folded and related else (original, False)


def _fit(stored: torch.Tensor, original: torch.Tensor, dim: int) -> torch.Tensor:
    """Scales along `dim` that make `original` nearest to `stored`; 1 where it is zero."""
    norm = original.square().sum(dim, keepdim=True)
    return torch.where(norm > 0, (stored * original).sum(dim, keepdim=True) / norm.clamp(min=1e-30), 1)


def _spread(scales: torch.Tensor) -> float:
    return scales.clamp(min=1e-6).log().std().item() if scales.numel() > 1 else 0.0


def _relative(deviation: torch.Tensor, norm: torch.Tensor) -> float:
    return (deviation.double().square().sum() / norm).item() if norm > 0 else 0.0


def _counts(values: torch.Tensor) -> dict[int, int]:
    found, counts = values.unique(return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def inspect(folder: Path, against: Path | None = None) -> Iterator[LayerReport]:
    """A report of every NVFP4 matrix in a folder, one in memory at a time.

    against: folder of the model that it was made from, in 16 or 32 bits.
    Raises ValueError for folders and tensors that are not what they should be.
    """
    tensors = Tensors(folder)
    originals = None if against is None else Tensors(against)
    for name in layer_names(tensors):
        original = None
        if originals is not None:
            if f"{name}.weight" not in originals:
                raise ValueError(
                    f"--against {against}: there is no tensor {name}.weight; it is not the model that {folder} "
                    "was made from, or names its layers otherwise"
                )
            original = originals.read(f"{name}.weight")
            if not original.dtype.is_floating_point or original.element_size() < 2:
                raise ValueError(
                    f"--against {against}: {name}.weight is {original.dtype}; expected a model in 16 or 32 bits"
                )
        yield inspect_layer(name, read_layer(tensors, name), original)


def kind_of(name: str) -> str:
    """The last component of a layer's name, which layers of the same place share (``q_proj``)."""
    return name.rpartition(".")[2]


def mean_error(reports: list[LayerReport], attribute: str = "error") -> float:
    """Mean over matrices of `attribute`, which none of them lacks."""
    return sum(getattr(report, attribute) for report in reports) / len(reports)


def total_offsets(reports: list[LayerReport]) -> Counter:
    """Blocks by offset, over several matrices."""
    total: Counter = Counter()
    for report in reports:
        total.update(report.offsets)
    return total


def share(reports: list[LayerReport], attribute: str) -> float:
    """Share of the blocks of several matrices that `attribute` gives of each."""
    blocks = sum(report.blocks for report in reports)
    return sum(getattr(report, attribute) * report.blocks for report in reports) / blocks


def worst(reports: list[LayerReport], count: int = 10) -> list[LayerReport]:
    """The matrices with the largest stored error, the worst first."""
    return sorted(reports, key=lambda report: report.error, reverse=True)[:count]


def element_share(reports: list[LayerReport]) -> list[tuple[float, float]]:
    """(magnitude, share of all elements) for the eight magnitudes of E2M1."""
    totals = [sum(report.elements[code] for report in reports) for code in range(8)]
    values = decode_e2m1(torch.arange(8, dtype=torch.uint8)).tolist()
    return [(value, total / sum(totals)) for value, total in zip(values, totals, strict=True)]
