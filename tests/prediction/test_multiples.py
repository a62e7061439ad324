"""Shares of a prediction from second moments: against the definition in float64, and what follows from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pr2.drift.moments import drift_moments
from megatron_pr2.prediction.multiples import CAP, FEWEST, OWN, SHARES, Multiples
from tests.helpers import drifting, toy

pytestmark = pytest.mark.usefixtures("host_platform")

LAYERS, TOKENS, EXPERTS = 2, 40, 8
UNCAPPED = [1e-12] * LAYERS


def centred(x: torch.Tensor) -> torch.Tensor:
    return x.double() - x.double().mean(-1, keepdim=True)


def observe(multiples: Multiples, mini_step: int, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One (x, d) for each layer."""
    rows = [drift_moments(x, d, torch.zeros_like(x)) / len(x) for x, d in pairs]
    xx, xd, dd = (torch.stack(rows)[:, column].tolist() for column in range(3))
    multiples.observe(mini_step, [float(len(x)) for x, _ in pairs], xx, xd, dd)


def observed(batches: int, drift_of: dict[int, float], noise: float = 0.0, seed: int = 0) -> Multiples:
    """After batches whose drift in mini-step i was drift_of[i] times what was predicted, and noise from the second."""
    generator = torch.Generator().manual_seed(seed)
    multiples = Multiples(LAYERS, decay=0.9)
    for _ in range(batches):
        for mini_step, times in drift_of.items():
            pairs = []
            for _ in range(LAYERS):
                x_SE, noise_SE = torch.randn(2, TOKENS, EXPERTS, generator=generator)
                pairs.append((x_SE, times * x_SE + (noise if mini_step > 1 else 0.0) * noise_SE))
            observe(multiples, mini_step, pairs)
        multiples.close_batch()
    return multiples


def test_nothing_of_one_push_for_all_and_all_of_an_own_one_until_enough_is_known() -> None:
    for batches in range(int(FEWEST)):
        few = observed(batches, {1: 0.0, 2: 0.5, 3: 0.5, 4: 0.5})
        assert few.shares(None, UNCAPPED, ()) == [0.0] * LAYERS
        assert few.shares(1.0, UNCAPPED, (0.0, 1.0, 2.0)) == few.shares(OWN, UNCAPPED, ()) == [1.0] * LAYERS
    known = observed(int(FEWEST), {1: 0.0, 2: 0.5, 3: 0.25})
    assert known.shares(1.0, UNCAPPED, (0.0, 1.0, 2.0)) == [0.5] * LAYERS
    assert known.shares(2.0, UNCAPPED, (0.0, 1.0, 2.0)) == [0.25] * LAYERS
    assert known.shares(9.0, UNCAPPED, (0.0, 1.0, 2.0)) == [1.0] * LAYERS  # no mini-step was dealt to it yet


def test_mini_steps_count_for_the_nearest_horizon() -> None:
    known = observed(4, {1: 1.5, 2: 1.5, 3: 0.5, 4: 0.5})
    assert known.shares(2.5, UNCAPPED, (0.0, 2.5)) == [0.5] * LAYERS
    assert known.shares(0.0, UNCAPPED, (0.0, 2.5)) == [1.5] * LAYERS


@pytest.mark.parametrize(("times", "share"), [(0.75, 0.75), (-0.5, 0.0), (4.0, 1.5)])
def test_an_own_push_gets_the_least_squares_share(times: float, share: float) -> None:
    assert observed(4, {3: times}).shares(2.0, UNCAPPED, (0.0, 2.0)) == pytest.approx([share] * LAYERS)


def test_one_push_for_all_is_used_only_where_correlations_add_up_to_more_than_one() -> None:
    # Of two mini-steps the first loses what the second gains, however well that is known.
    assert observed(4, {1: 0.0, 2: 1.0}, noise=0.2).shares(None, UNCAPPED, ()) == [0.0] * LAYERS
    assert all(share > 0.5 for share in observed(4, {1: 0.0, 2: 1.0, 3: 1.0, 4: 1.0}, noise=0.2).shares(None, UNCAPPED, ()))
    weak = observed(4, {1: 0.0, 2: 0.1, 3: 0.1, 4: 0.1}, noise=1.0)
    assert weak.shares(None, UNCAPPED, ()) == [0.0] * LAYERS
    assert all(0.0 < total < 1.0 for total in weak.report([0.0] * LAYERS)["correlations"])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), later=st.floats(-1.0, 2.0), noise=st.floats(0.0, 2.0))
