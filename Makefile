# Every target makes .venv by itself when it is missing, so any of them works as the first command after a clone.
#
#   make setup   the development environment in .venv
#   make demo    dense, window and multipole attention side by side on real text (at most 8 minutes on two cores)
#   make test    all tests, in JOBS=2 processes
#   make lint    ruff and mypy
#
# torch comes first and by its exact version: looser requirements can pull gigabytes of CUDA packages. Where the package
# index at hand offers no CPU build, name one that does:
#
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_BUDGET ?= 60s
DEMO_OUT ?= runs/demo
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help:
	@sed -n 's/^#   \(make [a-z]*\)   */\1	/p' Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "farfield needs Python 3.11 or newer; %s is %s. Name another: make setup PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(READY)

setup: $(READY)

demo: $(READY)
	$(BIN)/farfield compare --attention dense,window,fma --context 4096 --budget $(DEMO_BUDGET) --out $(DEMO_OUT) --resume

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
