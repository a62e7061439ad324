"""What a trainer describes: sequences and micro-batches, of whatever type they come in."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_pr2.attach import MicroBatch, ReplaySequence, RouteTable, attach
from megatron_pr2.errors import AttachError, ConfigError, ReplayError, RouteError
from tests.helpers import toy
from tests.helpers.ids import random_ids

LENGTHS = {0: 40, 1: 60}

pytestmark = pytest.mark.usefixtures("host_platform")


def begin(sequences: Any, preset: str = "r3") -> Any:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset(preset))
    pr2.begin_rollout(sequences)
    return pr2


def good() -> list[ReplaySequence]:
    return toy.sequences(LENGTHS, toy.random_tables(LENGTHS, toy.toy_config()))


# ---- sequences -------------------------------------------------------------------------------------------------------


def test_a_generator_of_sequences_is_the_list_that_it_makes() -> None:
    """It is walked more than once: a second walk would find nothing, and sample and learn nothing."""
    of_list, of_generator = begin(good()), begin(sequence for sequence in good())
    assert of_generator.sequences == of_list.sequences
    assert np.array_equal(of_generator.feature_plan.sampled, of_list.feature_plan.sampled)
    assert of_generator.feature_plan.sampled.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: good()[0], "it got one ReplaySequence"),
        (lambda: dict(enumerate(good())), "it got one dict"),
        (lambda: "01", "it got one str"),
        (lambda: None, "it got one NoneType"),
        (lambda: [*good(), 3], "number 2 is a int"),
        (lambda: [good()], "number 0 is a list"),
    ],
)
def test_what_is_no_list_of_sequences_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(RouteError, match=rf"begin_rollout\(\) takes all ReplaySequences of .* as a list; {message}"):
        begin(wrong())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "1"}, "id='1'; expected an integer that MicroBatch names it by"),
        ({"id": 1.0}, "id=1.0; expected"),
        ({"id": True}, "id=True; expected"),
        ({"length": "60"}, "length='60'; expected an integer"),
        ({"loss_start": None}, "loss_start=None; expected an integer"),
        ({"routes": random_ids(60, 2, 2, 8)}, "sequence 1: routes is a ndarray; make a table of it: RouteTable.from_engine"),
        ({"routes": torch.zeros(60, 2, 2)}, "sequence 1: routes is a Tensor"),
        ({"routes": random_ids(60, 2, 2, 8).tolist()}, "sequence 1: routes is a list"),
        ({"id": 1 << 64}, "sequence id 18446744073709551616 is negative, has more than 63 bits"),
        ({"mini_step": "2"}, "sequence 1: mini_step='2'; expected an integer"),
        ({"mini_step": 1.5}, "sequence 1: mini_step=1.5; expected an integer"),
        ({"horizon": "1"}, "sequence 1: horizon='1'; expected updates"),
        ({"horizon": [0.5]}, r"sequence 1: horizon=\[0.5\]; expected updates"),
        ({"horizon": -0.5}, "sequence 1: horizon=-0.5; expected updates"),
        ({"horizon": math.nan}, "sequence 1: horizon=nan; expected updates"),
        ({"versions": [1, "a"] * 28 + [1]}, "sequence 1: versions: got <U"),
        ({"versions": [None] * 57}, r"sequence 1: versions: got object\[57\]; expected integers"),
        ({"versions": np.full(57, 1.5)}, r"sequence 1: versions: got float64\[57\]; expected integers"),
        ({"versions": 3}, r"sequence 1: versions has shape \[\], expected one entry for each of the 57"),
        ({"versions": {"a": 1}}, r"sequence 1: versions has shape \[\]"),
        ({"versions": [[1], [1, 2]]}, "sequence 1: versions: expected values of one shape"),
        ({"token_ids": [[1], [1, 2]]}, "sequence 1: token_ids: expected values of one shape"),
        ({"token_ids": "x" * 60}, r"sequence 1: token_ids are <U60 \[\], expected 60 integers"),
        ({"loss_mask": [[1], [1, 0]]}, "sequence 1: loss_mask: expected values of one shape"),
        ({"older": "no"}, "sequence 1: older='no'; expected True or False"),
        ({"older": np.array([True, False])}, "sequence 1: older=array"),
    ],
)
def test_wrong_types_in_a_sequence_are_refused(changes: dict[str, Any], message: str) -> None:
    """Before anything has changed: the batch before is whole, and its open mini-step is not ended."""
    first, second = good()
    wrong = [first, ReplaySequence(**{**vars(second), **changes})]
    for preset in ("pr2", "r2", "grpo"):
        pr2 = begin(good()[:1] if preset == "pr2" else good(), preset)
        pr2.progress.open, before = True, pr2.sequences
        with pytest.raises(RouteError, match=message):
            pr2.begin_rollout(wrong)
        assert pr2.sequences is before
        assert pr2.progress.open


@pytest.mark.parametrize("version", [1.0, True, [1], {}, np.zeros(2), torch.tensor(1)], ids=repr)
def test_what_names_no_push_is_refused(version: Any) -> None:
    """A version that cannot be hashed, or is equal to no other, would be found out after the batch was taken up, or never."""
    pr2 = begin(good(), "pr2")
    before, weights = pr2.sequences, [("lm_head.weight", torch.zeros(1))]
    with pytest.raises(RouteError, match=r"begin_rollout: version=.*; expected an integer or a string"):
        pr2.begin_rollout(good(), version=version)
    assert pr2.sequences is before
    for call in (lambda: pr2.engine_weights(weights, version=version), lambda: pr2.merged_gates(version)):
        with pytest.raises(ConfigError, match=r"version=.*; expected an integer or a string"):
            call()
    assert pr2.measurement.pushes.kept.versions == []
    with pr2.merged_gates(np.int64(7)):
        pr2.begin_rollout(good(), version=7)
    assert pr2.measurement.pushes.kept.versions == [7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": "2"}, "horizon='2'; expected updates"),
        ({"horizon": -1}, "horizon=-1; expected updates"),
        ({"gate_dtype": "float32"}, "gate_dtype='float32'; expected torch.float32"),
        ({"gate_dtype": torch.int8}, "gate_dtype=torch.int8; expected"),
        ({"weights": {"lm_head.weight": torch.zeros(1)}}, "weights is a dict; pass pairs of name and tensor, its items"),
    ],
)
def test_a_push_of_something_else_is_refused(arguments: dict[str, Any], message: str) -> None:
    for preset in ("pr2", "r3"):
        pr2 = begin(good(), preset)
        with pytest.raises(ConfigError, match=f"engine_weights: {message}"):
            pr2.engine_weights(**{"weights": [], **arguments})
        assert not pr2.measurement.pushes.kept.versions


def test_integers_of_other_libraries_are_integers() -> None:
    """A tensor as a dictionary's key is found by identity only."""
    first, second = good()
    pr2 = begin([first, ReplaySequence(torch.tensor(1), np.int32(60), torch.tensor(2), np.uint8(59), second.routes)])
    assert pr2.sequences[1] == begin(good()).sequences[1]


