"""SGLang servers for verl 0.9.1 whose routes verl can read; importing this package registers them.

    VERL_USE_EXTERNAL_MODULES=megatron_pr2.integrations.verl_sglang

verl expects what the release of SGLang that it pins (0.5.12) returned: a tensor. In 0.5.19, the first release whose routes are
correct (docs/sglang.md), a response holds base64 of int32 [T - 1, hidden layers, K] instead, on which verl's server fails. In
verl's registry of rollout replicas, "sglang" becomes verl's own replica with servers that decode the response before verl's code
sees it.

A package of its own, because the driver picks the replicas: every process of verl imports this, and most need no Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Callable

NAME = "sglang"


class ReplicaLoader:
    """What verl calls for the class of its SGLang replicas."""

    def __init__(self, load: Callable[[], type]) -> None:
        self._load = load

    def __call__(self) -> type:
        self._load()  # verl's own preparations for the import of SGLang, which happens here
        from megatron_pr2.integrations.verl_sglang.server import PR2SGLangReplica

        return PR2SGLangReplica


def register_rollout() -> None:
    """Puts the loader into verl's registry of rollout replicas; calling it again changes nothing."""
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    load = RolloutReplicaRegistry._registry.get(NAME)
    if load is not None and not isinstance(load, ReplicaLoader):
        RolloutReplicaRegistry.register(NAME, ReplicaLoader(load))


register_rollout()
