"""What an engine cannot see of verl's configuration, checked before a run starts.

    python -m megatron_pr2.integrations.verl.check --config-path examples/verl --config-name qwen3_30b_a3b [key=value ...]

An engine is given the settings of the actor and the model only. Whether the rollout returns routes, and whether old log-probs are
computed, it would learn from its first batch. This composes the configuration as verl's trainer does, and checks all of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError, PR2Error
from megatron_pr2.hf.model_types import has_megatron_bridge
from megatron_pr2.integrations.verl.settings import MEGATRON, WHERE, check_engine, read_settings, refuse

PACKAGE = "megatron_pr2.integrations.verl"
ROLLOUT = "actor_rollout_ref.rollout"


def check_config(config: Any) -> PR2Config:
    """PR2's settings in verl's composed configuration.

    Args:
        config: OmegaConf, as verl's trainer gets it.

    Raises:
        ConfigError: an unknown setting, or one that contradicts another, with what to set.
        AttachError: the actor's settings contradict replay.
    """
    parts = config.actor_rollout_ref
    if parts.actor.strategy != "megatron":
        raise ConfigError(f"actor_rollout_ref.actor.strategy={parts.actor.strategy!r}: set model_engine=megatron")
    settings = read_settings(parts.actor.megatron)
    if settings is None:
        raise ConfigError(f"no settings of PR2: add +{WHERE}.preset=pr2 (or grpo, r2, r3)")
    libraries = parts.model.external_lib or ()
    if PACKAGE not in ([libraries] if isinstance(libraries, str) else libraries):
        raise ConfigError(f"actor_rollout_ref.model.external_lib={libraries}: set it to {PACKAGE}, or the engine is verl's own")
    check_engine(parts.actor.megatron, parts.model, settings)
    refuse(ConfigError, _problems(config, settings))
    return settings


def _problems(config: Any, settings: PR2Config) -> Iterator[tuple[Any, str]]:
    """(condition, message that says what to set)"""
    parts, trainer = config.actor_rollout_ref, config.trainer
    rollout = parts.rollout
    yield (
        not parts.actor.megatron.vanilla_mbridge and not has_megatron_bridge(),
        f"{MEGATRON}.vanilla_mbridge=false builds the model by Megatron-Bridge, which is not installed here; set it to true "
        "(mbridge, as tested), or install megatron-bridge",
    )
    for role, engine in (("actor_rollout_ref.ref", parts.ref.get("megatron")), ("critic", config.critic.get("megatron"))):
        mode = "disabled" if engine is None else engine.router_replay.mode
        yield mode != "disabled", f"{role}.megatron.router_replay.mode={mode!r} patches the router; set it to 'disabled'"
    if settings.routes == "engine":
        yield (
            not rollout.enable_rollout_routing_replay,
            f"{ROLLOUT}.enable_rollout_routing_replay=false: the rollout engine returns no routes; set it to true "
            f"(router_replay.mode stays 'disabled'), or {WHERE}.preset to r2",
        )
        yield (
            rollout.name != "sglang",
            f"{ROLLOUT}.name={rollout.name!r}: its routes were never checked; set it to 'sglang', or {WHERE}.preset=r2",
        )
        yield (
            rollout.disaggregation.enabled,
            f"{ROLLOUT}.disaggregation.enabled=true: prefill and decode servers each return their own part of the routes; set it "
            "to false",
        )
    if settings.predicts:
        newer = trainer.get("use_v1", False)
        yield (
            newer and trainer.v1.trainer_mode == "separate_async",
            "trainer.v1.trainer_mode='separate_async' makes every update a rollout batch of its own, whose first mini-step is its "
            f"last: predictions are made for later ones; use another mode, or {WHERE}.preset=r3",
        )
        # The newer trainer fills a batch up to whole mini-batches; the older one leaves out what does not fill one.
        batch, mini_batch = config.data.train_batch_size, parts.actor.ppo_mini_batch_size
        updates = (-(-batch // mini_batch) if newer else batch // mini_batch) * parts.actor.ppo_epochs
        yield (
            updates < 2,
            f"data.train_batch_size={batch}, actor_rollout_ref.actor.ppo_mini_batch_size={mini_batch}: {updates} update per "
            "rollout batch; routers drift and predictors learn from the second on. Lower ppo_mini_batch_size, or set "
            f"{WHERE}.preset=r3",
        )
        backend = rollout.checkpoint_engine.backend
        yield (
            backend == "delta_sharded",
            f"{ROLLOUT}.checkpoint_engine.backend={backend!r} sends shards without the prediction; set it to 'naive' or 'nccl'",
        )
    yield (
        config.algorithm.rollout_correction.get("bypass_mode", False) and (settings.routes == "actor" or settings.predicts),
        "algorithm.rollout_correction.bypass_mode=true skips the old-log-prob pass, in which routes are recorded and predictions "
        "start; set it to false",
    )


def compose(config_path: Path | None, config_name: str, overrides: Sequence[str]) -> Any:
    """The configuration as `python -m verl.trainer.main_ppo` composes it."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir, initialize_config_module

    where = (
        initialize_config_module("verl.trainer.config", version_base=None)
        if config_path is None
        else initialize_config_dir(str(config_path.resolve()), version_base=None)
    )
    with where:
        return hydra_compose(config_name, list(overrides))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what PR2 is going to do, or what is wrong; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}.check", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config-path", type=Path, help="directory of a configuration of your own (default: verl's)")
    parser.add_argument("--config-name", default="ppo_trainer")
    parser.add_argument("overrides", nargs="*", help="key=value, as for verl.trainer.main_ppo")
    options = parser.parse_intermixed_args(arguments)
    try:
        settings = check_config(compose(options.config_path, options.config_name, options.overrides))
    except PR2Error as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(f"PR2 in verl: routes={settings.routes}, predictor={settings.predictor}, delivery={settings.route_delivery}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
