"""kernels/prompt_tiles.cu and prompt_attention.cu: the reference's attention, of requests with many queries."""

from dataclasses import replace

import pytest
import torch
from attention_batches import BF16, FP16, SENTINEL, build, check_output, like, on_device

from vllm_scalesearch import attention_prefill
from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_prompt_attention, paged_attention, triton_kv_write

KV = dict(q=None, p=None, k="fast", v="fast", v_group="tokens")
PAPER = dict(k="fast", v="fast", v_group="tokens")
# Of a step's requests: whole prompts, chunks over a context, some shorter than a tile or a block of 16.
REQUESTS = [(0, 300), (200, 130), (1000, 70), (3, 9), (129, 128), (0, 40), (517, 260)]


@pytest.mark.parametrize("dim", cuda_prompt_attention.HEAD_SIZES)
@pytest.mark.parametrize("p", [None, "absmax", "paper", "exact"])
def test_they_compile_without_a_gpu(dim: int, p: str | None) -> None:
    options = AttentionOptions(**PAPER | dict(p=p, sliding_window=100 if dim == 64 else None))
    dtype = FP16 if dim == 64 else BF16
    tiles, attention = cuda_prompt_attention.defines(PageLayout(64, dim, "tokens"), 16, options, dtype)
    assert compile_kernel("prompt_tiles.cu", "prompt_tiles", tiles, "sm_90a")[1:4] == b"ELF"
    assert compile_kernel("prompt_attention.cu", "prompt_attention", attention, "sm_90a")[1:4] == b"ELF"
    assert cuda_prompt_attention.shared_bytes(dim, options) <= 227 * 1024


