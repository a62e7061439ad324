"""The rollout batch in the middle of which a checkpoint is written: sequences, routes and features, for any other layout.

Between two mini-steps the predictor cannot go on without the features of theta_old and the routes of the rollout, and neither can
be computed again. They are kept by token. Each rank writes the rows that it holds, in the order of the ranks, with an index of what
they are; a rank that reads takes those of its own sequences, layer by layer. Which rank of a pipeline stage holds which token makes
no difference, since features follow their token (drift.feature_plan); in the old layout it is the old one, so that sums are
formed in the old order.

    pr2.rollout.sequences                  [N, 7] int64: id, length, loss_start, loss_stop, mini-step (0: not known), the last run,
                                           the main push of its replica from 1 (0: none)
    pr2.rollout.tokens                     [T, 6] uint8: has a route, is sampled, is held out, was scored, was trained on, and its
                                           push from 1 (0: not known); one sequence's after the other's
    pr2.rollout.routes                     [T, L, K] uint8 or int16, if routes are replayed
    pr2.rollout.looked                     [1] uint8, if look_ahead() has run
    pr2.rollout.layers.<layer>.index       [S, 4] int64: of each row of the next two: sequence, position, who held it of how many
    pr2.rollout.layers.<layer>.h_old       [S, H] bf16, if a predictor needs it
    pr2.rollout.layers.<layer>.p_old       [S, E] fp32 (fp64 for routers in fp64)
    pr2.rollout.layers.<layer>.expert_bias [E] fp32, if the routers have one: that of the log-prob pass
    pr2.rollout.layers.<layer>.gate        [E, H], if a predictor needs h_old: W of the log-prob pass; gate_bias [E] if there is one
    pr2.rollout.layers.<layer>.push<n>.*   what tokens were rolled out with (checkpoint.pushes)

Shape suffixes: T tokens of the rollout batch, S sampled tokens, L MoE layers of the whole model, K top-k, E experts, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2.checkpoint import files
from megatron_pr2.checkpoint.contents import Contents
from megatron_pr2.checkpoint.pushes import in_order, push_numbers, push_parts, take_pushes
from megatron_pr2.drift.features import Segment
from megatron_pr2.errors import CheckpointError
from megatron_pr2.parallel.grid import IntArray
from megatron_pr2.parallel.groups import gathered
from megatron_pr2.replay.sequences import ReplaySequence, RolloutReport
from megatron_pr2.routes.ids import expert_dtype
from megatron_pr2.routes.table import RouteTable

# Rows: reading so many for nothing is cheaper than another read.
FAR = 256
PREFIX = "pr2.rollout."
SEQUENCES, TOKENS, ROUTES = f"{PREFIX}sequences", f"{PREFIX}tokens", f"{PREFIX}routes"
LOOKED = f"{PREFIX}looked"


class _Rollout(NamedTuple):
    """What a checkpoint holds of the sequences that this rank's replica trains on."""

    sequences: list[ReplaySequence]  # with their routes where this rank has to be given them
    valid: npt.NDArray[np.bool_]  # per flat token index, as the next four
    sampled: npt.NDArray[np.bool_]
    held_out: npt.NDArray[np.bool_]
    scored: npt.NDArray[np.bool_]
    trained: npt.NDArray[np.bool_]
    push: npt.NDArray[np.int16]  # its number from 0; -1: not known
    main_push: int  # that of the replica, the newest of several; -1: none
    mini_step: int  # the batch's last


