"""A rollout batch's pushes in its checkpoint: each replica goes on with those of its own tokens, whoever had them before."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_pr2 import host
from megatron_pr2.attach import PR2, attach
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.drifting import hold_back_of

LENGTHS = {0: 21, 1: 17}
# By version: what the engine rolled out with, in the order in which it was pushed.
BETAS = {"9": 1.0, "10": 0.5, "11": 0.25}


def model() -> tuple[toy.ToyChunk, PR2]:
    chunk = toy.ToyChunk(toy.toy_config(params_dtype=torch.bfloat16))
    return chunk, attach(chunk, toy.preset("pr2", sample_fraction=1.0, held_out_share=0.5, hold_back=True))


def state(pr2: PR2) -> dict[str, Any]:
    """What the current batch is judged by: of each token the W_p, and all of the main push."""
    pushed = pr2.measurement.pushes
    main = pushed.in_use[-1]
    return {
        "of_token": [float(pushed.in_use[place].w_LEH.sum()) for place in pushed.of_token],
        "main": [float(main.w_LEH.sum()), main.beta, main.delivered, main.arrived[0].float().sum().item()],
        "used": {name: [round(value, 9) for value in values] for name, values in hold_back_of(pr2).used.items()},
        "pushes": len(pushed.in_use),
    }


def job(directory: Path, versions: dict[int, list[str]], own: list[list[list[int]]], told: str | None) -> list[dict[str, Any]]:
    """The state of a batch, of the sequences that this rank has first, and after each restart with those that it has then."""
    host.init()
    rank, found = dist.get_rank(), []
    chunk, pr2 = model()
    assert pr2.predictor is not None
    for seed, (version, beta) in enumerate(BETAS.items()):
        pr2.predictor.weight_LEH.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(seed))
        hold_back_of(pr2).beta = [beta] * toy.LAYERS
        # Gains of five batches, others at each push: weights, their squares, sums of gains and of their squares.
        hold_back_of(pr2).state()[:, :4] = torch.tensor([5.0, 5.0, 0.1 * seed, 1.0 + seed], dtype=torch.float64)[:, None]
        with pr2.merged_gates(version):
            pass
    for number, sids in enumerate(ranks[rank] for ranks in own):
        if number:
            chunk, pr2 = model()
            pr2.load(directory / str(number - 1), sequences=sids)
        else:
            lengths = {sid: LENGTHS[sid] for sid in sids}
            sequences = toy.sequences(lengths, toy.random_tables(lengths, pr2.model_config))
            spans = {s.id: s.loss_stop - s.loss_start for s in sequences}
            said = {sid: [*(versions[sid] * n)[: n - 1], -1] for sid, n in spans.items()}
            pr2.begin_rollout([replace(s, versions=said[s.id]) for s in sequences], version=told)
            toy.old_logprobs(pr2, chunk, toy.batches(lengths, 2))
        found.append(state(pr2))
        if number < len(own) - 1:
            pr2.save(directory / str(number), rollout=True)
    return found


@pytest.mark.parametrize(("alone", "told"), [(False, None), (False, "9"), (True, None)])
def test_a_replica_goes_on_with_the_pushes_of_its_own_tokens(alone: bool, told: str | None, tmp_path: Path) -> None:
    """One has an older push than the other, or all sequences; they keep them, change places, change back, and one takes all."""
    versions = {0: ["10"], 1: ["9", "10"] if alone else ["9"]}
    there, back = ([[], [0, 1]], [[0, 1], []]) if alone else ([[0], [1]], [[1], [0]])
    first, second = pool(2).run(job, tmp_path, versions, [there, there, back, there, [[0, 1], []]], told)
    for (begun, kept, _, again, _), (_, _, elsewhere, _, _) in ((first, second), (second, first)):
        if begun["of_token"]:
            for resumed in (kept, elsewhere, again):
                assert resumed == begun
        assert not any(math.isnan(lift) for lift in kept["used"]["lift"])
        if told:
            assert begun["main"] == kept["main"], "also where there are no tokens"
    betas = [each["main"][1][0] for each in (second[0], first[-1])]
    assert betas == ([1.0, 1.0] if told else [0.5, 0.5] if alone else [1.0, 0.5])
