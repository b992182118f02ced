"""Runs a file's kernel tests in Triton's interpreter, on the CPU, in processes of their own."""

import os
import re
import subprocess
import sys


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
