"""Warm-start: a short supervised phase that turns the untrained tiny model into a policy that is sometimes right.

RL needs rewards that are neither all 0 nor all 1. The model first learns to work sums out (task.py), or to call a calculator
(calculator.py), with a guess now and then, and at the end to guess more often than not, so its exact match at temperature 1 starts
in a band that leaves room above. Plain Transformers and AdamW in one process on one thread; same configuration, same weights on the
same machine.

A load-balancing loss per layer (Switch Transformer, arXiv 2101.03961, Eq. 4) keeps experts alive here; the checkpoint that is
written has it switched off, because it would pull against the policy objective in RL.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_pr2.errors import CheckpointError, ConfigError
from megatron_pr2.rl.calculator import Calculator, demonstration
from megatron_pr2.rl.supervised import Response, balance_loss, exact_match_rate, routing_statistics, supervised_batch
from megatron_pr2.rl.task import LESSONS, Problem, TaskConfig, guess, make_problems
from megatron_pr2.rl.tiny import TinyModelConfig, build_tiny_model, save_tiny_model
from megatron_pr2.rl.tokenizer import PAD_ID, byte_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

logger = logging.getLogger(__name__)

RECORD = "warm_start.json"
# Raised when the code below changes what a configuration trains, so that cached checkpoints are made again.
_RECIPE = 1
_WARMUP_STEPS = 20


@dataclass(frozen=True)
class WarmStartConfig:
    """The supervised phase; the defaults are the quickstart's.

    Attributes:
        seed: decides initial weights, data and order.
        model, task: sizes of the policy, and what the prompts look like.
        lesson: what is shown beside guesses: "worked" sums, or calls of a "calculator" and its replies, which bear no loss.
        steps, batch_size, lr: AdamW with a linear decay to zero after a short warm-up.
        problems: different warm-start prompts.
        guess_share, guess_spread: share of guessed responses at the end, and how far a guess may be off.
        early_guess_share, early: share of guessed responses during the first `early` of the steps.
        balance: weight of the load-balancing loss.
        band: lowest and highest exact match of sampled responses to held-out prompts that RL should start from.
        extra_rounds: further rounds of steps/4, at a quarter of the learning rate, while the exact match is below the band.
        eval_prompts: held-out prompts sampled to measure it.
    """

    seed: int = 0
    model: TinyModelConfig = field(default_factory=TinyModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    lesson: str = "worked"
    steps: int = 450
    batch_size: int = 64
    lr: float = 4e-3
    problems: int = 4000
    guess_share: float = 0.6
    guess_spread: int = 5
    early_guess_share: float = 0.1
    early: float = 0.8
    balance: float = 0.01
    band: tuple[float, float] = (0.25, 0.5)
    extra_rounds: int = 3
    eval_prompts: int = 256

    def __post_init__(self) -> None:
        if self.lesson not in LESSONS:
            raise ConfigError(f"WarmStartConfig.lesson={self.lesson!r}: expected one of {', '.join(LESSONS)}")
        for name in ("steps", "batch_size", "problems", "eval_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"WarmStartConfig.{name}={getattr(self, name)}: expected at least 1")
        for name in ("guess_share", "early_guess_share", "early"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"WarmStartConfig.{name}={getattr(self, name)}: expected 0..1")
        if not 0 <= self.band[0] < self.band[1] <= 1:
            raise ConfigError(f"WarmStartConfig.band={self.band}: expected 0 <= low < high <= 1")
        if self.batch_size > self.problems:
            raise ConfigError(f"WarmStartConfig.batch_size={self.batch_size}: expected at most problems={self.problems}")

    @classmethod
    def of(cls, lesson: str, seed: int) -> WarmStartConfig:
        """What `model.warm_start` names. Calls of a calculator are learned sooner than sums."""
        return cls(seed=seed, lesson=lesson, steps=150) if lesson == "calculator" else cls(seed=seed, lesson=lesson)

    def digest(self) -> str:
        """Two configurations with the same digest give the same checkpoint."""
        settings = asdict(self)
        if self.lesson == "worked":  # as before there were lessons: what was cached then is the same
            del settings["lesson"]
        return hashlib.sha256(json.dumps([_RECIPE, settings], sort_keys=True).encode()).hexdigest()


def ensure_warm_start(path: str | Path, config: WarmStartConfig | None = None, *, show_progress: bool = True) -> Path:
    """The warm-started model directory at `path`, made if it is not there yet.

    It is a Hugging Face model directory with `warm_start.json` (configuration, exact match, routing) beside the weights. One of
    another configuration is replaced. The directory appears complete or not at all, also if the process is killed half-way.

    Raises:
        CheckpointError: something else is at `path`, or it cannot be written.
    """
    path, config = Path(path), config or WarmStartConfig()
    found = _read_record(path)
    if found is not None and found["digest"] == config.digest():
        logger.info("warm start: %s is already there", path)
        return path
    if found is None and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and has no {RECORD}: it is no warm start of this program and is not overwritten; "
            "choose another directory or remove it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            fresh, old = Path(scratch) / "fresh", Path(scratch) / "old"
            model, result = warm_start(config, show_progress=show_progress)
            save_tiny_model(model, fresh)
            record = {"digest": config.digest(), "config": asdict(config), **result}
            (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                os.replace(path, old)
            os.replace(fresh, path)
    except OSError as error:
        raise CheckpointError(f"warm start: cannot write {path} ({error}); choose a directory that can be written") from error
    return path


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a warm start, or None if there is none that can be read."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "digest" in record else None


def warm_start(config: WarmStartConfig, *, show_progress: bool = False) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """Trains a tiny model and returns it with {"exact_match", "in_band", "steps", "routing"}.

    An exact match outside the band is logged as a warning and left to the caller: a deliberately small configuration may want it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    try:
        with Progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, disable=not show_progress) as progress:
            return _train(config, progress)
    finally:
        torch.set_num_threads(threads)


