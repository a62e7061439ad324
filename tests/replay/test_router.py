"""Score semantics: replay fixes the set of experts, everything else is the live router's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import attach
from megatron_pr2.config import PR2Config
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.router import PredictiveTopKRouter, select_experts
from tests.helpers import toy
from tests.helpers.rounding import assert_near

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {0: 7, 1: 9, 2: 5}
R3 = toy.preset("r3", max_missing_share=1.0)


def explicit_probs(router: Any, hidden_TH: Tensor, ids_TK: Tensor) -> Tensor:
    """Gate weights [T, E] of given experts, written out from Megatron-Core's definitions; differentiable."""
    config = router.config
    logits = hidden_TH @ router.weight.t()
    if config.moe_router_score_function != "softmax":
        sigmoid = config.moe_router_score_function == "sigmoid"
        scores = torch.sigmoid(logits) if sigmoid else torch.nn.functional.softplus(logits).sqrt()
        chosen = scores.gather(1, ids_TK)  # without the expert bias, which takes part in the selection only
        if config.moe_router_topk > 1:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    elif config.moe_router_pre_softmax:
        chosen = torch.softmax(logits, -1).gather(1, ids_TK)
    else:
        chosen = torch.softmax(logits.gather(1, ids_TK), -1)
    return torch.zeros_like(logits).scatter(1, ids_TK, chosen * (config.moe_router_topk_scaling_factor or 1.0))


def worst_routes(chunk: toy.ToyChunk, data: list[toy.Batch]) -> list[list[Tensor]]:
    """Per layer and micro-batch: the experts that the live router likes least."""
    with toy.observed(chunk) as calls, torch.no_grad():
        for batch in data:
            chunk(batch.inputs_SBH)
    worst = []
    for router in toy.routers(chunk):
        own = [call for call in calls if call.layer == router.layer_number - 1]
        worst.append([(call.hidden_TH @ router.weight.t()).topk(router.topk, largest=False).indices for call in own])
    return worst


def tables_from(data: list[toy.Batch], ids: list[list[Tensor]], config: Any) -> dict[int, Any]:
    """Route tables of recorded or invented ids, per layer and micro-batch."""
    tables = toy.random_tables(LENGTHS, config)
    for index, batch in enumerate(data):
        for row, (sequence, position) in enumerate(zip(*batch.micro_batch.grid.rows(), strict=True)):
            if sequence >= 0:
                for layer in range(len(ids)):
                    tables[sequence].experts[position, layer] = ids[layer][index][row].numpy()
                tables[sequence].valid[position] = True
    return tables


@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_replayed_gate_weights_and_gradients_are_the_live_routers(kind: str) -> None:
    """Even for the least likely experts: gathered from post-top-k probabilities they would be exact zeros without gradient."""
    config = toy.toy_config(**toy.ROUTERS[kind])
    chunk = toy.ToyChunk(config)
    data = toy.batches(LENGTHS, 2)
    worst = worst_routes(chunk, data)
    pr2 = attach(chunk, R3)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables_from(data, worst, config)))
    with toy.observed(chunk) as calls, pr2.actor_update([b.micro_batch for b in data], 1) as session:
        for batch in data:
            session.begin(chunk, batch.micro_batch)
            session.end(chunk, batch.micro_batch, chunk(batch.inputs_SBH))
    for call in calls:
        router = toy.routers(chunk)[call.layer]
        sequence, _ = data[call.number].micro_batch.grid.rows()
        rows = torch.from_numpy(sequence >= 0)
        ids = worst[call.layer][call.number]
        expected = explicit_probs(router, call.hidden_TH, ids)
        assert_near(call.probs_TE[rows].detach(), expected[rows].detach(), toy.HIDDEN)
        assert (call.probs_TE[rows].gather(1, ids[rows]) > 0).all()
    # The gradient of the last layer's router, from the explicit formula.
    batch, router = data[0], toy.routers(chunk)[-1]
    with pr2.actor_update([batch.micro_batch], 1) as session, toy.observed(chunk) as calls:
        chunk.zero_grad()
        toy.run(session, chunk, [batch])
    hidden, layer = calls[-1].hidden_TH, chunk.decoder.layers[-1].mlp
    rows = torch.from_numpy(batch.micro_batch.grid.rows()[0] >= 0)
    live = select_experts(router, hidden @ router.weight.t())
    ids = torch.where(rows.unsqueeze(1), worst[-1][0], live)
    output = hidden.view_as(batch.inputs_SBH) + (explicit_probs(router, hidden, ids) @ layer.values).view_as(batch.inputs_SBH)
    (expected,) = torch.autograd.grad(toy.loss(output), router.weight)
    assert_near(router.weight.grad, expected, toy.HIDDEN * int(rows.sum()))
    assert router.weight.grad.any()


