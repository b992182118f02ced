"""How ops/w4a16_plan.py cuts up matrices, against w4a16_cuts.json and w4a16_cuts_split.json of an H100.

    python benchmarks/w4a16_fit.py

The costs for matrices of many tiles: least squares of relative errors over those of two tiles for each
multiprocessor and more, for the cuts that the rule chooses among. Prints the coefficients, and of both files
what the cuts that are taken take over the best of all. Besides what the rule knows, a product takes some us
whatever its cut. Needs no GPU.
"""

import json
import statistics

import torch
from report import RESULTS, table
from w4a16_cuts import label

from vllm_scalesearch.ops.w4a16_plan import FITS, OUTPUT_TILE, Fit, Plan, plan

PROCESSORS, SHARED_LIMIT = 132, 227 << 10


def measured(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]["times"]


def many_tiles(rows: int) -> list[dict]:
    lines = measured("w4a16_cuts")
    return [line for line in lines if line["rows"] == rows and line["outputs"] // OUTPUT_TILE >= 2 * PROCESSORS]


def over_best(line: dict) -> float:
    """The time of the cut that is taken over the best one's."""
    taken = plan(line["rows"], line["outputs"], line["inputs"], PROCESSORS, SHARED_LIMIT, True)
    return line["us"][label(taken)] / min(line["us"].values())


def fit(tokens: int) -> Fit:
    """With two digits."""
    names, equations = list(FITS[tokens].cuts), []
    for line in many_tiles(tokens):
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
    table(["rows", "fit"], [[tokens, str(fit(tokens))] for tokens in FITS])
    rows = []
    for name in ("w4a16_cuts", "w4a16_cuts_split"):
        ratios = [over_best(line) for line in measured(name)]
        rows.append([name, len(ratios), f"{statistics.geometric_mean(ratios):.4f}", f"{max(ratios):.3f}"])
    table(["file", "points", "taken/best, mean", "largest"], rows)


if __name__ == "__main__":
    main()
