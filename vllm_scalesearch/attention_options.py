"""The typed options of attention backend SCALESEARCH: ``additional_config["scalesearch"]["attention"]``.

Every key and value is checked; nothing unknown is passed over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from vllm_scalesearch.attention_reference import V_GROUPS, AttentionOptions
from vllm_scalesearch.formats import NVFP4
from vllm_scalesearch.search import ScalePolicy
from vllm_scalesearch.transforms import MagnitudeReduction

OPERANDS = ("kv", "qkvp")
PREFILLS = ("auto", "stored", "full_precision")
SOURCE = "additional_config['scalesearch']['attention']"


@dataclass(frozen=True)
class CacheOptions:
    """How the cache and the attention over it are quantized.

    operands: ``kv``, what lies in the cache and nothing else; or ``qkvp``, the paper's whole algorithm.
    q, k, v, p: scale policy of each (`ScalePolicy`); those of q and p matter for ``qkvp`` only. P is quantized
        by its maximum unless asked, because a search of P's scales takes half of the speed and saves little
        (README.md).
    hadamard: multiply queries and keys by H.
    r: R of each KV head. ``auto``: from the model's file, H alone where there is none; ``random``: the same,
        but calibrated from random token ids where there is none; ``none``: no R; otherwise the path of a
        file that ``calibrate-attention`` wrote.
    v_group: ``head_dim`` or ``tokens``, the direction in which V's blocks lie. ``auto``: tokens on CUDA GPUs,
        whose decode kernel reads whole tiles of them, head_dim on the CPU.
    sink, recent: how many of the first and of the newest tokens are kept in 16 bits.
    two_level_p: give each row of P its own tensor scale.
    prefill: ``stored``: what a query sees depends on positions alone. ``full_precision``: all tokens of one
        chunk of a prompt see each other, and what is recent for the first of them, before quantization.
        ``auto``: full_precision on CUDA GPUs with ``kv``, since FlashAttention can take it, otherwise stored.
    v_scale: V's tensor scale, a power of two. K needs none: R and H give it a size of about one.
    calibration_tokens: for the command ``calibrate-attention``: a safetensors file with token ids (`tokens`,
        and their `source` in the metadata) to calibrate R from, whether or not there is an R. `r` is then
        the file to write, or ``auto`` for the one in the user's cache.
    Raises ValueError for values outside these.
    """

    operands: str = "kv"
    q: str = "paper"
    k: str = "paper"
    v: str = "paper"
    p: str = "absmax"
    hadamard: bool = True
    r: str = "auto"
    v_group: str = "auto"
    sink: int = 16
    recent: int = 64
    two_level_p: bool = True
    prefill: str = "auto"
    v_scale: float = 1 / 16
    calibration_tokens: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("operands", OPERANDS), ("v_group", ("auto", *V_GROUPS)), ("prefill", PREFILLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name!r} is one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("hadamard", "two_level_p"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name!r} is true or false, got {getattr(self, name)!r}")
        for name, least in (("sink", 0), ("recent", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name!r} is a count of tokens, {least} or more, got {value!r}")
        for name in ("q", "k", "v", "p"):
            try:
                ScalePolicy(getattr(self, name)).check_format(NVFP4)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        if not isinstance(self.r, str) or not self.r:
            raise ValueError(f"'r' is auto, random, none or a file, got {self.r!r}")
        if self.calibration_tokens is not None and self.r == "none":
            raise ValueError("'calibration_tokens' are there to calibrate R from, and 'r' is 'none'")
        scale = self.v_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 2.0**-100 <= scale <= 2.0**100:
            raise ValueError(f"'v_scale' is a power of two, got {scale!r}")
        if torch.frexp(torch.tensor(float(scale)))[0] != 0.5:
            raise ValueError(f"'v_scale' is a power of two, got {scale!r}")

    @classmethod
    def from_mapping(cls, mapping: Any) -> "CacheOptions":
        """Check and build options; `mapping` is None where the user gave none.

        Raises ValueError that names `SOURCE` for anything that is not an option.
        """
        if mapping is None:
            return cls()
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{SOURCE}: expected a mapping of options, got {mapping!r}")
        known = [f.name for f in fields(cls)]
        unknown = [key for key in mapping if key not in known]
        if unknown:
            raise ValueError(
                f"{SOURCE}: unknown option {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
            )
        try:
            return cls(**mapping)
        except ValueError as error:
            raise ValueError(f"{SOURCE}: {error}") from None

    def on(self, cuda: bool) -> "CacheOptions":
        """These options, with what is ``auto`` decided for CUDA GPUs or the CPU."""
        v_group = ("tokens" if cuda else "head_dim") if self.v_group == "auto" else self.v_group
        prefill = self.prefill
        if prefill == "auto":
            prefill = "full_precision" if cuda and self.operands == "kv" else "stored"
        return replace(self, v_group=v_group, prefill=prefill)

    @property
    def r_file(self) -> Path | None:
        """The file that `r` names, if it names one."""
        return None if self.r in ("auto", "random", "none") else Path(self.r)

    @property
    def window(self) -> int:
        """Newest tokens whose 16-bit copy some query may need: `recent`, and an incomplete tile of V.

        Of options that `on` has decided, like `reference`."""
        return self.recent + (15 if self.v_group == "tokens" else 0)

    def reference(
        self,
        reduction: MagnitudeReduction | None,
        softmax_scale: float,
        sliding_window: int | None,
        logits_soft_cap: float | None,
        dtype: torch.dtype,
    ) -> AttentionOptions:
        """The definition of one layer's attention (attention_reference.py); `dtype` is the model's."""
        whole = self.operands == "qkvp"
        return AttentionOptions(
            q=self.q if whole else None,
            k=self.k,
            v=self.v,
            p=self.p if whole else None,
            hadamard=self.hadamard,
            reduction=reduction,
            v_group=self.v_group,
            sink=self.sink,
            recent=self.recent,
            two_level_p=self.two_level_p,
            own_chunk=self.prefill == "full_precision",
            v_scale=self.v_scale,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            logits_soft_cap=logits_soft_cap,
            transform_dtype=dtype,
        )

    def __str__(self) -> str:
        policies = f"K {self.k}, V {self.v} along {self.v_group}"
        if self.operands == "qkvp":
            policies = f"Q {self.q}, {policies}, P {self.p}"
        return policies
