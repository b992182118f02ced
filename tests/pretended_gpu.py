"""Which product a linear layer takes on a GPU that is not there: behind the fixtures `on_gpu` and `said`."""

import contextlib
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels import linear as linear_kernels
from vllm.model_executor.kernels.linear.nvfp4 import flashinfer
from vllm.model_executor.kernels.linear.nvfp4.marlin import MarlinNvFp4LinearKernel
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from vllm_scalesearch import linear
from vllm_scalesearch.options import LayerOptions

W4A4 = LayerOptions("nvfp4", "paper", "paper")


@contextlib.contextmanager
def pretending(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``pretend((10, 0), ...)``: vLLM takes this machine for one with that GPU.

    with_flashinfer: it is installed. with_cutlass: vLLM was built with its own FP4 GEMM.
    """
    contexts = []

    def pretend(
        capability: tuple[int, int],
        with_flashinfer: bool = False,
        with_cutlass: bool = True,
        linear_backend: str = "auto",
    ) -> None:
        config = VllmConfig()
        config.kernel_config.linear_backend = linear_backend
        contexts.append(set_current_vllm_config(config))
        contexts[-1].__enter__()
        platform, found = type(current_platform), DeviceCapability(*capability)
        monkeypatch.setattr(platform, "_enum", PlatformEnum.CUDA)
        monkeypatch.setattr(platform, "get_device_capability", classmethod(lambda cls, device_id=0: found))
        # What the plugin has put there for the CPU (cpu_nvfp4.py), where such a GPU would not.
        monkeypatch.setattr(linear_kernels, "MarlinNvFp4LinearKernel", MarlinNvFp4LinearKernel)
        monkeypatch.setattr(flashinfer, "has_flashinfer", lambda: with_flashinfer)
        monkeypatch.setattr(
            "vllm.model_executor.layers.quantization.utils.nvfp4_utils.cutlass_scaled_mm_supports_fp4",
            lambda capability: with_cutlass and capability >= 100,
        )

    try:
        yield pretend
    finally:
        while contexts:
            contexts.pop().__exit__(None, None, None)


def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What linear.py logs at INFO, also what it has logged once before."""
    lines = []
    logger = types.SimpleNamespace(info_once=lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(linear, "logger", logger)
    return lines


def choose(options: LayerOptions) -> linear._Product:
    layer = torch.nn.Module()
    return linear._product("dense", options, f"a.layer.{id(layer)}", layer)
