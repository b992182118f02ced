"""Run by split_engines.py as its own process: what a split engine holds and says.

    python parallel_run.py ARGUMENTS.json OUT.pt

ARGUMENTS holds the keyword arguments of `LLM`; under "prompts" token ids of one length (without any, the model
is only loaded); under "continued" token ids of any lengths, and under "tokens" how many to generate after each.

OUT holds, in a list by rank: "quantized", what the quantizers gave for each layer (`Kept`); "r", R of each
attention layer that has one; on the CPU "stored", what `layers.stored` finds. Besides, "logprobs" of the
prompts, and "texts", of each generated token its id and the log probabilities of the two likeliest.
"""

import functools
import io
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import layers
import torch
from conftest import prompt_logprobs

_quantized: dict[str, tuple[torch.Tensor, ...]] = {}


class Kept:
    """Mixed into the workers. By then `_keep_what_is_quantized` has run in each worker's process.

    Codes are kept as they leave the quantizer: on a GPU they are repacked for vLLM's kernel after that, and
    Marlin multiplies a matrix's scales by a power of two that depends on which of its rows are there.
    """

    def kept(self) -> bytes:
        """This rank's "quantized" and "r", as `torch.save` writes them.

        quantized: by layer, packed codes (N, K / 2), block scales and tensor scale; of experts
        ``NAME.w13`` and ``NAME.w2``, all three with a dimension for experts in front. r: (KV heads, D, D).
        """
        context = self.vllm_config.compilation_config.static_forward_context
        r = {}
        for layer in context.values():
            reference = getattr(getattr(layer, "impl", None), "reference", None)
            if reference is not None and reference.reduction is not None:
                r[layer.impl.layer_name] = reference.reduction.r.cpu()
        buffer = io.BytesIO()
        torch.save({"quantized": _quantized, "r": r}, buffer)
        return buffer.getvalue()


def _keeping(quantize: Callable) -> Callable:
    @functools.wraps(quantize)
    def keep(self, layer: torch.nn.Module, *part: Any):
        found = quantize(self, layer, *part)
        name = ".".join((self.prefix, *part[:1]))  # experts say which of their two matrices it is
        _quantized[name] = tuple(t.cpu().clone() for t in (found.packed, found.scales, found.tensor_scale))
        return found

    return keep


def _keep_what_is_quantized() -> None:
    from vllm_scalesearch.linear import ScaleSearchLinearMethod
    from vllm_scalesearch.moe_method import ScaleSearchMoEMethod

    for method in (ScaleSearchLinearMethod, ScaleSearchMoEMethod):
        method._quantize = _keeping(method._quantize)


def generated(llm: Any, prompts: list[list[int]], tokens: int) -> list[list[tuple[int, dict[int, float]]]]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [
        [
            (token, {other: found.logprob for other, found in likeliest.items()})
            for token, likeliest in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
        ]
        for o in outputs
    ]


def main() -> None:
    from vllm import LLM

    with open(sys.argv[1]) as file:
        arguments = json.load(file)
    prompts, continued = arguments.pop("prompts"), arguments.pop("continued", [])
    tokens = arguments.pop("tokens", 0)
    defaults = {"enforce_eager": True, "max_model_len": 256, "skip_tokenizer_init": True}
    llm = LLM(**{**defaults, "worker_extension_cls": "parallel_run.Kept", **arguments})
    ranks = [torch.load(io.BytesIO(rank)) for rank in llm.collective_rpc("kept")]
    out: dict[str, Any] = {part: [rank[part] for rank in ranks] for part in ("quantized", "r")}
    if not torch.cuda.is_available():
        out["stored"] = [torch.load(io.BytesIO(rank)) for rank in llm.apply_model(layers.stored)]
    out["logprobs"] = prompt_logprobs(llm, prompts) if prompts else None
    out["texts"] = generated(llm, continued, tokens) if continued else None
    llm.llm_engine.engine_core.shutdown()
    torch.save(out, f"{sys.argv[2]}.partial")
    os.rename(f"{sys.argv[2]}.partial", sys.argv[2])


if __name__ == "__main__":
    main()
elif __name__ == "parallel_run":  # a worker looks up `Kept`, before it loads the model
    _keep_what_is_quantized()
