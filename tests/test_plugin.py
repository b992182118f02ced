"""The plugin: what vLLM resolves the name to, in every process, and what needs no vLLM."""

import subprocess
import sys

import pytest

RESOLVE = """
import multiprocessing

def resolve(_=None):
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.model_executor.layers.quantization import get_quantization_config
    found = get_quantization_config("scalesearch")
    return f"{found.__module__}.{found.__qualname__}"

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(resolve(), pool.map(resolve, [0])[0])
"""


@pytest.mark.vllm
def test_name_resolves_to_our_class_here_and_in_a_spawned_process(tmp_path):
    script = tmp_path / "resolve.py"
    script.write_text(RESOLVE)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2:] == 2 * ["vllm_scalesearch.config.ScaleSearchConfig"]


@pytest.mark.vllm
def test_registering_again_changes_nothing():
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    from vllm_scalesearch.plugin import register

    register()
    first = get_quantization_config("scalesearch")
    register()
    assert get_quantization_config("scalesearch") is first
    assert QUANTIZATION_METHODS.count("scalesearch") == 1


def test_formats_search_options_and_ops_need_neither_vllm_nor_transformers():
    code = """
import sys
sys.modules["vllm"] = sys.modules["transformers"] = None
import torch
import vllm_scalesearch
from vllm_scalesearch import formats, options, search
from vllm_scalesearch.ops import packed_linear, quantize
quantized = search.quantize(torch.ones(2, 32))
print(quantized.dequantize().sum().item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(64)
