# `make demo` and `make test` do all the set-up a fresh machine needs, once; after that they start at once.
PYTHON ?= python3
# What is installed where no torch is found. For another build: make install TORCH="torch==2.13.0 --index-url ADDRESS" (see README.md)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-llm test stress quality shape clean

help:
	@echo "make demo      convert, tune and decode the small model that ships with this project; runs/demo/report.json"
	@echo "make demo-llm  the same and more with a real LLM of 135M parameters, a quarter of an hour; runs/demo-llm/report.json"
	@echo "make test      all tests, on the CPU"
	@echo "make stress    thousands of damaged files, two hundred kill -9, thousands of mixtures and calibrations, an hour; docs/stress.md"
	@echo "make quality   ruff and mypy"
	@echo "make shape     prints long files, long functions and crowded folders"
	@echo "make install   only the set-up: everything in $(VENV)"
	@echo "make clean     removes $(VENV) and what the tools cached; runs/ stays"

install: $(STAMP)

# An installed torch is used as it is (the NVIDIA image has its own build); only where there is none, a pinned one comes in.
$(STAMP): setup.py
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/ee-tuning demo

demo-llm: $(STAMP)
	$(BIN)/ee-tuning demo --llm

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

stress: $(STAMP)
	$(BIN)/python tests/stress/run.py --output docs/stress.md

quality: $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

shape: $(STAMP)
	$(BIN)/python tools/shape.py

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
