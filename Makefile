# Everything runs in .venv, made on first use with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TABLE ?= benchmarks/results/compiled.csv
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# Tests start hundreds of processes, each of which would compile gigatrain anew in 2 s where this is set.
export PYTHONDONTWRITEBYTECODE =

.PHONY: train test long slurm compiled check lint types docs install clean

train: $(VENV)/installed
	$(BIN)/gigatrain train recipes/quickstart.toml

test: $(VENV)/tested
	$(PYTEST) -m "not long and not slurm"

# All of them, or one share: make long SHARE=1/2. In the order of the files: by their number of tests, as xdist would, the one of four minutes begins last and the other process waits for it.
long: $(VENV)/tested
	$(PYTEST) --no-loadscope-reorder -m "long and not slurm" $(if $(SHARE),--share $(SHARE))

# Jobs on a real Slurm on loopback, started by the tests; one process, since they share its nodes. Needs: apt-get install slurm-wlm munge shellcheck
slurm: $(VENV)/tested
	$(BIN)/python -m pytest -m slurm

# Every fused kernel for GPUs that are not here: registers, spills, shared memory, 16-byte loads.
compiled: $(VENV)/tested
	$(BIN)/python -m gigatrain.kernels.compiled --csv $(TABLE)

# Pages of docs/, README and the rest as one site, with the reference made of the code; refuses dead links.
docs: $(VENV)/tested
	$(BIN)/mkdocs build --strict --quiet

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
