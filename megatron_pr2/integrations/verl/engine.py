"""verl's Megatron engine with PR2 attached to it.

Scope: verl's own engine, unchanged, with a replay session around the two kinds of passes that belong to a rollout batch. Lifecycle:
`infer_batch` without a loss function is the old-log-prob pass (verl's compute_log_prob) and begins the rollout batch. Each
`train_batch` that follows is a mini-step; the last of an update, which verl marks with `update_lr_scheduler`, ends the batch.
Everything else (reference, critic, evaluation with a loss, forward-only engines) runs outside of a session.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from verl.utils import tensordict_utils as tu
from verl.utils.metric.utils import Metric
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from megatron_pr2.attach import PR2, attach
from megatron_pr2.checkpoint.files import together
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ReplayError
from megatron_pr2.integrations.verl import micro_batches as cutting
from megatron_pr2.integrations.verl.batch import SequenceBook, begin_rollout, find_rows
from megatron_pr2.integrations.verl.settings import WHERE, check_engine, check_process, read_settings
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.replay.sites import unwrapped

logger = logging.getLogger(__name__)

CHECKPOINT = "pr2"


class PR2MegatronEngine(MegatronEngineWithLMHead):
    """verl's Megatron engine for language models; with settings in its configuration, the actor's has PR2 attached.

    Attributes:
        pr2: the handle once the model is built; None for the reference, and without settings.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        """Raises:
        ConfigError: an unknown setting of PR2.
        AttachError: the configuration contradicts replay (megatron_pr2.integrations.verl.settings).
        """
        self.pr2: PR2 | None = None
        # The reference uses its own routers, whatever its configuration says.
        self._settings: PR2Config | None = None if engine_config.forward_only else read_settings(engine_config)
        if self._settings is not None:
            check_engine(engine_config, model_config, self._settings)
            check_process()
        self._book: SequenceBook | None = None
        # The kind of pass that the next forward_backward_batch() is, with the ids of its rows.
        self._next: tuple[str, list[int]] | None = None
        # The pass that is running: its session, and its micro-batches by their rows.
        self._pass: tuple[ReplaySession, dict[Any, MicroBatch]] | None = None
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    # ---- life --------------------------------------------------------------------------------------------------------

    def _build_optimizer(self) -> Any:
        """Attaches PR2 when the model is built, and on its device: verl may offload it right after."""
        optimizer = super()._build_optimizer()
        if self._settings is None:
            return optimizer
        check_process()
        if self._get_context_parallel_layout(unwrapped(self.module[0])) != "zigzag":
            raise AttachError("experimental_attention_variant='dsv4_hybrid' gives ranks contiguous tokens; replay cuts in zigzag")
        if self.pr2 is not None:
            self.pr2.detach()
        self._book = None
        if "moe_router_bias_update_rate" not in self.engine_config.override_transformer_config:
            # verl's models have 1e-3, by which Megatron-Core would move expert biases after every update.
            for chunk in self.module:
                unwrapped(chunk).config.moe_router_bias_update_rate = 0.0
        self.pr2 = attach(self.module, self._settings, optimizer)
        logger.info("PR2 attached: routes=%s, predictor=%s", self._settings.routes, self._settings.predictor)
        return optimizer

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's checkpoint, with PR2's state in its directory `pr2`: written first, since verl's manifest marks it complete."""
        if self.pr2 is not None:
            mine = Path(local_path) / CHECKPOINT
            # As verl does, this overwrites a checkpoint of the same step, e.g. one of an interrupted save.
            together(lambda: shutil.rmtree(mine, ignore_errors=True) if torch.distributed.get_rank() == 0 else None)
            self.pr2.save(mine)
        super().save_checkpoint(local_path, *args, **kwargs)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's checkpoint and PR2's; one without PR2's starts with W_p = 0 and a warning."""
        if self.pr2 is not None and local_path is not None:
            mine = Path(local_path) / CHECKPOINT
            found = [mine.is_dir()]
            torch.distributed.broadcast_object_list(found, src=0)  # the same answer on every rank
            if found[0]:
                self.pr2.load(mine)
            else:
                logger.warning("%s has no directory %r: prediction starts with W_p = 0", local_path, CHECKPOINT)
        super().load_checkpoint(local_path, *args, **kwargs)

    # ---- passes ------------------------------------------------------------------------------------------------------

    def infer_batch(self, data: Any, loss_function: Callable[..., Any] | None = None) -> Any:
        """verl's; without a loss function it is the old-log-prob pass and begins a rollout batch.

        Raises:
            RouteError: the rollout's routes are absent, of another model, or too many are missing.
        """
        if self.pr2 is None or loss_function is not None:
            return super().infer_batch(data, loss_function)
        self._book = None
        self._book = begin_rollout(self.pr2, data)
        self._next = ("old_logprobs", self._book.ids)
        try:
            return super().infer_batch(data, loss_function)
        except BaseException:
            self._book = None
            raise
        finally:
            self._next = None

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        """verl's, as a mini-step: on replayed routes, then the predictor's update; its metrics get PR2's (pr2/...).

        Raises:
            ReplayError: a row that the old-log-prob pass did not see, or there was no such pass and one is needed.
        """
        if self.pr2 is None:
            return super().train_batch(data, loss_function)
        alone = self._book is None
        if alone:
            self._begin_without_old_logprobs(data)
        assert self._book is not None
        self._next = ("actor_update", find_rows(self.pr2, self._book, data))
        last = bool(tu.get_non_tensor_data(data, "update_lr_scheduler", False))
        try:
            outputs = super().train_batch(data, loss_function)
        finally:
            self._next = None
        self.pr2.step()
        if self.is_mp_src_rank_with_outputs():
            outputs["metrics"].update(Metric.from_dict(self.pr2.metrics(), aggregation="mean"))
        if last:
            self._end_rollout()  # a colocated engine needs the memory
        elif alone:
            self._book = None
        return outputs

    def _end_rollout(self) -> None:
        assert self.pr2 is not None
        self._book = None
        self.pr2.end_rollout()

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        """verl's, inside a session where the pass belongs to a rollout batch."""
        if self._next is None or self.pr2 is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        kind, ids = self._next
        cutting.number_rows(data)
        try:
            micro_batches = self._micro_batches(data, ids)
            opened = self.pr2.old_logprobs if kind == "old_logprobs" else self.pr2.actor_update
            with opened(micro_batches) as session:
                self._pass = session, {each.key: each for each in micro_batches}
                return super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            self._pass = None
            data.pop(cutting.ROW_KEY, None)

    def forward_step(self, batch_iter: Iterator[Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """verl's; a micro-batch of a session is announced to it by the rows that it is made of."""
        if self._pass is None:
            return super().forward_step(batch_iter, model, *args, **kwargs)
        (session, by_rows), batch = self._pass, next(batch_iter)
        rows = cutting.rows_of(batch)
        micro_batch = by_rows.get(rows)
        if micro_batch is None:
            raise ReplayError(
                f"verl cut a micro-batch of the rows {list(rows)}; expected were {sorted(map(list, by_rows))}: this version of "
                "verl does not cut by what prepare_micro_batches was given"
            )
        session.begin(model, micro_batch)
        # verl's forward step returns processed logits; recomputation is recognised by the gradient of the chunk's own output.
        hook = unwrapped(model).register_forward_hook(lambda _module, _inputs, output: session.end(model, micro_batch, output))
        try:
            return super().forward_step(iter((batch,)), model, *args, **kwargs)
        finally:
            hook.remove()

    # ---- weights for the rollout engine --------------------------------------------------------------------------------

    def get_per_tensor_param(self, *args: Any, **kwargs: Any) -> Any:
        """verl's weights in Hugging Face names, for the rollout engine only: with the prediction merged into the gates."""
        weights, peft_config = super().get_per_tensor_param(*args, **kwargs)
        if self.pr2 is None:
            return weights, peft_config
        if self._book is not None:
            # A batch that no update ended, e.g. in critic warm-up: the engine needs the memory. Before the push, which uses what
            # the batch says about the prediction.
            self._end_rollout()
        return self.pr2.engine_weights(weights), peft_config

    def get_per_tensor_param_shard(self, **kwargs: Any) -> Any:
        self._refuse_shards()
        return super().get_per_tensor_param_shard(**kwargs)

    def prime_delta_snapshots(self) -> None:
        self._refuse_shards()
        super().prime_delta_snapshots()

    def get_per_tensor_param_delta_shard(self, **kwargs: Any) -> Any:
        self._refuse_shards()
        return super().get_per_tensor_param_delta_shard(**kwargs)

    def _refuse_shards(self) -> None:
        """Shards carry plain gates."""
        if self.pr2 is not None and self.pr2.predictor is not None:
            raise AttachError(
                "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded sends what changed in each rank's shards, "
                f"without the prediction; set it to 'naive' or 'nccl', or {WHERE}.predictor=none"
            )

    # ---- inside --------------------------------------------------------------------------------------------------------

    def _begin_without_old_logprobs(self, data: Any) -> None:
        """A mini-batch whose old log-probs are the rollout's own is a rollout batch of its own."""
        assert self.pr2 is not None
        config = self.pr2.config
        if config.routes == "actor" or config.predicts:
            what = "routes are recorded" if config.routes == "actor" else "a prediction starts"
            raise ReplayError(
                f"train_batch without a preceding old-log-prob pass, in which {what}: set "
                f"algorithm.rollout_correction.bypass_mode=false, or {WHERE}.preset to one that needs none (r3, grpo)"
            )
        self._book = begin_rollout(self.pr2, data)

    def _micro_batches(self, data: Any, ids: list[int]) -> list[MicroBatch]:
        """How verl cuts the batch; the settings are those that its forward_backward_batch reads."""
        config, packed = self.engine_config, bool(self.engine_config.use_remove_padding)
        tu.assign_non_tensor(data, sp_size=config.context_parallel_size)
        virtual = mpu.get_virtual_pipeline_model_parallel_world_size()
        divided_by = self.tf_config.microbatch_group_size_per_vp_stage if virtual is not None and virtual > 1 else None
        parts = cutting.cut(data, dp_group=self.get_data_parallel_group(), divided_by=divided_by)
        longest = int(data["input_ids"].offsets().diff().max()) if config.pad_bshd_to_minibatch_max and not packed else None
        return [
            cutting.describe(
                part,
                ids,
                packed=packed,
                fp8=unwrapped(self.module[0]).config.fp8 in ("e4m3", "hybrid"),
                pad_to_bucket=config.pad_to_length_bucket if config.pad_to_length and packed else None,
                longest=longest,
            )
            for part in parts
        ]
