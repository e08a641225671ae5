# Two commands matter: `make serve` and `make test`. Both need only Python 3.11+ and make.
# Overridable: HOST, PORT, BASE (pocket, a hub id or a folder), ARGS (more flags of `lorikeet serve`),
# TEST_ARGS (more flags of pytest), TEST_WORKERS (0 is one process), PYTHON, VENV, TORCH_INDEX (see deploy/torch_index.py).

HOST ?= 127.0.0.1
PORT ?= 8000
BASE ?= pocket
ARGS ?=
TEST_ARGS ?=
TEST_WORKERS ?= 2
VENV ?= .venv
IS_OURS := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.12 python3.13 python3.11 python3.14 python; do \
	"$$python" -c '$(IS_OURS)' >/dev/null 2>&1 && echo "$$python" && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.DEFAULT_GOAL := help
.PHONY: help serve install test lint format docs clean

help:
	@echo "make serve     install into $(VENV) if needed, then serve at http://$(HOST):$(PORT)   [HOST, PORT, BASE, ARGS]"
	@echo "make test      the whole test suite                                            [TEST_ARGS, TEST_WORKERS]"
	@echo "make lint      ruff check, ruff format --check, mypy --strict"
	@echo "make docs      write what the documentation repeats from the code"
	@echo "make format    let ruff rewrite what it can"
	@echo "make clean     remove $(VENV) and every cache"

serve: $(VENV)/.installed
	@exec $(BIN)/lorikeet serve --base "$(BASE)" --host "$(HOST)" --port "$(PORT)" $(ARGS)

install: $(VENV)/.installed

# Where bytecode is not kept, every process of every run compiles all sources, and pytest rewrites each assertion again.
test: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(BIN)/python -m deploy.pages

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Lorikeet needs Python 3.11 or newer on PATH; or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "The venv module is incomplete here (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }

# The stamps make the second start instant; a changed pin or dependency makes them stale.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Lorikeet and its libraries into $(VENV): one to three minutes, once"
	@$(PIP) install $$($(BIN)/python deploy/torch_index.py "$(TORCH_INDEX)") --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the test tools into $(VENV)"
	@$(PIP) install --constraint constraints.txt --editable ".[dev]"
	@touch $@
