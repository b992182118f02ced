"""Searched NVFP4 quantizers on one GPU: time, share of the copy bandwidth, and the cost of searching.

    python benchmarks/quantize.py [--rows 8192] [--width 8192]

bf16 in, packed codes and block scales out, one tensor scale given. The kernels take turns in one run as
CUDA graphs over buffers that rotate; beside them the plain torch reference, timed without a graph, and for
weights what `full` makes of the linear layers of an 8B model.
"""

import argparse

import torch
from gpu_timing import copies_for, copy_bandwidth, time_interleaved
from report import table, write

from vllm_scalesearch.formats import MXFP4, NVFP4, finite_amax, tensor_scale_of
from vllm_scalesearch.ops import cuda_quantize, triton_quantize
from vllm_scalesearch.search import quantize

POLICIES = ("absmax", "fast", "paper", "exact")
# Outputs by inputs of Llama-3.1-8B's linear layers, without embeddings and head; 32 of each.
LAYERS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
DECODE = ((1, 4096), (1, 14336), (32, 4096), (32, 14336))


def _events(call, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=8192)
    arguments = parser.parse_args()
    rows, width = arguments.rows, arguments.width
    copy_rate = copy_bandwidth()
    moved = rows * width * (2 + 0.5 + 1 / 16)
    inputs = [
        torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
        for _ in range(copies_for(2 * rows * width))
    ]
    scale = tensor_scale_of(finite_amax(inputs[0]))
    variants = {}
    for policy in POLICIES:
        variants[f"Triton {policy}"] = [
            lambda x=x, policy=policy: triton_quantize.quantize_packed(x, NVFP4, policy, scale) for x in inputs
        ]
        variants[f"CUDA {policy}"] = [
            lambda x=x, policy=policy: cuda_quantize.quantize_packed(x, policy, scale) for x in inputs
        ]
        variants[f"CUDA {policy}, scale a row in the same pass"] = [
            lambda x=x, policy=policy: cuda_quantize.quantize_packed(x, policy, per_row=True) for x in inputs
        ]
    variants["Triton mxfp4 paper"] = [
        lambda x=x: triton_quantize.quantize_packed(x, MXFP4, "paper") for x in inputs
    ]
    times = time_interleaved(variants)
    reference = {
        policy: _events(lambda policy=policy: quantize(inputs[0], NVFP4, policy, tensor_scale=scale), 3)
        for policy in POLICIES
    }
    limit = moved / copy_rate * 1e6
    lines = []
    for name, time in times.items():
        kind, policy = name.split(" ")[0], name.split(" ", 1)[1]
        base = times.get(f"{kind} absmax" + policy[policy.find(",") :] if "," in policy else f"{kind} absmax")
        lines.append([name, f"{time:.1f}", f"{limit / time:.0%}", f"{time / base:.2f}"])
    print(f"{rows} x {width}, bf16 to NVFP4: {limit:.1f} us at the copy's {copy_rate / 1e12:.2f} TB/s")
    table(["kernel", "us", "of copy bandwidth", "of its absmax"], lines)
    print("torch reference, us:", {policy: round(time) for policy, time in reference.items()})

    full = 0.0
    for shape in LAYERS:
        weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        full += 32 * _events(lambda w=weight: triton_quantize.quantize_packed(w, NVFP4, "full"), 3) * 1e-6
    print(f"policy full, the linear weights of an 8B model, tensor scale included: {full:.2f} s")

    decode = {}
    for count, inputs_wide in DECODE:
        small = [torch.randn(count, inputs_wide, device="cuda", dtype=torch.bfloat16) for _ in range(20)]
        decode[f"{count} x {inputs_wide}"] = time_interleaved(
            {
                "Triton": [lambda x=x: triton_quantize.quantize_values(x, NVFP4, "paper") for x in small],
                "CUDA": [lambda x=x: cuda_quantize.quantize_values(x, "paper") for x in small],
            }
        )
    table(
        ["decode inputs, paper, us", "Triton", "CUDA"],
        [[name, f"{line['Triton']:.1f}", f"{line['CUDA']:.1f}"] for name, line in decode.items()],
    )
    write(
        "quantize",
        {
            "rows": rows, "width": width, "copy_bytes_per_s": copy_rate, "bytes": moved, "us": times,
            "torch_reference_us": reference, "full_8b_s": full, "decode_us": decode,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
