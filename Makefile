# Everyday commands. Everything runs in .venv, which `make setup` makes from pyproject.toml and infra/constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete
ROOT ?= runs/quickstart
# Two test processes, a file in one of them: the tests that start Ray wait more than they work. Not the slow ones: clusters of two kill each other.
WORKERS ?= --numprocesses 2 --dist loadfile

.PHONY: setup quickstart ui test test-slow lint format clean

setup: $(SETUP)

$(SETUP): pyproject.toml infra/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another one: make setup PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint infra/constraints.txt --editable '.[cpu,dev]'
	@touch $@

quickstart: $(SETUP)
	$(BIN)/python workflows/nightly.py --config configs/quickstart.yaml root=$(ROOT)

ui: $(SETUP)
	$(BIN)/mlflow server --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///$(ROOT)/mlflow/mlflow.db

test: $(SETUP)
	$(BIN)/python -m pytest -m "not slow" $(WORKERS)

test-slow: $(SETUP)
	$(BIN)/python -m pytest -m slow

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache
