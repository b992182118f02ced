"""R of all attention layers of one engine: found in a file, or calibrated where that is asked for.

It is calibrated before the first forward pass of the model (vLLM's memory profiling, or the first request):
token ids, of a text or random ones, are run through the model in full precision, each layer adds up the
second moments of its queries and keys, and the result is written to a file. Nothing is calibrated unless
asked for, because only R from text has been seen to gain anything over H alone (README.md has the figures).

Tensor-parallel ranks run the same ids at the same time and share the moments of their heads; rank 0 writes
the file. A layer that such a pass does not reach, as a drafter's, is left with H alone, as the log says.
"""

import inspect
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_forward_pre_hook

from vllm_scalesearch import reduction_files
from vllm_scalesearch.attention_options import CacheOptions
from vllm_scalesearch.attention_reference import UNQUANTIZED, attention
from vllm_scalesearch.transforms import MagnitudeReduction, SecondMoments, magnitude_reduction
from vllm_scalesearch.vllm_api import (
    VllmConfig,
    get_pp_group,
    get_tp_group,
    init_logger,
    set_forward_context,
)

if TYPE_CHECKING:
    from vllm_scalesearch.attention import ScaleSearchAttentionImpl

TOKENS = 4096
LENGTH = 512
# Where `ModelReductions` is kept for the layers of one engine.
_KEY = "scalesearch.reductions"

logger = init_logger("vllm.scalesearch.reductions")


