# Every target is one `mlfusion` command in a ready environment. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin

MODEL ?=
DATASET ?=
RECIPE ?= pipelines/default.toml
DATA ?=
RESULTS ?= results
HTML ?= $(RESULTS)/report.html
MINUTES ?= 60
ARGS ?=

# Words are handed on only where they were given: the command line knows the defaults.
model = $(if $(MODEL),--model '$(MODEL)')
dataset = $(if $(DATASET),--dataset '$(DATASET)')

.DEFAULT_GOAL := help
.PHONY: help setup demo study extract probe run report models datasets test test-all coverage check format clean

help: ## list the targets
	@echo "make TARGET [MODEL=…] [DATASET=…] [RECIPE=…] [DATA=…] [ARGS='…']"; echo
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: .venv/.ready ## make .venv with everything installed; does nothing when it is up to date

.venv/.ready: pyproject.toml constraints.txt mlfusion/probing/heads/kernels.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mlfusion needs Python 3.11 or newer: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[report,fast,tensorboard,dev]'
	@touch $@

demo: setup ## both stages on the embedded model and images, offline; ends with a report
	HF_HUB_OFFLINE=1 $(BIN)/mlfusion run pipelines/default.toml --results '$(RESULTS)' $(ARGS)

study: setup ## two models, six data sets, ten probes, five seeds, and their page     DATA=
	HF_HUB_OFFLINE=1 $(BIN)/mlfusion run pipelines/study.toml $(if $(DATA),--data '$(DATA)') --results '$(RESULTS)' --markdown docs/measurements/study.md $(ARGS)

extract: setup ## stage 1: cache a frozen model's tokens       MODEL= DATASET=
	$(BIN)/mlfusion extract $(model) $(dataset) $(ARGS)

probe: setup ## stage 2: probes on cached tokens             DATASET= MODEL=
	$(BIN)/mlfusion probe $(model) $(dataset) --results '$(RESULTS)' $(ARGS)

run: setup ## both stages and the report, by a recipe     RECIPE=
	$(BIN)/mlfusion run '$(RECIPE)' --results '$(RESULTS)' $(ARGS)

report: setup ## a page and a table of all results            RESULTS= HTML=
	$(BIN)/mlfusion report '$(RESULTS)' --html '$(HTML)' $(ARGS)

models: setup ## the catalogue of models
	@$(BIN)/mlfusion ls models

datasets: setup ## the catalogue of data sets
	@$(BIN)/mlfusion ls datasets

test: setup ## the tests that a user runs: under six minutes on two cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

test-all: setup ## the tests in their long forms: fuzzing, faults     MINUTES=
	MLFUSION_LONG='$(MINUTES)' $(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

coverage: setup ## the tests with the slow ones, and which lines they run; fails below the floor of pyproject.toml
	MLFUSION_SLOW=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --cov --cov-report=term-missing:skip-covered $(ARGS)

check: setup ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the environment; the cache and the results stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
