"""RSPO's router shift against the routers' own logits, in passes that are cut otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import attach
from megatron_pr2.rl.router_shift import RouterShift
from tests.helpers import toy
from tests.helpers.rounding import rounding

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {4: 6, 7: 9, 2: 5}


def scores_and_experts(chunk: toy.ToyChunk, calls: list[toy.Call], data: list[toy.Batch]) -> dict[int, tuple[Tensor, Tensor]]:
    """(log softmax scores [S, L, E], activated [S, L, E] bool) of each sequence, from what the routers were shown."""
    out = {}
    for number, batch in enumerate(data):
        shape = batch.inputs_SBH.shape[:2]
        of_batch = sorted((call for call in calls if call.number == number), key=lambda call: call.layer)
        weights = [router.weight.detach().double() for router in toy.routers(chunk)]
        logits = [call.hidden_TH.double() @ weight.t() for call, weight in zip(of_batch, weights, strict=True)]
        scores = torch.stack([each.log_softmax(-1).view(*shape, -1) for each in logits], dim=2)
        chosen = torch.stack([call.map_TE.view(*shape, -1) for call in of_batch], dim=2)
        for column, sequence in enumerate(batch.micro_batch.grid.sequence[0].tolist()):
            length = LENGTHS[sequence]
            out[sequence] = scores[:length, column], chosen[:length, column]
    return out


@pytest.mark.parametrize("missing", [[], [(7, 4), (2, 1)]])
@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
def test_the_shift_is_of_the_experts_that_the_old_policy_activated(preset: str, missing: list[tuple[int, int]]) -> None:
    """The training pass is cut otherwise than the log-prob pass, and its micro-batches are wider or narrower."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    overrides = {"routes": "actor"} if preset == "pr2" and missing else {}
    pr2 = attach(chunk, toy.preset(preset, sample_fraction=1.0, max_missing_share=1.0, **overrides))
    from_engine = pr2.config.routes == "engine"
    pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config, missing) if from_engine else None))
    shift = RouterShift()
    data = toy.batches(LENGTHS, 2)
    with toy.observed(chunk) as calls, pr2.old_logprobs([b.micro_batch for b in data]) as session, shift.keeping(session):
        toy.run(session, chunk, data, backward=False)
    old = scores_and_experts(chunk, calls, data)
    observed = pr2.measurement.drift
    toy.drift(chunk, size=0.3)
    data = toy.batches({sequence: LENGTHS[sequence] for sequence in (2, 4, 7)}, 1)
    with toy.observed(chunk) as calls, pr2.actor_update([b.micro_batch for b in data], 1) as session, shift.measuring(session):
        toy.run(session, chunk, data)
        found = {b.micro_batch.grid.sequence[0, 0]: shift.shift(b.micro_batch) for b in data}
    now = scores_and_experts(chunk, calls, data)
    for sequence, length in LENGTHS.items():
        (old_scores, activated), (scores, _) = old[sequence], now[sequence]
        gap = (scores - old_scores).abs()
        expected = torch.where(activated, gap, 0.0).sum((1, 2)) / (config.moe_router_topk * config.num_layers)
        np.testing.assert_allclose(found[sequence][0, :length], expected, rtol=rounding(64), atol=rounding(64))
        assert expected.min() > 0.0
    assert pr2.measurement.drift is observed
    assert any(pr2.step(1e-3)["drift"]["agreement"]), "drift is measured besides"
