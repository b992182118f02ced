"""The Triton kernels of attention to the paged cache, also to what theirs wrote, give the reference's values.

Kernels run on CUDA tensors where there is a GPU, and in Triton's interpreter on the CPU otherwise.
The interpreter has to be chosen before triton is imported, so `test_on_the_cpu` runs this file again,
in processes of their own. The references run on the CPU; batches are those of attention_batches.py.
"""

from dataclasses import replace

import interpreter
import pytest
import torch
from attention_batches import (
    BF16,
    FP16,
    KV,
    LONG,
    LONG_DECODE,
    NAN_BYTE,
    SENTINEL,
    Batch,
    build,
    check_output,
    check_write,
    like,
    matrix_of,
    on_device,
    strided,
)
from interpreter import COMPILES, DEVICE, INTERPRETED, RUNS_KERNELS
from triton_compiled import HOPPER_SHARED_MEMORY, SHARED_MEMORY, compiled, spilled

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_kv_write, triton_paged_attention


@pytest.mark.skipif(INTERPRETED, reason="is what test_on_the_cpu runs")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_on_the_cpu() -> None:
    """All tests that run kernels, in the interpreter, in two processes."""
    interpreter.run_tests(__file__, ("gives_the_values", "not gives_the_values"), 5)


# --- attention -----------------------------------------------------------------------------------


def check_attention(batch: Batch, pages: torch.Tensor | None = None) -> None:
    """Attention to what is needed only, against the reference on all there is."""
    q, q_stored = triton_kv_write.transform_query(batch.q.to(DEVICE), None, batch.options)
    output = torch.full_like(q, SENTINEL)
    triton_paged_attention.attention(
        q, q_stored, like(batch.needed_pages) if pages is None else pages, like(batch.needed_full),
        batch.layout, on_device(batch.needed_step), batch.options, output,
    )  # fmt: skip
    check_output(output, batch)


# Mixed lengths; contexts shorter than a block; one query and several; a request that is all sink.
MIXED = [(70, 1), (0, 5), (130, 21), (9, 3), (0, 37), (100, 2)]
DECODE = [(200, 1), (63, 1), (64, 1), (15, 1), (0, 1), (143, 1)]

CASES = {
    "head_dim": dict(options=dict(KV, v_group="head_dim", v_scale=1 / 16), requests=MIXED),
    "tokens": dict(options=dict(KV, v_group="tokens", v_scale=1 / 16), requests=MIXED),
    "paper": dict(options=dict(v_group="tokens"), requests=MIXED),
    "paper, one level, head_dim": dict(
        options=dict(v_group="head_dim", two_level_p=False, recent=5, p="fast"), requests=[(70, 1), (50, 21)]
    ),
    "q alone": dict(options=dict(v_group="tokens", p=None, sink=3), requests=[(70, 4)], dim=96, group=1),
    "p alone, fp16": dict(options=dict(v_group="tokens", q=None), requests=[(90, 9)], dtype=FP16, heads=1),
    "fp16": dict(options=dict(KV, v_group="tokens", v_scale=4.0), requests=MIXED, dtype=FP16, heads=1),
    "decode": dict(options=dict(KV, v_group="head_dim"), requests=DECODE, group=4),
    "decode, tokens, group of 3": dict(
        options=dict(KV, v_group="tokens", recent=1, sink=0), requests=DECODE, group=3, block_size=32, heads=1
    ),
    "decode, paper": dict(options=dict(v_group="tokens"), requests=DECODE, block_size=64, heads=1),
    "several queries, split": dict(
        options=dict(KV, v_group="head_dim", sliding_window=90), requests=[(190, 3), (10, 2)]
    ),
    "own chunk": dict(options=dict(KV, v_group="tokens", own_chunk=True), requests=MIXED, block_size=48),
    "own chunk, paper": dict(
        options=dict(v_group="head_dim", own_chunk=True), requests=[(77, 30), (0, 70)], heads=1
    ),
    "window": dict(
        options=dict(KV, v_group="tokens", sliding_window=40), requests=[(130, 21), (9, 3), (200, 1)]
    ),
    "window within the recent ones": dict(
        options=dict(KV, v_group="head_dim", sliding_window=7), requests=[(70, 9), (64, 1)], heads=1
    ),
    "window, paper": dict(
        options=dict(v_group="tokens", sliding_window=70, logits_soft_cap=5.0), requests=[(130, 9)], heads=1
    ),
    "soft cap": dict(
        options=dict(KV, v_group="head_dim", logits_soft_cap=2.0, softmax_scale=0.3), requests=[(70, 20)],
        heads=1,
    ),
    "sink of many tiles": dict(options=dict(KV, v_group="tokens", sink=70), requests=[(200, 20)], heads=1),
    "one query head a KV head": dict(options=dict(KV, v_group="tokens"), requests=[(50, 6)], group=1),
    "tiles of 32, paper": dict(options=dict(v_group="head_dim", kv_tile=32), requests=[(80, 6)], heads=1),
    "heads of 128": dict(
        options=dict(KV, v_group="head_dim"), requests=[(90, 3), (9, 1)], dim=128, heads=1, block_size=64
    ),
    "heads of 256": dict(options=dict(KV, v_group="tokens"), requests=[(90, 3)], dim=256, heads=1),
    "heads of 96, head_dim": dict(
        options=dict(KV, v_group="head_dim"), requests=[(90, 3)], dim=96, heads=1, block_size=32
    ),
}  # fmt: skip


