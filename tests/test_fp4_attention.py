"""Attention with both products on FP4 units: what it is compiled to, and its values on decoded operands.

There are no such units here, and Triton's interpreter reads E4M3 scales as E8M0. So the MMAs are looked for in
what the compiler makes of the kernel, and the kernel runs, in the interpreter, with decoded values for them.
Batches, what is NaN in their pages, and the bounds are those of attention_batches.py.
"""

import re
from dataclasses import replace

import attention_batches as paged
import interpreter
import pytest
import torch
from interpreter import COMPILES
from triton_compiled import HOPPER_SHARED_MEMORY, SHARED_MEMORY, compiled, spilled

from vllm_scalesearch import kv_pages
from vllm_scalesearch.attention_reference import AttentionOptions, fake_quantized
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import paged_attention, triton_fp4_attention
from vllm_scalesearch.ops.fp4_product import FP4_CAPABILITIES
from vllm_scalesearch.ops.triton_fp4_attention import attention, attention_constants, unsupported

FP16 = torch.float16
INTERPRETED = pytest.mark.skipif(not interpreter.INTERPRETED, reason="test_on_the_cpu runs it")


@COMPILES
def test_on_the_cpu() -> None:
    """The interpreter has to be chosen before triton is imported: in a process of its own."""
    interpreter.run_tests(__file__, ("interpreted",), 16)


def attend(batch: paged.Batch, **changes) -> torch.Tensor:
    """Attention to what is needed only."""
    arguments = dict(
        q=batch.q, pages=paged.like(batch.needed_pages, "cpu"), full=paged.like(batch.needed_full, "cpu"),
        layout=batch.layout, step=batch.needed_step, options=batch.options,
        output=torch.full_like(batch.q, paged.SENTINEL),
    )  # fmt: skip
    arguments |= changes
    attention(**arguments)
    return arguments["output"]


# --- values --------------------------------------------------------------------------------------

CASES = {
    "paper": dict(requests=[(70, 1), (0, 5), (100, 21), (9, 3)]),
    "one level, other policies": dict(
        options=dict(two_level_p=False, recent=5, p="fast", q="4over6", k="exact", v="absmax", v_scale=1 / 16),
        requests=[(70, 1), (50, 21)], block_size=64,
    ),
    "fp16, groups of 3": dict(
        options=dict(v_scale=4.0, sink=3, p="fast"), requests=[(90, 9), (200, 1)], dtype=FP16, heads=1, group=3
    ),
    "own chunk, pages of 48": dict(
        options=dict(own_chunk=True), requests=[(77, 30), (0, 40)], heads=1, block_size=48
    ),
    "window and soft cap": dict(
        options=dict(sliding_window=70, logits_soft_cap=5.0, softmax_scale=0.3), requests=[(130, 9), (9, 3)],
        heads=1,
    ),
    "sink of many tiles": dict(options=dict(sink=70, recent=20), requests=[(200, 20)], heads=1),
    "tiles of 128": dict(options=dict(kv_tile=128), requests=[(300, 6), (0, 20)], heads=1, block_size=32),
    "heads of 32": dict(requests=[(90, 3)], dim=32, heads=1),
    "heads of 96": dict(requests=[(90, 3), (150, 1)], dim=96, heads=1, block_size=32),
    "heads of 128": dict(requests=[(150, 3), (9, 1)], dim=128, heads=1, block_size=64),
    "heads of 256": dict(requests=[(150, 3)], dim=256, heads=1, group=1),
}  # fmt: skip


@INTERPRETED
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernel_gives_the_values_of_the_reference(case: str) -> None:
    arguments = dict(CASES[case])
    options = AttentionOptions(**arguments.pop("options", {}))
    batch = paged.build(arguments.pop("requests"), options, padding=2, **arguments)
    paged.check_output(attend(batch), batch)


@INTERPRETED
def test_interpreted_kernel_with_the_rows_of_fp4_units(monkeypatch: pytest.MonkeyPatch) -> None:
    def constants(*arguments) -> tuple[dict, dict]:
        constants, launch = attention_constants(*arguments[:-1], (10, 0))
        return constants | dict(FP4_UNITS=False, HW_E2M1=False), launch

    monkeypatch.setattr(triton_fp4_attention, "attention_constants", constants)
    batch = paged.build([(70, 1), (64, 66)], AttentionOptions(q="fast", p="fast"), heads=1)
    paged.check_output(attend(batch), batch)


