"""Route tables on disk: what is saved is loaded, and a damaged file says what is wrong with it."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from megatron_pr2.errors import DataError, RouteError
from megatron_pr2.routes.files import FORMAT, VERSION, RouteFile, load_routes, save_routes
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import assert_same_table, random_ids

METADATA = {"format": FORMAT, "version": VERSION, "num_experts": "8"}


def random_table(seed, tokens, layers, topk, experts, missing=0.2):
    ids = random_ids(tokens, layers, topk, experts, seed)
    ids[np.random.default_rng(seed).random(tokens) < missing] = experts  # out of range: becomes a missing row
    return RouteTable.from_ids(ids, experts)


def assert_equal(got, want):
    assert list(got) == sorted(want)
    for sid, table in want.items():
        assert_same_table(got[sid], table)


@st.composite
def batches(draw):
    experts = draw(st.sampled_from([1, 2, 8, 256, 257, 1000]))
    topk = draw(st.integers(1, min(4, experts)))
    layers = draw(st.integers(1, 4))
    ids = draw(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
    return {sid: random_table([abs(sid), layers], draw(st.integers(0, 9)), layers, topk, experts) for sid in ids}


@given(batches(), st.text(max_size=20))
def test_round_trip(tables, note):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "routes.safetensors"
        save_routes(path, tables, note)
        assert_equal(load_routes(path), tables)
        with RouteFile(path) as file:
            assert (file.note, len(file)) == (note, len(tables))
            assert file.lengths() == {sid: table.num_tokens for sid, table in tables.items()}
            any_table = next(iter(tables.values()))
            assert (file.num_layers, file.topk, file.num_experts) == (*any_table.experts.shape[1:], any_table.num_experts)
        assert [p.name for p in Path(directory).iterdir()] == ["routes.safetensors"]


@given(st.data())
def test_any_damage_is_a_data_error_or_harmless(data):
    """Cut or overwritten anywhere: either the error of this package, or tables that a router could take."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "routes.safetensors"
        save_routes(path, {4: random_table(0, 6, 2, 3, 8), 5: random_table(1, 3, 2, 3, 8)})
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans(), "cut"):
            del content[data.draw(st.integers(0, len(content) - 1), "length") :]
        else:
            content[data.draw(st.integers(0, len(content) - 1), "place")] ^= data.draw(st.integers(1, 255), "change")
        path.write_bytes(content)
        try:
            tables = load_routes(path)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017 (an outcome among two)
        else:
            for table in tables.values():
                assert RouteTable.decode(table.encode()).num_tokens == table.num_tokens


def test_tables_that_are_views_into_something_else(tmp_path):
    whole = random_table(0, 12, 4, 2, 8)
    strided = RouteTable(whole.experts[::2, 1:3], whole.valid[::2], 8)
    mapped = RouteTable.decode(bytes(whole.encode()))
    save_routes(tmp_path / "r", {0: strided})
    assert_equal(load_routes(tmp_path / "r"), {0: strided})
    save_routes(tmp_path / "r", {np.int64(3): mapped})
    assert_equal(load_routes(tmp_path / "r"), {3: whole})


def test_files_of_other_programs_may_leave_validity_out(tmp_path):
    ids = np.array([[[1, 2]], [[3, 3]], [[0, 7]], [[-1, 2]]], dtype=np.int32)
    save_file({"routes.0": ids}, tmp_path / "r", metadata=METADATA)
    table = load_routes(tmp_path / "r")[0]
    assert table.valid.tolist() == [True, False, True, False]
    assert table.experts[:, 0].tolist() == [[1, 2], [0, 0], [0, 7], [0, 0]]
    save_file({"routes.0": ids, "valid.0": np.array([True, False, False, False])}, tmp_path / "r", metadata=METADATA)
    table = load_routes(tmp_path / "r")[0]
    assert table.experts.dtype == np.uint8
    assert table.experts[:, 0].tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]


def test_a_wrong_row_is_named(tmp_path):
    ids = np.stack([np.arange(2), np.arange(2)]).reshape(1, 2, 2).repeat(5, 0).astype(np.uint8)
    for wrong, text in (([4, 4], "[4, 4]"), ([1, 8], "[1, 8]")):
        bad = ids.copy()
        bad[3, 1] = wrong
        save_file({"routes.6": bad, "valid.6": np.ones(5, dtype=bool)}, tmp_path / "r", metadata=METADATA)
        with pytest.raises(DataError, match=r"routes\.6 row 3, MoE layer 1 .*2 different ids in 0\.\.7.*1 of 5 rows") as error:
            load_routes(tmp_path / "r")
        assert text in str(error.value)


