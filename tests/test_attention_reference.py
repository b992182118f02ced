"""The attention simulator against torch, against a slow loop over its definition, and what it promises.

The slow loop is written from the docstring of attention_reference.py: one head, one query, one token
and one block at a time. Like everything here it takes quantization of one block from search.py, which
test_search.py holds to a definition of its own.
"""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_scalesearch.attention_reference import UNQUANTIZED, AttentionOptions, attention
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.search import ScalePolicy, quantize
from vllm_scalesearch.transforms import (
    SecondMoments,
    hadamard,
    head_transform,
    magnitude_reduction,
)

Qkv = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_qkv(tokens: int, heads: int, kv_heads: int, dim: int, queries: int | None = None, seed=0) -> Qkv:
    """q (queries, heads, dim), k and v (tokens, kv_heads, dim) in fp64."""
    q = normal(queries or tokens, heads, dim, seed=seed)
    return q, normal(tokens, kv_heads, dim, seed=seed + 1), normal(tokens, kv_heads, dim, seed=seed + 2)


def with_outliers(tokens: int, heads: int, kv_heads: int, dim: int) -> Qkv:
    """Queries and keys with outliers anywhere, of log-normal magnitudes; scores of ordinary size."""
    q, k, v = random_qkv(tokens, heads, kv_heads, dim)
    q, k = q * normal(*q.shape, seed=11).exp(), k * normal(*k.shape, seed=12).exp()
    return q / q.std(), k / k.std(), v


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None = None) -> torch.Tensor:
    rows = torch.arange(len(k) - len(q), len(k)).unsqueeze(-1)
    columns = torch.arange(len(k))
    mask = columns <= rows
    if window is not None:
        mask &= columns > rows - window
    parts = [x.double().transpose(0, 1) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(0, 1)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def dequantized(x: torch.Tensor, policy: str = "paper") -> torch.Tensor:
    """What NVFP4 with a tensor scale of 1 keeps of `x` along its last dimension."""
    return quantize(x.float(), NVFP4, policy, tensor_scale=torch.ones(())).dequantize().double()


def reduction_of(q: torch.Tensor, k: torch.Tensor):
    moments = SecondMoments(k.shape[1], k.shape[2])
    moments.add(q[-len(k) :], k[-len(q) :])
    return magnitude_reduction(moments.q, moments.k)


# --- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "block"), [(2, 2), (64, 64), (128, 128), (256, 256), (96, 32), (80, 16)])
def test_hadamard_is_orthonormal_and_flat_in_each_block(size, block):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-14, rtol=0)
    assert torch.equal(matrix, matrix.T)
    inside = torch.block_diag(*[torch.ones(block, block)] * (size // block)).bool()
    assert torch.allclose(matrix[inside].abs(), torch.tensor(block**-0.5, dtype=torch.float64))
    assert not matrix[~inside].any()


@pytest.mark.parametrize("size", [0, 1, 63])
def test_hadamard_of_odd_size_is_an_error(size):
    with pytest.raises(ValueError, match="must be even"):
        hadamard(size)


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("dim", [64, 96])
def test_r_keeps_scores_and_gives_both_moments_s(dim, use_hadamard):
    tokens, heads, kv_heads = 300, 6, 2
    mix = normal(kv_heads, dim, dim, seed=7)  # correlated channels
    q, k, _ = random_qkv(tokens, heads, kv_heads, dim)
    q, k = torch.einsum("thd,hde->the", q, mix.repeat_interleave(3, 0)), k * torch.logspace(-1, 2, dim)
    moments = SecondMoments(kv_heads, dim)
    moments.add(q, k)
    reduction = magnitude_reduction(moments.q, moments.k)
    assert not reduction.fallback.any() and "all 2 KV heads" in str(reduction)

    transform = head_transform(kv_heads, dim, reduction, use_hadamard)
    q_new = torch.einsum("thd,hde->the", q, transform.q_matrix.repeat_interleave(3, 0))
    k_new = torch.einsum("thd,hde->the", k, transform.k_matrix)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(3, 1))
    new_scores = torch.einsum("qhd,khd->hqk", q_new, k_new.repeat_interleave(3, 1))
    torch.testing.assert_close(new_scores, scores, rtol=1e-9, atol=1e-9 * scores.abs().max().item())

    after = SecondMoments(kv_heads, dim)
    after.add(q_new, k_new)
    s = torch.linalg.svdvals(
        torch.linalg.cholesky(moments.q).mT @ torch.linalg.cholesky(moments.k)
    )  # of L_Q L_K^T
    expected = torch.diag_embed(s)
    if use_hadamard:
        expected = hadamard(dim) @ expected @ hadamard(dim)
        diagonal = after.k.diagonal(dim1=1, dim2=2).unflatten(1, (-1, dim & -dim))
        torch.testing.assert_close(diagonal, diagonal.mean(-1, keepdim=True).expand_as(diagonal))
    scale = s.max().item()
    torch.testing.assert_close(after.q, expected, rtol=0, atol=1e-9 * scale)
    torch.testing.assert_close(after.k, expected, rtol=0, atol=1e-9 * scale)


def test_no_other_matrix_makes_the_product_of_magnitudes_smaller():
    q, k, _ = random_qkv(200, 2, 1, 16)
    k = k * torch.logspace(-1, 1, 16)
    moments = SecondMoments(1, 16)
    moments.add(q, k)
    m_q, m_k = moments.q[0], moments.k[0]

    def product(r: torch.Tensor) -> float:
        inverse = torch.linalg.inv(r)
        return (torch.trace(inverse @ m_q @ inverse.T) * torch.trace(r.T @ m_k @ r)).item()

    r = magnitude_reduction(moments.q, moments.k).r[0]
    best = product(r)
    assert best < 0.7 * product(torch.eye(16, dtype=torch.float64))
    for seed in range(20):
        assert product(r @ (torch.eye(16) + 0.1 * normal(16, 16, seed=seed))) > best
        assert product(normal(16, 16, seed=seed)) > best


def test_badly_conditioned_heads_keep_the_identity_and_are_reported():
    good, few, steep = torch.eye(32), torch.zeros(32, 32), torch.logspace(0, 9, 32)
    few[:8, :8] = torch.eye(8)  # as after 8 tokens
    m_k = torch.stack([good, few, good, torch.diag(steep), torch.diag(steep)])
    m_q = torch.stack([good, good, few, torch.diag(steep.flip(0)), good])
    reduction = magnitude_reduction(m_q, m_k)
    assert reduction.fallback.tolist() == [False, True, True, True, False]
    assert "[1, 2, 3] of 5" in str(reduction)
    eye = torch.eye(32, dtype=torch.float64).expand(3, -1, -1)
    assert torch.equal(reduction.r[1:4], eye) and torch.equal(reduction.r_inverse_t[1:4], eye)
    assert reduction.condition[1].isinf() and reduction.condition[2].isinf()
    # Moments that commute give R = (M_Q / M_K)^(1/4).
    expected = torch.tensor([1, 10 ** (18 / 4), 10 ** (9 / 4)], dtype=torch.float64)
    torch.testing.assert_close(reduction.condition[[0, 3, 4]], expected, rtol=1e-5, atol=0)
    assert magnitude_reduction(m_q, m_k, max_condition=1e5).fallback.tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    # H still applies to a head without R.
    transform = head_transform(5, 32, reduction, True)
    assert torch.equal(transform.k_matrix[1], hadamard(32))
    assert torch.equal(transform.q_matrix[1], hadamard(32))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_moments_with_nan_or_another_shape_are_errors(bad):
    m = torch.eye(16).expand(2, -1, -1).clone()
    with pytest.raises(ValueError, match="moments must both be"):
        magnitude_reduction(m, m[:1])
    m[0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        magnitude_reduction(m, m)


def test_moments_of_batches_are_those_of_the_whole():
    q, k, _ = random_qkv(50, 6, 2, 16)
    whole, parts = SecondMoments(2, 16), SecondMoments(2, 16)
    whole.add(q.bfloat16(), k.bfloat16())
    for part in (slice(0, 1), slice(1, 1), slice(1, 50)):
        parts.add(q[part].bfloat16(), k[part].bfloat16())
    assert parts.tokens == 50 and whole.q.dtype == torch.float64
    torch.testing.assert_close(parts.q, whole.q)
    torch.testing.assert_close(parts.k, whole.k)
    group = q.bfloat16().double()[:, 3:]  # the three query heads of KV head 1
    torch.testing.assert_close(whole.q[1], sum(group[:, i].T @ group[:, i] for i in range(3)) / 50)


def test_moments_refuse_what_they_cannot_use():
    moments = SecondMoments(2, 16)
    with pytest.raises(ValueError, match="no token"):
        _ = moments.q
    q, k, _ = random_qkv(4, 4, 2, 16)
    for bad_q, bad_k in [(q[:3], k), (q[:, :3], k), (q, k[:, :1]), (q[..., :8], k[..., :8])]:
        with pytest.raises(ValueError, match="second moments of 2 KV heads of 16"):
            moments.add(bad_q, bad_k)
    k[1, 0, 0] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity"):
        moments.add(q, k)
    assert moments.tokens == 0


# --- unquantized ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("tokens", "queries", "window"), [(1, 1, None), (100, 100, 37), (150, 21, None)])
def test_all_none_is_plain_attention(dim, kv_heads, tokens, queries, window):
    q, k, v = random_qkv(tokens, 6, kv_heads, dim, queries)
    options = dataclasses.replace(UNQUANTIZED, sliding_window=window)
    assert error(attention(q, k, v, options), sdpa(q, k, v, window)) < 1e-14
    assert error(attention(q, k, v, options, torch.float32), sdpa(q, k, v, window)) < 1e-6
    assert attention(q, k, v, options, torch.float32).dtype == torch.float32


@pytest.mark.parametrize("window", [1, 15, 16, 17, 33, 64, 65, 200])
def test_windows_of_any_length_with_context(window):
    q, k, v = random_qkv(150, 2, 1, 16, queries=70)
    options = dataclasses.replace(UNQUANTIZED, sliding_window=window, kv_tile=32)
    assert error(attention(q, k, v, options), sdpa(q, k, v, window)) < 1e-14


def test_soft_cap_and_softmax_scale():
    q, k, v = random_qkv(40, 2, 2, 64)
    options = dataclasses.replace(UNQUANTIZED, logits_soft_cap=5.0, softmax_scale=0.3)
    scores = 5 * torch.tanh(torch.einsum("qhd,khd->hqk", q, k) * 0.3 / 5)
    weights = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).softmax(-1)
    assert error(attention(q, k, v, options), torch.einsum("hqk,khd->qhd", weights, v)) < 1e-14


@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("use_r", [False, True])
def test_transforms_alone_change_nothing(use_r, use_hadamard):
    q, k, v = with_outliers(150, 4, 2, 96)
    reduction = reduction_of(q, k)
    assert not reduction.fallback.any()
    options = dataclasses.replace(UNQUANTIZED, hadamard=use_hadamard, reduction=reduction if use_r else None)
    assert error(attention(q, k, v, options), sdpa(q, k, v)) < 1e-12
    rounded = dataclasses.replace(options, transform_dtype=torch.bfloat16)
    changed = error(attention(q, k, v, rounded), sdpa(q, k, v))
    assert 1e-4 < changed < 2e-2 if use_r or use_hadamard else changed < 1e-12


# --- quantized, against the slow loop ------------------------------------------------------------


def one_block(x: torch.Tensor, policy: str | None, tensor_scale: float = 1.0) -> torch.Tensor:
    """16 numbers as stored, in fp64."""
    if policy is None:
        return x
    scale = torch.tensor(tensor_scale, dtype=torch.float32)
    values, residual = quantize(x.float(), NVFP4, policy, tensor_scale=scale).values(torch.float32)
    return values.double() * residual.double()


def along_head(x: torch.Tensor, policy: str | None, scale: float) -> torch.Tensor:
    return torch.cat([one_block(part, policy, scale) for part in x.split(16)])


def is_stored(j: int, p: int, o: AttentionOptions, first: int) -> bool:
    """Of token j for the query at p, one of those from `first` on that are computed together."""
    if j < o.sink:
        return False
    if o.own_chunk:
        p = first
    if o.v_group == "tokens" and o.incomplete:
        last_of_block = j // 16 * 16 + 15
        return last_of_block <= p and not last_of_block > p - o.recent
    return not j > p - o.recent


def slow_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: AttentionOptions) -> torch.Tensor:
    heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    transform = head_transform(kv_heads, dim, o.reduction, o.hadamard)
    scale = dim**-0.5 if o.softmax_scale is None else o.softmax_scale
    out = torch.zeros_like(q)
    for h in range(heads):
        kv = h // (heads // kv_heads)
        keys, queries, values = k[:, kv], q[:, h], v[:, kv]
        if transform is not None:
            keys, queries = keys @ transform.k_matrix[kv], queries @ transform.q_matrix[kv]
        for i in range(len(q)):
            p = len(k) - len(q) + i
            q_stored = along_head(queries[i], o.q, o.q_scale)
            first = 0 if o.sliding_window is None else max(0, p - o.sliding_window + 1)
            m, n, total, acc = -math.inf, -math.inf, 0.0, torch.zeros(dim, dtype=torch.float64)
            for start in range(0, p + 1, o.kv_tile):
                tokens = [j for j in range(start, min(start + o.kv_tile, p + 1)) if j >= first]
                if not tokens:
                    continue
                scores = {}
                for j in tokens:
                    stored = is_stored(j, p, o, len(k) - len(q))
                    key = along_head(keys[j], o.k, o.k_scale) if stored else keys[j]
                    scores[j] = ((q_stored if stored else queries[i]) @ key).item() * scale
                    if o.logits_soft_cap is not None:
                        scores[j] = o.logits_soft_cap * math.tanh(scores[j] / o.logits_soft_cap)
                scores = {j: s * math.log2(math.e) for j, s in scores.items()}
                new_m = max(m, math.ceil(max(scores.values())))
                weights = {j: 2 ** (s - new_m) for j, s in scores.items()}
                decay = 2 ** (m - new_m)
                m, total, acc = new_m, total * decay, acc * decay

                n = max([n] + [math.ceil(s) for j, s in scores.items() if is_stored(j, p, o, len(k) - len(q))])
                row = torch.zeros(o.kv_tile, dtype=torch.float64)
                for j in tokens:
                    if is_stored(j, p, o, len(k) - len(q)):
                        row[j - start] = weights[j]
                    else:
                        acc += weights[j] * values[j]
                        total += weights[j]
                level = max(2.0 ** (n - m) / 1024, 2.0**-126) if o.two_level_p else 1.0
                row = torch.cat([one_block(part, o.p, level) for part in row.split(16)])
                total += row.sum().item()
                for j in tokens:
                    if is_stored(j, p, o, len(k) - len(q)):
                        acc += row[j - start] * stored_value(values, j, p, o)
            out[i, h] = acc / total
    return out


