# Every target works on a fresh machine with Python 3.11 or newer: it makes .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: install demo test test-real check format bench docs clean

install: $(STAMP)

# torch comes first and by pip: on a machine without GPU any other order can fetch gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/loramix demo

test: install
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 -m "not real" --durations=5

test-real: install
	$(BIN)/python -m pytest -m real

check: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

format: install
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench: install
	$(BIN)/python benchmarks/step_cost.py --json --out runs/step_cost.json

docs: install
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/zensical build
	$(BIN)/python -m pytest -q tests/test_docs.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
