"""``vllm-scalesearch calibrate-attention``: write R of a model's attention layers."""

import argparse
import os
import tempfile
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate-attention",
        help="calibrate R of attention backend SCALESEARCH",
        description="Run a model over a text, or over random token ids, and write R of every attention layer "
        "to a file that --attention-backend SCALESEARCH finds by itself when it lies beside the model.",
    )
    parser.add_argument("model", help="a folder or a Hugging Face hub id")
    parser.add_argument("--text", type=Path, help="a text file; default: random token ids")
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens to use (default: 4096)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="file to write; default: in the model's folder, else in the user's cache",
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write R of a model. Raises ValueError for a text that is too short."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, where vLLM would take nearly all memory
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    if arguments.tokens < 256:
        raise ValueError(f"--tokens {arguments.tokens}: R needs a few tokens for each channel, 256 or more")
    trust = arguments.trust_remote_code
    config = AutoConfig.from_pretrained(arguments.model, trust_remote_code=trust).get_text_config()
    if arguments.text is not None:
        if not arguments.text.is_file():
            raise ValueError(f"--text {arguments.text}: there is no such file")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=trust)
        ids = torch.tensor(tokenizer(arguments.text.read_text()).input_ids[: arguments.tokens])
        if len(ids) < arguments.tokens:
            raise ValueError(
                f"--text {arguments.text} has {len(ids)} tokens, fewer than --tokens {arguments.tokens}"
            )
    else:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (arguments.tokens,), generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        origin = "random tokens" if arguments.text is None else f"tokens of {arguments.text.name}"
        save_file({"tokens": ids}, tokens, {"source": f"{len(ids)} {origin}"})
        _calibrate(arguments, tokens, min(1024, getattr(config, "max_position_embeddings", 1024)))


def _calibrate(arguments: argparse.Namespace, tokens: Path, max_model_len: int) -> None:
    """Start vLLM on the model and send it one request: R is calibrated before the first forward pass."""
    from vllm import LLM, SamplingParams

    from vllm_scalesearch.reduction_files import FILE_NAME

    output, folder = arguments.output, Path(arguments.model)
    if output is None and folder.is_dir() and os.access(folder, os.W_OK):
        output = folder / FILE_NAME
    attention = {"r": "auto" if output is None else str(output.absolute()), "calibration_tokens": str(tokens)}
    llm = LLM(
        arguments.model,
        attention_backend="SCALESEARCH",
        kv_cache_dtype="nvfp4",
        additional_config={"scalesearch": {"attention": attention}},
        enforce_eager=True,
        max_model_len=max_model_len,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        tensor_parallel_size=arguments.tensor_parallel_size,
        trust_remote_code=arguments.trust_remote_code,
    )
    llm.generate({"prompt_token_ids": [0]}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    if output is not None and not output.is_file():
        raise ValueError(f"vLLM ran the model, but {output} was not written; its log says why")