def stored_value(values: torch.Tensor, j: int, p: int, o: AttentionOptions) -> torch.Tensor:
    if o.v_group == "head_dim":
        return along_head(values[j], o.v, o.v_scale)
    block = torch.zeros(16, values.shape[1], dtype=torch.float64)
    first = j // 16 * 16
    count = min(first + 16, p + 1) - first
    block[:count] = values[first : first + count]
    return one_block(block.T.contiguous(), o.v, o.v_scale)[:, j - first]


policies = st.sampled_from([None, "absmax", "paper", "fast", "window:-1,1"])


@st.composite
def option_sets(draw: st.DrawFn, tokens: int) -> AttentionOptions:
    incomplete = draw(st.booleans())
    return AttentionOptions(
        q=draw(policies),
        k=draw(policies),
        v=draw(policies),
        p=draw(policies),
        hadamard=draw(st.booleans()),
        v_group=draw(st.sampled_from(["tokens", "head_dim"])),
        sink=draw(st.sampled_from([0, 1, 5, 16, 20, tokens])),
        recent=draw(st.sampled_from([0, 1, 3, 16, 17])) if incomplete else 0,
        incomplete=incomplete,
        two_level_p=draw(st.booleans()),
        own_chunk=draw(st.booleans()),
        v_scale=draw(st.sampled_from([1.0, 0.01])),
        sliding_window=draw(st.sampled_from([None, 1, 20, 33])),
        logits_soft_cap=draw(st.sampled_from([None, 2.0])),
        kv_tile=draw(st.sampled_from([16, 32, 64])),
    )


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 52))
def test_equals_the_slow_loop(data, tokens):
    options = data.draw(option_sets(tokens))
    queries = data.draw(st.integers(1, min(tokens, 3)))
    use_r = data.draw(st.booleans())
    q, k, v = random_qkv(tokens, 2, 1, 32, queries, seed=data.draw(st.integers(0, 1000)))
    if use_r:
        options = dataclasses.replace(options, reduction=reduction_of(*random_qkv(99, 2, 1, 32)[:2]))
    expected = slow_attention(q, k, v, options)
    assert error(attention(q, k, v, options), expected) < 1e-12


