# Every command that people and CI run. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
CLUSTER := PYTHONPATH=e2e $(PYTHON) -m octavo_cluster
# A CPU build of torch beside the checkout saves the download of the CUDA build; without it everything works, only slower.
WHEELS := $(wildcard ../shared/wheels)
# What the CPU library is made of: built into the checkout when the environment is set up.
NATIVE := $(wildcard engine/octavo_engine/cpu/native/*) engine/octavo_engine/cpu/variants.py
PIP_COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --all-extras --group dev --universal --python-version 3.11 --no-header --no-annotate

.PHONY: help
help: ## Say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.stamp: pyproject.toml constraints.txt hatch_build.py $(NATIVE)
	@echo "==> Python environment in $(VENV)"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Octavo needs Python 3.11 or newer; python3 is $$(python3 --version)"; exit 1; }
	@[ -x $(VENV)/bin/pip ] || python3 -m venv $(VENV) || { rm -rf $(VENV); apt-get update -qq && apt-get install -y -qq python3-venv && python3 -m venv $(VENV); }
	@$(VENV)/bin/pip install --quiet --constraint constraints.txt uv
	@$(VENV)/bin/uv pip install --python $(PYTHON) $(addprefix --find-links ,$(WHEELS)) --constraint constraints.txt --editable '.[engine,operator,otel]' --group dev
	@touch $@

.PHONY: venv
venv: $(VENV)/.stamp ## Set up .venv with both halves, editable, and the development tools

.PHONY: demo
demo: venv ## From nothing to an answer streamed out of a real pod on a real cluster
	@$(CLUSTER) demo

.PHONY: demo-down
demo-down: venv ## Take the cluster down and leave nothing of it
	@$(CLUSTER) down

.PHONY: run
run: venv ## Chat with the demo model on the terminal, no cluster
	@$(CLUSTER) model
	@$(VENV)/bin/octavo run smollm2

.PHONY: prepare
prepare: venv ## What the tests and the demo need: programs, images, the model
	@$(CLUSTER) prepare

.PHONY: test
test: venv ## Everything CI runs: lint, unit, API server, e2e on a real cluster
	@$(MAKE) --no-print-directory --jobs=2 lint prepare
	@$(PYTHON) -m pytest --numprocesses=2 --dist=loadscope

.PHONY: test-unit
test-unit: venv ## Only the tests that need neither the model nor an API server nor a cluster
	@$(PYTHON) -m pytest -m "not model and not apiserver and not e2e and not long"

.PHONY: test-long
test-long: venv ## The campaigns that take longer than CI has
	@$(PYTHON) -m pytest -m long -s

.PHONY: test-kernels
test-kernels: venv ## The whole sweep of the GPU kernels: interpreted, and compiled for every GPU (without one)
	@$(PYTHON) -m pytest --numprocesses=2 --dist=loadscope -m kernels tests/engine/kernels

.PHONY: bench
bench: venv ## Octavo beside llama.cpp, vLLM and transformers on this machine (sets them up at first; ARGS=--help)
	@PYTHONPATH=e2e:benchmarks $(PYTHON) -m octavo_bench $(ARGS)

.PHONY: gpu-acceptance
gpu-acceptance: venv ## Kernels, ranks, throughput and decode on this machine's GPUs, with a report (ARGS=--dry-run: without)
	@PYTHONPATH=e2e:benchmarks $(PYTHON) benchmarks/gpu_acceptance.py $(ARGS)

.PHONY: lint
lint: venv ## ruff, mypy strict, import-linter, generated files up to date
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/mypy tests e2e manifests/generate.py docs/generate_options.py docs/generate_kernels.py docs/generate_operator.py benchmarks/gpu_acceptance.py
	@$(VENV)/bin/lint-imports
	@$(PYTHON) -m octavo_operator.api.crd --check

.PHONY: format
format: venv ## Format and fix what ruff can fix
	@$(VENV)/bin/ruff check --fix
	@$(VENV)/bin/ruff format

.PHONY: generate
generate: venv ## Write the generated files anew (CRD, chart template, manifests, pages of docs)
	@$(PYTHON) -m octavo_operator.api.crd
	@PYTHONPATH=e2e $(PYTHON) manifests/generate.py
	@$(PYTHON) docs/generate_options.py
	@$(PYTHON) docs/generate_kernels.py
	@$(PYTHON) docs/generate_operator.py

.PHONY: lock
lock: venv ## Resolve the newest versions, at least a week old, into constraints.txt
	@{ echo '# Every version that Octavo is built and tested with; written by `make lock`, read by every install as --constraint.'; \
	   $(PIP_COMPILE) --upgrade --exclude-newer "$$(date -u -d '7 days ago' +%F)" --quiet; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt

.PHONY: clean
clean: ## Remove .venv and what the tools cached in the checkout
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
