"""One training rank: platform, actor, engine, trainer, and what a person sees of them on rank 0.

Imported when host.enable() was called: without a GPU Megatron-Core and Transformers need it to be imported at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from types import FrameType

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from rich.logging import RichHandler
from transformers import AutoConfig, AutoTokenizer

from megatron_pr2 import host
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.report.display import LiveDisplay
from megatron_pr2.report.metrics_log import MetricsLog
from megatron_pr2.rl.actor import Actor
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import load_examples
from megatron_pr2.rl.environment import write_environment
from megatron_pr2.rl.preflight import sglang_config
from megatron_pr2.rl.trainer import Monitor, Trainer
from megatron_pr2.rollout.base import RolloutEngine
from megatron_pr2.rollout.collective import CollectiveEngine
from megatron_pr2.rollout.embedded import MegatronEngine


def run(config: TrainConfig, model_path: str, data_path: str) -> None:
    """Trains; every rank calls it.

    Args:
        model_path: Hugging Face checkpoint directory.
        data_path: JSONL file of prompts and answers.
    """
    signal.signal(signal.SIGTERM, _terminate)
    (init_gpu if torch.cuda.is_available() else host.init)(expert=config.parallel.expert, seed=config.seed)
    try:
        _train(config, model_path, data_path)
    finally:
        host.shutdown()


def init_gpu(*, expert: int, seed: int) -> None:
    """Joins the process group with this rank's GPU, from torchrun's environment, and sets up data and expert parallelism."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl")
    mpu.initialize_model_parallel(expert_model_parallel_size=expert)
    model_parallel_cuda_manual_seed(seed)


def _train(config: TrainConfig, model_path: str, data_path: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    actor = Actor(config, model_path, pad_id)
    reference = MegatronEngine(actor.model, actor.pr2, pad_id=pad_id)
    with contextlib.ExitStack() as stack:
        engine = reference if config.rollout.engine == "megatron" else _sglang_engine(config, model_path)
        stack.callback(engine.close)
        trainer = Trainer(config, actor, engine, reference, load_examples(data_path), tokenizer)
        resumed_at = trainer.resume()
        if dist.get_rank() == 0:
            write_environment(config.run, AutoConfig.from_pretrained(model_path), config.model.dtype, dist.get_world_size())
            log = stack.enter_context(MetricsLog(config.run, resume_step=resumed_at))
            title = f"megatron-pr2 · {config.preset} · {config.rollout.engine} rollouts · {config.run}"
            display = LiveDisplay(config.steps, title, start_step=resumed_at)
            if display.console.is_terminal:  # log lines go above the live table instead of through it
                logging.getLogger().handlers = [RichHandler(console=display.console, show_path=False, show_time=False)]
            logging.getLogger("megatron_pr2").setLevel(logging.INFO)
            trainer.monitor = Monitor(stack.enter_context(display), log)
        trainer.monitor.phase("starting the rollout engine")
        engine.start()
        trainer.run()


def _sglang_engine(config: TrainConfig, model_path: str) -> RolloutEngine:
    engine: RolloutEngine | None = None
    if dist.get_rank() == 0:
        from megatron_pr2.rollout.sglang.engine import SGLangEngine

        engine = SGLangEngine(sglang_config(config, model_path), model_shape(AutoConfig.from_pretrained(model_path)))
    rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    return CollectiveEngine(engine, data_parallel_rank=rank, data_parallel_size=size, name="sglang")


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the engine's processes are stopped and the terminal is restored on the way out.
    raise SystemExit(128 + number)
