# From a bare machine (Python >= 3.11 with pip) to a demo or a test run. Everything is installed into $(VENV), nothing else.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
PYTEST_ARGS ?=

BIN := $(VENV)/bin
DEV := $(VENV)/.installed-dev
ALL := $(VENV)/.installed-all
INPUTS := pyproject.toml $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help install install-all demo test lint types clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "On a GPU machine: make CONSTRAINTS= demo   (pip then chooses torch itself)"

install: $(DEV)  ## create the virtual environment and install nestlearn with its development tools

install-all: $(ALL)  ## the same with the optional kernels, baselines and evaluation packages

demo: $(DEV)  ## train a small Hope on real text and show what it learnt
	$(BIN)/nestlearn demo --out runs/demo

test: $(DEV)  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

lint: $(DEV)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## check types
	$(BIN)/mypy

clean:  ## remove the virtual environment, caches and builds; runs/ stays
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems ship Python without the module that puts pip into a new environment; the outer pip then does it.
define make_venv
@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"nestlearn needs Python 3.11 or newer, $(PYTHON) is {v}. Choose another: make PYTHON=python3.12 ...")'
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	{ $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }
endef

define pip_install
$(BIN)/python -m pip install --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e
endef

$(DEV): $(INPUTS)
	$(make_venv)
	$(pip_install) '.[dev]'
	@touch $@

# The full set contains the development set, so it marks both as installed.
$(ALL): $(INPUTS)
	$(make_venv)
	$(pip_install) '.[dev,kernels,baselines,eval,serve]'
	@touch $(DEV) $@
