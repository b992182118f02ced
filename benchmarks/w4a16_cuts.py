"""Ways to cut up the decode product of NVFP4 weights on one GPU, beside the one that is taken.

    python benchmarks/w4a16_cuts.py [--shapes 34816x5120,...] [--rows 8,16,24,32] [--name w4a16_cuts]

For matrices of more tiles of 64 outputs than the GPU has multiprocessors; w4a16_fit.py makes the rule for most
of them from it. Shapes, outputs x inputs, are such matrices of models in use unless given. Weights rotate, so
that they come from memory; the cuts take turns in one run, each behind another kernel whose own time is taken
off.
"""

import argparse
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from gpu_timing import copies_for, copy_bandwidth, time_interleaved
from report import table, write
from tqdm import tqdm

from vllm_scalesearch.cuda_kernels import arch_of, machine_code
from vllm_scalesearch.ops import w4a16
from vllm_scalesearch.ops.w4a16_plan import RESIDENT, Plan, plan

SHAPES = (
    "9216x2304,12288x2048,14336x4096,16384x2048,16384x3072,17920x1536,19456x2560,20480x2560,22016x2048,22016x4096,"
    "24576x4096,27648x5120,28672x3584,28672x4096,28672x8192,30720x3840,34816x5120,35840x5120,37888x3584,43008x5376,"
    "51200x5120,55296x5120,57344x8192,65536x5120,73728x4608,128256x4096,151936x4096"
)
# Of a group, by groups.
WARPS = {1: (4, 5, 6, 7, 8), 2: (3, 4, 5, 6), 3: (3, 4, 5, 6), 4: (3, 4, 5), 5: (2, 3, 4), 6: (2, 3), 8: (2, 3)}


def cuts_for(tokens: int, tiles: int, processors: int, shared_limit: int, clusters: bool) -> list[Plan]:
    """Those that fit a block and leave no multiprocessor with far more tiles than the mean."""
    cuts = [
        Plan(tokens, groups, warps, 1, False, depth)
        for groups, counts in WARPS.items()
        for warps in counts
        for depth in ((2, 3) if groups == 1 else (3,))
    ]
    if clusters and tiles < 2 * processors:
        cuts += [Plan(tokens, 1, warps, splits, True, 3) for splits in (2, 3) for warps in (4, 6, 8)]

    def busiest(cut: Plan) -> float:
        blocks = -(-tiles // cut.groups) * cut.splits
        return -(-blocks // processors) * cut.groups / cut.splits

    return [
        cut
        for cut in cuts
        if cut.threads <= RESIDENT[tokens]
        and cut.shared_bytes <= shared_limit
        and busiest(cut) <= max(1.5 * tiles / processors, 2)
    ]


def label(cut: Plan) -> str:
    return f"{cut.groups}x{cut.warps}" + (f"/{cut.splits}" if cut.splits > 1 else "") + f" d{cut.depth}"


def _compile(cut: Plan, arch: str) -> None:
    machine_code("w4a16_decode.cu", "w4a16_decode", cut.defines(torch.bfloat16, w4a16.E4M3), arch)


def random_weight(outputs: int, inputs: int) -> w4a16.TiledWeight:
    codes = torch.randint(-(2**31), 2**31 - 1, (inputs // 16, 2 * outputs), dtype=torch.int32, device="cuda")
    scales = torch.randint(40, 72, (inputs // 16, outputs), dtype=torch.uint8, device="cuda")
    one = torch.ones(1, device="cuda")
    return w4a16.TiledWeight(codes, scales, one, w4a16.E4M3, 1.0, outputs, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="outputs x inputs, multiples of 64")
    parser.add_argument("--rows", default="8,16,24,32")
    parser.add_argument("--name", default="w4a16_cuts", help="of the file under results/")
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    device = torch.cuda.get_device_properties(0)
    processors, limit = device.multi_processor_count, device.shared_memory_per_block_optin

    work = {}
    for outputs, inputs in shapes:
        for count in rows:
            tokens = -(-count // 8) * 8
            cuts = cuts_for(tokens, outputs // 64, processors, limit, device.major >= 9)
            taken = plan(count, outputs, inputs, processors, limit, device.major >= 9)
            work[outputs, inputs, count] = [taken] + [cut for cut in cuts if cut != taken]
    different = {cut for cuts in work.values() for cut in cuts}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(_compile, different, itertools.repeat(arch_of(torch.device("cuda"))))
        list(tqdm(compiled, "kernels", len(different)))

    copy_rate = copy_bandwidth()
    small = torch.zeros(256, device="cuda")
    found, lines, ratios = [], [], []
    for outputs, inputs in tqdm(shapes, "shapes"):
        nbytes = outputs * inputs * 9 // 16
        weights = [random_weight(outputs, inputs) for _ in range(copies_for(nbytes))]
        for count in rows:
            cuts = work[outputs, inputs, count]
            x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
            expected = w4a16.product(x, weights[0]).float()
            variants = {"before": [lambda: small.add_(1)]}
            for cut in cuts:
                error = (w4a16.product(x, weights[0], cut=cut).float() - expected).norm() / expected.norm()
                if not error < 2**-8:  # rounding of the outputs alone
                    raise RuntimeError(f"{outputs}x{inputs}, {count} rows, {label(cut)}: off by {error}")
                variants[label(cut)] = [
                    lambda w=w, x=x, cut=cut: (small.add_(1), w4a16.product(x, w, cut=cut)) for w in weights
                ]
            times = time_interleaved(variants, 7)
            alone = times.pop("before")
            times = {name: time - alone for name, time in times.items()}
            best = min(times, key=times.get)
            taken = label(cuts[0])
            ratios.append(times[taken] / times[best])
            found.append(
                {
                    "outputs": outputs, "inputs": inputs, "rows": count, "taken": taken, "us": times,
                    "limit_us": nbytes / copy_rate * 1e6,
                }
            )  # fmt: skip
            lines.append(
                [
                    f"{outputs}x{inputs}", outputs // 64, count, f"{nbytes / copy_rate * 1e6:.1f}", taken,
                    f"{times[taken]:.1f}", best, f"{times[best]:.1f}", f"{ratios[-1]:.2f}",
                ]
            )  # fmt: skip
    header = ["N x K", "tiles", "rows", "limit, us", "taken", "us", "best", "us", "taken/best"]
    table(header, lines)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"geometric mean of taken/best: {mean:.3f}, largest {max(ratios):.2f}")
    write(arguments.name, {"copy_bytes_per_s": copy_rate, "mean_ratio": mean, "times": found})


if __name__ == "__main__":
    main()
