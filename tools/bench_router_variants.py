"""Ways of routing, each as a subject that can be timed; for bench_router.

A subject's `opened()` prepares one sample outside of the timed region and yields what is timed: forward and backward of all
micro-batches in the scopes "router" and "layer", a whole training step through PR2's own calls in the scope "step".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from bench_router_gates import VOCABULARY, Gate, Platform, build, fill, routers, share_weights
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor, nn

from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.sequences import ReplaySequence
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.routes.table import RouteTable

Run = Callable[[], None]
POLICY_LR = 1e-6


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way of routing.

    Attributes:
        name: in the report.
        what: one line for the reader.
        mode: "plain", "mcore-record", "mcore-replay", "live", "record" or "replay".
        settings: of PR2Config; None where PR2 is not attached.
        features: whether a log-prob pass keeps features, from which drift is measured and the predictor learns.
    """

    name: str
    what: str
    mode: str
    settings: dict[str, Any] | None = None
    features: bool = False


def variants(sample_fraction: float) -> list[Variant]:
    """The reference first."""
    common: dict[str, Any] = {"sample_fraction": sample_fraction}
    r3 = {"routes": "engine", "predictor": "none", **common}
    learned = {"routes": "engine", "predictor": "learned", **common}
    return [
        Variant("plain", "Megatron-Core's TopKRouter", "plain"),
        Variant("mcore-record", "its RouterReplay, recording", "mcore-record"),
        Variant("mcore-replay", "its RouterReplay, replaying", "mcore-replay"),
        Variant("live", "ours, attached, no session", "live", {"routes": "live", "predictor": "none", **common}),
        Variant("record", "ours, recording", "record", {"routes": "actor", "predictor": "none", **common}),
        Variant("replay", "ours, replaying", "replay", r3),
        Variant("replay+drift", "ours, replaying, drift measured (preset r3)", "replay", r3, True),
        Variant("learn", "ours, learning, no hold-back", "replay", {**learned, "hold_back": False}, True),
        Variant("learn+hold-back", "ours, learning and holding back", "replay", learned, True),
        Variant("momentum", "ours, predicting by momentum, holding back", "replay", {**learned, "predictor": "momentum"}, True),
    ]


