"""The loop: rollout, old log-probs, kappa mini-steps, and round again (docs/design.md has the picture).

    push merged gates -> generate with routes -> rewards, advantages -> begin_rollout -> old log-probs (replay, keep features)
      -> kappa x (replay, policy update, predictor update from the second on) -> log, checkpoint
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_pr2.attach import PR2, RolloutReport
from megatron_pr2.errors import RolloutError
from megatron_pr2.rl import checkpoint
from megatron_pr2.rl.actor import Actor
from megatron_pr2.rl.batch import Sample, mini_batch_order
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import Example, PromptSampler
from megatron_pr2.rl.losses import group_advantages
from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.summary import drift_summary, logprob_gap, step_summary
from megatron_pr2.rollout.base import RolloutEngine, RolloutRequest, RolloutStats, SamplingParams
from megatron_pr2.rollout.collective import share
from megatron_pr2.rollout.handshake import handshake, require_routes

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Monitor(Protocol):
    """What watches the run on rank 0."""

    def phase(self, name: str) -> None:
        """Says what the run is doing."""

    def step(self, record: dict[str, Any]) -> None:
        """Takes the finished step's record."""


class Trainer:
    """GRPO with predictive routing replay; one instance per rank, all methods collective."""

    def __init__(
        self,
        config: TrainConfig,
        actor: Actor,
        engine: RolloutEngine,
        reference: RolloutEngine,
        examples: Sequence[Example],
        tokenizer: Any,
        monitor: Monitor | None,
    ) -> None:
        """Args:
        engine: started; samples the responses.
        reference: the actor's own model as an engine, for the handshake.
        monitor: on rank 0.
        """
        self._config, self._actor, self._engine, self._reference = config, actor, engine, reference
        self._examples, self._tokenizer, self._monitor = examples, tokenizer, monitor
        self._sampler = PromptSampler(len(examples), config.seed)
        self._directory = Path(config.run) / "checkpoints"
        self._step = 0
        self._seconds: dict[str, float] = {}
        self._weight_bytes = 0
        self._pushed = -1
        self._handshake_report: dict[str, float] | None = None

    def resume(self) -> int:
        """Continues from the newest checkpoint of the run, if there is one; returns the step that comes next."""
        state = checkpoint.load_latest(self._directory)
        if state is not None:
            self._actor.load_state_dict(state["actor"])
            self._sampler.load_state_dict(state["sampler"])
            self._step = int(state["step"])
            logger.info("resumed at step %d", self._step)
        return self._step

    def watch(self, monitor: Monitor) -> None:
        """Reports to `monitor` from now on; on rank 0."""
        self._monitor = monitor

    def run(self) -> None:
        """Trains to the configured number of steps and writes the policy to RUN/final in Hugging Face format."""
        if self._config.pr2_needs_engine_routes:
            require_routes(self._engine)
            if self._config.rollout.handshake:
                self._push()
                self._handshake()
        while self._step < self._config.steps:
            record = self._train_step()
            self._step += 1
            if self._step % self._config.checkpoint_every == 0 or self._step == self._config.steps:
                with self._timed("checkpoint"):
                    self._save()
            record["seconds"] = dict(self._seconds)
            if self._handshake_report is not None:  # in the first record after a start
                record["handshake"], self._handshake_report = self._handshake_report, None
            if self._monitor is not None:
                self._monitor.step(record)
        self._phase("export")
        self._actor.save_pretrained(Path(self._config.run) / "final")

    def _train_step(self) -> dict[str, Any]:
        started = time.monotonic()
        self._seconds = {}
        self._retrying(lambda: None)
        with self._timed("rollout"):
            samples, stats = self._rollout()
        with self._timed("old_logprobs"):
            report = self._actor.pr2.begin_rollout([sample.replay_sequence() for sample in samples])
            self._actor.old_logprobs(samples)
        mini_steps = []
        kappa = self._config.algorithm.mini_steps
        size = len(samples) // kappa
        with self._timed("update"):
            for mini_step in range(1, kappa + 1):
                self._phase(f"mini-step {mini_step} of {kappa}")
                mini_batch = samples[(mini_step - 1) * size : mini_step * size]
                mini_steps.append(self._actor.update(mini_batch, mini_step))
        record = self._record(samples, stats, report, mini_steps, time.monotonic() - started)
        self._actor.pr2.end_rollout()
        return record

    def _push(self) -> None:
        if self._pushed == self._step:
            return
        with self._timed("push"):
            self._engine.update_weights(self._counted(self._actor.export()), self._step)
        self._pushed = self._step

    def _counted(self, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        self._weight_bytes = 0
        for name, tensor in weights:
            self._weight_bytes += tensor.nbytes
            yield name, tensor

    def _handshake(self) -> None:
        self._phase("handshake")
        ids = self._tokenizer.encode(" ".join(e.prompt + e.answer for e in self._examples[:16]), add_special_tokens=False)[:48]
        report = handshake(self._engine, self._reference, ids, self._config.model.dtype)
        self._handshake_report = asdict(report)

    def _rollout(self) -> tuple[list[Sample], RolloutStats]:
        rollout = self._config.rollout
        prompts = [self._examples[i] for i in self._sampler.take(rollout.prompts)]
        repeated = [example for example in prompts for _ in range(rollout.responses)]
        first_id = self._step * len(repeated)
        requests = [
            RolloutRequest(
                tuple(self._tokenizer.encode(example.prompt, add_special_tokens=False)),
                int(np.random.SeedSequence([self._config.seed, first_id + i]).generate_state(1)[0]),
            )
            for i, example in enumerate(repeated)
        ]
        sampling = SamplingParams(rollout.max_new_tokens, rollout.temperature, (self._tokenizer.eos_token_id,))
        responses, stats = self._retrying(
            lambda: self._engine.generate(requests, sampling, return_routes=self._config.pr2_needs_engine_routes)
        )
        own = share(len(requests), mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank())
        texts = [self._tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in responses]
        rewards = [exact_match(text, example.answer) for text, example in zip(texts, repeated[own], strict=True)]
        advantages = group_advantages(np.asarray(rewards, dtype=np.float64), rollout.responses)
        samples = [
            Sample(first_id + own.start + i, response, reward, float(advantage))
            for i, (response, reward, advantage) in enumerate(zip(responses, rewards, advantages, strict=True))
        ]
        mini_steps = self._config.algorithm.mini_steps
        return [samples[i] for i in mini_batch_order(own, mini_steps, [self._config.seed, self._step])], stats

    def _retrying(self, action: Callable[[], T]) -> T:
        """Does what the engine is asked; an engine that died meanwhile is restarted and gets the same weights first.

        Nothing is lost: no response of this step was used yet, and requests carry their seeds.
        """
        for attempt in range(self._config.rollout.restarts + 1):
            try:
                self._push()
                return action()
            except RolloutError as error:
                if attempt == self._config.rollout.restarts:
                    raise
                logger.warning("rollout failed (%s); restarting the engine, attempt %d", error, attempt + 1)
                self._phase("restarting the rollout engine")
                self._engine.restart()
                self._pushed = -1
        raise AssertionError("unreachable")

    def _record(
        self,
        samples: list[Sample],
        stats: RolloutStats,
        report: RolloutReport,
        mini_steps: list[dict[str, Any]],
        seconds: float,
    ) -> dict[str, Any]:
        summary = step_summary(samples, mpu.get_data_parallel_group())
        routes, route_bytes, feature_bytes = _sum_reports(report, self._actor.pr2, mpu.get_data_parallel_group())
        # Engine and actor hold the same weights then, up to the prediction.
        if self._actor.pr2.engine_agreement is not None:
            routes["agreement"] = self._actor.pr2.engine_agreement
        routes["features_absent"] = sum(m["features_absent"] for m in mini_steps)
        tokens = int(summary.pop("tokens"))
        return {
            "step": self._step,
            "seed": self._config.seed,
            "preset": self._config.preset,
            "wall_seconds": seconds,
            **summary,
            "policy_loss": float(np.mean([m["loss"] for m in mini_steps])),
            "clip_fraction": float(np.mean([m["clip_fraction"] for m in mini_steps])),
            "grad_norm": float(np.mean([m["grad_norm"] for m in mini_steps])),
            "lr": self._actor.lr,
            "tokens_per_second": tokens / seconds,
            **drift_summary(mini_steps),
            "logprob_gap": logprob_gap(samples, mpu.get_data_parallel_group()),
            "routes": routes,
            "predictor": mini_steps[-1]["predictor"],
            "rollout_tokens_per_second": stats.generated_tokens / max(stats.seconds, 1e-9),
            "bytes": {"routes": route_bytes, "features": feature_bytes, "weights": self._weight_bytes},
        }

    def _save(self) -> None:
        checkpoint.save(
            self._directory, self._step, {"actor": self._actor.state_dict(), "sampler": self._sampler.state_dict()}
        )

    def _phase(self, name: str) -> None:
        if self._monitor is not None:
            self._monitor.phase(name)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._phase(phase.replace("_", " "))
        started = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started


def _sum_reports(report: RolloutReport, pr2: PR2, group: dist.ProcessGroup) -> tuple[dict[str, Any], int, int]:
    plan = pr2.feature_plan
    counts = {
        **asdict(report),
        "sampled": plan.sampled_tokens,
        "dropped_sequences": plan.dropped_sequences,
        "feature_bytes": pr2.features.nbytes,
    }
    values = torch.tensor(list(counts.values()), dtype=torch.int64)
    dist.all_reduce(values, group=group)
    total = dict(zip(counts, values.tolist(), strict=True))
    route_bytes, feature_bytes = total.pop("route_bytes"), total.pop("feature_bytes")
    total["missing_share"] = total["missing"] / max(1, total["tokens"])
    return total, route_bytes, feature_bytes
