"""attach(): the one way in, and PR2, the handle that a trainer holds.

    from megatron_pr2.attach import MicroBatch, PR2Config, ReplaySequence, attach

    pr2 = attach(model_chunks, PR2Config.preset("pr2"), optimizer)
    pr2.begin_rollout(sequences)                             # routes that came with the rollout
    with pr2.old_logprobs(all_micro_batches):                # old-log-prob pass: replay (or record), keep features
        forward_backward(..., forward_only=True)
    for micro_batches in mini_batches:
        with pr2.actor_update(micro_batches):
            forward_backward(...)
        optimizer.step()
        pr2.step()
    pr2.end_rollout()
    engine.update_weights(pr2.engine_weights(names_and_tensors))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_pr2.checkpoint import checkpoint
from megatron_pr2.config import PR2Config
from megatron_pr2.drift.parts import Parts
from megatron_pr2.errors import AttachError, ConfigError
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.gates import gates_in_place
from megatron_pr2.prediction.pushes import Version
from megatron_pr2.replay.intake import take_in
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.sequences import ReplaySequence, RolloutReport, check_push
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.replay.sites import give_back
from megatron_pr2.routes.table import RouteTable

__all__ = ["PR2", "MicroBatch", "PR2Config", "ReplaySequence", "RouteTable", "attach"]  # what a pipeline needs, in one place


class PR2(Parts):
    """Predictive routing replay on one model; made by :func:`attach`. Its attributes: drift.parts.Parts."""

    def begin_rollout(self, sequences: Sequence[ReplaySequence], *, version: Version | None = None) -> RolloutReport:
        """Takes the sequences of a rollout batch that this rank trains on, checks their routes and samples tokens.

        Collective over the replica and over the ranks that hold other tokens of the same layers: what one of them refuses, all of
        them raise. Every rank of a replica is told of the same sequences in the same order.

        Args:
            version: of the weights that the batch was rolled out with, as `engine_weights` was told, for sequences that do not say
                it themselves (`ReplaySequence.versions`); None: the last push.

        Raises:
            RouteError: a value has a wrong type, a table is absent or does not fit the model, more tokens lack a route than
                `max_missing_share` allows, or the ranks of a replica were told of different sequences. Nothing has changed then.
        """
        self._passes.require_closed("begin_rollout")
        batch = take_in(
            sequences, version, self.config, self.model_config, len(self.moe_layers), self.replica,
            is_owner=self.routes.is_owner, token_group=self.token_group, device=self._device,
        )  # fmt: skip
        self._end_passes("begin_rollout")
        self.tokens = batch.tokens
        self.sequences = tuple(replace(sequence, routes=None, token_ids=None, versions=None) for sequence in batch.sequences)
        self.progress.begin(batch.tokens)
        self.token_check.begin(batch.tokens, batch.sequences)
        self.routes.begin(batch.tokens, batch.tables, batch.valid)
        self.horizon.end_batch()
        horizon = self.horizon.known_horizon(self.sequences)
        self.measurement.begin(batch.sequences, batch.tokens, batch.valid, batch.sampled, horizon, version)
        report = RolloutReport(batch.total, batch.missing, self.routes.table_bytes)
        self._mini_steps.begin_batch(report)
        return report

    def prefetch(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Starts moving the routes of micro-batches to the ranks that will replay them; the pass that runs them finds them there.

        Optional, collective over the replica: before other work that the transfer can hide behind.
        """
        self._passes.require_attached()
        if self.config.routes == "engine":
            self.routes.slices([micro_batch.grid for micro_batch in self._passes.agreed(micro_batches)])

    @contextmanager
    def old_logprobs(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """The pass that computes old log-probs under theta_old: predictor off, routes replayed (or recorded), features kept.

        Collective over all ranks of the model: each opens it equally often, without micro-batches where it has none. All ranks of a
        replica pass the same ones in the same order.

        Raises:
            ReplayError: a micro-batch was not run exactly once, or the routers agree with too few of the engine's experts in a
                layer, in a sequence or on the whole (`min_agreement`).
        """
        self._passes.require_closed("old_logprobs")
        micro_batches = self._passes.agreed(micro_batches)
        self._mini_steps.end_open("old_logprobs")
        mode = {"live": "live", "actor": "record", "engine": "replay"}[self.config.routes]
        predict = self.measurement.predict if mode == "record" and self.predictor is not None else None
        tokens = self.progress.score(micro_batches)
        with (
            self.measurement.log_prob_pass(micro_batches),
            self._passes.run("old_logprobs", micro_batches, mode, self.measurement.keep_features, predict) as session,
        ):
            yield session
        self.progress.scored[tokens] = True
        if mode == "record":
            self.routes.mark_recorded([micro_batch.grid for micro_batch in micro_batches])
            for bound, ids_TLK in session.recorded():
                self.routes.record(bound.micro_batch.grid, ids_TLK)

    @contextmanager
    def actor_update(
        self, micro_batches: Sequence[MicroBatch], mini_step: int | None = None, *, watched: Sequence[MicroBatch] = ()
    ) -> Iterator[ReplaySession]:
        """Forward and backward of one mini-step: routes replayed, gate weights live, drift measured, predictor gradient gathered.

        Collective over all ranks of the model, as `old_logprobs` is.

        Args:
            mini_step: counted by itself: 1 for the first mini-step after the rollout, as in the paper, and one more after each
                step(). The predictor learns from 2 on, because at 1 the policy is still the one that the features come from. The
                number of the mini-step that step() has not ended yet adds a further pass to it.
            watched: of the last mini-step, what `look_ahead` will be given: it then runs one forward and not two.

        Raises:
            ReplayError: mini_step < 1, a token is given twice or has no recorded route, or a micro-batch was not run exactly once.
        """
        self._passes.require_closed("actor_update")
        micro_batches = self._passes.agreed(micro_batches)
        mini_step = self._mini_steps.open(mini_step)
        tokens = self.progress.train(micro_batches)
        with (
            self.measurement.training_pass(micro_batches, learning=self.config.learns and mini_step >= 2),
            self._passes.run(f"mini-step {mini_step}", micro_batches, self._mode, self._training_observer(watched)) as session,
        ):
            yield session
        self._mini_steps.ran(mini_step, tokens)

    def step(self, lr: float | None = None) -> dict[str, Any]:
        """Ends a mini-step: updates the predictor (if it was learning) with alpha * lr and reads the drift metrics.

        Collective over the ranks that hold other tokens of the same layers; call it on every rank, after the policy's optimizer.
        Where it is forgotten, the next pass, push, checkpoint or end of the batch does it, on all ranks as well, and warns.

        Args:
            lr: the policy's current learning rate; None: the gates' in the optimizer, as it was when the mini-step began.

        Returns:
            "drift": means per MoE layer of the whole model (drift.metrics.COLUMNS, lift and, where router inputs are kept,
            drift.moments.MOMENTS and what they explain); "predictor": tokens, grad_norm, weight_norm over all layers;
            "features_absent": sampled tokens of this rank that no log-prob pass kept features of;
            "unjudged": those whose weights' version is not known; "delivered", with a prediction: per MoE layer of the whole model
            the share of beta W_p that arrived in the gates as pushed, NaN where nothing was;
            "hold_back", where a prediction can be held back: per MoE layer of the whole model `beta`, which this batch was rolled
            out with, `lift`, the gain in agreement over all mini-steps that was expected of it, and `lift_error`, its standard
            error.

        Raises:
            ReplayError: lr is not a finite number of at least 0, or None without an optimizer.
        """
        self._passes.require_closed("step")
        return self._mini_steps.end(lr)

    def look_ahead(self, micro_batches: Sequence[MicroBatch], forward: Callable[[ReplaySession], object]) -> None:
        """After a batch's last `step`, with predictor="lookahead": makes the W_p of the next push; collective over all ranks.

        The model runs twice over what is given, under its own weights and under those that its optimizer is heading for, or, over
        what `actor_update` watched, once under its own. Weights, optimizer, gradients and random states stay, bit by bit.

        Args:
            micro_batches: some of this rollout batch's; a few tens of thousands of tokens over all ranks are enough.
            forward: runs them once, without gradients: `lambda session: forward_backward(..., forward_only=True)`.

        Raises:
            AttachError: another predictor, or the optimizer is not known or cannot be read.
        """
        self._passes.require_closed("look_ahead")
        micro_batches = self._passes.agreed(micro_batches)
        self._mini_steps.end_open("look_ahead")
        self._predict_ahead(micro_batches, forward)

    def metrics(self) -> dict[str, float]:
        """The last step in a few numbers for any logger, `pr2/lift` and others (drift.metrics.scalars); not collective."""
        return self._mini_steps.metrics()

    def end_rollout(self) -> None:
        """After the last mini-step: frees routes and features, whose memory a colocated engine needs.

        Collective only where it makes up for a forgotten step(). Without it, what a batch says of predictions counts a push later.
        """
        self._end_passes("end_rollout")
        self.progress.end()
        self.tokens, self.sequences = TokenIndex({}), ()
        self.token_check.begin(self.tokens, ())
        self.routes.begin(self.tokens, {}, np.zeros(0, dtype=bool))
        self.measurement.end()
        self.horizon.end_batch()

    @contextmanager
    def replay(self, micro_batches: Sequence[MicroBatch]) -> Iterator[ReplaySession]:
        """A further pass over the rollout's tokens under other weights (a proximal policy, say), with the same routes.

        Nothing is learned from it and nothing kept: features are of the weights that the routes were predicted from. Routes that
        the actor records must have been recorded before. Collective, and refuses, as `actor_update` does.
        """
        self._passes.require_closed("replay")
        micro_batches = self._passes.agreed(micro_batches)
        self.progress.once(micro_batches)
        with self._passes.run("replay", micro_batches, self._mode) as session:
            yield session

    def record(self, micro_batches: Sequence[MicroBatch]) -> AbstractContextManager[ReplaySession]:
        """Any other forward whose routes are wanted (an embedded rollout, a handshake): the router's own routes, recorded."""
        return self._passes.record(micro_batches)

    def engine_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *,
        version: Version | None = None,
        gate_dtype: torch.dtype | None = None,
        horizon: float | None = None,
        own_stage: bool = False,
        has_gates: bool = True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Passes weights in Hugging Face names through and merges beta W_p into the gates on the way.

        What arrives of it is kept under the version; batches rolled out with it are judged by that. For every rank to call;
        collective over the pipeline group at the call (not while the result is walked), unless `own_stage`.

        Args:
            weights: of the whole model, or with `own_stage` of this pipeline stage only.
            version: what `begin_rollout` will be told; the last three are kept. None: batches that begin before the next push.
            gate_dtype: torch.float32 where the engine keeps its gates so (docs/sglang.md), which loses nothing of W_p; None sends
                them as they come, in bf16 rounded at random so that W_p arrives on average.
            horizon: updates until what is sampled under these weights is trained on, where engines get gates for different
                mini-steps (`ReplaySequence.horizon`); 0 is no prediction, None the average.
            has_gates: False where another rank sends the gates of this stage.

        Raises:
            AttachError: W_p is not finite; a gate comes in another dtype than the router's; after the last weight, if not every MoE
                layer's gate came by (another naming would lose the prediction silently).
            ConfigError: an argument has a wrong type.
        """
        check_push("engine_weights", version, horizon, gate_dtype)
        if isinstance(weights, Mapping):
            raise ConfigError(f"engine_weights: weights is a {type(weights).__name__}; pass pairs of name and tensor, its items()")
        self._mini_steps.end_open("engine_weights")
        if self.predictor is None:
            self.measurement.pushes.sent(version)
            return iter(weights)
        how: dict[str, Any] = {"version": version, "gate_dtype": gate_dtype, "horizon": horizon}
        return self.measurement.pushes.engine_weights(weights, self.layers, own_stage=own_stage, has_gates=has_gates, **how)

    def merged_gates(self, version: Version | None = None, horizon: float | None = None) -> AbstractContextManager[None]:
        """The model itself with W + beta W_p in its gates, for an embedded rollout; the gates come back bit-identical.

        A push like `engine_weights`; of the last one, or that of this version, if nothing changed, in the dtype that it went in.
        """
        check_push("merged_gates", version, horizon)
        self._mini_steps.end_open("merged_gates")
        if self.predictor is None:
            self.measurement.pushes.sent(version)
            return nullcontext()
        return gates_in_place(self.sites, self.measurement.pushes.push(version, horizon=horizon, any_dtype=True).arrived)

    def save(self, directory: str | Path, *, rollout: bool = False) -> None:
        """Writes W_p and what goes with it into a directory of its own; any parallel layout loads it. Collective over all ranks.

        A pipeline that would rather have it in its own `dist_checkpointing` call: checkpoint.checkpoint.sharded_state_dict.

        Args:
            rollout: also keeps the current rollout batch, for a checkpoint between two mini-steps.

        Raises:
            CheckpointError: on every rank, if any rank could not write.
        """
        self._mini_steps.end_open("save")
        checkpoint.save(self, directory, rollout=rollout)

    def load(self, directory: str | Path, *, sequences: Sequence[int] | None = None) -> None:
        """Restores what :meth:`save` wrote; collective over all ranks.

        Args:
            sequences: takes up the rollout batch as well: the ids of what this rank's replica trains on.

        Raises:
            CheckpointError: on every rank, if any rank cannot read it, or it is of a model of another size.
        """
        self._end_passes("load")
        checkpoint.load(self, directory, sequences=sequences)

    def detach(self) -> None:
        """Gives the routers back as they were; the handle cannot be used afterwards. Refused while a pass is open."""
        if self._passes.attached:
            self._passes.require_closed("detach")
            give_back(self.sites)
            self.replica.release()
            self._passes.attached = False


def attach(model_chunks: Sequence[torch.nn.Module] | torch.nn.Module, config: PR2Config, optimizer: Any = None) -> PR2:
    """Adds predictive routing replay to a built Megatron-Core model (plain, DDP- or Float16Module-wrapped), in place.

    Collective over all ranks of the default process group, which all hold a part of the model.

    Args:
        model_chunks: the model, or its virtual pipeline chunks.
        config: e.g. PR2Config.preset("pr2").
        optimizer: the policy's, whose learning rate of the gates step() reads; None: `pr2.optimizer = ...` later, or step(lr=...).

    Raises:
        AttachError: no MoE layers, a custom or sinkhorn router, another replay, attached already; an optimizer without the gates.
    """
    several = isinstance(model_chunks, Iterable) and not isinstance(model_chunks, torch.nn.Module)
    chunks = list(model_chunks) if several else [model_chunks]
    if not chunks:
        raise AttachError("attach() got no model chunk")
    if wrong := [type(chunk).__name__ for chunk in chunks if not isinstance(chunk, torch.nn.Module)]:
        raise AttachError(f"attach() got a {wrong[0]} as a model chunk; pass the model, or the list of its virtual pipeline chunks")
    if not isinstance(config, PR2Config):
        raise AttachError(f"attach() got {config!r} as its config; pass PR2Config.preset('pr2'), or another preset")
    return PR2(chunks, config, optimizer)


class _Callable(ModuleType):
    """Importing this module makes `megatron_pr2.attach` the module, where the package promises the function; it may be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> PR2:
        return attach(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:  # cloudpickle (Ray) knows plain modules only
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable
