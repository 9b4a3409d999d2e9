# `make demo` trains a LoRA on what ships here; `make test` checks everything that fits in 20 minutes on two cores.
# Both set up a virtual environment in .venv first. Windows and other ways without make: see README.md.
# `make test-gpu` runs on an NVIDIA GPU, with the packages of .venv or, without one, those of python3: docs/gpu.md.

PYTHON ?= python3
BIN := .venv/bin
# pip compiles with one core, and what is compiled while tests run would give them its warnings.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # templates among the packages are no Python

.PHONY: demo test test-full test-gpu lint quick-tests clean

demo: .venv/ready
	$(BIN)/python train_network.py --config_file configs/quickstart.toml --overwrite

test: .venv/ready-test
	$(MAKE) --no-print-directory --jobs 2 lint quick-tests

quick-tests: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-full: .venv/ready-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -m gpu tests/gpu

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) -e .
	$(COMPILE)
	touch $@

.venv/ready-test: .venv/ready
	$(INSTALL) -e ".[test]"
	$(COMPILE)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info output
