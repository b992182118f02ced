"""How a GPU's steps are split into decodes, prompts and groups of prompts, run through vLLM on the CPU.

Kernels and FlashAttention are replaced by torch here; what they are given is what is tested. The kernels have
their own tests, and tests/test_attention_gpu.py runs all of it on a GPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from served import generate, random_prompt, start

from vllm_scalesearch import attention_prefill, attention_warmup, kv_pages
from vllm_scalesearch.attention_prefill import plan
from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_prompt_attention, paged_attention, triton_kv_gather
from vllm_scalesearch.ops.triton_paged_attention import attention_constants


def test_groups_hold_what_the_budget_allows() -> None:
    lengths, counts = [50, 30, 100, 40, 10, 500], [1, 30, 60, 40, 5, 7]
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    groups = plan(torch.tensor(starts).int(), starts, torch.tensor(lengths).int(), lengths, 1, 150)
    assert [(g.requests.start, g.requests.stop) for g in groups] == [(1, 3), (3, 5), (5, 6)]
    assert [(g.queries.start, g.queries.stop) for g in groups] == [(1, 91), (91, 136), (136, 143)]
    assert [g.tokens for g in groups] == [130, 50, 500]
    assert [g.k_start_loc.tolist() for g in groups] == [[0, 30, 130], [0, 40, 50], [0, 500]]
    assert [g.query_start_loc.tolist() for g in groups] == [[0, 30, 90], [0, 40, 45], [0, 7]]
    assert [(g.max_query_len, g.max_seq_len) for g in groups] == [(60, 100), (40, 40), (7, 500)]
    assert [g.context for g in groups] == [True, True, True]
    assert not plan(torch.tensor([0, 30]), [0, 30], torch.tensor([30]), [30], 0, 150)[0].context


def gathered(pages, full, layout, step, options, k_out, v_out, k_start_loc, max_tokens) -> None:
    """`triton_kv_gather.gather` in torch."""
    assert max_tokens == len(k_out) >= int(k_start_loc[-1])
    dim = layout.head_size
    for request, length in enumerate(step.seq_lens.tolist()):
        queries = int(step.query_start_loc[request + 1] - step.query_start_loc[request])
        blocks = step.block_table[request, : -(-length // layout.block_size)].long()
        rows = slice(int(k_start_loc[request]), int(k_start_loc[request]) + length)
        for out, stored in zip(
            (k_out, v_out), kv_pages.read(pages, layout, blocks, options.v_scale), strict=True
        ):
            out[rows] = stored[:, :length].transpose(0, 1).to(out.dtype)
        token = torch.arange(length)
        boundary = int(options.boundary(torch.tensor([length - queries]))[0])
        token = token[(token < options.sink) | (token >= boundary)]
        size = full.shape[2]
        kept = full[step.full_block_table[request, token // size].long(), :, token % size]
        k_out[rows][token], v_out[rows][token] = kept[..., :dim], kept[..., dim:]


def attended(self, q, k, v, output, group, options) -> None:
    """FlashAttention over a group, in torch."""
    for request in range(group.requests.stop - group.requests.start):
        rows = slice(*group.query_start_loc[request : request + 2].tolist())
        keys = slice(*group.k_start_loc[request : request + 2].tolist())
        count, length = rows.stop - rows.start, keys.stop - keys.start
        assert count <= group.max_query_len and length <= group.max_seq_len
        position = torch.arange(length - count, length)[:, None]
        seen = torch.arange(length) <= position
        if options.sliding_window is not None:
            seen &= torch.arange(length) > position - options.sliding_window
        heads = (x.transpose(0, 1).float() for x in (q[rows], k[keys], v[keys]))
        found = F.scaled_dot_product_attention(*heads, attn_mask=seen, scale=self.scale, enable_gqa=True)
        output[rows] = found.transpose(0, 1).to(output.dtype)


def tiled(q, q_stored, pages, full, layout, step, options, output, k_start_loc, max_tokens) -> None:
    """`cuda_prompt_attention.attend`, by the definition."""
    assert step.query_start_loc[0] == 0 and step.query_start_loc[-1] == len(q) == len(output)
    assert k_start_loc.diff().equal(step.seq_lens) and max_tokens >= int(k_start_loc[-1])
    paged_attention.attention(q, pages, full, layout, step, None, options, output)


class Gpu:
    """The platform, saying that it is CUDA."""

    def __init__(self, platform) -> None:
        self._platform = platform

    def is_cuda(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return getattr(self._platform, name)


def test_warm_up_runs_every_kind_of_step(monkeypatch) -> None:
    """On the CPU, where the definition runs in the place of the kernels."""
    seen = []

    def tiled(q, q_stored, pages, full, layout, step, *rest):
        seen.append(("tiles", len(q), int(step.seq_lens[0])))

    attention = paged_attention.attention
    monkeypatch.setattr(attention_warmup, "_QUERIES", (1, 4, 33, 60))
    monkeypatch.setattr(cuda_prompt_attention, "attend", tiled)
    monkeypatch.setattr(paged_attention, "transform_query", lambda q, m, options: (q, q))
    monkeypatch.setattr(
        paged_attention, "attention", lambda q, *rest: (seen.append(("packed", len(q))), attention(q, *rest))
    )
    options = AttentionOptions(k="absmax", v="absmax")
    attention_warmup.warm_up(
        PageLayout(64, 64, "tokens"), 4, 2, None, None, options, torch.bfloat16, True, attended,
        torch.device("cpu"),
    )  # fmt: skip
    packed = [("packed", queries) for queries in (1, 1, 4, 4)]
    assert seen == [*packed, *(("tiles", n, context + n) for n in (33, 60) for context in (512, 0))]


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16, 71])
def test_warm_up_compiles_for_any_number_of_queries(dim: int, group: int) -> None:
    def rows(queries: int) -> int:
        layout, options = PageLayout(64, dim, "tokens"), AttentionOptions(k="absmax", v="absmax")
        return attention_constants(layout, 16, options, group, queries, (9, 0))[0]["ROWS"]

    warm = {rows(queries) for queries in attention_warmup._QUERIES}
    assert {rows(queries) for queries in range(1, 8193)} == warm and len(warm) <= 3


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="replaces the kernels of a GPU")
@pytest.mark.parametrize(
    ("architecture", "config", "kernel"),
    [
        ("Llama", {}, "flash"),
        ("Mistral", {"sliding_window": 40}, "flash"),
        ("Llama", {}, "tiles"),
        ("Llama", {}, "triton"),
    ],
)
def test_steps_are_split_as_a_gpu_needs_it(engine, tiny, monkeypatch, architecture, config, kernel) -> None:
    from vllm_scalesearch import attention

    impl = attention.ScaleSearchAttentionImpl
    forward, kinds = impl.forward, set()
    tiles = []

    def compared(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest, **named):
        """What the parts give against attention to all of the step at once, the same cache read twice."""
        result = forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest, **named)
        if attn_metadata is not None and attn_metadata.prompts is not None:
            prompts, count = attn_metadata.prompts, len(attn_metadata.slot_mapping)
            kinds.add((prompts.first > 0, prompts.groups is None, any(g.context for g in prompts.groups or ())))
            whole = torch.empty_like(output)
            forward(
                self, layer, query, key, value, kv_cache, replace(attn_metadata, prompts=None), whole, *rest
            )
            error = (output[:count].float() - whole[:count].float()).norm() / whole[:count].float().norm()
            assert error < 2**-7, error
        return result

    monkeypatch.setattr(attention, "current_platform", Gpu(attention.current_platform))
    monkeypatch.setattr(attention_prefill, "LEAST_QUERIES", 9)
    monkeypatch.setattr(impl, "forward", compared)
    monkeypatch.setattr(impl, "_flash_attention", attended)
    monkeypatch.setattr(impl, "_kernels", lambda self: "torch in the place of kernels")
    monkeypatch.setattr(impl, "_prompt_kernel", lambda self: kernel)
    monkeypatch.setattr(impl, "_warm_up", lambda self: None)
    monkeypatch.setattr(cuda_prompt_attention, "attend", lambda *given: tiles.append(tiled(*given)))
    monkeypatch.setattr(triton_kv_gather, "gather", gathered)
    monkeypatch.setattr(
        paged_attention, "transform_query", lambda q, m, options: (paged_attention.transformed(q, m), None)
    )
    prefill = "full_precision" if kernel == "flash" else "stored"
    llm = start(engine, tiny(architecture, head_dim=64, **config), {"prefill": prefill},
                max_num_batched_tokens=48, max_num_seqs=8)  # fmt: skip
    generate(llm, [random_prompt(n, n) for n in (5, 130, 20, 61, 90)], tokens=12)
    # With and without decodes in front; in groups, some with context.
    assert {True, False} == {kind[0] for kind in kinds}
    assert False in {kind[1] for kind in kinds}
    assert True in {kind[2] for kind in kinds}
    assert bool(tiles) == (kernel == "tiles")