@pytest.mark.parametrize("two_level", [True, False])
@pytest.mark.parametrize("tile", [16, 48, 64])
def test_tiles_of_p_equal_the_slow_loop(two_level, tile):
    """P alone, every query of a sequence that ends within a block."""
    q, k, v = random_qkv(75, 2, 1, 16)
    options = AttentionOptions(q=None, k=None, v=None, hadamard=False, two_level_p=two_level, kv_tile=tile)
    got = attention(q, k, v, options)
    assert error(got, slow_attention(q, k, v, options)) < 1e-12
    assert 1e-3 < error(got, sdpa(q, k, v)) < 0.2
    # Tokens that are stored for nobody leave the first queries alone.
    assert error(got[:31], sdpa(q, k, v)[:31]) < 1e-14


def test_quantized_p_does_not_depend_on_tiles():
    """Nor on what a larger maximum of a later tile does to it."""
    q, k, v = random_qkv(300, 2, 1, 32, 40)
    options = AttentionOptions(kv_tile=16)
    expected = attention(q * 4, k, v, options)
    for tile in (48, 128, 512):
        got = attention(q * 4, k, v, dataclasses.replace(options, kv_tile=tile))
        assert error(got, expected) < 1e-4  # of blocks that are tiny beside the row's largest


# --- each switch does what it says ---------------------------------------------------------------