ROWS = np.zeros((3, 2, 1), dtype=np.uint8)
YES = np.ones(3, dtype=bool)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"routes.0": ROWS}, {}, r"format None; expected 'megatron-pr2\.routes'"),
        ({"routes.0": ROWS}, {"format": "pt"}, "format 'pt'"),
        ({"routes.0": ROWS}, METADATA | {"version": "2"}, "version '2'; this release reads version '1'"),
        ({"routes.0": ROWS}, METADATA | {"num_experts": "many"}, r"num_experts 'many'; expected a whole number in 1\.\.32768"),
        ({"routes.0": ROWS}, METADATA | {"num_experts": "32769"}, "num_experts '32769'"),
        ({"routes.0": ROWS, "weight": YES}, METADATA, "holds 'weight'; expected routes"),
        ({"routes.01": ROWS}, METADATA, r"holds 'routes\.01'"),
        ({"routes.0": ROWS[0]}, METADATA, r"routes\.0 is U8\[2, 1\]; expected integers \[tokens, MoE layers, top-k\]"),
        ({"routes.0": ROWS.astype(np.float32)}, METADATA, r"routes\.0 is F32\[3, 2, 1\]"),
        ({"routes.0": ROWS[:, :, :0]}, METADATA, r"routes\.0 is U8\[3, 2, 0\]"),
        ({"routes.0": ROWS.repeat(9, 2)}, METADATA, "top-k <= 8 experts"),
        ({"routes.0": ROWS, "routes.1": ROWS[:, :1]}, METADATA, r"routes\.1 is U8\[3, 1, 1\]; expected \[tokens, 2, 1\]"),
        ({"routes.0": ROWS, "valid.0": YES[:2]}, METADATA, r"valid\.0 is BOOL\[2\]; expected BOOL\[3\]"),
        ({"routes.0": ROWS, "valid.0": YES.view(np.uint8)}, METADATA, r"valid\.0 is U8\[3\]; expected BOOL\[3\]"),
        ({"routes.0": ROWS, "valid.1": YES}, METADATA, r"valid\.1 is BOOL\[3\]; expected a routes\.1 beside it"),
        ({}, METADATA, "holds no routes"),
    ],
)
def test_what_is_no_file_of_routes_says_why(tmp_path, arrays, metadata, message):
    save_file(arrays, tmp_path / "r", metadata=metadata)
    with pytest.raises(DataError, match=message):
        load_routes(tmp_path / "r")


def test_what_is_no_safetensors_file_says_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_routes(tmp_path / "absent")
    with pytest.raises(DataError, match="no such file"):
        load_routes(tmp_path)
    save_routes(tmp_path / "r", {0: random_table(0, 4, 1, 1, 2)})
    whole = (tmp_path / "r").read_bytes()
    (tmp_path / "r").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"not a whole safetensors file of {len(whole) - 1} bytes"):
        load_routes(tmp_path / "r")
    header = json.dumps({"routes.0": {"dtype": "U8", "shape": [10**12, 1, 1], "data_offsets": [0, 10**12]}}).encode()
    (tmp_path / "r").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_routes(tmp_path / "r")


def test_saving_refuses_nothing_and_two_models(tmp_path):
    with pytest.raises(RouteError, match="no tables to save"):
        save_routes(tmp_path / "r", {})
    tables = {0: random_table(0, 4, 2, 1, 8), 7: random_table(0, 4, 2, 2, 8)}
    with pytest.raises(RouteError, match=r"sequence 7 has 2 MoE layers, top-2 of 8 experts, sequence 0 has 2 MoE layers, top-1"):
        save_routes(tmp_path / "r", tables)
    assert not (tmp_path / "r").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    old, new = {0: random_table(0, 4, 2, 1, 8)}, {0: random_table(1, 4, 2, 1, 8)}
    save_routes(tmp_path / "r", old)

    def fail(*_):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_pr2.routes.files.os.replace", fail)
        with pytest.raises(DataError, match=r"could not be written .*power cut"):
            save_routes(tmp_path / "r", new)
    assert_equal(load_routes(tmp_path / "r"), old)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    with pytest.raises(DataError, match="check that the directory exists"):
        save_routes(tmp_path / "absent" / "r", new)
    with RouteFile(tmp_path / "r") as file, pytest.raises(KeyError):
        file[1]
