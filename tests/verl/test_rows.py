"""The data path: what verl's own classes make of a rollout, read back as sequences, identities and route tables."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import ReplayError, RouteError
from megatron_pr2.integrations.verl.batch import LIVE, SequenceBook
from megatron_pr2.integrations.verl.rows import Row, read_rows, route_rows, route_table
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.routes.table import RouteTable

SHAPE: dict[str, Any] = {"layers": DecoderLayers(4, (0, 1, 2, 3)), "topk": 2, "num_experts": 8, "where": "row"}


@pytest.fixture(scope="module")
def world() -> Any:
    from tests.verl import worker

    return worker


def no_padding(proto: Any) -> Any:
    from verl.workers.utils.padding import left_right_2_no_padding

    return left_right_2_no_padding(proto.to_tensordict())


def tables(data: Any) -> list[RouteTable]:
    routes = route_rows(data)
    assert routes is not None
    return [route_table(ids, row.length, **SHAPE) for ids, row in zip(routes, read_rows(data), strict=True)]


def assert_tables(found: list[RouteTable], made: list[Any]) -> None:
    """Each table has the routes that the engine returned for these tokens, and none for the last."""
    assert len(found) == len(made)
    for table, sample in zip(found, made, strict=True):
        assert table.valid.tolist() == [True] * (sample.length - 1) + [False]
        assert np.array_equal(table.experts[:-1], sample.routes)
        assert table.experts.dtype == np.uint8


def test_padded_batches(world: Any) -> None:
    """DataProto, prompts padded left and responses right; verl takes the padding out."""
    made = world.samples(6)
    data = no_padding(world.padded_batch(made))
    rows = read_rows(data)
    assert [row.length for row in rows] == [sample.length for sample in made]
    assert [row.loss_span for row in rows] == [(len(s.prompt) - 1, s.length - 1) for s in made]
    assert all(row.loss_mask.all() and row.bears_loss for row in rows)
    assert_tables(tables(data), made)


def test_jagged_batches(world: Any) -> None:
    """What verl's agent loop puts into a TransferQueue: AgentLoopOutput.as_dict() adds a row of zeros for the last token."""
    made = world.samples(6)
    data = world.jagged_batch(made)
    assert data["routed_experts"].dtype == torch.int16
    assert_tables(tables(data), made)
    padded = read_rows(no_padding(world.padded_batch(made)))
    assert [row.fingerprint for row in read_rows(data)] == [row.fingerprint for row in padded], "one identity in both forms"


def test_what_travels(world: Any) -> None:
    """Through everything that verl does with a batch on its way: chunked, sent, joined, reordered, selected, cut."""
    from verl import DataProto
    from verl.utils import tensordict_utils as tu

    made = world.samples(8)
    proto = world.padded_batch(made)
    sent = DataProto.concat([pickle.loads(pickle.dumps(part)) for part in proto.chunk(2)])
    sent.reorder(torch.tensor([3, 1, 0, 2, 7, 5, 6, 4]))
    order = [3, 1, 0, 2, 7, 5, 6, 4]
    data = no_padding(sent)
    assert_tables(tables(data), [made[i] for i in order])
    chosen = tu.index_select_tensor_dict(data, [6, 2])
    assert_tables(tables(chosen), [made[order[6]], made[order[2]]])
    parts = tu.chunk_tensordict(data, 4)
    assert_tables([table for part in parts for table in tables(part)], [made[i] for i in order])
    joined = tu.concat_tensordict([tu.index_select_tensor_dict(data, [0, 1]), tu.index_select_tensor_dict(data, [2])])
    assert_tables(tables(joined), [made[i] for i in order[:3]])


def test_one_row_less_is_the_same(world: Any) -> None:
    sample = world.samples(1)[0]
    whole = np.concatenate([sample.routes, np.zeros_like(sample.routes[:1])])
    short, long = (route_table(ids, sample.length, **SHAPE) for ids in (sample.routes, whole))
    assert np.array_equal(short.experts, long.experts)
    assert np.array_equal(short.valid, long.valid)


