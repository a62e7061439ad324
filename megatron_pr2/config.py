"""PR2Config: what is replayed and what predicts it; two orthogonal switches and five presets (design decision 3)."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_pr2.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CHOICES = {
    "routes": ("live", "actor", "engine"),
    "route_delivery": ("scatter", "local"),
    "predictor": ("none", "learned", "momentum", "learned+momentum", "lookahead"),
    "target": ("post", "delta"),
    "feature_device": ("device", "cpu"),
}

_NOT_NEGATIVE = (lambda value: value >= 0.0, "a number in [0.0, inf]")
_UP_TO_ONE = (lambda value: 0.0 <= value <= 1.0, "a number in [0.0, 1.0]")
_SHARE = (lambda value: 0.0 < value <= 1.0, "a share in (0, 1]")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("alpha", "eps", "momentum", "horizon", "hold_back_confidence"), _NOT_NEGATIVE),
    **dict.fromkeys(("max_missing_share", "min_agreement"), _UP_TO_ONE),
    **dict.fromkeys(("sample_fraction", "held_out_share", "reach"), _SHARE),
    "hold_back_decay": (lambda value: 0.0 < value < 1.0, "a number in (0, 1)"),
    "feature_bytes": (lambda value: value >= 0, "a number of bytes >= 0"),
    "seed": (lambda value: value >= 0, "an integer >= 0"),
    "betas": (lambda betas: all(0.0 <= beta < 1.0 for beta in betas), "two numbers in [0, 1)"),
}

PRESETS: dict[str, dict[str, str]] = {
    "grpo": {"routes": "live", "predictor": "none"},
    "r2": {"routes": "actor", "predictor": "none"},
    "r3": {"routes": "engine", "predictor": "none"},
    "pr2": {"routes": "engine", "predictor": "learned"},
    "pr2-lookahead": {"routes": "engine", "predictor": "lookahead"},
}


@dataclass(frozen=True)
class PR2Config:
    """Settings of predictive routing replay.

    Attributes:
        routes: what the training passes replay: `live` nothing, `actor` what the old-log-prob pass recorded, `engine` what the
            rollout engine returned. Set by the preset.
        route_delivery: how an engine's routes reach the ranks of a replica (tensor x context x pipeline): `scatter` sends each its
            share from the first rank, `local` slices tables that every rank was given. The same where a replica is one rank.
        predictor: source of W_p: `none`; `learned`, a linear predictor per router, trained on the router's drift (arXiv
            2606.00395); `momentum`, the direction in which the policy's Adam, Lion or Muon moves the gate, without training or
            features; `learned+momentum`, where the first learns what the second misses; `lookahead`, what the policy's next updates
            will do to the routers, measured by a forward under the weights that its optimizer is heading for, once per rollout
            batch (`PR2.look_ahead`). Set by the preset (docs/predictor.md).
        target: what the predictor matches: `post`, the distribution of the updated router, or `delta`, the change of its logits
            (the paper's ablation).
        alpha: learning rate of the predictor, relative to the policy's current one. Lower it if the report says that prediction
            hurt, raise it if it made no difference (docs/predictor.md#alpha). The paper used 1e3 to 1e4 at policy rates near 1e-6.
        betas: decay rates of the predictor's own Adam.
        eps: epsilon of the predictor's own Adam.
        momentum: factor c in W_p = c * horizon * (the gate's last update), for `momentum`.
        reach: how much less each further update counts, for `lookahead`: n updates ahead are taken for reach + reach^2 + ... +
            reach^n times the last one, of which `hold_back` uses a share.
        horizon: updates between the weights that a rollout is sampled under and those that train on it, on average, for
            `momentum` and `lookahead`. 0 takes (kappa - 1) / 2 for the kappa mini-steps that it sees; an asynchronous pipeline adds
            the updates that it is behind. Lift and hold-back compare with the weights of the old-log-prob pass: where these are
            newer than the rollout's, hold-back uses less of a longer horizon.
        hold_back: scale each layer's W_p by the beta in [0, 1] under which predicted routes agreed best with the updated routers in
            the last rollout batches, on sampled tokens that nothing learned from; 0 (exactly `r3`) until a gain is measured.
            `false` is the paper: beta = 1 always. For `lookahead` beta is in [0, 1.5], for each horizon, from second moments of
            predicted and true drift; until three batches are known 1 for a horizon of its own and 0 for one that serves all
            mini-steps (docs/predictor.md).
        held_out_share: share of the sampled tokens on which `hold_back` measures a prediction. Raise it for small models and
            batches, where a few hundred tokens say little; up to 1 for `momentum` alone.
        hold_back_decay: weight of a rollout batch in `hold_back`'s measurement, relative to the next one's: 0.9 remembers ten to
            twenty.
        hold_back_confidence: standard errors by which a gain must exceed zero before a prediction is used. Lower values use
            predictions earlier, and wrong ones more often.
        drift: measure how far the routers have moved since the rollout, from features of sampled tokens. `false` is for replay
            alone: no features, no drift metrics, and no predictor that learns or is judged. Routes of an engine are checked all
            the same.
        sample_fraction: largest share of the loss-bearing tokens that features are kept of, in (0, 1]: `4 experts` bytes of router
            logits per token and layer, from which drift is measured, and `2 hidden` of router inputs where a predictor learns from
            them or `hold_back` judges it. Where `feature_bytes` has no room for it, the share that fits is used, the same on all
            ranks. Raise it for small models.
        feature_bytes: byte budget of the features on one rank. Tokens that a mini-step computes on another rank than the log-prob
            pass did come on top, and with `feature_device=cpu` 256 MiB of transfers.
        feature_device: where features are kept: `device`, where they were computed, or `cpu`, in host memory.
        max_missing_share: largest share of tokens without a valid route, the last token of each sequence not counted.
        min_agreement: smallest share of an engine's routes that the actor's own routers must agree with in the old-log-prob pass,
            in every MoE layer, in every sequence and on the whole. Fewer mean that routes were not taken, lie on other tokens' rows
            or are of other weights, and the pass fails. Some rows of each sequence are compared; few rows get an allowance.
            `null` takes what working engines of the same weights reach by dtype, top-k and number of experts, and half-way to
            chance where the weights have changed since the push, or a prediction is in use (docs/sglang.md). 0 disables the check.
        strict: above `max_missing_share`: `true` raises RouteError, `false` warns, and those tokens use the model's own router.
        seed: seeds the choice of sampled tokens. `megatron-pr2 train` uses its own `seed` unless this is set.
    """

    routes: str = "engine"
    route_delivery: str = "scatter"
    predictor: str = "learned"
    target: str = "post"
    alpha: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 1.0
    reach: float = 0.6
    horizon: float = 0.0
    hold_back: bool = True
    held_out_share: float = 0.25
    hold_back_decay: float = 0.9
    hold_back_confidence: float = 2.0
    drift: bool = True
    sample_fraction: float = 0.125
    feature_bytes: int = 4 << 30
    feature_device: str = "device"
    max_missing_share: float = 0.02
    min_agreement: float | None = None
    strict: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            if getattr(self, f.name) is None and f.default is None:
                continue
            _check_type(f.name, getattr(self, f.name), float if f.default is None else type(f.default))
            if f.name in CHOICES and getattr(self, f.name) not in CHOICES[f.name]:
                raise ConfigError(f"pr2.{f.name}={getattr(self, f.name)!r}: expected one of {', '.join(CHOICES[f.name])}")
        if self.predictor != "none" and self.routes == "live":
            raise ConfigError(
                f"pr2.predictor={self.predictor!r} contradicts pr2.routes='live': a prediction that nothing replays has no effect; "
                "use routes=engine (or actor), or predictor=none"
            )
        for name, (right, expected) in RANGES.items():
            if getattr(self, name) is not None and not right(getattr(self, name)):
                raise ConfigError(f"pr2.{name}={getattr(self, name)}: expected {expected}")
        if not self.drift and self.keeps_inputs:
            needs = "it learns from drift" if self.learns else "pr2.hold_back judges it by drift; set pr2.hold_back=false"
            raise ConfigError(f"pr2.drift=false contradicts pr2.predictor={self.predictor!r}: {needs}, or leave pr2.drift on")
        if self.hold_back and self.learns and self.held_out_share == 1.0:
            raise ConfigError("pr2.held_out_share=1.0 leaves no sampled token to learn from; lower it, or set pr2.hold_back=false")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PR2Config:
        """Config of a named method, one of PRESETS, which differ in `routes` and `predictor` only.

        Raises:
            ConfigError: unknown preset or setting.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; expected one of {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PR2Config:
        """Config from plain values; unknown keys are refused by name."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown pr2 setting(s) {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return replace(cls(), **given)

    @property
    def replays(self) -> bool:
        """Whether the training passes replay routes."""
        return self.routes != "live"

    @property
    def predicts(self) -> bool:
        """Whether there is a predictor."""
        return self.predictor != "none"

    @property
    def learns(self) -> bool:
        """Whether a predictor is trained."""
        return "learned" in self.predictor

    @property
    def keeps_inputs(self) -> bool:
        """Whether features hold router inputs beside logits: a predictor learns from them, or is judged on them."""
        return self.learns or (self.predicts and self.hold_back)

    @property
    def follows(self) -> bool:
        """Whether the predictor extrapolates the policy optimizer's momentum."""
        return "momentum" in self.predictor

    @property
    def looks_ahead(self) -> bool:
        """Whether the predictor is made by a look-ahead."""
        return self.predictor == "lookahead"

    @property
    def needs_optimizer(self) -> bool:
        """Whether the predictor reads the policy's optimizer."""
        return self.follows or self.looks_ahead


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_type(name: str, value: Any, kind: type) -> None:
    """Refuses values of another kind than the default's: settings come from YAML, where `maybe` is a text and not a switch."""
    right, expected = {
        bool: (isinstance(value, bool), "true or false"),
        int: (isinstance(value, int) and not isinstance(value, bool), "an integer"),
        float: (_is_number(value), "a number"),
        tuple: (isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)), "two numbers in [0, 1)"),
    }.get(kind, (True, ""))
    if not right:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"pr2.{name}={shown!r}: expected {expected}")


def check_horizon(horizon: Any, where: str) -> None:
    """Refuses what is no number of updates.

    Raises:
        ConfigError: it is not None, and no finite number of at least 0.
    """
    if horizon is None or (isinstance(horizon, Real) and not isinstance(horizon, bool) and 0.0 <= float(horizon) < math.inf):
        return
    raise ConfigError(
        f"{where}: horizon={horizon!r}; expected updates until it is trained on, a finite number of at least 0; None is the average"
    )


def setting_texts(kind: type) -> dict[str, str]:
    """What each field of a dataclass of settings means, from "Attributes:" of its docstring, as a sentence."""
    section = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE)
    return {name: text[:1].upper() + " ".join(text.split())[1:] for name, text in entries}


def read_yaml(path: str | Path) -> DictConfig:
    """The settings in a file, as they are.

    Raises:
        ConfigError: it cannot be read, or is no mapping in YAML.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file of settings") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of settings")
    return loaded
