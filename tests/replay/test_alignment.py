"""Routes that are not those of the tokens they lie on: every layer and sequence is judged, not their mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.attach import PR2, PR2Config, attach
from megatron_pr2.errors import ReplayError, RouteError
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.alignment import ROWS_PER_SEQUENCE, compared_rows
from megatron_pr2.routes.agreement import enough_rows, least_hits, least_share, least_share_of_older
from megatron_pr2.routes.table import RouteTable
from tests.helpers import toy
from tests.helpers.ids import random_ids

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = dict.fromkeys(range(8), 68)
DATA = toy.batches(LENGTHS, 2)
Tables = dict[int, RouteTable]


def config(layers: int = 4) -> Any:
    return toy.toy_config(num_layers=layers, num_moe_experts=16, moe_router_topk=4)


def routes(layers: int = 4, changed: Callable[[Any], None] = lambda chunk: None) -> Tables:
    """What an engine with the actor's weights takes; `changed` is done to its model before."""
    chunk = toy.ToyChunk(config(layers))
    changed(chunk)
    engine = attach(chunk, PR2Config.preset("r2"))
    with engine.record([b.micro_batch for b in DATA]) as session:
        toy.run(session, chunk, DATA, backward=False)
    tables = engine.recorded_tables(session, LENGTHS)
    for table in tables.values():
        table.valid[-1] = False
    return tables


def replayed(tables: Tables, *, pushed: bool = True, sampled: bool = True, older: tuple[int, ...] = (), **settings: Any) -> PR2:
    """The old-log-prob pass of an actor over these routes."""
    chunk = toy.ToyChunk(config(next(iter(tables.values())).num_layers))
    pr2 = attach(chunk, PR2Config.preset("r3", **settings))
    if pushed:
        list(pr2.engine_weights([]))
    sequences = [replace(s, older=s.id in older) for s in toy.sequences(LENGTHS, tables)]
    if not sampled:
        sequences = [replace(s, loss_mask=[0] * (s.loss_stop - s.loss_start)) for s in sequences]
    pr2.begin_rollout(sequences)
    toy.old_logprobs(pr2, chunk, DATA)
    return pr2


def repeated(tables: Tables) -> None:
    """One sequence has the same valid row at every token."""
    tables[3].experts[:-1] = tables[3].experts[5]


def random_layer(tables: Tables) -> None:
    for sequence, table in tables.items():
        table.experts[:-1, 1] = random_ids(67, 1, 4, 16, sequence)[:, 0]


def shifted(tables: Tables) -> None:
    """Half of the sequences, by one row."""
    for sequence in range(4):
        tables[sequence].experts[1:-1] = tables[sequence].experts[:-2].copy()


def rounded_to_8_bits(chunk: Any) -> None:
    with torch.no_grad():
        for router in toy.routers(chunk):
            scale = router.weight.abs().amax(1, keepdim=True) / 127
            router.weight.copy_((router.weight / scale).round() * scale)


@pytest.mark.parametrize("layers", [4, 24])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (repeated, r"3\d\.\d% in sequence 3 \("),
        (random_layer, r"2\d\.\d% in layer 1 \(0-based\)"),
        (shifted, r"[23]\d\.\d% in sequence [0-3], the worst of 4 of 8 sequences"),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_what_a_mean_hides_is_named(layers: int, damage: Callable[[Tables], None], message: str, sampled: bool) -> None:
    """Also where no token bears loss, so that no features are kept."""
    tables = routes(layers)
    damage(tables)
    with pytest.raises(ReplayError, match=message):
        replayed(tables, sampled=sampled)


def test_a_gate_in_8_bits_is_refused_in_fp32() -> None:
    tables = routes(changed=rounded_to_8_bits)
    with pytest.raises(ReplayError, match=r"99\.\d% over all layers .* at least 99\.97% where the weights are the same \(float32"):
        replayed(tables)
    with pytest.raises(ReplayError, match=r"Expected: min_agreement=100%"):
        replayed(tables, min_agreement=0.9999)
    # Other weights than those of the last push: it may be drift.
    assert 0.99 < replayed(tables, pushed=False).engine_agreement < 1.0  # type: ignore[operator]
    assert replayed(tables, older=tuple(LENGTHS)).engine_agreement < 1.0  # type: ignore[operator]
    assert replayed(tables, min_agreement=0.0).engine_agreement < 1.0  # type: ignore[operator]


def test_the_engine_of_the_same_weights_agrees() -> None:
    pr2 = replayed(routes())
    found = pr2.measurement.engine_agreement
    assert found is not None
    assert (found.overall, found.least_layer) == (1.0, 1.0)
    assert found.of_sequence == dict.fromkeys(LENGTHS, 1.0)
    pr2.step(0.1)
    assert pr2.metrics()["pr2/engine_agreement_min"] == 1.0


def test_weights_that_changed_since_the_push_have_a_wider_bound() -> None:
    tables = routes(changed=lambda chunk: toy.drift(chunk, 0.02))
    with pytest.raises(ReplayError, match="where the weights are the same"):
        replayed(tables)
    assert replayed(tables, pushed=False).engine_agreement > 0.9  # type: ignore[operator]
    # Sequences are judged each by their own bound: the first half is of now.
    with pytest.raises(ReplayError, match=r"in sequence [0-3], the worst of 4 of 8"):
        replayed(tables, older=(4, 5, 6, 7))
    repeated(tables)
    with pytest.raises(ReplayError, match="in sequence 3"):
        replayed(tables, pushed=False)


def test_a_step_ends_what_the_last_push_says() -> None:
    chunk = toy.ToyChunk(config())
    pr2 = attach(chunk, PR2Config.preset("r3"))
    tables = routes(changed=rounded_to_8_bits)
    list(pr2.engine_weights([]))
    pr2.step(0.1)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    toy.old_logprobs(pr2, chunk, DATA)


