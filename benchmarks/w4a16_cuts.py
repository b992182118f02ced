"""Ways to cut up the decode product of NVFP4 weights on one GPU, beside the one that is taken.

    python benchmarks/w4a16_cuts.py [--shapes 34816x5120,...] [--rows 8,16,24,32] [--name w4a16_cuts]
    python benchmarks/w4a16_cuts.py --split --name w4a16_cuts_split

Without --split, cuts of several tiles of 64 outputs, which w4a16_fit.py makes the rule for matrices of many
tiles from. With it, those of split inputs, for matrices of fewer tiles than two for each multiprocessor.
Shapes, outputs x inputs, are such matrices of models in use, and of their parts on several GPUs, unless given.
Weights rotate, so that they come from memory; the cuts take turns in one run, each behind another kernel whose
own time is taken off.
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
from vllm_scalesearch.ops.w4a16_plan import RESIDENT, Plan, clusters_at_once, plan

SHAPES = (
    "9216x2304,12288x2048,14336x4096,16384x2048,16384x3072,17920x1536,19456x2560,20480x2560,22016x2048,22016x4096,"
    "24576x4096,27648x5120,28672x3584,28672x4096,28672x8192,30720x3840,34816x5120,35840x5120,37888x3584,43008x5376,"
    "51200x5120,55296x5120,57344x8192,65536x5120,73728x4608,128256x4096,151936x4096"
)
SPLIT_SHAPES = (
    "768x4096,896x4864,1024x8192,1280x8192,1536x1536,1536x4096,1536x8960,2048x2048,2048x8192,2560x2560,2560x9728,"
    "3072x4096,3584x3584,3584x18944,4096x1024,4096x4096,4096x14336,4608x3584,5120x1024,5120x5120,5120x8192,5120x17408,"
    "5376x21504,6144x4096,7168x5120,8192x1024,8192x8192,8192x28672,8704x5120,9216x4608,10240x5120,10240x8192,12288x4096"
)
# Of a group, by groups.
WARPS = {1: (4, 5, 6, 7, 8), 2: (3, 4, 5, 6), 3: (3, 4, 5, 6), 4: (3, 4, 5), 5: (2, 3, 4), 6: (2, 3), 8: (2, 3)}
# Groups, warps of a group, depths, and how many blocks a multiprocessor is to have at most.
SPLIT_CUTS = (
    (1, 8, (2, 3), 1), (1, 12, (2, 3), 1), (1, 16, (2,), 1), (1, 4, (3,), 2), (1, 4, (3,), 4), (2, 6, (3,), 1),
    (2, 4, (3,), 2), (3, 4, (3,), 1), (3, 2, (3,), 2), (4, 3, (3,), 1),
)  # fmt: skip


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


def split_cuts_for(
    tokens: int, tiles: int, steps: int, processors: int, shared_limit: int, clusters: bool
) -> list[Plan]:
    """Those with all blocks on the GPU at once that leave the multiprocessors about as even as can be."""
    found = []
    for groups, warps, depths, each in SPLIT_CUTS:
        blocks = -(-tiles // groups)
        resident = RESIDENT[tokens] // (32 * groups * warps)
        splits = [n for n in range(1, 9) if blocks * n <= each * processors and steps >= 9 * n]
        together = [
            n for n in splits if n > 1 and clusters and blocks <= resident * clusters_at_once(n, processors)
        ]
        chosen = [(1, False)] * (1 in splits) + [(n, True) for n in together[-2 if each == 1 else -1 :]]
        if groups > 1 and splits and splits[-1] > max(together, default=1):
            chosen.append((splits[-1], False))
        for number, cluster in chosen:
            busiest = -(-blocks * number // processors) * groups / number
            found += [(busiest, Plan(tokens, groups, warps, number, cluster, depth)) for depth in depths]
    least = min((busiest for busiest, _ in found), default=0)
    return [
        cut
        for busiest, cut in dict.fromkeys(found)
        if busiest <= 1.7 * least and cut.threads <= RESIDENT[tokens] and cut.shared_bytes <= shared_limit
    ]


def label(cut: Plan) -> str:
    return (
        f"{cut.groups}x{cut.warps}"
        + (f"/{cut.splits}" if cut.splits > 1 else "")
        + f" d{cut.depth}"
        + (", global" if cut.splits > 1 and not cut.cluster else "")
    )


def _compile(cut: Plan, arch: str) -> None:
    machine_code("w4a16_decode.cu", "w4a16_decode", cut.defines(torch.bfloat16, w4a16.E4M3), arch)


def random_weight(outputs: int, inputs: int) -> w4a16.TiledWeight:
    codes = torch.randint(-(2**31), 2**31 - 1, (inputs // 16, 2 * outputs), dtype=torch.int32, device="cuda")
    scales = torch.randint(40, 72, (inputs // 16, outputs), dtype=torch.uint8, device="cuda")
    one = torch.ones(1, device="cuda")
    return w4a16.TiledWeight(codes, scales, one, w4a16.E4M3, 1.0, outputs, inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", help="outputs x inputs, multiples of 64")
    parser.add_argument("--split", action="store_true", help="cuts of split inputs")
    parser.add_argument("--rows", default="8,16,24,32")
    parser.add_argument("--name", default="w4a16_cuts", help="of the file under results/")
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    chosen = arguments.shapes or (SPLIT_SHAPES if arguments.split else SHAPES)
    shapes = [tuple(map(int, shape.split("x"))) for shape in chosen.split(",")]
    device = torch.cuda.get_device_properties(0)
    processors, limit = device.multi_processor_count, device.shared_memory_per_block_optin

    work = {}
    for outputs, inputs in shapes:
        for count in rows:
            tokens = -(-count // 8) * 8
            size = processors, limit, device.major >= 9
            if arguments.split:
                cuts = split_cuts_for(tokens, outputs // 64, inputs // 32, *size)
            else:
                cuts = cuts_for(tokens, outputs // 64, *size)
            taken = plan(count, outputs, inputs, *size)
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
