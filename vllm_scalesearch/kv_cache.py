"""The second KV group of a SCALESEARCH layer: its sink and newest tokens in 16 bits, in vLLM's own accounting.

vLLM gives a layer one kind of page. So that some tokens can be kept in full precision beside the packed
ones, each attention layer brings a second one, `FullPrecisionLayer`, whose cache is a sliding window over
the newest tokens that also keeps the first blocks. vLLM then allocates, frees, shares and counts its blocks
like those of any hybrid model: groups share one pool of equal pages, chunked prefill, preemption and prefix
caching included. A prefix is hit only where the sink's blocks and the window before its end are still
there, so what a request computes never depends on what else is in the cache.

A full-precision block has a quarter of the packed block's tokens: its page is then 8/9 as large, and vLLM
pads it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_scalesearch.vllm_api import (
    AttentionBackend,
    AttentionLayerBase,
    KVCacheBlock,
    SlidingWindowManager,
    SlidingWindowSpec,
    VllmConfig,
    get_current_vllm_config_or_none,
    get_kv_quant_mode,
    register_all_kvcache_specs,
    register_kv_cache_spec,
    resolve_block_hashes,
)

# Tokens of a packed block for one of a full-precision block.
RATIO = 4
SUFFIX = ".full_precision"


def layer_beside(attention: str) -> str:
    """Name of the full-precision layer beside the attention layer called `attention`."""
    return attention + SUFFIX


class SinkWindowManager(SlidingWindowManager):
    """Blocks of a sliding window, of which the first `sink_blocks` of a request are never let go."""

    def __init__(self, kv_cache_spec: "SinkWindowSpec", **arguments: Any) -> None:
        super().__init__(kv_cache_spec, **arguments)
        self.sink_blocks = kv_cache_spec.sink_blocks
        # Of the computed tokens, all but so many are skipped (`get_num_skipped_tokens`).
        self.kept_tokens = self.sliding_window - 1 + self.extra_retained_tokens

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: "SinkWindowSpec",
        drop_eagle_block: bool,
        alignment_tokens: int,
        **arguments: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The window's hit, if the sink's blocks are there too; else none."""
        found, length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            **arguments,
        )
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for index in range(min(kv_cache_spec.sink_blocks, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in found), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[index] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *arguments: Any, **named: Any
    ) -> list[bool] | None:
        """Blocks that a hit may need: the sink's at any rate."""
        mask = super().reachable_block_mask(start_block, end_block, *arguments, **named)
        if mask is not None:
            spec = named["kv_cache_spec"] if "kv_cache_spec" in named else arguments[1]
            for index in range(start_block, min(spec.sink_blocks, end_block)):
                mask[index - start_block] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        # Every decoding step asks this of every request, and most have the block that they write to.
        blocks = self.req_to_blocks.get(request_id)
        if blocks and not new_computed_blocks and num_tokens <= len(blocks) * self.block_size:
            return 0
        count = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )
        if request_id in self.num_cached_block or not new_computed_blocks:
            return count
        # A hit takes the sink's blocks out of the free queue as well.
        return count + self._get_num_evictable_blocks(
            new_computed_blocks[: self._skipped_sink_blocks(total_computed_tokens)]
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        skipped = self._skipped_sink_blocks(num_local_computed_tokens + num_external_computed_tokens)
        sink = new_computed_blocks[:skipped]
        if sink:
            self.block_pool.touch(sink)
            self.req_to_blocks[request_id][: len(sink)] = sink

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        # Every decoding step asks this of every request too, so what is skipped is counted in line.
        last = (processed_computed_tokens - self.kept_tokens) // self.block_size
        if last <= self.sink_blocks:
            return
        blocks = self.req_to_blocks.get(request_id, ())
        if last > len(blocks):
            last = len(blocks)
        # Blocks are let go in order, so where the last one is gone all are: as in most steps.
        if last > self.sink_blocks and not blocks[last - 1].is_null:
            self._remove_blocks_in_range(request_id, self.sink_blocks, last)

    def _skipped_sink_blocks(self, computed_tokens: int) -> int:
        """How many of the sink's blocks lie before the window of the next token."""
        return min(self.sink_blocks, self.get_num_skipped_tokens(computed_tokens) // self.block_size)


# vLLM registers its own only where nothing is registered yet.
register_all_kvcache_specs(get_current_vllm_config_or_none())


@register_kv_cache_spec(manager_class=SinkWindowManager, uniform_type_base_spec=SlidingWindowSpec)
@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window of full-precision tokens, with the first `sink_blocks` blocks kept besides.

    Tokens that are being prefilled hold blocks too, however many requests there are: together at most those of
    the steps in flight. So one request is promised its own and all of these, of several each its share of them.
    """

    sink_blocks: int

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(window + self.sink_blocks, -(-max_model_len // self.block_size) + 1)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this group that a request of `max_model_len` tokens counts for.

        Before the number of blocks is known vLLM asks whether one request fits: the most that it holds. From
        then on vLLM asks how many fit at once (its line about the cache's size): what a decoding request keeps,
        and a share of the blocks of the steps in flight, as if all requests were kept as this layer's are.
        """
        most = super().max_memory_usage_bytes(vllm_config) // self.page_size_bytes
        blocks = vllm_config.cache_config.num_gpu_blocks
        if not blocks:
            return most * self.page_size_bytes
        length = vllm_config.model_config.max_model_len
        decoded = vllm_config.max_concurrent_batches * (1 + vllm_config.num_speculative_tokens)
        kept = self.max_admission_blocks_per_request(decoded, length)
        packed = -(-length // (self.block_size * RATIO))
        requests = max((blocks - (most - kept)) / (packed + kept), 1)
        return (kept + math.ceil((most - kept) / requests)) * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(
            isinstance(spec, SinkWindowSpec) and spec.sink_blocks == self.sink_blocks
            for spec in kv_cache_specs.values()
        ) and super().is_uniform_with_collection(kv_cache_specs)


class FullPrecisionLayer(AttentionLayerBase):
    """The sink and the newest tokens of one attention layer: pages (blocks, heads, tokens, 2 * D) in 16 bits.

    backend: of these pages. num_kv_heads, head_size, dtype: of the attention layer. sink: tokens kept at
    the start. window: newest tokens kept.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        impl: Any,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        sink: int,
        window: int,
    ) -> None:
        self.backend, self.impl = backend, impl
        self.num_kv_heads, self.head_size, self.dtype = num_kv_heads, head_size, dtype
        self.sink, self.window = sink, window
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SinkWindowSpec:
        """Bytes, of the packed pages' kind.

        Where kinds differ vLLM zeroes each new block, of each request every 16 tokens, since what a block held
        before may reach a result of some kernels. Here nothing counts that was not written.
        """
        block_size = vllm_config.cache_config.block_size // RATIO
        return SinkWindowSpec(
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            kv_quant_mode=get_kv_quant_mode(vllm_config.cache_config.cache_dtype),
            state_content_bytes=2 * self.head_size * self.dtype.itemsize,
            sliding_window=self.window,
            sink_blocks=-(-self.sink // block_size),
        )
