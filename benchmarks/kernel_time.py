"""How long kernels run in an engine, whatever its host does between them (`LLM.collective_rpc`)."""

from typing import Any

import torch


def start(worker: Any) -> None:
    """In an engine's worker: look at what runs from here to `stop`, under PyTorch's profiler."""
    runner = worker.model_runner
    execute, worker.steps = runner.execute_model, 0

    def counted(*arguments: Any, **named: Any) -> Any:
        worker.steps += 1
        return execute(*arguments, **named)

    torch.cuda.synchronize()
    runner.execute_model = counted
    worker.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    worker.profiler.start()


def stop(worker: Any) -> tuple[float, int]:
    """For how many ms a kernel or a copy ran since `start`, and in how many of the model's steps."""
    torch.cuda.synchronize()
    worker.profiler.stop()
    del worker.model_runner.execute_model  # and the class's is back
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in worker.profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    total = end = 0
    for start, stop in spans:
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total * 1e-6, worker.steps