def test_the_share_is_where_the_distance_is_smallest(seed: int, later: float, noise: float) -> None:
    """Against the sum over mini-steps of |d - b x|, from the tokens themselves; a mini-step comes in parts."""
    generator = torch.Generator().manual_seed(seed)
    multiples, batches = Multiples(1, decay=0.9), 4
    weights = [0.9 ** (batches - 1 - batch) for batch in range(batches)]
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {1: [], 2: [], 3: []}
    for _ in range(batches):
        for mini_step, pairs in seen.items():
            x_SE, noise_SE = torch.randn(2, TOKENS, EXPERTS, generator=generator)
            pairs.append((x_SE, noise_SE * noise + (later * x_SE if mini_step > 1 else 0.0)))
            for part in (slice(0, 10), slice(10, None)):
                observe(multiples, mini_step, [(x_SE[part], pairs[-1][1][part])])
        multiples.close_batch()
    def squared(pairs: list[tuple[torch.Tensor, torch.Tensor]], b: float) -> float:
        return sum(w * float((centred(d) - b * centred(x)).square().sum()) for w, (x, d) in zip(weights, pairs, strict=True))

    distance = [sum(math.sqrt(squared(pairs, b)) for pairs in seen.values()) for b in SHARES.tolist()]
    share = multiples.shares(None, [1e-12], ())[0]
    assert distance[int(np.argmin([abs(b - share) for b in SHARES.tolist()]))] == pytest.approx(min(distance), rel=1e-6)


def test_a_shift_is_never_larger_than_the_usual_drift_allows() -> None:
    multiples = observed(4, {2: 1.0})
    usual = float(multiples.state()[0, 0, 5] / multiples.state()[0, 0, 2])  # <d, d> per token
    assert multiples.shares(1.0, [usual * 0.25, usual * 4.0], (0.0,)) == pytest.approx([1.0, CAP / 2.0], rel=0.1)
    assert multiples.shares(1.0, [0.0, math.inf], (0.0,)) == [1.0, 0.0]


def test_older_rollouts_are_predicted_whole() -> None:
    """What is measured begins at the old-log-prob pass, after what they are predicted over."""
    assert observed(4, {1: 0.0, 2: 0.25}).shares(4.0, UNCAPPED, (4.0, 5.0)) == [1.0] * LAYERS


def test_the_state_goes_on() -> None:
    first = observed(4, {2: 0.5, 3: 0.25})
    second = Multiples(LAYERS, decay=0.9)
    second.load_state(first.state())
    assert torch.equal(second.state(), first.state())
    assert second.shares(1.0, UNCAPPED, (0.0, 1.0, 2.0)) == first.shares(1.0, UNCAPPED, (0.0, 1.0, 2.0)) == [0.5] * LAYERS
    second.load_state(None)
    assert second.shares(1.0, UNCAPPED, (1.0, 2.0)) == [1.0] * LAYERS


def test_a_batch_goes_on_with_what_its_first_mini_steps_counted() -> None:
    whole, first, resumed = observed(3, {2: 0.5}), observed(3, {2: 0.5}), Multiples(LAYERS, decay=0.9)
    generator = torch.Generator().manual_seed(9)
    half = [(x, 2.0 * x) for x in torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator)]
    rest = [(x, 2.0 * x) for x in torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator)]
    for multiples in (whole, first):
        observe(multiples, 2, half)
    first.horizons = {0.0, 1.0}
    resumed.load_state(first.state())
    assert resumed.horizons == {0.0, 1.0}
    for multiples in (whole, resumed):
        observe(multiples, 2, rest)
        multiples.close_batch()
    assert whole.shares(1.0, UNCAPPED, (0.0, 1.0)) == resumed.shares(1.0, UNCAPPED, resumed.horizons) != [0.5] * LAYERS