def sharded_rollout(pr2: Contents) -> dict[str, Any]:
    """The pending rollout batch as shards; collective. Empty where none was begun.

    Call it between mini-steps, after `PR2.step`: what half a mini-step has gathered is not kept.
    """
    pr2.features.settle()
    state: dict[str, Any] = {}
    replicas = mpu.get_data_parallel_group() if mpu.model_parallel_is_initialized() else None
    first, all_sequences = _share(len(pr2.sequences), replicas)
    start, total = _share(pr2.tokens.total, replicas)
    in_use = pr2.measurement.pushes.in_use if pr2.sequences else []  # else they would be another replica's to write
    mine = [(push.name, push.number) for push in in_use]
    everyone = [mine] if replicas is None else gathered(mine, replicas)
    known = in_order(everyone)
    if pr2.replica.ranks.me == pr2.replica.ranks.owner:
        done = pr2.progress.mini_step
        main = known.index(in_use[-1].name) + 1 if in_use else 0
        rows = [[s.id, s.length, s.loss_start, s.loss_stop, s.mini_step or 0, done, main] for s in pr2.sequences]
        spans = torch.tensor(rows, dtype=torch.int64).view(-1, 7)
        each = pr2.routes.valid, pr2.feature_plan.sampled, pr2.measurement.held_out, pr2.progress.scored, pr2.progress.trained
        marks = np.stack((*each, push_numbers(pr2, known)), axis=1).astype(np.uint8)
        _put(state, SEQUENCES, spans, (first,), (all_sequences, 7))
        _put(state, TOKENS, torch.from_numpy(marks), (start,), (total, 6))
    if pr2.progress.looked and dist.get_rank() == 0:
        _put(state, LOOKED, torch.ones(1, dtype=torch.uint8), (0,), (1,))
    if pr2.config.replays:
        _put_routes(state, pr2, start, total)
    _put_features(state, pr2)
    # Each push from the first replica that has it.
    earlier = in_order(everyone[: 0 if replicas is None else replicas.rank()])
    if pr2.sequences and _first_of_stage():
        numbers = {name: number for number, name in enumerate(known) if name not in earlier}
        for layer, name, part in push_parts(pr2, in_use, numbers):
            _put(state, _key(layer, name), part, (0,), tuple(part.shape))
    _put_routers(state, pr2)
    return state


def load_rollout(pr2: Contents, directory: str | Path, sequences: Sequence[int]) -> RolloutReport:
    """Takes up a checkpoint's rollout batch as begin_rollout and the log-prob pass had left it; collective over all ranks.

    Args:
        sequences: ids that this rank's replica trains on now; the same, in the same order, on every rank of the replica.

    Raises:
        CheckpointError: on every rank: no rollout batch or not these sequences in it, or any rank cannot read its part.
    """
    directory, sequences = Path(directory), list(sequences)
    reader = files.RowReader(directory)
    found = files.together(lambda: _read_rollout(pr2, reader, directory, sequences))
    hold_back = pr2.measurement.hold_back
    counted = None if hold_back is None else hold_back.state().clone()
    report = pr2.begin_rollout(found.sequences)
    pr2.progress.scored, pr2.progress.trained, pr2.progress.mini_step = found.scored, found.trained, found.mini_step
    pr2.progress.looked = reader.shape(LOOKED) is not None
    pr2.horizon.ran(found.mini_step)
    if hold_back is not None:
        # The batch goes on: what its first mini-steps counted is not a whole observation.
        hold_back.load_state(counted)
    if pr2.config.routes == "actor":
        # The actor recorded them; begin_rollout takes an engine's only.
        pr2.routes.begin(pr2.tokens, {s.id: s.routes for s in found.sequences if s.routes is not None}, found.valid)
    held, members = files.together(lambda: _held(pr2, reader, found.sampled))
    pr2.measurement.held_out = found.held_out
    segment = pr2.feature_plan.restore(found.sampled, held, members)
    files.together(lambda: _read_features(pr2, reader, segment))
    files.together(lambda: _read_routers(pr2, reader))

    def part(layer: int, name: str) -> Tensor | None:
        key = _key(layer, name)
        return None if reader.shape(key) is None else reader.read(key)

    files.together(lambda: take_pushes(pr2, part, found.push, found.main_push))
    return report


def _put_routes(state: dict[str, Any], pr2: Contents, start: int, total: int) -> None:
    """Routes of an engine are with the owner, all layers; recorded ones with every stage, its layers."""
    ranks = pr2.replica.ranks
    tables = pr2.routes.tables()
    if pr2.config.routes == "engine":
        writes, columns = ranks.me == ranks.owner, tuple(range(len(pr2.moe_layers)))
    else:
        writes, columns = _first_of_stage(), ranks.members[ranks.me].columns
    if not writes:
        return
    config = pr2.model_config
    shape = (total, len(pr2.moe_layers), config.moe_router_topk)
    for sequence in pr2.sequences:
        table = tables.get(sequence.id) or RouteTable.missing(sequence.length, *shape[1:], config.num_moe_experts)
        experts_TLK = table.experts if table.experts.dtype == np.uint8 else table.experts.view(np.int16)
        with warnings.catch_warnings():
            # Decoded tables are read-only, and only read here.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            ids = torch.from_numpy(experts_TLK)
        at = start + pr2.tokens.span(sequence.id).start
        for run in _runs(columns):
            _put(state, ROUTES, ids[:, run], (at, run.start), shape)