EVERYTHING = AttentionOptions(sink=0, v_group="head_dim")


@pytest.mark.parametrize("v_group", ["tokens", "head_dim"])
@pytest.mark.parametrize("kept", [{"sink": 70}, {"recent": 70}])
def test_full_precision_everywhere_is_plain_attention(v_group, kept):
    q, k, v = random_qkv(70, 4, 2, 64)
    options = AttentionOptions(v_group=v_group, **{"sink": 0} | kept)
    assert error(attention(q, k, v, options), sdpa(q, k, v)) < 1e-13


@pytest.mark.parametrize("policy", ["absmax", "paper"])
def test_one_operand_equals_attention_over_the_dequantized_one(policy):
    q, k, v = random_qkv(70, 4, 2, 64)
    alone = dict.fromkeys("qkvp", None) | {"hadamard": False, "sink": 0, "v_group": "head_dim"}
    for name, expected in {
        "q": sdpa(dequantized(q, policy), k, v),
        "k": sdpa(q, dequantized(k, policy), v),
        "v": sdpa(q, k, dequantized(v, policy)),
    }.items():
        got = attention(q, k, v, AttentionOptions(**alone | {name: policy}))
        assert error(got, expected) < 1e-13
        assert error(got, sdpa(q, k, v)) > 1e-2


