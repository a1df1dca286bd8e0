# Each target sets up its own environment in .venv; Python 3.10 or newer and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests scripts

.PHONY: install quickstart test conformance conformance-peers quality style clean

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

quickstart: install  ## train on generated pictures, evaluate, detect: 10 minutes on 2 cores
	$(BIN)/python scripts/quickstart.py

test: install  ## all tests, offline
	$(BIN)/python -m pytest -n auto

conformance: install  ## transformers' own common tests on our classes: fetches its source distribution
	$(BIN)/python -m pip install --quiet --editable ".[dev,conformance]"
	$(BIN)/python -m pytest tests/conformance/test_drmm.py

conformance-peers: install  ## the same on transformers' own detectors, which fail some of them
	$(BIN)/python -m pip install --quiet --editable ".[dev,conformance]"
	-$(BIN)/python -m pytest tests/conformance/test_peers.py --tb=line

quality: install  ## style and lint, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: install  ## mend style and lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
