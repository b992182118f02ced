"""ScaleSearchAttention as a vLLM attention backend, `SCALESEARCH` (arXiv 2605.12464; the definition is
attention_reference.py).

Each attention layer has packed pages of its own and, as a layer beside it, 16-bit pages of its sink and
newest tokens (kv_cache.py). A forward pass transforms q and k, writes k and v to both, and attends to what
the cache holds.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from vllm_scalesearch import attention_prefill, attention_warmup
from vllm_scalesearch.attention_options import CacheOptions
from vllm_scalesearch.attention_prefill import Group
from vllm_scalesearch.attention_reference import BLOCK, AttentionOptions
from vllm_scalesearch.kv_cache import RATIO, FullPrecisionLayer, SinkWindowSpec, layer_beside
from vllm_scalesearch.kv_pages import PageLayout
from vllm_scalesearch.model_reductions import ModelReductions
from vllm_scalesearch.ops import cuda_paged_decode, cuda_prompt_attention, paged_attention
from vllm_scalesearch.ops.step import Step
from vllm_scalesearch.options import ATTENTION_BACKEND, QUANT_METHOD
from vllm_scalesearch.transforms import MagnitudeReduction, head_transform
from vllm_scalesearch.vllm_api import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionSpec,
    AttentionType,
    CommonAttentionMetadata,
    KVCacheLayout,
    MultipleOf,
    VllmConfig,
    current_platform,
    flash_attention,
    get_attention_context,
    get_current_vllm_config,
    init_logger,
    order_pipeline,
    split_decodes_and_prefills,
)

NAME = ATTENTION_BACKEND
KV_CACHE_DTYPE = "nvfp4"
HEAD_SIZES = (64, 96, 128, 256)
BLOCK_SIZES = range(BLOCK, 129, BLOCK)
# Its 16-bit block then has 16 tokens, one tile of V.
PREFERRED_BLOCK_SIZE = 64
# Kernels for prompts that take keys and values dense, and how many copies of them: K and V, or both in full
# precision and as stored.
_DENSE_COPIES = {"flash": 2, "tiles": 4}

logger = init_logger("vllm.scalesearch.attention")

# Kinds of layers whose kernels have run in this process.
_warm: set[tuple] = set()


@dataclass
class Metadata:
    """Of one KV group in one step: see `step.Step`."""

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    max_query_len: int
    prompts: "Prompts | None" = None


@dataclass
class Prompts:
    """What is not decoded of a step, on a GPU: the requests from `first` on, which have more than one query.

    first_query: their first token. query_start_loc: theirs, from 0 on. groups: how kernels take them that need
    dense keys and values, or None where all are so short that they are read packed.
    """

    first: int
    first_query: int
    query_start_loc: torch.Tensor
    groups: list[Group] | None


class MetadataBuilder(AttentionMetadataBuilder[Metadata]):
    """Passes on what the runner has: all of it lies in buffers that a CUDA graph may keep."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.splits = current_platform.is_cuda() and not isinstance(kv_cache_spec, SinkWindowSpec)
        if current_platform.is_cuda():
            self._init_reorder_batch_threshold(1)
        self.budget = dense_tokens(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Metadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError(f"{NAME}: attention that is not causal is not supported")
        return Metadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping[: common.num_actual_tokens],
            common.max_query_len,
            self._prompts(common) if self.splits and common.max_query_len > 1 else None,
        )

    def _prompts(self, common: CommonAttentionMetadata) -> Prompts:
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(common)
        groups = None
        if common.max_query_len >= attention_prefill.LEAST_QUERIES:
            lengths = common.seq_lens_cpu_upper_bound
            lengths = common.seq_lens.cpu() if lengths is None else lengths
            groups = attention_prefill.plan(
                common.query_start_loc,
                common.query_start_loc_cpu.tolist(),
                common.seq_lens,
                lengths[: common.num_reqs].tolist(),
                decodes,
                self.budget,
            )
        return Prompts(decodes, decode_tokens, common.query_start_loc[decodes:] - decode_tokens, groups)


class _Backend(AttentionBackend):
    """What both kinds of pages have in common."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["ScaleSearchAttentionImpl"]:
        return ScaleSearchAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A head's part of a page is contiguous."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Pages written with one R must not be read with another, and a connector does not know R.
        return False


class FullPrecisionBackend(_Backend):
    """Of the pages of `FullPrecisionLayer`."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK // RATIO)]


