"""Pipeline parallelism in vLLM 0.32 on CUDA: sampled tokens are exchanged beside the model's own stream.

`PPHandler` keeps the stream that is current when it is made, which is the default one, and orders its
broadcasts by it. Whoever asks vLLM for its current stream first makes another one current: Marlin does, for its
locks. From then on nothing orders what the last stage sends and what the first one reads: a first stage that is
ahead of the others takes what lies in memory for counts of tokens, and computes positions from these.
"""

import functools
from typing import Any

import torch

_ORDERED = ("get_prev_sampled_outputs", "receive", "broadcast", "broadcast_drafts")


def follow_current_stream(handler: type) -> None:
    """Have `handler`, vLLM's class or one like it, order each exchange by the stream that is current then."""
    for name in _ORDERED:
        method = getattr(handler, name)
        if not hasattr(method, "__wrapped__"):
            setattr(handler, name, _following(method))


def _following(method: Any) -> Any:
    @functools.wraps(method)
    def call(self, *arguments: Any, **named: Any) -> Any:
        self.main_stream = torch.cuda.current_stream(self.device)
        return method(self, *arguments, **named)

    return call
