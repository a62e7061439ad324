"""Pushes as parts of a checkpoint: of those that a rollout batch was rolled out with (.rollout), or that are kept (.kept_pushes).

    push<n>.w, .momentum       [E, H] fp32: the W_p that routes were predicted with, and an extrapolation that is a part of it
    push<n>.gate, .arrived     [E, H]: W, and W + beta W_p as the engine got it
    push<n>.numbers            [4] fp64: beta, the delivered share, what hold-back reported beside at the push; NaN: not known

They are numbered as they were pushed, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.prediction.pushes import Push
from megatron_pr2.replay.sequences import PushName


def in_order(ranks: Sequence[Sequence[tuple[PushName, int]]]) -> list[PushName]:
    """The pushes of several ranks, each once, as they were pushed; of each rank their names and numbers."""
    numbers = dict(push for pushes in ranks for push in pushes)
    return sorted(numbers, key=lambda name: numbers[name])


def push_numbers(pr2: Contents, known: Sequence[PushName]) -> npt.NDArray[np.int16]:
    """By flat token index, the place from 1 among `known`, all ranks' pushes, of the one that it was rolled out with; 0: none."""
    pushed = pr2.measurement.pushes
    if not len(pushed.of_token):
        return np.zeros(pr2.tokens.total, dtype=np.int16)
    return np.array([*(known.index(push.name) + 1 for push in pushed.in_use), 0], dtype=np.int16)[pushed.of_token]


def push_parts(pr2: Contents, pushes: Iterable[Push], numbers: Mapping[PushName, int]) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, name, tensor) of the pushes that have a number."""
    for push in pushes:
        for site in pr2.sites if push.name in numbers else ():
            unknown = [math.nan] * len(pr2.sites)
            of_layers = push.beta, push.delivered, *(push.held.get(name, unknown) for name in _reports(pr2))
            numbers_4 = torch.tensor([each[site.local] for each in of_layers], dtype=torch.float64)
            parts = {"w": push.w_LEH[site.local], "numbers": numbers_4}
            if push.momentum_LEH is not None:
                parts["momentum"] = push.momentum_LEH[site.local]
            if push.gates:
                parts |= {"gate": push.gates[site.local], "arrived": push.arrived[site.local]}
            for name, part in parts.items():
                yield site.hidden_layer, f"push{numbers[push.name]}.{name}", part


def take_pushes(
    pr2: Contents, read: Callable[[int, str], Tensor | None], of_token: npt.NDArray[np.int16], main: int
) -> None:
    """Judges the batch by a checkpoint's pushes; where it has none what begin_rollout() found stays.

    Args:
        read: a part of a layer by its name, on the host; None where there is none.
        of_token: by flat token index, the number of its push from 0; -1: not known.
        main: the number of this replica's main push; -1: none.
    """
    if pr2.predictor is None:
        return
    others = sorted(set(of_token.tolist()) - {-1, main})
    numbers = [*others, main] if main >= 0 else others
    if numbers:
        places = np.full(max(numbers) + 2, -1, dtype=np.int16)
        places[numbers] = range(len(numbers))
        found = [read_push(pr2, read, number, (f"push {number} of a checkpoint", None)) for number in numbers]
        pr2.measurement.pushes.use(found, places[of_token])


def read_push(pr2: Contents, read: Callable[[int, str], Tensor | None], number: int, name: PushName) -> Push:
    """A push from what :func:`push_parts` gave."""
    assert pr2.predictor is not None
    like_LEH, parts = pr2.predictor.weight_LEH, dict[str, list[Tensor]]()
    for part in ("w", "numbers", "momentum", "gate", "arrived"):
        found = (read(site.hidden_layer, f"push{number}.{part}") for site in pr2.sites)
        parts[part] = [tensor for tensor in found if tensor is not None]
    beta, delivered, *held = np.array([four.tolist() for four in parts.pop("numbers")]).reshape(-1, 4).T.tolist()
    reported = {report: values for report, values in zip(_reports(pr2), held, strict=True) if report}
    on_device = {part: [tensor.to(like_LEH.device) for tensor in tensors] for part, tensors in parts.items()}
    return Push(
        version=name[0],
        horizon=name[1],
        layers=[site.layer for site in pr2.sites],
        beta=beta,
        held={} if pr2.measurement.hold_back is None else {"beta": beta, **reported},
        w_LEH=torch.stack(on_device["w"]) if pr2.sites else like_LEH.clone(),
        gates=on_device["gate"],
        arrived=on_device["arrived"],
        momentum_LEH=torch.stack(on_device["momentum"]) if on_device["momentum"] else None,
        seed=pr2.config.seed,
        delivered=delivered,
        number=number,
    )


def _reports(pr2: Contents) -> tuple[str, str]:
    """Names of what hold-back reports beside beta; "" for a place that it leaves empty."""
    names = [] if pr2.measurement.hold_back is None else list(pr2.measurement.hold_back.reports)
    first, second, *_ = [*names, "", ""]
    return first, second
