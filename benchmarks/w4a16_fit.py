"""The costs by which ops/w4a16_plan.py cuts up matrices of many tiles, from w4a16_cuts.json of an H100.

    python benchmarks/w4a16_fit.py

Least squares of relative errors over matrices of two tiles for each multiprocessor and more, for the cuts that
the rule chooses among. Prints the coefficients, and what the cuts that they choose take over the best of all.
Besides what the rule knows, a product takes some us whatever its cut. Needs no GPU.
"""

import json
import math

import torch
from report import RESULTS, table
from w4a16_cuts import label

from vllm_scalesearch.ops.w4a16_plan import FITS, OUTPUT_TILE, Fit, Plan, plan

PROCESSORS, SHARED_LIMIT = 132, 227 << 10


def measured(rows: int) -> list[dict]:
    lines = json.loads((RESULTS / "w4a16_cuts.json").read_text())["results"]["times"]
    return [line for line in lines if line["rows"] == rows and line["outputs"] // OUTPUT_TILE >= 2 * PROCESSORS]


def fit(tokens: int) -> Fit:
    """With two digits."""
    names, equations = list(FITS[tokens].cuts), []
    for line in measured(tokens):
        for i, (groups, warps, depth) in enumerate(names):
            cut = Plan(tokens, groups, warps, 1, False, depth)
            if label(cut) not in line["us"]:
                continue
            load, waves = cut.occupancy(line["outputs"] // OUTPUT_TILE, PROCESSORS, SHARED_LIMIT)
            own = [float(i == j) for j in range(len(names))]
            took = line["us"][label(cut)] / line["limit_us"]
            equations.append(torch.tensor([load, -1 / waves, 1 / line["limit_us"], *own]).double() / took)
    matrix = torch.stack(equations)
    found = torch.linalg.lstsq(matrix, torch.ones(len(matrix), 1).double()).solution
    load, wave, _, *own = (round(x, 2) for x in found.flatten().tolist())
    return Fit(load, wave, dict(zip(names, own, strict=True)))


def main() -> None:
    rows = []
    for tokens in FITS:
        ratios = []
        for line in measured(tokens):
            chosen = plan(tokens, line["outputs"], line["inputs"], PROCESSORS, SHARED_LIMIT, True)
            ratios.append(line["us"][label(chosen)] / min(line["us"].values()))
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append([tokens, str(fit(tokens)), f"{mean:.3f}", f"{max(ratios):.2f}"])
    table(["rows", "fit", "chosen/best, mean", "largest"], rows)


if __name__ == "__main__":
    main()
