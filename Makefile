# One environment for all targets: VENV, made on first use and again when setup.py or constraints.txt change.
VENV ?= .venv
PYTHON ?= python3
# For example PYTEST_ARGS="-k losses -x"
PYTEST_ARGS ?=
# Of fuzzing each target
MINUTES ?= 1
# Where `make gpu` leaves its figures
GPU_RESULTS ?= outputs/gpu_benchmark

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.hf_deit-installed
DOCS_INSTALLED := $(VENV)/.hf_deit-docs-installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow fuzz gpu style quality types docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  VENV=path uses another environment. pip decides which torch comes: on Linux the CUDA build, several GB;"
	@echo "  without a GPU, point pip's index at PyTorch's CPU wheels first."

install: $(INSTALLED) ## make the environment: the package, its tests' needs, tested versions

$(INSTALLED): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	touch $@

# A network this small wins nothing by a second thread, and loses much where something else runs beside it.
demo: export OMP_NUM_THREADS ?= 1
demo: $(INSTALLED) ## train a small teacher and distil a DeiT from it: real digits, CPU, no network
	$(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/run_distill.py

test: $(INSTALLED) ## the fast tests, on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 $(PYTEST_ARGS)

test-slow: $(INSTALLED) ## the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

fuzz: $(INSTALLED) ## change files of every kind at random and read them; MINUTES=10 a target
	$(BIN)/python tests/fuzz/fuzz.py --minutes $(MINUTES)

gpu: $(INSTALLED) ## measure everything on this machine's GPU, in eight minutes
	$(BIN)/python benchmarks/gpu.py --output_dir $(GPU_RESULTS)

style: $(INSTALLED) ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED) ## what style would change or cannot fix
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## pyright over the modules that are clean of type errors
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DOCS_INSTALLED) ## build the documentation into site/, with links and references checked
	PYTHONPATH=src $(BIN)/zensical build --strict --clean

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -e ".[docs]" -c constraints.txt
	touch $@

clean: ## remove caches and builds; environment and runs stay
	rm -rf build dist site .cache src/*.egg-info .pytest_cache .ruff_cache
	find src recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
