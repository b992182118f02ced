"""The W4A16 rows of perplexity.py without vLLM, for either way to share tensor scales.

    python benchmarks/perplexity_simulated.py --text wikitext-2/test.txt [--windows 8] [--length 1024]

A transformers model in fp32 whose weights were replaced by what the reference quantizes them to. With
a tensor scale a fused layer it must agree with perplexity.py; with one a matrix it shows how far the
same method moves when nothing but the tensor scales changes.
"""

import argparse
import math

import report
import torch
from fake_quant import FUSED, SEPARATE, fake_quantized, token_logprobs
from perplexity import add_text_options, load_windows
from tqdm import tqdm

GROUPS = {"a fused layer": FUSED, "a matrix": SEPARATE}
POLICIES = ("absmax", "paper")


def perplexity(network: torch.nn.Module, windows: list[list[int]], label: str) -> float:
    logprobs = [
        token_logprobs(network, [window]).flatten() for window in tqdm(windows, desc=label, leave=False)
    ]
    return math.exp(-torch.cat(logprobs).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser)
    args = parser.parse_args()
    model, windows = load_windows(args)
    base = perplexity(fake_quantized(model, weights=None), windows, "fp32")
    results = {"fp32": base}
    rows = [["unquantized", "", f"{base:.2f}", ""]]
    for label, groups in GROUPS.items():
        for policy in POLICIES:
            found = perplexity(
                fake_quantized(model, weights=policy, groups=groups), windows, f"{policy}, {label}"
            )
            results[f"{policy}, tensor scale {label}"] = found
            rows.append([policy, label, f"{found:.2f}", f"{found / base - 1:+.1%}"])
    report.table(["W4A16", "a tensor scale for", "perplexity", "over unquantized"], rows)
    report.write("perplexity_simulated", results)


if __name__ == "__main__":
    main()
