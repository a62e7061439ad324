"""What settings of `megatron-pr2 train` have to be, and which of them contradict each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import BRIDGES
from megatron_pr2.rl.task import LESSONS
from megatron_pr2.rl.tiny import TinyModelConfig

if TYPE_CHECKING:
    from megatron_pr2.config import PR2Config
    from megatron_pr2.rl.config import AlgorithmConfig, TrainConfig

SOURCES = ("recompute", "rollout", "ewma")
KINDS = ("none", "tis", "mis")
LEVELS = ("token", "sequence")
_DAPO, _GMPO = (0.2, 0.28), (1.0 - math.exp(-0.4), math.exp(0.4) - 1.0)
# clip_low and clip_high of each loss as published, GSPO's in its section 5.1. Masks are put on this trainer's GRPO, RSPO's weight
# on GMPO; CISPO has no lower bound, and no published upper one.
CLIP: dict[str, tuple[float, float | None]] = {
    "grpo": _DAPO, "gspo": (3e-4, 4e-4), "cispo": (1.0, None), "gmpo": _GMPO,
    "icepop": _DAPO, "kpop": _DAPO, "opsm": _DAPO, "rspo": _GMPO,
}  # fmt: skip

Rule = tuple[Callable[[Any], bool], str]


def _at_least(least: int) -> Rule:
    return lambda value: value >= least, f"at least {least}"  # NaN is not


def _one_of(*allowed: str) -> Rule:
    return lambda value: value in allowed, f"one of {', '.join(allowed)}"


def _or_null(right: Callable[[Any], bool], expected: str) -> Rule:
    return lambda value: value is None or right(value), f"{expected}, or null"


_UP_TO_ONE: Rule = (lambda value: 0.0 <= value < 1.0, "a number in [0, 1)")
# What a setting has to be, and how that is told.
_RULES: dict[str, Rule] = {
    **{name: _at_least(1) for name in ("steps", "checkpoint_every", "parallel.processes", "parallel.expert")},
    **{
        f"rollout.{name}": _at_least(1)
        for name in ("prompts", "responses", "max_new_tokens", "max_turns", "engines", "oversample")
    },
    **{f"algorithm.{name}": _at_least(1) for name in ("mini_steps", "micro_batch_size", "importance_cap")},
    **{name: _at_least(0) for name in ("seed", "rollout.restarts", "optimizer.lr")},
    "algorithm.loss": _one_of(*CLIP),
    "algorithm.clip_low": _or_null(*_UP_TO_ONE),
    "algorithm.clip_high": _or_null(*_at_least(0)),
    "algorithm.mask_threshold": _or_null(*_at_least(0)),
    "algorithm.router_shift_floor": (lambda value: 0.0 < value <= 1.0, "a number in (0, 1]"),
    "algorithm.proximal_decay": _UP_TO_ONE,
    "algorithm.importance_floor": (lambda value: 0.0 <= value <= 1.0, "a number in [0, 1]"),
    "rollout.temperature": (lambda value: value > 0, "a number > 0 (greedy responses give GRPO no signal)"),
    "rollout.groups": (
        lambda value: value >= 0 if isinstance(value, int) else value in ("auto", "turns"), "auto, turns, or at least 0",
    ),
    "rollout.delay": (lambda value: value in (0, 1), "0 or 1"),
    "rollout.max_logprob_gap": _or_null(*_at_least(0)),
    "model.warm_start": _one_of(*LESSONS),
    "model.bridge": _one_of(*BRIDGES),
    "model.dtype": _one_of("float32", "bfloat16"),
    "rollout.engine": _one_of("megatron", "sglang"),
    "algorithm.old_logprobs": _one_of(*SOURCES),
    "algorithm.importance": _one_of(*KINDS),
    "algorithm.importance_level": _one_of(*LEVELS),
    "algorithm.proximal_device": _one_of("device", "cpu"),
}


def validate(config: TrainConfig) -> None:
    """Raises ConfigError for settings that are out of range or contradict each other."""
    replay = config.replay()
    parallel, rollout, algorithm = config.parallel, config.rollout, config.algorithm
    for name, (right, expected) in _RULES.items():
        if not right(value := attrgetter(name)(config)):
            raise ConfigError(f"{name}={value!r}: expected {expected}")
    TinyModelConfig.of(config.model.sizes)
    if config.model.sizes and config.model.path is not None:
        raise ConfigError(f"model.sizes={config.model.sizes} contradicts model.path={config.model.path}, whose sizes are its own")
    source, importance = algorithm.old_logprobs, algorithm.importance
    if source == "rollout" and replay.routes == "actor":
        raise ConfigError(
            "algorithm.old_logprobs=rollout contradicts pr2.routes=actor (preset=r2): the engine's log-probs belong to other "
            "routes than those that the actor records and replays; set old_logprobs=recompute, or pr2.routes=engine (preset=r3)"
        )
    if source == "rollout" and importance != "none":
        raise ConfigError(
            f"algorithm.importance={importance} corrects old log-probs for the engine's, and with algorithm.old_logprobs=rollout "
            "they are the same; set importance=none, or old_logprobs=recompute"
        )
    _validate_loss(algorithm)
    if source == "ewma" and not algorithm.corrects:
        raise ConfigError(
            "algorithm.old_logprobs=ewma needs algorithm.importance=tis or mis: nothing was sampled from the moving average, and a "
            "ratio to it alone is off-policy without a correction"
        )
    _validate_groups(config, replay)
    if rollout.delay and replay.learns and replay.follows:
        raise ConfigError(
            f"rollout.delay={rollout.delay} does not go with pr2.predictor={replay.predictor}: what is learned corrects the "
            "extrapolation by the drift since the old-log-prob pass, and a delayed rollout's began a batch before; use learned, "
            "momentum or lookahead"
        )
    for name in ("urls", "sglang"):
        if getattr(rollout, name) and rollout.engine != "sglang":
            raise ConfigError(f"rollout.{name}={getattr(rollout, name)!r} needs rollout.engine=sglang, not {rollout.engine!r}")
    for name, divisor in (("parallel.processes", "parallel.expert"), ("rollout.prompts", "parallel.processes")):
        value, by = attrgetter(name, divisor)(config)
        if value % by:
            raise ConfigError(f"{name}={value} is not a multiple of {divisor}={by}")
    samples = rollout.prompts // parallel.processes * rollout.responses
    if samples % algorithm.mini_steps:
        raise ConfigError(
            f"rollout.prompts * rollout.responses / parallel.processes = {samples} samples a rank is not a multiple of "
            f"algorithm.mini_steps={algorithm.mini_steps}"
        )


def _validate_groups(config: TrainConfig, replay: PR2Config) -> None:
    """`rollout.groups` against what it needs."""
    rollout, kappa = config.rollout, config.algorithm.mini_steps
    given = f"rollout.groups={rollout.groups}"
    if rollout.groups in (1, "auto"):
        return
    if isinstance(rollout.groups, int) and rollout.groups > kappa:
        raise ConfigError(f"{given}: expected at most algorithm.mini_steps={kappa}")
    if replay.routes != "engine" or not replay.predicts:
        raise ConfigError(f"{given} needs pr2.routes=engine and a pr2.predictor; not {replay.routes} and {replay.predictor}")
    if rollout.oversample > 1 and rollout.responses % kappa:
        raise ConfigError(
            f"{given} with rollout.oversample={rollout.oversample}: the prompts that are finished first fill the mini-steps "
            f"equally only if rollout.responses={rollout.responses} is a multiple of algorithm.mini_steps={kappa}"
        )


def _validate_loss(algorithm: AlgorithmConfig) -> None:
    """What a loss needs of the other settings."""
    loss, source = algorithm.loss, algorithm.old_logprobs
    if loss in ("icepop", "kpop") and source == "rollout":
        raise ConfigError(
            f"algorithm.loss={loss} compares old log-probs with the engine's, and with algorithm.old_logprobs=rollout they are the "
            "same; set old_logprobs=recompute, or loss=grpo"
        )
    if loss == "icepop" and algorithm.importance != "none":
        raise ConfigError(
            f"algorithm.loss=icepop is a correction for what the engine sampled from, and algorithm.importance="
            f"{algorithm.importance} another one; set importance=none"
        )
    if loss in ("kpop", "opsm") and algorithm.mask_threshold is None:
        raise ConfigError(f"algorithm.loss={loss} needs algorithm.mask_threshold, which has no default (docs/losses.md)")
    if algorithm.clip[1] is None:
        raise ConfigError(f"algorithm.loss={loss} needs algorithm.clip_high, which has no default for it (docs/losses.md)")
    if loss == "rspo" and source != "recompute":
        raise ConfigError(
            f"algorithm.loss=rspo needs algorithm.old_logprobs=recompute, not {source}: the old policy's router scores are kept in "
            "the pass that recomputes its log-probs"
        )
