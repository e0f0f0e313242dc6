# Everything runs in .venv, made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TABLE ?= benchmarks/results/compiled.csv
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test long compiled check lint types install clean

train: $(VENV)/installed
	$(BIN)/gigatrain train recipes/quickstart.toml

test: $(VENV)/tested
	$(PYTEST) -m "not long"

long: $(VENV)/tested
	$(PYTEST) -m long

# Every fused kernel for GPUs that are not here: registers, spills, shared memory, 16-byte loads.
compiled: $(VENV)/tested
	$(BIN)/python -m gigatrain.kernels.compiled --csv $(TABLE)

check: lint types test

lint: $(VENV)/tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/tested
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