class Batch:
    """Micro-batches of equally long sequences, with fixed inputs."""

    def __init__(self, scope: str, gate: Gate, platform: Platform, *, tokens: int, length: int, count: int, layers: int) -> None:
        self.tokens, self.length, self.layers = tokens, length, layers
        width = max(1, tokens // length)
        ids = [list(range(i * width, (i + 1) * width)) for i in range(count)]
        grids = [padded(each, [length] * width, length) for each in ids]
        self.micro_batches = [MicroBatch(i, grid) for i, grid in enumerate(grids)]
        self.sequences = [sid for each in ids for sid in each]
        generator = torch.Generator().manual_seed(2)
        place = {"device": platform.device}
        if scope == "step":
            self.inputs = torch.randint(0, VOCABULARY, (width, length), generator=generator).to(**place)
            return
        self.inputs = torch.randn(length, width, gate.hidden, generator=generator).to(platform.dtype).to(**place)
        shape = (tokens, gate.experts) if scope == "router" else (length, width, gate.hidden)
        self.gradient = torch.randn(shape, generator=generator).to(**place)

    def leaves(self) -> list[Tensor]:
        """An input that requires a gradient, for every layer: routers are measured beside each other, not in a row."""
        return [self.inputs.detach().requires_grad_() for _ in range(self.layers)]


class Policy:
    """What a training step shares among the variants: DDP's gradient buffers and the optimizer, on the shared weights."""

    def __init__(self, model: nn.Module, platform: Platform) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(use_distributed_optimizer=False), model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=POLICY_LR, min_lr=POLICY_LR, weight_decay=0.0, clip_grad=1.0,
                bf16=platform.dtype is torch.bfloat16, params_dtype=platform.dtype,
            ),
            [self.ddp],
        )  # fmt: skip
        self._finalize = finalize_model_grads

    def prepare(self, model: nn.Module) -> None:
        """Lets the schedule finish the gradients of a model that shares the weights."""
        model.config.finalize_model_grads_func = lambda _, *args, **kwargs: self._finalize([self.ddp], *args, **kwargs)
        model.config.grad_scale_func = self.optimizer.scale_loss

    def zero(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()


class Subject:
    """A variant on a model of its own, whose weights are everybody's."""

    def __init__(self, variant: Variant, scope: str, model: nn.Module, batch: Batch, policy: Policy | None) -> None:
        self.variant, self.scope, self.model, self.batch, self.policy = variant, scope, model, batch, policy
        self.pr2: PR2 | None = None
        self._own_ids: list[Tensor] = []
        if policy is not None:
            policy.prepare(model)

    # ---- before anything is timed ------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Attaches PR2 if the variant has settings."""
        if self.variant.settings is not None:
            self.pr2 = attach(self.model, PR2Config.from_dict(self.variant.settings))
            if "momentum" in self.pr2.config.predictor:
                gates = torch.optim.Adam([router.weight for router in routers(self.model)], lr=POLICY_LR)
                self.pr2.optimizer = gates if self.policy is None else self.policy.optimizer

    def set_own_routes(self, ids: list[Tensor]) -> None:
        """Gives Megatron-Core's replay its ids [T, K] int64 per layer."""
        self._own_ids = ids

    def begin_rollout(self, tables: dict[int, RouteTable]) -> None:
        """Begins the rollout batch and, where features are wanted, runs the log-prob pass."""
        if self.pr2 is None:
            return
        length = self.batch.length
        from_engine = self.pr2.config.routes == "engine"
        self.pr2.begin_rollout(
            [ReplaySequence(sid, length, 0, length - 1, tables[sid] if from_engine else None) for sid in self.batch.sequences]
        )
        if self.variant.features:
            with torch.no_grad(), self.pr2.old_logprobs(self.batch.micro_batches) as session:
                self._passes(session, backward=False)

    def recorded_tables(self) -> dict[int, RouteTable]:
        """The live routes of all micro-batches, as an engine returns them: without one for the last token."""
        assert self.pr2 is not None
        with torch.no_grad(), self.pr2.record(self.batch.micro_batches) as session:
            self._passes(session, backward=False)
        tables = self.pr2.recorded_tables(session, dict.fromkeys(self.batch.sequences, self.batch.length))
        for table in tables.values():
            table.valid[-1] = False
            table.experts[-1] = 0
        return tables

    def recorded_own(self) -> list[Tensor]:
        """What Megatron-Core's replay records, per layer."""
        with self._own_replay(RouterReplayAction.RECORD), torch.no_grad():
            self._forward(0)
            return [router.router_replay.get_recorded_indices() for router in routers(self.model)]

    # ---- what is timed -----------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """One sample: yields what is to be timed."""
        if self.scope == "step":
            yield self._training_step
            return
        self.model.zero_grad(set_to_none=True)
        mode = self.variant.mode
        if mode.startswith("mcore"):
            with self._own_replay(self._action):
                yield lambda: self._passes(None)
        elif self.pr2 is None or mode == "live":
            yield lambda: self._passes(None)
        else:
            with self._session() as session:
                yield lambda: self._passes(session)
            self.pr2.step(lr=POLICY_LR)

    @torch.no_grad()
    def output(self) -> Tensor:
        """The forward output of the first micro-batch under this variant, for a comparison."""
        mode = self.variant.mode
        context: Any = nullcontext()
        if mode.startswith("mcore"):
            context = self._own_replay(self._action)
        elif self.pr2 is not None and mode != "live":
            context = (self.pr2.record if mode == "record" else self.pr2.replay)(self.batch.micro_batches[:1])
        with context as session:
            first = self.batch.micro_batches[0]
            if session is not None:
                session.begin(self.model, first)
            output = self._forward(0)
            if session is not None:
                session.end(self.model, first, output)
        return output

    @property
    def _action(self) -> RouterReplayAction:
        return RouterReplayAction.RECORD if self.variant.mode == "mcore-record" else RouterReplayAction.REPLAY_FORWARD

    def _session(self) -> Any:
        assert self.pr2 is not None
        if self.variant.mode == "record":
            return self.pr2.record(self.batch.micro_batches)
        return self.pr2.actor_update(self.batch.micro_batches, mini_step=2)

    @contextmanager
    def _own_replay(self, action: RouterReplayAction) -> Iterator[None]:
        replays = [router.router_replay for router in routers(self.model)]
        for replay, ids in zip(replays, self._own_ids or [None] * len(replays), strict=True):
            replay.clear_indices()
            if action is RouterReplayAction.REPLAY_FORWARD:
                replay.set_target_indices(ids)
            replay.set_router_replay_action(action)
        try:
            yield
        finally:
            for replay in replays:
                replay.clear_router_replay_action()
                replay.clear_indices()

    def _forward(self, index: int) -> Tensor:
        if self.scope != "step":
            return self.model(self.batch.leaves())[0]
        tokens = self.batch.inputs
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(tokens, position, None, labels=tokens.roll(-1, 1))

    def _passes(self, session: ReplaySession | None, *, backward: bool = True) -> None:
        for index, micro_batch in enumerate(self.batch.micro_batches):
            if session is not None:
                session.begin(self.model, micro_batch)
            outputs = self.model(self.batch.leaves()) if backward else [self._forward(index)]
            if session is not None:
                session.end(self.model, micro_batch, outputs[0])
            if backward:
                torch.autograd.backward(outputs, [self.batch.gradient.to(output.dtype) for output in outputs])

    def _training_step(self) -> None:
        assert self.policy is not None
        self.policy.zero()
        mode = self.variant.mode
        if mode.startswith("mcore"):
            with self._own_replay(self._action):
                self._schedule(self._forward_step)
        elif self.pr2 is None or mode == "live":
            self._schedule(self._forward_step)
        else:
            with self._session() as session:
                self._schedule(session.forward_step(self._forward_step))
        self.policy.optimizer.step()
        if self.pr2 is not None and mode == "replay":
            self.pr2.step(lr=POLICY_LR)

    def _schedule(self, forward_step: Callable[..., Any]) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([{"micro_batch": micro_batch} for micro_batch in self.batch.micro_batches]),
            model=[self.model],
            num_microbatches=len(self.batch.micro_batches),
            seq_length=self.batch.length,
            micro_batch_size=self.batch.inputs.shape[0],
            forward_only=False,
        )

    def _forward_step(self, iterator: Iterator[dict[str, Any]], model: nn.Module) -> Any:
        next(iterator)

        def loss(losses_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            count = torch.full((), losses_BS.numel(), dtype=torch.int, device=losses_BS.device)
            return losses_BS.sum(), count, {}

        return self._forward(0), loss


def subjects(
    scope: str, gate: Gate, platform: Platform, chosen: Sequence[Variant], batch: Batch, *, layers: int, ffn: int
) -> tuple[list[Subject], dict[str, bool]]:
    """Every variant, ready to be timed, and which of them reproduced the plain router's output while routes were the same."""
    base = build(scope, gate, platform, layers=layers, ffn=ffn, length=batch.length)
    fill(base)
    policy = Policy(base, platform) if scope == "step" else None
    made = []
    for variant in chosen:
        own = variant.mode.startswith("mcore")
        model = base
        if variant.mode != "plain":
            model = build(scope, gate, platform, layers=layers, ffn=ffn, length=batch.length, own_replay=own)
            share_weights(model, base)
        made.append(Subject(variant, scope, model, batch, policy))
    for subject in made:
        subject.attach()
    tables = next(s for s in made if s.variant.mode == "record").recorded_tables()
    own_ids = next(s for s in made if s.variant.mode == "mcore-record").recorded_own()
    for subject in made:
        if subject.variant.mode == "mcore-replay":
            subject.set_own_routes(own_ids)
        subject.begin_rollout(tables)
    expected = made[0].output()
    same = {subject.variant.name: bool(torch.equal(subject.output(), expected)) for subject in made}
    with torch.no_grad():  # the policy has moved since the features were kept
        for router in routers(base):
            router.weight.add_(torch.randn_like(router.weight) * 0.02 * router.weight.std())
    return made, same