def test_missing_routes_say_how_to_go_on_without_them() -> None:
    first, _ = good()
    with pytest.raises(RouteError, match=r"To go on without them: routes=RouteTable\.missing\(60, 2, 2, 8\), whose tokens use"):
        begin([first, ReplaySequence(1, 60, 2, 59)])
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("r3", max_missing_share=0.7))
    assert pr2.begin_rollout([first, ReplaySequence(1, 60, 2, 59, RouteTable.missing(60, 2, 2, 8))]).missing == 59
    with pytest.raises(RouteError, match=r"To go on, .* raise max_missing_share, or set strict=False"):
        begin([first, ReplaySequence(1, 60, 2, 59, RouteTable.missing(60, 2, 2, 8))])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["lists", "arrays", "tensors"])
def test_a_sequence_of_a_prompt_and_a_response(kind: Any) -> None:
    table = RouteTable.missing(5, 2, 2, 8)
    made = ReplaySequence.of(kind([7, 8, 9]), kind([4, 5]), table, [1, 0], id=6, mini_step=2)
    assert (made.id, made.length, made.loss_start, made.loss_stop, made.mini_step) == (6, 5, 2, 4, 2)
    assert made.routes is table
    assert made.loss_mask == [1, 0]
    assert np.array_equal(made.token_ids, [7, 8, 9, 4, 5])
    assert ReplaySequence.of([3], [], id=0).length == 1


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        ([], [1], "the prompt is empty"), ("12", [1], "got str"), (5, [1], r"of \[\] and \[1\]"), (None, [1], "got NoneType"),
        ([1.5], [1], "got float64"), ([[1]], [1], r"of \[1, 1\] and \[1\]"),
    ],
)  # fmt: skip
def test_a_sequence_of_something_else_is_refused(prompt: Any, response: Any, message: str) -> None:
    with pytest.raises(RouteError, match=f"sequence 4: .*{message}"):
        ReplaySequence.of(prompt, response, id=4)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [["0", "1"], "01", [0.0, 1.0], 3, [None, 1], [0, 1 << 64]], ids=repr)
