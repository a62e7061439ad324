"""Actor: the policy on Megatron-Core with its optimizer; log-prob pass, mini-steps, export.

`_forward_step` is an ordinary Megatron forward step; PR2 wraps it and is told which micro-batch is which, nothing more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.checkpoint import checkpoint as pr2_checkpoint
from megatron_pr2.checkpoint.kept_pushes import kept_shards, load_kept
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.bridge import export_weights, load_model, save_hf
from megatron_pr2.hf.model_types import keeps_gates_in_fp32
from megatron_pr2.hf.owned_export import owned_engine_weights, owned_gates
from megatron_pr2.prediction.gates import set_aside
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.sequences import PushName
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.replay.sites import unwrapped
from megatron_pr2.rl.batch import Sample, micro_batches
from megatron_pr2.rl.checkpoint import load_optimizer, model_shards, optimizer_shards, optimizer_template, read
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.mini_batch_loss import MiniBatchLoss
from megatron_pr2.rl.pending import pending_shards, read_pending
from megatron_pr2.rl.proximal import ProximalPolicy

logger = logging.getLogger(__name__)
LOOK_AHEAD_SHARE = 0.25  # of a rollout batch's samples, at most those of its last mini-step
# Opens a replay session over micro-batches: pr2.old_logprobs or pr2.replay.
Pass = Callable[[Sequence[MicroBatch]], AbstractContextManager[ReplaySession]]
LossFunction = Callable[[dict[str, Any], Tensor], tuple[Tensor, Tensor, dict[str, Any]]]


class Actor:
    """The policy. All methods are collective over the training ranks.

    Attributes:
        chunks: the DDP-wrapped model.
        proximal: the moving average of the policy, where that is what old log-probs are of.
    """

    def __init__(self, config: TrainConfig, hf_path: str | Path, pad_id: int) -> None:
        """Loads a Hugging Face MoE checkpoint onto the ranks of Megatron's parallel state.

        Raises:
            ConfigError, AttachError: the checkpoint is not a MoE model that replay can run on.
        """
        self._config, self._hf_path, self._pad_id = config, Path(hf_path), pad_id
        self._watched: list[dict[str, Any]] = []  # micro-batches that a look-ahead will run again
        dtype = getattr(torch, config.model.dtype)
        self._bridge, self.chunks = load_model(
            hf_path,
            dtype=dtype,
            bridge=config.model.bridge,
            ddp_config={"use_distributed_optimizer": False},
            extra_config={
                # The ranks' micro-batches differ in shape, which allgather does not allow.
                "moe_token_dispatcher_type": "alltoall",
                # Token-level loss: sums over tokens, divided by the count of the whole mini-batch when gradients are finalised.
                "calculate_per_token_loss": True,
            },
        )
        # The embedded engine is the model itself, whose gates are what they are.
        fp32_gates = config.rollout.engine == "sglang" and keeps_gates_in_fp32(self._bridge.source_config)
        self._gate_dtype = torch.float32 if fp32_gates else None
        self._gates: dict[str, Tensor] = {}
        self.pr2: PR2 = attach(self.chunks, config.replay())
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.optimizer.lr,
                min_lr=config.optimizer.lr,
                weight_decay=config.optimizer.weight_decay,
                adam_beta1=config.optimizer.beta1,
                adam_beta2=config.optimizer.beta2,
                clip_grad=config.optimizer.clip_grad,
                bf16=dtype is torch.bfloat16,
                params_dtype=dtype,
            ),
            self.chunks,
        )
        self.pr2.optimizer = self.optimizer
        algorithm = config.algorithm
        self.proximal: ProximalPolicy | None = None
        if algorithm.old_logprobs == "ewma":
            where = torch.device("cpu") if algorithm.proximal_device == "cpu" else None
            self.proximal = ProximalPolicy(self.chunks, algorithm.proximal_decay, device=where)
        scores = self.model.config.moe_router_score_function
        if algorithm.loss == "rspo" and scores != "softmax":
            raise ConfigError(f"algorithm.loss=rspo is defined for softmax routers; this model's router scores are {scores}")
        self._loss = MiniBatchLoss(algorithm, next(self.model.parameters()).device, mpu.get_data_parallel_group())
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def lr(self) -> float:
        """The policy's current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def model(self) -> torch.nn.Module:
        """The only model chunk (this reference runs one pipeline stage)."""
        return self.chunks[0]

    def old_logprobs(self, samples: Sequence[Sample]) -> None:
        """Once per rollout batch: the pass under theta_old with replayed routes, where the settings need one.

        Fills `sample.old_logprobs`, except with old_logprobs=ewma, where :meth:`update` does, and `sample.snapshot_logprobs`.
        """
        if self._config.needs_snapshot_pass:
            self._take_logprobs(samples, self.pr2.old_logprobs)
            for sample in samples:
                sample.snapshot_logprobs = sample.old_logprobs
        if self._config.algorithm.old_logprobs == "rollout":
            for sample in samples:
                sample.old_logprobs = sample.rollout_logprobs()

    def _take_logprobs(self, samples: Sequence[Sample], replay: Pass) -> None:
        """A forward of all responses under the weights that the model has now; fills `sample.old_logprobs`."""
        items = micro_batches(samples, self._config.algorithm.micro_batch_size, self._pad_id)
        self.model.eval()
        with replay([item["micro_batch"] for item in items]) as session, self._loss.log_prob_pass(session):
            results = self._run(session.forward_step(partial(self._forward_step, _collect_logprobs)), items, forward_only=True)
        self.model.train()
        for item, result in zip(items, results, strict=True):
            for row, sample in enumerate(item["samples"]):
                first, stop = sample.loss_span
                sample.old_logprobs = result["logprobs"][row, first:stop].float().cpu().numpy()

    def update(self, samples: Sequence[Sample], mini_step: int) -> dict[str, Any]:
        """One mini-step: policy update on replayed routes, then the predictor's (from mini-step 2 on).

        Returns:
            mini_step, grad_norm, what MiniBatchLoss.metrics has, and PR2's report.
        """
        algorithm = self._config.algorithm
        if self.proximal is not None:
            # The same routes again, but no features: those are of the weights that the routes were predicted from.
            with self.proximal.swapped_in():
                self._take_logprobs(samples, self.pr2.replay)
        items = micro_batches(
            samples, algorithm.micro_batch_size, self._pad_id, rollout_logprobs=algorithm.needs_rollout_logprobs
        )
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._loss.begin(items)
        replayed = [item["micro_batch"] for item in items]
        self._watched = items[: self._to_watch(mini_step, len(samples))]
        watched = replayed[: len(self._watched)]
        with self.pr2.actor_update(replayed, mini_step, watched=watched) as session, self._loss.training_pass(session):
            results = self._run(session.forward_step(partial(self._forward_step, self._loss)), items, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        if self.proximal is not None:
            self.proximal.update()
        report = self.pr2.step()
        return {
            "mini_step": mini_step,
            "grad_norm": float(grad_norm) if grad_norm is not None else 0.0,
            **self._loss.metrics(results, mini_step),
            **report,
        }

    def _to_watch(self, mini_step: int, samples: int) -> int:
        """How many micro-batches of a mini-step a look-ahead will run again: a share of the rollout batch, of the last one."""
        algorithm = self._config.algorithm
        if mini_step < algorithm.mini_steps or not self.pr2.config.looks_ahead:
            return 0
        return math.ceil(LOOK_AHEAD_SHARE * algorithm.mini_steps * samples / algorithm.micro_batch_size)

    def look_ahead(self) -> None:
        """After the last mini-step: what the next updates will do to the routers, by what the last one did."""
        items = self._watched

        def forward(session: ReplaySession) -> None:
            self._run(session.forward_step(partial(self._forward_step, None)), items, forward_only=True)

        for chunk in self.chunks:
            chunk.eval()
        self.pr2.look_ahead([item["micro_batch"] for item in items], forward)
        for chunk in self.chunks:
            chunk.train()

    def export(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights in Hugging Face names with merged gates, for an engine; every rank walks it to the end."""
        weights = export_weights(self._bridge, self.chunks)
        return self.pr2.engine_weights(weights, version=version, gate_dtype=self._gate_dtype)

    def export_owned(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of :meth:`export`, each weight on one rank only; every rank walks it to the end."""
        return owned_engine_weights(self.pr2, self._bridge, self.chunks, version=version, gate_dtype=self._gate_dtype)

    def export_rest(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of all weights but the gates, which are kept for :meth:`export_gates`."""
        return set_aside(self._bridge.export_owned_weights(self.chunks), self._gates)

    def export_gates(self, version: int, horizon: float) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of the gates for a horizon, with those of the last :meth:`export_rest`; every rank calls it."""
        return owned_gates(self.pr2, self._gates, version=version, gate_dtype=self._gate_dtype, horizon=horizon)

    def save_pretrained(self, path: Path) -> None:
        """The policy as a Hugging Face checkpoint (its own gates, no prediction in them)."""
        save_hf(self._bridge, self.chunks, path, tokenizer_from=self._hf_path)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training continues from, as shards that any parallel layout can read."""
        model = model_shards(self.chunks)
        return self._shards(model, optimizer_shards(self.optimizer, model), pr2_checkpoint.sharded_state_dict(self.pr2))

    def load(self, path: Path) -> None:
        """Restores :meth:`state_dict` under "actor" of a run's checkpoint, in whatever layout it was written; collective.

        Raises:
            CheckpointError: on every rank, if any rank cannot read its part, or it is of another model.
        """
        model = model_shards(self.chunks)
        optimizer = {"shards": optimizer_template(self.optimizer, model)}
        template = self._shards(model, optimizer, pr2_checkpoint.sharded_state_dict(self.pr2, load_from=path))
        loaded = read(path, {"actor": template})["actor"]
        for i, chunk in enumerate(self.chunks):
            unwrapped(chunk).load_state_dict(loaded["model"][str(i)])
        load_optimizer(self.optimizer, **loaded["optimizer"])
        pr2_checkpoint.load_sharded_state_dict(self.pr2, loaded.get("pr2"))
        if self.proximal is not None:
            self.proximal.load_state_dict(loaded["proximal"])

    def pending_state(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Samples that the next step trains on, and the pushes that they are judged by, for a checkpoint; collective."""
        names, pushes = kept_shards(self.pr2)
        shards = pending_shards(samples, mpu.get_data_parallel_group())
        return {"pending": {"pushes": names}, "pending_samples": shards, "pending_pushes": pushes}

    def load_pending(self, path: Path, pushes: list[PushName]) -> list[Sample]:
        """Restores :meth:`pending_state`, after :meth:`load`; collective.

        Args:
            pushes: their names, as they were saved.

        Raises:
            CheckpointError: on every rank, if any rank cannot read its part.
        """
        load_kept(self.pr2, path, pushes)
        return read_pending(path, mpu.get_data_parallel_group(), self.pr2.model_config.num_moe_experts)

    def _shards(self, model: dict[str, Any], optimizer: dict[str, Any], pr2: dict[str, Any]) -> dict[str, Any]:
        proximal = {} if self.proximal is None else {"proximal": self.proximal.sharded_state_dict(model)}
        return {"model": model, "optimizer": optimizer, "pr2": pr2, **proximal}

    def _run(self, forward_step: Callable[..., Any], items: list[dict[str, Any]], *, forward_only: bool) -> list[dict[str, Any]]:
        rows, width = items[0]["tokens"].shape
        results = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=self.chunks,
            num_microbatches=len(items),
            seq_length=width,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return list(results)

    def _forward_step(self, loss: LossFunction | None, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> Any:
        item = next(data_iterator)
        device = next(model.parameters()).device
        on_device = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in item.items()}
        logits_BSV = model(on_device["tokens"], on_device["position_ids"], None)
        return logits_BSV, _nothing if loss is None else partial(self._calculate, loss, on_device)

    def _calculate(self, loss: LossFunction, item: dict[str, Any], logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        # The behaviour policy sampled at this temperature, so that is the policy that the ratio is of.
        scaled = logits_BSV.float() / self._config.rollout.temperature
        return loss(item, -vocab_parallel_cross_entropy(scaled, item["labels"]))


def _nothing(logits_BSV: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Of a forward that is run for its routers only."""
    return logits_BSV.new_zeros(()), torch.zeros((), dtype=torch.int, device=logits_BSV.device), {}


def _collect_logprobs(item: dict[str, Any], logprobs_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    tokens = item["mask"].sum().to(torch.int)
    return logprobs_BS.sum(), tokens, {"logprobs": logprobs_BS.detach()}
