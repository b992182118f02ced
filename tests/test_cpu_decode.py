"""cpu_decode.py against the definition's attention to what is in the pages, request by request."""

from dataclasses import replace

import pytest
import torch
from attention_batches import FP16, build

from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions, attend
from vllm_scalesearch.ops import cpu_decode, paged_attention

LENGTHS = (1, 5, 16, 17, 63, 64, 65, 130, 200, 333)


def check(options: AttentionOptions, lengths=LENGTHS, **sizes) -> None:
    batch = build([(length - 1, 1) for length in lengths], options, **sizes)
    requests = torch.arange(len(lengths))
    found = cpu_decode.decode(
        batch.q[requests], batch.pages, batch.full, batch.layout, batch.step, requests, options
    )
    heads = batch.pages.shape[1]
    for request, length in enumerate(lengths):
        q = batch.q[request : request + 1].float().unflatten(1, (heads, -1)).permute(1, 2, 0, 3)
        operands = paged_attention._operands(
            q, batch.pages, batch.full, batch.layout, batch.step, request, length, options
        )
        wide = replace(options, kv_tile=-(-length // BLOCK) * BLOCK)
        expected = attend(operands, wide)[:, :, 0].flatten(0, 1)
        # fp32 sums in another order; NaN would fail.
        assert (found[request] - expected).norm() < 1e-5 * expected.norm(), (request, length)


@pytest.mark.parametrize("v_group", ["head_dim", "tokens"])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {}),
        (dict(recent=64, v_scale=1 / 16), dict(dim=128, group=4, heads=2)),
        (dict(sink=0, recent=1), dict(dim=64, group=1, heads=3, block_size=16)),
        (dict(sink=37, recent=5), dict(dim=96, group=3, heads=1, block_size=32)),
        (dict(sink=200), dict(dim=64)),
        (dict(sliding_window=50), dict(dim=256, group=2, heads=1, block_size=128)),
        (dict(sliding_window=7, softmax_scale=0.3), dict(dim=64)),
        (dict(logits_soft_cap=3.0, own_chunk=True), dict(dim=64, dtype=FP16)),
    ],
    ids=str,
)
def test_it_is_the_definition(options: dict, sizes: dict, v_group: str) -> None:
    check(AttentionOptions(**{"recent": 16, **options}, q=None, p=None, v_group=v_group), **sizes)


def test_short_requests_read_nothing_as_stored(monkeypatch) -> None:
    monkeypatch.setattr(cpu_decode.kv_pages, "read_apart", None)
    check(AttentionOptions(q=None, p=None, v_group="head_dim", sink=16, recent=64), lengths=(1, 30, 79, 80))
