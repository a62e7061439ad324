"""Errors of the package: each says what was wrong, where, what was expected and what to do."""


class PR2Error(Exception):
    """Base of every error that megatron_pr2 raises on purpose."""


class ConfigError(PR2Error, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class AttachError(PR2Error):
    """The model cannot carry predictive routing replay as it is."""


class RouteError(PR2Error, ValueError):
    """Routes have a wrong shape, dtype, layer or expert id, or too many of them are missing."""


class ReplayError(PR2Error, RuntimeError):
    """The replay lifecycle was violated: a micro-batch was not bound, or was replayed twice or not at all."""


class RolloutError(PR2Error, RuntimeError):
    """The rollout engine is down, timed out, or answered something that cannot be used."""


class EnvironmentFailed(PR2Error, RuntimeError):
    """What answers the policy between its turns raised, or replied what cannot be appended; trying again would not help."""


class DataError(PR2Error, ValueError):
    """A data file has a line that cannot be used; the message names file and line."""


class CheckpointError(PR2Error, RuntimeError):
    """A checkpoint could not be written or read; the previous one is intact."""
