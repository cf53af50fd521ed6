# make demo     the whole pipeline on the bundled graph, with a summary at the end
# make test     every test but the longest (make test-long)
# make ui       Dagster on http://127.0.0.1:3000, MLflow on :5000, the explorer on :8000
# make docs     the documentation as a site, in site/
# `make help` lists the rest. Variables: UI_PORT=…, MLFLOW_PORT=…, SERVICE_PORT=…, VARIANT=gpu, PYTHON=…, TORCH_INDEX_URL=…, TWHIN_HOME=…, TWHIN_CONFIG=…

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-gpu bench ui mlflow lint docs constraints reference chromium debian clean clean-venv

VARIANT ?= cpu
TWHIN_HOME ?= .twhin
SNAPSHOT ?= 2025-08-09
UI_PORT ?= 3000
MLFLOW_PORT ?= 5000
SERVICE_PORT ?= 8000
export VARIANT PYTHON TORCH_INDEX_URL
# Dagster's and MLflow's processes run in other folders, so they get whole paths.
export TWHIN_HOME := $(if $(findstring ://,$(TWHIN_HOME)),$(TWHIN_HOME),$(abspath $(TWHIN_HOME)))
# Dagster's own state is always on this machine, also where the tables are not.
export DAGSTER_HOME ?= $(if $(findstring ://,$(TWHIN_HOME)),$(abspath .twhin),$(TWHIN_HOME))/dagster_home
BIN := .venv/bin
# A file's tests stay together, since they share what one of them has made. A worker takes some 3 GiB with what it starts.
# In the order of their names: files of many tests first would leave the few long ones for the end, one worker waiting.
SIDE_BY_SIDE ?= --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
READY := .venv/ready-$(VARIANT)

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## Make .venv with the pinned dependencies (once; again when they change)
	@:

$(READY): pyproject.toml constraints/$(VARIANT).txt packaging/setup.sh packaging/fbgemm-gpu/pyproject.toml \
		packaging/explorer.sh packaging/explorer/package.json packaging/explorer/scatterplot.js
	@rm -f .venv/ready-*
	@printf 'Setting up .venv (%s); its log is .venv/setup.log\n' "$(VARIANT)"
	@packaging/setup.sh
	@touch $@

$(DAGSTER_HOME)/dagster.yaml: resources/dagster.yaml
	@mkdir -p $(DAGSTER_HOME)
	@cp resources/dagster.yaml $@

demo: $(READY) $(DAGSTER_HOME)/dagster.yaml ## The whole pipeline on the bundled graph (SNAPSHOT=2025-08-09), then a summary
	@$(BIN)/python scripts/demo.py --snapshot $(SNAPSHOT)

test: $(READY) chromium debian ## Every test but those of `test-long` and `test-gpu`
	@$(BIN)/python -m pytest -q --durations=10 $(SIDE_BY_SIDE) $(PYTEST)

test-long: $(READY) debian ## The wheel with each extra in fresh environments (needs pip's index); sixty days in a row
	@$(BIN)/python -m pytest -q -m long --durations=10 $(PYTEST)

test-gpu: $(READY) ## Training and evaluation on a GPU beside those on the CPU (VARIANT=gpu; needs a GPU)
	@$(BIN)/python -m pytest -q -m gpu --durations=10 $(PYTEST)

bench: $(READY) ## Training steps beside the published model's: fails where ours became slower
	@$(BIN)/python benchmarks/published.py --edges 4000000 --batch 32000 --least-share .5

chromium:
	@packaging/chromium.sh

debian:
	@packaging/debian.sh

ui: $(READY) $(DAGSTER_HOME)/dagster.yaml ## Dagster, MLflow and the explorer (UI_PORT=3000, MLFLOW_PORT=5000, SERVICE_PORT=8000)
	@exec $(BIN)/python scripts/ui.py --dagster-port $(UI_PORT) --mlflow-port $(MLFLOW_PORT) --service-port $(SERVICE_PORT)

mlflow: $(READY) ## MLflow's UI alone (MLFLOW_PORT=5000)
	@exec $(BIN)/twhin mlflow --host 127.0.0.1 --port $(MLFLOW_PORT)

lint: $(READY) ## Style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY) ## The documentation as a site in site/, without a network; every broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html"

reference: $(READY) ## Write docs/reference/configuration.md and command-line.md from the code's own descriptions
	@$(BIN)/twhin config --reference > docs/reference/configuration.md
	@$(BIN)/python scripts/command_line_page.py > docs/reference/command-line.md

constraints: $(READY) ## Pin what .venv holds
	@packaging/constraints.sh

clean: ## Remove caches (tables in $TWHIN_HOME stay)
	@rm -rf .pytest_cache .mypy_cache .ruff_cache build dist site
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-venv: ## Remove .venv
	@rm -rf .venv
