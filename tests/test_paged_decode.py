"""paged_decode.cu and paged_decode_wide.cu: the reference's attention, of requests that have one query each."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_batches import (
    BF16,
    FP16,
    LONG_DECODE,
    SENTINEL,
    build,
    check_output,
    like,
    matrix_of,
    on_device,
)
from values import same_bits

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import compile_kernel
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_kv_write, cuda_paged_decode, paged_attention

KV = dict(q=None, p=None, k="fast", v="fast", v_group="tokens", recent=16)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("group", [8, 32])
@pytest.mark.parametrize("dim", cuda_paged_decode.HEAD_SIZES)
def test_it_compiles_without_a_gpu(dim: int, group: int, arch: str) -> None:
    options = AttentionOptions(**KV)
    program = cuda_paged_decode.program(PageLayout(64, dim, "tokens"), 16, options, group, BF16)
    for name in (program.name, "paged_decode_merge"):
        assert compile_kernel(f"{name}.cu", name, program.macros, arch)[1:4] == b"ELF"


@pytest.mark.parametrize("group", [*range(1, 33), 48, 64, 71, 128])
@pytest.mark.parametrize("dim", cuda_paged_decode.HEAD_SIZES)
def test_programs_share_the_query_heads_and_fit(dim: int, group: int) -> None:
    options = AttentionOptions(**KV)
    program = cuda_paged_decode.program(PageLayout(64, dim, "tokens"), 16, options, group, BF16)
    assert (program.pieces - 1) * program.queries < group <= program.pieces * program.queries
    assert (program.name == "paged_decode_wide") == (group > 8)
    assert program.shared_bytes <= 99 * 1024  # of a block, on the least of GPUs


@pytest.mark.parametrize(
    ("capability", "changes", "queries", "expected"),
    [
        ((9, 0), {}, 1, "cuda"),
        ((9, 0), {}, 2, "triton"),
        ((10, 0), {}, 1, "cuda"),
        ((8, 9), dict(v_group="head_dim"), 1, "triton"),
        ((9, 0), dict(q="paper", p="paper"), 1, "triton"),
        ((10, 0), dict(q="paper", p="paper"), 7, "fp4"),
        ((12, 0), dict(q="paper", p="paper"), 1, "fp4"),
        ((12, 0), dict(q="paper", p="paper", v_group="head_dim"), 1, "triton"),
    ],
    ids=str,
)
def test_which_kernel_attends(capability, changes, queries, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    options = AttentionOptions(**(KV | changes))
    layout = PageLayout(64, 128, options.v_group)
    assert paged_attention.kernel_for(layout, options, queries, torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("kernel", "reason", "group", "expected"),
    [
        ("cuda", None, 4, ["write with queries", "decode"]),
        ("cuda", None, 12, ["write with queries, decode begins early", "decode"]),
        ("cuda", "a reason", 4, ["write", "attention"]),
        ("triton", None, 4, ["write", "attention"]),
    ],
)
def test_who_transforms_queries(kernel, reason, group, expected, monkeypatch) -> None:
    """The launch that writes, where decoding in CUDA is behind it, and that gets what it returns."""
    ran, transformed = [], object()

    def write(*arguments):
        *_, q, q_matrix, begins_early = arguments
        assert (q, q_matrix) == (queries, "q_matrix")
        ran.append("write with queries" + (", decode begins early" if begins_early else ""))
        return transformed

    def decode(q, *arguments):
        assert q is transformed
        ran.append("decode")

    monkeypatch.setattr(paged_attention, "kernel_for", lambda *arguments: kernel)
    monkeypatch.setattr(paged_attention, "write", lambda *arguments: ran.append("write"))
    monkeypatch.setattr(paged_attention, "attention", lambda *arguments: ran.append("attention"))
    monkeypatch.setattr(cuda_kv_write, "unsupported", lambda *arguments: reason)
    monkeypatch.setattr(cuda_kv_write, "write", write)
    monkeypatch.setattr(cuda_paged_decode, "decode", decode)
    queries = SimpleNamespace(shape=(1, 2 * group, 128))
    pages = SimpleNamespace(device=torch.device("cuda"), shape=(1, 2, 64, 144))
    paged_attention.write_and_attend(
        queries, "k", "v", pages, "full", "layout", SimpleNamespace(max_query_len=1), "q_matrix", "k_matrix",
        AttentionOptions(**KV), "output",
    )  # fmt: skip
    assert ran == expected


@pytest.mark.parametrize(
    "group, dim, expected",
    [
        *((4, 128, 4), (3, 64, 3), (7, 256, 1), (8, 128, 8), (8, 256, 4)),
        *((9, 64, 9), (12, 128, 12), (32, 96, 32), (33, 128, 17), (71, 64, 24), (20, 256, 20), (40, 256, 20)),
    ],
)
def test_query_heads_of_a_program(group: int, dim: int, expected: int) -> None:
    assert cuda_paged_decode.queries_of(group, dim) == expected


LENGTHS = (0, 1, 15, 16, 31, 63, 64, 511, 1000, 2047, 2048, 4095)
SIZES = {
    "64, group of 3": dict(dim=64, group=3, heads=3, block_size=16),
    "96, alone": dict(dim=96, group=1, heads=2, block_size=32),
    "96, group of 12": dict(dim=96, group=12, heads=1, block_size=48),
    "128, group of 4": dict(dim=128, group=4, heads=2, block_size=64),
    "128, group of 8": dict(dim=128, group=8, heads=1, block_size=128),
    "128, group of 5, fp16": dict(dim=128, group=5, heads=1, block_size=64, dtype=FP16),
    "64, group of 71": dict(dim=64, group=71, heads=1, block_size=32),
    "64, group of 32": dict(dim=64, group=32, heads=2, block_size=16),
    "96, group of 24": dict(dim=96, group=24, heads=2, block_size=32),
    "128, group of 12": dict(dim=128, group=12, heads=2, block_size=64),
    "128, group of 16": dict(dim=128, group=16, heads=2, block_size=128),
    "128, group of 32": dict(dim=128, group=32, heads=1, block_size=64),
    "128, group of 20, fp16": dict(dim=128, group=20, heads=1, block_size=16, dtype=FP16),
    "256, group of 12": dict(dim=256, group=12, heads=1, block_size=48),
    "256, group of 32": dict(dim=256, group=32, heads=1, block_size=64),
    "256, group of 16, fp16": dict(dim=256, group=16, heads=2, block_size=16, dtype=FP16),
    "256, group of 8": dict(dim=256, group=8, heads=1, block_size=64),
    "256, group of 2, fp16": dict(dim=256, group=2, heads=2, block_size=16, dtype=FP16),
}
OPTIONS = {
    "default": dict(recent=64, v_scale=1 / 16),
    "no sink": dict(sink=0, recent=1),
    "odd sink": dict(sink=37, recent=5, v_scale=4.0),
    "large sink": dict(sink=200, recent=300),
    "window": dict(sliding_window=500),
    "small window, cap": dict(sliding_window=50, logits_soft_cap=3.0),
    "window of few": dict(sliding_window=7, softmax_scale=0.3),
}


def run(batch) -> torch.Tensor:
    q = batch.q.to("cuda")
    output = torch.full_like(q, SENTINEL)
    assert cuda_paged_decode.unsupported(batch.layout, batch.options, q.device) is None
    cuda_paged_decode.decode(
        q, like(batch.needed_pages, "cuda"), like(batch.needed_full, "cuda"), batch.layout,
        on_device(batch.needed_step), batch.options, output,
    )  # fmt: skip
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str) -> None:
    batch = build([(n, 1) for n in LENGTHS], AttentionOptions(**KV), padding=5, **SIZES[size])
    check_output(run(batch), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 16, 32])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, group: int) -> None:
    options = AttentionOptions(**(KV | OPTIONS[options]))
    batch = build([(n, 1) for n in LENGTHS], options, dim=128, group=group, heads=1, block_size=64)
    check_output(run(batch), batch)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [4, 12, 24])
@pytest.mark.parametrize(
    "lengths", [[5], [40_000], [1] * 300, list(range(1, 600, 7))], ids=["5", "40k", "300", "many"]
)
def test_batches(lengths: list[int], group: int) -> None:
    batch = build(
        [(n - 1, 1) for n in lengths], AttentionOptions(**KV), dim=64, group=group, heads=2, block_size=32
    )
    first = run(batch)
    check_output(first, batch)
    assert torch.equal(run(batch), first)  # whichever blocks were first


@pytest.mark.gpu
@pytest.mark.parametrize("group", [2, 12, 24])
def test_nan_reaches_those_that_see_it(group: int) -> None:
    """A NaN in a stored key or value of the first request, one in a value of the second's newest token."""
    lengths = [200, 100, 70, 90]
    starts = [0, 200, 300, 370]
    for keys, values in (([50], []), ([], [60]), ([], [299])):
        batch = build(
            [(n - 1, 1) for n in lengths],
            AttentionOptions(**KV),
            nan_keys=keys,
            nan_values=values,
            block_size=64,
            group=group,
        )
        output = run(batch).isnan().any(-1).any(-1).cpu()
        hit = [any(s <= t < s + n for t in keys + values) for s, n in zip(starts, lengths, strict=True)]
        assert output.tolist() == hit


