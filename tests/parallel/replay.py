"""One rollout batch through PR2 and Megatron-Core in any parallel layout, with results that do not depend on the layout.

The old-log-prob pass, a step that moves the routers, and the forward and backward of the second mini-step, with the real policy
loss. :func:`run_case` is a job for `tests.helpers.distributed.pool(n).run`; it returns this rank's `Result`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import Router, TopKRouter
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.hf.bridge import load_model
from megatron_pr2.parallel.groups import token_group
from megatron_pr2.replay.session import ReplaySession
from megatron_pr2.replay.sites import RouterSite, unwrapped
from megatron_pr2.rl.losses import LOSS_COLUMNS, policy_loss
from tests.host.training import exported_gradients
from tests.parallel import batch
from tests.parallel.batch import Place, Split
from tests.parallel.case import Case, LogProbs, Result, Seen
from tests.parallel.hybrid import load_hybrid

CLIP = {"clip_low": 0.02, "clip_high": 0.03}


def run_case(path: Path, case: Case) -> Result:
    """See the module's docstring."""
    host.init(**case.layout)
    ddp_config = {"use_distributed_optimizer": False, **case.ddp}
    extra_config = {
        "finalize_model_grads_func": finalize_model_grads,
        "calculate_per_token_loss": True,
        "moe_aux_loss_coeff": 0.0,
        **case.config,
    }
    bridge: Any
    if case.pattern is None:
        bridge, chunks = load_model(path, dtype=torch.float32, ddp_config=ddp_config, extra_config=extra_config)
    else:
        bridge, chunks = load_hybrid(path, case.pattern, ddp_config=ddp_config, extra_config=extra_config)
    config = chunks[0].config
    if case.ddp.get("overlap_grad_reduce"):
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = None
    if case.ddp.get("use_distributed_optimizer"):
        optimizer = get_megatron_optimizer(
            OptimizerConfig(lr=1e-3, params_dtype=torch.float32, use_distributed_optimizer=True), chunks
        )
    pr2 = attach(
        chunks,
        PR2Config(
            hold_back=False,  # W_p is random: it has to act to be compared
            routes=case.routes,
            route_delivery=case.delivery,
            sample_fraction=0.5,
            max_missing_share=1.0,
            min_agreement=0.0,
        ),
    )
    # bf16 features turn a difference in the last fp32 bit into one of 0.4 %; the layouts are compared in fp32.
    pr2.features._h_dtype = torch.float32
    return Run(pr2, bridge, chunks, case, optimizer).result()


