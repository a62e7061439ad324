"""verl's actor worker on two processes: routes, features and predictions as on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.distributed import pool
from tests.helpers.rounding import BF16
from tests.verl.test_engine import job, run

LAYOUTS = {
    "EP": {"expert": 2},
    "TP+SP, EP": {"tensor": 2, "expert": 2},
    "CP": {"context": 2},
    "PP": {"pipeline": 2},
    "VPP": {"pipeline": 2, "virtual": 2},
}


@pytest.fixture(scope="module")
def alone(model: str) -> Any:
    return run("train", model, "pr2", mini_batch_size=4, epochs=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes(model: str, alone: Any, layout: str) -> None:
    results = pool(2).run(job, "train", model, "pr2", mini_batch_size=4, epochs=2, parallel=LAYOUTS[layout], timeout=200)
    outputs = [result for result in results if result["log_probs"] is not None]
    log_probs = torch.cat([result["log_probs"] for result in outputs])
    assert (log_probs - alone["log_probs"]).abs().max() < BF16
    metrics = outputs[0]["metrics"]
    # The rows of a mini-batch are the same, however they are dealt out.
    assert metrics["grad_norm"] == pytest.approx(alone["metrics"]["grad_norm"], rel=BF16)
    assert len(metrics["pr2/agreement"]) == 2
    assert metrics["pr2/agreement"] == pytest.approx(alone["metrics"]["pr2/agreement"], abs=BF16)
    assert metrics["pr2/predictor/tokens"] == alone["metrics"]["pr2/predictor/tokens"]
    assert metrics["pr2/predictor/grad_norm"] == pytest.approx(alone["metrics"]["pr2/predictor/grad_norm"], rel=BF16)
    for result in results:
        gates = [name for name in result["pushed"] if name.endswith("gate.weight")]
        assert len(gates) == 4
        for name in gates:
            merged, own = result["pushed"][name], result["weights"][name]
            assert not torch.equal(merged, own), "a stage's prediction was lost on the way"
            assert torch.allclose(merged - own, alone["pushed"][name] - alone["weights"][name], atol=5e-3)


def test_scattered_routes(model: str) -> None:
    """Routes that only the first rank of a replica takes from the batch, and sends to the others."""
    scatter = "+actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.route_delivery=scatter"
    common: dict[str, Any] = {"parallel": LAYOUTS["TP+SP, EP"], "timeout": 200}
    found = pool(2).run(job, "train", model, "r3", scatter, **common)
    expected = pool(2).run(job, "train", model, "r3", **common)
    for ours, theirs in zip(found, expected, strict=True):
        assert [name for name in theirs["weights"] if not torch.equal(ours["weights"][name], theirs["weights"][name])] == []
    assert torch.equal(found[0]["log_probs"], expected[0]["log_probs"])
