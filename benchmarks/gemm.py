"""NVFP4 linear layers on one GPU: ours beside bf16 and FP8 by cuBLAS, Marlin and Humming.

    python benchmarks/gemm.py [--rows 1,4,8,16,24,32,64,...] [--shapes 6144x4096,...] [--name gemm]

Needs vLLM for CUDA. Shapes, outputs x inputs, are those of Llama-3.1-8B unless given. Weights rotate, so that
they come from memory; the variants take turns in one run. As in a layer, each product stands behind another
kernel, whose own time is taken off: one that may begin while its twin in front ends would look faster than it
is. Humming compiles its kernels at first use, about a minute a shape.
"""

import argparse
import statistics

import torch
from gpu_timing import copies_for, copy_bandwidth, time_interleaved
from report import table, write

from vllm_scalesearch.formats import QuantizedTensor
from vllm_scalesearch.ops import w4a16
from vllm_scalesearch.search import quantize

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336"
GOAL_ROWS = (1, 4, 8, 16, 32)  # of the mean gain


def _layer(kernel_class, weight: QuantizedTensor, dtype: torch.dtype):
    """A layer as vLLM's kernel wants it, and the kernel."""
    layer = torch.nn.Module()
    outputs, half = weight.packed.shape
    layer.weight = torch.nn.Parameter(weight.packed.clone(), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(weight.scales.clone(), requires_grad=False)
    layer.weight_global_scale = torch.nn.Parameter(weight.tensor_scale.clone(), requires_grad=False)
    layer.output_size_per_partition, layer.input_size_per_partition = outputs, 2 * half
    layer.logical_widths = layer.output_partition_sizes = [outputs]
    layer.params_dtype, layer.has_bias = dtype, False
    kernel = kernel_class.__new__(kernel_class)
    kernel.process_weights_after_loading(layer)
    return layer, kernel


def measure(outputs: int, inputs: int, rows: list[int], copy_rate: float) -> list[dict]:
    from vllm.model_executor.kernels.linear.nvfp4.humming import HummingNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel

    nbytes = outputs * inputs * 9 // 16
    dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    weight = quantize(dense, policy="absmax")
    marlin = [_layer(MarlinNvFp4LinearKernel, weight, dense.dtype) for _ in range(copies_for(nbytes))]
    humming = [_layer(HummingNvFp4LinearKernel, weight, dense.dtype) for _ in range(copies_for(nbytes))]
    encoding = w4a16.scale_encoding(weight)
    ours = [
        w4a16.TiledWeight(
            layer.weight,
            layer.weight_scale,
            layer.weight_scale_2,
            encoding,
            1.0,
            outputs,
            inputs,
        )
        for layer, _ in humming
    ]
    bf16 = [dense.clone() for _ in range(copies_for(2 * outputs * inputs))]
    fp8 = [dense.to(torch.float8_e4m3fn) for _ in range(copies_for(outputs * inputs))]
    one = torch.ones((), device="cuda")
    exact = weight.dequantize(torch.float32)
    alpha = ours[0].multiplier * float(weight.tensor_scale)
    w4a16.prepare(ours[0], dense.dtype)

    small = torch.zeros(256, device="cuda")

    def before() -> None:
        small.add_(1)

    def variants_for(x: torch.Tensor) -> dict:
        x8 = x.to(torch.float8_e4m3fn)
        scaled = {"scale_a": one, "scale_b": one, "out_dtype": x.dtype}
        variants = {
            "bf16 cuBLAS": [lambda w=w: torch.mm(x, w.t()) for w in bf16],
            "fp8 cuBLAS": [lambda w=w: torch._scaled_mm(x8, w.t(), **scaled) for w in fp8],
            "Marlin": [lambda n=n: n[1].apply_weights(n[0], x) for n in marlin],
            "Humming": [lambda n=n: n[1].apply_weights(n[0], x) for n in humming],
        }
        if x.shape[0] <= w4a16.MAX_ROWS:
            variants["ours"] = [lambda w=w: w4a16.product(x, w) for w in ours]
        if x.shape[0] >= 512:
            variants["dequantize, cuBLAS"] = [lambda w=w: w4a16.dense_product(x, w, alpha) for w in ours]
        return {name: [lambda c=c: (before(), c()) for c in calls] for name, calls in variants.items()}

    found = []
    for count in rows:
        x = torch.randn(count, inputs, device="cuda", dtype=torch.bfloat16)
        variants = variants_for(x)
        reference = x.float() @ exact.T
        for name in set(variants) - {"bf16 cuBLAS", "fp8 cuBLAS"}:
            error = float((variants[name][0]()[1].float() - reference).norm() / reference.norm())
            if not error < 2**-7:
                raise RuntimeError(f"{name}, {outputs} x {inputs}, {count} rows: relative error {error}")
        times = time_interleaved(variants | {"before": [before]})
        alone = times.pop("before")
        times = {name: time - alone for name, time in times.items()}
        found.append(
            {
                "outputs": outputs, "inputs": inputs, "rows": count, "us": times,
                "limit_us": nbytes / copy_rate * 1e6,
            }
        )  # fmt: skip
        print(outputs, inputs, count, {name: round(time, 1) for name, time in times.items()}, flush=True)
    return found


def gain(line: dict) -> float:
    """How many times as fast as the better NVFP4 peer ours is."""
    return min(line["us"]["Marlin"], line["us"]["Humming"]) / line["us"]["ours"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,4,8,16,24,32,64,128,256,1024,2048,3072,4096,8192")
    parser.add_argument("--shapes", default=SHAPES, help="outputs x inputs, multiples of 64")
    parser.add_argument("--name", default="gemm", help="of the file under results/")
    arguments = parser.parse_args()
    rows = [int(count) for count in arguments.rows.split(",")]
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    from vllm.config import VllmConfig, set_current_vllm_config

    copy_rate = copy_bandwidth()
    found: list[dict] = []
    with set_current_vllm_config(VllmConfig()):
        for shape in shapes:
            found += measure(*shape, rows, copy_rate)
            gains = [gain(line) for line in found if line["rows"] in GOAL_ROWS and "ours" in line["us"]]
            mean = statistics.geometric_mean(gains) if gains else None
            # What is there stays if the next shape fails or takes too long.
            write(arguments.name, {"copy_bytes_per_s": copy_rate, "mean_gain": mean, "times": found})
    names = ["bf16 cuBLAS", "fp8 cuBLAS", "Marlin", "Humming", "ours", "dequantize, cuBLAS"]
    header = ["N x K", "rows", *names, "limit", "ours/limit", "best NVFP4 peer/ours"]
    lines = []
    for line in found:
        times = line["us"]
        cells = [f"{times[name]:.1f}" if name in times else "" for name in names]
        share = ahead = ""
        if "ours" in times:
            share, ahead = f"{line['limit_us'] / times['ours']:.0%}", f"{gain(line):.2f}"
        lines.append(
            [
                f"{line['outputs']}x{line['inputs']}",
                line["rows"],
                *cells,
                f"{line['limit_us']:.1f}",
                share,
                ahead,
            ]
        )
    table(header, lines)
    print(f"copy {copy_rate / 1e12:.2f} TB/s")
    if mean:
        print(
            "geometric mean of the best NVFP4 peer over ours, "
            f"{', '.join(str(count) for count in GOAL_ROWS if count in rows)} rows: {mean:.3f}"
        )


if __name__ == "__main__":
    main()
