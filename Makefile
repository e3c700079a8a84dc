# Everything runs from a bare checkout: Python 3.11-3.13 and make are enough.
# Each target sets up .venv when it is missing or when pyproject.toml or constraints.txt changed, and then uses it as it is.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
WORKERS ?= 2
BENCH ?= benchmarks
ARGS ?=
SOURCES := $(shell find ultrazoo $(wildcard recipes) -name '*.py' -o -name '*.yaml')
DEMO := outputs/ultragen_4k

# the interpreter of this machine is used as it is: nothing is downloaded behind the user's back
export UV_PYTHON_DOWNLOADS := never
# compiled at once: where Python is told to write no bytecode, every process would compile torch again
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --constraints constraints.txt --build-constraints constraints.txt

.PHONY: help
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

.PHONY: demo
demo: $(DEMO)/plan.json ## set up and build recipes/ultragen_4k.yaml into outputs/ultragen_4k
	@echo "$(DEMO) holds the model, its plan and report.html:"; ls -l $(DEMO)

# an output of older sources is replaced; an output that is up to date is left alone
$(DEMO)/plan.json: $(SOURCES) $(CORE)
	$(BIN)/ultrazoo build recipes/ultragen_4k.yaml $(if $(wildcard $(DEMO)),--force) $(ARGS)

.PHONY: test
test: $(DEV) ## set up and run every test that needs no GPU
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -m "not gpu and not proof" -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: gpu-test
gpu-test: $(DEV) ## the tests and bench rows that need a GPU
	$(BIN)/pytest tests benchmarks -m gpu $(ARGS)

.PHONY: proof
proof: $(DEV) ## the full matrix of expensive proofs; writes tests/export/proofs.json
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -m proof -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: bench
bench: $(DEV) ## the benchmark suite; results under benchmarks/results
	$(BIN)/pytest $(BENCH) -m "not gpu" $(ARGS)

.PHONY: lint
lint: $(DEV) ## ruff, ruff format, mypy, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

.PHONY: format
format: $(DEV) ## apply ruff's fixes and its formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: docs
docs: $(DEV) ## build the documentation strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: install
install: $(DEV) ## only set up .venv

.PHONY: clean
clean: ## remove what was built: outputs of the demo, site, caches (.venv stays)
	rm -rf $(DEMO) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find $(wildcard ultrazoo tests benchmarks plugins docs) -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)

# uv is installed into .venv by pip, once; an environment whose interpreter is gone is made anew
$(UV): constraints.txt
	@set -e; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
	  for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "no Python 3.11, 3.12 or 3.13 found; name one: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	  echo "making $(VENV) with $$found"; \
	  "$$found" -m venv --clear $(VENV) || { echo "$$found cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }; \
	fi; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	@touch $@

$(CORE): pyproject.toml constraints.txt | $(UV)
	$(INSTALL) --editable .
	@touch $@

# the plain editable install is part of this one, so the demo needs nothing more after it
$(DEV): pyproject.toml constraints.txt | $(UV)
	$(INSTALL) --editable '.[dev,docs]'
	@touch $(CORE) $@
