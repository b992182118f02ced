"""The pages of the KV cache, and what is written to and read from them, in plain torch: the definition.

A layer keeps two kinds of pages:

* **Packed pages** hold every token as NVFP4: 4.5 bits a value. Of one KV head, a page of N tokens is
  ``9 * D / 8 * N`` bytes: codes of K, scales of K, codes of V, scales of V, each as below.

      K codes   (N, D / 2)    two E2M1 codes a byte along head_dim, in the order of `k_order`
      K scales  (N, D / 16)   E4M3, in the order of channels
      V codes   (N, D / 2)    V along head_dim: as K
                (N / 16, D * 8)   V along tokens: of a tile of 16 tokens all channels, in the order of `v_order`
      V scales  (N, D / 16)   or (N / 16, D), in the order of `v_scale_order`

* **Full-precision pages** hold the sink and the newest tokens in 16 bits, (M, 2 * D) of a KV head: a token's
  transformed key, then its value. Which tokens have one is for the cache's manager to say (kv_cache.py).

A slot is ``block * block_size + offset``; a negative one is of a token that is not to be written. A token is
written to both kinds. Along tokens, a tile of V is quantized once its last token arrives, from the
full-precision pages that hold its 16 tokens.

**The order of codes** is that of operands of the tensor cores' 16-bit ``mma.m16n8k16``
(kernels/paged_decode.cu), so that a thread reads just what it multiplies, in loads of up to 16 bytes, and
widens E2M1 to fp16 by moving bits. Lane ``4 * g + t`` of a warp (g in 0..7, t in 0..3) has rows g and g + 8
of 16, and four of the 16 that are summed over, here ``4 * t`` to ``4 * t + 3``: which four is free, as long
as both operands agree. A word of 32 bits holds two times four codes, byte i that of ``4 * t + i`` twice, in
its low and its high nibble. Products with K run along channels, and the two are of two blocks of 16. Those
with V along tokens have channels for rows, and the two are of rows g and g + 8.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_scalesearch.attention_reference import BLOCK, V_GROUPS
from vllm_scalesearch.formats import (
    NVFP4,
    QuantizedTensor,
    decode_e4m3,
    decode_packed,
    pack_e2m1,
    unpack_e2m1,
)
from vllm_scalesearch.search import ScalePolicy, quantize

# What a row of 16 values takes, of 16: 8 bytes of codes and one of scale.
_BYTES_PER_BLOCK = BLOCK // 2 + 1
# Channels of K that a product takes at once.
_PRODUCT = 32
# Groups of 16 channels of V along tokens that lie together, so that a lane has 16 bytes of them.
_CHUNK = 4


# --- orders --------------------------------------------------------------------------------------


@functools.cache
def k_order(head_size: int) -> torch.Tensor:
    """The channel of each code of a token, (D,) int64: byte p holds those at 2 p (low nibble) and 2 p + 1.

    Byte p is ``t * D / 8 + 4 * j + i``, t and i in 0..3: channels ``32 * j + 4 * t + i`` and 16 more.
    """
    t, j, i, half = _grid(4, head_size // _PRODUCT, 4, 2)
    return (_PRODUCT * j + BLOCK * half + 4 * t + i).flatten()


@functools.cache
def v_order(head_size: int) -> torch.Tensor:
    """``16 * channel + token`` of each code of a tile of V along tokens, (16 * D,) int64, as in `k_order`.

    Groups m of 16 channels come in chunks of 4, the last one of what is left. In a chunk of w groups from 4 c
    on, which begins at byte ``512 * c``, byte ``(4 * g + t) * 4 * w + (m - 4 * c) * 4 + i`` holds token
    ``4 * t + i`` of channels ``16 * m + g`` and 8 more.
    """
    chunks = []
    for first in range(0, head_size // BLOCK, _CHUNK):
        groups = min(_CHUNK, head_size // BLOCK - first)
        g, t, m, i, half = _grid(8, 4, groups, 4, 2)
        channel = BLOCK * (first + m) + 8 * half + g
        chunks.append((BLOCK * channel + 4 * t + i).flatten())
    return torch.cat(chunks)


@functools.cache
def v_scale_order(head_size: int) -> torch.Tensor:
    """The channel of each scale of a tile of V along tokens, (D,) int64.

    With M = D / 16, byte ``g * 2 * M + 2 * m + half`` is of channel ``16 * m + 8 * half + g``: the scales of
    the rows of a lane, one after the other.
    """
    g, m, half = _grid(8, head_size // BLOCK, 2)
    return (BLOCK * m + 8 * half + g).flatten()


def _grid(*sizes: int) -> tuple[torch.Tensor, ...]:
    """Indices of an array of this shape, each of that shape."""
    return torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")


def _in_order(packed: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Packed codes, of which code i is the one that was at order[i]."""
    return pack_e2m1(unpack_e2m1(packed)[..., order])


