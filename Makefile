# make quickstart   photos -> teacher -> four-step student -> report, in minutes on two CPU cores
# make test         the whole suite
#
# Both need nothing but Python and pip: they make .venv and install into it, once per pyproject.toml.
# To choose the interpreter: make test PYTHON=/path/to/python3.12
.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format clean

VENV := .venv
BIN := $(VENV)/bin

help:  ## Show what can be made.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed-dev  ## Make .venv with everything for users, trainers and developers.

quickstart: $(VENV)/.installed-quickstart  ## Train, distil, export and use a small model; writes outputs/quickstart/report.html.
	$(BIN)/python -m ksr_distill.quickstart

test: $(VENV)/.installed-dev  ## Run the whole test suite.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev  ## Run every check of pre-commit on every file.
	$(BIN)/pre-commit run -a

format: $(VENV)/.installed-dev  ## Format the code in place.
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:  ## Remove .venv, caches and the quickstart's outputs; other outputs stay.
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache outputs/quickstart
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp a set of extras: pip runs again only when pyproject.toml is newer.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS_$*)]'
	@touch $(VENV)/.installed-quickstart $@

EXTRAS_dev := dev,quickstart
EXTRAS_quickstart := quickstart

# The first interpreter of a version that pyproject.toml allows.
$(BIN)/python:
	@for python in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python from 3.11 to 3.13 with venv among: $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); name one: make PYTHON=/path/to/python" >&2; exit 1
