"""Hides the warnings of torch and Megatron-Core about each other's names, which come on every step and rank of a training job.

Neither who runs a job nor this package, which calls none of these names, can act on them. Importing this changes no filter.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

# Category, start of the message (a regular expression), and the module that warns.
_WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    # Megatron-Core's collectives, under names that torch 2.13 gives up.
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\.c10d_logger"),
    # Its sharded checkpoints are made of ShardedTensors.
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor", r"torch\.distributed\."),
    (FutureWarning, r"`\w+_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    # Imported by Megatron-Core itself, from a model that is not in use.
    (UserWarning, r"MimoModelConfig is experimental", r"megatron\.core\.models\.mimo\."),
)
# The same, from loggers.
_RECORDS = {
    # GPTModel is what the bridges build; HybridModel, its successor, is not in all releases.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # load() of itself.
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}


def silence_known_warnings() -> None:
    """Keeps this process from printing them; for a job's own processes, once."""
    for category, message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for name, start in _RECORDS.items():
        logging.getLogger(name).addFilter(_without(start))


def _without(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(start)
