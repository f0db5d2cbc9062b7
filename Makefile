# Two commands matter: `make demo` and `make test`. Both create .venv and install what they need.
SHELL := /bin/bash -o pipefail
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# llama-cpp-python is built for this machine; its multimodal half is not needed
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF

.PHONY: demo demo-cuda test lint bench notebook clean

# The whole loop on the reference model: record, replay, tune, apply, verify; results in demo/
demo: $(STAMP)
	$(BIN)/tracekit demo -o demo --force

# The same on this machine's NVIDIA GPU, at production-like sizes; results in campaign/ (docs/cuda.md). It goes on where it
# was stopped. Nothing cached is used for llama-cpp-python: a wheel built without CUDA would be taken in silence.
CUDA_BIN := .venv-cuda/bin
demo-cuda:
	@command -v nvcc >/dev/null || { echo "no nvcc: install NVIDIA's CUDA toolkit, or see docs/cuda.md"; exit 2; }
	@test -x .venv-cuda/bin/pip || $(PYTHON) -m venv --clear .venv-cuda
	@test -f .venv-cuda/.installed || { echo "Building llama.cpp with CUDA for this GPU: minutes on 16 cores."; \
	    CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native -DLLAVA_BUILD=OFF" CMAKE_BUILD_PARALLEL_LEVEL=$$(nproc) \
	    $(CUDA_BIN)/python -m pip install --disable-pip-version-check --no-cache-dir -e ".[engine]" \
	    && touch .venv-cuda/.installed; }
	$(CUDA_BIN)/tracekit doctor --require-gpu
	PYTHON=$(CUDA_BIN)/python SITE= benchmarks/cuda.sh run campaign cuda

# Every test, on real model runs; the linter is one of them
test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The simulator's and the tuner's speed; other benchmarks want a model or a llama-server: benchmarks/README.md
bench: $(STAMP)
	$(BIN)/python benchmarks/kernel.py
	$(BIN)/python benchmarks/tune.py

notebook: $(STAMP)
	$(BIN)/python -m pip install -q -e ".[notebook]"
	$(BIN)/jupyter lab notebooks

$(STAMP): pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)  # one that was stopped half-way is made anew
	@echo "Installing into $(VENV). llama-cpp-python is built from source: about 6 minutes on 2 cores."
	@$(BIN)/python -m pip install --disable-pip-version-check -v -e ".[engine,test]" 2>&1 \
	    | tee $(VENV)/install.log \
	    | awk 'match($$0, /^ *\[[0-9]+\/[0-9]+\]/) { split(substr($$0, RSTART, RLENGTH), n, /[^0-9]+/); \
	               if (n[2] % 10 == 0 || n[2] == n[3]) { print "building llama.cpp: " n[2] " of " n[3]; fflush() } } \
	           /^Collecting / { print; fflush() }' \
	    || { tail -n 30 $(VENV)/install.log; echo "installation failed; the whole log is in $(VENV)/install.log"; exit 1; }
	@touch $@

# What make can make again. campaign/ is kept: measurements of a machine that may be gone
clean:
	rm -rf $(VENV) .venv-cuda demo models-cuda build dist *.egg-info
	@if [ -d campaign ]; then echo "campaign/ is kept, as it may be hours of measurements: rm -r campaign"; fi
