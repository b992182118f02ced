"""The entry point that vLLM calls in every process that it starts."""


def register() -> None:
    """Register quantization `scalesearch` with vLLM. Safe to call any number of times.

    vLLM's registry keeps the last class given for a name, and the module is imported once, so
    repeating the call changes nothing.
    """
    from vllm_scalesearch.config import ScaleSearchConfig
    from vllm_scalesearch.options import QUANT_METHOD
    from vllm_scalesearch.vllm_api import register_quantization_config

    register_quantization_config(QUANT_METHOD)(ScaleSearchConfig)
