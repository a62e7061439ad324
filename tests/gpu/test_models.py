"""Whole models in bf16 on CUDA with Megatron-Core's own modules: I1, I2 and exact replay. Transformer Engine is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.gpu import models
from tests.gpu.needs import needs
from tests.helpers import toy

pytestmark = [pytest.mark.gpu, needs(), pytest.mark.usefixtures("one_rank", "deterministic")]

PR2 = {"max_missing_share": 1.0, "sample_fraction": 0.5}


def check_i1_i2(spec: str, *, on_gpu: bool) -> str:
    """One rollout batch of r3 and of pr2 under several strategies: the same policy, bit by bit, on exact routes."""
    presets = {
        "r3": toy.preset("r3", max_missing_share=1.0),
        "zero": toy.preset("pr2", alpha=0.0, **PR2),
        "learning": toy.preset("pr2", alpha=30.0, **PR2),
        "everything": toy.preset("pr2", alpha=30.0, predictor="learned+momentum", hold_back=True, **PR2),
    }
    traces = {name: models.train(spec, models.model_config(spec, on_gpu=on_gpu), preset) for name, preset in presets.items()}
    r3 = traces["r3"]
    assert r3.losses[-1] < 0.9 * r3.losses[0]  # it trains, or equal weights would mean little
    assert len(set(r3.weights)) == len(r3.weights)
    for trace in traces.values():
        assert (trace.wrong, trace.replayed) == (0, r3.replayed)
        assert trace.policy() == r3.policy()
    assert r3.replayed > 1000
    assert traces["zero"].predictor == 0.0
    assert min(traces["learning"].predictor, traces["everything"].predictor) > 0.1
    return f"{r3.replayed} rows on their routes, loss {r3.losses[0]:.2f} to {r3.losses[-1]:.2f}"


def check_padding(spec: str, *, on_gpu: bool) -> str:
    """Rows that FP8's alignment adds carry no weight: routes are exact, and results are those without them, up to rounding."""
    plain = models.replay(spec, models.model_config(spec, on_gpu=on_gpu))
    padded = models.replay(spec, models.model_config(spec, on_gpu=on_gpu), padding=True)
    assert plain.wrong == padded.wrong == 0
    assert plain.rows == padded.rows > 300
    losses = models.relative_distance(padded.losses, plain.losses)
    gradients = models.relative_distance(padded.gradients, plain.gradients)
    assert losses < 0.01
    assert gradients < 0.05
    return f"losses off by {losses:.0e}, gradients by {gradients:.0e}"


def test_i1_i2_of_a_whole_model(record_property: Callable[[str, Any], None]) -> None:
    """With Megatron's schedule, DistributedDataParallel and its bf16 optimizer."""
    record_property("detail", check_i1_i2("local", on_gpu=True))


def test_router_padding_keeps_routes_exact(record_property: Callable[[str, Any], None]) -> None:
    record_property("detail", check_padding("local", on_gpu=True))
