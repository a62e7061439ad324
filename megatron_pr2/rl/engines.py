"""Which rollout engine a configuration means."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from transformers import AutoConfig

from megatron_pr2.hf.shape import model_shape
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.sglang_settings import sglang_config
from megatron_pr2.rollout.base import RolloutEngine
from megatron_pr2.rollout.collective import CollectiveEngine
from megatron_pr2.rollout.embedded import MegatronEngine


def make_engine(config: TrainConfig, model_path: str, embedded: MegatronEngine) -> RolloutEngine:
    """The configured engine, not yet started; every rank calls it.

    Args:
        model_path: Hugging Face directory that an own SGLang server is started from.
        embedded: the actor's own model as an engine.
    """
    if config.rollout.engine == "megatron":
        return embedded
    engine: RolloutEngine | None = None
    if dist.get_rank() == 0:
        from megatron_pr2.rollout.sglang.engine import SGLangEngine

        engine = SGLangEngine(sglang_config(config, model_path), model_shape(AutoConfig.from_pretrained(model_path)))
    return CollectiveEngine(
        engine,
        data_parallel_rank=mpu.get_data_parallel_rank(),
        data_parallel_size=mpu.get_data_parallel_world_size(),
        name="sglang",
    )
