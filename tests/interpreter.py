"""Where Triton's kernels run: on CUDA tensors, or in Triton's interpreter on the CPU.

The interpreter has to be chosen before triton is imported; `run_tests` runs a file's kernel tests in it, in
processes of their own.
"""

import os
import re
import subprocess
import sys

import pytest
import torch

from vllm_scalesearch.ops import triton_blocks

INTERPRETED = triton_blocks.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
RUNS_KERNELS = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="no GPU; test_on_the_cpu runs it"
)
COMPILES = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


def run_tests(file: str, selections: tuple[str, ...], least: int) -> None:
    """One pytest process for each of `selections` (-k), all at once.

    Raises AssertionError with its output where one fails or passes no more than `least` tests.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [*command, selection],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for selection in selections
    ]
    for output, process in [(process.communicate()[0], process) for process in processes]:
        assert process.returncode == 0, output
        assert int(re.search(r"(\d+) passed", output)[1]) > least, output
