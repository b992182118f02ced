"""Quantization config `scalesearch`: what vLLM asks when it builds a model's layers."""

from collections.abc import Mapping
from typing import Any

import torch

from vllm_scalesearch.linear import FullPrecisionLinearMethod, ScaleSearchLinearMethod
from vllm_scalesearch.moe import expert_names, experts_method
from vllm_scalesearch.options import QUANT_METHOD, LayerOptions, LayerSelection, Options
from vllm_scalesearch.vllm_api import (
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    ReplicatedLinear,
    RoutedExperts,
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    current_platform,
    get_current_vllm_config,
    get_pp_group,
    init_logger,
    order_pipeline,
)

# Not `__name__`: vLLM configures the handlers of its own logger names only.
logger = init_logger("vllm.scalesearch.config")

_ROUTERS = ("gate", "router", "shared_expert_gate")


class ScaleSearchConfig(QuantizationConfig):
    """Quantizes a bf16 or fp16 checkpoint while vLLM loads it (options.py says how).

    checkpoint_options: the options in a checkpoint's `quantization_config`, if any. Those given by
    the user in ``additional_config["scalesearch"]`` are laid over them, key by key.
    """

    def __init__(self, checkpoint_options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.checkpoint_options = dict(checkpoint_options or {})
        Options.from_mapping(self.checkpoint_options, "quantization_config")
        self._selection: LayerSelection | None = None
        self._model_checked = False
        self._has_head = False

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ScaleSearchConfig":
        """From a checkpoint's `quantization_config`. Raises ValueError for an unknown option."""
        return cls({key: value for key, value in config.items() if key != "quant_method"})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Refuse, in words, to quantize a checkpoint that is quantized already."""
        found = hf_quant_cfg.get("quant_method")
        if user_quant == QUANT_METHOD and found != QUANT_METHOD:
            raise ValueError(
                f"scalesearch: this checkpoint is already quantized ({found}). Serve it without "
                "--quantization, or quantize the bf16 checkpoint that it was made from"
            )
        return None

    @property
    def options(self) -> Options:
        return self._select().options

    def _select(self) -> LayerSelection:
        if self._selection is None:
            additional = get_current_vllm_config().additional_config
            user = additional.get(QUANT_METHOD, {}) if isinstance(additional, Mapping) else {}
            source = f"additional_config[{QUANT_METHOD!r}]"
            Options.from_mapping(user, source)
            options = Options.from_mapping({**self.checkpoint_options, **user}, "scalesearch")
            self._selection = LayerSelection(options)
        return self._selection

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """The method of one layer; None where vLLM's own is meant (attention, embeddings)."""
        if isinstance(layer, LinearBase):
            chosen = self._select().select(prefix, self._checkpoint_names(prefix))
            if chosen is None or _is_router(layer, prefix):
                return FullPrecisionLinearMethod(self.check_model)
            return self._method(chosen, prefix)
        if isinstance(layer, ParallelLMHead) and self.options.lm_head:
            self._has_head = True
            chosen = self._select().select(prefix, [prefix])
            if chosen is None:
                return UnquantizedEmbeddingMethod()
            return self._method(chosen, prefix)
        if isinstance(layer, RoutedExperts):
            chosen = self._select().select_experts(prefix, *expert_names(layer, prefix))
            if chosen is None:
                return UnquantizedFusedMoEMethod(layer.moe_config)
            return experts_method(chosen, layer, prefix, self.options.cpu_storage, self.check_model)
        return None

    def _method(self, chosen: LayerOptions, prefix: str) -> ScaleSearchLinearMethod:
        return ScaleSearchLinearMethod(chosen, prefix, self.options.cpu_storage, self.check_model)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """Checkpoint names of the matrices that vLLM fuses into the layer called `prefix`."""
        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        return [f"{parent}.{part}" if parent else part for part in parts]

    def check_model(self) -> None:
        """Raise ValueError for patterns that no layer of the built model matched.

        Called by every layer once its weights are there, when all layers are known; works once.
        Under pipeline parallelism a rank has some of the layers, so the ranks first share their names.
        """
        if self._model_checked:
            return
        self._model_checked = True
        selection = self._select()
        found = [(selection.matched, selection.seen, self._has_head)]
        group = get_pp_group()
        if group.world_size > 1:
            order_pipeline()
            mine = found[0]
            found = [None] * group.world_size
            torch.distributed.all_gather_object(found, mine, group.cpu_group)
        matched = set().union(*(rank[0] for rank in found))
        selection.check_all_matched(matched, [name for rank in found for name in rank[1]])
        if selection.options.lm_head and not any(rank[2] for rank in found):
            raise ValueError("scalesearch: 'lm_head' is set, but this model has no output head of its own")
        device = current_platform.device_name or current_platform.device_type
        logger.info_once("scalesearch on %s: %s", device, selection.options.layer)


def _is_router(layer: torch.nn.Module, prefix: str) -> bool:
    """Whether a layer chooses experts: few weights, and each error may send a token elsewhere."""
    return isinstance(layer, ReplicatedLinear) and prefix.rpartition(".")[2] in _ROUTERS


__all__ = ["ScaleSearchConfig"]