@RUNS_KERNELS
@pytest.mark.parametrize("case", CASES)
def test_attention_gives_the_values_of_the_reference(case: str) -> None:
    arguments = dict(CASES[case])
    options = AttentionOptions(**arguments.pop("options"))
    check_attention(build(arguments.pop("requests"), options, padding=2, **arguments))


@RUNS_KERNELS
@pytest.mark.parametrize("options", [dict(KV, v_group="head_dim"), dict(v_group="tokens", p="fast")], ids=str)
def test_nan_reaches_those_that_see_it(options: dict) -> None:
    # A key, and a value, of request 0 and 1 that are stored; the former in a tile of stored tokens only.
    requests = [(150, 2), (60, 3), (90, 2)]
    batch = build(requests, AttentionOptions(**options), heads=1, nan_keys=[70], nan_values=[152 + 20])
    q, q_stored = triton_kv_write.transform_query(batch.q.to(DEVICE), None, batch.options)
    output = torch.full_like(q, SENTINEL)
    triton_paged_attention.attention(
        q, q_stored, like(batch.needed_pages), like(batch.needed_full), batch.layout,
        on_device(batch.needed_step), batch.options, output,
    )  # fmt: skip
    expected = torch.empty_like(batch.q)
    paged_attention.attention(
        batch.q, batch.pages, batch.full, batch.layout, batch.step, None, batch.options, expected
    )
    assert expected.isnan().any(-1).flatten(1).all(1).tolist() == [True] * 5 + [False] * 2
    assert torch.equal(output.cpu().isnan(), expected.isnan())


@RUNS_KERNELS
def test_decoding_is_shared_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    merges = []
    kernel = triton_paged_attention._merge_kernel
    monkeypatch.setattr(triton_paged_attention, "_merge_kernel", _Recorder(kernel, merges))
    check_attention(build([(200, 1), (500, 1)], AttentionOptions(**KV), heads=1))
    assert merges == [4]
    check_attention(build([(500, 1)], AttentionOptions(), heads=1))
    assert merges == [4, 4]


