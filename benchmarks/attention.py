"""Attention kernels over the NVFP4 cache on one GPU, beside FlashAttention 3 with bf16 and fp8 caches.

    python benchmarks/attention.py [--shapes 32x8192 ...] [--heads 32 --kv-heads 8 --head-size 128]

Whole prompts with Q, K, V and P quantized; chunks of prompts, and the writing of the cache; then decoding: one
query a request, pages in random order. A layer's whole step also transforms queries and keys and writes the new
token, one that completes no tile of V; of the peers it is vLLM's writing of the cache, and their attention.
Caches rotate, so that they come from memory; the variants take turns in one run, as CUDA graphs. The peers need
vLLM for CUDA. `limit` is what the packed bytes of stored tokens take at the rate of a copy; `% of limit` its
share of the time.
"""

import argparse
from dataclasses import replace

import torch
from gpu_timing import copies_for, copy_bandwidth, time_interleaved
from report import table, write

from vllm_scalesearch import attention_prefill
from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops import cuda_kv_write, cuda_paged_decode, paged_attention, triton_paged_attention
from vllm_scalesearch.ops.step import Step

SHAPES = ("1x32768", "8x8192", "32x2048", "32x8192", "32x32768", "128x2048", "4x131072")
CHUNKS = ((30720, 2048), (0, 8192), (24576, 8192), (0, 16384))  # tokens before a chunk, and of it
BLOCK_SIZE, PEER_BLOCK_SIZE = 64, 16


