"""The pushes that are kept (prediction.pushes), as parts of a checkpoint between two rollout batches.

For pipelines in which the next batch is rolled out before the checkpoint and trained on after it: it is judged by them.

    pr2.pushes.layers.<layer>.<n>.w, .momentum      [E, H] fp32: W_p, and an extrapolation that is a part of it
    pr2.pushes.layers.<layer>.<n>.gate, .arrived    [E, H]: W, and W + beta W_p as the engine got it
    pr2.pushes.layers.<layer>.<n>.numbers           [4] fp64: beta, delivered share, hold-back's lift and its error; NaN: not known
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_pr2.checkpoint import files
from megatron_pr2.checkpoint.checkpoint import replica_id
from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.prediction.pushes import Push
from megatron_pr2.replay.sequences import PushName

HELD = ("lift", "lift_error")


def kept_shards(pr2: Contents) -> tuple[list[PushName], dict[str, Any]]:
    """Names of the pushes that are kept, oldest first, and their parts for a pipeline's own `dist_checkpointing.save`."""
    pushes = list(pr2.measurement.pushes.kept)
    unknown = [math.nan] * len(pr2.sites)
    state: dict[str, Any] = {}
    for number, push in enumerate(pushes):
        of_layers = push.beta, push.delivered or unknown, *(push.held.get(name, unknown) for name in HELD)
        for site in pr2.sites:
            numbers_4 = torch.tensor([each[site.local] for each in of_layers], dtype=torch.float64)
            parts = {"numbers": numbers_4, "w": push.w_LEH[site.local]}
            if push.momentum_LEH is not None:
                parts["momentum"] = push.momentum_LEH[site.local]
            if push.gates:
                parts |= {"gate": push.gates[site.local], "arrived": push.arrived[site.local]}
            for name, part in parts.items():
                key = _key(site.hidden_layer, number, name)
                state[key] = ShardedTensor.from_rank_offsets(key, part, replica_id=replica_id())
    return [push.name for push in pushes], state


def load_kept(pr2: Contents, directory: Path, names: Sequence[PushName]) -> None:
    """Keeps a checkpoint's pushes again, after :func:`checkpoint.load_sharded_state_dict`; collective over all ranks.

    Raises:
        CheckpointError: on every rank, if any rank cannot read its part.
    """
    reader = files.RowReader(directory)
    for push in files.together(lambda: [_read(pr2, reader, number, name) for number, name in enumerate(names)]):
        pr2.measurement.pushes.kept.add(push)


def _read(pr2: Contents, reader: files.RowReader, number: int, name: PushName) -> Push:
    assert pr2.predictor is not None
    like_LEH = pr2.predictor.weight_LEH

    def part(what: str) -> list[Tensor]:
        keys = [_key(site.hidden_layer, number, what) for site in pr2.sites]
        return [reader.read(key).to(like_LEH.device) for key in keys if reader.shape(key) is not None]

    beta, delivered, *held = torch.stack(part("numbers")).T.tolist() if pr2.sites else [[]] * 4
    momentum = part("momentum")
    version, horizon = name
    return Push(
        version=version,
        layers=[site.layer for site in pr2.sites],
        beta=beta,
        held={} if pr2.measurement.hold_back is None else {"beta": beta, **dict(zip(HELD, held, strict=True))},
        w_LEH=torch.stack(part("w")) if pr2.sites else like_LEH.clone(),
        gates=part("gate"),
        arrived=part("arrived"),
        momentum_LEH=torch.stack(momentum) if momentum else None,
        seed=pr2.config.seed,
        delivered=delivered,
        horizon=horizon,
    )


def _key(layer: int, number: int, name: str) -> str:
    return f"pr2.pushes.layers.{layer}.{number}.{name}"