def test_ids_that_are_no_integers_are_refused(ids: Any) -> None:
    for describe in (
        lambda: MicroBatch.padded(ids, [40, 60], 60),
        lambda: MicroBatch.packed(ids, [40, 60]),
        lambda: MicroBatch.from_attention_mask(ids, np.ones((2, 60))),
    ):
        with pytest.raises(ReplayError, match=r"MicroBatch: ids=.*expected integers, the ids that its sequences have"):
            describe()


@pytest.mark.parametrize("lengths", [[40], [40, -1], [40, 60, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    for describe in (
        lambda: MicroBatch.padded([0, 1], lengths, 60),
        lambda: MicroBatch.packed([0, 1], lengths),
        lambda: MicroBatch.packed([0, 1], [1, 1], lengths),
    ):
        with pytest.raises(ReplayError, match=r"MicroBatch: 2 ids, lengths=.*expected one length of at least 0"):
            describe()


@pytest.mark.parametrize("wrong", [[3], ["0"], [None], 7, None], ids=repr)
def test_a_pass_of_something_else_is_refused(wrong: Any) -> None:
    pr2 = begin(good())
    for opened in (pr2.old_logprobs, pr2.actor_update, pr2.replay, pr2.record):
        with pytest.raises(ReplayError, match="a pass got "), opened(wrong):
            pass


def test_micro_batches_are_equal_by_what_they_hold() -> None:
    padded = MicroBatch.padded([0, 1], [40, 60], 62)
    assert padded == MicroBatch.padded(torch.tensor([0, 1]), np.array([40, 60]), 62, key="another")
    assert hash(padded) == hash(MicroBatch.padded([0, 1], [40, 60], 62, key="another"))
    others = [
        MicroBatch.padded([1, 0], [60, 40], 62), MicroBatch.padded([0, 1], [40, 60], 64), MicroBatch.padded([0, 1], [40, 59], 62),
        MicroBatch.packed([0, 1], [40, 60]), MicroBatch.packed([0, 1], [40, 60], [62, 62]),
    ]  # fmt: skip
    assert len({padded, *others}) == 1 + len(others)
    assert padded != "padded"
    empty = [MicroBatch.padded([], [], 8, key=key) for key in "ab"]
    assert empty[0] != empty[1]
    assert empty[0] == MicroBatch.padded([], [], 8, key="a")


def test_a_micro_batch_is_found_again_by_its_rows() -> None:
    """Bound by identity, one that was described anew for the pass runs with its own routes, whatever its key; others never."""
    pr2, data = begin(good()), toy.batches(LENGTHS, 1)
    (chunk,) = pr2._passes._chunks
    toy.old_logprobs(pr2, chunk, data)
    again = [toy.Batch(MicroBatch(("again", i), batch.micro_batch.grid), batch.inputs_SBH) for i, batch in enumerate(data)]
    with pr2.actor_update([batch.micro_batch for batch in data]) as session, toy.observed(chunk) as calls:
        toy.run(session, chunk, again[::-1])
    tables = toy.random_tables(LENGTHS, chunk.config)
    for call in calls:
        sid = 1 - call.number
        routes = torch.from_numpy(tables[sid].experts[:-1, call.layer]).long()
        assert call.map_TE[: len(routes)].gather(1, routes).all()
    other = MicroBatch(data[0].micro_batch.key, MicroBatch.padded([0], [39], 42).grid)
    with pytest.raises(ReplayError, match="is not part of this pass, or has other rows there"):  # noqa: SIM117
        with pr2.actor_update([batch.micro_batch for batch in data]) as session:
            session.begin(chunk, other)


# ---- what the model is given -----------------------------------------------------------------------------------------


def mask_of(lengths: list[int], columns: int, side: str) -> np.ndarray:
    mask = np.zeros((len(lengths), columns), dtype=np.int64)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(None, length) if side == "right" else slice(columns - length, None)] = 1
    return mask


@pytest.mark.parametrize("kind", [np.array, torch.tensor, lambda m: torch.tensor(m, dtype=torch.bool), lambda m: m.tolist()])
def test_a_right_padded_mask_is_a_padded_batch(kind: Any) -> None:
    assert MicroBatch.from_attention_mask([4, 2], kind(mask_of([3, 5], 6, "right"))) == MicroBatch.padded([4, 2], [3, 5], 6)


def test_a_left_padded_mask_has_its_tokens_on_the_right() -> None:
    grid = MicroBatch.from_attention_mask([4, 2], mask_of([3, 5], 6, "left")).grid
    assert grid.sequence.T.tolist() == [[-1, -1, -1, 4, 4, 4], [-1, 2, 2, 2, 2, 2]]
    assert grid.position.T.tolist() == [[-1, -1, -1, 0, 1, 2], [-1, 0, 1, 2, 3, 4]]


def test_a_left_padded_batch_replays_each_tokens_route() -> None:
    pr2 = begin(good())
    (chunk,) = pr2._passes._chunks
    micro_batch = MicroBatch.from_attention_mask([0, 1], mask_of([40, 60], 64, "left"))
    batch = toy.Batch(micro_batch, toy.token_inputs(micro_batch.grid))
    toy.old_logprobs(pr2, chunk, [batch])
    with pr2.actor_update([micro_batch]) as session, toy.observed(chunk) as calls:
        toy.run(session, chunk, [batch])
    tables = toy.random_tables(LENGTHS, chunk.config)
    for call in (call for call in calls if not call.recomputed):
        chosen = call.map_TE.view(64, 2, -1)
        for column, (sid, length) in enumerate(LENGTHS.items()):
            routes = torch.from_numpy(tables[sid].experts[:-1, call.layer]).long()
            assert chosen[64 - length : -1, column].gather(1, routes).all()


@pytest.mark.parametrize(
    "mask", [np.ones((2, 1, 6, 6)), np.ones((3, 6)), np.full((2, 6), 2), np.array([["a"] * 6] * 2)], ids=lambda m: str(m.shape)
)
def test_another_mask_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(ReplayError, match=r"MicroBatch.from_attention_mask: .* for 2 ids; expected \[ids, columns\] of 0 and 1"):
        MicroBatch.from_attention_mask([0, 1], mask)


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda: MicroBatch.padded([0, 1], [4, 6], "6"), r"padded_length=\['6'\]; expected integers"),
        (lambda: MicroBatch.padded([0, 1], [4, 6], 6.5), r"padded_length=\[6.5\]; expected integers"),
        (lambda: MicroBatch.packed([0, 1], [4, 6], key=[0, 1]), r"key=\[0, 1\]; expected a number, a string or a tuple"),
        (lambda: MicroBatch("a", [[0, 1]]), "grid is a list; use MicroBatch.padded or MicroBatch.packed"),  # type: ignore[arg-type]
        (lambda: MicroBatch.from_attention_mask([0, 1], [[1, 1], [1]]), "mask: expected values of one shape"),
        (lambda: MicroBatch.from_packed_seq_params([4], None), "cu_seqlens_q=None; expected thd"),
        (lambda: MicroBatch.from_packed_seq_params([4, 2], params([0, 5, 3], [0, 5, 8])), r"of \[5, -2\] tokens"),
    ],
)  # fmt: skip
def test_a_micro_batch_of_something_else_is_refused(describe: Any, message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        describe()


def test_attach_and_the_calls_of_a_handle_take_what_they_say() -> None:
    for chunks in (None, 3, [toy.ToyChunk(toy.toy_config()), None]):
        with pytest.raises(AttachError, match=r"attach\(\) got a (NoneType|int) as a model chunk; pass the model"):
            attach(chunks, toy.preset("r3"))  # type: ignore[arg-type]
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("pr2", predictor="lookahead"), None)
    with pytest.raises(ReplayError, match="look_ahead: forward is a NoneType; pass a function"):
        pr2.look_ahead([], None)  # type: ignore[arg-type]


