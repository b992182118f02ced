"""The order of what lies in a page, and that a page gives back what was written to it."""

import pytest
import torch

from vllm_scalesearch import kv_pages
from vllm_scalesearch.attention_reference import BLOCK, V_GROUPS, fake_quantized
from vllm_scalesearch.kv_pages import PageLayout

NAN_BYTE = 0x7F


def written(
    layout: PageLayout,
    k: torch.Tensor,
    v: torch.Tensor,
    v_scale: float = 1.0,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """Pages (blocks, Hkv, ...) with all of k and v (T, Hkv, D), whole pages of tokens.

    order: tokens in the order of their slots.
    """
    heads, tokens = k.shape[1], len(k)
    pages = torch.full(
        (tokens // layout.block_size, heads, layout.block_size, layout.bytes_per_token), NAN_BYTE
    ).to(torch.uint8)
    full = torch.zeros(tokens, heads, 1, 2 * layout.head_size).to(k.dtype)
    slots = torch.arange(tokens) if order is None else order
    kv_pages.write(pages, full, layout, slots, slots, k, v, "fast", "paper", v_scale)
    if layout.v_group == "tokens":
        values = v[slots.argsort()].unflatten(0, (-1, BLOCK))
        kv_pages.write_tiles(pages, layout, torch.arange(0, tokens, BLOCK), values, "paper", v_scale)
    return pages


@pytest.mark.parametrize("v_group", V_GROUPS)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256])
def test_a_page_gives_back_what_was_written(dim: int, v_group: str) -> None:
    rng = torch.Generator().manual_seed(dim)
    layout, heads, tokens, v_scale = PageLayout(48, dim, v_group), 2, 144, 1 / 16
    k, v = (torch.randn(tokens, heads, dim, generator=rng).to(torch.bfloat16) for _ in range(2))
    order = torch.randperm(tokens, generator=rng)
    pages = written(layout, k, v, v_scale, order)
    blocks = torch.tensor([2, 0, 1])
    got = kv_pages.read(pages, layout, blocks, v_scale)
    read = order.argsort().view(-1, layout.block_size)[blocks].flatten()
    k, v = (x[read].float().transpose(0, 1) for x in (k, v))
    assert torch.equal(got[0], fake_quantized(k, "fast"))
    if v_group == "tokens":
        assert torch.equal(got[1].mT, fake_quantized(v.mT.contiguous(), "paper", v_scale))
    else:
        assert torch.equal(got[1], fake_quantized(v, "paper", v_scale))


# E2M1's codes 0 to 7.
MAGNITUDES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def parts_of(layout: PageLayout, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Of the one head and page of k and v (T, D); every block of theirs has a 6, and so a scale of its own."""
    pages = written(layout, *(x.unsqueeze(1).to(torch.bfloat16) for x in (k, v)))
    return [part[0, 0] for part in layout.parts(pages)]


def test_codes_of_a_key_by_hand() -> None:
    # The low 8 of the 16 channels of a block have codes 0 to 7, the others 8 to 15, their negatives; block b
    # is times 2**b, and E4M3's 1.0 is 0x38, 2.0 is 0x40.
    block = torch.cat((MAGNITUDES, -MAGNITUDES))
    k = torch.cat([block * 2**b for b in range(4)]).expand(16, 64)
    codes, scales, *v = parts_of(PageLayout(16, 64, "head_dim"), k, k.flip(-1))
    assert scales[3].tolist() == [0x38, 0x40, 0x48, 0x50]
    # Lane t = 1 of four has channels 4 to 7 of all blocks: those of blocks 0 and 1, then of 2 and 3.
    assert codes[3].view(4, 8)[1].tolist() == [0x44, 0x55, 0x66, 0x77] * 2
    # -0.0 keeps its sign.
    assert codes[3].view(4, 8)[2].tolist() == [0x88, 0x99, 0xAA, 0xBB] * 2
    # Values along head_dim lie as keys do.
    assert v[1][3].tolist() == [0x50, 0x48, 0x40, 0x38]
    assert v[0][3].view(4, 8)[1].tolist() == [0xBB, 0xAA, 0x99, 0x88] * 2

    # In one channel of each block another code: which nibble that is.
    k = torch.full((16, 64), 6.0)
    k[3, 0], k[3, 32 + 16 + 4 * 2 + 1] = 0.5, 1.5
    row = parts_of(PageLayout(16, 64, "head_dim"), k, k)[0][3]
    assert row.nonzero().numel() == 32
    assert {p: byte for p, byte in enumerate(row.tolist()) if byte != 0x77} == {0: 0x71, 2 * 8 + 4 + 1: 0x37}


def test_a_tile_of_values_along_tokens_by_hand() -> None:
    # 96 channels: six groups of 16, of which four lie together in 512 bytes, and two in 256.
    v = torch.full((32, 96), 6.0)
    v[:, 5] *= 2
    v[:, 16 * 5 + 8 + 3] *= 4
    v[16 + 4 * 2 + 1, 16 * 1 + 7] = 0.5  # lane 4 * 7 + 2, group 1, byte 1, low
    v[16 + 4 * 3, 16 * 1 + 8 + 7] = 1.5  # lane 4 * 7 + 3, group 1, byte 0, high
    v[16 + 4 * 1 + 3, 16 * 5 + 8 + 2] = -4.0  # lane 4 * 2 + 1, group 5, byte 3, high
    _, _, codes, scales = parts_of(PageLayout(32, 96, "tokens"), v, v)
    assert codes.shape == (2, 96 * 8)
    assert (codes[0] == 0x77).all()
    assert {p: byte for p, byte in enumerate(codes[1].tolist()) if byte != 0x77} == {
        (4 * 7 + 2) * 16 + 1 * 4 + 1: 0x71,
        (4 * 7 + 3) * 16 + 1 * 4 + 0: 0x37,
        512 + (4 * 2 + 1) * 8 + 1 * 4 + 3: 0xE7,
    }
    # A row's scales lie together: of groups 0 to 5, of channels g and 8 + g.
    assert {p: byte for p, byte in enumerate(scales[1].tolist()) if byte != 0x38} == {
        5 * 12: 0x40,
        3 * 12 + 2 * 5 + 1: 0x48,
    }


@pytest.mark.parametrize(
    ("sizes", "why"), [((8, 64), "block_size .* 16, got 8"), ((16, 48), "head_size .* 32, got 48")]
)
def test_sizes_that_have_no_order(sizes: tuple[int, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PageLayout(*sizes)
