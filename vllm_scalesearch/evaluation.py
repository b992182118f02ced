"""Perplexity through vLLM, and what a run lost against a reference run of the same text.

A text is tokenized as a whole and cut into windows that share nothing; the first token of each is not
scored. Perplexity over a short text does not tell methods apart that lose little, so two runs are compared
token by token: the mean difference of the losses with its standard error, and the KL divergence of the
distributions, over the likeliest tokens that vLLM returns for both, with all others as one. That is a lower
bound of the whole divergence. Standard errors take tokens as independent; they are those of the text, and do
not count that a model quantized a little differently rounds differently.

A prompt that is prefilled in one piece attends to its own keys and values before they are in the cache. A
quantized cache is judged with a `chunk`: prompts are then prefilled that many tokens at a time, and all
before the chunk is read back from the cache.
"""

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# As many as the file of a reference keeps; the rest of the mass is one more outcome.
TOP = 64
# Set by `score` itself, so that windows run one at a time and in the chunks that are asked for.
OWN_OPTIONS = ("max_num_batched_tokens", "max_num_seqs", "max_logprobs", "enable_prefix_caching")
_FORMAT = "vllm-scalesearch scores 1"
# Tokens compared at once: each takes TOP * TOP comparisons.
_COMPARED = 2048


@dataclass(frozen=True)
class Scores:
    """What one run gave for the N scored tokens of its windows.

    losses: (N,) fp64, negative log probabilities in nats.
    ids: (N, T) int32, the T likeliest tokens, likeliest first; T may be 0.
    logprobs: (N, T) fp32, their log probabilities.
    text: fingerprint of the windows, which runs that are compared share.
    seconds: wall time of the engine at work, without its start. Log probabilities of whole prompts take
        a good part of it.
    """

    losses: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    text: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens a second."""
        return len(self.losses) / self.seconds

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())

    def save(self, path: Path) -> None:
        """Write the scores as safetensors, whole or not at all. Raises OSError, as writing does."""
        tensors = {"losses": self.losses, "ids": self.ids, "logprobs": self.logprobs}
        about = {"format": _FORMAT, "text": self.text, "seconds": repr(self.seconds)}
        partial = path.with_name(f"{path.name}.partial")
        try:
            save_file(tensors, partial, about)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read what `save` wrote. Raises ValueError for any other file, FileNotFoundError for none."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no scores; expected what --save-scores wrote")
                tensors = {name: file.get_tensor(name) for name in ("losses", "ids", "logprobs")}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as scores ({error}); write it again") from None
        return cls(**tensors, text=about["text"], seconds=float(about["seconds"]))


def windows_of(ids: list[int], length: int, count: int | None = None) -> list[list[int]]:
    """The first `count` windows of `length` token ids; without `count`, all that are complete.

    Raises ValueError for a text that is too short.
    """
    if length < 2:
        raise ValueError(f"windows of {length} tokens: the first is not scored, so 2 are the least")
    complete = len(ids) // length
    wanted = complete if count is None else count
    if wanted < 1 or wanted > complete:
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than {max(1, wanted)} windows of {length}; "
            "ask for fewer or shorter windows, or give a longer text"
        )
    return [ids[i * length : (i + 1) * length] for i in range(wanted)]


def fingerprint(windows: list[list[int]]) -> str:
    """A text that is the same for the same windows of token ids."""
    return hashlib.sha256(json.dumps(windows).encode()).hexdigest()[:16]


def score(
    model: str | Path,
    engine: dict[str, Any],
    windows: list[list[int]],
    *,
    chunk: int | None = None,
    top: int = TOP,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Run a model over windows in a vLLM engine of its own, which is gone afterwards.

    engine: arguments of vLLM's `LLM`, in its own names; none of `OWN_OPTIONS`.
    windows: lists of token ids, all of one length.
    chunk: how many tokens are prefilled at a time; None for whole windows.
    top: how many of the likeliest tokens to keep; 0 for none.
    progress: called after each window with its number of scored tokens.
    Raises ValueError for an option of `OWN_OPTIONS` or a chunk below 1, and whatever vLLM raises.
    """
    from vllm import LLM, SamplingParams

    taken = [name for name in OWN_OPTIONS if name in engine]
    if taken:
        raise ValueError(f"{', '.join(taken)}: set by the evaluation, through its chunk; leave it out")
    length = len(windows[0])
    if chunk is not None and chunk < 1:
        raise ValueError(f"a chunk of {chunk} tokens: expected 1 or more")
    arguments = {"max_model_len": length + 1, "disable_log_stats": True, **engine}
    llm = LLM(
        str(model),
        max_num_batched_tokens=min(chunk or length, length),
        max_num_seqs=1,
        max_logprobs=max(1, top),
        enable_prefix_caching=False,
        **arguments,
    )
    params = SamplingParams(max_tokens=1, prompt_logprobs=top, detokenize=False, flat_logprobs=True)
    found, seconds = [], 0.0
    try:
        for window in windows:
            start = time.perf_counter()
            (output,) = llm.generate([{"prompt_token_ids": window}], params, use_tqdm=False)
            seconds += time.perf_counter() - start
            # Of each token but the first: itself, then the likeliest; it may be among them as well.
            flat = output.prompt_logprobs
            ids = torch.tensor(flat.token_ids, dtype=torch.int32).view(length - 1, top + 1)
            logprobs = torch.tensor(flat.logprobs, dtype=torch.float32).view(length - 1, top + 1)
            found.append((logprobs[:, 0].double().neg(), ids[:, 1:].clone(), logprobs[:, 1:].clone()))
            if progress is not None:
                progress(length - 1)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    losses, ids, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Scores(losses, ids, logprobs, fingerprint(windows), seconds)