class ScaleSearchAttentionBackend(_Backend):
    """Of the packed pages; the one that a user selects."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = [KV_CACHE_DTYPE]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return PREFERRED_BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in cls.supported_kv_cache_dtypes

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return block_size is None or block_size in BLOCK_SIZES

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.head_size != spec.head_size_v:
            raise NotImplementedError(
                f"{NAME}: keys of {spec.head_size} and values of {spec.head_size_v} channels, not supported: "
                "both must have one size"
            )
        return replace(spec, state_content_bytes=PageLayout(BLOCK, spec.head_size).bytes_per_token)

    @classmethod
    def validate_configuration(cls, head_size: int, dtype: torch.dtype, **config: Any) -> list[str]:
        """vLLM's list of reasons, in words that say what to do."""
        reasons = super().validate_configuration(head_size=head_size, dtype=dtype, **config)
        said = {
            "head_size not supported": f"head_size {head_size} is not among {HEAD_SIZES}",
            "dtype not supported": f"dtype {dtype} is neither bfloat16 nor float16",
            "kv_cache_dtype not supported": f"it needs --kv-cache-dtype {KV_CACHE_DTYPE} (got "
            f"{config.get('kv_cache_dtype')!r}), in every layer: kv_cache_dtype_skip_layers must be empty",
            "block_size not supported": f"block_size {config.get('block_size')} is not a multiple of {BLOCK} "
            f"up to {BLOCK_SIZES[-1]}",
            "attention sinks not supported": "learned attention sinks are not supported",
            "KV connector not supported": "KV connectors are not supported: another server's R is not known",
        }
        return [said.get(reason, reason) for reason in reasons]