@INTERPRETED
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_interpreted_kernel_puts_codes_and_scales_in_order(dim: int) -> None:
    """A query that one token gets all of P from: the output is that token's value, as it is stored."""
    options = AttentionOptions(sink=0, softmax_scale=10.0)
    batch = paged.build([(111, 1)], options, heads=1, group=1, dim=dim)  # all of them are stored
    keys, values = (
        x[0] for x in kv_pages.read(batch.pages, batch.layout, batch.step.block_table[0, :7].long())
    )
    queries = (keys / keys.square().mean(-1, keepdim=True).sqrt()).to(batch.q.dtype)
    scores = 10 * (fake_quantized(queries.float(), options.q) @ keys.T)
    others = scores.masked_fill(torch.eye(112, dtype=torch.bool), -torch.inf).amax(-1)
    alone = (scores.diag() > others + 30).nonzero().flatten()
    assert len(alone) >= 12
    for token in alone[:: len(alone) // 6].tolist():
        q = queries[token, None, None]
        got = attend(batch, q=q, output=torch.empty_like(q))
        assert torch.equal(got[0, 0], values[token].to(q.dtype))


@INTERPRETED
def test_interpreted_kernel_passes_nan_on_to_those_that_see_it() -> None:
    requests = [(150, 2), (60, 3), (110, 2)]
    batch = paged.build(requests, AttentionOptions(p="fast", sink=0), heads=1, nan_keys=[70], nan_values=[172])
    batch.q[6, 1, 3] = torch.nan  # of a query that sees stored tokens only
    expected = torch.empty_like(batch.q)
    paged_attention.attention(
        batch.q, batch.pages, batch.full, batch.layout, batch.step, None, batch.options, expected
    )
    assert expected.isnan().any(-1).tolist() == [[True, True]] * 5 + [[False, False], [False, True]]
    assert torch.equal(attend(batch).isnan(), expected.isnan())


@INTERPRETED
def test_interpreted_kernel_says_what_is_wrong() -> None:
    batch = paged.build([(0, 4)], AttentionOptions(), heads=1)
    q, options = batch.q, batch.options
    wrong = {
        "q and p need a policy": dict(options=replace(options, p=None)),
        "q and p need a policy ": dict(options=replace(options, q=None)),
        "kv_tile=32": dict(options=replace(options, kv_tile=32)),
        "kv_tile=96": dict(options=replace(options, kv_tile=96)),
        "the options along head_dim": dict(options=replace(options, v_group="head_dim")),
        "need a policy": dict(options=replace(options, k=None)),
        "takes 1.0 as q_scale": dict(options=replace(options, q_scale=2.0)),
        "V must be stored along tokens": dict(layout=PageLayout(16, 64)),
        "bf16 or fp16": dict(q=q.float()),
        "do not fit pages": dict(q=q.half()),
        "do not fit pages of 1 heads of 64": dict(q=q[..., :32]),
        "expected output like q": dict(output=q[:1]),
        "expected output like q ": dict(output=q.mT.contiguous().mT),
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message.strip()):
            attend(batch, **changes)
    empty = q[:0]
    attend(batch, q=empty, output=empty)


def test_what_is_unsupported() -> None:
    along_tokens = PageLayout(16, 64, "tokens")
    assert unsupported(along_tokens, AttentionOptions()) is None
    assert "policy" in unsupported(along_tokens, AttentionOptions(q=None, p=None))
    assert "along tokens" in unsupported(PageLayout(16, 64), AttentionOptions())
    assert "kv_tile=32" in unsupported(along_tokens, AttentionOptions(kv_tile=32))


@COMPILES
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    batch = paged.build([(0, 4)], AttentionOptions(), heads=1)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        attend(batch)


# --- what is compiled ----------------------------------------------------------------------------

MMA = {
    # Triton 3.6 and 3.9 write the size of a block differently.
    100: r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(?:scale_vec::4X|block16)",
    120: r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3",
}


@COMPILES
@pytest.mark.parametrize(("arch", "dim"), [(100, 64), (120, 128)])
def test_both_products_are_fp4_mmas_with_block_scales(arch: int, dim: int, tmp_path) -> None:
    options = AttentionOptions(q="fast", p="fast")
    constants, launch = attention_constants(
        PageLayout(64, dim, "tokens"), 16, options, 4, 1024, divmod(arch, 10)
    )
    binary = compiled(triton_fp4_attention._fp4_attention_kernel, constants, arch, **launch)
    ptx = binary.asm["ptx"]
    assert f".target sm_{arch}a" in ptx
    # Of 64 products each. On sm_100a, of 128 rows and all columns; on sm_120a, of 16 rows and 8 columns, in
    # each of the warps. Twice, for tiles of stored tokens only and for others.
    rows, tile, wide = constants["ROWS"], constants["TILE"], constants["WIDE"]
    if arch == 100:
        keys, values = wide // 64, tile // 64
    else:
        keys = values = rows // 16 * (tile // 8) * (wide // 64) // launch["num_warps"]
    assert len(re.findall(MMA[arch], ptx)) == 2 * (keys + values)
    # Whatever else is multiplied is of tokens in full precision.
    others = re.findall(r"\s(?:tcgen05\.mma|mma\.sync)\.\S+", re.sub(MMA[arch], "", ptx))
    assert others and all("kind::f16" in x or "f32.bf16.bf16.f32" in x for x in others)
    assert "cvt.rn.satfinite.e2m1x2.f32" in ptx
    assert binary.metadata.shared <= (HOPPER_SHARED_MEMORY if arch == 100 else SHARED_MEMORY)
    assert spilled(binary, tmp_path / "kernel.cubin") <= 256


def test_rows_for_the_mma() -> None:
    for capability in FP4_CAPABILITIES:
        for dim in (64, 96, 128, 256):
            for group, queries in ((1, 1), (4, 1), (3, 1000), (8, 1000), (200, 1)):
                constants, _ = attention_constants(
                    PageLayout(16, dim, "tokens"), 4, AttentionOptions(), group, queries, capability
                )
                assert constants["FP4_UNITS"] and constants["QUERIES"] >= 1
                assert constants["ROWS"] >= group and constants["WIDE"] >= dim
                assert capability[0] == 12 or constants["ROWS"] % 128 == 0
    others = attention_constants(PageLayout(16, 64, "tokens"), 4, AttentionOptions(), 1, 1, (9, 0))[0]
    assert not others["FP4_UNITS"]
