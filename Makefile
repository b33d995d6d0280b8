# Needs Python 3.10 or newer and make; everything else goes into .venv.
#   make quickstart    fine-tune the bundled model and see what it learnt
#   make test          run the tests
#   make lint          check style, types and imports
# PYTHON=python3.12    picks the Python that makes .venv
# TORCH_INDEX=URL      picks the package index that torch alone comes from, such as one with CPU-only builds

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := $(wildcard constraints.txt)
PINNED := $(if $(PINS),-c $(PINS))

.PHONY: help quickstart test lint
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/installed
	@$(BIN)/decal quickstart

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Made anew only when what is to be installed has changed.
$(VENV)/installed: pyproject.toml $(PINS) | $(VENV)/torch
	@echo "Installing decal and its libraries (about 150 MB)"
	@$(PIP) install -q $(PINNED) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests and checks need (about 400 MB)"
	@$(PIP) install -q $(PINNED) -e ".[dev]"
	@touch $@

$(VENV)/torch: $(PINS) | $(VENV)/bin/python
ifeq ($(TORCH_INDEX),)
	@echo "Installing torch from the usual package index. On Linux that is the build for NVIDIA cards, 2 to 3 GB with its"
	@echo "libraries; on a Mac it is about 100 MB. For a CPU build of 200 MB, stop here (Ctrl-C) and give TORCH_INDEX=URL,"
	@echo "an index that has one: PyTorch's page on getting started names it."
	@$(PIP) install $(PINNED) torch
else
	@echo "Installing torch from $(TORCH_INDEX)"
	@$(PIP) install --no-deps $(PINNED) -i $(TORCH_INDEX) torch
endif
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "decal needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