def user_options(vllm_config: VllmConfig) -> CacheOptions:
    """The user's options. Raises ValueError for those that do not exist."""
    additional = vllm_config.additional_config
    ours = additional.get(QUANT_METHOD, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(ours, Mapping):
        raise ValueError(f"additional_config[{QUANT_METHOD!r}]: expected a mapping of options, got {ours!r}")
    return CacheOptions.from_mapping(ours.get("attention")).on(current_platform.is_cuda())


def dense_tokens(vllm_config: VllmConfig) -> int:
    """How many tokens of context `attention_prefill` makes dense at a time, a layer's keys and values."""
    return max(vllm_config.model_config.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens)


class ScaleSearchAttentionImpl(AttentionImpl[Metadata]):
    """Attention of one layer over its cache.

    Raises NotImplementedError at construction for what is not supported.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = KV_CACHE_DTYPE,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError(f"{NAME}: ALiBi is not supported; use another --attention-backend")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"{NAME}: attention of type {attn_type} is not supported, only decoders")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.vllm_config = get_current_vllm_config()
        self.options = user_options(self.vllm_config)
        self.dtype = torch.get_default_dtype()
        self.layer_name: str | None = None
        self.reductions: ModelReductions | None = None
        self.prompts = ""  # which kernel takes them, once the layer is known
        self.set_reduction(None)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bring in the layer's full-precision pages and its R; vLLM calls it once the model is loaded."""
        layers = self.vllm_config.compilation_config.static_forward_context
        self.layer_name = next(
            name
            for name, layer in layers.items()
            if getattr(layer, "impl", None) is self and not isinstance(layer, FullPrecisionLayer)
        )
        beside = layer_beside(self.layer_name)
        if self.kv_sharing_target_layer_name is None and beside not in layers:
            layers[beside] = FullPrecisionLayer(
                FullPrecisionBackend,
                self,
                self.num_kv_heads,
                self.head_size,
                self.dtype,
                self.options.sink,
                self.options.window,
            )
        order_pipeline()
        self.prompts = self._prompt_kernel()
        self.reductions = ModelReductions.of(self.vllm_config, self.options)
        self.reductions.attach(self.layer_name, self)
        self._say()
        if current_platform.is_cuda():
            self._warm_up()

    def set_reduction(self, reduction: MagnitudeReduction | None) -> None:
        """Use R (None: none) from now on. The cache must be empty."""
        self.reference = self.options.reference(
            reduction, self.scale, self.sliding_window, self.logits_soft_cap, self.dtype
        )
        transform = head_transform(self.num_kv_heads, self.head_size, reduction, self.options.hadamard)
        device = current_platform.device_type
        self.q_matrix, self.k_matrix = (
            (None, None)
            if transform is None
            else (m.to(device, torch.float32).contiguous() for m in (transform.q_matrix, transform.k_matrix))
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (T, Hq, D), key and value (T, Hkv, D), of which the step's tokens come first; output like
        query. Without metadata nothing is cached: vLLM measures memory, or R is being calibrated."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME}: quantizing the output is not supported")
        if attn_metadata is None:
            if self.reductions is not None and self.reductions.collecting:
                return self.reductions.collect(self, query, key, value, output)
            if self.prompts in _DENSE_COPIES:
                # So that vLLM leaves room for what a prompt's context takes while it is dense.
                tokens = dense_tokens(self.vllm_config)
                shape = _DENSE_COPIES[self.prompts], tokens, self.num_kv_heads, self.head_size
                torch.empty(shape, dtype=self.dtype, device=query.device)
            return output.zero_()
        source = self.kv_sharing_target_layer_name or self.layer_name
        full_metadata, _, full, _ = get_attention_context(layer_beside(source))
        packed = kv_cache.view(torch.uint8)
        layout = PageLayout(packed.shape[2], self.head_size, self.options.v_group)
        step = Step(
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            attn_metadata.block_table,
            full_metadata.block_table,
            attn_metadata.slot_mapping,
            full_metadata.slot_mapping,
            attn_metadata.max_query_len,
        )
        full = full.view(self.dtype)
        prompts = attn_metadata.prompts
        writes = self.kv_sharing_target_layer_name is None and key is not None
        if writes and prompts is None:
            paged_attention.write_and_attend(
                query, key, value, packed, full, layout, step, self.q_matrix, self.k_matrix, self.reference,
                output,
            )  # fmt: skip
            return output
        if writes:
            paged_attention.write(packed, full, layout, step, key, value, self.k_matrix, self.reference)
        if prompts is None:
            paged_attention.attention(query, packed, full, layout, step, self.q_matrix, self.reference, output)
            return output
        if prompts.first:
            paged_attention.attention(
                query[: prompts.first_query], packed, full, layout, step.part(slice(0, prompts.first), 1),
                self.q_matrix, self.reference, output[: prompts.first_query],
            )  # fmt: skip
        if prompts.groups is None or key is None or self.prompts not in _DENSE_COPIES:
            rest = replace(
                step.part(slice(prompts.first, len(step.seq_lens)), step.max_query_len),
                query_start_loc=prompts.query_start_loc,
            )
            paged_attention.attention(
                query[prompts.first_query :], packed, full, layout, rest, self.q_matrix, self.reference,
                output[prompts.first_query :],
            )  # fmt: skip
        else:
            for group in prompts.groups:
                attention_prefill.attend(
                    query, key, value, packed, full, layout, step, group, self.q_matrix, self.reference, output,
                    self._flash_attention,
                )  # fmt: skip
        return output

    def _flash_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        group: Group,
        options: AttentionOptions,
    ) -> None:
        attend, version = flash_attention(self.head_size)
        attend(
            q, k, v, group.max_query_len, group.query_start_loc, group.max_seq_len,
            cu_seqlens_k=group.k_start_loc, softmax_scale=self.scale, causal=True,
            window_size=None if options.sliding_window is None else [options.sliding_window - 1, 0],
            softcap=options.logits_soft_cap or 0.0, out=output, fa_version=version,
        )  # fmt: skip

    @property
    def _layout(self) -> PageLayout:
        return PageLayout(self.vllm_config.cache_config.block_size, self.head_size, self.options.v_group)

    def _prompt_kernel(self) -> str:
        """Which kernel attends to prompts that are not short: ``flash``, ``tiles``, or that of short ones."""
        if not current_platform.is_cuda():
            return "torch"
        if self.reference.own_chunk:
            return "flash"
        device = torch.device("cuda", torch.cuda.current_device())
        if cuda_prompt_attention.unsupported(self._layout, self.reference, device) is None:
            return "tiles"
        return paged_attention.kernel_for(self._layout, self.reference, 2, device)

    def _kernels(self) -> str:
        """Which kernels run, and why."""
        if not current_platform.is_cuda():
            return "torch"
        device = torch.device("cuda", torch.cuda.current_device())
        if paged_attention.kernel_for(self._layout, self.reference, 1, device) == "fp4":
            return "FP4 tensor cores by Triton, which was compiled but never run on such a GPU"
        reason = cuda_paged_decode.unsupported(self._layout, self.reference, device)
        decode = "CUDA kernel" if reason is None else f"Triton (not CUDA: {reason})"
        if self.prompts == "flash":
            prompts = f"FlashAttention {flash_attention(self.head_size)[1]} on gathered keys and values"
        elif self.prompts == "tiles":
            prompts = "CUDA kernel (as stored)"
        else:
            reason = cuda_prompt_attention.unsupported(self._layout, self.reference, device)
            prompts = f"Triton (as stored; not CUDA: {reason})"
        return f"decode: {decode}, prompts: {prompts}"

    def _warm_up(self) -> None:
        """Compile what the layer needs, once for all layers like it."""
        key = (
            self._layout, self.num_heads, self.num_kv_heads, self.dtype, self.options, self.sliding_window,
            self.logits_soft_cap, self.scale, self.prompts,
        )  # fmt: skip
        if key in _warm:
            return
        _warm.add(key)
        start = time.perf_counter()
        attention_warmup.warm_up(
            self._layout, self.num_heads, self.num_kv_heads, self.q_matrix, self.k_matrix, self.reference,
            self.dtype, self.prompts in _DENSE_COPIES, self._flash_attention,
            torch.device("cuda", torch.cuda.current_device()),
        )  # fmt: skip
        logger.info("%s: kernels ready after %.1f s", NAME, time.perf_counter() - start)

    def _say(self) -> None:
        options, block = self.options, self.vllm_config.cache_config.block_size // RATIO
        tokens = (-(-options.sink // block) + -(-(options.window + block - 1) // block)) * block
        size = tokens * 2 * self.head_size * self.num_kv_heads * self.dtype.itemsize / 1024
        logger.info_once(
            "%s: %s; %s; sink of %d and newest %d tokens in %s, at most %d tokens and %.0f KiB a "
            "decoding request and layer",
            NAME,
            self._kernels(),
            options,
            options.sink,
            options.recent,
            str(self.dtype).removeprefix("torch."),
            tokens,
            size,
        )
