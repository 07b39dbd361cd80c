# Every target works on a fresh clone with nothing but Python, make and a package registry.
PYTHON ?= python3
VENV ?= .venv
# For a package index of your own, say: make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
WORKERS ?= 2
PYTEST_FLAGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: venv demo test check test-slow test-gpu docs format clean

venv: $(INSTALLED)

# The pins by the environment and not by -c, so that what builds the package is pinned too.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(PIP_FLAGS) -e '.[dev]'
	touch $@

# The whole chain on the model that ships with the package: pruned, distilled, quantized, exported, judged.
demo: $(INSTALLED)
	$(BIN)/compress run recipes/quickstart.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not gpu and not peer" $(PYTEST_FLAGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m "gpu and not peer" $(PYTEST_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m compress.cli.docs --check

docs: $(INSTALLED)
	$(BIN)/python -m compress.cli.docs

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