class ModelReductions:
    """R of one engine's layers, on this rank.

    collecting: whether a calibration pass is running, in which layers call `collect`.
    """

    @classmethod
    def of(cls, vllm_config: VllmConfig, options: CacheOptions) -> "ModelReductions":
        """The engine's only one."""
        context = vllm_config.compilation_config.static_forward_context
        if _KEY not in context:
            context[_KEY] = cls(vllm_config, options)
        return context[_KEY]

    def __init__(self, vllm_config: VllmConfig, options: CacheOptions) -> None:
        self.vllm_config, self.options = vllm_config, options
        self.collecting = False
        self._waiting: dict[str, ScaleSearchAttentionImpl] = {}
        self._moments: dict[str, SecondMoments] = {}
        self._hook: Any = None
        model = vllm_config.model_config
        self._cached = reduction_files.cached_file(
            model.model, model.revision, model.hf_config.to_json_string(use_diff=False)
        )

    def attach(self, name: str, impl: "ScaleSearchAttentionImpl") -> None:
        """Give a layer its R, now or when it is calibrated."""
        if self.options.r == "none":
            return
        file = self._file()
        if file is not None:
            first = self._heads(impl).start
            reduction, source = reduction_files.load(file, name, first, impl.num_kv_heads, impl.head_size)
            logger.info_once("scalesearch: R from %s (%s)", file, source)
            self._use(name, impl, reduction)
            return
        if self.options.r == "auto" and self.options.calibration_tokens is None:
            logger.info_once(
                "scalesearch: no R for this model, H alone; `vllm-scalesearch calibrate-attention %s "
                "--text FILE` writes one",
                self.vllm_config.model_config.model,
            )
            return
        if get_pp_group().world_size > 1:
            raise NotImplementedError(
                "scalesearch: R cannot be calibrated under pipeline parallelism; run `vllm-scalesearch "
                f"calibrate-attention {self.vllm_config.model_config.model}` once instead"
            )
        self._waiting[name] = impl
        if self._hook is None:
            self._hook = register_module_forward_pre_hook(self._before_forward)

    def collect(
        self,
        impl: "ScaleSearchAttentionImpl",
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Add one sequence's q (T, Hq, D) and k (T, Hkv, D) to the layer's moments, and attend to it in full
        precision."""
        if k is None or v is None:
            raise NotImplementedError(
                "scalesearch: R cannot be calibrated for a layer that uses another's keys; set option 'r' to "
                "'none'"
            )
        name = impl.layer_name
        if name in self._waiting:
            if name not in self._moments:
                self._moments[name] = SecondMoments(impl.num_kv_heads, impl.head_size, q.device)
            self._moments[name].add(q, k)
        exact = replace(
            UNQUANTIZED,
            softmax_scale=impl.scale,
            sliding_window=impl.sliding_window,
            logits_soft_cap=impl.logits_soft_cap,
        )
        return output.copy_(attention(q, k, v, exact, torch.float32))

    def _file(self) -> Path | None:
        """The file to read R from, or None where it is to be calibrated."""
        if self.options.calibration_tokens is not None:
            return None
        if self.options.r_file is not None:
            return self.options.r_file
        beside = Path(self.vllm_config.model_config.model) / reduction_files.FILE_NAME
        return next((file for file in (beside, self._cached) if file.is_file()), None)

    def _before_forward(self, module: torch.nn.Module, arguments: Any) -> None:
        """Calibrate before the model's first forward pass: the first module called that takes token ids."""
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" not in parameters or "positions" not in parameters:
            return
        self._hook.remove()
        self.calibrate(module)

    @torch.inference_mode()
    def calibrate(self, model: torch.nn.Module) -> None:
        """Run token ids through `model` and set R of every layer that waits for one."""
        begin = time.perf_counter()
        sequences, source = self._sequences()
        device = next(model.parameters()).device
        self.collecting = True
        try:
            for ids in sequences:
                positions = torch.arange(len(ids), device=device)
                if self.vllm_config.model_config.uses_mrope:
                    positions = positions.expand(3, -1)
                with set_forward_context(None, self.vllm_config, num_tokens=len(ids), skip_compiled=True):
                    model(
                        input_ids=ids.to(device, torch.int32),
                        positions=positions,
                        intermediate_tensors=None,
                        inputs_embeds=None,
                    )
        finally:
            self.collecting = False
        whole = self._reductions()
        file = self.options.r_file or self._cached
        if not get_tp_group().rank_in_group:
            reduction_files.save(file, whole, source)
        for name, impl in self._waiting.items():
            mine = self._heads(impl)
            self._use(name, impl, _part(whole[name], mine) if name in whole else None)
        self._waiting, self._moments = {}, {}
        logger.info(
            "scalesearch: R calibrated from %s in %.1f s, kept in %s",
            source,
            time.perf_counter() - begin,
            file,
        )

    def _sequences(self) -> tuple[list[torch.Tensor], str]:
        """Token ids, each (T,) on the CPU, and in words where they are from."""
        if self.options.calibration_tokens is not None:
            with safe_open(self.options.calibration_tokens, "pt") as file:
                ids, source = file.get_tensor("tokens"), file.metadata()["source"]
        else:
            model = self.vllm_config.model_config
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, model.get_vocab_size(), (TOKENS,), generator=generator)
            source = f"{TOKENS} random tokens"
        length = min(LENGTH, self.vllm_config.model_config.max_model_len)
        return list(ids.split(length)), source

    def _reductions(self) -> dict[str, MagnitudeReduction]:
        """R of all KV heads of each layer, from the moments of all ranks, the same on each of them."""
        group = get_tp_group()
        mine = {
            name: (self._heads(self._waiting[name]).start, moments.q.cpu(), moments.k.cpu())
            for name, moments in self._moments.items()
        }
        ranks = [mine]
        if group.world_size > 1:
            ranks = [None] * group.world_size
            torch.distributed.all_gather_object(ranks, mine, group.cpu_group)
        whole = {}
        for name in mine:
            q: dict[int, torch.Tensor] = {}
            k: dict[int, torch.Tensor] = {}
            for first, m_q, m_k in (rank[name] for rank in ranks):
                # Ranks that hold copies of a KV head have different query heads of its group.
                q[first] = q[first] + m_q if first in q else m_q
                k[first] = m_k
            order = sorted(q)
            whole[name] = magnitude_reduction(
                torch.cat([q[first] for first in order]), torch.cat([k[first] for first in order])
            )
        return whole

    def _heads(self, impl: "ScaleSearchAttentionImpl") -> slice:
        """This rank's KV heads among the model's."""
        group = get_tp_group()
        total = self.vllm_config.model_config.get_total_num_kv_heads()
        if total >= group.world_size:
            first = group.rank_in_group * impl.num_kv_heads
        else:
            first = group.rank_in_group // (group.world_size // total)
        return slice(first, first + impl.num_kv_heads)

    def _use(self, name: str, impl: "ScaleSearchAttentionImpl", reduction: MagnitudeReduction | None) -> None:
        if reduction is None:
            logger.info("scalesearch: no R for %s, H alone", name)
        elif reduction.fallback.any():
            logger.info("scalesearch: %s: %s", name, reduction)
        impl.set_reduction(reduction)


def _part(reduction: MagnitudeReduction, heads: slice) -> MagnitudeReduction:
    return MagnitudeReduction(**{f.name: getattr(reduction, f.name)[heads] for f in fields(MagnitudeReduction)})