def _put_features(state: dict[str, Any], pr2: Contents) -> None:
    segments = pr2.features.segments
    start, total = _share(sum(len(segment.tokens) for segment in segments), pr2.token_group)
    # Without sequence parallelism all tensor-parallel ranks hold the same rows.
    copies = mpu.model_parallel_is_initialized() and not pr2.model_config.sequence_parallel
    replica = mpu.get_tensor_model_parallel_rank() if copies else 0
    ids = np.array(list(pr2.tokens.lengths), dtype=np.int64)
    starts = np.array([pr2.tokens.span(sid).start for sid in pr2.tokens.lengths], dtype=np.int64)
    for segment in segments:
        place = pr2.tokens.sequence_of(segment.tokens)
        holder = np.broadcast_to([pr2.replica.tp_cp.me, pr2.replica.tp_cp.size], (len(place), 2))
        index_S4 = torch.from_numpy(np.column_stack([ids[place], segment.tokens - starts[place], holder]))
        for site in pr2.sites:
            kinds = {"index": index_S4, "h_old": segment.h_LSH[site.local], "p_old": segment.p_LSE[site.local]}
            for name, rows in kinds.items():
                _put(state, _key(site.hidden_layer, name), rows, (start,), (total, rows.shape[1]), replica)
        start += len(segment.tokens)


def _put_routers(state: dict[str, Any], pr2: Contents) -> None:
    # All data-parallel ranks have the same ones, also those without sequences.
    if not _first_of_stage() or (mpu.model_parallel_is_initialized() and mpu.get_data_parallel_rank() > 0):
        return
    for name, values in pr2.features.routers.items():
        for site in pr2.sites:
            value = values[site.local]
            _put(state, _key(site.hidden_layer, name), value, (0,) * value.dim(), tuple(value.shape))


def _read_routers(pr2: Contents, reader: files.RowReader) -> None:
    """What the checkpoint has not stays as begin_rollout() left it."""
    for name in ("expert_bias", "gate", "gate_bias"):
        keys = [_key(site.hidden_layer, name) for site in pr2.sites]
        if keys and all(reader.shape(key) is not None for key in keys):
            pr2.features.routers[name] = torch.stack([reader.read(key) for key in keys]).to(pr2.sites[0].router.weight.device)


def _read_rollout(pr2: Contents, reader: files.RowReader, directory: Path, wanted: Sequence[int]) -> _Rollout:
    if reader.shape(SEQUENCES) is None:
        raise CheckpointError(f"{directory} holds no rollout batch; save(..., rollout=True) keeps the current one")
    rows = reader.read(SEQUENCES).numpy()
    if rows.shape[1] != 7 or (reader.shape(TOKENS) or (0, 6))[1] != 6:
        raise CheckpointError(
            f"{directory}: its rollout batch was written by another version ({SEQUENCES} has {rows.shape[1]} columns, expected 7); "
            "load the checkpoint without it, and roll out again"
        )
    stops = np.cumsum(rows[:, 1])
    at = {int(row[0]): i for i, row in enumerate(rows)}
    if absent := [sid for sid in wanted if sid not in at]:
        raise CheckpointError(f"{directory}: its rollout batch has the sequences {sorted(at)}, not {absent}")
    tables = {}
    marks = [np.zeros((0, 6), dtype=np.uint8)]
    for sid in wanted:
        start, stop = int(stops[at[sid]] - rows[at[sid], 1]), int(stops[at[sid]])
        marks.append(reader.read(TOKENS, start, stop).numpy())
        if pr2.config.replays and pr2.routes.is_owner:
            tables[sid] = _read_table(pr2, reader, directory, start, stop, marks[-1][:, 0].astype(bool))
    marked = np.concatenate(marks)
    valid, sampled, held_out, scored, trained = marked[:, :5].astype(bool).T
    push = marked[:, 5].astype(np.int16) - 1
    spans = {sid: [int(n) for n in rows[at[sid]]] for sid in wanted}
    sequences = [
        ReplaySequence(sid, length, first, stop, tables.get(sid), mini_step=mini_step or None)
        for sid, length, first, stop, mini_step, *_ in spans.values()
    ]
    last, of_all = int(rows[:, 5].max(initial=0)), rows[:, 6].tolist()
    main = max([row[6] for row in spans.values()] or of_all, default=0) - 1
    return _Rollout(sequences, valid, sampled, held_out, scored, trained, push, main, last)


