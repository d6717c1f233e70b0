# Every target does the set-up it needs; nothing outside this folder is touched except uv's cache.
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.DEFAULT_GOAL := help

export HF_HOME := $(CURDIR)/.cache/huggingface
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export OCTAVO_CACHE := $(CURDIR)/.cache/octavo
export PYRIGHT_PYTHON_CACHE_DIR := $(CURDIR)/.cache/pyright
export UV_PYTHON_DOWNLOADS := never

# uv from the PATH, or from the package index into .cache/
UV := $(or $(shell command -v uv),$(CURDIR)/.cache/uv/bin/uv)
PYTHON := .venv/bin/python
MEMBERS := $(patsubst %/pyproject.toml,%,$(wildcard shared/pyproject.toml packages/*/pyproject.toml))
PACKAGE ?= *
PROFILE ?= quick

.PHONY: help setup demo test lint bench docs dist dist-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(UV)  ## install everything into .venv/ (2 to 3 GB of downloads the first time)
	@git config filter.portable-lock.clean 'python3 .ci/lock.py clean' 2>/dev/null || true
	@git config filter.portable-lock.smudge cat 2>/dev/null || true
	@git config filter.portable-lock.required true 2>/dev/null || true
	@$(UV) sync --quiet --all-packages --extra lora --extra onnx --extra serve --extra jieba --group dev $(if $(wildcard .venv/compiled),,--compile-bytecode)
	@touch .venv/compiled 2>/dev/null || true
	@# git takes a file of another size for changed; staging the lock in step shows it the same
	@python3 .ci/lock.py check 2>/dev/null && git add uv.lock 2>/dev/null || true

$(CURDIR)/.cache/uv/bin/uv:
	@echo 'uv is not on the PATH: installing it into .cache/uv'
	@python3 -m venv .cache/uv
	@.cache/uv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check uv

demo: setup  ## run each package's demo (PACKAGE=name for one, PROFILE=full for the long one)
	@$(PYTHON) .ci/demo.py --packages '$(PACKAGE)' --profile $(PROFILE)

test: setup  ## run every test in two processes, with line coverage by member
	@.venv/bin/coverage erase
	@.venv/bin/coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder && .venv/bin/coverage combine --quiet && \
	for member in $(notdir $(wildcard shared/src/* packages/*/src/*)); do \
	  echo "coverage of $$member: $$(.venv/bin/coverage report --include="*/src/$$member/*" \
	    --format=total) %"; \
	  .venv/bin/coverage report --include="*/src/$$member/*" --fail-under=90 --skip-covered \
	    --show-missing > .cache/coverage.txt || { cat .cache/coverage.txt; exit 1; }; done

lint: setup  ## ruff format check, ruff, pyright
	@.venv/bin/ruff format --check --quiet . || { echo 'run: .venv/bin/ruff format .'; exit 1; }
	@.venv/bin/ruff check --quiet .
	@.venv/bin/pyright

bench: setup  ## run each package's benchmarks and write benchmarks/results/
	@shopt -s nullglob; for script in packages/$(PACKAGE)/benchmarks/bench_*.py; do $(PYTHON) $$script || exit 1; done

docs: setup  ## API pages from the docstrings, into docs/
	@.venv/bin/pdoc --docformat google --output-directory docs $(notdir $(wildcard shared/src/* packages/*/src/*))
	@echo docs/index.html

dist: setup  ## wheels of all members, into dist/
	@rm -rf dist && mkdir dist
	@for member in $(MEMBERS); do \
	  (cd $$member && $(CURDIR)/$(PYTHON) -m hatchling build -t wheel -d $(CURDIR)/dist) || exit 1; done

dist-check: dist  ## install each wheel into a truly empty environment and ask its command
	@for package in $(notdir $(filter packages/%,$(MEMBERS))); do \
	  rm -rf .cache/dist-check && python3 -m venv .cache/dist-check && \
	  .cache/dist-check/bin/python -m pip install --quiet --disable-pip-version-check \
	    dist/octavo-*.whl dist/$$package-*.whl && \
	  .cache/dist-check/bin/$$package --version && \
	  .cache/dist-check/bin/$$package --help >/dev/null || exit 1; done; rm -rf .cache/dist-check

clean:  ## remove what the targets made, except the committed files
	@rm -rf .venv .cache dist docs .pytest_cache .ruff_cache .hypothesis .coverage*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
