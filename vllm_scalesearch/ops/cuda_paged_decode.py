"""Decoding attention over the paged cache in CUDA C++: kernels/paged_decode.cu or paged_decode_wide.cu, and
paged_decode_merge.cu behind it.

One query token a request, K and V stored and nothing else quantized, V's blocks along tokens. The Triton kernel
(triton_paged_attention.py) does everything else. Nothing here waits for the device, and all of it can be
captured in a CUDA graph after a first call, which compiles.
"""

import functools
from dataclasses import dataclass

import torch

from vllm_scalesearch.attention_reference import AttentionOptions
from vllm_scalesearch.cuda_kernels import Kernel, kernel, readable
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.ops.step import Step

HEAD_SIZES = (64, 96, 128, 256)
_WARPS = 4
_MERGE, _MERGE_WARPS = "paged_decode_merge", 16
# Query heads of a KV head up to which paged_decode.cu takes them; paged_decode_wide.cu takes more, and how
# many at once.
_NARROW = 8
_WIDE = 32
_ASIDE_BYTES = 128  # decode_work.cuh's Aside
# Shared memory for a multiprocessor's blocks, some for the device left over.
_SHARED_BYTES = 220 * 1024
# Sums are kept in units of V's tensor scale, times 2^-119 or 2^-14, which must leave room on both sides.
_LEAST_V_SCALE, _LARGEST_V_SCALE = 2.0**-60, 2.0**4


