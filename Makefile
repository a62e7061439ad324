# make quickstart                  train the tiny policy with PR2 on two CPU cores, rollouts by the embedded engine
# make quickstart ENGINE=sglang    the same, rollouts by a real SGLang server from an environment of its own
# make test                        linters and the tests of every change: Megatron-Core 0.19, SGLang in both releases, verl
# make test-all                    every test, also on older releases of Megatron-Core and with other CPU kernels
# make test-fast                   linters and the tests of a few minutes: no SGLang, no whole training runs, some of the layouts
# make test-core|test-sglang|test-verl|test-exhaustive|test-megatron|test-numerics    one part of these (docs/testing.md)
# make sglang                      the environments of SGLang servers, VENV-sglang and VENV-sglang-0.5.19
# make lock                        pins everything that pyproject.toml asks for
# Settings: VENV (environment, .venv), RUN (run directory, runs/quickstart), ENGINE, ARGS (key=value ...), PYTEST_ARGS, and PYTHON:
# by default the first interpreter that runs and is 3.12 or newer (tools/find_python.sh).

VENV ?= .venv
RUN ?= runs/quickstart
ENGINE ?= megatron
ARGS ?=
PYTEST_ARGS ?=
PYTHON ?=

UV_VERSION := 0.13.9
UV := $(VENV)-uv/bin/uv
# Servers and verl run in environments of their own: each wants another Transformers, and servers know nothing of Megatron-Core.
VENV_SGLANG := $(VENV)-sglang
VENV_0519 := $(VENV)-sglang-0.5.19
VENV_VERL := $(VENV)-verl
# A stamp carries the hash of what it installed: changed pins install again, anything else does not.
LOCK := requirements/pyproject.toml
HASH := $(shell cat $(LOCK) pyproject.toml | sha256sum | cut -c1-12)
TRAINER := $(VENV)/.trainer-$(HASH)
TEST := $(VENV)/.test-$(HASH)
SGLANG := $(VENV_SGLANG)/.sglang-$(HASH)
SGLANG_0519 := $(VENV_0519)/.sglang-0519-$(HASH)
VERL := $(VENV_VERL)/.verl-$(HASH)

export OMP_NUM_THREADS := 1
# uv leaves compiling to the first import; where writing is forbidden, every process would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_OFFLINE := 1
export MEGATRON_PR2_SGLANG_0519 := $(abspath $(VENV_0519)/bin/python)

.PHONY: quickstart test test-all test-fast test-core test-sglang test-verl test-exhaustive test-megatron test-numerics lint lock sglang clean

quickstart: $(TRAINER) $(if $(filter sglang,$(ENGINE)),$(SGLANG))
	$(VENV)/bin/megatron-pr2 train --config examples/quickstart.yaml run=$(RUN) rollout.engine=$(ENGINE) $(ARGS)

# Two lanes for two cores; each tells its result even if another one fails, and its lines say whose they are.
LANES := $(MAKE) --no-print-directory --keep-going --jobs 2 IN_LANE=1
PYTEST := -m pytest --durations 20
NAMED = $(if $(IN_LANE),2>&1 | sed --unbuffered 's/^/$(@:test-%=%): /')
SHELL := bash
.SHELLFLAGS := -o pipefail -c

test: lint
	$(LANES) test-core test-sglang test-verl

test-core: $(TEST)
	$(VENV)/bin/python $(PYTEST) -m "not sglang and not exhaustive" $(PYTEST_ARGS) $(NAMED)

test-sglang: $(TEST) $(SGLANG) $(SGLANG_0519)
	$(VENV)/bin/python $(PYTEST) -m "sglang and not exhaustive" $(PYTEST_ARGS) $$(grep -rl mark.sglang tests --include='test_*.py') $(NAMED)

test-verl: $(VERL) $(SGLANG_0519)
	$(VENV_VERL)/bin/python $(PYTEST) tests/verl tests/test_cluster_examples.py $(NAMED)

test-exhaustive: $(TEST) $(SGLANG) $(SGLANG_0519)
	$(VENV)/bin/python $(PYTEST) -m exhaustive $(PYTEST_ARGS) $(NAMED)

test-megatron: $(TEST)
	$(VENV)/bin/python tools/megatron_releases.py $(ARGS) $(NAMED)

# Files whose numbers other kernels, or another order of additions, would move.
NUMERICAL := $(addprefix tests/,prediction/test_predictor.py rl/test_losses.py drift/test_metrics.py prediction/test_fast_paths.py \
	replay/test_router.py prediction/test_optimizer_moments.py test_invariants.py replay/test_replay.py prediction/test_hold_back.py \
	checkpoint/test_pr2_checkpoint.py hf/test_bridge.py hf/test_models.py rl/test_multiturn.py replay/test_tokens_per_sample.py \
	rl/test_old_logprobs.py rl/test_warmstart.py host/test_attention.py host/test_layouts.py parallel/test_matrix.py)
test-numerics: $(TEST)
	ATEN_CPU_CAPABILITY=default $(VENV)/bin/python $(PYTEST) $(NUMERICAL) $(NAMED)
	ATEN_CPU_CAPABILITY=avx2 $(VENV)/bin/python $(PYTEST) $(NUMERICAL) $(NAMED)
	OMP_NUM_THREADS=2 $(VENV)/bin/python $(PYTEST) $(NUMERICAL) $(NAMED)

test-all: test
	$(LANES) test-exhaustive test-megatron test-numerics

test-fast: lint
	$(VENV)/bin/python -m pytest -m "not slow and not exhaustive and not sglang" $(PYTEST_ARGS)

lint: $(TEST)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/python tools/rooms.py --check
	$(VENV)/bin/python tools/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet

sglang: $(SGLANG) $(SGLANG_0519)

lock: $(UV)
	$(VENV)-uv/bin/python tools/lock.py --uv $(UV) $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-uv .venv-megatron $(VENV_SGLANG) $(VENV_0519) $(VENV_VERL) build *.egg-info

$(UV):
	@python=$$(PYTHON="$(PYTHON)" tools/find_python.sh) && "$$python" -m venv $(VENV)-uv
	$(VENV)-uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# $(call install,environment,group of the lock,what else): one environment, or what is missing in it.
define install
@echo "installing $(2) into $(1)"
test -e $(1)/bin/python || $(UV) venv --quiet --python $(VENV)-uv/bin/python $(1)
$(UV) pip install --quiet --python $(1)/bin/python --no-deps --group $(LOCK):$(2)
$(if $(3),$(UV) pip install --quiet --python $(1)/bin/python --no-deps --no-build-isolation --editable .)
@rm -f $(1)/.$(2)-*
@touch $@
endef

$(TRAINER): | $(UV)
	$(call install,$(VENV),trainer,editable)

$(TEST): $(TRAINER)
	$(call install,$(VENV),test)

$(SGLANG): | $(UV)
	$(call install,$(VENV_SGLANG),sglang)

$(SGLANG_0519): | $(UV)
	$(call install,$(VENV_0519),sglang-0519)

$(VERL): | $(UV)
	$(call install,$(VENV_VERL),verl,editable)
