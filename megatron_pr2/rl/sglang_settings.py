"""The settings of the SGLang engines that a job implies. Imports no torch."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rollout.sglang.config import SGLangConfig


def sglang_config(config: TrainConfig, model_path: str) -> SGLangConfig:
    """The settings of the SGLang engines: `rollout.sglang` over what the job implies.

    Raises:
        ConfigError: an unknown field, or values that SGLangConfig refuses.
    """
    rollout = config.rollout
    settings: dict[str, Any] = {
        "urls": tuple(rollout.urls),
        "model_path": None if rollout.urls else model_path,
        "engines": rollout.engines,
        "router": rollout.router,
        "dtype": config.model.dtype,
        "log_path": None if rollout.urls else str(Path(config.run) / "sglang.log"),
    }
    allowed = {entry.name for entry in fields(SGLangConfig)} - {"urls", "model_path", "engines", "router"}
    for name in rollout.sglang:
        if name not in allowed:
            raise ConfigError(f"rollout.sglang.{name}: not a setting here; expected one of {', '.join(sorted(allowed))}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in rollout.sglang.items()}
    try:
        return SGLangConfig(**{**settings, **given})
    except TypeError as error:
        raise ConfigError(f"rollout.sglang: a value has a wrong type ({error}); see docs/sglang.md") from error