@pytest.mark.parametrize("kind", toy.ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replaying_its_own_routes_is_live_routing_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    chunk = toy.ToyChunk(toy.toy_config(params_dtype=dtype, **toy.ROUTERS[kind])).to(dtype)
    data = [toy.Batch(b.micro_batch, b.inputs_SBH.to(dtype)) for b in toy.batches(LENGTHS, 2)]

    def gradients() -> list[Tensor]:
        found = [p.grad.clone() for p in chunk.parameters()]
        chunk.zero_grad()
        return found

    live = []
    for batch in data:
        live.append(chunk(batch.inputs_SBH))
        toy.loss(live[-1]).backward()
    live_gradients = gradients()
    pr2 = attach(chunk, PR2Config.preset("r2"))
    pr2.begin_rollout(toy.sequences(LENGTHS, None))
    recorded = toy.old_logprobs(pr2, chunk, data)
    replayed = toy.update(pr2, chunk, data, 1)
    for outputs in (recorded, replayed):
        assert all(torch.equal(a, b) for a, b in zip(live, outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(live_gradients, gradients(), strict=True))


@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_select_experts_is_the_routers_own_selection(kind: str) -> None:
    chunk = toy.ToyChunk(toy.toy_config(**toy.ROUTERS[kind]))
    batch = toy.batches(LENGTHS, 3)[0]
    with toy.observed(chunk) as calls:
        chunk(batch.inputs_SBH)
    for call in calls:
        router = toy.routers(chunk)[call.layer]
        ids = select_experts(router, call.hidden_TH @ router.weight.t())
        assert torch.equal(torch.zeros_like(call.map_TE).scatter(1, ids, True), call.map_TE)
    assert select_experts(router, torch.zeros(0, toy.EXPERTS)).shape == (0, router.topk)


def test_the_expert_bias_moves_the_selection_only() -> None:
    config = toy.toy_config(**toy.ROUTERS["sigmoid-bias"])
    chunk = toy.ToyChunk(config)
    router = toy.routers(chunk)[0]
    router.expert_bias.zero_()
    router.expert_bias[3] = 10.0
    hidden = torch.randn(6, 1, toy.HIDDEN)
    probs, routing_map = router(hidden)
    assert routing_map[:, 3].all()
    ids = routing_map.nonzero()[:, 1].view(6, -1)
    assert_near(probs.detach(), explicit_probs(router, hidden[:, 0], ids).detach(), toy.HIDDEN)
    assert (select_experts(router, hidden[:, 0] @ router.weight.t()) == 3).any(1).all()


def counted(preset: str, lengths: dict[int, int], *, recompute: bool = False, size: int = 1) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer of a bf16 model: tokens per expert as Megatron-Core would use them after a mini-step; those of real tokens, and
    of all rows, from the routing maps."""
    chunk = toy.ToyChunk(toy.toy_config(params_dtype=torch.bfloat16, **toy.ROUTERS["sigmoid-bias"]), recompute=recompute)
    chunk.to(torch.bfloat16)  # what Float16Module does: also to counts and biases
    pr2 = attach(chunk, toy.preset(preset, max_missing_share=1.0))
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, chunk.config) if preset == "r3" else None))
    data = [toy.Batch(b.micro_batch, b.inputs_SBH.bfloat16()) for b in toy.batches(lengths, size)]
    toy.old_logprobs(pr2, chunk, data)
    assert not any(router.local_tokens_per_expert.any() for router in toy.routers(chunk))
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, data, 1)
    found = []
    for router in toy.routers(chunk):
        own = [c for c in calls if c.layer == router.layer_number - 1 and c.recomputed == recompute]
        real = [torch.from_numpy(data[c.number].micro_batch.grid.rows()[0] >= 0) for c in own]
        sums = [sum(c.map_TE[rows].sum(0) for c, rows in zip(own, real, strict=True)), sum(c.map_TE.sum(0) for c in own)]
        found.append((router.local_tokens_per_expert, *sums))
    return found


@pytest.mark.parametrize("recompute", [False, True])
def test_expert_load_is_that_of_real_tokens_on_live_routes(recompute: bool) -> None:
    """The counts by which Megatron-Core moves expert biases: exact beyond what bf16 can count to, without padding, and once."""
    lengths = {sequence: 300 + sequence for sequence in range(4)}
    for counts_E, real_E, rows_E in counted("grpo", lengths, recompute=recompute):
        assert counts_E.dtype == torch.float32
        assert torch.equal(counts_E, real_E.float())
        assert not torch.equal(real_E, rows_E)
        assert not torch.equal(real_E.bfloat16().float(), real_E.float())


def test_padding_does_not_decide_which_way_expert_biases_move() -> None:
    lengths = {0: 100, 1: 20, 2: 20, 3: 20}
    for counts_E, _, rows_E in counted("grpo", lengths, size=4):
        direction, with_padding = ((each.float().mean() - each).sign() for each in (counts_E, rows_E))
        assert not torch.equal(direction, with_padding)


@pytest.mark.parametrize("preset", ["r2", "r3"])
def test_replayed_tokens_do_not_move_expert_biases(preset: str) -> None:
    """They were routed by an earlier router: biases would move on and on, without seeing what it does."""
    assert not any(counts_E.any() for counts_E, *_ in counted(preset, LENGTHS))


def test_the_fused_router_is_left_while_replaying_only() -> None:
    """Transformer Engine's fused router never looks at the replay object. Without Transformer Engine that path raises."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    config.moe_router_fusion = True
    batch = toy.batches(LENGTHS, 3)[0]
    pr2 = attach(chunk, R3)
    tables = toy.random_tables(LENGTHS, config)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    with pytest.raises(ValueError, match="TE"):
        chunk(batch.inputs_SBH)
    toy.update(pr2, chunk, [batch], 1)
    assert config.moe_router_fusion
    assert all(router.config is config for router in toy.routers(chunk))
    with pytest.raises(ValueError, match="TE"):
        chunk(batch.inputs_SBH)


def test_without_a_session_the_router_is_a_topk_router() -> None:
    config = toy.toy_config()
    plain, predictive = toy.ToyChunk(config), toy.ToyChunk(config, router_class=PredictiveTopKRouter)
    x = toy.batches(LENGTHS, 3)[0].inputs_SBH
    assert torch.equal(plain(x), predictive(x))
    assert all(router.router_replay is None for router in toy.routers(predictive))




def test_padding_loads_the_experts_of_one_token() -> None:
    """16 tokens in 4,096 rows of a padded batch: the 4 experts that padding chooses get nearly all (docs/attach.md)."""
    config = toy.toy_config(num_moe_experts=16, moe_router_topk=4)
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, R3)
    grid = padded([0], [16], 4096)
    data = [toy.Batch(MicroBatch(0, grid), toy.token_inputs(grid))]
    pr2.begin_rollout(toy.sequences({0: 16}, toy.random_tables({0: 16}, config)))
    toy.old_logprobs(pr2, chunk, data)
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, data, 1)
    for call in calls:
        load_E = call.map_TE.sum(0).sort(descending=True).values
        assert 4081 < load_E[:4].float().mean() < 4086
        assert load_E[4:].max() <= 16
