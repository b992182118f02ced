"""What each part of ScaleSearchAttention is worth: perplexity and KL divergence by the simulator.

    python benchmarks/attention_simulated.py --text wikitext-2/test.txt [--windows 16] [--length 2048]

A transformers model in fp32, with bf16 weights, whose attention is attention_reference.py's, on q, k and
v rounded to bf16. The row `bf16` quantizes nothing; beside the others stand the paired difference from it
with its standard error over tokens, and the mean KL divergence of the next-token distributions from it,
which tells apart what perplexity on a short text does not. `--calibration` is the text that R comes from;
without one, R comes from random token ids, as a user's does who calibrated nothing.

SmolLM2-135M-Instruct, the default, was rounded to another 4-bit grid before (smollm2.py); here only
attention is quantized, so the figures do not profit from it.
"""

import argparse
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import report
import torch
from perplexity import add_text_options, load_windows
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from vllm_scalesearch import attention_reference
from vllm_scalesearch.attention_reference import UNQUANTIZED, AttentionOptions, attention
from vllm_scalesearch.ops.quantize import quantize_weight
from vllm_scalesearch.transforms import MagnitudeReduction, SecondMoments, magnitude_reduction

ABSMAX = dict.fromkeys("qkvp", "absmax")
ALL_ON = AttentionOptions()
# A cache alone, every token quantized by itself.
KV = AttentionOptions(q=None, p=None, v_group="head_dim", recent=16)
# Each row: the options, and whether R is used.
ABLATION: dict[str, tuple[AttentionOptions, bool]] = {
    "bf16": (UNQUANTIZED, False),
    "all on": (ALL_ON, True),
    "without search (absmax everywhere)": (replace(ALL_ON, **ABSMAX), True),
    "without H": (replace(ALL_ON, hadamard=False), True),
    "without R": (ALL_ON, False),
    "without H and R": (replace(ALL_ON, hadamard=False), False),
    "without bf16 blocks": (replace(ALL_ON, sink=0, incomplete=False), True),
    "one-level P": (replace(ALL_ON, two_level_p=False), True),
    "P absmax": (replace(ALL_ON, p="absmax"), True),
    "P fast": (replace(ALL_ON, p="fast"), True),
    "P kept": (replace(ALL_ON, p=None), True),
    "Q absmax": (replace(ALL_ON, q="absmax"), True),
    "absmax, nothing else": (
        replace(ALL_ON, **ABSMAX, hadamard=False, sink=0, incomplete=False, two_level_p=False),
        False,
    ),
    "K and V only": (replace(ALL_ON, q=None, p=None), True),
    "K and V only, absmax": (replace(ALL_ON, q=None, p=None, k="absmax", v="absmax"), True),
    "all on, V along head_dim, 16 newest": (replace(ALL_ON, v_group="head_dim", recent=16), True),
    "K and V only, V along head_dim, 16 newest": (KV, True),
    "... absmax": (replace(KV, k="absmax", v="absmax"), True),
    "... fast": (replace(KV, k="fast", v="fast"), True),
    "... exact": (replace(KV, k="exact", v="exact"), True),
    "... V's tensor scale 1/16": (replace(KV, v_scale=1 / 16), True),
    "... without R": (KV, False),
    "... without H": (replace(KV, hadamard=False), True),
    "... without H and R": (replace(KV, hadamard=False), False),
    "... sink of 4": (replace(KV, sink=4), True),
    "... sink of 64": (replace(KV, sink=64), True),
    "... no sink": (replace(KV, sink=0), True),
    "... 1 newest": (replace(KV, recent=1), True),
    "... 32 newest": (replace(KV, recent=32), True),
    "... 64 newest": (replace(KV, recent=64), True),
    "... 128 newest": (replace(KV, recent=128), True),
}


