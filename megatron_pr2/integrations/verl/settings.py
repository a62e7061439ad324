"""PR2's settings in verl's configuration, and what of that configuration contradicts them.

verl's engine configs are dataclasses without room for other fields, except in dictionaries that are passed through. The actor's
`override_mcore_model_config` is one: the reference and the critic do not inherit it, and verl reads only `moe_config` in it.

    +actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.preset=pr2
    +actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.alpha=3
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ConfigError, PR2Error

KEY = "pr2"
MEGATRON = "actor_rollout_ref.actor.megatron"
WHERE = f"{MEGATRON}.override_mcore_model_config.{KEY}"


def read_settings(engine_config: Any) -> PR2Config | None:
    """PR2's config from verl's McoreEngineConfig, or None where it has none and the engine is to be verl's own.

    Under verl every rank of a replica holds the routes already, so `route_delivery` is "local" unless set.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    from omegaconf import OmegaConf

    overrides = getattr(engine_config, "override_mcore_model_config", None) or {}
    if OmegaConf.is_config(overrides):
        overrides = OmegaConf.to_container(overrides, resolve=True)
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


def refuse(error: type[PR2Error], problems: Iterable[tuple[Any, str]]) -> None:
    """Raises the error with the first message whose condition is true."""
    for wrong, message in problems:
        if wrong:
            raise error(message)


def check_engine(engine_config: Any, model_config: Any, settings: PR2Config) -> None:
    """Refuses what replay cannot follow, before anything is built; every message says what to set.

    Args:
        engine_config: verl's McoreEngineConfig of the actor.
        model_config: verl's HFModelConfig.

    Raises:
        AttachError: naming the setting.
    """
    replay = engine_config.router_replay.mode
    lora = getattr(model_config, "lora", None) or {}
    lora_rank = int(lora.get("rank", 0) or 0) or int(getattr(model_config, "lora_rank", 0) or 0)
    speculative = getattr(getattr(model_config, "mtp", None), "enable_rollout", False)
    problems = [
        (
            settings.looks_ahead,
            f"{WHERE}.predictor=lookahead needs a pass over a part of the batch after its last update, which this engine does not "
            "run; use learned or momentum",
        ),
        (
            replay != "disabled",
            f"{MEGATRON}.router_replay.mode={replay!r} is verl's own replay, and only one can be used: set it to 'disabled' and "
            f"{WHERE}.preset={'r2' if replay == 'R2' else 'r3'} (r3 and pr2 with "
            "actor_rollout_ref.rollout.enable_rollout_routing_replay=true)",
        ),
        (
            engine_config.dynamic_context_parallel,
            f"{MEGATRON}.dynamic_context_parallel=true changes from micro-batch to micro-batch which rank computes which token; "
            "replay cannot follow it: set it to false",
        ),
        (engine_config.use_megatron_fsdp, f"{MEGATRON}.use_megatron_fsdp=true shards the gates; set it to false"),
        (
            getattr(getattr(engine_config, "qat", None), "enable", False),
            f"{MEGATRON}.qat.enable=true rewrites exported weights for the quantised rollout, which is not tested with merged "
            "gates; set it to false",
        ),
        (
            lora_rank > 0,
            "actor_rollout_ref.model.lora: an adapter is synchronised without the gates, and the reference is the actor without "
            f"it; train all weights (lora.rank=0), or remove {WHERE}",
        ),
        (
            hasattr(getattr(model_config, "hf_config", None), "vision_config"),
            "the model has a vision part: replay describes text tokens only; use a text model",
        ),
        (
            settings.routes == "engine" and speculative,
            "actor_rollout_ref.model.mtp.enable_rollout=true samples speculatively, where an engine's routes are not those of the "
            "accepted tokens; set it to false (mtp.enable and mtp.enable_train may stay: these heads use their own routers)",
        ),
    ]
    refuse(AttachError, problems)


def check_process() -> None:
    """Refuses a process in which verl has patched Megatron-Core's router.

    Raises:
        AttachError: naming the patch.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    if hasattr(TopKRouter, "_router_replay_patched"):
        raise AttachError(
            "verl's apply_router_replay_patch() has replaced methods of Megatron-Core's TopKRouter in this process: an engine here "
            "(actor, reference or critic) has router_replay.mode other than 'disabled'; set it to 'disabled' for all of them"
        )
