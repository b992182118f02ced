"""vLLM's CPU platform, which also runs attention backend SCALESEARCH when it is asked to.

vLLM's own replaces every backend that it does not know by CPU_ATTN, with one line in the log; with a 4-bit
cache that gives wrong text. This one differs in exactly that case. It takes its two names from vLLM itself,
for vllm_api.py needs the platform that is being chosen here.
"""

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.cpu import CpuPlatform

from vllm_scalesearch.options import ATTENTION_BACKEND


def platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: this platform where vLLM would take its own for CPUs."""
    return f"{__name__}.ScaleSearchCpuPlatform" if cpu_platform_plugin() is not None else None


class ScaleSearchCpuPlatform(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        super().check_and_update_config(vllm_config)
        if not _selected(vllm_config.attention_config.backend):
            return
        from vllm_scalesearch.attention import PREFERRED_BLOCK_SIZE

        if not vllm_config.cache_config.user_specified_block_size:
            vllm_config.cache_config.block_size = PREFERRED_BLOCK_SIZE

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """SCALESEARCH's path where it is selected and can run, vLLM's choice otherwise.

        Raises ValueError with the reasons where it is selected and cannot run.
        """
        if not _selected(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        from vllm_scalesearch.attention import ScaleSearchAttentionBackend

        reasons = ScaleSearchAttentionBackend.validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"Attention backend SCALESEARCH cannot run this: {'; '.join(reasons)}")
        return selected_backend.get_path()


def _selected(backend: Any) -> bool:
    return getattr(backend, "name", None) == ATTENTION_BACKEND
