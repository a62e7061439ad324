"""Whole runs whose engine gives log-probs of other tokens, of another scale, or of nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch.distributed as dist

from megatron_pr2 import host
from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.embedded import MegatronEngine
from tests.helpers.distributed import pool
from tests.helpers.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("host_platform")]

Change = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
RUN = [
    "steps=1", "preset=r3", "rollout.prompts=2", "rollout.responses=16", "algorithm.mini_steps=2", "algorithm.micro_batch_size=4"
]  # fmt: skip


def shifted(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.roll(logprobs, 1)


def shifted_on_one_rank(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.roll(logprobs, 1) if dist.get_rank() else logprobs


def of_base_2(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return logprobs / np.float32(np.log(2.0))


def unrelated(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.random.default_rng(len(logprobs)).permutation(logprobs * 3.0)


def job(path: Path, directory: Path) -> list[str]:
    """What ended each run."""
    host.init(expert=2)
    return [
        ended(path, directory / "shifted", shifted),
        ended(path, directory / "one rank", shifted_on_one_rank),
        ended(path, directory / "base 2", of_base_2),
        ended(path, directory / "unrelated", unrelated),
        ended(path, directory / "disabled", shifted, "rollout.max_logprob_gap=0"),
    ]


def ended(path: Path, run: Path, change: Change, *overrides: str) -> str:
    generate = MegatronEngine.generate

    def changed(*args: Any, **kwargs: Any) -> Any:
        batch = generate(*args, **kwargs)
        return replace(batch, responses=[replace(r, logprobs=change(r.logprobs)) for r in batch.responses])

    with mock.patch.object(MegatronEngine, "generate", changed):
        try:
            result = train(path, run, [*RUN, *overrides])
        except RolloutError as error:
            return str(error)
    assert result["records"][0]["logprob_gap"]["mean"] > 0.05
    return "trained"


def test_log_probs_that_are_not_the_actors_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """By every rank alike, also where only one rank's samples are wrong; with the likely cause."""
    one, other = pool(2).run(job, tiny_checkpoint, tmp_path)
    assert one == other
    of_shift, of_one_rank, of_base, of_unrelated, disabled = one
    assert "Likely cause: shifted by one: compared with the next token's" in of_shift
    assert "the engine's log-probs differ from the actor's by" in of_one_rank
    assert "another base of the logarithm: a line of slope 0.69" in of_base
    assert "other weights or other tokens" in of_unrelated
    assert "rollout.max_logprob_gap sets another bound" in of_unrelated
    assert disabled == "trained"
