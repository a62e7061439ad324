"""What was pushed to the engine, by weight version: predictions are judged on what arrived, whenever their rollouts come back.

Shape suffixes: S sampled tokens, L local MoE layers, J steps of hold-back's line search, E experts, H hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_pr2.errors import AttachError
from megatron_pr2.prediction.predictor import BETAS, KEPT, shift_logits
from megatron_pr2.prediction.rounding import merge_gate
from megatron_pr2.replay.sequences import PushName

logger = logging.getLogger(__name__)

Version = int | str
# Less than this share of a prediction is worth a warning.
LEAST_DELIVERED = 0.5


@dataclass(eq=False)
class Push:
    """One push: the gates that the engine got and what they were made of.

    Attributes:
        version: as the pipeline calls it; None where it does not say.
        layers: numbers in the whole model of this rank's MoE layers.
        beta: per layer, the share of W_p in use.
        held: hold-back's report at that time; empty without hold-back.
        w_LEH: W_p, fp32.
        gates: W of each layer, [E, H]; empty where the prediction is added to logits and never rounded (routes="actor").
        arrived: what the engine got, in the dtype of the push.
        momentum_LEH: the extrapolation that is a part of w_LEH, where another part is learned.
        seed: of the rounding.
        horizon: updates that it is predicted for; None is the average.
        delivered: per layer <delta, beta W_p> / <beta W_p, beta W_p>; NaN where nothing is predicted or it is not known.
        number: grows with the pushes; 0 where an engine got none.
    """

    version: Version | None
    layers: Sequence[int]
    beta: list[float]
    held: Mapping[str, list[float]]
    w_LEH: Tensor
    gates: list[Tensor]
    arrived: list[Tensor]
    momentum_LEH: Tensor | None
    seed: int
    delivered: list[float] = field(default_factory=list)
    horizon: float | None = None
    number: int = 0
    _steps_J11: Tensor | None = field(default=None, repr=False)
    _candidates: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def name(self) -> PushName:
        """Which of the pushes it is."""
        return self.version, self.horizon

    def prediction(self, layer: int) -> Tensor:
        """beta W_p of a local layer, [E, H] fp32."""
        return self.beta[layer] * self.w_LEH[layer]

    def delta(self, layer: int) -> Tensor:
        """What arrived of the prediction for a local layer: merged gate minus W, [E, H] fp32.

        Computed for each micro-batch: three small kernels of some hundred, where keeping it would cost another W_p per push.
        """
        if not self.gates:
            return self.prediction(layer)
        return self.arrived[layer].float() - self.gates[layer].float()

    def make_candidates(self) -> None:
        """Makes what shifts() needs; before the training passes, because rounding draws on the host and copies, and waits."""
        self._steps_J11 = torch.tensor(BETAS[1:], dtype=torch.float32, device=self.w_LEH.device).view(-1, 1, 1)
        if not self._candidates and self.dtypes - {torch.float32}:
            layers = zip(self.gates, self.w_LEH, self.arrived, self.layers, strict=True)
            self._candidates = [
                merge_gate(gate_EH, self._steps_J11 * w_EH, arrived_EH.dtype, seed=self.seed, layer=layer)
                for gate_EH, w_EH, arrived_EH, layer in layers
            ]

    def shifts(self, layer: int, h_SH: Tensor) -> Tensor:
        """delta_j h of every step of hold-back's line search but 0, [J, S, E]: a beta_j would have been rounded, too."""
        assert self._steps_J11 is not None, "make_candidates() comes first"
        if not self._candidates:
            return self._steps_J11 * shift_logits(h_SH, self.w_LEH[layer])
        delta_JEH = self._candidates[layer].float() - self.gates[layer].float()
        return shift_logits(h_SH, delta_JEH.flatten(0, 1)).unflatten(1, delta_JEH.shape[:2]).movedim(1, 0)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """In which the engine got its gates."""
        return {gate_EH.dtype for gate_EH in self.arrived}

    def measure(self) -> None:
        """Computes `delivered`; reads the device once."""
        sums = []
        for layer in range(len(self.beta)):
            wanted_EH, arrived_EH = self.prediction(layer).double(), self.delta(layer).double()
            sums.append(torch.stack([(arrived_EH * wanted_EH).sum(), wanted_EH.square().sum()]))
        shares = torch.stack(sums).tolist() if sums else []
        self.delivered = [arrived / wanted if wanted > 0.0 else math.nan for arrived, wanted in shares]

    def forget_candidates(self) -> None:
        """Frees what make_candidates() made: J [E, H] per layer in the dtype of the push."""
        self._steps_J11, self._candidates = None, []

    def same_as(self, other: Push) -> bool:
        """Whether both are of the same gates and the same prediction."""
        tensors = zip((self.w_LEH, *self.gates), (other.w_LEH, *other.gates), strict=True)
        return self.beta == other.beta and len(self.gates) == len(other.gates) and all(torch.equal(a, b) for a, b in tensors)

    @property
    def nbytes(self) -> int:
        """Of everything that it keeps; a layer with beta = 0 has one gate and not two."""
        parts = {part.data_ptr(): part.nbytes for part in (self.w_LEH, *self.gates, *self.arrived, *self._candidates)}
        return sum(parts.values()) + (self.momentum_LEH.nbytes if self.momentum_LEH is not None else 0)


