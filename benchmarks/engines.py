"""Engines in processes of their own: they start side by side, and take turns once all are up.

Starting takes minutes of CPU time each. What is measured runs alone, a part of one engine and then a part of
the next, all parts of a round on the same cores, the two that are fastest just then: how fast a machine's cores
are changes within minutes and differs from one to another, which is not to be one engine's luck. A benchmark's
script is run again for each engine, with ``--measure MODEL ARGUMENTS RESULT``.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GPU_GIB = 76  # what engines may take together


def add_at_once_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, help="most engines that start side by side; default: what fits")


def add_measure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "ARGUMENTS", "RESULT"), help=argparse.SUPPRESS)


def run_measure(given: list[str], measure: Callable[[str, dict, Callable[..., None]], Any]) -> None:
    """In an engine's process.

    measure: takes model, engine arguments, and what it calls when its engine is up, and again before each part
    that may be measured apart: that returns when it is this engine's turn. Given the `LLM`, it also keeps that
    from going on with its requests meanwhile, and puts the two threads that are busy all the time, this one
    and the worker's, on the cores that all engines have in this round.
    """
    model, engine, result = given
    result = Path(result)
    files = str(result.with_suffix(".ready")), str(result.with_suffix(".go"))

    def turn(llm: Any = None) -> None:
        if llm is None:
            _wait_for_turn(*files)
        else:
            _stay_on(llm.collective_rpc(_hold, args=files)[0], 0)

    partial = result.with_suffix(".part")
    partial.write_text(json.dumps(measure(model, json.loads(engine), turn)))
    partial.rename(result)


def _wait_for_turn(ready: str, go: str) -> list[int]:
    """Returns the cores of this round."""
    Path(ready).touch()
    while not Path(go).exists():
        time.sleep(0.02)
    cores = json.loads(Path(go).read_text())
    Path(go).unlink()
    return cores


def _hold(worker: Any, ready: str, go: str) -> list[int]:
    """In an engine's worker, which takes no step before this returns."""
    cores = _wait_for_turn(ready, go)
    _stay_on(cores, 1)
    return cores


def _stay_on(cores: list[int], place: int) -> None:
    """Put this thread on one of a round's cores, if it has any."""
    if cores:
        os.sched_setaffinity(0, {cores[place]})


def fastest_cores(count: int = 2) -> list[int]:
    """The cores on which some Python takes least, each of another physical one, the fastest first; none where
    there are fewer than four, which engines had better share as they like.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 4:
        return []
    seconds = {}
    try:
        for core in allowed:
            os.sched_setaffinity(0, {core})
            seconds[core] = min(_python_seconds() for _ in range(5))
    finally:
        os.sched_setaffinity(0, allowed)
    chosen: list[int] = []
    for core in sorted(allowed, key=seconds.__getitem__):
        if len(chosen) < count and not any(core in _siblings(other) for other in chosen):
            chosen.append(core)
    return chosen


def _python_seconds() -> float:
    start = time.perf_counter()
    counts: dict[int, int] = {}
    for i in range(20_000):
        counts[i % 64] = counts.get(i % 64, 0) + 1
    return time.perf_counter() - start


def _siblings(core: int) -> set[int]:
    """Logical cores of a core's physical one."""
    listed = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    if not listed.exists():
        return {core}
    ranges = (part.split("-") for part in listed.read_text().strip().split(","))
    return {core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1)}


def groups_of(gib: dict[str, float], at_once: int | None) -> list[list[str]]:
    """Engines in their order, in groups that a GPU has memory for, of at most `at_once`."""
    groups: list[list[str]] = []
    for name, size in gib.items():
        last = groups[-1] if groups else []
        if not last or sum(gib[each] for each in last) + size > GPU_GIB or len(last) == at_once:
            groups.append([name])
        else:
            last.append(name)
    return groups


def side_by_side(
    script: str,
    work: Path,
    engines: dict[str, tuple[Path, dict]],
    found: Callable[[str, Any, list[str]], None],
    groups: list[list[str]] | None = None,
) -> list[str]:
    """Start a group of engines (default: all), give them turns until all are measured, then start the next.

    found: takes a name, what it measured, and its log. An engine that fails does not keep the others from
    being measured: the end of its log is printed. Returns the names of those that failed.
    """
    # Engines are in sessions of their own: who ends this process does not reach them, so it must end them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    failed = []
    for number, group in enumerate(groups or [list(engines)]):
        failed += _measure_group(script, work, {name: engines[name] for name in group}, found, number)
    return failed


def _measure_group(
    script: str,
    work: Path,
    engines: dict[str, tuple[Path, dict]],
    found: Callable[[str, Any, list[str]], None],
    number: int,
) -> list[str]:
    results = {name: work / f"{number}-{index}.json" for index, name in enumerate(engines)}
    runs: dict[str, subprocess.Popen] = {}
    failed = []
    try:
        for name, (model, engine) in engines.items():
            command = [sys.executable, script, "--measure", str(model), json.dumps(engine), str(results[name])]
            with results[name].with_suffix(".log").open("w") as log:
                runs[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        ready, go = (
            {name: result.with_suffix(end) for name, result in results.items()} for end in (".ready", ".go")
        )
        for name in engines:
            _comes((ready[name],), runs[name])
        running = list(engines)
        while running:
            cores = fastest_cores()
            for name in list(running):
                ready[name].unlink(missing_ok=True)  # it has ended without
                waiting = go[name].with_suffix(".go.part")
                waiting.write_text(json.dumps(cores))
                waiting.rename(go[name])
                if _comes((ready[name], results[name]), runs[name]) and not results[name].exists():
                    continue
                running.remove(name)
                log = results[name].with_suffix(".log").read_text()
                if results[name].exists():
                    found(name, json.loads(results[name].read_text()), log.splitlines())
                    _wait(runs[name])
                else:
                    failed.append(name)
                    print(f"{name} failed:\n{log[-6000:]}", flush=True)
                _kill(runs[name])
    finally:
        for run in runs.values():
            _kill(run)
    return failed


def _comes(files: tuple[Path, ...], run: subprocess.Popen) -> bool:
    """Wait for one of the files that a process makes; False if it ends without."""
    while not any(file.exists() for file in files):
        if run.poll() is not None:
            return any(file.exists() for file in files)
        time.sleep(0.02)
    return True


def _wait(run: subprocess.Popen) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed then
        run.wait(60)


def _kill(run: subprocess.Popen) -> None:
    """End a process with all that it started: what an engine leaves behind keeps its GPU memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
