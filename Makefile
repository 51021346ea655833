# make train: everything from nothing to a trained small MoE.   make test: everything from nothing to a passed suite.
# Both build .venv from pinned versions first; only Python 3.11 or newer and make have to be there.

PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow goldens bench lint clean

help:  ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/core.stamp: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "axrepro needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	@echo "installing axrepro into .venv (about a minute)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --editable .
	@touch $@

.venv/dev.stamp: .venv/core.stamp requirements-dev.lock
	@echo "installing what the tests need"
	@$(PIP) --requirement requirements-dev.lock
	@touch $@

setup: .venv/dev.stamp  ## the environment alone, with what the tests need

train: .venv/core.stamp  ## train moe_tiny on the standard library's text, and compare it with n-gram models
	@$(BIN)/python -m axrepro.quickstart

test: .venv/dev.stamp  ## the default test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/dev.stamp  ## the long tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

ONLY ?= golden
goldens: .venv/dev.stamp  ## write the golden files anew (of one file: ONLY=FILE); git diff shows what changed
	@$(BIN)/python -m pytest tests/experiments -n 2 --dist loadfile --no-loadscope-reorder -k "golden and $(ONLY)" --goldens

bench: .venv/dev.stamp  ## step and start-up beside transformers and flax.linen, under ten minutes on two idle cores
	@$(BIN)/python -m benchmarks

lint: .venv/dev.stamp  ## style, common mistakes and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

clean:  ## remove the environment; runs stay
	@rm -rf .venv