class _Recorder:
    """A kernel that notes the segments it is launched for."""

    def __init__(self, kernel, launches: list[int]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append(arguments[6])
            return self.kernel[grid](*arguments, **constants)

        return launch


@RUNS_KERNELS
def test_what_follows_the_written_cache_is_attention_to_it() -> None:
    # Both kernels, one after the other, as a step runs them.
    options = AttentionOptions(v_group="tokens", q=None, p=None, v_scale=1 / 16)
    batch = build([(60, 5), (0, 33)], options, padding=1)
    pages, full, step = like(batch.needed_pages), like(batch.needed_full), on_device(batch.needed_step)
    for part in batch.layout.parts(pages)[2:]:
        part[batch.step.block_table[0, 3].item()] = NAN_BYTE  # the tile of tokens 48 to 63
    triton_kv_write.transform_and_write(
        pages, full, batch.layout, step, batch.k.to(DEVICE), batch.v.to(DEVICE), None, options
    )
    check_attention(batch, pages=pages)


@RUNS_KERNELS
def test_pages_at_any_word_are_written_and_read() -> None:
    options = AttentionOptions(v_group="tokens", q=None, p=None, k="fast", v="fast")
    batch = build([(40, 3)], options, heads=1)
    blocks, _, *page = batch.pages.shape
    stride = page[0] * page[1] + 4
    flat = torch.full((blocks * stride + 4,), NAN_BYTE, dtype=torch.uint8, device=DEVICE)
    pages = flat.as_strided(batch.pages.shape, (stride, stride, page[1], 1), 4).copy_(batch.needed_pages)
    step = on_device(batch.needed_step)
    full, k, v = like(batch.needed_full), batch.k.to(DEVICE), batch.v.to(DEVICE)
    triton_kv_write.transform_and_write(pages, full, batch.layout, step, k, v, None, options)
    expected = like(batch.needed_pages, "cpu")
    paged_attention.write(
        expected, batch.needed_full, batch.layout, batch.needed_step, batch.k, batch.v, None, options
    )
    assert torch.equal(pages.cpu(), expected)
    check_attention(batch, pages=pages)


# --- errors --------------------------------------------------------------------------------------


@RUNS_KERNELS
def test_wrong_arguments_say_why() -> None:
    options = AttentionOptions(v_group="head_dim", k="fast", v="fast", q=None, p=None)
    batch = build([(0, 4)], options, heads=1)
    pages, full, step = like(batch.pages), like(batch.full), on_device(batch.step)
    q, k, v = batch.q.to(DEVICE), batch.k.to(DEVICE), batch.v.to(DEVICE)

    def write(k=k, matrix=None, options=options, pages=pages, full=full) -> None:
        triton_kv_write.transform_and_write(pages, full, batch.layout, step, k, v, matrix, options)

    def attend(q=q, options=options, output=q) -> None:
        triton_paged_attention.attention(q, q, pages, full, batch.layout, step, options, output)

    with pytest.raises(ValueError, match="expected k of at least"):
        write(k[:2])
    with pytest.raises(ValueError, match="k's last dimension must be contiguous"):
        write(k.repeat_interleave(2, -1)[..., ::2])
    with pytest.raises(ValueError, match=r"a matrix \(1, 64, 64\) fp32"):
        write(matrix=torch.eye(64, device=DEVICE))
    with pytest.raises(ValueError, match="need a policy"):
        write(options=replace(options, v=None))
    with pytest.raises(ValueError, match="along head_dim, the options along tokens"):
        write(options=replace(options, v_group="tokens"))
    with pytest.raises(ValueError, match="a number as v_scale"):
        write(options=replace(options, v_scale=torch.ones(1)))
    with pytest.raises(ValueError, match=r"takes 1.0 as k_scale"):
        write(options=replace(options, k_scale=2.0))
    with pytest.raises(ValueError, match="incomplete=False"):
        write(options=replace(options, incomplete=False))
    with pytest.raises(ValueError, match="expected bf16 or fp16"):
        write(full=full.float())
    with pytest.raises(ValueError, match="kv_tile=48"):
        attend(options=replace(options, kv_tile=48))
    with pytest.raises(ValueError, match="expected q_stored and output like q"):
        attend(output=q[:1])
    with pytest.raises(ValueError, match="do not fit pages"):
        attend(q=q.half(), output=q)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        triton_kv_write.transform_query(q.float(), None, options)


# --- what is compiled ----------------------------------------------------------------------------


@COMPILES
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("operands", "v_group", "max_query_len"),
    [("kv", "head_dim", 1), ("kv", "tokens", 1024), ("qkvp", "tokens", 1), ("qkvp", "head_dim", 1024)],
)
def test_attention_compiles_without_a_gpu(operands, v_group, max_query_len, arch, tmp_path) -> None:
    options = AttentionOptions(**KV, v_group=v_group) if operands == "kv" else AttentionOptions(v_group=v_group)
    constants, launch = triton_paged_attention.attention_constants(
        PageLayout(64, 128, v_group), 16, options, 4, max_query_len, divmod(arch, 10)
    )
    constants["SHARED"] = max_query_len == 1
    if not constants["SHARED"]:
        constants |= dict(partial_ptr=None, maximum_ptr=None, total_ptr=None)
    binary = compiled(triton_paged_attention._attention_kernel, constants, arch, **launch)
    assert f".target sm_{arch}" in binary.asm["ptx"]
    assert binary.metadata.shared <= (SHARED_MEMORY if arch == 80 else HOPPER_SHARED_MEMORY)
    assert spilled(binary, tmp_path / "kernel.cubin") <= 128  # 32 registers


@COMPILES
def test_merging_compiles_without_a_gpu() -> None:
    assert compiled(triton_paged_attention._merge_kernel, dict(D=96, WIDE=128, MOST=64), 80).asm["cubin"]


