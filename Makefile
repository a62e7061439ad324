# make quickstart                  train the tiny policy with PR2 on two CPU cores, rollouts by the embedded engine
# make quickstart ENGINE=sglang    the same, rollouts by a real SGLang server
# make test                        linters and every test, SGLang included
# make test-fast                   linters and the tests of a few minutes: no SGLang, no whole training runs, some of the layouts
# Settings: VENV (environment, .venv), RUN (run directory, runs/quickstart), ENGINE, ARGS (key=value ...), PYTHON.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ENGINE ?= megatron
ARGS ?=
PYTEST_ARGS ?=

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# A stamp carries the hash of what it installed: changed pins install again, anything else does not.
hash = $(shell cat $(1) | sha256sum | cut -c1-12)
BASE := $(VENV)/.base-$(call hash,requirements/base.txt setup.py)
SGLANG := $(VENV)/.sglang-$(call hash,requirements/base.txt requirements/sglang.txt requirements/sglang-nodeps.txt)
DEV := $(VENV)/.dev-$(call hash,requirements/dev.txt)
ENVIRONMENT := $(BASE) $(if $(filter sglang,$(ENGINE)),$(SGLANG))

export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test test-fast lint clean

quickstart: $(ENVIRONMENT)
	$(VENV)/bin/megatron-pr2 train --config examples/quickstart.yaml run=$(RUN) rollout.engine=$(ENGINE) $(ARGS)

test: $(BASE) $(SGLANG) $(DEV)
	$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-fast: $(BASE) $(DEV)
	$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest -m "not slow and not sglang" $(PYTEST_ARGS)

lint: $(BASE) $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(BASE): | $(VENV)/bin/python
	@echo "installing Megatron-Core, Transformers and what they need into $(VENV) (about two minutes)"
	$(PIP) --requirement requirements/base.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

$(SGLANG): $(BASE)
	@echo "installing SGLang into $(VENV) (about a minute)"
	$(PIP) --no-deps --requirement requirements/sglang-nodeps.txt
	$(PIP) --requirement requirements/sglang.txt --constraint requirements/base.txt
	touch $@

$(DEV): | $(VENV)/bin/python
	$(PIP) --requirement requirements/dev.txt
	touch $@
