# Each target sets up its own environment in .venv; Python 3.10 or newer and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests scripts

.PHONY: install quickstart test quality style bench clean

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

quality: install  ## style and lint, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: install  ## mend style and lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: install  ## measure again all that docs/performance.md shows: an hour on one core
	OMP_NUM_THREADS=1 $(BIN)/python scripts/measure_page.py docs/performance.md

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
