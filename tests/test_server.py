"""vLLM's OpenAI server with quantization scalesearch, spoken to by the openai client."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

pytestmark = pytest.mark.vllm

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The opposite of hot is",
    "One, two, three, four,",
)
GREEDY = {"temperature": 0, "max_tokens": 16}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, str]]:
    """A client of a running server, and what the server has logged by then."""
    port = _free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    options = {"scalesearch": {"weights": "exact", "activations": "fast"}}
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2),
        "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port),
        "--quantization", "scalesearch", "--additional-config", json.dumps(options),
        "--enforce-eager", "--max-model-len", "512",
    ]  # fmt: skip
    # The default of vLLM, whatever the other tests use: the engine in processes of its own.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(180):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        yield client, log.read_text()
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_says_which_kernel_and_why(server):
    log = server[1]
    assert "nvfp4 w4a4, weights exact, activations fast" in log
    assert "product in torch on exactly dequantized weights, kept dense" in log


def test_completion(server):
    answer = server[0].completions.create(model="smollm2", prompt=PROMPTS[0], **GREEDY)
    assert "Paris" in answer.choices[0].text
    assert 0 < answer.usage.completion_tokens <= 16


def test_streamed_completion_is_the_same_text(server):
    whole = server[0].completions.create(model="smollm2", prompt=PROMPTS[0], **GREEDY)
    parts = list(server[0].completions.create(model="smollm2", prompt=PROMPTS[0], stream=True, **GREEDY))
    assert len(parts) > 4
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_chat_and_streamed_chat(server):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = server[0].chat.completions.create(model="smollm2", messages=messages, **GREEDY)
    text = whole.choices[0].message.content
    assert "Paris" in text
    parts = list(server[0].chat.completions.create(model="smollm2", messages=messages, stream=True, **GREEDY))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text


def test_requests_at_once_give_the_text_of_one_at_a_time(server):
    def complete(prompt: str) -> str:
        return server[0].completions.create(model="smollm2", prompt=prompt, **GREEDY).choices[0].text

    alone = [complete(prompt) for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(complete, PROMPTS)) == alone
