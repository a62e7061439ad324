"""Predictive Routing Replay for Megatron-Core.

    import megatron_pr2

    pr2 = megatron_pr2.attach(model_chunks, megatron_pr2.PR2Config.preset("pr2"))

The names below are imported when they are first used, so that `megatron-pr2 --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_pr2.attach import PR2, attach
    from megatron_pr2.config import PR2Config
    from megatron_pr2.errors import (
        AttachError,
        CheckpointError,
        ConfigError,
        DataError,
        EnvironmentFailed,
        PR2Error,
        ReplayError,
        RolloutError,
        RouteError,
    )
    from megatron_pr2.replay.micro_batch import MicroBatch
    from megatron_pr2.replay.sequences import ReplaySequence
    from megatron_pr2.routes.table import RouteTable

__version__ = "0.1.0"
__all__ = [
    "PR2",
    "AttachError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EnvironmentFailed",
    "MicroBatch",
    "PR2Config",
    "PR2Error",
    "ReplayError",
    "ReplaySequence",
    "RolloutError",
    "RouteError",
    "RouteTable",
    "attach",
]

_MODULES = {
    "PR2": "attach",
    "MicroBatch": "replay.micro_batch",
    "PR2Config": "config",
    "ReplaySequence": "replay.sequences",
    "RouteTable": "routes.table",
    "attach": "attach",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