@pytest.mark.parametrize(
    ("capability", "changes", "expected"),
    [
        ((9, 0), {}, None),
        ((8, 9), {}, "compute capability"),
        ((9, 0), dict(v_group="head_dim"), "along head_dim"),
        ((9, 0), dict(own_chunk=True), "full precision"),
        ((9, 0), dict(logits_soft_cap=3.0), "soft cap"),
        ((9, 0), dict(p="full"), "policy 'full' of P"),
        ((9, 0), dict(two_level_p=False), "one level"),
    ],
    ids=str,
)
def test_what_it_does_not_do_has_a_reason(capability, changes, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    options = AttentionOptions(**(PAPER | changes))
    reason = cuda_prompt_attention.unsupported(
        PageLayout(64, 128, options.v_group), options, torch.device("cuda")
    )
    assert (reason is None) == (expected is None) and (expected or "") in (reason or "")


def attended(batch, options=None) -> torch.Tensor:
    """Output (T, Hq, D) of the kernels, which held SENTINEL."""
    options = options or batch.options
    step = on_device(batch.needed_step)
    assert cuda_prompt_attention.unsupported(batch.layout, options, torch.device("cuda")) is None
    lengths = step.seq_lens.tolist()
    # Some bytes of context more than there are, as vLLM's own bound of lengths has.
    bounds = [n + 200 for n in lengths]
    (group,) = attention_prefill.plan(
        step.query_start_loc, step.query_start_loc.tolist(), step.seq_lens, bounds, 0, 1 << 20
    )
    q, q_stored = triton_kv_write.transform_query(batch.q.cuda(), None, options)
    output = torch.full_like(q, SENTINEL)
    cuda_prompt_attention.attend(
        q, q_stored, like(batch.needed_pages, "cuda"), like(batch.needed_full, "cuda"), batch.layout, step,
        options, output, group.k_start_loc, group.tokens,
    )  # fmt: skip
    return output


def reference(batch, options) -> torch.Tensor:
    output = torch.empty_like(batch.q, dtype=torch.float32)
    paged_attention.attention(batch.q, batch.pages, batch.full, batch.layout, batch.step, None, options, output)
    return output


SIZES = {
    "128, group of 4": dict(dim=128, group=4, heads=2, block_size=64),
    "128, group of 3, fp16": dict(dim=128, group=3, heads=1, block_size=16, dtype=FP16),
    "64, group of 3": dict(dim=64, group=3, heads=3, block_size=32),
    "64, alone, fp16": dict(dim=64, group=1, heads=2, block_size=128, dtype=FP16),
}
OPTIONS = {
    "default": dict(recent=64, v_scale=1 / 16),
    "no sink, none recent": dict(sink=0, recent=0),
    "odd sink": dict(sink=37, recent=5, v_scale=4.0),
    "large sink": dict(sink=200, recent=300),
    "window": dict(sliding_window=150, recent=16),
    "window within the recent ones": dict(sliding_window=50, recent=64),
    "no sink, window": dict(sliding_window=290, sink=0, recent=1, softmax_scale=0.3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str) -> None:
    batch = build(REQUESTS, AttentionOptions(**KV, recent=16), **SIZES[size])
    check_output(attended(batch), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str) -> None:
    batch = build(REQUESTS, AttentionOptions(**(KV | OPTIONS[options])), dim=128, heads=1, block_size=64)
    check_output(attended(batch), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["absmax", "fast", "paper", "exact"])
@pytest.mark.parametrize("size", SIZES)
def test_quantized_q_and_p(policy: str, size: str) -> None:
    """P's search is in fp16: of two candidates that are as good as equal another one may win.

    So outputs differ by less than P's quantization changes them, and are no further from the exact ones.
    """
    options = AttentionOptions(**(PAPER | dict(p=policy, recent=16)))
    batch = build(REQUESTS, options, **SIZES[size])
    got, expected = attended(batch).float().cpu(), reference(batch, options)
    exact = reference(batch, replace(options, p=None))
    scale = expected.square().mean(-1).sqrt().mean()
    quantization = ((expected - exact).square().mean().sqrt() / scale).item()
    own = ((got - exact).square().mean().sqrt() / scale).item()
    difference = ((got - expected).square().mean().sqrt() / scale).item()
    rounding = torch.finfo(batch.q.dtype).eps
    assert own < 1.05 * quantization + rounding
    assert difference < 0.4 * quantization + rounding


@pytest.mark.gpu
def test_rows_of_others_are_left_alone() -> None:
    batch = build([(40, 70), (0, 129)], AttentionOptions(**PAPER), dim=64, padding=3)
    batch.needed_step = replace(
        batch.needed_step, query_start_loc=batch.needed_step.query_start_loc[:3],
        seq_lens=batch.needed_step.seq_lens[:2], block_table=batch.needed_step.block_table[:2],
        full_block_table=batch.needed_step.full_block_table[:2],
    )  # fmt: skip
    output = attended(batch)
    assert (output[batch.tokens :] == SENTINEL).all()
    assert output.isfinite().all()


@pytest.mark.gpu
def test_nan_reaches_those_that_see_it() -> None:
    """In a stored key of the first request, in a value of the second's newest token."""
    for keys, values in (([20], []), ([], [329])):
        batch = build(
            [(40, 160), (60, 70), (10, 100)], AttentionOptions(**KV), nan_keys=keys, nan_values=values, dim=64
        )
        output = attended(batch).isnan().any(-1).any(-1).cpu()
        rows = output.split([160, 70, 100])
        if keys:
            assert rows[0].all() and not rows[1].any() and not rows[2].any()
        else:
            assert rows[1][-1] and not rows[0].any() and not rows[2].any()


@pytest.mark.gpu
def test_wrong_arguments_say_why() -> None:
    batch = build([(40, 70)], AttentionOptions(**KV), dim=64)
    step = on_device(batch.step)
    (group,) = attention_prefill.plan(step.query_start_loc, [0, 70], step.seq_lens, [110], 0, 200)
    q = batch.q.cuda()
    with pytest.raises(ValueError, match="output is"):
        cuda_prompt_attention.attend(
            q, q, like(batch.pages, "cuda"), like(batch.full, "cuda"), batch.layout, step, batch.options,
            q.half(), group.k_start_loc, group.tokens,
        )  # fmt: skip
