# The targets of this project; `make` alone prints them. PYTHON is the environment that they make, or the given one.
VENV ?= .venv
PYTHON ?= $(VENV)/bin/python
# The torch that the tests run with; any torch >= 2.10 works. On Linux the default index has its CUDA build.
TORCH ?= torch==2.13.0
OP ?= lora_linear

help:  ## print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

# An environment is made only if no PYTHON is given, and remade if TORCH has changed since.
ENV = $(if $(filter file,$(origin PYTHON)),$(VENV)/.done)
ifneq ($(shell cat $(VENV)/.done 2> /dev/null),$(TORCH))
.PHONY: $(VENV)/.done
endif
# A half-made .venv has a pyvenv.cfg but no working pip.
$(VENV)/.done: pyproject.toml setup.py setup_commands.py $(wildcard csrc/* csrc/*/* csrc/*/*/*)
	$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || \
	  python3 -m venv $$(test -f $(VENV)/pyvenv.cfg && echo --clear) $(VENV)
	rm -f $@
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation -e ".[demo,triton,test,dev,docs]"
	echo "$(TORCH)" > $@

env: $(VENV)/.done  ## make the virtual environment: torch, this package built in place, everything for demo and tests

demo: $(ENV)  ## fine-tune MiniLM on movie reviews with PEFT, plain and accelerated, and compare
	$(PYTHON) examples/compare/finetune_minilm.py $(ARGS)

test: $(ENV)  ## all that runs on a CPU, in two processes: reference, C++, Triton under its interpreter, PEFT integration
	$(PYTHON) -m pytest -q -n 2 --dist worksteal $(ARGS)

CPP = $(shell find csrc tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The environment's formatter: the system's may be another version.
CLANG_FORMAT = $(shell $(PYTHON) -c "import clang_format; print(clang_format.get_executable('clang-format'))")

fmt: $(ENV)  ## format every Python, C++ and CUDA file
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

lint: $(ENV)  ## ruff, the formatters, and the order of the layers and of csrc's rooms
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CPP)
	$(PYTHON) -m pytest -q tests/package/test_layers.py tests/package/test_csrc_rooms.py

type: $(ENV)  ## mypy
	$(PYTHON) -m mypy

kernels: $(ENV)  ## compile every Triton kernel and tile for sm_80, sm_90, sm_100 with no GPU: registers, spills, shared memory
	$(PYTHON) bench kernels $(ARGS)

cuda: $(ENV)  ## compile every CUDA kernel for sm_80 to sm_120 with nvcc and no GPU: registers, spills, shared memory
	$(PYTHON) bench cuda $(ARGS)

EMULATED = $(PYTHON) -m pytest -q -s tests/device/test_cuda_emulator*.py -k "dequantize or linear4bit or deterministic or twins"

sanitize: $(ENV)  ## the CPU kernels under AddressSanitizer and UBSan; the CUDA kernels, emulated, under these and ThreadSanitizer
	$(PYTHON) tests/sanitize_cpu.py
	FASTPEFT_SANITIZE=thread LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" $(EMULATED)
	FASTPEFT_SANITIZE=address ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" $(EMULATED)

model: $(ENV)  ## the cost model against the measured rows
	$(PYTHON) bench model

bench: $(ENV)  ## time OP=lora_linear beside eager, PEFT and torch.compile; JSON and a plot under bench/results
	$(PYTHON) -m pytest bench/bench_$(OP).py -o addopts= --benchmark-only -q $(ARGS)

roof: $(ENV)  ## measure this machine's roofs
	$(PYTHON) bench roof $(ARGS)

# If PYTHON is not given, the system's python3 is tried too, and no environment is made: take the first of the two whose
# torch has CUDA, else the first that has torch.
gpu:  ## on a CUDA machine: builds the extension if need be, then correctness, tuning, benchmarks in under ten minutes
	@for able in "import torch; assert torch.version.cuda" "import torch"; do \
	  for python in $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3); do \
	    if $$python -c "$$able" 2> /dev/null; then exec $$python bench gpu $(ARGS); fi; \
	  done; \
	done; echo "gpu: PYTHON must be an interpreter with torch, got $(PYTHON)" >&2; exit 1

docs: $(ENV)  ## the guide and the reference of every name, as pages under docs/_build
	$(PYTHON) -m sphinx -W --keep-going -q -b html docs docs/_build $(ARGS)

PYTHONS ?= python3
wheels:  ## dist/: an sdist, and from it a wheel for each of PYTHONS that serves every torch from 2.10 on
	.ci/wheels $(PYTHONS)

# Here a compiler warning fails the build; elsewhere not even a compiler error does.
check: export FASTPEFT_WERROR = 1
check: $(ENV) lint type test kernels cuda model sanitize  ## what CI runs, in CI's order

.PHONY: help env demo test fmt lint type kernels cuda sanitize model bench roof gpu docs wheels check
