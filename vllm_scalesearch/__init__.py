"""vllm-scalesearch: block scales chosen by search, for vLLM (arXiv 2605.12464).

Importing the package needs torch only; vLLM is imported by `config`, `linear` and `vllm_api`.
"""

__version__ = "0.1.0"
