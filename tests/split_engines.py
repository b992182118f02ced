"""Engines split over processes: parallel_run.py's results, and what a rank has of a whole layer."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# Seconds. On GPUs, torch.compile and kernels of a first run included.
TIMEOUT = 600 if torch.cuda.is_available() else 300
PROMPTS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1)).tolist()


def run_split(folder: Path, model: Path, options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """One run of parallel_run.py in `folder`; raises AssertionError with its output when it leaves no result.

    The exit code is no part of it: vLLM's threads now and then abort a process that is done. Nothing that it
    started outlives it: a worker that hangs would keep its GPU's memory.
    """
    described = {
        "model": str(model), "quantization": "scalesearch", "prompts": PROMPTS,
        "additional_config": {"scalesearch": options}, **arguments,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(described))
    ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    script, log = Path(__file__).with_name("parallel_run.py"), folder / "log.txt"
    command = [sys.executable, str(script), str(folder / "arguments.json"), str(folder / "out.pt")]
    with log.open("w") as output:
        run = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            run.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            output.write(f"\nno result after {TIMEOUT} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
    assert (folder / "out.pt").exists(), log.read_text()
    return torch.load(folder / "out.pt")


def shard_rows(whole: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
    """Rank's half of each of the matrices that are stacked in `whole`."""
    return torch.cat([part.chunk(2)[rank] for part in whole.split(sizes)])
