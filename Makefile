# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := requirements.txt constraints.txt pyproject.toml
# libtpu is installed for its compiler; without this, JAX would look for a TPU.
export JAX_PLATFORMS := cpu

.PHONY: help setup quickstart test test-full lint bench docs clean

help:
	@echo "make quickstart   the whole journey on a CPU in under 10 minutes; ends with quickstart/report.html"
	@echo "make test         lint, types and all quick tests"
	@echo "make test-full    the long proofs too"
	@echo "make lint         ruff, mypy and the walls between rooms"
	@echo "make bench        the benchmarks, side by side with their peers"
	@echo "make docs         the documentation, in site/ (python -m http.server -d site to read it)"
	@echo "make setup        the environment alone, in $(VENV) (PYTHON=python3.11 to choose the interpreter)"

# The environment is made once and kept until a pin changes; it is marked as good only when pip has finished.
setup:
	@if [ ! -f $(VENV)/pins ] || [ "$$(cat $(PINS) | sha256sum)" != "$$(cat $(VENV)/pins)" ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else f"Python 3.11 to 3.13 is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.11 ...")' && \
	  rm -f $(VENV)/pins && $(PYTHON) -m venv $(VENV) && \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,dev,docs,tpu]' && \
	  cat $(PINS) | sha256sum > $(VENV)/pins; \
	fi

quickstart: setup
	$(BIN)/python examples/quickstart.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --package aurora_jax.launch
	PYTHONPATH=. $(BIN)/lint-imports --no-logo --no-cache

test: lint
	$(BIN)/python -m pytest -m "not full" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations=10

test-full: lint
	$(BIN)/python -m pytest

bench: setup
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/generate_cpu.py
	$(BIN)/python benchmarks/generate_tpu.py
	$(BIN)/python benchmarks/convert_full_size.py
	$(BIN)/python benchmarks/flash_attention.py
	$(BIN)/python -m aurora_jax data sample quickstart/corpus
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/gradient_reduction.py
	$(BIN)/python benchmarks/evaluate_tpu.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) quickstart site notebook