def make_push(
    version: Version | None,
    layers: Sequence[int],
    gates: Sequence[Tensor],
    w_LEH: Tensor,
    beta: Sequence[float],
    *,
    dtype: torch.dtype | None,
    seed: int,
    held: Mapping[str, list[float]] | None = None,
    momentum_LEH: Tensor | None = None,
    horizon: float | None = None,
    read: bool = True,
) -> Push:
    """Merges and copies what an engine gets now.

    Args:
        layers: numbers in the whole model.
        gates: W of each layer; none where the prediction is added to logits.
        w_LEH: W_p; a copy is kept.
        dtype: in which the engine keeps its gates; None is that of W.
        seed: of the rounding.
        read: whether the device may be waited for; without it nothing is checked, and `delivered` is not known.

    Raises:
        AttachError: a W_p that is used is not finite.
    """
    w_LEH = w_LEH.detach().clone()
    if read:
        _require_finite(w_LEH, layers, beta)
    push = Push(version, list(layers), list(beta), held or {}, w_LEH, [], [], momentum_LEH, seed)
    push.horizon = horizon
    push.momentum_LEH = None if momentum_LEH is None else momentum_LEH.detach().clone()
    for local, gate in enumerate(gates):
        gate_EH = gate.detach().clone()
        push.gates.append(gate_EH)
        push.arrived.append(gate_EH)
        if beta[local] or dtype not in (None, gate_EH.dtype):
            push.arrived[local] = merge_gate(gate_EH, push.prediction(local), dtype, seed=seed, layer=layers[local])
    if read:
        push.measure()
    else:
        push.delivered = [math.nan] * len(push.beta)
    return push


def _require_finite(w_LEH: Tensor, layers: Sequence[int], beta: Sequence[float]) -> None:
    finite = w_LEH.isfinite().flatten(1).all(1).tolist()
    for local, fine in enumerate(finite):
        if not fine and beta[local] == 0.0:
            w_LEH[local].zero_()  # nothing of it is pushed, and hold-back must not judge it
    if bad := [layers[local] for local, fine in enumerate(finite) if not fine and beta[local]]:
        raise AttachError(
            f"the prediction W_p of the MoE layers {bad} is not finite: it is not pushed; check the policy's gradients and "
            "learning rate, or load a checkpoint from before"
        )


class Pushes:
    """The last pushes, newest last; all ranks of a pipeline stage hold the same.

    A push of a version that is there replaces it, and so does one without a version; the oldest is dropped when there are more than
    KEPT.
    """

    def __init__(self) -> None:
        self._kept: dict[PushName, Push] = {}
        self._count = 0
        self._warned = False

    def __iter__(self) -> Iterator[Push]:
        return iter(self._kept.values())

    @property
    def newest(self) -> Push | None:
        """None before the first push."""
        return next(reversed(self._kept.values()), None)

    @property
    def versions(self) -> list[Version | None]:
        """What is kept, oldest first."""
        return list(dict.fromkeys(version for version, _ in reversed(self._kept)))[::-1]

    @property
    def horizons(self) -> set[float]:
        """Those that something is kept for; the average, None, is none of them."""
        return {horizon for _, horizon in self._kept if horizon is not None}

    def add(self, push: Push, *, any_dtype: bool = False) -> Push:
        """Keeps a push and returns it; without a version the newest one where that is the same.

        Args:
            any_dtype: whether one of the same gates and prediction is the same, in whatever dtype the engine got it.
        """
        last = self.find(push.version, push.horizon)
        if last is not None and push.same_as(last):
            if any_dtype or push.dtypes == last.dtypes:
                if push.version is None:
                    return last
                last.held, push = push.held, last
            elif push.version is not None:
                logger.warning(
                    "the gates of version %s are pushed in %s, and were pushed in %s before: what was rolled out with either is "
                    "judged by the last push; give each a version of its own",
                    push.version, *(", ".join(map(str, each.dtypes)) for each in (push, last)),
                )  # fmt: skip
        self._count += 1
        push.number = self._count
        self._kept.pop(push.name, None)
        self._kept[push.name] = push
        for old in self.versions[:-KEPT]:
            self._kept = {name: push for name, push in self._kept.items() if name[0] != old}
        self._warn(push)
        return push

    def find(self, version: Version | None, horizon: float | None = None) -> Push | None:
        """A push by its version, None for the newest one of that horizon; None where it is not kept, or there is none."""
        if version is not None:
            return self._kept.get((version, horizon))
        return next((push for push in reversed(self._kept.values()) if push.horizon == horizon), None)

    def clear(self) -> None:
        """Forgets all pushes: after a checkpoint was loaded they are of another run."""
        self._kept.clear()

    def _warn(self, push: Push) -> None:
        low = [(share, local) for local, share in enumerate(push.delivered) if share < LEAST_DELIVERED]
        if not low or self._warned:
            return
        self._warned = True
        share, local = min(low)
        gate_EH, dtype = push.gates[local], push.arrived[local].dtype
        half = float(gate_EH.float().abs().mean()) * torch.finfo(dtype).eps / 2
        rms = push.beta[local] * float(push.w_LEH[local].square().mean().sqrt())
        logger.warning(
            "only %.0f %% of the prediction reach the engine in MoE layer %d (%d of %d are below %.0f %%): gates are pushed in %s, "
            "and beta W_p has an rms of %.1e where half a step of a typical weight is %.1e; push the gates in fp32 where the "
            "engine keeps them so (engine_weights(..., gate_dtype=torch.float32)), or use predictor='none'",
            100 * share, push.layers[local], len(low), len(push.beta), 100 * LEAST_DELIVERED,
            str(dtype).removeprefix("torch."), rms, half,
        )  # fmt: skip
