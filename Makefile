# The words of this project; `make` alone prints them. PYTHON is the environment that `make env` (or demo, or test) made.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# The torch that the tests run with; any torch >= 2.10 serves. On Linux the default index has its CUDA build.
TORCH ?= torch==2.13.0
OP ?= lora_linear

help:  ## print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

$(VENV)/.done: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation -e ".[demo,triton,test,dev]"
	touch $@

env: $(VENV)/.done  ## make the virtual environment: torch, this package built in place, everything for demo and tests

demo: env  ## fine-tune MiniLM on movie reviews with PEFT, plain and accelerated, and compare
	$(PYTHON) examples/finetune_minilm.py $(ARGS)

test: env  ## all that runs on a CPU: reference, C++, Triton under its interpreter, PEFT integration
	$(PYTHON) -m pytest -q $(ARGS)

lint:  ## ruff, and the order of the layers
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -q tests/test_layers.py

type:  ## mypy
	$(PYTHON) -m mypy

kernels:  ## compile every Triton kernel and tile for sm_80, sm_90, sm_100 with no GPU: registers, spills, shared memory
	$(PYTHON) bench/compile_kernels.py $(ARGS)

cuda:  ## compile every CUDA kernel for sm_80 to sm_120 with nvcc and no GPU: registers, spills, shared memory
	$(PYTHON) bench/compile_cuda.py $(ARGS)

EMULATED = $(PYTHON) -m pytest -q -s tests/test_cuda_emulator*.py -k "dequantize or linear4bit or deterministic or twins"

sanitize: env  ## the CPU kernels under AddressSanitizer and UBSan; the CUDA kernels, emulated, under these and ThreadSanitizer
	$(PYTHON) tests/sanitize_cpu.py
	FASTPEFT_SANITIZE=thread LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" $(EMULATED)
	FASTPEFT_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" $(EMULATED)

model:  ## the cost model against the measured rows
	$(PYTHON) bench/model.py

bench: ## time OP=lora_linear beside eager, PEFT and torch.compile; JSON and a plot under bench/results
	$(PYTHON) -m pytest bench/bench_$(OP).py -o addopts= --benchmark-only -q $(ARGS)

roof:  ## measure this machine's roofs
	$(PYTHON) bench/roofline.py $(ARGS)

# Where PYTHON is not given, the machine's own python3 serves too, with no environment made: the first of the two whose
# torch has CUDA, else the first that has a torch.
gpu:  ## on a CUDA machine: builds the extension if need be, then correctness, tuning, benchmarks in under ten minutes
	@for able in "import torch; assert torch.version.cuda" "import torch"; do \
	  for python in $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3); do \
	    if $$python -c "$$able" 2> /dev/null; then exec $$python bench/gpu.py $(ARGS); fi; \
	  done; \
	done; echo "gpu: PYTHON must be an interpreter with torch, got $(PYTHON)" >&2; exit 1

check: env lint type test kernels cuda model sanitize  ## what CI runs, in CI's order

.PHONY: help env demo test lint type kernels cuda sanitize model bench roof gpu check
