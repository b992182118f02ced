"""Times of GPU kernels with neither launch overhead nor a warm cache in them."""

import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 240_000_000  # several times the L2 of any GPU of today


def copies_for(nbytes: int) -> int:
    """How many buffers of `nbytes` to go around so that each is out of the L2 when its turn comes."""
    return max(3, -(-COLD_BYTES // nbytes))


def time_interleaved(variants: dict[str, Sequence[Callable[[], object]]], rounds: int = 15) -> dict[str, float]:
    """Median time of one call, in us.

    variants: name to the calls, one for each rotating buffer. Each variant becomes one CUDA graph of
    all its calls; the graphs are replayed in turns, so that clocks and neighbours are the same for all.
    """
    graphs = {}
    for name, calls in variants.items():
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1e3 / len(variants[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy from device memory to device memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for turn in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times)