@pytest.mark.parametrize("told", ["version of the batch", "versions of the tokens", "nothing"])
def test_a_push_before_the_batch_begins_does_not_make_older_routes_new(told: str) -> None:
    """A loop that is one step behind pushes new weights, and then begins with what older ones have sampled."""
    chunk = toy.ToyChunk(config())
    pr2 = attach(chunk, PR2Config.preset("r3"))
    tables = routes(changed=rounded_to_8_bits)
    list(pr2.engine_weights([], version=1))
    pr2.step(0.1)
    list(pr2.engine_weights([], version=2))
    sequences = toy.sequences(LENGTHS, tables)
    if told == "versions of the tokens":
        sequences = [replace(s, versions=[1] * (s.loss_stop - s.loss_start)) for s in sequences]
    pr2.begin_rollout(sequences, version=1 if told == "version of the batch" else None)
    if told == "nothing":  # so it is of the last push
        with pytest.raises(ReplayError, match="where the weights are the same"):
            toy.old_logprobs(pr2, chunk, DATA)
    else:
        toy.old_logprobs(pr2, chunk, DATA)


def test_predicted_routes_are_compared_with_the_prediction() -> None:
    """The engine's gates are W + W_p: its routes are not those of W."""
    weights = [0.1 * torch.randn(16, toy.HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in range(4)]

    def merged(chunk: Any) -> None:
        with torch.no_grad():
            for router, w_EH in zip(toy.routers(chunk), weights, strict=True):
                router.weight += w_EH

    tables = routes(changed=merged)
    with pytest.raises(ReplayError, match="in layer"):
        replayed(tables)
    shares = []
    for size in (0.0, 1.0):
        chunk = toy.ToyChunk(config())
        pr2 = attach(chunk, PR2Config.preset("pr2", hold_back=False))
        assert pr2.predictor is not None
        for layer, w_EH in enumerate(weights):
            pr2.predictor.weight(layer).copy_(size * w_EH)
        pr2.measurement.pushes.sent(None)
        pr2.begin_rollout(toy.sequences(LENGTHS, tables))
        toy.old_logprobs(pr2, chunk, DATA)
        shares.append(pr2.engine_agreement)
    # Not 1: the engine weights its experts by the prediction, and so has other inputs in later layers.
    assert shares[0] < 0.9 < 0.95 < shares[1]


def test_rows_are_spread_over_those_that_have_a_route() -> None:
    tokens = TokenIndex({7: 1000, 2: 30, 9: 1})
    valid = np.ones(tokens.total, dtype=bool)
    valid[:500] = False
    chosen = compared_rows(tokens, valid, 0)
    long = np.nonzero(chosen[:1000])[0]
    assert len(long) == ROWS_PER_SEQUENCE
    assert long.min() >= 500
    assert np.diff(long).max() < 20
    assert chosen[1000:].all()
    assert (chosen == compared_rows(tokens, valid, 0)).all()
    assert (chosen != compared_rows(tokens, valid, 1)).any()


def test_the_rule() -> None:
    """Figures of docs/sglang.md."""
    assert least_share("bfloat16", 8, 128) == pytest.approx(0.9215, abs=1e-4)
    assert least_share("float32", 8, 128) == pytest.approx(0.9996, abs=1e-4)
    assert least_share("bfloat16", 4, 4) == 1.0
    assert least_share_of_older(8, 128) == pytest.approx(0.531, abs=1e-3)
    # A few slots prove nothing, many do.
    assert least_hits(0.95, 8) < 3
    assert least_hits(0.95, 10_000) == pytest.approx(9410, abs=5)
    for topk, experts in ((1, 8), (2, 8), (8, 128)):
        rows = enough_rows(least_share("bfloat16", topk, experts), topk, experts)
        assert 2 <= rows <= 16


def test_a_row_that_is_repeated_over_other_tokens_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tables = routes()
    pr2 = attach(toy.ToyChunk(config()), PR2Config.preset("r3"))
    given = [replace(s, token_ids=list(range(68))) for s in toy.sequences(LENGTHS, tables)]
    pr2.begin_rollout(given)
    assert "repeat one row" not in caplog.text
    repeated(tables)
    pr2.begin_rollout(given)
    assert "the routes of 1 sequences repeat one row over different tokens: 66 rows in sequence 3" in caplog.text


@pytest.mark.parametrize(
    ("lengths", "zeros", "refused"),
    [
        ([11] * 8, [1], True),  # too few in one table
        ([81], [1], True),
        ([11] * 3, [1], False),  # 30 rows are no verdict
        ([11] * 8, [0, 1], False),  # in all layers alike: it is the model
    ],
)
def test_a_layer_of_zeros_is_judged_over_the_batch(lengths: list[int], zeros: list[int], refused: bool) -> None:
    """With top-1 zero may be a real choice; the last row of a table has no route."""
    top1 = toy.toy_config(moe_router_topk=1, moe_router_pre_softmax=True)
    by_id = dict(enumerate(lengths))
    tables = toy.random_tables(by_id, top1)
    pr2 = attach(toy.ToyChunk(top1), PR2Config.preset("r3"))
    pr2.begin_rollout(toy.sequences(by_id, tables))
    for table in tables.values():
        table.experts[:, zeros] = 0
    if not refused:
        pr2.begin_rollout(toy.sequences(by_id, tables))
        return
    with pytest.raises(RouteError, match=r"MoE layers \[1\] .* all 80 tokens of the batch to expert 0"):
        pr2.begin_rollout(toy.sequences(by_id, tables))
