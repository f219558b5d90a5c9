# One virtual environment in .venv, and the commands that run in it.

PYTHON ?= python3
# The exact version of torch. A plain index gives a CUDA build on Linux (gigabytes); where pip finds no
# CPU build by itself, name an index of CPU builds:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help venv test lint format demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON (python3), TORCH_INDEX (an index of CPU builds of torch)"

venv: .venv/.installed ## build .venv, or bring it up to date with pyproject.toml

.venv/.installed: pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "$(PYTHON): Python 3.11 or newer is needed; name one with make venv PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

lint: venv ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two workers of one thread each fill a machine of two cores; more threads would fight for them.
test: lint ## check style and types, then run all tests
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=10

format: venv ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv ## run the whole pipeline on a CPU
	$(BIN)/postnas run recipes/smollm2-cpu.yaml

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find postnas tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
