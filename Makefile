# The lab in one word each: `make` lists them. Needs Python 3.11 or newer and GNU make, nothing else.
#   make run METHOD=rf DATA=moons STEPS=500        make run ARGS="-p batch 64 -p lr 5e-4"        make explore PORT=8000
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup run train explore test test-all soak prepare bench clean

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PARAMS = $(foreach v,METHOD DATA STEPS,$(if $($v),-p $(shell echo $v | tr A-Z a-z) '$($v)'))
PARAMS += $(if $(filter command%,$(origin NAME)),-p name '$(NAME)')
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "  variables      METHOD DATA STEPS NAME (training), PORT (explorer), ARGS (anything else, passed on)"

setup: .venv/.stamp ## make .venv with everything in it, at the tested versions

# PyPI's torch for Linux brings gigabytes of CUDA libraries: make setup TORCH_INDEX=<PyTorch's CPU index> takes the CPU build first.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "cudlab needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing). Choose one with: make setup PYTHON=/path/to/python3"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "Python's venv module does not work here; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing into .venv, about two minutes the first time"
	@[ -z "$(TORCH_INDEX)" ] || pip install -q --disable-pip-version-check --index-url $(TORCH_INDEX) --no-deps -c constraints.txt torch
	@pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

run: STEPS ?= $(if $(filter dode,$(METHOD)),,2000)
run: train explore ## train (CUD on the digits unless told otherwise), then open the explorer on it

train: setup ## train through papermill nbs/train.ipynb; Ctrl-C stops it, resumable
	@python tools/job.py nbs/train.ipynb $(PARAMS) $(ARGS)

explore: setup ## serve the explorer on http://127.0.0.1:7860
	@python apps/explorer.py $(if $(PORT),--port $(PORT))

test: setup ## lint, notebooks, and the fast tests: 10 to 17 minutes on two cores
	@python tools/suite.py $(ARGS)

test-all: setup ## the same with the long tests: hundreds of kills, every method times every fault
	@python tools/suite.py --all $(ARGS)

soak: setup ## kill a training a hundred times at random moments; call the page a thousand times
	CUDLAB_KILLS=100 pytest -s -m "long or not long" -k "kills or soak" $(ARGS)

prepare: setup ## before a commit: export, clean, README, lint
	python tools/export.py
	nbdev-clean
	python tools/readme.py
	ruff check .
	ruff format .

bench: setup ## the speed figures of the README
	@for f in bench/*.py; do echo "== $$f"; python $$f; done

clean: ## remove caches and build products; keeps .venv, runs and data
	rm -rf .cache .gradio .hypothesis .pytest_cache .ruff_cache build dist runs/.jobs
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +
