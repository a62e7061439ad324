"""TrainConfig: all settings of `megatron-pr2 train`, as structured configuration (OmegaConf).

A YAML file names what differs from the defaults; `key=value` on the command line overrides both. Unknown keys are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_pr2.config import PR2Config, read_yaml
from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.deal import group_horizons
from megatron_pr2.rl.rules import CLIP, validate


@dataclass
class ModelConfig:
    """The policy.

    Attributes:
        path: directory of a Hugging Face mixture-of-experts checkpoint. `null` makes the examples' tiny Qwen3-MoE.
        warm_start: what that tiny model is shown before RL: `worked` sums (the quickstart), or sums with a `calculator`
            (examples/calculator, needs its `rollout.environment`); unused with `model.path`.
        sizes: of that tiny model, those that differ from the quickstart's, by Transformers' names, for example
            `{num_hidden_layers: 6, num_experts: 64, num_experts_per_tok: 8}` (`megatron_pr2.rl.tiny.TinyModelConfig`). Each set of
            sizes is warm-started and cached for itself.
        cache: where the warm-started policies are kept between runs; unused with `model.path`.
        dtype: `float32` or `bfloat16`, of the actor and of an SGLang server that the run starts. Use `bfloat16` for real models;
            the handshake's thresholds follow it.
        bridge: library between Hugging Face and Megatron-Core: `mbridge`, `megatron-bridge`, or `auto`, which takes mbridge where
            it knows the model type (docs/bridges.md).
    """

    path: str | None = None
    warm_start: str = "worked"
    sizes: dict[str, Any] = field(default_factory=dict)
    cache: str = "runs/warmstart"
    dtype: str = "float32"
    bridge: str = "auto"


@dataclass
class ParallelConfig:
    """Processes of one machine.

    Attributes:
        processes: training processes, all of them data-parallel; one GPU each where there are GPUs.
        expert: expert-parallel size; divides `parallel.processes`. Raise it until the experts fit.
    """

    processes: int = 2
    expert: int = 2


@dataclass
class RolloutConfig:
    """Sampling.

    Attributes:
        engine: `megatron` samples with the actor itself, without a KV cache: for small models only. `sglang` uses servers
            (docs/sglang.md).
        engines: SGLang servers that the run starts, and stops at the end. Each takes `rollout.sglang.tp_size` GPUs.
        groups: sets of routers that responses are sampled under, each predicted for its share of the mini-steps, the first one's
            exactly `r3`; at most `algorithm.mini_steps`. 1: one set for all; 0: one for each mini-step. A server holds one set, so
            that there must be as many servers, which share the groups out among them. `turns`: one for each mini-step, which all
            servers take one after the other (docs/sglang.md). The embedded engine samples group by group in any case. All but 1
            need a prediction and `pr2.routes=engine`. `auto`: with `lookahead` one for each mini-step, or as many as there are
            servers, where the other settings allow it; else 1.
        delay: batches that a rollout is old when it is trained on. 0: sampled under the weights that the training begins with; 1:
            the next batch is sampled before the training on the present one, as in pipelines in which both run side by side.
            Predictions for an engine reach `algorithm.mini_steps` updates farther then, and drift is still measured since the
            old-log-prob pass (docs/predictor.md).
        urls: `http://127.0.0.1:PORT` of running SGLang servers, instead of own ones; they are left running.
        router: what stands in front of several servers: `none` (each request goes to the server that knows its prompt, else to the
            least busy one), `own` (SGLang's router is started; needs sglang-router), or the URL of a running router.
        sglang: further fields of SGLangConfig, for example `rollout.sglang.tp_size=2`; the last table of this page.
        oversample: prompts requested per prompt of a batch. Above 1 the batch is the first `rollout.prompts` prompts whose
            responses are all there; the rest stops and is continued first in the next batch. For batches that wait for a few long
            responses; the embedded engine answers all responses at the same time and gains nothing.
        environment: `package.module:Name` of what replies to the policy between its turns
            (`megatron_pr2.rl.calculator:Calculator`); called with the tokenizer, once per response. `null`: one turn.
        max_turns: turns of the policy in one response at most.
        prompts: prompts per rollout batch; a multiple of `parallel.processes`.
        responses: responses per prompt, the group that advantages are normalised over.
        max_new_tokens: tokens that the policy samples in one response at most, over all turns. Raise it if the report shows many
            truncated responses.
        temperature: sampling temperature, above 0. Importance ratios are taken at the same temperature.
        restarts: how often one rollout may restart a dead engine before the run fails.
        handshake: compare every server's routes and log-probs with the actor's after each push of weights, on one short probe (with
            the embedded engine: once). Without it a server that returns wrong routes, or took only a part of the weights, is not
            noticed.
        max_logprob_gap: mean difference in nats between the engine's log-probs and those of the old-log-prob pass above which a
            batch is refused; `null` takes bounds by dtype (docs/sglang.md), 0 disables the check.
    """

    engine: str = "megatron"
    engines: int = 1
    groups: int | str = "auto"
    delay: int = 0
    urls: list[str] = field(default_factory=list)
    router: str = "none"
    sglang: dict[str, Any] = field(default_factory=dict)
    oversample: float = 1.0
    environment: str | None = None
    max_turns: int = 16
    prompts: int = 32
    responses: int = 8
    max_new_tokens: int = 16
    temperature: float = 1.0
    restarts: int = 2
    handshake: bool = True
    max_logprob_gap: float | None = None


@dataclass
class OptimizerConfig:
    """Adam on the policy.

    Attributes:
        lr: constant learning rate. The default is for the tiny model; real models take about 1e-6. The predictor's is `pr2.alpha`
            times this.
        beta1: Adam's first decay.
        beta2: Adam's second decay.
        weight_decay: decoupled weight decay.
        clip_grad: largest norm of the policy's gradient; the predictor's gradient is not part of it.
    """

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass
class AlgorithmConfig:
    """GRPO, and other losses on its advantages.

    Attributes:
        loss: `grpo`, `gspo`, `cispo`, `gmpo`, `icepop`, `kpop`, `opsm` or `rspo` (docs/losses.md).
        mini_steps: kappa of off-kappa: updates per rollout batch, each on its own share of the samples. With 1 the routes are never
            stale and the predictor never learns.
        micro_batch_size: sequences in one forward pass of one process. Lower it when memory runs out.
        clip_low: the importance ratio is clipped to `[1 - clip_low, 1 + clip_high]`. `null`: as published for the loss, 0.2 for
            `grpo`.
        clip_high: see `algorithm.clip_low`; 0.28 for `grpo`. `cispo` needs it.
        mask_threshold: above it, in nats, `kpop` masks a token and `opsm` a response. Both need it.
        router_shift_floor: smallest weight that `rspo` multiplies to a token's ratio, from 0 to 1.
        old_logprobs: policy whose log-probs the ratio is taken to: `recompute` the weights at the start of the rollout batch,
            `rollout` the engine's own, kept with every token, `ewma` a moving average of the policy (docs/off_policy.md).
        importance: correction for what the engine sampled from instead: `tis` weights every token by old over sampled probability,
            at most `importance_cap`; `mis` drops tokens whose ratio is outside of `[importance_floor, importance_cap]`. `ewma`
            needs one; with `rollout` there is nothing to correct.
        importance_level: `token`, or `sequence`: all tokens of a response take the geometric mean of their ratios, and `mis` drops
            whole responses. Its bounds lie much closer to 1.
        importance_cap: largest weight; 1 or more. Of `loss=icepop` too.
        importance_floor: smallest weight that `mis` keeps, from 0 to 1; `tis` has none. Of `loss=icepop` too.
        proximal_decay: of the moving average, per update: its mean age is `decay / (1 - decay)` updates. Unused without `ewma`.
        proximal_device: where the moving average is kept, 4 bytes per parameter of a process: `device`, or `cpu` at the price of
            copies in every mini-step.
    """

    loss: str = "grpo"
    mini_steps: int = 4
    micro_batch_size: int = 32
    clip_low: float | None = None
    clip_high: float | None = None
    mask_threshold: float | None = None
    router_shift_floor: float = 0.8
    old_logprobs: str = "recompute"
    importance: str = "none"
    importance_level: str = "token"
    importance_cap: float = 2.0
    importance_floor: float = 0.5
    proximal_decay: float = 0.9
    proximal_device: str = "device"

    @property
    def clip(self) -> tuple[float, float | None]:
        """(clip_low, clip_high), the loss's own where they are not set; (nan, nan) for an unknown loss."""
        low, high = CLIP.get(self.loss, (math.nan, math.nan))
        return low if self.clip_low is None else self.clip_low, high if self.clip_high is None else self.clip_high

    @property
    def corrects(self) -> bool:
        """Whether old log-probs are corrected for the engine's."""
        return self.importance != "none" or self.loss == "icepop"

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether the loss is computed from the engine's log-probs besides the old ones."""
        return self.corrects or self.loss in ("kpop", "opsm")


@dataclass
class TrainConfig:
    """The whole job.

    Attributes:
        preset: `grpo`, `r2`, `r3`, `pr2` or `pr2-lookahead`: sets `pr2.routes` and `pr2.predictor`, nothing else.
        pr2: overrides of PR2Config's fields.
        run: directory of everything that the run writes. One directory per run.
        data: JSONL file: `prompt`/`answer` lines, or GSM8K's `question`/`answer` lines. `null` generates arithmetic for the
            quickstart's model. `--data FILE` is the same. The prompt is given to the policy verbatim, without a chat template.
        steps: rollout batches. May be raised when a run is continued.
        seed: decides the quickstart's model and data, the order of prompts and what is sampled.
        checkpoint_every: rollout batches between checkpoints; the last batch is always kept. The newest two stay on disk.
    """

    preset: str = "pr2"
    pr2: dict[str, Any] = field(default_factory=dict)
    run: str = "runs/train"
    data: str | None = None
    steps: int = 30
    seed: int = 0
    checkpoint_every: int = 5
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)

    @property
    def pr2_needs_engine_routes(self) -> bool:
        """Whether the rollout engine has to return routes."""
        return self.replay().routes == "engine"

    @property
    def needs_snapshot_pass(self) -> bool:
        """Whether a forward under theta_old has to be run for a rollout batch (a `pr2.old_logprobs` session).

        It is where log-probs are recomputed, the actor records its routes, and features are kept of what a predictor learns from or
        is judged by. Without it there are no drift metrics, and `min_agreement` is not checked (docs/off_policy.md).
        """
        replay = self.replay()
        features = replay.learns or (replay.predicts and replay.hold_back)
        return self.algorithm.old_logprobs == "recompute" or replay.routes == "actor" or features

    @property
    def horizons(self) -> list[float]:
        """By mini-step, the updates that its responses are predicted for; empty where one set of routers serves all of them."""
        count = self._groups()
        return group_horizons(self.algorithm.mini_steps, count, self.updates_behind) if count > 1 else []

    def _groups(self) -> int:
        rollout, kappa, replay = self.rollout, self.algorithm.mini_steps, self.replay()
        if rollout.groups != "auto":
            return rollout.groups if isinstance(rollout.groups, int) and rollout.groups else kappa
        if not replay.looks_ahead or replay.routes != "engine" or (rollout.oversample > 1 and rollout.responses % kappa):
            return 1
        if rollout.engine == "megatron":
            return kappa
        alone = rollout.router != "none" or rollout.sglang.get("push") == "disk"
        return 1 if alone else min(kappa, len(rollout.urls) or rollout.engines)

    def replay(self) -> PR2Config:
        """The settings of predictive routing replay: the preset with its overrides."""
        config = PR2Config.preset(self.preset, **{"seed": self.seed, **self.pr2})
        if self.updates_behind and config.routes == "engine" and config.needs_optimizer and not config.horizon:
            return replace(config, horizon=(self.algorithm.mini_steps - 1) / 2 + self.updates_behind)
        return config

    @property
    def updates_behind(self) -> int:
        """Updates between the sampling of a batch and the first mini-step on it."""
        return self.rollout.delay * self.algorithm.mini_steps


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Defaults, then the YAML file, then `key=value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, or settings that contradict each other.
    """
    if bad := [item for item in overrides if "=" not in item]:
        raise ConfigError(f"override {bad[0]!r}: expected key=value, e.g. optimizer.lr=1e-4")
    merged, at = OmegaConf.structured(TrainConfig), str(path)
    try:
        if path is not None:
            merged = OmegaConf.merge(merged, read_yaml(path))
        at = "command line" if overrides else at
        config = OmegaConf.to_object(OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides))))
    except yaml.YAMLError as error:
        raise ConfigError(f"{at}: {' '.join(str(error).split())}; expected key=value with a YAML value") from error
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        setting = f" (setting {key!r})" if key else ""
        raise ConfigError(f"{at}: {str(error).splitlines()[0]}{setting}; see docs/config.md") from error
    assert isinstance(config, TrainConfig)
    validate(config)
    return config