def test_a_pass_of_something_else_ends_no_mini_step() -> None:
    """The mini-step before it is still open, for step()."""
    pr2 = begin(good())
    pr2.progress.mini_step, pr2.progress.open = 1, True
    message = "a pass got a int among its micro-batches"
    with pytest.raises(ReplayError, match=message), pr2.old_logprobs([3]):  # type: ignore[list-item]
        pass
    with pytest.raises(ReplayError, match=message), pr2.actor_update([3]):  # type: ignore[list-item]
        pass
    with pytest.raises(ReplayError, match=message):
        pr2.look_ahead([3], lambda session: None)  # type: ignore[list-item]
    with pytest.raises(ReplayError, match="mini_step='2'"), pr2.actor_update([], "2"):
        pass
    assert pr2.progress.open


def params(ends: list[int], padded: list[int] | None = None, **more: Any) -> PackedSeqParams:
    tensor = lambda numbers: None if numbers is None else torch.tensor(numbers, dtype=torch.int32)  # noqa: E731
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=tensor(ends), cu_seqlens_q_padded=tensor(padded), **more)


@pytest.mark.parametrize(
    ("given", "lengths", "expected"),
    [
        (params([0, 3, 8]), None, MicroBatch.packed([4, 2], [3, 5])),
        (params([0, 3, 8], [0, 4, 12]), None, MicroBatch.packed([4, 2], [3, 5], [4, 8])),
        (params([0, 4, 12], [0, 4, 12]), [3, 5], MicroBatch.packed([4, 2], [3, 5], [4, 8])),  # both count the padding
        (params([0, 4, 12]), [3, 5], MicroBatch.packed([4, 2], [3, 5], [4, 8])),
        (params([0, 3, 8, 16]), None, MicroBatch.packed([4, 2, -1], [3, 5, 0], [3, 5, 8])),  # a place of padding behind
        (params([0, 3, 8, 8], [0, 4, 12, 16]), None, MicroBatch.packed([4, 2, -1], [3, 5, 0], [4, 8, 4])),
        (params([0, 3, 8, 8, 8]), None, MicroBatch.packed([4, 2], [3, 5])),  # a cu_seqlens of fixed size
    ],
)
def test_packed_seq_params_are_read(given: PackedSeqParams, lengths: list[int] | None, expected: MicroBatch) -> None:
    assert MicroBatch.from_packed_seq_params([4, 2], given, lengths) == expected


@pytest.mark.parametrize(
    ("given", "lengths", "message"),
    [
        (params([0, 3]), None, r"2 ids of \[3\] tokens"),
        (params([0, 3, 8]), [4, 5], r"of \[4, 5\] tokens, in places of \[3, 5\]"),
        (params([0, 3, 8]), [3], r"2 ids of \[3\] tokens"),
        (SimpleNamespace(qkv_format="sbhd", cu_seqlens_q=None), None, "qkv_format='sbhd'.*expected thd"),
        (SimpleNamespace(qkv_format="thd", cu_seqlens_q=None), None, "cu_seqlens_q=None; expected thd"),
    ],
)
def test_packed_seq_params_that_do_not_fit_are_refused(given: Any, lengths: list[int] | None, message: str) -> None:
    with pytest.raises(ReplayError, match=f"MicroBatch.from_packed_seq_params: .*{message}"):
        MicroBatch.from_packed_seq_params([4, 2], given, lengths)