def _train(config: WarmStartConfig, progress: Progress) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    trainer = _Trainer(config, progress)
    low, high = config.band
    early = int(config.early * config.steps)
    trainer.round([config.early_guess_share] * early + [config.guess_share] * (config.steps - early), config.lr)
    rate = trainer.exact_match()
    for _ in range(config.extra_rounds):
        if rate >= low:
            break
        trainer.round([config.guess_share] * max(1, config.steps // 4), config.lr / 4)
        rate = trainer.exact_match()
    if not low <= rate <= high:
        logger.warning("warm start: exact match %.3f on held-out prompts is outside %.2f..%.2f", rate, low, high)
    routing = routing_statistics(trainer.model, trainer.held_out)
    result = {"exact_match": rate, "in_band": low <= rate <= high, "steps": trainer.steps, "routing": routing}
    return trainer.model, result


class _Trainer:
    """Model, optimizer and data of one warm start."""

    def __init__(self, config: WarmStartConfig, progress: Progress) -> None:
        self.model = build_tiny_model(config.model, config.seed)
        self.steps = 0
        self._config, self._progress = config, progress
        self._bar = progress.add_task("warm start", total=0, note="")
        self.held_out = make_problems(config.task, "eval", config.eval_prompts, config.seed)
        self._problems = make_problems(config.task, "warmstart", config.problems, config.seed)
        self._environment = Calculator(byte_tokenizer()) if config.lesson == "calculator" else None
        self._rng = random.Random(config.seed)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def round(self, guess_shares: Sequence[float], peak_lr: float) -> None:
        """One supervised step per entry of `guess_shares`, with a learning rate that rises to `peak_lr` and falls to zero."""
        self._progress.update(self._bar, total=self.steps + len(guess_shares))
        self.model.train()
        for step, guess_share in enumerate(guess_shares):
            lr = peak_lr * min((step + 1) / _WARMUP_STEPS, 1 - step / len(guess_shares))
            loss = self._step(self._demonstrations(guess_share), lr)
            self.steps += 1
            self._progress.update(self._bar, completed=self.steps, note=f"loss {loss:.3f}")
        self.model.eval()

    def exact_match(self) -> float:
        """On held-out prompts."""
        rate = exact_match_rate(self.model, self.held_out, self._config.seed, self._environment)
        self._progress.update(self._bar, note=f"exact match {rate:.1%}")
        return rate

    def _demonstrations(self, guess_share: float) -> list[tuple[str, Response]]:
        return [
            (p.prompt, guess(p, self._config.guess_spread, self._rng) if self._rng.random() < guess_share else self._lesson(p))
            for p in self._rng.sample(self._problems, self._config.batch_size)
        ]

    def _lesson(self, problem: Problem) -> Response:
        return problem.worked if self._config.lesson == "worked" else demonstration(problem)

    def _step(self, pairs: Sequence[tuple[str, Response]], lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        input_ids_BS, labels_BS = supervised_batch(pairs)
        out = self.model(input_ids=input_ids_BS, labels=labels_BS, use_cache=False, output_router_logits=True)
        real_T = (input_ids_BS != PAD_ID).flatten()
        balance = balance_loss(out.router_logits, real_T, self._config.model.num_experts_per_tok)
        (out.loss + self._config.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(out.loss.detach())
