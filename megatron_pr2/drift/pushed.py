"""Which push every token of a rollout batch was rolled out with, and what that push makes of its logits.

Shape suffixes: T local tokens, S sampled tokens, E experts, H hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.moments import MOMENTS, drift_moments
from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.consensus import attempt
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.parallel.groups import every_layer, gathered, pipeline_group
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.prediction.gates import merge_gates, refused
from megatron_pr2.prediction.hold_back import HoldBack
from megatron_pr2.prediction.lookahead import LookaheadPredictor
from megatron_pr2.prediction.multiples import OWN, Multiples
from megatron_pr2.prediction.predictor import KEPT, RoutePredictor, shift_logits
from megatron_pr2.prediction.pushes import Push, Pushes, Version, make_push
from megatron_pr2.replay.sequences import ReplaySequence, versions_of
from megatron_pr2.replay.sites import RouterSite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RowsOfPush:
    """The sampled tokens of a micro-batch that were rolled out with one push.

    Attributes:
        rows: which of S, on the device; None for all.
        held_out: those that predictions are judged on; None without hold-back.
    """

    push: Push
    rows: Tensor | None
    held_out: Tensor | None


class Pushed:
    """The pushes to the engine, and those that the current rollout batch was rolled out with.

    Attributes:
        kept: the last ones, by version.
        in_use, of_token: those of the current batch, oldest first, but the main one last, and which of them by flat token index;
            -1: not known.
        unjudged: sampled tokens of this rank whose push is not known.
    """

    def __init__(
        self,
        config: PR2Config,
        sites: Sequence[RouterSite],
        predictor: RoutePredictor | None,
        hold_back: HoldBack | Multiples | None,
    ) -> None:
        self._config, self._sites, self._predictor, self._hold_back = config, list(sites), predictor, hold_back
        self.kept = Pushes()
        self._updates, self._updates_at_push = 0, dict[Version | None, int]()  # by version; None is the last push
        self.in_use: list[Push] = []
        self.forget()

    @property
    def predicts(self) -> bool:
        """Whether the current batch is from an engine with a prediction in its gates, in a layer of this rank."""
        return any(any(push.beta) for push in self.in_use)

    def forget(self) -> None:
        """The current rollout batch is over."""
        for push in self.in_use:
            push.forget_candidates()
        self.in_use = []
        self.of_token: npt.NDArray[np.int16] = np.zeros(0, dtype=np.int16)
        self.unjudged = 0

    def clear(self) -> None:
        """Forgets what engines got: after a checkpoint was loaded it is of another run."""
        self.kept.clear()
        self._updates_at_push.clear()

    def updated(self) -> None:
        """The policy was updated: what engines got before is older now."""
        self._updates += 1

    def sent(self, version: Version | None) -> None:
        """The engine gets the present weights."""
        recent = dict(list(self._updates_at_push.items())[-KEPT:])
        self._updates_at_push = recent | {version: self._updates, None: self._updates}

    def older(self, sequences: Sequence[ReplaySequence], version: Version | None) -> list[bool]:
        """Per sequence whether the policy was updated since the push that it was rolled out with, or that is not known."""
        present = {sent for sent, updates in self._updates_at_push.items() if updates == self._updates}
        return [sequence.older or not set(sequence.versions_or(version) or [version]) <= present for sequence in sequences]

    def report(self) -> dict[str, list[float]]:
        """`delivered` of the batch's main push, per layer; NaN where nothing was pushed, or it is not known."""
        return {"delivered": self.in_use[-1].delivered if self.in_use else [math.nan] * len(self._sites)}

    def push(
        self,
        version: Version | None = None,
        gate_dtype: torch.dtype | None = None,
        horizon: float | None = None,
        *,
        any_dtype: bool = False,
    ) -> Push:
        """What an engine gets now, kept for the batches that are rolled out with it; the same on all ranks of a stage.

        Args:
            any_dtype: takes the gates as an engine has them where nothing has changed since, whatever their dtype (Pushes.add).

        Raises:
            AttachError: a W_p in use is not finite.
        """
        push = self._present(version, gate_dtype, horizon=horizon)
        self.sent(version)
        return self.kept.add(push, any_dtype=any_dtype)

    def engine_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        layers: DecoderLayers,
        *,
        version: Version | None,
        gate_dtype: torch.dtype | None,
        horizon: float | None,
        own_stage: bool,
        has_gates: bool,
    ) -> Iterator[tuple[str, Tensor]]:
        """See `PR2.engine_weights`."""
        push, failure = attempt(lambda: self.push(version, gate_dtype, horizon))
        if not own_stage and (stages := pipeline_group()) is not None:
            failure = next((told for told in gathered(failure, stages) if told is not None), None)
        if push is None or failure is not None:
            if own_stage:
                return refused(weights, f"engine_weights: {failure}")  # the other stages are in the middle of a push
            raise AttachError(f"engine_weights: {failure}")
        own = {site.layer: push.prediction(site.local) for site in self._sites if has_gates}
        everything = own if own_stage else every_layer(own)
        routers = next((site.router.weight.dtype for site in self._sites), None)
        return merge_gates(weights, everything, layers, seed=self._config.seed, routers=routers, pushed=gate_dtype)

    def begin(
        self,
        sequences: Sequence[ReplaySequence],
        tokens: TokenIndex,
        sampled: npt.NDArray[np.bool_],
        horizon: float | None,
        version: Version | None,
    ) -> None:
        """Finds what a batch was rolled out with; hold-back's last observation ends.

        Args:
            horizon: updates that W_p is scaled to where the actor records routes; None leaves it as it is.
            version: of sequences that do not say it themselves; None is the last push, or where there was none what it would be.
        """
        if self._predictor is None:
            return
        names, of_token = versions_of(sequences, tokens, version, lambda name: getattr(self.kept.find(*name), "number", 0))
        found = [self.kept.find(*name) for name in names]
        if found == [None] and names[0][0] is None:
            found = [self._present(read=False, horizon=names[0][1])]
        if self._hold_back is not None:
            self._hold_back.close_batch()
        if isinstance(self._hold_back, Multiples):
            self._hold_back.horizons = self.kept.horizons or self._hold_back.horizons
        if self._config.routes == "actor":
            # Recorded from now on, under logits with the prediction in them, which nothing rounds.
            found, of_token = [self._present(merged=False, read=False, horizon=horizon)], np.zeros_like(of_token)
        self.use(found, of_token)
        self.unjudged = int((sampled & (self.of_token < 0)).sum())
        if self.unjudged:
            unknown = [version for version, horizon in names if self.kept.find(version, horizon) is None]
            logger.warning(
                "%d sampled tokens were rolled out with weights of the versions %s, which are none of the last pushes %s: their "
                "prediction is not judged; pass the same version to engine_weights() and begin_rollout()",
                self.unjudged, unknown, self.kept.versions,
            )  # fmt: skip

    def use(self, pushes: Sequence[Push | None], of_token: npt.NDArray[np.int16]) -> None:
        """Sets what the current batch was rolled out with, the main push last; None stands for one that is not known.

        Args:
            of_token: by flat token index, which of the pushes; -1 for none.
        """
        assert self._predictor is not None
        # The last push may be named by its version as well.
        self.in_use = list(dict.fromkeys(push for push in reversed(pushes) if push is not None))[::-1]
        places = [-1 if push is None else self.in_use.index(push) for push in pushes]
        self.of_token = np.array([*places, -1], dtype=np.int16)[of_token]
        main = self.in_use[-1] if self.in_use else None
        self._predictor.begin(None if main is None else main.momentum_LEH)
        if self._hold_back is not None and main is not None:
            self._hold_back.used = dict(main.held)
            if predicting := [push.beta for push in self.in_use if push.horizon]:  # one for each horizon; 0 predicts nothing
                self._hold_back.used["beta"] = [sum(betas) / len(betas) for betas in zip(*predicting, strict=True)]
        if isinstance(self._hold_back, HoldBack):
            for place in np.unique(self.of_token[self.of_token >= 0]):
                self.in_use[place].make_candidates()

    def rows(
        self, tokens_S: IntArray, held_out: npt.NDArray[np.bool_], to_device: Callable[[npt.NDArray[Any]], Tensor]
    ) -> list[RowsOfPush]:
        """Sampled tokens, by flat token index, by the push that they were rolled out with.

        Args:
            held_out: [S], those that predictions are judged on.
        """
        parts = []
        for place, push in enumerate(self.in_use):
            mine = self.of_token[tokens_S] == place
            if mine.any():
                rows = None if mine.all() else to_device(np.nonzero(mine)[0])
                counts = isinstance(self._hold_back, HoldBack)
                judged = to_device(np.nonzero(held_out & mine)[0]) if counts else None
                parts.append(RowsOfPush(push, rows, judged))
        return parts

    def start_over(self) -> float:
        """Sets W_p to 0 in the layers where it is not finite, alike on all ranks of a stage; returns its norm then."""
        assert self._predictor is not None
        bad = self._predictor.clear_not_finite()
        layers = [site.layer for site in self._sites if site.local in bad]
        logger.warning("W_p of the MoE layers %s is not finite after its update: it starts over from 0 there", layers)
        return self._predictor.weight_norm()

    def _present(
        self,
        version: Version | None = None,
        gate_dtype: torch.dtype | None = None,
        *,
        merged: bool = True,
        read: bool = True,
        horizon: float | None = None,
    ) -> Push:
        assert self._predictor is not None
        held = self._held(horizon, merged)
        return make_push(
            version,
            [site.layer for site in self._sites],
            [site.router.weight for site in self._sites] if merged else [],
            self._predictor.weight_for(horizon),
            held.get("beta", [1.0] * len(self._sites)),
            dtype=gate_dtype,
            seed=self._config.seed,
            held=held,
            # One for all tokens of an engine, as what is learned beside it.
            momentum_LEH=self._predictor.momentum_for(None if merged else horizon),
            horizon=horizon,
            read=read,
        )

    def _held(self, horizon: float | None, merged: bool) -> dict[str, list[float]]:
        """beta of a push that is made now, and what it follows from; empty without hold-back."""
        if not isinstance(self._hold_back, Multiples):
            return {} if self._hold_back is None else self._hold_back.report()
        assert isinstance(self._predictor, LookaheadPredictor)
        horizons = self._hold_back.horizons | self.kept.horizons
        of = OWN if horizon is not None and not merged else horizon
        return self._hold_back.report(self._hold_back.shares(of, self._predictor.shift(horizon), horizons))


def rows_of(values: Tensor, rows: Tensor | None) -> Tensor:
    """The chosen rows; None chooses all."""
    return values if rows is None else values.index_select(0, rows)


def moments(layer: int, parts: Sequence[RowsOfPush], h_old_SH: Tensor, true_SE: Tensor, gate_SE: Tensor) -> Tensor:
    """Sums of drift.moments.MOMENTS over the tokens whose push is known, each predicted by its own."""
    total = torch.zeros(len(MOMENTS), dtype=torch.float64, device=h_old_SH.device)
    for part in parts:
        h_SH, *drifts = (rows_of(values, part.rows) for values in (h_old_SH, true_SE, gate_SE))
        total = total + drift_moments(shift_logits(h_SH, part.push.w_LEH[layer]), *drifts)
    return total


def predicted(layer: int, parts: Sequence[RowsOfPush], h_old_SH: Tensor, p_old_SE: Tensor) -> Tensor:
    """p_old + delta h_old of a local layer, each token's delta that of its push; p_old where nothing arrived or it is not known."""
    q_hat_SE = p_old_SE
    for part in parts:
        if part.push.beta[layer]:
            if part.rows is None:
                return p_old_SE + shift_logits(h_old_SH, part.push.delta(layer))
            shift_SE = shift_logits(h_old_SH.index_select(0, part.rows), part.push.delta(layer))
            q_hat_SE = q_hat_SE.index_add(0, part.rows, shift_SE.to(q_hat_SE.dtype))
    return q_hat_SE