def test_top_1_last_rows_are_no_routes(world: Any) -> None:
    """With one expert per token a row of zeros is a route like any other, but not the last token's."""
    ids = np.zeros((5, 4, 1), dtype=np.int16)
    assert route_table(ids, 5, **{**SHAPE, "topk": 1}).valid.tolist() == [True] * 4 + [False]


def test_dense_layers_have_no_routes(world: Any) -> None:
    """SGLang returns rows for all hidden layers; the MoE layers' are taken, whether they come with dense ones or alone."""
    sample = world.samples(1)[0]
    shape = {**SHAPE, "layers": DecoderLayers(4, (1, 3))}
    of_all = route_table(sample.routes, sample.length, **shape)
    alone = route_table(sample.routes[:, [1, 3]], sample.length, **shape)
    assert np.array_equal(of_all.experts[:-1], sample.routes[:, [1, 3]])
    assert np.array_equal(of_all.experts, alone.experts)


def test_layers_of_a_hybrid_model(world: Any) -> None:
    """Hugging Face has one layer where HybridModel has two, or as many (Nemotron-H): rows of either."""
    sample = world.samples(1)[0]
    shape = {**SHAPE, "layers": DecoderLayers.of_pattern("*-*E*-*E")}
    of_hidden = route_table(sample.routes, sample.length, **shape)
    of_decoder = route_table(np.repeat(sample.routes, 2, axis=1), sample.length, **shape)
    alone = route_table(sample.routes[:, [1, 3]], sample.length, **shape)
    assert np.array_equal(of_hidden.experts[:-1], sample.routes[:, [1, 3]])
    for table in (of_decoder, alone):
        assert np.array_equal(table.experts, of_hidden.experts)
    with pytest.raises(RouteError, match=r"expected \[\d+, 4, 2\]"):
        route_table(sample.routes[:, :3], sample.length, **shape)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((7, 4, 2), "7 rows of routed_experts for 10 tokens"),
        ((9, 3, 2), "expected [9, 4, 2]"),
        ((9, 4, 3), "expected [9, 4, 2]"),
    ],
)
def test_wrong_shapes_are_refused(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(RouteError) as error:
        route_table(np.zeros(shape, dtype=np.int16), 10, **SHAPE)
    assert told in str(error.value)


def test_missing_rows_are_counted_not_replayed(world: Any) -> None:
    """A conversation that ends with a tool's answer: verl fills its rows with zeros."""
    sample = world.samples(1)[0]
    ids = np.concatenate([sample.routes, np.zeros_like(sample.routes[:1])])
    ids[-4:] = 0
    table = route_table(ids, sample.length, **SHAPE)
    assert table.valid.tolist() == [True] * (sample.length - 4) + [False] * 4


def test_loss_masks_within_a_response(world: Any) -> None:
    made = world.samples(2)
    mask = [1, 0, *[1] * (len(made[0].response) - 2)]
    made[0] = world.Sample(made[0].prompt, made[0].response, made[0].routes, mask)
    for data in (no_padding(world.padded_batch(made)), world.jagged_batch(made)):
        assert read_rows(data)[0].loss_mask.tolist() == [bool(each) for each in mask]


def test_a_response_without_prompt_is_refused(world: Any) -> None:
    data = world.jagged_batch(world.samples(2))
    data["loss_mask"] = data["input_ids"]
    with pytest.raises(RouteError, match="expected a prompt"):
        read_rows(data)


def test_padded_ids_are_refused(world: Any) -> None:
    proto = world.padded_batch(world.samples(2))
    data = no_padding(proto)
    data["input_ids"] = proto.batch["input_ids"]
    with pytest.raises(RouteError, match="jagged"):
        read_rows(data)


def test_a_batch_may_have_no_routes(world: Any) -> None:
    assert route_rows(no_padding(world.padded_batch(world.samples(2), routes=False))) is None


def test_verls_padding_rows_have_no_part(world: Any) -> None:
    """verl fills a batch up with rows of its own, without loss and with routes of zeros."""
    from verl.trainer.ppo.padding_utils import construct_minimal_padding_template

    made = world.samples(2)
    data = world.jagged_batch(made)
    template = {key: data[key][0] for key in ("input_ids", "prompts", "responses", "loss_mask", "position_ids", "routed_experts")}
    padding, _ = construct_minimal_padding_template(template, {}, eos_token_id=2)
    fields = ("input_ids", "loss_mask", "routed_experts")
    parts = {key: [*data[key].unbind(), padding[key], padding[key]] for key in fields}
    batch = {key: torch.nested.as_nested_tensor(part, layout=torch.jagged) for key, part in parts.items()}
    rows = read_rows(batch)
    assert [row.bears_loss for row in rows] == [True, True, False, False]
    book = SequenceBook(rows, route_rows(batch))
    assert book.ids == [0, 1, LIVE, LIVE]
    assert book.find([rows[2], rows[0], rows[3]], None) == [LIVE, 0, LIVE]


# ---- identity --------------------------------------------------------------------------------------------------------


def row(name: str, length: int = 5, loss: bool = True) -> Row:
    return Row(length, np.full(3, loss), name.encode(), np.zeros(length, dtype=np.int64))


def routes_of(*values: int) -> list[np.ndarray]:
    return [np.full((5, 1, 1), value, dtype=np.int16) for value in values]


def test_rows_are_known_by_their_tokens() -> None:
    book = SequenceBook([row("a"), row("b"), row("c")], None)
    assert book.find([row("c"), row("a")], None) == [2, 0]
    assert book.find([row("b")], None) == [1]
    assert book.find([row("b"), row("c"), row("a")], None) == [1, 2, 0], "a further epoch"


def test_tokens_and_prompt_length_make_an_identity(world: Any) -> None:
    sample = world.samples(1)[0]
    moved = world.Sample(sample.prompt + sample.response[:1], sample.response[1:], sample.routes, sample.mask[1:])
    first, second = (read_rows(world.jagged_batch([each]))[0] for each in (sample, moved))
    assert first.length == second.length
    assert first.fingerprint != second.fingerprint


def test_twins_are_told_apart_by_their_routes() -> None:
    book = SequenceBook([row("a"), row("a"), row("a")], routes_of(1, 2, 1))
    assert book.find([row("a")], routes_of(2)) == [1]
    assert book.find([row("a"), row("a")], routes_of(1, 1)) == [0, 2]
    with pytest.raises(ReplayError, match="changed its tokens or routes"):
        book.find([row("a")], routes_of(3))


def test_the_last_row_of_routes_is_no_identity() -> None:
    book = SequenceBook([row("a"), row("a")], routes_of(1, 2))
    assert book.find([row("a")], [routes_of(2)[0][:4]]) == [1]


def test_twins_without_routes_are_dealt_out_in_turn() -> None:
    book = SequenceBook([row("a"), row("b"), row("a")], None)
    assert book.find([row("a")], None) == [0]
    assert book.find([row("a")], None) == [2]
    assert book.find([row("a"), row("a")], None) == [0, 2], "each once per epoch"


@pytest.mark.parametrize("rows", [[row("x")], [row("a"), row("a")]], ids=["unknown", "more often"])
def test_unknown_rows_are_refused(rows: list[Row]) -> None:
    with pytest.raises(ReplayError, match="no row of the batch whose old log-probs this rank computed"):
        SequenceBook([row("a"), row("b")], None).find(rows, None)


def test_a_row_may_lose_its_loss_and_not_gain_one() -> None:
    book = SequenceBook([row("a"), row("b", loss=False)], None)
    assert book.find([row("a", loss=False), row("b", loss=False)], None) == [0, LIVE]
    with pytest.raises(ReplayError, match="bears loss, but did not"):
        book.find([row("b")], None)