def test_keys_and_queries_are_quantized_after_the_transform():
    q, k, v = with_outliers(70, 4, 2, 64)
    reduction = reduction_of(q, k)
    transform = head_transform(2, 64, reduction, True)
    new_q = torch.einsum("thd,hde->the", q, transform.q_matrix.repeat_interleave(2, 0))
    new_k = torch.einsum("thd,hde->the", k, transform.k_matrix)
    options = AttentionOptions(v=None, p=None, sink=0, v_group="head_dim", reduction=reduction)
    assert error(attention(q, k, v, options), sdpa(dequantized(new_q), dequantized(new_k), v)) < 1e-12


@pytest.mark.parametrize("recent", [0, 1, 9, 16, 17])
def test_values_along_tokens_are_stored_in_whole_blocks_before_the_recent_window(recent):
    q, k, v = random_qkv(80, 2, 1, 32)
    options = AttentionOptions(q=None, k=None, p=None, hadamard=False, sink=5, recent=recent)
    stored = dequantized(v.permute(1, 2, 0)).permute(2, 0, 1)
    got = attention(q, k, v, options)
    for p in range(80):
        whole = max(p + 1 - recent, 0) // 16 * 16
        seen = v[: p + 1].clone()
        seen[5:whole] = stored[5:whole]
        assert error(got[p : p + 1], sdpa(q[p : p + 1], k[: p + 1], seen)) < 1e-13


