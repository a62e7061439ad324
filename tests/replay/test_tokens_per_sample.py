"""PackedSeqParams.tokens_per_sample: Megatron-Core lays the samples of a flattened batch side by side before it routes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from megatron_pr2.errors import ReplayError
from megatron_pr2.replay.micro_batch import MicroBatch
from tests.helpers import toy
from tests.helpers.rounding import assert_near

pytestmark = [
    pytest.mark.usefixtures("host_platform"),
    pytest.mark.skipif(not hasattr(PackedSeqParams, "tokens_per_sample"), reason="this release has no tokens_per_sample"),
]

LENGTHS = {0: 7, 1: 5, 2: 9, 3: 3, 4: 11}
# Two samples of 12 rows, in which documents begin and end, and one of 13.
MICRO_BATCHES = (([0, 1, 2, 3], [7, 5, 9, 3], 12), ([4], [13], 13))
KINDS = ["softmax", "groups"]


class FlattenedChunk(toy.ToyChunk):
    """Calls its layers as TransformerLayer does, by its own methods."""

    def forward(self, h_SBH: Tensor, packed_seq_params: Any = None) -> Tensor:  # type: ignore[override]
        for layer in self.decoder.layers:
            layer.is_moe_layer = True
            rows, _, samples = TransformerLayer._maybe_unflatten_for_moe(layer, h_SBH, None, packed_seq_params)
            rows = tensor_parallel.checkpoint(layer, False, rows) if self.recompute else layer(rows)
            h_SBH = TransformerLayer._maybe_reflatten_from_moe(layer, rows, packed_seq_params, samples)
        return h_SBH


def micro_batch(ids: list[int], slots: list[int]) -> MicroBatch:
    return MicroBatch.packed(ids, [LENGTHS[i] for i in ids], slots)


def run(pr2: PR2, chunk: FlattenedChunk, opened: Any, side_by_side: bool, backward: bool) -> list[Tensor]:
    outputs = []
    with opened:
        for ids, slots, tokens in MICRO_BATCHES:
            rows = toy.token_inputs(micro_batch(ids, slots).grid)
            packed = PackedSeqParams(qkv_format="thd", tokens_per_sample=tokens if side_by_side else None)
            with torch.set_grad_enabled(backward):
                outputs.append(chunk(rows.requires_grad_(backward), packed_seq_params=packed))
            if backward:
                toy.loss(outputs[-1]).backward()
    return [output.detach() for output in outputs]


def rollout(kind: str, preset: str, side_by_side: bool, recompute: bool = False) -> dict[str, Any]:
    """A rollout batch up to the predictor's gradient."""
    config = toy.toy_config(**toy.ROUTERS[kind])
    chunk = FlattenedChunk(config, recompute=recompute)
    config.recompute_granularity = "full" if recompute else None
    pr2 = attach(chunk, toy.preset(preset, sample_fraction=1.0, max_missing_share=1.0))
    tables = toy.random_tables(LENGTHS, config, [(2, 3), (4, 0)]) if preset == "pr2" else None
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    micro_batches = [micro_batch(ids, slots) for ids, slots, _ in MICRO_BATCHES]
    old = run(pr2, chunk, pr2.old_logprobs(micro_batches), side_by_side, backward=False)
    toy.drift(chunk)
    new = run(pr2, chunk, pr2.actor_update(micro_batches, 2), side_by_side, backward=True)
    gradients = [router.weight.grad.clone() for router in toy.routers(chunk)]
    predictor = pr2.predictor.grad_sum_LEH.clone() if pr2.predictor is not None else None
    return {"old": old, "new": new, "gradients": gradients, "predictor": predictor, "drift": pr2.step(0.1)["drift"]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("preset", "recompute"), [("pr2", False), ("pr2", True), ("r2", True)])
def test_rows_side_by_side_are_the_rows_one_after_the_other(kind: str, preset: str, recompute: bool) -> None:
    """Replayed, missing and recorded routes, features and the predictor's gradient, in forward and recomputation."""
    wanted, found = (rollout(kind, preset, side_by_side, recompute) for side_by_side in (False, True))
    for name in ("old", "new", "gradients"):
        for one, other in zip(found[name], wanted[name], strict=True):
            assert_near(one, other, 64, msg=name)
    if preset == "pr2":
        assert_near(found["predictor"], wanted["predictor"], 64)
        assert wanted["predictor"].abs().max() > 0.1
    for name in ("tokens", "agreement", "frozen_agreement", "changed_0"):
        assert found["drift"][name] == wanted["drift"][name]


def test_the_layer_does_lay_them_side_by_side() -> None:
    chunk = FlattenedChunk(toy.toy_config())
    seen = []
    toy.routers(chunk)[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    chunk(torch.zeros(24, 1, toy.HIDDEN), packed_seq_params=PackedSeqParams(tokens_per_sample=12))
    assert seen == [(12, 2, toy.HIDDEN)]


def test_routes_that_are_recorded_are_filed_by_token() -> None:
    tables = []
    for side_by_side in (False, True):
        config = toy.toy_config()
        chunk = FlattenedChunk(config)
        pr2 = attach(chunk, toy.preset("r2"))
        opened = pr2.record([micro_batch(ids, slots) for ids, slots, _ in MICRO_BATCHES])
        with opened as session:
            for ids, slots, tokens in MICRO_BATCHES:
                packed = PackedSeqParams(tokens_per_sample=tokens if side_by_side else None)
                chunk(toy.token_inputs(micro_batch(ids, slots).grid), packed_seq_params=packed)
        tables.append(pr2.recorded_tables(session, LENGTHS))
    for sequence in LENGTHS:
        assert (tables[0][sequence].experts == tables[1][sequence].experts).all()
        assert tables[1][sequence].valid.all()


def test_another_shape_than_the_grid_is_refused() -> None:
    """The number of rows is right, their order cannot be told."""
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, toy.preset("r2"))
    batch = MicroBatch.packed([0, 1], [7, 5], [7, 5])
    with pytest.raises(ReplayError, match="the router sees 6 x 2 rows, the micro-batch's grid has 12 x 1"), pr2.record([batch]):
        chunk(torch.zeros(6, 2, toy.HIDDEN))
    padded = MicroBatch.padded([0, 1], [5, 6], 6)
    with pytest.raises(ReplayError, match="the router sees 12 x 1 rows, the micro-batch's grid has 6 x 2"), pr2.record([padded]):
        chunk(torch.zeros(12, 1, toy.HIDDEN))
