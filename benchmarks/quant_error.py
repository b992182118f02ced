"""Normalised error of NVFP4 and MXFP4 under each scale policy.

    python benchmarks/quant_error.py [--model DIR] [--best-sets]

On a million values each of four distributions and on every kind of linear layer of a model
(SmolLM2-135M-Instruct; its weights come from a Q4_1 GGUF, so they were rounded to another 4-bit grid
before). Everything is computed by the reference in vllm_scalesearch/search.py.
"""

import argparse
import itertools
from collections import defaultdict
from pathlib import Path

import report
import torch
from safetensors import safe_open
from tqdm import tqdm

from vllm_scalesearch import smollm2
from vllm_scalesearch.formats import MXFP4, NVFP4, BlockFormat, finite_amax, tensor_scale_of
from vllm_scalesearch.search import quantize

POLICIES = {
    NVFP4.name: ("absmax", "4over6", "fast", "paper", "exact", "full"),
    MXFP4.name: ("absmax", "paper", "exact"),
}
SHAPE = (1024, 1024)


def distributions() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "normal": torch.randn(SHAPE),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample(SHAPE),
        "student-t, 5 degrees": torch.distributions.StudentT(5.0).sample(SHAPE),
        "uniform": torch.rand(SHAPE) * 2 - 1,
    }


def block_errors(x: torch.Tensor, fmt: BlockFormat, policy: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error of each block (fp64) and its scale code."""
    quantized = quantize(x, fmt, policy)
    error = (x.double() - quantized.dequantize().double()).square()
    return error.view(-1, fmt.block_size).sum(-1), quantized.scales.view(torch.uint8).flatten()


def measure(tensors: list[torch.Tensor], fmt: BlockFormat, progress: tqdm) -> dict[str, float]:
    """Normalised error of several tensors together, by policy; and where `exact` is not the optimum."""
    error: dict[str, float] = defaultdict(float)
    norm = 0.0
    missed = missed_elsewhere = 0
    for x in tensors:
        norm += x.double().square().sum().item()
        blocks = {}
        for policy in POLICIES[fmt.name]:
            blocks[policy], codes = block_errors(x, fmt, policy)
            error[policy] += blocks[policy].sum().item()
            if policy == "absmax":
                # Where a candidate of the window would be clamped or subnormal the proof does not hold.
                covered = (codes >= 8 + 3) & (codes.int() + 7 <= fmt.max_code)
            progress.update()
        if "full" in blocks:
            # Errors of the search itself are fp32; in fp64 two candidates may differ by its rounding.
            worse = blocks["exact"] > blocks["full"] * (1 + 1e-5)
            missed += worse.sum().item()
            missed_elsewhere += (worse & covered).sum().item()
    found = {policy: value / norm for policy, value in error.items()}
    if fmt is NVFP4:
        found["blocks where full beats exact"] = missed
        found["of these, none clamped or subnormal"] = missed_elsewhere
    return found


def layer_kinds(model: Path) -> dict[str, list[torch.Tensor]]:
    kinds = defaultdict(list)
    with safe_open(model / "model.safetensors", "pt") as weights:
        for name in sorted(weights.keys()):
            if name.endswith("_proj.weight"):
                kinds[name.rsplit(".", 2)[-2]].append(weights.get_tensor(name))
    return dict(kinds)


def best_sets(size: int = 4) -> None:
    """The sets of offsets that leave the least error, by distribution."""
    window = range(-3, 8)
    rows = []
    for label, x in distributions().items():
        scale = tensor_scale_of(finite_amax(x))
        errors = []
        for offset in tqdm(window, desc=label, leave=False):
            quantized = quantize(x, NVFP4, f"offsets:{offset}", tensor_scale=scale)
            errors.append((x.double() - quantized.dequantize().double()).square().view(-1, 16).sum(-1))
        stacked = torch.stack(errors)
        base = stacked[window.index(0)].sum()
        ranked = sorted(
            ((1 - stacked[list(chosen)].amin(0).sum() / base).item(), [window[i] for i in chosen])
            for chosen in itertools.combinations(range(len(window)), size)
        )
        for reduction, offsets in reversed(ranked[-2:]):
            rows.append([label, " ".join(f"{offset:+d}" for offset in offsets), f"{reduction:.1%}"])
    report.table(["data", f"best {size} offsets", "less than absmax"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a bf16 folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--best-sets", action="store_true", help="only rank sets of four offsets")
    args = parser.parse_args()
    if args.best_sets:
        best_sets()
        return
    sources = {label: [x] for label, x in distributions().items()}
    sources |= layer_kinds(args.model or smollm2.fetch())
    results: dict[str, dict[str, dict[str, float]]] = {}
    for fmt in (NVFP4, MXFP4):
        policies = POLICIES[fmt.name]
        total = len(policies) * sum(map(len, sources.values()))
        with tqdm(total=total, desc=fmt.name, unit="tensor") as progress:
            results[fmt.name] = {label: measure(xs, fmt, progress) for label, xs in sources.items()}
        rows = []
        for label, found in results[fmt.name].items():
            cells = [f"{found['absmax']:.5f}"]
            cells += [
                f"{found[policy]:.5f} ({found[policy] / found['absmax'] - 1:+.1%})" for policy in policies[1:]
            ]
            if fmt is NVFP4:
                missed, elsewhere = list(found.values())[-2:]
                cells.append(f"{missed:.0f} / {elsewhere:.0f}")
            rows.append([label, *cells])
        extra = ["full beats exact: blocks / not clamped"] if fmt is NVFP4 else []
        print()
        report.table([f"{fmt.name}, error / norm", *policies, *extra], rows)
    report.write("quant_error", results)


if __name__ == "__main__":
    main()