@COMPILES
def test_attention_compiles_for_blackwell() -> None:
    options = AttentionOptions(v_group="tokens", p="fast")
    constants, launch = triton_paged_attention.attention_constants(
        PageLayout(16, 64, "tokens"), 4, options, 2, 1, (10, 0)
    )
    binary = compiled(triton_paged_attention._attention_kernel, {**constants, "SHARED": False}, 100, **launch)
    assert "cvt.rn.satfinite.e2m1x2.f32" in binary.asm["ptx"]


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operands", "v_group", "dtype"),
    [("kv", "head_dim", BF16), ("kv", "tokens", FP16), ("qkvp", "head_dim", FP16), ("qkvp", "tokens", BF16)],
    ids=str,
)
@pytest.mark.parametrize(
    ("dim", "group", "heads", "block_size"), [(64, 3, 3, 16), (96, 1, 2, 32), (128, 4, 2, 64), (256, 8, 1, 128)]
)
def test_long_requests_on_a_gpu(dim, group, heads, block_size, operands, v_group, dtype) -> None:
    policies = KV if operands == "kv" else dict(q="fast", p="fast")
    options = AttentionOptions(**policies, k="fast", v="fast", v_group=v_group, v_scale=1 / 16)
    sizes = dict(dim=dim, group=group, heads=heads, block_size=block_size, dtype=dtype)
    for requests in (LONG, LONG_DECODE):
        batch = build(requests, options, padding=5, **sizes)
        check_write(batch, matrix_of(heads, dim), batch.k, batch.v)
        check_attention(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["kv", "qkvp"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(own_chunk=True),
        dict(sliding_window=500),
        dict(sliding_window=64, logits_soft_cap=3.0),
        dict(sink=0, recent=1),
        dict(sink=200, recent=300),
        dict(two_level_p=False, kv_tile=128),
    ],
    ids=str,
)
def test_options_on_a_gpu(changes, operands) -> None:
    policies = KV if operands == "kv" else dict(q="paper", p="paper")
    v_group = "tokens" if operands == "kv" else "head_dim"
    options = AttentionOptions(**{**policies, **changes}, k="fast", v="fast", v_group=v_group)
    for requests in (LONG, LONG_DECODE):
        check_attention(build(requests, options, dim=128, group=4, heads=1, block_size=64))


@pytest.mark.gpu
@pytest.mark.parametrize("operands", ["kv", "qkvp"])
def test_capture_in_a_cuda_graph(operands) -> None:
    policies = KV if operands == "kv" else {}
    options = AttentionOptions(**policies, k="fast", v="fast", v_group="tokens")
    sizes = dict(dim=128, heads=2, group=4, block_size=32)
    batches = [
        build([(40, 1), (0, 1), (15, 1), (300, 1), (64, 1)], options, **sizes),
        build([(1000, 1), (47, 1), (9, 1)], options, padding=2, seed=1, **sizes),
        build([(3, 1), (2000, 1), (31, 1), (500, 1)], options, padding=1, seed=2, **sizes),
    ]

    def buffer(name: str, of: str | None = None) -> torch.Tensor:
        """One that holds each batch's."""
        tensors = [getattr(batch if of is None else getattr(batch, of), name) for batch in batches]
        shape = [max(sizes) for sizes in zip(*(x.shape for x in tensors), strict=True)]
        if tensors[0].ndim == 4:
            return strided(tuple(shape), tensors[0].dtype, DEVICE)
        return torch.zeros(shape, dtype=tensors[0].dtype, device=DEVICE)

    def fill(to: torch.Tensor, source: torch.Tensor) -> None:
        to[tuple(slice(n) for n in source.shape)] = source.to(DEVICE)

    step = replace(
        batches[0].needed_step,
        **{
            name: buffer(name, "needed_step")
            for name, x in vars(batches[0].needed_step).items()
            if isinstance(x, torch.Tensor)
        },
    )
    pages, full, q, k, v = (buffer(name) for name in ("needed_pages", "needed_full", "q", "k", "v"))
    output = torch.empty_like(q)

    def load(batch: Batch) -> None:
        for name, x in vars(step).items():
            if isinstance(x, torch.Tensor):
                fill(x, getattr(batch.needed_step, name))
        for to, name in ((pages, "needed_pages"), (full, "needed_full"), (q, "q"), (k, "k"), (v, "v")):
            fill(to, getattr(batch, name))
        output.fill_(SENTINEL)

    def run() -> None:
        triton_kv_write.transform_and_write(pages, full, batches[0].layout, step, k, v, None, options)
        transformed, stored = triton_kv_write.transform_query(q, None, options)
        triton_paged_attention.attention(
            transformed, stored, pages, full, batches[0].layout, step, options, output
        )

    load(batches[0])
    run()  # compiles
    check_output(output, batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for batch in (*batches[1:], batches[0]):
        load(batch)
        graph.replay()
        check_output(output, batch)