class Run:
    """The passes of one case."""

    def __init__(self, pr2: PR2, bridge: Any, chunks: list[torch.nn.Module], case: Case, optimizer: Any) -> None:
        self.pr2, self.bridge, self.chunks, self.case, self.optimizer = pr2, bridge, chunks, case, optimizer
        self.config = chunks[0].config
        self.place = Place(
            mpu.get_data_parallel_world_size(),
            mpu.get_data_parallel_rank(),
            mpu.get_context_parallel_world_size(),
            mpu.get_context_parallel_rank(),
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_tensor_model_parallel_rank(),
        )
        self.in_forward = False
        self.seen: list[Seen] = []
        self.other_calls: Counter[str] = Counter()

    def result(self) -> Result:
        pr2 = self.pr2
        assert pr2.predictor is not None
        for site in pr2.sites:
            pr2.predictor.weight_LEH[site.local].copy_(_noise(site, 0.02, seed=11))
        self.begin_rollout()
        logprobs, first = self.old_logprobs()
        with torch.no_grad():
            for site in pr2.sites:
                site.router.weight += _noise(site, 0.03, seed=12)
        items, loss, second = self.training_pass(logprobs)
        assert self.clipped > 0
        sums = {site.hidden_layer: _reduced(pr2, site) for site in pr2.sites}
        _gather_shards(self.chunks)
        gradients = exported_gradients(self.bridge, self.chunks)
        grad_norm = None
        if self.optimizer is not None:
            updated, grad_norm, _ = self.optimizer.step()
            assert updated
        report = pr2.step(lr=1e-3)
        # Every rank is told of all layers.
        drift = {
            layer: {name: values[column] for name, values in report["drift"].items()}
            for column, layer in enumerate(pr2.layers.hidden_moe)
        }
        return Result(
            loss=loss,
            logprobs=logprobs,
            gradients=gradients if dist.get_rank() == 0 else None,
            grad_norm=grad_norm,
            predictor=sums,
            drift=drift,
            update=report["predictor"],
            absent=report["features_absent"],
            agreement=pr2.measurement.engine_agreement,
            counts=[(session.replayed_rows, session.missing_rows) for session in (first, second)],
            rows=[sum(len(item["rows"]) for item in pass_items) for pass_items in (self.first_items, items)],
            seen=self.seen,
            other_calls=self.other_calls,
        )

    def begin_rollout(self) -> None:
        place, config = self.place, self.config
        first = place.tp_rank == place.cp_rank == mpu.get_pipeline_model_parallel_rank() == 0
        owns = self.case.routes == "engine" and (first or self.case.delivery == "local")
        shape = (len(self.pr2.moe_layers), config.moe_router_topk, config.num_moe_experts)
        self.pr2.begin_rollout(
            [
                batch.replay_sequence(s, batch.table(s, *shape) if owns else None)
                for s in list(batch.LENGTHS)[place.dp_rank :: place.dp]
            ]
        )

    def old_logprobs(self) -> tuple[LogProbs, ReplaySession]:
        items = self.first_items = self.items("old", self.case.old)
        for chunk in self.chunks:
            chunk.eval()
        found: LogProbs = {}

        def collect(item: dict[str, Any], logprobs_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            bears = item["mask"] > 0
            keys = torch.stack([item["sequence"][bears], item["position"][bears]], dim=1).tolist()
            for key, value in zip(map(tuple, keys), logprobs_BS[bears].tolist(), strict=True):
                assert key not in found
                found[key] = value
            return logprobs_BS.sum(), bears.sum().int(), {}

        with self.pr2.old_logprobs([item["micro_batch"] for item in items]) as session, torch.no_grad():
            self.schedule(session, items, collect, training=False)
        for chunk in self.chunks:
            chunk.train()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        return {key: value for part in everyone for key, value in part.items()}, session

    def training_pass(self, logprobs: LogProbs, *, watch: bool = False) -> tuple[list[dict[str, Any]], float, ReplaySession]:
        items = self.items("new", self.case.new)
        for item in items:
            keys = torch.stack([item["sequence"], item["position"]], dim=-1).flatten(0, 1).tolist()
            values = torch.tensor([logprobs.get((s, p), 0.0) for s, p in keys])
            item["old_logprobs"] = values.view_as(item["mask"])
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        sums = torch.zeros(len(LOSS_COLUMNS))

        def loss_func(item: dict[str, Any], logprobs_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss, columns, _ = policy_loss(logprobs_BS, item["old_logprobs"], item["advantages"], item["mask"], **CLIP)
            sums.add_(columns)
            return loss, item["mask"].sum().int(), {}

        micro_batches = [item["micro_batch"] for item in items]
        with self.pr2.actor_update(micro_batches, mini_step=2, watched=micro_batches if watch else []) as session:
            self.schedule(session, items, loss_func, training=True)
        # Tensor-parallel ranks of the last stage have the same sums, other stages have none.
        if self.place.tp_rank:
            sums.zero_()
        dist.all_reduce(sums)
        self.clipped = float(sums[LOSS_COLUMNS.index("clipped")])
        return items, float(sums[LOSS_COLUMNS.index("loss")] / sums[LOSS_COLUMNS.index("tokens")]), session

    def items(self, name: str, split: Split) -> list[dict[str, Any]]:
        interleaved = mpu.get_virtual_pipeline_model_parallel_world_size() is not None
        groups = batch.split(
            split,
            self.place,
            self.case.packed,
            equal=mpu.get_expert_model_parallel_world_size() > 1,
            divisor=mpu.get_pipeline_model_parallel_world_size() if interleaved else 1,
        )
        return [batch.micro_batch((name, n), ids, split, self.place, self.case.packed) for n, ids in enumerate(groups)]

    def schedule(self, session: ReplaySession, items: list[dict[str, Any]], loss: Callable[..., Any], *, training: bool) -> None:
        def forward_step(iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> Any:
            item = next(iterator)
            self.in_forward = True
            nll_BS = model(
                item["tokens"],
                item["position_ids"],
                None,
                labels=item["labels"],
                loss_mask=item["mask"],
                packed_seq_params=item["packed_seq_params"],
            )
            self.in_forward = False
            return nll_BS, lambda output_BS: loss(item, -output_BS)

        rows, width = items[0]["tokens"].shape
        with self._observed(items, training):
            get_forward_backward_func()(
                forward_step_func=forward_step if self.case.bind == "order" else session.forward_step(forward_step),
                data_iterator=[iter(items) for _ in self.chunks],
                model=self.chunks,
                num_microbatches=len(items),
                seq_length=width * self.place.cp,
                micro_batch_size=rows,
                forward_only=not training,
            )
        # Every layout's input has the rows that the comparison of token ids expects, on ranks with an embedding.
        assert self.pr2.token_check._looked == any(unwrapped(chunk).pre_process for chunk in self.chunks)

    @contextmanager
    def _observed(self, items: Sequence[dict[str, Any]], training: bool) -> Iterator[None]:
        """Keeps what every router selects. All schedules run a chunk's micro-batches in order, forward as well as backward."""
        calls: Counter[tuple[int, bool]] = Counter()
        hidden_layer = dict(zip(self.pr2.layers.moe, self.pr2.layers.hidden_moe, strict=True))

        def keep(router: TopKRouter, _: Any, outputs: tuple[Tensor, Tensor]) -> None:
            layer, recomputed = hidden_layer[router.layer_number - 1], not self.in_forward
            item = items[calls[layer, recomputed]]
            calls[layer, recomputed] += 1
            bits = (outputs[1].long() << torch.arange(outputs[1].shape[1])).sum(1)
            self.seen.append(Seen(training, recomputed, layer, item["rows"], bits))

        def count(router: TopKRouter, _: Any, outputs: tuple[Tensor, Tensor]) -> None:
            self.other_calls["live" if type(router) is TopKRouter and router.router_replay is None else "attached"] += 1

        handles = []
        for chunk in self.chunks:
            for name, module in unwrapped(chunk).named_modules():
                if isinstance(module, Router):
                    handles.append(module.register_forward_hook(keep if name.startswith("decoder.") else count))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _noise(site: RouterSite, size: float, seed: int) -> Tensor:
    """A matrix like the router's weight that depends on the layer's number in the whole model alone."""
    generator = torch.Generator().manual_seed(1000 * seed + site.hidden_layer)
    return size * torch.randn(site.router.weight.shape, generator=generator)


def _reduced(pr2: PR2, site: RouterSite) -> tuple[Tensor, float]:
    """The predictor's gradient sum and token count of one layer over all ranks that hold other tokens of it."""
    assert pr2.predictor is not None
    total = torch.cat([pr2.predictor.grad_sum_LEH[site.local].flatten(), pr2.predictor.token_count_L[site.local, None]])
    dist.all_reduce(total, group=token_group(site.router.config.sequence_parallel))
    return total[:-1].view(pr2.predictor.grad_sum_LEH.shape[1:]), float(total[-1])


def _gather_shards(chunks: list[torch.nn.Module]) -> None:
    """With the distributed optimizer a rank's gradient buffers are reduced in its own shard only; fetches the others'."""
    for chunk in chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.ddp_config.use_distributed_optimizer:
                continue
            size, rank = group.intra_distributed_optimizer_instance_size, group.intra_distributed_optimizer_instance_rank
            for bucket in group.buckets:
                shards = bucket.grad_data.chunk(size)
                own = shards[rank].clone()
                dist.all_gather(list(shards), own, group=group.intra_distributed_optimizer_instance_group)
