"""Silences what torch and Megatron-Core say about each other's names on every step and rank of a training job.

Nobody who runs a job can act on it, nor can this package, which calls none of these names. Importing it changes no filter.
"""

from __future__ import annotations

import logging
import warnings

# Category, start of the message (a regular expression), and the module that it is said from.
_WARNINGS: tuple[tuple[type[Warning], str, str], ...] = (
    # Megatron-Core's collectives, under names that torch 2.13 gives up.
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed\.c10d_logger"),
    # Its sharded checkpoints are made of ShardedTensors.
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor", r"torch\.distributed\."),
    (FutureWarning, r"`\w+_state_dict` is deprecated", r"megatron\.core\.dist_checkpointing\."),
    # Imported by Megatron-Core itself, from a model that is not in use.
    (UserWarning, r"MimoModelConfig is experimental", r"megatron\.core\.models\.mimo\."),
)
# The same, said by loggers.
_RECORDS = {
    # GPTModel is what the bridges build; HybridModel, its successor, is not in all releases.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Said by load() of itself.
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
}


def silence_known_warnings() -> None:
    """Keeps this process from printing them; for a job's own processes, once."""
    for category, message, module in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for name, start in _RECORDS.items():
        logging.getLogger(name).addFilter(lambda record, start=start: not record.getMessage().startswith(start))
