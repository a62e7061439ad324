"""verl's SGLang replica and server, whose routes verl can read (megatron_pr2.integrations.verl_sglang); imports SGLang."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer, SGLangReplica

from megatron_pr2.errors import RolloutError
from megatron_pr2.integrations.verl_sglang.decoder import RouteDecoder, model_dimensions
from megatron_pr2.rollout.sglang.refusals import check_release, refusals


class PR2SGLangHttpServer(SGLangHttpServer):
    """verl's server, which decodes routes where they are wanted, and refuses what would make them wrong."""

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """Raises:
        RolloutError: SGLang's release, or a setting that it was started with or chose itself, makes routes wrong.
        """
        if not self.config.enable_rollout_routing_replay:
            await super().launch_server(*args, **kwargs)
            return
        import sglang

        check_release(sglang.__version__, "actor_rollout_ref.rollout.name=sglang")
        if not self.config.skip_tokenizer_init:
            raise RolloutError(
                "actor_rollout_ref.rollout.skip_tokenizer_init=false: verl reads routes by a module that this release of SGLang "
                "does not have; set it to true"
            )
        await super().launch_server(*args, **kwargs)
        if self.node_rank > 0:
            return
        manager: Any = self.tokenizer_manager
        if wrong := refusals(vars(manager.server_args)):
            raise RolloutError("actor_rollout_ref.rollout.engine_kwargs.sglang: " + "; ".join(wrong))
        self.tokenizer_manager: Any = RouteDecoder(manager, *model_dimensions(self.model_config.hf_config))


class PR2SGLangReplica(SGLangReplica):
    """verl's replica, with these servers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(PR2SGLangHttpServer)
