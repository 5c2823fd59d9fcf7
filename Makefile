# Everything a developer or a new user runs. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types bench docs clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "hesse needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

install: $(STAMP)  ## create .venv and install hesse with the tested versions

demo: $(STAMP)  ## run the main job on the built-in data
	$(BIN)/hesse demo --out runs/demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n auto

lint: $(STAMP)  ## style, and the layering of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: $(STAMP)  ## static types
	$(BIN)/mypy

bench: $(STAMP)  ## print the benchmark tables (about three minutes)
	$(BIN)/python -m benchmarks

docs: $(STAMP)  ## build the reference from the docstrings into build/docs
	$(BIN)/python -c 'import hesse; [getattr(hesse, name) for name in hesse.__all__]; \
	  from pdoc.__main__ import cli; cli(["--output-directory", "build/docs", "hesse"])'

clean:  ## remove what make made, runs/ excepted
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