@pytest.mark.gpu
@pytest.mark.parametrize("group", [2, 12, 24])
def test_capture_in_a_cuda_graph(group: int) -> None:
    options = AttentionOptions(**KV)
    batches = [build([(n, 1) for n in some], options, dim=128, group=group, block_size=64, seed=i)
               for i, some in enumerate(([900, 3, 64], [900, 3, 64]))]  # fmt: skip
    tensors = [(b.q.cuda(), like(b.needed_pages, "cuda"), like(b.needed_full, "cuda")) for b in batches]
    steps = [on_device(b.needed_step) for b in batches]
    q, pages, full = (torch.empty_like(x) if x.is_contiguous() else like(x, "cuda") for x in tensors[0])
    output = torch.empty_like(q)

    def load(i: int) -> None:
        for to, source in zip((q, pages, full), tensors[i], strict=True):
            to.copy_(source)
        for name, x in vars(steps[0]).items():
            if isinstance(x, torch.Tensor) and i:
                x.copy_(getattr(steps[i], name))
        output.fill_(SENTINEL)

    def attend() -> None:
        cuda_paged_decode.decode(q, pages, full, batches[0].layout, steps[0], options, output)

    load(0)
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for i in (1,):
        load(i)
        graph.replay()
        check_output(output, batches[i])


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "matrix"), [(4, True), (4, False), (12, True), (32, True)])
def test_a_step_reads_what_it_wrote(group: int, matrix: bool) -> None:
    """Kernels begin while the one in front writes tokens and queries: all of it must be waited for."""
    batch = build(LONG_DECODE, AttentionOptions(**KV), dim=128, heads=2, group=group, block_size=64)
    step, slots = on_device(batch.needed_step), batch.needed_step.full_slots.cuda()
    q, k, v = (x.cuda() for x in (batch.q, batch.k, batch.v))
    q_matrix = k_matrix = matrix_of(2, 128).cuda() if matrix else None
    pages, full = like(batch.needed_pages, "cuda"), like(batch.needed_full, "cuda")
    arguments = (pages, full, batch.layout, step)
    nothing = torch.full((len(slots), *full.shape[1::2]), torch.nan, dtype=full.dtype, device="cuda")

    def forget() -> None:
        full[slots // full.shape[2], :, slots % full.shape[2]] = nothing

    expected, output = torch.zeros_like(q), torch.zeros_like(q)
    forget()
    paged_attention.write(*arguments, k, v, k_matrix, batch.options)
    torch.cuda.synchronize()
    paged_attention.attention(q, *arguments, q_matrix, batch.options, expected)
    assert not expected.isnan().any()

    def attend() -> None:
        paged_attention.write_and_attend(
            q, k, v, *arguments, q_matrix, k_matrix, batch.options, output
        )  # fmt: skip

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forget()
        attend()
    for _ in range(20):
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(output, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [3, 300], ids=["fewer than blocks", "more than blocks"])
@pytest.mark.parametrize("group", [4, 12, 24])
def test_requests_that_have_no_tokens_any_more(group: int, requests: int) -> None:
    """Nothing is merged by what a launch with more tokens left in the same memory."""
    lengths = [3000, *[40] * (requests - 1)]
    batch = build([(n, 1) for n in lengths], AttentionOptions(**KV), dim=64, heads=2, group=group)
    check_output(run(batch), batch)
    of_all = batch.needed_step.seq_lens
    some = replace(batch.needed_step, seq_lens=torch.where(torch.arange(requests) % 2 == 0, of_all, 0))
    none = replace(batch.needed_step, seq_lens=torch.zeros_like(of_all))
    expected = run(batch)
    output = run(replace(batch, needed_step=some))
    torch.testing.assert_close(output[::2], expected[::2], atol=2e-3, rtol=1.6e-2)
    assert (output[1::2] == SENTINEL).all()
    assert (run(replace(batch, needed_step=none)) == SENTINEL).all()


@pytest.mark.gpu
def test_wrong_arguments_say_why() -> None:
    batch = build([(40, 1)], AttentionOptions(**KV), dim=64)
    q = batch.q.cuda()
    with pytest.raises(ValueError, match="output is"):
        cuda_paged_decode.decode(
            q, like(batch.pages, "cuda"), like(batch.full, "cuda"), batch.layout, on_device(batch.step),
            batch.options, q.half(),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(v_group="head_dim"), "along head_dim"),
        (dict(p="fast"), "quantized"),
        (dict(v_scale=2.0**20), "v_scale"),
    ],
    ids=str,
)
def test_what_it_does_not_do_has_a_reason(changes: dict, reason: str) -> None:
    options = AttentionOptions(**(KV | changes))
    found = cuda_paged_decode.unsupported(PageLayout(64, 128, options.v_group), options, torch.device("cuda"))
    assert re.search(reason, found)
