# make quickstart                  train the tiny policy with PR2 on two CPU cores, rollouts by the embedded engine
# make quickstart ENGINE=sglang    the same, rollouts by a real SGLang server
# make test                        linters and every test: SGLang in both releases that are supported, verl in its own environment
# make test-fast                   linters and the tests of a few minutes: no SGLang, no whole training runs, some of the layouts
# make test-verl                  the tests of the verl integration, in an environment of their own, VENV-verl
# make sglang-0.5.19               a second environment, VENV-sglang-0.5.19, with a server of that release alone
# Settings: VENV (environment, .venv), RUN (run directory, runs/quickstart), ENGINE, ARGS (key=value ...), PYTHON.

PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
ENGINE ?= megatron
ARGS ?=
PYTEST_ARGS ?=

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
PIP := $(VENV)/bin/python $(PIP_INSTALL)
# Servers of an older release run in an environment of their own, which knows nothing of Megatron-Core.
VENV_0519 := $(VENV)-sglang-0.5.19
# verl wants an older Transformers than SGLang.
VENV_VERL := $(VENV)-verl
# A stamp carries the hash of what it installed: changed pins install again, anything else does not.
hash = $(shell cat $(1) | sha256sum | cut -c1-12)
BASE := $(VENV)/.base-$(call hash,requirements/base.txt setup.py)
SGLANG := $(VENV)/.sglang-$(call hash,requirements/base.txt requirements/sglang.txt requirements/sglang-nodeps.txt)
SGLANG_0519 := $(VENV_0519)/.sglang-$(call hash,requirements/sglang-0.5.19.txt requirements/sglang-0.5.19-nodeps.txt)
VERL := $(VENV_VERL)/.verl-$(call hash,requirements/verl.txt setup.py)
DEV := $(VENV)/.dev-$(call hash,requirements/dev.txt requirements/dev-nodeps.txt)
ENVIRONMENT := $(BASE) $(if $(filter sglang,$(ENGINE)),$(SGLANG))

export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1
export MEGATRON_PR2_SGLANG_0519 := $(abspath $(VENV_0519)/bin/python)

.PHONY: quickstart test test-fast test-verl lint clean sglang-0.5.19

quickstart: $(ENVIRONMENT)
	$(VENV)/bin/megatron-pr2 train --config examples/quickstart.yaml run=$(RUN) rollout.engine=$(ENGINE) $(ARGS)

# The second run tells its result even if the first one fails.
test: $(BASE) $(SGLANG) $(SGLANG_0519) $(VERL) $(DEV)
	$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest --durations 25 $(PYTEST_ARGS); status=$$?; $(MAKE) --no-print-directory test-verl && exit $$status

test-verl: $(VERL)
	$(VENV_VERL)/bin/python -m pytest tests/verl tests/test_cluster_examples.py

test-fast: $(BASE) $(DEV)
	$(MAKE) --no-print-directory lint
	$(VENV)/bin/python -m pytest -m "not slow and not sglang" $(PYTEST_ARGS)

lint: $(BASE) $(DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

sglang-0.5.19: $(SGLANG_0519)

clean:
	rm -rf $(VENV) $(VENV_0519) $(VENV_VERL) build *.egg-info

$(VENV)/bin/python $(VENV_0519)/bin/python $(VENV_VERL)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)

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

$(SGLANG_0519): | $(VENV_0519)/bin/python
	@echo "installing SGLang 0.5.19 into $(VENV_0519) (about two minutes)"
	$(VENV_0519)/bin/python $(PIP_INSTALL) --no-deps --requirement requirements/sglang-0.5.19-nodeps.txt
	$(VENV_0519)/bin/python $(PIP_INSTALL) --requirement requirements/sglang-0.5.19.txt
	touch $@

$(VERL): | $(VENV_VERL)/bin/python
	@echo "installing verl 0.9.1 into $(VENV_VERL) (about three minutes)"
	$(VENV_VERL)/bin/python $(PIP_INSTALL) --requirement requirements/verl.txt
	$(VENV_VERL)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(DEV): | $(VENV)/bin/python
	$(PIP) --requirement requirements/dev.txt
	$(PIP) --no-deps --requirement requirements/dev-nodeps.txt
	touch $@
