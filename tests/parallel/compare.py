"""Comparing the ranks of one case with the single process: every number (invariant I3) and every replayed route (I4)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tests.helpers.rounding import LOGPROB, rounding
from tests.parallel import batch
from tests.parallel.case import Result, Seen

TOKENS = {(s, p) for s, length in batch.LENGTHS.items() for p in range(length)}
REPLAYED = {(s, p) for s, p in TOKENS if p < batch.LENGTHS[s] - 1 and (s, p) not in batch.MISSING}
BEARING = {(s, p) for s, p in TOKENS if batch.PROMPT - 1 <= p < batch.LENGTHS[s] - 1}

# Of the largest entry of a gradient, which is a sum over all tokens.
GRADIENT = rounding(len(TOKENS))


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest deviation as a share of the largest expected entry."""
    size = float(expected.abs().max())
    return float((value - expected).abs().max()) / size if size else float((value != 0).any())


def assert_same_numbers(results: Sequence[Result], expected: Result) -> dict[str, float]:
    """Loss, old log-probs, policy gradient, predictor gradient, drift and counts of all ranks against one process.

    Returns:
        The largest deviation of each kind.
    """
    worst = dict.fromkeys(("loss", "logprobs", "gradient", "predictor", "drift"), 0.0)
    layers: set[int] = set()
    for result in results:
        worst["loss"] = max(worst["loss"], abs(result.loss - expected.loss))
        assert result.logprobs.keys() == expected.logprobs.keys() == BEARING
        error = max(abs(value - expected.logprobs[key]) for key, value in result.logprobs.items())
        worst["logprobs"] = max(worst["logprobs"], error)
        if result.gradients is not None:
            assert expected.gradients is not None
            assert result.gradients.keys() == expected.gradients.keys()
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.gradients.values()))
            assert norm > 0
            for name, gradient in result.gradients.items():
                error = relative(gradient, expected.gradients[name])
                assert error < GRADIENT, f"policy gradient of {name} deviates by {error:.1e} of its largest entry"
                worst["gradient"] = max(worst["gradient"], error)
            if result.grad_norm is not None:
                assert math.isclose(result.grad_norm, norm, rel_tol=GRADIENT)
        assert result.drift.keys() == expected.drift.keys()
        for layer, (gradient, count) in result.predictor.items():
            wanted, tokens = expected.predictor[layer]
            assert count == tokens > 0, f"layer {layer}: {count} sampled tokens, expected {tokens}"
            error = relative(gradient, wanted)
            assert error < GRADIENT, f"predictor gradient of layer {layer} deviates by {error:.1e} of its largest entry"
            worst["predictor"] = max(worst["predictor"], error)
        for layer, columns in result.drift.items():
            for name, value in columns.items():
                error = abs(value - expected.drift[layer][name])
                assert error < GRADIENT, f"drift metric {name} of layer {layer}: {value}, expected {expected.drift[layer][name]}"
                worst["drift"] = max(worst["drift"], error)
        for name, value in expected.update.items():
            found = result.update[name]
            assert math.isclose(found, value, rel_tol=GRADIENT), f"predictor's {name}: {found}, not {value}"
        assert result.absent == 0
        _assert_same_agreement(result, expected)
        layers |= result.predictor.keys()
    assert layers == expected.predictor.keys()
    assert worst["loss"] < LOGPROB
    assert worst["logprobs"] < LOGPROB
    return worst


def _assert_same_agreement(result: Result, expected: Result) -> None:
    """Sums over layers and sequences whose tokens lie on several ranks; one near tie may be decided otherwise."""
    if expected.agreement is None:
        assert result.agreement is None
        return
    assert result.agreement is not None
    assert abs(result.agreement.overall - expected.agreement.overall) < 0.005
    assert abs(result.agreement.least_layer - expected.agreement.least_layer) < 0.01
    assert result.agreement.of_sequence.keys() <= expected.agreement.of_sequence.keys()
    for sequence, share in result.agreement.of_sequence.items():
        assert abs(share - expected.agreement.of_sequence[sequence]) < 0.03


def assert_every_route_replayed_once(results: Sequence[Result], expected: Result, *, recomputed: bool) -> None:
    """Every token's experts, as the routers selected them: its route where it has one, else the single process's live choice.

    Args:
        recomputed: whether the routers run again in the backward pass.
    """
    for training in (False, True):
        wanted = {key: experts for key, experts in _selected(expected.seen, training, recomputed=False)}
        forward = list(_selected((seen for result in results for seen in result.seen), training, recomputed=False))
        assert len(forward) == len(dict(forward)), "a token was routed by two ranks, or twice"
        assert dict(forward) == wanted
        again = list(_selected((seen for result in results for seen in result.seen), training, recomputed=True))
        assert len(again) == len(dict(again)), "a token was recomputed twice"
        assert dict(again).items() <= wanted.items()
        assert bool(again) == (recomputed and training)
    for result in results:
        _assert_counts(result)


def selected_experts(results: Sequence[Result], *, training: bool) -> dict[tuple[int, int, int], int]:
    """(layer, sequence, position) -> experts as bits, over all ranks, in a pass's forward."""
    return dict(_selected((seen for result in results for seen in result.seen), training, recomputed=False))


def assert_routes_were_taken(result: Result, tables: dict[int, Tensor], columns: dict[int, int]) -> None:
    """The single process selected the tables' experts for every valid route and as many elsewhere, in both passes.

    Args:
        tables: sequence -> [positions, MoE layers, K] expert ids.
        columns: MoE layer (0-based decoder layer) -> its column.
    """
    for training in (False, True):
        selected = dict(_selected(result.seen, training, recomputed=False))
        assert selected.keys() == {(layer, *token) for layer in columns for token in TOKENS}
        for (layer, sequence, position), experts in selected.items():
            ids = tables[sequence][position, columns[layer]]
            assert experts.bit_count() == len(ids)
            if (sequence, position) in REPLAYED:
                assert experts == sum(1 << int(expert) for expert in ids)


def _selected(seen: Iterable[Seen], training: bool, *, recomputed: bool) -> Iterable[tuple[tuple[int, int, int], int]]:
    for each in seen:
        if each.training is training and each.recomputed is recomputed:
            assert len(each.rows) == len(each.experts)
            for (sequence, position), experts in zip(each.rows.tolist(), each.experts.tolist(), strict=True):
                if sequence != batch.PADDING:
                    yield (each.layer, sequence, position), experts


def _assert_counts(result: Result) -> None:
    """The sessions counted what this rank's rows are, once and not once per layer; a rank without MoE layers counts nothing."""
    for training in (False, True):
        forward = [seen for seen in result.seen if seen.training is training and not seen.recomputed]
        replayed = rows = 0
        if forward:
            held = torch.cat([seen.rows for seen in forward if seen.layer == forward[0].layer]).tolist()
            replayed, rows = sum(tuple(token) in REPLAYED for token in held), len(held)
        found = result.counts[training]
        assert found == (replayed, rows - replayed), f"(replayed, missing) rows: {found}, expected {(replayed, rows - replayed)}"
