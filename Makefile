# make demo     the whole story on a small trained family, in minutes
# make test     the tests (under five minutes on two cores)
# make check    everything that must hold before a merge: style, types, tests, slow tests
# make bench    time and memory against mergekit and others, on a quiet machine (docs/benchmarks.md)
# make sweep    every architecture of the installed transformers; rewrites docs/architectures.md
# make env      only the environment; every target above makes it first
# make docs     rewrite docs/commands from the same source as --help
#
# Variables: PYTHON (3.11 or newer), WORKERS (test processes), TORCH_INDEX (another package index for
# torch only, where its builds for machines without a GPU are kept).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env demo test slow sweep style types check docs bench clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
TORCH_INDEX ?=
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# One thread per test process: two processes on two cores must not fight over them.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

env: $(VENV)/.ready

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "making $(VENV) with $(PYTHON)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone. Installed with the rest, the resolver may replace a CPU build that the
# machine already offers by the much larger CUDA build of the same version.
$(VENV)/.torch: constraints.txt | $(VENV)/.made
	@echo "installing $(TORCH) (the largest download, once)" >&2
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt '$(TORCH)'
	@touch $@

$(VENV)/.ready: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing realign and its tools" >&2
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	@$(BIN)/realign demo

test: env
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore=tests/slow

slow: env
	$(BIN)/python -m pytest tests/slow --timeout 1200

# Results are kept in .cache/sweep under a key of the code: a second run does what is missing.
sweep: env
	$(THREADS) PYTHONPATH=tests $(BIN)/python -m architectures.sweep --workers $(WORKERS)

style: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/pyright

check: style types test slow

docs: env
	$(BIN)/python -m realign_cli.pages docs/commands

# Restartable: what has a result in BENCH is not measured again.
BENCH := build/bench
bench: env
	$(BIN)/python -m benchmarks.streaming --work $(BENCH)

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis realign-demo