def pages_of(batch: int, context: int, block_size: int) -> tuple[torch.Tensor, int]:
    """A table (batch, pages) int32 of pages in random order, and their number."""
    each = -(-context // block_size)
    order = torch.randperm(batch * each, device="cuda", dtype=torch.int32)
    return order.view(batch, each), batch * each


def packed_cache(layout: PageLayout, blocks: int, heads: int) -> torch.Tensor:
    pages = torch.randint(0, 256, (blocks, heads, layout.block_size, layout.bytes_per_token), device="cuda")
    pages = pages.to(torch.uint8)
    _, k_scales, _, v_scales = layout.parts(pages)
    for scales in (k_scales, v_scales):
        scales.random_(32, 56)  # a quarter to two
    return pages


def ours(batch, context, heads, kv_heads, dim, options, triton: bool):
    """Calls of decoding, one for each cache, and of a layer's whole steps."""
    layout = PageLayout(BLOCK_SIZE, dim, "tokens")
    full_size = BLOCK_SIZE // 4
    block_table, blocks = pages_of(batch, context, BLOCK_SIZE)
    kept = -(-(options.sink + options.recent + 64) // full_size)
    per_request = context // full_size
    full_table = torch.zeros(batch, per_request, dtype=torch.int32, device="cuda")
    for i in range(min(kept, per_request)):
        where = i if i * full_size < options.sink else per_request - 1 - (i - options.sink // full_size)
        full_table[:, where] = torch.arange(batch, device="cuda", dtype=torch.int32) * kept + i
    step = Step(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda"),
        torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        block_table, full_table, torch.empty(0), torch.empty(0), 1,
    )  # fmt: skip
    newest = context - 2
    whole_step = replace(
        step, seq_lens=step.seq_lens - 1,
        slots=block_table[:, newest // BLOCK_SIZE].long() * BLOCK_SIZE + newest % BLOCK_SIZE,
        full_slots=full_table[:, newest // full_size].long() * full_size + newest % full_size,
    )  # fmt: skip
    nbytes = batch * context * kv_heads * layout.bytes_per_token
    matrix = torch.randn(kv_heads, dim, dim, device="cuda") * dim**-0.5
    calls, steps = [], []
    for _ in range(copies_for(nbytes)):
        pages = packed_cache(layout, blocks, kv_heads)
        full = torch.randn(batch * kept, kv_heads, full_size, 2 * dim, device="cuda").bfloat16()
        q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
        k, v = (torch.randn(batch, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
        output = torch.empty_like(q)

        def attend(q=q, pages=pages, full=full, output=output):
            if triton:
                triton_paged_attention.attention(q, q, pages, full, layout, step, options, output)
            else:
                cuda_paged_decode.decode(q, pages, full, layout, step, options, output)

        def whole(q=q, k=k, v=v, pages=pages, full=full, output=output):
            paged_attention.write_and_attend(
                q, k, v, pages, full, layout, whole_step, matrix, matrix, options, output
            )

        calls.append(attend)
        steps.append(whole)
    return calls, steps, nbytes


def flash_attention(batch, context, heads, kv_heads, dim, fp8: bool):
    """Calls of decoding, one for each cache, and of a layer's whole steps."""
    from vllm._custom_ops import reshape_and_cache_flash
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    block_table, blocks = pages_of(batch, context, PEER_BLOCK_SIZE)
    newest = context - 2
    slots = block_table[:, newest // PEER_BLOCK_SIZE].long() * PEER_BLOCK_SIZE + newest % PEER_BLOCK_SIZE
    unit = torch.ones((), device="cuda")
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    seqused = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    nbytes = 2 * batch * context * kv_heads * dim * dtype.itemsize
    one = torch.ones(batch, kv_heads, device="cuda")
    scales = dict(q_descale=one, k_descale=one, v_descale=one) if fp8 else {}
    calls, steps = [], []
    for _ in range(copies_for(nbytes)):
        shape = (blocks, PEER_BLOCK_SIZE, kv_heads, dim)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(2))
        q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
        new_k, new_v = (torch.randn(batch, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
        output, q = torch.empty_like(q), q.to(dtype)

        def attend(q=q, k=k, v=v, output=output):
            flash_attn_varlen_func(
                q, k, v, 1, starts, context, seqused_k=seqused, causal=True, block_table=block_table,
                out=output, fa_version=3, **scales,
            )  # fmt: skip

        def whole(k=k, v=v, new_k=new_k, new_v=new_v, attend=attend):
            stored = (x.view(torch.uint8) if fp8 else x for x in (k, v))
            reshape_and_cache_flash(new_k, new_v, *stored, slots, "fp8" if fp8 else "auto", unit, unit)
            attend()

        calls.append(attend)
        steps.append(whole)
    return calls, steps


def chunk(context: int, queries: int, heads: int, kv_heads: int, dim: int, options) -> dict[str, list]:
    """A chunk of a prompt over its context: ours, FlashAttention 3 over bf16 pages, and parts of ours."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    length = context + queries
    layout = PageLayout(BLOCK_SIZE, dim, "tokens")
    full_size = BLOCK_SIZE // 4
    block_table, blocks = pages_of(1, length, BLOCK_SIZE)
    full_table, full_blocks = pages_of(1, length, full_size)
    pages = packed_cache(layout, blocks, kv_heads)
    full = torch.randn(full_blocks, kv_heads, full_size, 2 * dim, device="cuda").bfloat16()
    starts = torch.tensor([0, queries], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
    positions = torch.arange(context, length, device="cuda")

    def slots(table, size):
        return table[0, positions // size].long() * size + positions % size

    step = Step(
        starts, lengths, block_table, full_table, slots(block_table, BLOCK_SIZE), slots(full_table, full_size),
        queries,
    )  # fmt: skip
    (group,) = attention_prefill.plan(starts, [0, queries], lengths, [length], 0, length)
    q = torch.randn(queries, heads, dim, device="cuda").bfloat16()
    k, v = (torch.randn(queries, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
    matrix = torch.randn(kv_heads, dim, dim, device="cuda") * dim**-0.5
    output = torch.empty_like(q)

    def flash(q, k, v, output, group, options):
        flash_attn_varlen_func(
            q, k, v, group.max_query_len, group.query_start_loc, group.max_seq_len,
            cu_seqlens_k=group.k_start_loc, causal=True, out=output, fa_version=3,
        )  # fmt: skip

    def ours():
        attention_prefill.attend(
            q, k, v, pages, full, layout, step, group, matrix, options, output, flash
        )  # fmt: skip

    def write_cache():
        cuda_kv_write.write(pages, full, layout, step, k, v, matrix, options)

    shape = (-(-length // PEER_BLOCK_SIZE), PEER_BLOCK_SIZE, kv_heads, dim)
    peer_k, peer_v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    peer_table = torch.randperm(shape[0], device="cuda", dtype=torch.int32).view(1, -1)

    def peer():
        flash_attn_varlen_func(
            q, peer_k, peer_v, queries, starts, length, seqused_k=lengths, causal=True, block_table=peer_table,
            out=output, fa_version=3,
        )  # fmt: skip

    return {"ours": [ours] * 3, "FA3 bf16": [peer] * 3, "writing the cache": [write_cache] * 3}


def quantized_prompt(
    queries: int, heads: int, kv_heads: int, dim: int
) -> tuple[dict[str, list], dict[str, float]]:
    """A whole prompt with Q, K, V and P quantized, by policies of P, beside FlashAttention 3; and P's errors.

    An error is that of the output relative to the output with everything but P quantized, of random values.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    layout, full_size = PageLayout(BLOCK_SIZE, dim, "tokens"), BLOCK_SIZE // 4
    block_table, blocks = pages_of(1, queries, BLOCK_SIZE)
    full_table, full_blocks = pages_of(1, queries, full_size)
    pages = packed_cache(layout, blocks, kv_heads)
    full = torch.zeros(full_blocks, kv_heads, full_size, 2 * dim, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, queries], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([queries], dtype=torch.int32, device="cuda")
    positions = torch.arange(queries, device="cuda")
    slots = (
        table[0, positions // size].long() * size + positions % size
        for table, size in ((block_table, BLOCK_SIZE), (full_table, full_size))
    )
    step = Step(starts, lengths, block_table, full_table, *slots, queries)
    (group,) = attention_prefill.plan(starts, [0, queries], lengths, [queries], 0, queries)
    q = torch.randn(queries, heads, dim, device="cuda").bfloat16()
    k, v = (torch.randn(queries, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
    matrix = torch.randn(kv_heads, dim, dim, device="cuda") * dim**-0.5
    cuda_kv_write.write(pages, full, layout, step, k, v, None, AttentionOptions(v_scale=1 / 16))
    calls, outputs = {}, {}
    for name, p in (("P kept", None), *((f"P {p}", p) for p in ("absmax", "fast", "paper"))):
        options = AttentionOptions(p=p, recent=64, v_scale=1 / 16)
        outputs[name] = torch.empty_like(q)

        def attend(options=options, output=outputs[name]):
            attention_prefill.attend(
                q, k, v, pages, full, layout, step, group, matrix, options, output, None
            )  # fmt: skip

        calls[name] = [attend] * 3
        attend()
    exact = outputs["P kept"].float()
    errors = {
        name: ((output.float() - exact).norm() / exact.norm()).item()
        for name, output in outputs.items()
        if name != "P kept"
    }
    output = torch.empty_like(q)

    def peer():
        flash_attn_varlen_func(
            q, k, v, queries, starts, queries, cu_seqlens_k=starts, causal=True, out=output, fa_version=3
        )

    calls["FA3 bf16"] = [peer] * 3
    return calls, errors


def decode_write(batch: int, kv_heads: int, dim: int, options) -> list:
    """Writing a decode step's tokens, every sixteenth of which completes a tile of V."""
    layout = PageLayout(BLOCK_SIZE, dim, "tokens")
    full_size = BLOCK_SIZE // 4
    context = 1024
    block_table, blocks = pages_of(batch, context, BLOCK_SIZE)
    full_table, full_blocks = pages_of(batch, context, full_size)
    pages = packed_cache(layout, blocks, kv_heads)
    full = torch.randn(full_blocks, kv_heads, full_size, 2 * dim, device="cuda").bfloat16()
    lengths = torch.arange(batch, device="cuda", dtype=torch.int32) % 16 + 900
    last = (lengths - 1).long()
    rows = torch.arange(batch, device="cuda")
    step = Step(
        torch.arange(batch + 1, dtype=torch.int32, device="cuda"), lengths, block_table, full_table,
        block_table[rows, last // BLOCK_SIZE].long() * BLOCK_SIZE + last % BLOCK_SIZE,
        full_table[rows, last // full_size].long() * full_size + last % full_size, 1,
    )  # fmt: skip
    k, v = (torch.randn(batch, kv_heads, dim, device="cuda").bfloat16() for _ in range(2))
    matrix = torch.randn(kv_heads, dim, dim, device="cuda") * dim**-0.5
    return [lambda: cuda_kv_write.write(pages, full, layout, step, k, v, matrix, options)] * 3


def prompts(args, options) -> list[dict]:
    """Chunks of prompts, in causal TFLOP/s of attention, and what writing the cache takes."""
    found = []
    for context, queries in CHUNKS:
        times = time_interleaved(
            chunk(context, queries, args.heads, args.kv_heads, args.head_size, options), rounds=9
        )
        pairs = queries * context + queries * (queries + 1) / 2
        rate = {name: 4e-6 * pairs * args.heads * args.head_size / t for name, t in times.items()}
        del rate["writing the cache"]
        found.append({"context": context, "queries": queries, "us": times, "tflops": rate})
        print(f"{queries} queries on {context}", times, rate, flush=True)
    return found


def quantized_prompts(args) -> list[dict]:
    """Whole prompts with Q, K, V and P quantized, in causal TFLOP/s."""
    found = []
    for queries in (8192, 32768):
        calls, errors = quantized_prompt(queries, args.heads, args.kv_heads, args.head_size)
        times = time_interleaved(calls, rounds=7)
        flops = 2 * queries * (queries + 1) * args.heads * args.head_size
        rate = {name: flops / t * 1e-6 for name, t in times.items()}
        found.append({"queries": queries, "us": times, "tflops": rate, "errors": errors})
        print(f"{queries} queries, Q, K, V and P quantized", times, rate, errors, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="requests x tokens of each")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--no-peers", action="store_true", help="without FlashAttention 3")
    parser.add_argument("--only", choices=["decode", "prompts", "quantized"], help="default: all")
    parser.add_argument("--triton", action="store_true", help="with our Triton kernel")
    parser.add_argument("--name", default="attention", help="of the file under results/")
    args = parser.parse_args()
    rate = copy_bandwidth()
    options = AttentionOptions(q=None, p=None, recent=64, v_scale=1 / 16)
    description = dict(heads=args.heads, kv_heads=args.kv_heads, head_size=args.head_size)
    if args.only in (None, "quantized"):
        write(args.name + "_quantized", {**description, "prompts": quantized_prompts(args)})
    if args.only in (None, "prompts"):
        written = time_interleaved({"128": decode_write(128, args.kv_heads, args.head_size, options)})["128"]
        print(f"writing 128 tokens of a decode step: {written:.1f} us")
        found = prompts(args, replace(options, own_chunk=True))
        write(args.name + "_prompts", {**description, "write_128_us": written, "chunks": found})
    if args.only in ("prompts", "quantized"):
        return
    results = []
    for shape in args.shapes:
        batch, context = map(int, shape.split("x"))
        sizes = (batch, context, args.heads, args.kv_heads, args.head_size)
        calls, steps, nbytes = ours(*sizes, options, False)
        variants = {"ours": calls}
        whole = {"ours": steps}
        if args.triton:
            variants["ours, Triton"] = ours(*sizes, options, True)[0]
        if not args.no_peers:
            for name, fp8 in (("FA3 bf16", False), ("FA3 fp8", True)):
                variants[name], whole[name] = flash_attention(*sizes, fp8)
        variants |= {f"{name}, whole step": calls for name, calls in whole.items()}
        times = time_interleaved(variants)
        limit = nbytes / rate * 1e6
        results.append({"shape": shape, "us": times, "limit_us": limit})
        print(shape, {k: round(v, 1) for k, v in times.items()}, f"limit {limit:.1f}", flush=True)
        write(args.name, {"copy_bytes_per_second": rate, **description, "decode": results})
        del variants, whole, calls, steps
        torch.cuda.empty_cache()
    names = list(results[0]["us"])
    print()
    table(
        ["requests x tokens", *names, "limit", "% of limit"],
        [
            [r["shape"], *(f"{r['us'][n]:.1f}" for n in names), f"{r['limit_us']:.1f}",
             f"{100 * r['limit_us'] / r['us']['ours']:.0f}"]
            for r in results
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
