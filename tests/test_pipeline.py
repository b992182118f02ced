"""Stages of a pipeline, without one: what is ordered by which stream."""

from types import SimpleNamespace

import pytest
import torch

from vllm_scalesearch import pipeline


@pytest.mark.vllm
def test_each_exchange_is_ordered_by_the_stream_that_is_current_then(monkeypatch):
    """vLLM's own handler, of the stream that was current when it was made, with what it does left out."""
    from vllm.v1.worker.gpu.pp_utils import PPHandler

    class Handler(PPHandler):
        def __init__(self) -> None:
            self.main_stream, self.device, self.calls = "default", "cuda:1", []

        def note(self, *arguments):
            self.calls.append((self.main_stream, *arguments))
            return len(self.calls)

        get_prev_sampled_outputs = receive = broadcast = broadcast_drafts = note

    current = SimpleNamespace(stream="first")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: (current.stream, device))
    pipeline.follow_current_stream(Handler)
    pipeline.follow_current_stream(Handler)
    handler = Handler()
    assert handler.receive("batch") == 1
    current.stream = "later"
    assert handler.broadcast("tokens", "batch") == 2
    assert handler.get_prev_sampled_outputs() == 3
    expected = [("first", "batch"), ("later", "tokens", "batch"), ("later",)]
    assert handler.calls == [((stream, "cuda:1"), *rest) for stream, *rest in expected]


@pytest.mark.vllm
def test_these_are_all_of_vllms_that_use_the_stream():
    """In vLLM 0.32.0; another version may have more, or may have mended it."""
    import inspect

    from vllm.v1.worker.gpu.pp_utils import PPHandler

    users = {
        name
        for name, function in inspect.getmembers(PPHandler, inspect.isfunction)
        if "self.main_stream" in inspect.getsource(inspect.unwrap(function))
    }
    assert users - {"__init__"} == set(pipeline._ORDERED)
