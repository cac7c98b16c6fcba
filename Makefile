# `make demo` and `make test` are all that a fresh machine needs: Python 3.10+ and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check bar clean
demo: $(READY)
	$(BIN)/edgellm demo --output runs/demo

# One thread: the models of the tests are tiny, and two processes that share cores slow each other down.
test: export OMP_NUM_THREADS := 1
test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

check: test

bar: $(READY)
	$(BIN)/python -m pytest -m 'bar or row' --bar-report=cookbook/benchmarks/results/bar.json

# torch first and pinned: an unpinned torch may bring gigabytes of CUDA. llama-cpp-python compiles for some minutes.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,privacy,flower]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs build dist
