"""The entry point that vLLM calls in every process that it starts."""

import copyreg


def register() -> None:
    """Register quantization `scalesearch` and attention backend `SCALESEARCH` with vLLM.

    Safe to call any number of times: vLLM's registry keeps the last class given for a name, and a backend
    that is there already is left alone.
    """
    from vllm_scalesearch.config import ScaleSearchConfig
    from vllm_scalesearch.options import QUANT_METHOD
    from vllm_scalesearch.vllm_api import AttentionBackendEnum, register_quantization_config

    register_quantization_config(QUANT_METHOD)(ScaleSearchConfig)
    attention_backend()
    # vLLM sends the selected member to processes that it spawns, which unpickle it before they load plugins.
    copyreg.pickle(AttentionBackendEnum, _reduce)


def attention_backend():
    """The member of vLLM's list of attention backends that stands for SCALESEARCH."""
    from vllm_scalesearch.vllm_api import AttentionBackendEnum

    name, path = "SCALESEARCH", "vllm_scalesearch.attention.ScaleSearchAttentionBackend"
    if name not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(name, path)
    return AttentionBackendEnum[name]


def _reduce(member):
    if member.name == "SCALESEARCH":
        return attention_backend, ()
    return type(member), (member.value,)