@pytest.mark.parametrize("recent", [0, 1, 9, 17])
@pytest.mark.parametrize("v_group", ["tokens", "head_dim"])
def test_queries_of_a_chunk_see_the_same_keys_and_values(v_group, recent):
    q, k, v = random_qkv(90, 2, 1, 32, queries=37)
    options = AttentionOptions(
        q=None, p=None, hadamard=False, v_group=v_group, sink=5, recent=recent, own_chunk=True
    )
    boundary = 54 - recent if v_group == "head_dim" else (54 - recent) // 16 * 16
    assert options.boundary(torch.arange(53, 90)).tolist() == [boundary] * 37
    assert options.boundary(torch.arange(0)).tolist() == []
    seen_k, seen_v = k.clone(), v.clone()
    stored_v = (
        dequantized(v) if v_group == "head_dim" else dequantized(v[:80].permute(1, 2, 0)).permute(2, 0, 1)
    )
    seen_k[5:boundary], seen_v[5:boundary] = dequantized(k)[5:boundary], stored_v[5:boundary]
    assert error(attention(q, k, v, options), sdpa(q, seen_k, seen_v)) < 1e-13


def test_switches_without_their_operand_change_nothing():
    q, k, v = random_qkv(70, 4, 2, 64)
    no_p = dataclasses.replace(EVERYTHING, p=None)
    base = attention(q, k, v, no_p)
    assert torch.equal(attention(q, k, v, dataclasses.replace(no_p, two_level_p=False)), base)
    assert torch.equal(attention(q, k, v, dataclasses.replace(no_p, incomplete=False)), base)
    assert error(attention(q, k, v, dataclasses.replace(no_p, kv_tile=16)), base) < 1e-13
    # And with it, they do.
    for change in ({"two_level_p": False}, {"hadamard": False}, {"q": "absmax"}):
        changed = attention(q, k, v, dataclasses.replace(EVERYTHING, **change))
        assert error(changed, attention(q, k, v, EVERYTHING)) > 1e-3, change


def test_tensor_scales_shift_the_range_of_the_block_scales():
    q, k, v = random_qkv(70, 4, 2, 64)
    base = attention(q, k, v, EVERYTHING)
    # A power of two changes no code while the block scales stay normal.
    shifted = dataclasses.replace(EVERYTHING, q_scale=0.25, k_scale=2.0, v_scale=torch.tensor([0.5, 0.125]))
    assert error(attention(q, k, v, shifted), base) < 1e-13
    # Tiny values are lost with a scale of 1, and are kept with their own, one for each KV head.
    tiny = v * torch.tensor([1.0, 1e-4]).unsqueeze(-1)
    values = dataclasses.replace(UNQUANTIZED, v="paper", sink=0, v_group="head_dim")
    scaled = dataclasses.replace(values, v_scale=torch.tensor([1.0, 1e-4]))
    exact = sdpa(q, k, tiny)
    assert error(attention(q, k, tiny, values)[:, 2:], exact[:, 2:]) > 0.5
    assert error(attention(q, k, tiny, scaled)[:, 2:], exact[:, 2:]) < 0.15
    assert torch.equal(attention(q, k, tiny, scaled)[:, :2], attention(q, k, tiny, values)[:, :2])