def test_tokens_of_unknown_pushes_say_nothing() -> None:
    multiples = Multiples(LAYERS, decay=0.9)
    for _ in range(int(FEWEST)):
        multiples.observe(2, [9.0] * LAYERS, *[[0.0] * LAYERS] * 3)
        multiples.close_batch()
    assert multiples.shares(1.0, UNCAPPED, (0.0, 1.0)) == [1.0] * LAYERS


def test_layers_without_tokens_and_stages_without_layers_are_held_back_to_nothing_new() -> None:
    multiples = Multiples(LAYERS, decay=0.9)
    multiples.observe(2, [0.0] * LAYERS, *[[math.nan] * LAYERS] * 3)
    multiples.close_batch()
    assert not multiples.state()[..., :-1].any()
    empty = Multiples(0, decay=0.9)
    empty.observe(2, [], [], [], [])
    empty.close_batch()
    empty.load_state(empty.state())
    assert empty.shares(None, [], ()) == []
    assert empty.report([]) == {"beta": [], "correlations": []}


# ---- on drifts whose right answer is known ---------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"predictor": "lookahead", "rollouts": 7}


def last(found: drifting.Drift) -> dict[float | None, list[float]]:
    """beta of the newest push for every horizon."""
    return {push.horizon: push.beta for push in found.pr2.measurement.pushes.kept}


def test_one_push_for_all_is_r3_until_a_steady_drift_is_known() -> None:
    found = drifting.simulate("steady", **SETTINGS)
    assert [found.reports[i][0]["hold_back"]["beta"] for i in range(int(FEWEST))] == [[0.0] * toy.LAYERS] * int(FEWEST)
    assert all(report["drift"]["lift"] == [0.0] * toy.LAYERS for batch in found.reports[: int(FEWEST)] for report in batch)
    assert all(beta > 0.0 for beta in last(found)[None])
    assert found.lift(since=5) > 1e-3
    assert all(total > 1.0 for total in found.reports[-1][0]["hold_back"]["correlations"])


@pytest.mark.parametrize("kind", ["noise", "flip"])
def test_one_push_for_all_stays_r3_where_nothing_can_be_known(kind: str) -> None:
    assert drifting.simulate(kind, **{**SETTINGS, "hold_back": False}).lift(since=2) < -0.005
    found = drifting.simulate(kind, **SETTINGS)
    assert found.lift() == 0.0
    assert last(found)[None] == [0.0] * toy.LAYERS


def test_a_push_for_each_mini_step_gains_from_the_first_batch_on() -> None:
    found = drifting.simulate("steady", groups=True, **SETTINGS)
    assert all(batch[0]["drift"]["lift"] == [0.0] * toy.LAYERS for batch in found.reports)  # r3
    assert all(value > 0.0 for batch in found.reports[1:] for report in batch[1:] for value in report["drift"]["lift"])
    # Every update is as long as the last one, of which a further one is taken for less: more of W_p is better, up to the cap.
    assert last(found)[1.0] == pytest.approx([1.0] * toy.LAYERS, rel=0.2)
    assert all(beta > 1.2 for beta in last(found)[3.0])
    noise = drifting.simulate("noise", groups=True, **SETTINGS)
    assert all(beta < 0.2 for horizon, betas in last(noise).items() if horizon for beta in betas)


def test_what_the_actor_records_is_used_from_the_first_batch_on() -> None:
    how: dict[str, Any] = {**SETTINGS, "routes": "actor", "known_mini_step": True}
    found = drifting.simulate("steady", **how)
    assert all(batch[0]["drift"]["lift"] == [0.0] * toy.LAYERS for batch in found.reports)
    assert found.lift(since=1) > 1e-3
    assert all(beta > 0.8 for beta in found.reports[-1][0]["hold_back"]["beta"])
    noise = drifting.simulate("noise", **how)
    assert all(beta < 0.2 for beta in noise.reports[-1][0]["hold_back"]["beta"])
