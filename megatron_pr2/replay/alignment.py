"""Are an engine's routes those of the tokens that they lie on? The old-log-prob pass compares them with the actor's own choice.

Shape suffixes: T rows of a micro-batch, C compared rows, L MoE layers of this rank, B sequences, K top-k.

Engine and actor hold nearly the same weights then, and a route that lies on another token's row, or that a layer did not take,
agrees by chance only, top-k / experts. Nothing else would fail, and the run would train on noise. A mean hides a layer or a
sequence that is wholly wrong, so each of them is judged as well, by the rule in routes.agreement.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.parallel.groups import pipeline_group
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.routes.agreement import least_hits, least_share, least_share_of_older

Counts = npt.NDArray[np.float64]

# Of each sequence so many rows are compared: over all layers enough to tell its routes from another's, and few of a long sequence.
ROWS_PER_SEQUENCE = 64


@dataclass(frozen=True)
class Agreement:
    """Shares of the replayed experts that the actor's routers take as well.

    Attributes:
        overall: of all compared rows, over all ranks.
        least_layer: of the layer in which it is lowest.
        of_sequence: of each sequence of this rank's replica that was compared, by id.
    """

    overall: float
    least_layer: float
    of_sequence: dict[int, float]


def compared_rows(tokens: TokenIndex, valid: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.bool_]:
    """Which tokens are compared, by flat token index: ROWS_PER_SEQUENCE of each sequence that have a route, one of each equal part.

    A function of its arguments alone, whatever is sampled for features.
    """
    out = np.zeros(tokens.total, dtype=bool)
    for sequence in tokens.lengths:
        start = tokens.span(sequence).start
        (positions,) = np.nonzero(valid[tokens.span(sequence)])
        if len(positions) > ROWS_PER_SEQUENCE:
            edges = np.linspace(0, len(positions), ROWS_PER_SEQUENCE + 1)
            place = np.random.Generator(np.random.Philox([seed, sequence])).random(ROWS_PER_SEQUENCE)
            positions = positions[(edges[:-1] + place * np.diff(edges)).astype(np.int64)]
        out[start + positions] = True
    return out


class AgreementCheck:
    """Counts equal slots per layer and sequence on the device over one pass; read once at its end."""

    def __init__(
        self,
        layers: Sequence[int],
        columns: Sequence[int],
        model_config: Any,
        tp_cp: dist.ProcessGroup | None,
        everyone: Sequence[dist.ProcessGroup],
        device: torch.device,
        least: float | None,
    ) -> None:
        """Args:
        layers: MoE layers of the whole model, 0-based; those of this rank are at `columns` of them.
        tp_cp: the ranks that hold other tokens of the same sequences.
        everyone: groups over which, one after the other, a sum becomes that of the whole model and batch.
        least: PR2Config.min_agreement.
        """
        self._layers, self._tp_cp, self._everyone = list(layers), tp_cp, list(everyone)
        self._columns = torch.tensor(list(columns), dtype=torch.int64, device=device)
        self._device, self._given = device, least
        topk, experts = model_config.moe_router_topk, model_config.num_moe_experts
        half = torch.bfloat16 if model_config.bf16 else torch.float16 if model_config.fp16 else model_config.params_dtype
        self._dtype, self._topk, self._chance = str(half).removeprefix("torch."), topk, topk / experts
        # For sequences under present weights, and for the others.
        rule = least_share(self._dtype, topk, experts), least_share_of_older(topk, experts)
        self._problem: str | None = None
        self._bounds = rule if least is None else (float(least), float(least))
        self.begin(TokenIndex({}), np.zeros(0, dtype=bool), [])

    def begin(self, tokens: TokenIndex, compared: npt.NDArray[np.bool_], older: Sequence[bool], *, predicted: bool = False) -> None:
        """A new rollout batch.

        Args:
            compared: which tokens, by flat token index.
            older: per sequence, whether the weights have changed since its routes were taken.
            predicted: whether a router of this rank had a prediction. The engine weights its experts by it, so that later layers
                have other inputs than the actor's.
        """
        self._tokens, self._compared, self._predicted = tokens, compared, predicted
        self._older_B = np.array(older, dtype=bool)
        self.discard()

    def discard(self) -> None:
        """Forgets the pass."""
        self._hits_LB = torch.zeros(len(self._columns), 0, device=self._device)
        self._rows_B = np.zeros(0, dtype=np.int64)
        self._of: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def open(self, micro_batches: Sequence[MicroBatch], rows: Sequence[IntArray]) -> None:
        """Finds the rows to compare.

        Args:
            rows: per micro-batch the flat token index of every row of this rank, -1 for padding.
        """
        self._hits_LB = torch.zeros(len(self._columns), len(self._tokens.lengths), device=self._device)
        self._rows_B = np.zeros(len(self._tokens.lengths), dtype=np.int64)
        for micro_batch, tokens_T in zip(micro_batches, rows, strict=True):
            (rows_C,) = np.nonzero((tokens_T >= 0) & self._compared[tokens_T]) if len(self._compared) else np.nonzero(tokens_T < -1)
            if len(rows_C):
                sequence_C = self._tokens.sequence_of(tokens_T[rows_C])
                self._rows_B += np.bincount(sequence_C, minlength=len(self._rows_B))
                self._of[micro_batch.key] = self._to_device(rows_C), self._to_device(sequence_C)

    def rows(self, key: Hashable) -> Tensor | None:
        """The rows [C] of a micro-batch that are compared, on the device; None if there are none."""
        return self._of[key][0] if key in self._of else None

    def add(self, local: int, key: Hashable, live_CK: Tensor, replayed_CK: Tensor) -> None:
        """Adds one micro-batch of one local layer."""
        equal_C = (live_CK.unsqueeze(2) == replayed_CK.long().unsqueeze(1)).sum((1, 2), dtype=torch.float32)
        self._hits_LB[local].index_add_(0, self._of[key][1], equal_C)

    def read(self) -> Agreement | None:
        """Judges the pass, with one read, and starts over; None if no row was compared. Collective."""
        self._problem = None
        slots_B, older_B = self._to_device(self._rows_B * float(self._topk)), self._to_device(self._older_B)
        of_sequence_2B = torch.stack((self._hits_LB.sum(0).double(), slots_B * len(self._columns)))
        # Hits and slots of sequences under present weights, and of the others.
        of_layer = torch.zeros(4, len(self._layers), dtype=torch.float64, device=self._device)
        for kind, chosen_B in enumerate((~older_B, older_B)):
            of_layer[2 * kind, self._columns] = self._hits_LB.double() @ chosen_B.double()
            of_layer[2 * kind + 1, self._columns] = slots_B @ chosen_B.double()
        _summed(of_sequence_2B, [self._tp_cp, pipeline_group()])
        least_2B = torch.where(older_B, self._bounds[1], torch.tensor(self._bounds, device=self._device).unsqueeze(1))
        wrong_2B = (of_sequence_2B[0] < least_hits(least_2B, of_sequence_2B[1])).double()
        flags = torch.cat((wrong_2B.sum(1), torch.full((1,), float(self._predicted), dtype=torch.float64, device=self._device)))
        everywhere = torch.cat((of_layer.reshape(-1), flags))
        _summed(everywhere, self._everyone)
        found = np.array(torch.cat((everywhere, of_sequence_2B.reshape(-1), wrong_2B.reshape(-1))).tolist())
        self.discard()
        *_, wrong_now, wrong_older, predicted = found[: everywhere.numel()]
        of_layer_22L = found[: of_layer.numel()].reshape(2, 2, -1)
        of_sequence_4B = found[everywhere.numel() :].reshape(4, -1)
        if predicted:  # in any stage
            of_layer_22L = np.stack((np.zeros_like(of_layer_22L[0]), of_layer_22L.sum(0)))
        hits_L, slots_L = of_layer_22L.sum(0)
        if not slots_L.sum():
            return None
        if self._bounds[0]:
            wrong_B, wrong_anywhere = of_sequence_4B[3 if predicted else 2], (wrong_older if predicted else wrong_now) > 0
            self._problem = self._what_is_wrong(of_layer_22L, of_sequence_4B[:2], wrong_B, wrong_anywhere=wrong_anywhere)
        shares_L = hits_L[slots_L > 0] / slots_L[slots_L > 0]
        of_sequence = {
            sid: float(hits / slots) for sid, hits, slots in zip(self._tokens.lengths, *of_sequence_4B[:2], strict=True) if slots
        }
        return Agreement(float(hits_L.sum() / slots_L.sum()), float(shares_L.min()), of_sequence)

    def require(self) -> None:
        """Raises ReplayError if in the pass that was read a layer, a sequence or the whole agreed too little; on every rank."""
        if self._problem is not None:
            raise ReplayError(self._problem)

    def _to_device(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _what_is_wrong(self, of_layer_22L: Counts, of_sequence_2B: Counts, wrong_B: Counts, *, wrong_anywhere: bool) -> str | None:
        wrong: dict[str, str] = {}
        for (hits_L, slots_L), least in zip(of_layer_22L, self._bounds, strict=True):
            (layers,) = np.nonzero(hits_L < least_hits(least, slots_L))
            if len(layers):
                worst = layers[np.argmin(hits_L[layers] / slots_L[layers])]
                wrong["layer"] = f"{hits_L[worst] / slots_L[worst]:.1%} in layer {self._layers[worst]} (0-based)" + _among(
                    len(layers), len(slots_L), "MoE layers"
                )
            if hits_L.sum() < least_hits(least, slots_L.sum()):
                wrong["whole"] = f"{hits_L.sum() / slots_L.sum():.1%} over all layers and sequences"
        hits_B, slots_B = of_sequence_2B
        (sequences,) = np.nonzero(wrong_B)
        if len(sequences):
            worst = sequences[np.argmin(hits_B[sequences] / slots_B[sequences])]
            wrong["sequence"] = f"{hits_B[worst] / slots_B[worst]:.1%} in sequence {list(self._tokens.lengths)[worst]}" + _among(
                len(sequences), len(hits_B), "sequences of this rank"
            )
        elif wrong_anywhere:
            wrong["sequence"] = "less than the bound in a sequence of another rank, whose error names it"
        if not wrong:
            return None
        hits, slots = of_layer_22L.sum((0, 2))
        now, older = (f"{bound:.2%}" for bound in self._bounds)
        rule = (
            f"at least {now} where the weights are the same ({self._dtype}, top-{self._topk}), {older} where they have changed "
            "since the push or a prediction is in use"
        )
        return (
            f"of the engine's experts the actor's routers choose under the weights of the rollout only {'; '.join(wrong.values())} "
            f"({hits / slots:.1%} of all {slots:.0f} compared). Expected: "
            f"{rule if self._given is None else f'min_agreement={self._given:.0%}'}; unrelated routes agree in {self._chance:.1%}. "
            "One layer: its gate did not reach the engine, or its kernel does not record routes. One sequence: its routes are "
            "repeated, shifted or another's. All: the grids do not say which token is in which row (padding, packing, order of "
            "context-parallel chunks), or the engine runs other weights or a gate of less precision: run the handshake"
        )


def _among(count: int, total: int, what: str) -> str:
    return "" if count == 1 else f", the worst of {count} of {total} {what}"


def _summed(values: Tensor, groups: Sequence[dist.ProcessGroup | None]) -> None:
    for group in groups:
        if group is not None and group.size() > 1:
            dist.all_reduce(values, group=group)
