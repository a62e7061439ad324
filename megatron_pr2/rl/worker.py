"""One training rank: platform, actor, engine, trainer, and what a person sees of them on rank 0."""

from __future__ import annotations

import contextlib
import logging
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_pr2 import host
from megatron_pr2.report.display import LiveDisplay
from megatron_pr2.report.metrics_log import MetricsLog
from megatron_pr2.rl.config import TrainConfig

logger = logging.getLogger(__name__)


class RunMonitor:
    """Rank 0's view: the live display and the metrics log."""

    def __init__(self, display: LiveDisplay, log: MetricsLog) -> None:
        self._display, self._log = display, log

    def phase(self, name: str) -> None:
        """Shows what is going on."""
        self._display.phase(name)

    def detail(self, text: str) -> None:
        """Shows how far it is."""
        self._display.detail(text)

    def step(self, record: dict[str, Any]) -> None:
        """Logs and shows a finished step."""
        self._log.append(record)
        self._display.update(record)


def run(config: TrainConfig, model_path: str, data_path: str) -> None:
    """Entry point of every rank; torchrun's environment variables say which.

    Args:
        model_path: Hugging Face checkpoint directory.
        data_path: JSONL file of prompts and answers.
    """
    signal.signal(signal.SIGTERM, _terminate)
    _init_platform(config)
    try:
        _train(config, model_path, data_path)
    finally:
        host.shutdown()


def _train(config: TrainConfig, model_path: str, data_path: str) -> None:
    # Imported after the platform is up: on a machine without a GPU Megatron-Core and Transformers need it to be imported at all.
    from transformers import AutoTokenizer

    from megatron_pr2.rl.actor import Actor
    from megatron_pr2.rl.data import load_examples
    from megatron_pr2.rl.engines import make_engine
    from megatron_pr2.rl.trainer import Trainer
    from megatron_pr2.rollout.embedded import MegatronEngine

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    actor = Actor(config, model_path, pad_id)
    reference = MegatronEngine(actor.model, actor.pr2, pad_id=pad_id)
    rank = dist.get_rank()
    with contextlib.ExitStack() as stack:
        engine = make_engine(config, model_path, reference)
        stack.callback(engine.close)
        monitor = None
        trainer = Trainer(config, actor, engine, reference, load_examples(data_path), tokenizer, None)
        resumed_at = trainer.resume()
        if rank == 0:
            log = stack.enter_context(MetricsLog(config.run, resume_step=resumed_at))
            title = f"megatron-pr2 · {config.preset} · {config.rollout.engine} rollouts · {config.run}"
            display = LiveDisplay(config.steps, title, start_step=resumed_at)
            _log_above(display)
            monitor = RunMonitor(stack.enter_context(display), log)
            trainer.watch(monitor)
            monitor.phase("starting the rollout engine")
        engine.start()
        trainer.run()


def _init_platform(config: TrainConfig) -> None:
    if torch.cuda.is_available():
        from megatron_pr2.rl import gpu

        gpu.init(expert=config.parallel.expert, seed=config.seed)
    else:
        host.init(expert=config.parallel.expert, seed=config.seed)


def _log_above(display: LiveDisplay) -> None:
    """Log lines go above the live table instead of through it."""
    from rich.logging import RichHandler

    if display.console.is_terminal:
        logging.getLogger().handlers = [RichHandler(console=display.console, show_path=False, show_time=False)]
    logging.getLogger("megatron_pr2").setLevel(logging.INFO)


def _terminate(number: int, frame: FrameType | None) -> None:
    # As an exception, so that the engine's processes are stopped and the display is left sane on the way out.
    raise SystemExit(128 + number)
