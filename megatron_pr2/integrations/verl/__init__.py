"""PR2 in verl (0.9.1): importing this package registers an engine, and SGLang servers whose routes verl can read.

    actor_rollout_ref.model.external_lib=megatron_pr2.integrations.verl
    +actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.preset=pr2
    actor_rollout_ref.rollout.enable_rollout_routing_replay=true

The engine is registered beside verl's Megatron engine, which has no vendor: under the vendor of the platform that verl runs on,
since verl prefers a vendor's engine, and under the name `pr2`, for VERL_ENGINE_VENDOR=pr2. Without settings it is verl's own engine
(docs/verl.md).
"""

from __future__ import annotations

import importlib.util
import logging

from verl.plugin.platform import get_platform

from megatron_pr2.integrations import verl_sglang

logger = logging.getLogger(__name__)

VENDOR = "pr2"
# Where verl's own Megatron engine runs, and the CPU, where megatron_pr2.host runs it.
DEVICES = ("cuda", "cpu")


def register() -> None:
    """Registers the engine under every name that is free; calling it again changes nothing."""
    from verl.utils.device import get_device_name, get_vendor
    from verl.workers.engine.base import EngineRegistry

    from megatron_pr2.integrations.verl.engine import PR2MegatronEngine

    engines = EngineRegistry._engines.get("language_model", {}).get("megatron", {})
    for device, vendor in dict.fromkeys([*((each, VENDOR) for each in DEVICES), (get_device_name(), get_vendor())]):
        taken = engines.get((device, vendor))
        if taken is None:
            EngineRegistry.register("language_model", "megatron", device, vendor)(PR2MegatronEngine)
        elif taken is not PR2MegatronEngine:
            logger.warning(
                "%s is registered for device %r and vendor %r already; set VERL_ENGINE_VENDOR=%s to get PR2's",
                taken.__name__, device, vendor, VENDOR,
            )  # fmt: skip


verl_sglang.register_rollout()
# verl imports `external_lib` wherever it reads the model's configuration, also where nothing is trained: in rollout servers, which
# may have no Megatron-Core, and in agent loops, which see no GPU (Transformer Engine may fail to be imported there).
if importlib.util.find_spec("megatron") is not None and get_platform().is_available():
    register()
else:
    logger.info("no Megatron-Core or no accelerator in this process: no training engine is registered")
