# PROFILE=cpu|gpu chooses vLLM's build; by default what the machine has.
PROFILE ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed-$(PROFILE)

.PHONY: demo test test-slow test-cluster gpu-check lint setup
demo: setup            ## three SPIN iterations on the embedded model and data
	$(BIN)/python -m spin_ray run conf/demo.yaml

test: setup            ## every test
	$(BIN)/python -m pytest

test-slow: setup       ## tests that take minutes and rarely break; CONTRIBUTING.md says when they last ran
	$(BIN)/python -m pytest -m slow

test-cluster: setup    ## a job over several hosts, which are made of namespaces (root, Linux), and what may happen to them
	$(BIN)/python -m pytest tests/cluster -m "slow or not slow"

gpu-check:             ## on a machine with a GPU, with whatever is installed: torch and transformers are enough for half of it
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m spin_ray bench gpu

lint: setup            ## style and the things ruff knows to be wrong
	$(BIN)/ruff check .

setup: $(STAMP)        ## .venv with everything; seconds when nothing changed

$(STAMP): pyproject.toml
	@PYTHON=$(PYTHON) PROFILE=$(PROFILE) ./cluster/setup.sh
	@touch $@
