"""PR2's settings in verl's configuration, and what of that configuration contradicts them.

verl's engine configs are dataclasses without room for foreign fields, but for dictionaries that are passed through. The actor's
`override_mcore_model_config` is one: the reference and the critic do not inherit it, and verl reads only `moe_config` in it.

    +actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.preset=pr2
    +actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.alpha=3
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ConfigError

KEY = "pr2"
WHERE = f"actor_rollout_ref.actor.megatron.override_mcore_model_config.{KEY}"


def read_settings(engine_config: Any) -> PR2Config | None:
    """PR2's config from verl's McoreEngineConfig, or None where it has none and the engine is to be verl's own.

    Under verl every rank of a replica holds the routes already, hence `route_delivery` is "local" unless set.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    overrides = _plain(getattr(engine_config, "override_mcore_model_config", None) or {})
    if KEY not in overrides:
        return None
    given = overrides[KEY]
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{WHERE}={given!r}: expected a preset or settings, e.g. `{WHERE}.preset=pr2`")
    values = {"route_delivery": "local", **given}
    preset = values.pop("preset", None)
    try:
        return PR2Config.from_dict(values) if preset is None else PR2Config.preset(preset, **values)
    except ConfigError as error:
        raise ConfigError(f"{WHERE}: {error}") from error


def check_engine(engine_config: Any, model_config: Any, settings: PR2Config) -> None:
    """Refuses what replay cannot follow, before anything is built; every message says what to set.

    Args:
        engine_config: verl's McoreEngineConfig of the actor.
        model_config: verl's HFModelConfig.

    Raises:
        AttachError: naming the setting.
    """
    replay = engine_config.router_replay.mode
    if replay != "disabled":
        instead = {"R2": "r2", "R3": "r3"}.get(replay, "r3")
        raise AttachError(
            f"actor_rollout_ref.actor.megatron.router_replay.mode={replay!r} is verl's own replay, one at a time: set it to "
            f"'disabled' and {WHERE}.preset={instead} (r3 and pr2 with "
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=true)"
        )
    if engine_config.dynamic_context_parallel:
        raise AttachError(
            "actor_rollout_ref.actor.megatron.dynamic_context_parallel=true changes from micro-batch to micro-batch which rank "
            "computes which token; replay cannot follow it: set it to false"
        )
    if engine_config.use_megatron_fsdp:
        raise AttachError("actor_rollout_ref.actor.megatron.use_megatron_fsdp=true: gates are shards there; set it to false")
    if getattr(getattr(engine_config, "qat", None), "enable", False):
        raise AttachError(
            "actor_rollout_ref.actor.megatron.qat.enable=true: exported weights are rewritten for the quantised rollout, which "
            "is not tested with merged gates; set it to false"
        )
    _check_model(model_config, settings)


def _check_model(model_config: Any, settings: PR2Config) -> None:
    lora = getattr(model_config, "lora", None) or {}
    if int(lora.get("rank", 0) or 0) > 0 or int(getattr(model_config, "lora_rank", 0) or 0) > 0:
        raise AttachError(
            "actor_rollout_ref.model.lora: an adapter is synchronised without the gates, and the reference is the actor without "
            f"it; train all weights (lora.rank=0), or remove {WHERE}"
        )
    if hasattr(getattr(model_config, "hf_config", None), "vision_config"):
        raise AttachError("the model has a vision part: replay describes text tokens only; use a text model")
    mtp = getattr(model_config, "mtp", None)
    if settings.routes == "engine" and getattr(mtp, "enable_rollout", False):
        raise AttachError(
            "actor_rollout_ref.model.mtp.enable_rollout=true samples speculatively, where an engine's routes are not those of the "
            "accepted tokens; set it to false (mtp.enable and mtp.enable_train may stay: these heads route for themselves)"
        )


def check_process() -> None:
    """Refuses a process in which verl has patched Megatron-Core's router.

    Raises:
        AttachError: saying who did it.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    if hasattr(TopKRouter, "_router_replay_patched"):
        raise AttachError(
            "verl's apply_router_replay_patch() has replaced methods of Megatron-Core's TopKRouter in this process: an engine here "
            "(actor, reference or critic) has router_replay.mode other than 'disabled'; set it to 'disabled' for all of them"
        )


def _plain(values: Any) -> Any:
    """Plain containers, where Hydra left its own."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
