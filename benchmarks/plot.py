"""Plots of `results/*.json`, beside them as PNG.

python benchmarks/plot.py [gemm quantize serve attention serve_attention serve_32_layers ...]
"""

import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import RESULTS


def _load(name: str) -> tuple[dict, str]:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    environment = found["environment"]
    return found["results"], f"{environment['gpu']}, {environment['date'][:10]}"


def gemm(name: str) -> plt.Figure:
    results, machine = _load(name)
    shapes = sorted({(line["outputs"], line["inputs"]) for line in results["times"]})
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 4), sharey=False)
    names = ("bf16 cuBLAS", "fp8 cuBLAS", "Marlin", "Humming", "ours", "dequantize, cuBLAS")
    for axis, shape in zip(axes, shapes, strict=True):
        lines = [line for line in results["times"] if (line["outputs"], line["inputs"]) == shape]
        for each in names:
            points = [(line["rows"], line["us"][each]) for line in lines if each in line["us"]]
            style = {"linewidth": 2.5, "color": "black"} if each == "ours" else {"marker": ".", "alpha": 0.8}
            axis.plot(*zip(*points, strict=True), label=each, **style)
        axis.set(xscale="log", yscale="log", title=f"{shape[0]} x {shape[1]}", xlabel="rows")
        axis.set_xscale("log", base=2)
    axes[0].set_ylabel("us")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Linear layers, cold L2, CUDA graphs ({machine})")
    return figure


def quantize(name: str) -> plt.Figure:
    results, machine = _load(name)
    limit = results["bytes"] / results["copy_bytes_per_s"] * 1e6
    names = list(results["us"])
    figure, axis = plt.subplots(figsize=(9, 5))
    colors = ["tab:blue" if name.startswith("Triton") else "black" for name in names]
    axis.barh(names[::-1], [results["us"][name] for name in names[::-1]], color=colors[::-1])
    axis.axvline(limit, color="tab:red", label=f"bytes at the copy's rate, {limit:.0f} us")
    axis.set(xlabel="us", title=f"{results['rows']} x {results['width']} bf16 to NVFP4 ({machine})")
    axis.legend()
    return figure


def serve(name: str) -> plt.Figure:
    results, machine = _load(name)
    names = list(results["tokens_per_s"])
    batches = list(results["tokens_per_s"][names[0]])
    figure, axes = plt.subplots(1, len(batches), figsize=(4.5 * len(batches), 4))
    for axis, batch in zip(axes, batches, strict=True):
        speeds = [results["tokens_per_s"][name][batch] for name in names]
        colors = ["black" if name.startswith("scalesearch") else "tab:blue" for name in names]
        axis.barh(names[::-1], speeds[::-1], color=colors[::-1])
        axis.set(title=f"batch {batch}", xlabel="output tokens/s")
    figure.suptitle(f"{results['layers']} layers of Llama-3.1-8B's shape in vLLM ({machine})")
    return figure


def attention(name: str) -> plt.Figure:
    results, machine = _load(name)
    names = ("FA3 bf16", "FA3 fp8", "ours")
    figure, axis = plt.subplots(figsize=(10, 4.5))
    for i, (name, color) in enumerate(zip(names, ("tab:blue", "tab:orange", "black"), strict=True)):
        share = [line["us"][name] / line["limit_us"] for line in results["decode"]]
        axis.bar([n + 0.26 * (i - 1) for n in range(len(share))], share, 0.24, label=name, color=color)
    axis.axhline(1, color="tab:red", label="the packed bytes at the copy's rate")
    axis.set_xticks(range(len(results["decode"])), [line["shape"] for line in results["decode"]])
    axis.set(xlabel="requests x tokens", ylabel="time over that of the packed bytes")
    axis.set_title(f"Decoding, {results['heads']} query and {results['kv_heads']} KV heads ({machine})")
    axis.legend()
    return figure


def serve_attention(name: str) -> plt.Figure:
    results, machine = _load(name)
    runs = results["runs"]
    parts = [part for part in ("cases", "fixed") if any(run[part] for run in runs.values())]
    figure, axes = plt.subplots(1, len(parts), figsize=(7.5 * len(parts), 4.5), squeeze=False)
    titles = {
        "cases": "requests x prompt tokens",
        "fixed": f"prompt tokens, {results['fixed_gib']} GiB of cache",
    }
    for axis, part in zip(axes[0], parts, strict=True):
        # Cases differ by orders of magnitude, so each is shown over its bf16 cache.
        columns = list(runs["bf16"][part])
        for i, (name, run) in enumerate(runs.items()):
            found = [(at, run[part][case]) for at, case in enumerate(columns) if case in run[part]]
            rates = [
                rates["output_tokens_per_s"] / runs["bf16"][part][columns[at]]["output_tokens_per_s"]
                for at, rates in found
            ]
            places = [at + 0.8 * (i + 0.5) / len(runs) - 0.4 for at, _ in found]
            ours = {"SCALESEARCH": "black", "SCALESEARCH and weights": "dimgray"}
            color = ours.get(name, f"C{i}")
            bars = axis.bar(places, rates, 0.75 / len(runs), label=name, color=color)
            if part == "fixed":
                axis.bar_label(bars, [rates["batch"] for _, rates in found], fontsize=7)
            elif all("kernels_ms" in rates for _, rates in found):
                base = [runs["bf16"][part][columns[at]]["kernels_ms"] for at, _ in found]
                alone = [ms / rates["kernels_ms"] for ms, (_, rates) in zip(base, found, strict=True)]
                label = "by kernels alone" if i == 0 else None
                axis.plot(places, alone, "D", color="white", markeredgecolor="tab:red", label=label)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_xticks(range(len(columns)), columns)
        axis.set(xlabel=titles[part], ylabel="output tokens/s over the bf16 cache's")
    if "fixed" in parts:
        axes[0][-1].set_title("as many requests as fit (above the bars)", fontsize=10)
    axes[0][0].legend(fontsize=8)
    title = f"{results['layers']} layers of Llama-3.1-8B's shape in vLLM, by KV cache ({machine})"
    figure.suptitle(title, fontsize=10)
    return figure


PLOTS = {
    "gemm": gemm, "quantize": quantize, "serve_attention": serve_attention, "serve": serve,
    "attention": attention,
}  # fmt: skip

if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in PLOTS if (RESULTS / f"{name}.json").exists()]:
        kind = next((kind for kind in PLOTS if name == kind or name.startswith(f"{kind}_")), None)
        if kind is None:
            raise SystemExit(
                f"{name}: there are plots of {', '.join(PLOTS)}, and of files whose names begin so"
            )
        figure = PLOTS[kind](name)
        figure.tight_layout()
        figure.savefig(RESULTS / f"{name}.png", dpi=110)
        print(f"written: {RESULTS / name}.png")
