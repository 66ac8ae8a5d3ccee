# Two commands do all the set-up: `make up` (train, export, serve) and `make test`.
# PORT=8000 moves the service, STEPS=1000 shortens or lengthens training, PYTHON= names the interpreter,
# BENCH=--quick gives arguments to `make bench`,
# TORCH_INDEX= names another package index for torch (PyTorch's CPU index saves gigabytes on x86-64 Linux).

PYTHON ?= python3
PORT ?= 8000
STEPS ?= 1000
VENV ?= .venv
ARTIFACTS ?= artifacts
TORCH_INDEX ?=
BENCH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ACTUARY := $(BIN)/actuary
CHECKPOINTS := $(ARTIFACTS)/checkpoints
BUNDLES := $(ARTIFACTS)/bundles
OPS := $(ARTIFACTS)/ops
# A stamp for each length: other STEPS go through `actuary train`, which keeps what fits and refuses what does not.
TRAINED := $(CHECKPOINTS)/.trained-$(STEPS)
EXPORTED := $(BUNDLES)/.exported

.PHONY: up install test lint format docs train export ops serve load bench gpu-check clean help
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## What each target does
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

up: $(EXPORTED) ops serve ## Virtual environment, install, train the default set, export, build the fused operators, serve

# torch comes first and by its exact version: what depends on it would pull another build.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) else f"Actuary needs Python 3.11 or newer, $(PYTHON) is {v}; name another with: make up PYTHON=python3.12")'
	@echo "installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --editable '.[train,serve,load,study]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[train,serve,load,study,dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) --editable '.[train,serve,load,study,bench]'
	@touch $@

$(TRAINED): models/activations.py | $(VENV)/.installed
	$(ACTUARY) train --steps $(STEPS) --out $(CHECKPOINTS)
	@touch $@

$(EXPORTED): $(TRAINED) | $(VENV)/.installed
	$(ACTUARY) export $(CHECKPOINTS) --out $(BUNDLES)
	@touch $@

# Without a compiler there is no library, and everything runs all the same. Touched where nothing had to be built, so that
# the next `make up` need not look.
$(OPS)/library.json: models/activations.py $(wildcard export/ops/*.py export/ops/native/*) | $(VENV)/.installed
	@$(ACTUARY) ops build --out $(OPS) && touch $@ || \
	  echo "going on without a new build: with the fused operators in $(OPS), if any; else activations run inlined, slower and with the same numbers"

install: $(VENV)/.installed ## Virtual environment and packages alone

ops: $(OPS)/library.json ## Compile the fused operators, where they are not there

train: $(TRAINED) ## Train the default set, where it is not there

export: $(EXPORTED) ## Export what was trained, where it is not there

serve: | $(VENV)/.installed ## Serve what was exported
	$(ACTUARY) serve --bundles $(BUNDLES) --ops $(OPS) --compare $(ARTIFACTS)/compare --port $(PORT)

load: | $(VENV)/.installed ## Load on the running service, one row per variant
	$(ACTUARY) load --url http://127.0.0.1:$(PORT)

bench: $(OPS)/library.json $(VENV)/.installed-bench ## Our server against other engines, 40 minutes; stopped, it goes on. BENCH=--quick gives arguments
	$(ACTUARY) bench serve --ops $(OPS) --out $(ARTIFACTS)/bench-serve $(BENCH)

# Three at a time: with two, a quarter of two cores waits for servers, browsers and the disk.
test: $(VENV)/.installed-dev ## Every test that this machine can run
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

gpu-check: $(VENV)/.installed-dev ## On a CUDA device: check and measure the fused operators, write a section for docs/log.md
	$(BIN)/python -m export.ops.gpu_check --out $(ARTIFACTS)/gpu-check

lint: $(VENV)/.installed-dev ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## Let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev ## Write the generated parts of the documents anew
	$(BIN)/python docs/generate.py

clean: ## Remove what was trained, exported and installed
	rm -rf $(ARTIFACTS) $(VENV) build *.egg-info
