"""The loop (docs/design.md has the picture):

push merged gates -> generate with routes -> rewards, advantages -> begin_rollout -> old log-probs (replay, keep features)
  -> kappa x (replay, policy update, predictor update from the second on) -> log, checkpoint
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megatron_pr2.errors import PR2Error, RolloutError
from megatron_pr2.parallel.consensus import raise_together
from megatron_pr2.replay.logprob_gap import BOUNDS, OLDER_BOUNDS, judge
from megatron_pr2.replay.sites import unwrapped
from megatron_pr2.report.display import LiveDisplay
from megatron_pr2.report.metrics_log import MetricsLog
from megatron_pr2.rl import checkpoint
from megatron_pr2.rl.actor import Actor
from megatron_pr2.rl.batch import Sample
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import Example, encode
from megatron_pr2.rl.deal import mini_batch_order
from megatron_pr2.rl.losses import group_advantages
from megatron_pr2.rl.preflight import context_length
from megatron_pr2.rl.prompts import PromptQueue
from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.summary import gap_summary, logprob_gap, replay_summary, rollout_summary, update_summary
from megatron_pr2.rollout.base import (
    Progress,
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    RolloutResponse,
    RolloutStats,
    SamplingParams,
)
from megatron_pr2.rollout.collective import CollectiveEngine, share
from megatron_pr2.rollout.handshake import PROBE_TOKENS, handshake, probe_of, require_routes

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Monitor:
    """Shows and keeps a run's progress; on rank 0 only, where it is given a display and a log."""

    def __init__(self, display: LiveDisplay | None = None, log: MetricsLog | None = None) -> None:
        self._display, self._log = display, log

    def phase(self, name: str) -> None:
        """What is being done now."""
        if self._display is not None:
            self._display.phase(name)

    def detail(self, text: str) -> None:
        """How far it is; called from any thread."""
        if self._display is not None:
            self._display.detail(text)

    def step(self, record: dict[str, Any]) -> None:
        """The record of a finished step."""
        if self._log is not None and self._display is not None:
            self._log.append(record)
            self._display.update(record)


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
        monitor: Monitor | None = None,
    ) -> None:
        """Args:
        engine: samples the responses; started before :meth:`run`.
        reference: the actor's own model as an engine, for the handshake.
        """
        self._config, self._actor, self._engine, self._reference = config, actor, engine, reference
        self._examples, self._tokenizer = examples, tokenizer
        self.monitor = monitor or Monitor()
        self._prompts = PromptQueue(config, examples, tokenizer)
        self._directory = Path(config.run) / "checkpoints"
        self._step, self._pushed = 0, -1
        # With rollout.delay: what was sampled under the weights before the last step, for the next one to train on.
        self._pending: list[Sample] | None = None
        # What servers hold: all horizons, or with turns one after the other.
        self._horizons = list(dict.fromkeys(config.horizons)) if isinstance(engine, CollectiveEngine) else []
        self._in_turns = config.rollout.groups == "turns" and bool(self._horizons)
        self._turn: float | None = None
        # Of the step at work.
        self._record: dict[str, Any] = {}

    def resume(self) -> int:
        """Continues from the newest checkpoint of the run, if there is one; returns the step that comes next."""
        path = checkpoint.latest(self._directory)
        if path is not None:
            self._actor.load(path)
            state = checkpoint.read(path)
            self._prompts.load_state_dict(state["sampler"])
            self._step = int(state["step"])
            if "pending" in state:
                self._pending = self._in_order(self._actor.load_pending(path, **state["pending"]))
            logger.info("resumed at step %d", self._step)
        return self._step

    def run(self) -> None:
        """Trains to the configured number of steps and writes the policy to RUN/final in Hugging Face format."""
        if self._config.pr2_needs_engine_routes:
            require_routes(self._engine)
        while self._step < self._config.steps:
            self._train_step()
            self._step += 1
            if self._step % self._config.checkpoint_every == 0 or self._step == self._config.steps:
                with self._timed("checkpoint"):
                    state = {"actor": self._actor.state_dict(), "sampler": self._prompts.state_dict()}
                    if self._pending is not None:
                        state |= self._actor.pending_state(self._pending)
                    checkpoint.save(self._directory, self._step, state)
            self.monitor.step(self._record)
        self.monitor.phase("export")
        self._actor.save_pretrained(Path(self._config.run) / "final")

    def _train_step(self) -> None:
        started = time.monotonic()
        own = {"step": self._step, "seed": self._config.seed, "preset": self._config.preset}
        self._record = {**own, "seconds": {}, "cpu_seconds": {}, "weight_bytes": 0, "gate_bytes": 0}
        self._retrying(lambda: None)
        with self._timed("rollout"):
            samples, stats = self._rollout()
            if self._config.rollout.delay:
                if self._pending is None:  # the first step's own batch
                    self._pending, (samples, stats) = samples, self._rollout()
                samples, self._pending = self._pending, samples
        kappa = self._config.algorithm.mini_steps
        size = len(samples) // kappa
        with self._timed("old_logprobs"):
            sequences = [sample.replay_sequence(i // size + 1, self._step) for i, sample in enumerate(samples)]
            report = self._actor.pr2.begin_rollout(sequences)
            self._actor.old_logprobs(samples)
            gap = self._compare_logprobs(samples)
        mini_steps = []
        with self._timed("update"):
            for mini_step in range(1, kappa + 1):
                self.monitor.phase(f"mini-step {mini_step} of {kappa}")
                mini_batch = samples[(mini_step - 1) * size : mini_step * size]
                mini_steps.append(self._actor.update(mini_batch, mini_step))
        if self._actor.pr2.config.looks_ahead:
            with self._timed("look_ahead"):
                self._actor.look_ahead()
        seconds, group = time.monotonic() - started, mpu.get_data_parallel_group()
        self._record |= {
            "wall_seconds": seconds,
            "lr": self._actor.lr,
            **rollout_summary(samples, self._step, stats, group),
            **update_summary(mini_steps),
            **replay_summary(report, self._actor.pr2, mini_steps, group),
            **gap,
            "rollout_tokens_per_second": stats.generated_tokens / max(stats.seconds, 1e-9),
        }
        self._record["tokens_per_second"] = self._record.pop("tokens") / seconds
        self._record["bytes"] |= self._sent_bytes()
        self._actor.pr2.end_rollout()

    def _compare_logprobs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the record says of the engine's log-probs; refuses those that cannot be of these tokens and weights."""
        gaps = logprob_gap(samples, self._step, mpu.get_data_parallel_group())
        given, failure = self._config.rollout.max_logprob_gap, None
        # The engine weights its experts by the prediction.
        now = OLDER_BOUNDS if self._actor.pr2.measurement.pushes.predicts else BOUNDS[self._config.model.dtype]
        for sums, (warn, most) in zip(gaps, (now, OLDER_BOUNDS), strict=True):
            if given != 0 and (found := judge(sums, (warn, most) if given is None else (min(warn, given), given))):
                if found.refuse:
                    failure = RolloutError(f"{found.text}. rollout.max_logprob_gap sets another bound; 0 disables the check")
                elif dist.get_rank() == 0:
                    logger.warning("step %d: %s", self._step, found.text)
        raise_together(failure)
        return gap_summary(gaps)

    def _push(self) -> None:
        if self._pushed == self._step:
            return
        with self._timed("push"):
            self._record["weight_bytes"] = self._record["gate_bytes"] = 0
            if isinstance(self._engine, CollectiveEngine) and self._engine.takes_owned_weights:
                if self._horizons:
                    now, self._turn = self._horizons[:1] if self._in_turns else self._horizons, self._horizons[0]
                    gates = {horizon: self._counted_gates(horizon) for horizon in now}
                    self._engine.update_owned_weights(self._counted(self._actor.export_rest()), self._step, gates)
                else:
                    self._engine.update_owned_weights(self._counted(self._actor.export_owned(self._step)), self._step)
            else:
                self._engine.update_weights(self._counted(self._actor.export(self._step)), self._step)
        # The embedded engine is the actor itself: once is enough.
        if self._engine is not self._reference or self._pushed < 0:
            self._compare_routes()
        self._pushed = self._step

    def _take_turn(self, horizon: float | None) -> None:
        """Gives all servers the gates for a horizon, unless they have them: those for the first come with the push."""
        if horizon in (None, self._turn):
            return
        assert isinstance(self._engine, CollectiveEngine)
        with self._timed("gates"):
            self._engine.update_owned_gates(self._counted_gates(horizon), self._step, horizon)
        self._turn = horizon
        self._compare_routes()
        self.monitor.phase("rollout")

    def _counted_gates(self, horizon: float) -> Iterator[tuple[str, torch.Tensor]]:
        return self._counted(self._actor.export_gates(self._step, horizon), "gate_bytes")

    def _counted(
        self, weights: Iterator[tuple[str, torch.Tensor]], what: str = "weight_bytes"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._record[what] += tensor.nbytes
            yield name, tensor

    def _sent_bytes(self) -> dict[str, int]:
        """Of the whole model and, in addition to it, of gates for single horizons; sent once for all servers of a horizon."""
        total = torch.tensor([self._record.pop("weight_bytes"), self._record.pop("gate_bytes")])
        if self._engine.takes_owned_weights:
            dist.all_reduce(total)
        weights, gates = total.tolist()
        return {"weights": weights, "gates": gates} if self._horizons else {"weights": weights}

    def _compare_routes(self) -> None:
        if self._config.pr2_needs_engine_routes and self._config.rollout.handshake:
            with self._timed("handshake"):
                self._handshake()

    def _handshake(self) -> None:
        text = " ".join(example.prompt + example.answer for example in self._examples[:16])
        ids = encode(self._tokenizer, text, "the handshake's probe", at_least=2)
        context = getattr(unwrapped(self._actor.model), "max_sequence_length", math.inf)
        # One token is sampled after it, and SGLang keeps six of its context for itself.
        longest = min(context, context_length(self._config.rollout.sglang)) - 7
        probe, dtype, layers = probe_of(ids, int(min(PROBE_TOKENS, longest))), self._config.model.dtype, self._actor.pr2.moe_layers
        report, failure = None, None
        try:
            report = handshake(self._engine, self._reference, probe, dtype, layers)
        except PR2Error as error:
            # The ranks' own probes may differ in the last bit: one that refuses alone would restart an engine that the others ask.
            failure = error
        raise_together(failure)
        assert report is not None
        if report.route_agreement <= self._record.get("handshake", {}).get("route_agreement", 1.0):
            self._record["handshake"] = asdict(report)  # the worst of those of all turns

    def _rollout(self) -> tuple[list[Sample], RolloutStats]:
        rollout, requests = self._config.rollout, self._prompts.requests()
        stops = self._prompts.stop_token_ids
        sampling = SamplingParams(rollout.max_new_tokens, rollout.temperature, stops, max_turns=rollout.max_turns)
        self._engine.on_progress = self._on_progress
        batch = self._retrying(lambda: self._generate(requests, sampling))
        answered = self._prompts.settle(batch.finished)
        own = share(len(answered), mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank())
        rewards = [
            exact_match(self._last_turn(response), example.answer)
            for response, (_, example) in zip(batch.responses, answered[own], strict=True)
        ]
        advantages = group_advantages(np.asarray(rewards, dtype=np.float64), rollout.responses)
        samples = [
            Sample(number, response, reward, float(advantage))
            for (number, _), response, reward, advantage in zip(answered[own], batch.responses, rewards, advantages, strict=True)
        ]
        return self._in_order(samples), batch.stats

    def _in_order(self, samples: list[Sample]) -> list[Sample]:
        """A rank's samples, by number, in the order in which they are trained on."""
        order = mini_batch_order([sample.id for sample in samples], self._config.algorithm.mini_steps, self._config.seed)
        return [samples[i] for i in order]

    def _generate(self, requests: list[RolloutRequest], sampling: SamplingParams) -> RolloutBatch:
        with_routes = self._config.pr2_needs_engine_routes
        if self._in_turns:
            assert isinstance(self._engine, CollectiveEngine)
            return self._engine.generate_in_turns(requests, sampling, self._take_turn, return_routes=with_routes)
        return self._engine.generate(requests, sampling, return_routes=with_routes, enough=self._prompts.enough)

    def _last_turn(self, response: RolloutResponse) -> str:
        """What the policy wrote after the environment's last reply: the reward is for its own words."""
        replies = np.flatnonzero(~response.loss_mask)
        return self._tokenizer.decode(response.response_ids[replies[-1] + 1 if len(replies) else 0 :], skip_special_tokens=True)

    def _on_progress(self, progress: Progress) -> None:
        self.monitor.detail(f"{progress.finished} of {progress.total} responses, {progress.tokens} tokens")

    def _retrying(self, action: Callable[[], T]) -> T:
        """Asks the engine; one that fails is restarted, gets the same weights and is asked again.

        Nothing is lost: no response of this step was used yet, and requests carry their seeds.
        """
        for restarts in range(self._config.rollout.restarts + 1):
            try:
                if restarts:
                    self.monitor.phase("restarting the rollout engine")
                    self._pushed = -1
                    self._engine.restart()
                self._push()
                return action()
            except RolloutError as error:
                if restarts == self._config.rollout.restarts:
                    raise
                logger.warning("rollout failed (%s); restarting the engine, attempt %d", error, restarts + 1)
        raise AssertionError("unreachable")

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.monitor.phase(phase.replace("_", " "))
        clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
        started = {name: clock() for name, clock in clocks.items()}
        yield
        for name, clock in clocks.items():
            taken = self._record[name]
            taken[phase] = taken.get(phase, 0.0) + clock() - started[name]