def _read_table(
    pr2: Contents, reader: files.RowReader, directory: Path, start: int, stop: int, valid: npt.NDArray[np.bool_]
) -> RouteTable:
    if reader.shape(ROUTES) is None:
        raise CheckpointError(f"{directory}: its rollout batch has no routes, but routes={pr2.config.routes!r} is configured")
    experts = pr2.model_config.num_moe_experts
    return RouteTable(reader.read(ROUTES, start, stop).numpy().view(expert_dtype(experts)), valid, experts)


def _held(pr2: Contents, reader: files.RowReader, sampled: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray | None]:
    """Tokens with features for every layer of this rank, ascending; and who held them, if tp_cp had as many ranks as now."""
    (held,) = np.nonzero(sampled)
    if pr2.features.hidden and any(reader.shape(_key(site.hidden_layer, "h_old")) is None for site in pr2.sites):
        held = held[:0]  # written by a run whose predictor, if any, needed no router inputs
    members = np.zeros(len(sampled), dtype=np.int64)
    sizes = {pr2.replica.tp_cp.size}
    for site in pr2.sites:
        tokens_S, holder_S2 = _rows(pr2, reader, site.hidden_layer)
        held = np.intersect1d(held, tokens_S)
        members[tokens_S[tokens_S >= 0]] = holder_S2[tokens_S >= 0, 0]
        sizes.update(holder_S2[:, 1].tolist())
    return held, members[held] if len(sizes) == 1 else None


def _read_features(pr2: Contents, reader: files.RowReader, segment: Segment) -> None:
    """Fills a segment; one layer at a time, so that what is in memory beside it stays small."""
    for site in pr2.sites:
        tokens_S, _ = _rows(pr2, reader, site.hidden_layer)
        (rows,) = np.nonzero(np.isin(tokens_S, segment.tokens))
        if not len(rows):
            continue
        # Under another layout a rank's rows are spread over the file; what lies far between them is not read.
        for run in np.split(rows, np.nonzero(np.diff(rows) > FAR)[0] + 1):
            slots = torch.from_numpy(np.searchsorted(segment.tokens, tokens_S[run]))
            wanted = torch.from_numpy(run - run[0])
            for name, target in (("h_old", segment.h_LSH[site.local]), ("p_old", segment.p_LSE[site.local])):
                if not target.shape[1]:
                    continue
                part = reader.read(_key(site.hidden_layer, name), int(run[0]), int(run[-1]) + 1)[wanted]
                target.index_copy_(0, slots.to(target.device), part.to(target.device, target.dtype))


def _rows(pr2: Contents, reader: files.RowReader, layer: int) -> tuple[IntArray, IntArray]:
    """Flat token index of every row of a layer's features, -1 for those of other replicas; and its holder, of how many."""
    if reader.shape(_key(layer, "index")) is None:
        return np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    index_S4 = reader.read(_key(layer, "index")).numpy()
    return pr2.tokens.of(index_S4[:, 0], index_S4[:, 1]), index_S4[:, 2:]


def _key(layer: int, name: str) -> str:
    return f"{PREFIX}layers.{layer}.{name}"


def _put(state: dict[str, Any], key: str, part: Tensor, offset: tuple[int, ...], shape: tuple[int, ...], replica: int = 0) -> None:
    if part.numel():
        state[f"{key}@{'.'.join(map(str, offset))}"] = files.uneven_shard(key, part, offset, shape, replica)


def _share(count: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Where this rank's rows start among those of a group's ranks, and how many there are in all."""
    if group is None or group.size() == 1:
        return 0, count
    counts = gathered(count, group)
    return sum(counts[: group.rank()]), sum(counts)


def _first_of_stage() -> bool:
    if not mpu.model_parallel_is_initialized():
        return True
    return mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0


def _runs(columns: Sequence[int]) -> list[slice]:
    """Neighbouring columns as slices: a pipeline stage has one run of layers per chunk."""
    runs: list[slice] = []
    for column in columns:
        if runs and runs[-1].stop == column:
            runs[-1] = slice(runs[-1].start, column + 1)
        else:
            runs.append(slice(column, column + 1))
    return runs