def unsupported(layout: PageLayout, options: AttentionOptions, device: torch.device) -> str | None:
    """Why the kernel cannot run a layer's decode steps, or None if it can."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if layout.v_group != "tokens" or not options.incomplete:
        return f"V is grouped along {layout.v_group}, and it reads tiles along tokens"
    if options.q is not None or options.p is not None:
        return "Q and P are quantized"
    if layout.head_size not in HEAD_SIZES:
        return f"head_size {layout.head_size} is not one of {HEAD_SIZES}"
    if not _LEAST_V_SCALE <= float(options.v_scale) <= _LARGEST_V_SCALE:
        return f"v_scale {options.v_scale} is not within {_LEAST_V_SCALE} and {_LARGEST_V_SCALE}"
    return None


def begins_early(group: int) -> bool:
    """Whether a kernel for so many query heads of a KV head should begin while the one in front still runs.

    For few heads it should not: with 128 channels it took up to 5 % longer (benchmarks/NOTES.md).
    """
    return group > _NARROW


@dataclass(frozen=True)
class Program:
    """A compiled kernel's source and macros, and what a launch has to know of it.

    pieces: programs that share a KV head's query heads, `queries` each, the last one maybe fewer.
    blocks: of a multiprocessor. full_unit: of sums, what 16-bit values are in, v_scale apart.
    What its blocks found is merged by _MERGE, compiled with the same macros.
    """

    name: str
    macros: tuple[str, ...]
    queries: int
    pieces: int
    blocks: int
    shared_bytes: int
    full_unit: float

    @property
    def source(self) -> str:
        return f"{self.name}.cu"


def queries_of(group: int, head_size: int) -> int:
    """How many of a KV head's `group` query heads a program takes.

    Of up to 8 heads, the most that fit and divide them; of more, as few programs as can be take
    equal shares.
    """
    if group > _NARROW:
        return -(-group // -(-group // _WIDE))
    most = 4 if head_size > 128 else 8
    return max(n for n in range(1, min(group, most) + 1) if group % n == 0)


def program(
    layout: PageLayout, full_page: int, options: AttentionOptions, group: int, dtype: torch.dtype
) -> Program:
    """The kernel for a KV head of `group` query heads, and full-precision pages of `full_page` tokens."""
    dim = layout.head_size
    queries = queries_of(group, dim)
    if group > _NARROW:
        tiles = -(-queries // 16)
        blocks = 2 if tiles * dim > 128 else 4  # as registers allow
        # For the block queries, their factors, its warps' maxima, P.
        block = tiles * 16 * (2 * dim + 16 + 4 + 4 * _WARPS + 64 * _WARPS + 16)
        # For a warp two units of packed tokens, or where there is room one and 16 tokens in 16 bits.
        warp = 36 * dim + 16 * (4 * dim + 16)
        ahead = blocks * (_WARPS * warp + block) <= _SHARED_BYTES
        if not ahead:
            warp = 2 * 36 * dim
        name, full_unit = "paged_decode_wide", 2.0**-14
    else:
        tiles = 1 if queries <= 4 else 2
        blocks = 2 if dim > 128 else 4 if tiles == 1 else 3
        warp = 16 * (2 * dim + 16)  # a tile of 16-bit values; sums are no more
        block = 0
        name, full_unit = "paged_decode", 2.0**-119
    macros = (
        f"D={dim}", f"QUERIES={queries}", f"TILES={tiles}", f"PAGE={layout.block_size}",
        f"FULL_PAGE={full_page}", f"SINK={options.sink}", f"RECENT={options.recent}",
        f"WINDOW={options.sliding_window or 0}", f"SOFT_CAP={int(options.logits_soft_cap is not None)}",
        f"HALF={int(dtype == torch.float16)}", f"BLOCKS={blocks}", f"ASIDE={_ASIDE_BYTES}",
    )  # fmt: skip
    if group > _NARROW:
        macros += (f"AHEAD={int(ahead)}",)
    shared = _ASIDE_BYTES + _WARPS * (-(-warp // 16) * 16) + block
    return Program(name, macros, queries, -(-group // queries), blocks, shared, full_unit)


def decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    step: Step,
    options: AttentionOptions,
    output: torch.Tensor,
) -> None:
    """Attention of the transformed queries of requests that have one each, into `output`.

    q: (T, Hq, D) bf16 or fp16; requests without a query are passed over. pages, full: as
    `triton_kv_write.transform_and_write` has them, full in q's dtype. output: like q; rows of no request are
    left alone. Where `unsupported` names a reason, nothing here is defined.
    Raises ValueError for tensors that do not fit.
    """
    heads, dim = pages.shape[1], layout.head_size
    requests, group = len(step.seq_lens), q.shape[1] // heads
    for name, x in (("q", q), ("output", output)):
        if x.dtype != full.dtype or x.shape[1:] != (group * heads, dim) or x.stride(2) != 1:
            raise ValueError(
                f"paged decode: {name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}, expected "
                f"contiguous heads (..., {group * heads}, {dim}) in {full.dtype}"
            )
    q = readable(q)
    if pages.stride(0) % 16 or pages.stride(1) % 16 or full.stride(0) % 8 or full.stride(1) % 8:
        raise ValueError(
            "paged decode: pages must lie at multiples of 16 bytes, strides are "
            f"{pages.stride()} and {full.stride()}"
        )
    if not requests:
        return
    found = program(layout, full.shape[2], options, group, q.dtype)
    run = _kernel(found.name, found.macros, q.device)
    early = torch.cuda.get_device_capability(q.device)[0] >= 9
    grid = _multiprocessors(q.device) * found.blocks
    # Of each block two parts' sums, two parts' maxima and totals, and an entry that says which belong together.
    sums, pairs = 2 * grid * found.queries * dim, 4 * grid * found.queries
    partial = torch.empty(sums + pairs + 4 * grid, dtype=torch.float32, device=q.device)
    statistics, entries = partial[sums:], partial[sums + pairs :]
    score_scale, cap = options.exp2_scales(dim)
    v_scale = float(options.v_scale)
    run(
        (grid, 1, 1), 32 * _WARPS, found.shared_bytes,
        q, pages, full, output, step.query_start_loc, step.seq_lens, step.block_table, step.full_block_table,
        partial, statistics, entries,
        requests, heads, found.pieces, group, step.block_table.stride(0), step.full_block_table.stride(0),
        q.stride(0), q.stride(1), output.stride(0), output.stride(1), pages.stride(0), pages.stride(1),
        full.stride(0), full.stride(1), score_scale, cap, found.full_unit / v_scale, v_scale,
        512, 32, 2, 0x70007000,
        early=early,
    )  # fmt: skip
    # Entries are of heads of requests, or of blocks, whichever are fewer.
    shared, per_entry = requests * heads * found.pieces, heads * found.pieces
    if shared > grid:
        shared, per_entry = grid, 0
    # Blocks for each, two a multiprocessor, up to one for each query; and where those are few, large ones.
    processors = _multiprocessors(q.device)
    queries = -(-found.queries * shared // (2 * processors))
    warps = _MERGE_WARPS if found.queries * shared <= processors else _MERGE_WARPS // 2
    programs = -(-found.queries // min(queries, warps))
    _kernel(_MERGE, found.macros, q.device)(
        (shared, programs, 1), 32 * warps, warps * (4 * dim + 8),
        step.query_start_loc, step.seq_lens, entries, partial, statistics, output,
        per_entry, found.pieces, group, output.stride(0), output.stride(1), v_scale,
        early=early,
    )  # fmt: skip


@functools.cache
def _kernel(name: str, macros: tuple[str, ...], device: torch.device) -> Kernel:
    return kernel(f"{name}.cu", name, macros, device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
