# Needs Python 3.11 or newer, make and git; everything else goes into .venv.
PYTHON   ?= python3
PIP_ARGS ?=
JOBS     ?= 2
MARKS    ?= not slow and not wide
ARGS     ?=

VENV := .venv
BIN  := $(VENV)/bin
CORE := $(VENV)/.installed
DEV  := $(VENV)/.installed-dev
LOG  := $(VENV)/install.log
ALL  := .[test,dev]

# One thread a worker: results do not depend on the machine, and workers do not fight over the cores.
ALONE  := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(ALONE) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Cells that stand in this file and belong to the same source are not run again.
CELLS := .cache/conformance.jsonl
SUITE := tests/adapters/test_conformance.py tests/engine/processes/test_methods_together.py

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow conformance check format docs bench bench-methods clean

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

demo: $(CORE) ## from a question to a verdict on a real model and real data; the report is runs/demo/report.html
	@$(BIN)/tunesmith demo $(ARGS)

test: $(DEV) ## the tests (minutes); a part of them: make test ARGS="tests/data -k mask"
	@$(PYTEST) -m "$(MARKS)" $(ARGS)

test-slow: $(DEV) ## the tests that take longer
	@$(PYTEST) -m slow $(ARGS)

conformance: $(DEV) ## every adapter method on every family into docs/methods.md; goes on where it was stopped (ARGS="--methods lora")
	-@PYTHONPATH=tests $(PYTEST) --dist loadgroup -p recording --record $(CELLS) $(SUITE) $(ARGS)
	@$(BIN)/python docs/conformance.py $(CELLS)
	@$(PYTEST) tests/engine/test_compiling.py

check: $(DEV) ## format, lint, types, directions of imports
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(DEV) ## put the code in form
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: $(DEV) ## write the pages of docs/ that say what the code says
	@$(ALONE) $(BIN)/python docs/generate.py
	@$(ALONE) $(BIN)/python docs/conformance.py

bench: $(DEV) ## ours and a peer in turn, on the same work
	@$(BIN)/python benchmarks/run.py $(ARGS)

bench-methods: $(DEV) ## every adapter method on the same tasks; hours, goes on where it was stopped (ARGS="--budget-hours 1")
	@$(ALONE) PYTHONPATH=benchmarks $(BIN)/python -m methods $(ARGS)

venv: $(DEV) ## .venv with everything that tests and checks need

clean: ## remove .venv, caches and what was built; runs/ stays
	rm -rf $(VENV) .cache build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip's log goes to a file and what tells how far it is to the terminal; plain sh has no pipefail, hence the mark.
define install
@echo "installing $(2) into $(VENV), once"
@{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(PIP_ARGS) -e "$(1)" 2>&1 \
	|| touch $(VENV)/.failed; } | tee $(LOG) | awk '/^ *Downloading .*[0-9][0-9]\.[0-9] MB/ { print "  " $$2, $$3, $$4 } \
	/^Installing collected/ { print "  unpacking (packages: " NF - 3 ")" } { fflush() }'
@if [ -e $(VENV)/.failed ]; then rm -f $(VENV)/.failed; tail -n 20 $(LOG); \
	echo "The installation failed; its whole log is $(LOG)."; exit 1; fi
endef

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Tunesmith needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
		echo "  Name another one:  make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu:  apt install python3-venv"; exit 1; }

$(CORE): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,.,Tunesmith)
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call install,$(ALL),Tunesmith and its tools)
	@touch $(CORE) $@