class Simulated:
    """A transformers model whose attention runs through `attend`, which the caller may exchange.

    attend(layer, q, k, v, softmax_scale): q (T, B*Hq, D), k and v (T, B*Hkv, D) of B windows, fp32 that
    bf16 holds; returns (T, B*Hq, D).
    """

    def __init__(self, model: Path, device: str = "cpu") -> None:
        AttentionInterface.register("scalesearch_simulated", self._forward)
        self.network = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="scalesearch_simulated"
        ).eval().to(device)  # fmt: skip
        self.attend = None
        self.device = device

    @torch.no_grad()
    def logprobs(self, windows: list[list[int]]) -> torch.Tensor:
        """Log probabilities of what follows each token but the last: (windows, T - 1, vocabulary) fp32."""
        return self.network(torch.tensor(windows, device=self.device)).logits[:, :-1].log_softmax(-1)

    def _forward(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attention_mask: Any, scaling: float, **unused: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        # The windows of a batch are further heads, for attention knows one sequence only.
        q, k, v = (x.flatten(0, 1).transpose(0, 1).bfloat16().float() for x in (query, key, value))
        out = self.attend(module.layer_idx, q, k, v, scaling)
        return out.unflatten(1, query.shape[:2]).transpose(0, 1), None

    def quantize(self, options: AttentionOptions, reductions: list[MagnitudeReduction] | None) -> None:
        def attend(layer, q, k, v, scale):
            reduction = None if reductions is None else repeated(reductions[layer], k.shape[1])
            return attention(q, k, v, replace(options, reduction=reduction, softmax_scale=scale), torch.float32)

        self.attend = attend

    def calibrate(self, windows: list[list[int]]) -> list[MagnitudeReduction]:
        """R of each layer, from the queries and keys of `windows` in full precision."""
        config = self.network.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        moments = [SecondMoments(heads, dim) for _ in range(config.num_hidden_layers)]

        def attend(layer, q, k, v, scale):
            moments[layer].add(q.cpu(), k.cpu())
            return attention(q, k, v, replace(UNQUANTIZED, softmax_scale=scale), torch.float32)

        self.attend = attend
        for window in tqdm(windows, desc="calibration", leave=False):
            self.logprobs([window])
        return [magnitude_reduction(layer.q, layer.k) for layer in moments]


def repeated(reduction: MagnitudeReduction, heads: int) -> MagnitudeReduction:
    """`reduction` of every window's KV heads, `heads` in all."""
    times = heads // len(reduction.r)
    return MagnitudeReduction(
        **{f.name: getattr(reduction, f.name).repeat(times, *[1] * (getattr(reduction, f.name).ndim - 1))
           for f in fields(reduction)}
    )  # fmt: skip


def calibration_windows(args: argparse.Namespace, model: Path, vocabulary: int) -> list[list[int]]:
    """Windows of 512 token ids, of the text that was given or drawn at random with a fixed seed."""
    length, count = 512, -(-args.calibration_tokens // 512)
    if args.calibration is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    ids = AutoTokenizer.from_pretrained(model)(args.calibration.read_text()).input_ids
    if len(ids) < count * length:
        raise SystemExit(f"{args.calibration} has {len(ids)} tokens, fewer than {count * length}")
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def compare(
    simulated: Simulated,
    windows: list[list[int]],
    rows: list[str],
    reductions: list[MagnitudeReduction],
    batch: int,
) -> dict[str, dict[str, float]]:
    """Figures of each row of `ABLATION` in `rows`; bf16 comes first whether or not it is named."""
    losses: dict[str, list[torch.Tensor]] = {label: [] for label in dict.fromkeys(["bf16", *rows])}
    divergences: dict[str, list[torch.Tensor]] = {label: [] for label in losses}
    batches = [windows[i : i + batch] for i in range(0, len(windows), batch)]
    steps = tqdm(total=len(batches) * len(losses), leave=False)
    # Batch by batch, so that only one batch's distributions are held.
    for part in batches:
        target = torch.tensor(part, device=simulated.device)[:, 1:].unsqueeze(-1)
        for label in losses:
            options, use_r = ABLATION[label]
            simulated.quantize(options, reductions if use_r else None)
            steps.set_description(label)
            logprobs = simulated.logprobs(part)
            if label == "bf16":
                reference = logprobs
            losses[label].append(-logprobs.gather(-1, target).flatten().double().cpu())
            divergences[label].append(
                (reference.exp() * (reference - logprobs)).sum(-1).flatten().double().cpu()
            )
            steps.update()
    steps.close()
    base = torch.cat(losses["bf16"])
    results = {}
    for label in losses:
        loss, divergence = torch.cat(losses[label]), torch.cat(divergences[label])
        difference, count = loss - base, math.sqrt(len(loss))
        results[label] = {
            "perplexity": math.exp(loss.mean()),
            "tokens": len(loss),
            "nats_over_bf16": difference.mean().item(),
            "standard_error": (difference.std() / count).item(),
            "kl_nats": divergence.mean().item(),
            "kl_standard_error": (divergence.std() / count).item(),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    parser.add_argument("--calibration", type=Path, help="text that R comes from; default: random token ids")
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    parser.add_argument("--rows", nargs="+", choices=list(ABLATION), default=list(ABLATION))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--name", default="attention_simulated", help="of the file under results/")
    args = parser.parse_args()

    if args.device == "cuda":
        # The kernel has the reference's bits and takes a hundredth of its time.
        attention_reference.quantize = quantize_weight
    model, windows = load_windows(args)
    simulated = Simulated(model, args.device)
    vocabulary = simulated.network.config.vocab_size
    reductions = simulated.calibrate(calibration_windows(args, model, vocabulary))
    fallback = sum(int(r.fallback.sum()) for r in reductions)
    heads = sum(len(r.fallback) for r in reductions)
    condition = max(r.condition[~r.fallback].max().item() for r in reductions if not r.fallback.all())
    print(f"R for {heads - fallback} of {heads} KV heads, condition up to {condition:.0f}")

    results = compare(simulated, windows, args.rows, reductions, args.batch)
    print()
    report.table(
        ["", "perplexity", "over bf16", "KL from bf16, mnat"],
        [
            [
                label,
                f"{found['perplexity']:.3f}",
                f"{math.expm1(found['nats_over_bf16']):+.2%} +- {found['standard_error']:.2%}",
                f"{1e3 * found['kl_nats']:.2f} +- {1e3 * found['kl_standard_error']:.2f}",
            ]
            for label, found in results.items()
        ],
    )
    report.write(
        args.name,
        {
            "model": model.name,
            "text": args.text.name,
            "windows": args.windows,
            "length": args.length,
            "calibration": "random token ids" if args.calibration is None else args.calibration.name,
            "calibration_tokens": args.calibration_tokens,
            "kv_heads_without_r": fallback,
            "runs": results,
        },
    )


if __name__ == "__main__":
    main()
