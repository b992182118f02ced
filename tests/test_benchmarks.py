"""What the serving benchmarks measure with: engines that take turns, and rates of a batch."""

import os
from pathlib import Path
from types import SimpleNamespace

import engines
import pytest
import serve_attention

SCRIPT = """
import sys
from pathlib import Path

import engines

def measure(model, arguments, turn):
    turn()
    for part in range(arguments["parts"]):
        turn()
        with (Path(model) / "order").open("a") as order:
            order.write(f"{arguments['name']}{part} ")
        if part == arguments["fails"]:
            raise RuntimeError("out of memory, say")
    return arguments["name"]

engines.run_measure(sys.argv[2:], measure)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(engines, groups)``: their order of turns, what they found, and who failed."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(Path(engines.__file__).parent))

    def start(chosen: list[tuple[str, int, int | None]], groups: list[list[str]] | None = None):
        made = {
            name: (tmp_path, {"name": name, "parts": parts, "fails": fails}) for name, parts, fails in chosen
        }
        found = {}
        failed = engines.side_by_side(
            str(script), tmp_path, made, lambda name, result, log: found.update({name: result}), groups
        )
        return (tmp_path / "order").read_text().split(), found, failed

    return start


def test_engines_take_turns(run):
    order, found, failed = run([("a", 3, None), ("b", 2, None), ("c", 3, None)])
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "c2"]
    assert found == {"a": "a", "b": "b", "c": "c"} and failed == []


def test_a_group_is_done_before_the_next_starts(run):
    order, found, _ = run([("a", 2, None), ("b", 2, None), ("c", 1, None)], [["a", "b"], ["c"]])
    assert order == ["a0", "b0", "a1", "b1", "c0"] and list(found) == ["a", "b", "c"]


def test_an_engine_that_fails_is_named_and_the_others_go_on(run, capfd):
    order, found, failed = run([("a", 3, None), ("b", 3, 1)])
    assert order == ["a0", "b0", "a1", "b1", "a2"]
    assert found == {"a": "a"} and failed == ["b"]
    assert "out of memory, say" in capfd.readouterr().out


def test_busy_threads_of_all_engines_have_a_rounds_fastest_cores(monkeypatch, tmp_path):
    stayed, seconds = [], {3: 4.0, 4: 1.0, 5: 1.1, 6: 2.0, 7: 3.0}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(seconds))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: stayed.append(cores))
    monkeypatch.setattr(engines, "_python_seconds", lambda: seconds[min(stayed[-1])])
    monkeypatch.setattr(engines, "_siblings", lambda core: {4, 5} if core in (4, 5) else {core})
    assert engines.fastest_cores() == [4, 6]
    assert stayed == [{3}, {4}, {5}, {6}, {7}, set(seconds)]

    stayed.clear()
    engine = SimpleNamespace(collective_rpc=lambda function, args: [function(None, *args)])
    result = tmp_path / "result.json"
    result.with_suffix(".go").write_text("[4, 6]")
    engines.run_measure(["model", "{}", str(result)], lambda model, arguments, turn: turn(engine))
    assert stayed == [{6}, {4}]  # the worker, and the thread that asks it

    del seconds[7], seconds[6]
    stayed.clear()
    assert engines.fastest_cores() == [] and not stayed


def test_logical_cores_of_one():
    """Of the machine that this runs on: every core is its own sibling."""
    for core in os.sched_getaffinity(0):
        assert core in engines._siblings(core)


@pytest.mark.vllm
def test_rates_of_a_batch(tiny, engine):
    llm, turns = engine(tiny("Llama", vocab_size=1024)), []
    output = serve_attention.WINDOWS * (serve_attention.RESUMED + 2) + 8
    run = serve_attention.run_case(llm, "batch", 3, 20, output, turn=turns.append)
    assert turns == [llm] * serve_attention.WINDOWS == [llm] * len(run["window_ms"])
    assert run["output_tokens_per_s"] == pytest.approx(3e3 / run["step_ms"])
    assert min(run["window_ms"]) <= run["step_ms"] <= max(run["window_ms"])
    assert run["prompt_tokens_per_s"] > 0 and "kernels_ms" not in run
    assert not llm.llm_engine.has_unfinished_requests()
    assert len(serve_attention.run_case(llm, "alone", 1, 20, 16)["window_ms"]) == 1
    with pytest.raises(serve_attention.Overfull, match=r"when 3 had started"):
        serve_attention.run_case(llm, "short", 3, 20, serve_attention.WINDOWS, turn=turns.append)
    assert not llm.llm_engine.has_unfinished_requests()
