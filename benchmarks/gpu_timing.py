"""Times of GPU kernels with neither launch overhead nor a warm cache in them."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

COLD_BYTES = 240_000_000  # several times the L2 of any GPU of today
GRAPH_MS = 2.0  # what a graph takes at least: starting one and recording events costs some 15 us of it


def copies_for(nbytes: int) -> int:
    """How many buffers of `nbytes` to go around so that each is out of the L2 when its turn comes."""
    return max(3, -(-COLD_BYTES // nbytes))


def time_interleaved(variants: dict[str, Sequence[Callable[[], object]]], rounds: int = 15) -> dict[str, float]:
    """Median time of one call, in us.

    variants: name to the calls, one for each rotating buffer. Each variant becomes one CUDA graph of
    all its calls, over again until it takes `GRAPH_MS`; the graphs are replayed in turns, so that clocks and
    neighbours are the same for all.
    """
    graphs = {}
    for name, calls in variants.items():
        for call in calls[:2]:
            call()
        graph = _captured(calls)
        graph.replay()
        again = math.ceil(GRAPH_MS / _milliseconds(graph))
        graphs[name] = graph if again == 1 else _captured([*calls] * again), again * len(calls)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, (graph, calls) in graphs.items():
            time = _milliseconds(graph)
            if turn >= 2:
                times[name].append(time * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


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
