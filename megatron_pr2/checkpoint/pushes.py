"""The pushes that a rollout batch was rolled out with, as parts of its checkpoint (megatron_pr2.checkpoint.rollout).

    push<n>.w, .momentum       [E, H] fp32: the W_p that routes were predicted with, and an extrapolation that is a part of it
    push<n>.gate, .arrived     [E, H]: W, and W + beta W_p as the engine got it
    push<n>.beta               [1 or 2] fp64: beta and, where there was a push, the delivered share
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.prediction.pushes import Push
from megatron_pr2.replay.sequences import PushName


def push_numbers(pr2: Contents, known: Sequence[PushName]) -> npt.NDArray[np.int16]:
    """By flat token index, the place from 1 among `known`, all ranks' pushes, of the one that it was rolled out with; 0: none."""
    pushed = pr2.measurement.pushes
    if not len(pushed.of_token):
        return np.zeros(pr2.tokens.total, dtype=np.int16)
    return np.array([*(known.index(push.name) + 1 for push in pushed.in_use), 0], dtype=np.int16)[pushed.of_token]


def push_parts(pr2: Contents, numbers: Mapping[PushName, int]) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, name, tensor) of the pushes that have a number."""
    for push in pr2.measurement.pushes.in_use:
        for site in pr2.sites if push.name in numbers else ():
            beta = [push.beta[site.local], *push.delivered[site.local : site.local + 1]]
            parts = {"w": push.w_LEH[site.local], "beta": torch.tensor(beta, dtype=torch.float64)}
            if push.momentum_LEH is not None:
                parts["momentum"] = push.momentum_LEH[site.local]
            if push.gates:
                parts |= {"gate": push.gates[site.local], "arrived": push.arrived[site.local]}
            for name, part in parts.items():
                yield site.hidden_layer, f"push{numbers[push.name]}.{name}", part


def take_pushes(pr2: Contents, read: Callable[[int, str], Tensor | None], of_token: npt.NDArray[np.int16]) -> None:
    """Judges the batch by a checkpoint's pushes; where it has none what begin_rollout() found stays.

    Args:
        read: a part of a layer by its name, on the host; None where there is none.
        of_token: by flat token index, the number of its push from 0; -1: not known.
    """
    if (predictor := pr2.predictor) is None:
        return
    held = {} if pr2.measurement.hold_back is None else pr2.measurement.hold_back.report()
    pushes: list[Push | None] = []
    while read(pr2.layers.hidden_moe[0], name := f"push{len(pushes)}.beta") is not None:
        parts: dict[str, list[Tensor]] = {}
        for part in ("w", "beta", "momentum", "gate", "arrived"):
            found = (read(site.hidden_layer, name.replace("beta", part)) for site in pr2.sites)
            parts[part] = [tensor.to(predictor.weight_LEH.device) for tensor in found if tensor is not None]
        push = Push(
            version=f"{name} of a checkpoint",
            layers=[site.layer for site in pr2.sites],
            beta=[float(beta[0]) for beta in parts["beta"]],
            held=held,
            w_LEH=torch.stack(parts["w"]) if parts["w"] else predictor.weight_LEH.clone(),
            gates=parts["gate"],
            arrived=parts["arrived"],
            momentum_LEH=torch.stack(parts["momentum"]) if parts["momentum"] else None,
            seed=pr2.config.seed,
            delivered=[float(beta[1]) for beta in parts["beta"] if len(beta) > 1],
        )
        pushes.append(push)
    if pushes:
        pr2.measurement.pushes.use(pushes, of_token)
