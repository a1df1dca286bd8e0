# Each target sets up its own environment in .venv; Python 3.10 or newer and make are all it needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := src tests scripts

.PHONY: install quickstart test coverage quality types style docs notebooks browser conformance conformance-peers bench clean

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

coverage: install  ## all tests, and the share of lines that they run in each room; TESTS=tests/data for some of them
	$(BIN)/python -m pytest -n auto --cov --cov-report= --cov-report=json:build/coverage/report.json $(TESTS)
	$(BIN)/python scripts/coverage_table.py build/coverage/report.json

conformance: install  ## transformers' own common tests on our classes: fetches its source distribution
	$(BIN)/python -m pip install --quiet --editable ".[dev,conformance]"
	$(BIN)/python -m pytest tests/conformance/test_drmm.py

conformance-peers: install  ## the same on transformers' own detectors, which fail some of them
	$(BIN)/python -m pip install --quiet --editable ".[dev,conformance]"
	-$(BIN)/python -m pytest tests/conformance/test_peers.py --tb=line

quality: install  ## style and lint, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: install  ## annotations, of the rooms that pyproject.toml does not leave out
	$(BIN)/python -m mypy

style: install  ## mend style and lint
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

docs: .venv/docs  ## the site in build/site with all notebooks executed; a warning is an error
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m sphinx -W --keep-going --quiet docs build/site

notebooks: .venv/docs  ## execute copies of the notebooks in build/notebooks: 3 minutes on one core
	mkdir -p build/notebooks
	cp -r docs/notebooks/*.ipynb docs/notebooks/shapes_detector build/notebooks
	cd build/notebooks && PATH="$(CURDIR)/$(BIN):$$PATH" jupyter execute --inplace *.ipynb

.venv/browser: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[demo]" "selenium>=4.20"
	touch $@

browser: .venv/browser  ## the demo in headless Chromium, which must be installed with its driver
	$(BIN)/python -m pytest tests/demo tests/browser

bench: install  ## measure again all that docs/performance.md shows: an hour, on a machine that is free
	OMP_NUM_THREADS=1 $(BIN)/python scripts/measure_page.py docs/performance.md

clean:
	rm -rf .venv runs docs/notebooks/runs build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
