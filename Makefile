# Every target works on a fresh machine with Python 3.11 or newer: it makes .venv itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
VLLM := .venv-vllm

.PHONY: install demo test test-real fuzz torture check format bench docs vllm-check clean

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

# 20,000 requests made from the server's schema; `make test` has 5,000.
fuzz: install
	LORAMIX_FUZZ=20000 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 tests/test_serving_schema.py

# Kills, damage, disks, numbers, malformed files, names, mutated settings: the long form of what `make test` has a
# short one of. docs/reliability.md has its results; takes about half an hour. Small disks are mounted: needs root.
torture: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.damage
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.numbers
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.disks
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture.soak
	LORAMIX_YAMLS=5000 $(BIN)/python -m pytest -q tests/test_yaml_text.py

check: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive src --severity-level high
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

# vLLM wants its own transformers, so it has an environment of its own. --no-deps: every package is pinned, and the wheel
# also asks for torchaudio, torchvision and torchcodec, which text does not need.
$(VLLM)/installed: tests/vllm_check/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r tests/vllm_check/requirements.txt
	touch $@

# make vllm-check RUN=runs/mine: with a run of yours; else a small one is trained once and kept in runs/vllm-check.
vllm-check: install $(VLLM)/installed
	$(BIN)/python tests/vllm_check/check.py --vllm $(VLLM)/bin/python $(if $(RUN),--run $(RUN))

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache
