"""What a trainer passes to PR2 of a rollout batch, and the checks of the routes that came with it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_pr2.config import check_horizon
from megatron_pr2.errors import ConfigError, RouteError
from megatron_pr2.parallel.tokens import TokenIndex, sample_positions, thinned_positions
from megatron_pr2.routes.ids import integers, on_host
from megatron_pr2.routes.table import RouteTable

# A push by the version of its weights, None for the last one, and the horizon that it was predicted for, None for the average.
PushName = tuple[int | str | None, float | None]


@dataclass(frozen=True)
class ReplaySequence:
    """One rolled-out sequence, the same on every rank that trains on it.

    Attributes:
        id: unique within the rollout batch.
        length: tokens, prompt and response.
        loss_start, loss_stop: input positions whose output bears loss: prompt_len - 1 to length - 1 for one prompt and response.
        routes: what the engine returned; needed on the first rank of a replica (tensor, context and pipeline rank 0), on every rank
            with `route_delivery="local"`, and nowhere when routes are live or recorded by the actor.
        loss_mask: [loss_stop - loss_start] bool or 0/1, which of these positions bear loss; None for all. False where the output
            is a token that the policy did not sample, e.g. an environment's.
        mini_step: the mini-step, from 1, that will train on it, where that is known. Routes that the actor records are then
            predicted for that many updates instead of the average; an engine has one gate for all sequences.
        token_ids: [length], prompt and response, to be compared with what the model runs (replay.token_check); None: the ids
            of the first pass are what later ones are compared with.
        horizon: updates that the gates were predicted for which it was sampled with, as `engine_weights(horizon=)` was told;
            None: the average.
        versions: [loss_stop - loss_start] version of the weights that sampled the output of each of these positions, as
            `engine_weights` was told, integers or text (RolloutResponse.weight_versions; -1 where nothing was sampled). None: the
            one that `begin_rollout` was told.
        older: whether some of it was sampled under older weights than those of the last push, so that its routes may agree less.
    """

    id: int
    length: int
    loss_start: int
    loss_stop: int
    routes: RouteTable | None = None
    loss_mask: npt.NDArray[Any] | torch.Tensor | Sequence[int] | None = None
    mini_step: int | None = None
    token_ids: npt.NDArray[np.integer[Any]] | Sequence[int] | None = None
    horizon: float | None = None
    versions: npt.NDArray[Any] | Sequence[int] | Sequence[str] | None = None
    older: bool = False

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor,
        response_ids: Sequence[int] | npt.NDArray[np.integer[Any]] | torch.Tensor,
        routes: RouteTable | None = None,
        loss_mask: npt.NDArray[Any] | torch.Tensor | Sequence[int] | None = None,
        *,
        id: int,
        mini_step: int | None = None,
        versions: npt.NDArray[Any] | Sequence[int] | Sequence[str] | None = None,
    ) -> ReplaySequence:
        """One prompt and one response; their tokens are compared with what the model runs.

        Args:
            prompt_ids, response_ids: at least one token of a prompt.
            loss_mask, versions: [tokens of the response].
            id, mini_step: see ReplaySequence.

        Raises:
            RouteError: they are no integers, or the prompt is empty.
        """
        prompt, response = (integers(ids, f"sequence {id}: token ids") for ids in (prompt_ids, response_ids))
        if prompt.ndim != 1 or response.ndim != 1:
            raise RouteError(f"sequence {id}: token ids of {list(prompt.shape)} and {list(response.shape)}; expected one axis each")
        if not len(prompt):
            raise RouteError(f"sequence {id}: the prompt is empty; the first token of a response needs one before it")
        length = len(prompt) + len(response)
        token_ids = np.concatenate([prompt, response])
        return cls(id, length, len(prompt) - 1, length - 1, routes, loss_mask, mini_step, token_ids, versions=versions)

    def versions_or(self, default: int | str | None) -> list[Any]:
        """Versions of the weights that sampled it; the default where it does not say."""
        return [default] if self.versions is None else [version for version in _told(self.versions)[0] if version != -1]


def _told(versions: Any) -> tuple[list[Any], npt.NDArray[np.intp]]:
    """The different versions, and which of them each position has; numpy makes text of the -1 among text."""
    values, where = np.unique(versions, return_inverse=True)
    return [-1 if value == "-1" else value for value in values.tolist()], where


@dataclass(frozen=True)
class RolloutReport:
    """What begin_rollout found in the sequences of this rank's replica.

    Attributes:
        tokens: tokens that could have a route (all but the last of each sequence).
        missing: of these, tokens without a valid one.
        route_bytes: of the tables held by this rank.
    """

    tokens: int
    missing: int
    route_bytes: int


def listed(sequences: Iterable[ReplaySequence]) -> list[ReplaySequence]:
    """The sequences of a rollout batch, which are walked more than once, with plain integers and arrays; generators are welcome.

    Raises:
        RouteError: something else, or values of a wrong type.
    """
    what = "begin_rollout() takes all ReplaySequences of the rollout batch, as a list"
    if isinstance(sequences, ReplaySequence | str | bytes | Mapping) or not isinstance(sequences, Iterable):
        raise RouteError(f"{what}; it got one {type(sequences).__name__}")
    out = []
    for number, sequence in enumerate(sequences):
        if not isinstance(sequence, ReplaySequence):
            raise RouteError(f"{what}; number {number} is a {type(sequence).__name__}")
        plain: dict[str, Any] = {name: _integer(sequence, name) for name in ("id", "length", "loss_start", "loss_stop")}
        where = f"sequence {plain['id']}"
        if sequence.mini_step is not None:
            plain["mini_step"] = _integer(sequence, "mini_step")
        if sequence.token_ids is not None:
            plain["token_ids"] = on_host(sequence.token_ids, f"{where}: token_ids")
        if sequence.versions is not None:
            plain["versions"] = _versions(sequence.versions, f"{where}: versions")
        check_horizon(sequence.horizon, where)
        if not isinstance(sequence.older, bool | np.bool_):
            raise RouteError(f"{where}: older={sequence.older!r}; expected True or False")
        out.append(replace(sequence, **plain))
    return out


def _integer(sequence: ReplaySequence, name: str) -> int:
    value = getattr(sequence, name)
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # integers of numpy and torch, too
    except TypeError:
        pass
    if name == "id":
        raise RouteError(f"a sequence has id={value!r}; expected an integer that MicroBatch names it by")
    raise RouteError(f"sequence {sequence.id}: {name}={value!r}; expected an integer")


def _versions(versions: Any, where: str) -> npt.NDArray[Any]:
    """Weight versions as an array; of integers among strings but -1 numpy would make strings, which name no push."""
    try:
        strings = all(isinstance(version, str) or version == -1 for version in versions)
    except TypeError:
        strings = False
    array = on_host(versions, where) if strings else integers(versions, where)
    return array.astype(str) if array.dtype == object else array


def check_push(where: str, version: Any, horizon: Any = None, gate_dtype: Any = None) -> None:
    """Refuses what no push can be made of, or found by.

    Raises:
        ConfigError: naming the argument.
    """
    if version is not None and (isinstance(version, bool) or not isinstance(version, Integral | str)):
        raise ConfigError(f"{where}: version={version!r}; expected an integer or a string, the same for a push and its rollouts")
    check_horizon(horizon, where)
    if gate_dtype is not None and not (isinstance(gate_dtype, torch.dtype) and gate_dtype.is_floating_point):
        raise ConfigError(f"{where}: gate_dtype={gate_dtype!r}; expected torch.float32 or another floating-point dtype of torch")


def check_sequences(sequences: Sequence[ReplaySequence]) -> None:
    """Refuses sequences that cannot be told apart or whose loss-bearing span is outside of them.

    Raises:
        RouteError: naming the sequence.
    """
    seen: set[int] = set()
    for sequence in sequences:
        if sequence.routes is not None and not isinstance(sequence.routes, RouteTable):
            raise RouteError(
                f"sequence {sequence.id}: routes is a {type(sequence.routes).__name__}; make a table of it: "
                "RouteTable.from_engine(rows, num_tokens=..., ...) from what the engine returned"
            )
        if sequence.id in seen or not 0 <= sequence.id < 1 << 63:
            raise RouteError(
                f"sequence id {sequence.id} is negative, has more than 63 bits or is given twice; ids must be unique within a batch"
            )
        seen.add(sequence.id)
        if not 0 <= sequence.loss_start <= sequence.loss_stop <= sequence.length:
            raise RouteError(
                f"sequence {sequence.id}: loss-bearing positions [{sequence.loss_start}, {sequence.loss_stop}) are outside its "
                f"{sequence.length} tokens"
            )
        if sequence.mini_step is not None and sequence.mini_step < 1:
            raise RouteError(f"sequence {sequence.id}: mini_step={sequence.mini_step}; mini-steps count from 1")
        if sequence.token_ids is not None:
            _check_token_ids(sequence)
        if sequence.loss_mask is not None:
            _mask(sequence)
        if sequence.versions is not None and np.shape(sequence.versions) != (sequence.loss_stop - sequence.loss_start,):
            raise RouteError(
                f"sequence {sequence.id}: versions has shape {list(np.shape(sequence.versions))}, expected one entry for each of "
                f"the {sequence.loss_stop - sequence.loss_start} positions from loss_start to loss_stop"
            )


def _mask(sequence: ReplaySequence) -> npt.NDArray[np.bool_]:
    """The loss mask as booleans; trainers have lists, arrays and tensors of 0 and 1 as well, which would index otherwise."""
    mask = on_host(sequence.loss_mask, f"sequence {sequence.id}: loss_mask")
    if mask.shape != (sequence.loss_stop - sequence.loss_start,):
        raise RouteError(
            f"sequence {sequence.id}: loss_mask has shape {list(mask.shape)}, expected one entry for each of the "
            f"{sequence.loss_stop - sequence.loss_start} positions from loss_start to loss_stop"
        )
    if mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise RouteError(f"sequence {sequence.id}: loss_mask of {mask.dtype} has other entries than 0 and 1, or False and True")
    return mask.astype(bool)


def _check_token_ids(sequence: ReplaySequence) -> None:
    ids = np.asarray(sequence.token_ids)
    if ids.shape != (sequence.length,) or ids.dtype.kind not in "iu":
        raise RouteError(
            f"sequence {sequence.id}: token_ids are {ids.dtype} {list(ids.shape)}, expected {sequence.length} integers: those of "
            "prompt and response"
        )
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise RouteError(f"sequence {sequence.id}: token_ids from {ids.min()} to {ids.max()}; expected ids in [0, 2^31)")


def checked_table(sequence: ReplaySequence, num_layers: int, topk: int, num_experts: int) -> RouteTable:
    """The sequence's table, if it fits the model.

    Raises:
        RouteError: it is absent or of another shape.
    """
    table = sequence.routes
    if table is None:
        raise RouteError(
            f"sequence {sequence.id}: routes='engine' but there are none on the rank that owns them; start the engine with route "
            "return on, and give the tables to the first rank of each replica (to every rank with route_delivery='local'). To go "
            f"on without them: routes=RouteTable.missing({sequence.length}, {num_layers}, {topk}, {num_experts}), whose tokens use "
            "the model's own router and count for max_missing_share"
        )
    expected = (sequence.length, num_layers, topk, num_experts)
    found = (table.num_tokens, table.num_layers, table.topk, table.num_experts)
    if found != expected:
        raise RouteError(
            f"sequence {sequence.id}: its route table is (tokens, moe layers, top-k, experts) = {found}, expected {expected}"
        )
    return table


def sampled_tokens(
    sequences: Sequence[ReplaySequence], tokens: TokenIndex, valid: npt.NDArray[np.bool_] | None, seed: int, fraction: float
) -> npt.NDArray[np.bool_]:
    """Which tokens are sampled, by flat token index: loss-bearing ones, with a route where routes came with the rollout.

    Args:
        valid: which tokens have a route; None where every one will have.
    """
    sampled = np.zeros(tokens.total, dtype=bool)
    for sequence in sequences:
        positions = np.arange(sequence.loss_start, sequence.loss_stop, dtype=np.int64)
        if sequence.loss_mask is not None:
            positions = positions[_mask(sequence)]
        start = tokens.span(sequence.id).start
        if valid is not None:
            positions = positions[valid[start + positions]]
        sampled[start + sample_positions(seed, sequence.id, positions, fraction)] = True
    return sampled


def held_out_tokens(
    sequences: Sequence[ReplaySequence], tokens: TokenIndex, sampled: npt.NDArray[np.bool_], seed: int, share: float
) -> npt.NDArray[np.bool_]:
    """Which of the sampled tokens predictions are judged on instead of learned from, by flat token index."""
    held = np.zeros(tokens.total, dtype=bool)
    for sequence in sequences:
        start = tokens.span(sequence.id).start
        (positions,) = np.nonzero(sampled[tokens.span(sequence.id)])
        held[start + thinned_positions(seed, sequence.id, positions, share)] = True
    return held


def horizons(
    sequences: Sequence[ReplaySequence], tokens: TokenIndex, average: float, size: Callable[[float], float]
) -> npt.NDArray[np.float32]:
    """How far each token's routers will have moved when it is trained on, relative to the average, by flat token index.

    Args:
        sequences: all of them say their mini-step; the i-th is i - 1 updates away.
        average: updates that W_p is made for, (kappa - 1) / 2 of kappa mini-steps.
        size: how far so many updates go, in units of one.
    """
    out = np.ones(tokens.total, dtype=np.float32)
    for sequence in sequences:
        out[tokens.span(sequence.id)] = size((sequence.mini_step or 1) - 1) / size(average)
    return out


def versions_of(
    sequences: Sequence[ReplaySequence], tokens: TokenIndex, default: int | str | None, order: Callable[[PushName], int]
) -> tuple[list[PushName], npt.NDArray[np.int16]]:
    """What sequences were rolled out with, and which of it each token was, by flat token index; the last where none is said.

    Args:
        order: grows with the pushes; names come in it, those of the default version last.
    """
    used = {(version, sequence.horizon): None for sequence in sequences for version in sequence.versions_or(default)}
    if default is not None and not any(version == default for version, _ in used):
        used[default, None] = None
    names = sorted(used, key=lambda name: (name[0] == default, order(name))) or [(default, None)]
    places, last = {name: place for place, name in enumerate(names)}, len(names) - 1
    of_token = np.full(tokens.total, last, dtype=np.int16)
    for sequence in sequences:
        span = tokens.span(sequence.id)
        if sequence.versions is None:
            of_token[span] = places[default, sequence.horizon]
            continue
        versions, where = _told(sequence.versions)
        mine = np.array([places.get((version, sequence.horizon), last) for version in versions], dtype=np.int16)
        of_token[span.start + sequence.loss_start : span.start + sequence.loss_stop] = mine[where]
    return names, of_token