def divergence(reference: Scores, found: Scores) -> torch.Tensor:
    """KL divergence of each token's distribution from the reference's, (N,) fp64, in nats.

    Over the tokens that both keep, with all others as one outcome. Raises ValueError when either keeps
    none, or for scores of different texts.
    """
    _check_same_text(reference, found)
    if not reference.ids.shape[1] or not found.ids.shape[1]:
        raise ValueError("a run kept no likeliest tokens, so there is no KL divergence; score it with top > 0")
    result = []
    for start in range(0, len(reference.losses), _COMPARED):
        part = slice(start, start + _COMPARED)
        same = reference.ids[part].unsqueeze(2) == found.ids[part].unsqueeze(1)  # (n, T, T')
        common = same.any(2)
        p_log = reference.logprobs[part].double()
        # A sum with one term, or none: zeros where it is not the same token, also for -inf.
        q_log = found.logprobs[part].double().unsqueeze(1).masked_fill(~same, 0).sum(2)
        p = p_log.exp() * common
        terms = torch.where(p > 0, p * (p_log - q_log), 0).sum(1)
        p_rest = (1 - p.sum(1)).clamp(min=1e-9)
        q_rest = (1 - (q_log.exp() * common).sum(1)).clamp(min=1e-9)
        result.append(terms + p_rest * (p_rest / q_rest).log())
    return torch.cat(result)


def compare(reference: Scores, found: Scores) -> dict[str, float]:
    """What `found` lost against `reference`, as means over tokens with their standard errors.

    Keys: nats, nats_error (difference of the losses); kl, kl_error where both keep likeliest tokens. All in
    nats. Raises ValueError for scores of different texts.
    """
    _check_same_text(reference, found)
    result = dict(zip(("nats", "nats_error"), _mean(found.losses - reference.losses), strict=True))
    if reference.ids.shape[1] and found.ids.shape[1]:
        result |= dict(zip(("kl", "kl_error"), _mean(divergence(reference, found)), strict=True))
    return result


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def _check_same_text(reference: Scores, found: Scores) -> None:
    if reference.text != found.text:
        raise ValueError(
            f"runs over different windows of tokens do not compare ({len(reference.losses)} and "
            f"{len(found.losses)} tokens); use the same text, tokenizer, length and number of windows"
        )
