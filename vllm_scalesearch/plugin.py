"""The entry point that vLLM calls in every process that it starts."""

import copyreg

from vllm_scalesearch.options import ATTENTION_BACKEND, QUANT_METHOD


def register() -> None:
    """Register quantization `scalesearch` and attention backend `SCALESEARCH` with vLLM, and on the CPU a
    kernel for NVFP4 checkpoints.

    Safe to call any number of times: vLLM's registry keeps the last class given for a name, and a backend
    that is there already is left alone.
    """
    from vllm_scalesearch import cpu_nvfp4
    from vllm_scalesearch.config import ScaleSearchConfig
    from vllm_scalesearch.vllm_api import AttentionBackendEnum, register_quantization_config

    register_quantization_config(QUANT_METHOD)(ScaleSearchConfig)
    attention_backend()
    cpu_nvfp4.register()
    # vLLM sends the selected member to processes that it spawns, which unpickle it before they load plugins.
    copyreg.pickle(AttentionBackendEnum, _reduce)


def attention_backend():
    """The member of vLLM's list of attention backends that stands for SCALESEARCH."""
    from vllm_scalesearch.vllm_api import AttentionBackendEnum

    if ATTENTION_BACKEND not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(
            ATTENTION_BACKEND, "vllm_scalesearch.attention.ScaleSearchAttentionBackend"
        )
    return AttentionBackendEnum[ATTENTION_BACKEND]


def _reduce(member):
    if member.name == ATTENTION_BACKEND:
        return attention_backend, ()
    return type(member), (member.value,)