@settings(max_examples=25, deadline=None)
@given(data=st.data(), tokens=st.integers(2, 100))
def test_outputs_depend_on_positions_alone(data, tokens):
    """Neither on how the sequence is cut, nor on what comes later."""
    options = dataclasses.replace(data.draw(option_sets(tokens)), own_chunk=False)
    cuts = sorted(data.draw(st.sets(st.integers(1, tokens - 1), max_size=4)) | {0, tokens})
    q, k, v = random_qkv(tokens, 4, 2, 32, seed=data.draw(st.integers(0, 1000)))
    whole = attention(q, k, v, options)
    for a, b in itertools.pairwise(cuts):
        assert error(attention(q[a:b], k[:b], v[:b], options), whole[a:b]) < 1e-12
    later_k, later_v = k.clone(), v.clone()
    later_k[cuts[1] :], later_v[cuts[1] :] = 100.0, -100.0
    assert error(attention(q, later_k, later_v, options)[: cuts[1]], whole[: cuts[1]]) < 1e-12


# --- accuracy ------------------------------------------------------------------------------------


def left_over(data: Qkv, rule: str, **options) -> float:
    quantized = AttentionOptions(**dict.fromkeys("qkvp", rule) | options)
    return error(attention(*data, quantized, torch.float32), sdpa(*data))


def test_search_and_h_make_the_error_of_outliers_smaller():
    data = with_outliers(512, 4, 2, 64)
    plain = [left_over(data, rule, hadamard=False) for rule in ("absmax", "paper")]
    with_h = [left_over(data, rule) for rule in ("absmax", "paper")]
    assert plain[1] < 0.92 * plain[0] and with_h[1] < 0.92 * with_h[0]
    assert with_h[0] < 0.92 * plain[0] and with_h[1] < 0.92 * plain[1]
    assert left_over(data, "paper", sink=0) > with_h[1] > left_over(data, "paper", recent=64)


def test_r_undoes_any_scaling_of_channels_that_keeps_the_scores():
    q, k, v = with_outliers(512, 4, 2, 64)
    channels = normal(64, seed=9).exp()
    scaled = q / channels, k * channels, v
    even = left_over((q, k, v), "paper", reduction=reduction_of(q, k))
    assert left_over(scaled, "paper", reduction=reduction_of(*scaled[:2])) == pytest.approx(even, rel=1e-3)
    # H alone only spreads it.
    assert left_over(scaled, "paper") > 2 * even


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"q": "best"}, "unknown scale policy 'best'"),
        ({"k": ScalePolicy("paper", "hessian")}, "policy of k"),
        ({"v_group": "channels"}, "v_group 'channels'; there are tokens, head_dim"),
        ({"sink": -1}, "counts of tokens"),
        ({"recent": 16, "incomplete": False}, "recent must be 0"),
        ({"kv_tile": 24}, "multiple of 16"),
        ({"kv_tile": 0}, "multiple of 16"),
        ({"sliding_window": 0}, "sliding window"),
        ({"logits_soft_cap": 0.0}, "above 0"),
    ],
)
def test_wrong_options_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**values)


def test_wrong_shapes_are_errors():
    q, k, v = random_qkv(20, 4, 2, 64)
    for args, message in [
        ((q, k, v[:19]), "expected q"),
        ((q[..., :32], k, v), "expected q"),
        ((q[:, :3], k, v), "cannot share"),
        ((q, k[:19], v[:19]), "more than 19 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*args, AttentionOptions())
    with pytest.raises(ValueError, match="fp32 or fp64"):
        attention(q, k, v, AttentionOptions(), torch.bfloat16)
    with pytest.raises(ValueError, match="3 tensor scales for 2 KV heads"):
        attention(q, k, v, AttentionOptions(k_scale=torch.ones(3)))
    other = reduction_of(*random_qkv(99, 2, 1, 64)[:2])
    with pytest.raises(ValueError, match="R is of 1 KV heads of 64"):
        attention(q, k, v, AttentionOptions(reduction=other))