# --- pages ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageLayout:
    """Where things lie in a packed page.

    block_size: tokens of a page, a multiple of 16. head_size: D, a multiple of 32.
    v_group: ``head_dim`` or ``tokens``. Raises ValueError for anything else.
    """

    block_size: int
    head_size: int
    v_group: str = "head_dim"

    def __post_init__(self) -> None:
        for name, unit in (("block_size", BLOCK), ("head_size", _PRODUCT)):
            value = getattr(self, name)
            if value < unit or value % unit:
                raise ValueError(f"packed KV pages: {name} must be a multiple of {unit}, got {value}")
        if self.v_group not in V_GROUPS:
            raise ValueError(f"unknown v_group {self.v_group!r}; there are {', '.join(V_GROUPS)}")

    @property
    def bytes_per_token(self) -> int:
        """Of one KV head, key and value together."""
        return 2 * self.head_size // BLOCK * _BYTES_PER_BLOCK

    @property
    def offsets(self) -> tuple[int, int, int, int]:
        """Where K's codes, K's scales, V's codes and V's scales begin in a KV head's part of a page."""
        codes, scales = self.block_size * self.head_size // 2, self.block_size * self.head_size // BLOCK
        return 0, codes, codes + scales, 2 * codes + scales

    def parts(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of K's codes, K's scales, V's codes and V's scales, as stored: (blocks, heads, ...), uint8.

        pages: (blocks, heads, block_size, bytes_per_token) uint8, of which the last two dimensions are
        contiguous. Raises ValueError for another shape or order.
        """
        expected = (self.block_size, self.bytes_per_token)
        if pages.ndim != 4 or pages.shape[2:] != expected or pages.dtype != torch.uint8:
            raise ValueError(
                f"packed KV pages: expected uint8 (blocks, heads, {expected[0]}, {expected[1]}), got "
                f"{pages.dtype} {tuple(pages.shape)}"
            )
        if pages.stride()[2:] != (self.bytes_per_token, 1):
            raise ValueError(f"packed KV pages: a head's part must be contiguous, strides {pages.stride()}")
        n, d = self.block_size, self.head_size
        k, ks, v, vs = self.offsets
        along_tokens = self.v_group == "tokens"

        def part(offset: int, *shape: int) -> torch.Tensor:
            strides = [1]
            for size in shape[:0:-1]:
                strides.insert(0, strides[0] * size)
            return pages.as_strided(
                (*pages.shape[:2], *shape),
                (*pages.stride()[:2], *strides),
                pages.storage_offset() + offset,
            )

        return (
            part(k, n, d // 2),
            part(ks, n, d // BLOCK),
            part(v, n // BLOCK, d * BLOCK // 2) if along_tokens else part(v, n, d // 2),
            part(vs, n // BLOCK, d) if along_tokens else part(vs, n, d // BLOCK),
        )


def write(
    pages: torch.Tensor,
    full: torch.Tensor,
    layout: PageLayout,
    slots: torch.Tensor,
    full_slots: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_policy: ScalePolicy | str,
    v_policy: ScalePolicy | str,
    v_scale: float = 1.0,
) -> None:
    """Write tokens to their packed and full-precision slots.

    pages: packed (`PageLayout.parts`). full: (blocks, heads, M, 2 * D) bf16 or fp16. slots, full_slots:
    (T,) int64; tokens with a negative packed slot are passed over. k, v: (T, Hkv, D) in full's dtype, k
    after the transform. v_scale: V's tensor scale; K's is 1. Along tokens only K is packed here, and
    `write_tiles` packs V.
    """
    if len(slots) and int(slots.min()) < 0:
        kept = (slots >= 0).nonzero().flatten()
        slots, full_slots, k, v = slots[kept], full_slots[kept], k[kept], v[kept]
    block, offset = full_slots // full.shape[2], full_slots % full.shape[2]
    full[block, :, offset] = torch.cat((k, v), dim=-1)
    block, offset = slots // layout.block_size, slots % layout.block_size
    k_codes, k_scales, v_codes, v_scales = layout.parts(pages)
    rows, policies, scales = [k], [k_policy], [1.0]
    targets = [(k_codes, k_scales)]
    if layout.v_group == "head_dim":
        rows, policies, scales = [k, v], [k_policy, v_policy], [1.0, v_scale]
        targets.append((v_codes, v_scales))
    order = k_order(layout.head_size)
    for (codes, block_scales), (row_codes, row_scales) in zip(
        targets, _quantized(rows, policies, scales, order), strict=True
    ):
        codes[block, :, offset] = row_codes
        block_scales[block, :, offset] = row_scales


def _quantized(
    rows: list[torch.Tensor], policies: list[ScalePolicy | str], scales: list[float], order: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each of `rows` (T, H, D) under its policy and tensor scale: packed codes, in `order`, and scales, uint8.

    All are quantized at once where the policies are the same.
    """
    if len(rows) == 1 or policies[0] != policies[1]:
        for x, policy, scale in zip(rows, policies, scales, strict=True):
            packed = quantize(x, NVFP4, policy, tensor_scale=_scale(scale, x))
            yield _in_order(packed.packed, order), packed.scales.view(torch.uint8)
        return
    x = torch.stack(rows)
    by_row = torch.stack([_scale(scale, x) for scale in scales]).view(-1, 1, 1, 1).expand(*x.shape[:-1], 1)
    both = quantize(x, NVFP4, policies[0], tensor_scale=by_row)
    yield from zip(_in_order(both.packed, order), both.scales.view(torch.uint8), strict=True)


def write_tiles(
    pages: torch.Tensor,
    layout: PageLayout,
    slots: torch.Tensor,
    values: torch.Tensor,
    v_policy: ScalePolicy | str,
    v_scale: float = 1.0,
) -> None:
    """Pack whole tiles of V along tokens.

    slots: (tiles,) int64, of each tile's first token, multiples of 16. values: (tiles, 16, Hkv, D).
    """
    block, tile = slots // layout.block_size, slots % layout.block_size // BLOCK
    _, _, v_codes, v_scales = layout.parts(pages)
    columns = values.permute(0, 2, 3, 1).contiguous()  # (tiles, Hkv, D, 16)
    packed = quantize(columns, NVFP4, v_policy, tensor_scale=_scale(v_scale, columns))
    v_codes[block, :, tile] = _in_order(packed.packed.flatten(-2), v_order(layout.head_size))
    v_scales[block, :, tile] = packed.scales.view(torch.uint8).squeeze(-1)[..., v_scale_order(layout.head_size)]


def read(
    pages: torch.Tensor, layout: PageLayout, blocks: torch.Tensor, v_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored keys and values of the pages `blocks` (int64): two (Hkv, len(blocks) * block_size, D) fp32.

    Tokens that were never written, and along tokens tiles that are not whole, give whatever lies there;
    that is finite or NaN.
    """
    k_codes, k_scales, v_codes, v_scales = (part[blocks].transpose(0, 1) for part in layout.parts(pages))
    channels = k_order(layout.head_size).argsort()
    k = _values(_in_order(k_codes, channels), k_scales, 1.0).flatten(1, 2)
    if layout.v_group == "head_dim":
        return k, _values(_in_order(v_codes, channels), v_scales, v_scale).flatten(1, 2)
    v_codes = _in_order(v_codes, v_order(layout.head_size).argsort()).unflatten(-1, (layout.head_size, -1))
    v_scales = v_scales[..., v_scale_order(layout.head_size).argsort()]
    v = _values(v_codes, v_scales.unsqueeze(-1), v_scale)  # (Hkv, blocks, tiles, D, 16)
    return k, v.transpose(-1, -2).flatten(1, 3)


def read_apart(
    pages: torch.Tensor, layout: PageLayout, tables: torch.Tensor, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is stored of several requests, V along head_dim: elements and scales of K, then of V.

    tables: (R, W) int64, pages of each. tokens: how many of each to read. Elements: (R, Hkv, tokens, D) fp32,
    channels in the order of `k_order`; block scales: (R, Hkv, tokens, D / 16) fp32, tensor scales apart.
    """
    parts = layout.parts(pages.index_select(0, tables.flatten()))

    def by_request(part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(0, tables.shape).transpose(1, 2).flatten(2, 3)[:, :, :tokens]

    k, k_scales, v, v_scales = map(by_request, parts)
    return (
        decode_packed(k, torch.float32),
        decode_e4m3(k_scales),
        decode_packed(v, torch.float32),
        decode_e4m3(v_scales),
    )


def _values(codes: torch.Tensor, scales: torch.Tensor, tensor_scale: float) -> torch.Tensor:
    packed = QuantizedTensor(
        codes, scales.contiguous().view(torch.float8_e4m3fn), _scale(tensor_scale, codes), NVFP4
    )
    return packed.dequantize()


def _scale(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)
