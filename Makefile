# SPDX-License-Identifier: Apache-2.0
# Every target sets itself up on a fresh machine (Python 3.11 with pip, a C++ compiler); see README.md.

SHELL := /bin/bash
VENV := .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH := 2.13.0
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Named after the contents of what it depends on, not their dates: a checkout that changes nothing installs nothing.
STAMP := $(VENV)/.stamp-$(shell cat requirements/*.txt setup.py tools/install_torch.sh Makefile | sha256sum | cut -c1-16)

# Workers share the cores instead of each claiming its own; 1 GiB of KV cache each; nothing is looked up or reported outside.
export VLLM_CPU_OMP_THREADS_BIND ?= nobind
export VLLM_CPU_KVCACHE_SPACE ?= 1
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1

.PHONY: help demo test lint venv clean

help:
	@echo "make demo   serve a long and four short requests with --nanocp and with stock vLLM, and compare (minutes)"
	@echo "make test   lint and all tests"
	@echo "make lint   ruff and mypy"
	@echo "make venv   only create $(VENV)"
	@echo "make clean  remove $(VENV), the demo's model and caches"

demo: $(STAMP)
	$(VENV)/bin/python examples/demo.py $(DEMO_ARGS)

# Engines, which are tested first, leave half of two cores idle: lint takes a part of that.
test: $(STAMP)
	nice -n 10 $(MAKE) --no-print-directory lint & lint=$$!; \
	$(VENV)/bin/python -m tools.run_tests $(TEST_ARGS); tests=$$?; wait $$lint && exit $$tests

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

venv: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "Python 3.11 with venv is needed: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@echo "setting up $(VENV): about 160 packages, 1 GB to download; takes a few minutes"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-deps -r requirements/cpu.txt -r requirements/dev.txt -r requirements/no-deps.txt
	tools/install_torch.sh $(VENV)/bin/python $(TORCH)
	$(PIP) install -q --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.stamp-*
	touch $@

clean:
	rm -rf $(VENV) .model build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
