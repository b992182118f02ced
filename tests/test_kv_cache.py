"""The life of pages under vLLM's own manager: each request finds its tokens where its tables say."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.vllm

BLOCK, FULL_BLOCK = 16, 4
PACKED, FULL = 0, 1


class Cache:
    """vLLM's manager of the two groups of a layer, and a dictionary in place of the pages."""

    def __init__(self, blocks: int, sink: int, window: int) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from vllm_scalesearch.kv_cache import SinkWindowSpec

        page = BLOCK * 72
        packed = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.uint8, state_content_bytes=72
        )
        full = SinkWindowSpec(
            block_size=FULL_BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16, page_size_padded=page,
            sliding_window=window, sink_blocks=-(-sink // FULL_BLOCK),
        )  # fmt: skip
        self.specs = (packed, full)
        groups = [KVCacheGroupSpec(["layer"], packed), KVCacheGroupSpec(["layer.full_precision"], full)]
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(FULL_BLOCK, sha256)
        self.manager = KVCacheManager(
            KVCacheConfig(blocks, [], groups), max_model_len=256, scheduler_block_size=BLOCK,
            hash_block_size=FULL_BLOCK, max_in_flight_tokens=64, enable_caching=True,
        )  # fmt: skip
        self.sink, self.window = sink, window
        self.pages: dict[tuple[int, int], tuple] = {}
        self.names = 0
        self.computed: dict[str, int] = {}
        self.requests = {}

    def add(self, tokens: list[int]) -> str:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.names += 1
        name = str(self.names)
        self.requests[name] = Request(name, tokens, SamplingParams(), None, block_hasher=self.hasher)
        return name

    def run(self, name: str, count: int) -> bool:
        """Compute up to `count` of a request's tokens; False where there is no room."""
        request = self.requests[name]
        hit, blocks = 0, None
        if name not in self.computed:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
        begin = self.computed.get(name, hit)
        count = min(count, request.num_tokens - begin)
        if not count:
            return True
        request.num_computed_tokens = self.computed.get(name, 0)
        full = self.manager.coordinator.single_type_managers[FULL]
        held = len(full.req_to_blocks.get(name, ()))
        asked = full.get_num_blocks_to_allocate(name, begin + count, (), begin, begin, begin + count)
        if self.manager.allocate_slots(request, count, hit, blocks) is None:
            return False
        if name in self.computed:
            assert asked == len(full.req_to_blocks[name]) - held
        # No block is kept for longer than a query needs it.
        gone = range(full.sink_blocks, full.get_num_skipped_tokens(begin) // FULL_BLOCK)
        assert [i for i, block in enumerate(full.req_to_blocks[name]) if block.is_null] == list(gone)
        self.computed[name] = begin + count
        tokens = request.all_token_ids
        for token in range(begin, begin + count):
            for group in (PACKED, FULL):
                self.pages[self.slot(name, group, token)] = (group, tuple(tokens[: token + 1]))
        for query in range(begin, begin + count):
            for token in range(query + 1):
                self.check(name, PACKED, token)
                if token < self.sink or token > query - self.window:
                    self.check(name, FULL, token)
        return True

    def slot(self, name: str, group: int, token: int) -> tuple[int, int]:
        size = (BLOCK, FULL_BLOCK)[group]
        block = self.manager.get_block_ids(name)[group][token // size]
        assert block != 0, f"token {token} of group {group} has no page"
        return block, token % size

    def check(self, name: str, group: int, token: int) -> None:
        expected = (group, tuple(self.requests[name].all_token_ids[: token + 1]))
        assert self.pages[self.slot(name, group, token)] == expected

    def release(self, name: str) -> None:
        """Let go of a request's pages: it is preempted, or done."""
        if self.computed.pop(name, None) is not None:
            self.manager.free(self.requests[name])

    def finish(self, name: str) -> None:
        self.release(name)
        del self.requests[name]


PROMPTS = [[prompt // 2, *range(100, 130 + 20 * prompt)] for prompt in range(4)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "run", "run", "run", "grow", "preempt", "finish"]),
            st.integers(0, 3),
            st.integers(1, 40),
        ),
        max_size=60,
    ),
    blocks=st.sampled_from([30, 60, 200]),
    sink=st.sampled_from([0, 1, 8]),
    window=st.sampled_from([1, 5, 8]),
)
def test_requests_find_their_tokens(operations, blocks, sink, window):
    """Requests that share prefixes are added, computed in pieces, grown, preempted, resumed and finished."""
    cache = Cache(blocks, sink, window)
    free = cache.manager.block_pool.get_num_free_blocks()
    for operation, which, count in operations:
        names = list(cache.requests)
        if operation == "add":
            cache.add(list(PROMPTS[which]))
        elif names:
            name = names[which % len(names)]
            if operation == "run":
                cache.run(name, count)
            elif operation == "grow" and cache.computed.get(name) == cache.requests[name].num_tokens:
                if cache.requests[name].num_tokens < 200:
                    cache.requests[name].append_output_token_ids(count % 3)
                    cache.run(name, 1)
            elif operation == "preempt":
                cache.release(name)
            elif operation == "finish":
                cache.finish(name)
    for name in list(cache.requests):
        cache.finish(name)
    assert cache.manager.block_pool.get_num_free_blocks() == free


@pytest.mark.parametrize(("sink", "window"), [(0, 1), (1, 5), (8, 8), (4, 40)])
def test_blocks_are_taken_and_let_go_in_time(sink, window):
    """In pieces of a prompt and token by token, where the manager answers without asking vLLM's: see `run`."""
    cache = Cache(200, sink, window)
    name = cache.add(PROMPTS[1])
    for count in (7, 1, 13, 4, 1000):
        assert cache.run(name, count)
    for token in range(60):
        cache.requests[name].append_output_token_ids(token)
        assert cache.run(name, 1)


def test_a_prefix_is_hit_with_its_sink_and_window():
    cache = Cache(200, sink=8, window=8)
    first = cache.add(PROMPTS[3])
    assert cache.run(first, 40)
    assert cache.run(first, 1000)
    full = cache.manager.get_block_ids(first)[FULL]
    assert full[0] and full[1] and not any(full[2:8])
    second = cache.add([*PROMPTS[3], 7, 8])
    _, hit, _ = cache.manager.get_computed_blocks(cache.requests[second])
    assert hit == len(PROMPTS[3]) // BLOCK * BLOCK
    assert cache.run(second, 1000)
    assert cache.manager.get_block_ids(second)[FULL][:2] == full[:2]
    blocks = cache.manager.block_pool.blocks
    assert [blocks[i].ref_cnt for i in full[:2]] == [2, 2]
    cache.finish(second)
    assert [blocks[i].ref_cnt for i in full[:2]] == [1, 1]


def test_without_the_sink_there_is_no_hit():
    """Whatever else is left of a prefix."""
    cache = Cache(200, sink=8, window=8)
    first = cache.add(PROMPTS[3])
    assert cache.run(first, 1000)
    sink = cache.manager.get_block_ids(first)[FULL][0]
    cache.finish(first)
    second = cache.add([*PROMPTS[3], 7, 8])
    assert cache.manager.get_computed_blocks(cache.requests[second])[1] > 0
    cache.manager.block_pool._maybe_evict_cached_block(cache.manager.block_pool.blocks[sink])
    assert cache.manager.get_computed_blocks(cache.requests[second])[1] == 0


def test_a_request_waits_for_a_full_precision_block():
    """Where packed pages suffice and only the other kind is missing, nothing is taken from an empty pool."""
    cache = Cache(1 + 1 + 3, sink=0, window=40)  # one that is never used, one packed, three of 4 tokens
    name = cache.add(list(range(20)))
    assert cache.run(name, 12)
    assert not cache.run(name, 1)


@pytest.mark.parametrize("blocks", [40, 100, 500])
@pytest.mark.parametrize(("sink", "window"), [(8, 8), (0, 1), (4, 40)])
def test_as_many_requests_fit_as_is_stated(blocks, sink, window):
    """What vLLM makes its line about the cache's size of, for requests of the whole length."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    length, step = 256, 32
    cache = Cache(blocks, sink, window)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks),
        model_config=SimpleNamespace(max_model_len=length),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        max_in_flight_tokens=2 * step, max_concurrent_batches=2, num_speculative_tokens=0,
    )  # fmt: skip
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(cache.specs)]
    stated = get_max_concurrency_for_kv_cache_config(config, KVCacheConfig(blocks, [], groups))
    held = 0
    while True:
        name = cache.add([1000 * held + token for token in range(length - 2)])
        while cache.computed.get(name, 0) < length - 2 and cache.run(name, step):
            pass
        if cache.computed.get(name, 0) < length - 2:
            break
        for token in range(2):  # what only a prompt's step needed is let go
            cache.requests[name].append_output_token_ids(token)
            if not cache.run(name, 1):
                break
        held += 1
    assert int(stated) <= held <= 1.2 * stated + 1


def test_one_request_is_promised_all_that_it_holds():
    """Before blocks are counted; else the only request of a small cache could wait for ever."""
    cache = Cache(40, sink=8, window=8)
    config = SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=None),
        model_config=SimpleNamespace(max_model_len=256),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=64, max_concurrent_batches=2, num_speculative_tokens=0,
    )  # fmt: skip
    spec = cache.specs[FULL]
    blocks = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    assert blocks == spec.max_admission_blocks_per_request(64, 256) == 2 + -(-(7 + 64) // FULL_BLOCK) + 1
