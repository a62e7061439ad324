"""Whole runs of every loss, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_pr2.rl.objectives import MASKING
from tests.helpers.distributed import pool
from tests.helpers.loop import train_job
from tests.helpers.rounding import LOGPROB

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("host_platform")]

RUN = ["steps=1", "preset=r3", "rollout.prompts=2", "algorithm.mini_steps=2", "algorithm.micro_batch_size=4"]
RUNS = {
    "grpo": [],
    "gspo": ["algorithm.loss=gspo"],
    "gspo, by ones": ["algorithm.loss=gspo", "algorithm.micro_batch_size=1"],
    "cispo": ["algorithm.loss=cispo", "algorithm.clip_high=0.28"],
    "gmpo": ["algorithm.loss=gmpo"],
    "icepop": ["algorithm.loss=icepop", "algorithm.importance_cap=5"],
    "kpop": ["algorithm.loss=kpop", "algorithm.mask_threshold=0.5"],
    "opsm": ["algorithm.loss=opsm", "algorithm.mask_threshold=1e-9"],
    "rspo": ["algorithm.loss=rspo"],
}


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every loss on two ranks that share the experts."""
    directory = tmp_path_factory.mktemp("runs")
    jobs = [(directory / name, [*RUN, *overrides], False) for name, overrides in RUNS.items()]
    results = pool(2).run(train_job, tiny_checkpoint, jobs)
    return {name: [result[i] for result in results] for i, name in enumerate(RUNS)}


def test_every_loss_trains_on_the_same_rollouts(runs: dict[str, list[dict[str, Any]]]) -> None:
    weights = set()
    for name, ranks in runs.items():
        first, second = (rank["records"][0] for rank in ranks)
        assert repr(first) == repr(second), name
        assert ranks[0]["rollouts"] == runs["grpo"][0]["rollouts"], name
        assert np.isfinite(first["policy_loss"]), name
        weights.add(ranks[0]["weights"][-1])
        assert ("masked_fraction" in first) == (name in MASKING), name
        assert ("router_shift_weight" in first) == (name == "rspo")
        assert ("importance" in first) == (name == "icepop")
        assert first["mini_steps"][0]["ratio_std"] < LOGPROB, "nothing has moved in the first mini-step"
    assert len(weights) > len(runs) - 3, "losses differ"


def test_a_mean_over_responses_does_not_depend_on_micro_batches(runs: dict[str, list[dict[str, Any]]]) -> None:
    first, second = (runs[name][0]["records"][0]["mini_steps"] for name in ("gspo", "gspo, by ones"))
    for key in ("loss", "grad_norm", "clip_fraction", "approx_kl"):
        assert [step[key] for step in first] == pytest.approx([step[key] for step in second], rel=1e-3, abs=LOGPROB), key
    assert first[1]["clip_fraction"] > 0.0, "bounds of 3e-4 take effect after one update"


def test_masks_and_weights_are_reported(runs: dict[str, list[dict[str, Any]]]) -> None:
    record = {name: ranks[0]["records"][0] for name, ranks in runs.items()}
    # The embedded engine is the actor, and nothing differs but for the last bits.
    assert record["icepop"]["masked_fraction"] == record["kpop"]["masked_fraction"] == 0.0
    assert record["icepop"]["importance"]["weight"] == pytest.approx(1.0, abs=LOGPROB)
    assert 0.0 < record["opsm"]["mini_steps"][1]["masked_fraction"] < 1.0
    before, after = (step["router_shift_weight"] for step in record["rspo"]["mini_steps"])
    assert before == pytest.approx(1.0, abs=LOGPROB)
    assert 0.8 <= after < 1.0 - LOGPROB
