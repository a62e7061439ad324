"""The page of route tables: complete for one file and for two, and clear where there is nothing to show."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pr2.errors import DataError
from megatron_pr2.report.routes_page import write_routes_report
from megatron_pr2.routes.files import save_routes
from megatron_pr2.routes.table import RouteTable
from tests.report.page import Page
from tests.report.synthetic import route_tables

ONE = {"load", "balance", "sticky"}
TWO = {"files-changed", "files-layers", "files-positions", "files-layers-positions"}


def page_of(tmp_path, *batches, notes=("engine <b>", "actor")):
    files = []
    for i, (tables, note) in enumerate(zip(batches, notes, strict=False)):
        files.append(tmp_path / f"file{i}.safetensors")
        save_routes(files[-1], tables, note)
    path = write_routes_report(files)
    assert path == tmp_path / "file0.safetensors.html"
    return Page(path)


def test_one_file(tmp_path):
    tables = route_tables(0, sequences=5)
    page = page_of(tmp_path, tables)
    assert page.plots == {f"file-1-{name}" for name in ONE}
    tokens = sum(table.num_tokens for table in tables.values())
    assert f"Tokens {tokens} in 5 sequences" in page.text
    assert "Routers 8 × top-4 MoE layers, of 32 experts each" in page.text
    assert "Missing rows 0 and 5 last tokens, which were no input" in page.text
    assert "engine <b>" in page.text  # escaped in the source
    assert "paper" not in page.text


def test_two_files(tmp_path):
    first, second = route_tables(0, sequences=5), route_tables(0, sequences=5, drift=0.3)
    second[99] = second.pop(4)
    page = page_of(tmp_path, first, second)
    assert page.plots == TWO | {f"file-{number}-{name}" for name in ONE for number in (1, 2)}
    changed = [0, 0]
    for sid in range(4):
        valid = first[sid].valid & second[sid].valid
        a, b = np.sort(first[sid].experts[valid]), np.sort(second[sid].experts[valid])
        changed[0] += int((a == b).all(-1).sum())
        changed[1] += a.shape[0] * a.shape[1]
    share = f"{100 * changed[0] / changed[1]:.2f} %"
    assert f"{share} of the routes are the same" in page.text
    assert f"Unchanged pairs {share} of (token, layer); the paper's frozen routes 76.9 %" in page.text
    assert "frozen, off-2 76.9 %, PR2, off-2 92.2 %" in page.text
    assert "94 % between engine and actor" in page.text
    assert "Sequences compared 4 in both files; 1 only in file 1, 1 only in file 2" in page.text


def test_the_same_routes_twice_and_almost(tmp_path):
    tables = route_tables(0, sequences=2, layers=1)
    page = page_of(tmp_path, tables, tables)
    assert "The routes are the same" in page.text
    assert "files-layers-positions" not in page.plots  # one row is no map
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(4), (40000, 1, 1)), axis=-1)[..., :1]
    other = ids.copy()
    other[3] = 3 - other[3]
    page = page_of(tmp_path, {0: RouteTable.from_ids(ids, 4)}, {0: RouteTable.from_ids(other, 4)})
    assert "> 99.99 % of the routes are the same" in page.text


def test_files_without_routes(tmp_path):
    missing = {0: RouteTable.missing(5, 2, 2, 8)}
    page = page_of(tmp_path, missing)
    assert page.plots == set()
    assert "No token of this file has a route." in page.text
    page = page_of(tmp_path, missing, missing)
    assert "Nothing to compare" in page.text


def test_errors_leave_no_page(tmp_path):
    for files in ([], [tmp_path / "a"] * 3):
        with pytest.raises(DataError, match=f"{len(files)} files of routes; expected one, or two"):
            write_routes_report(files)
    with pytest.raises(DataError, match="no such file"):
        write_routes_report([tmp_path / "absent"])
    save_routes(tmp_path / "a", route_tables(0, 2))
    save_routes(tmp_path / "b", route_tables(1, 2))
    with pytest.raises(DataError, match="expected routes of the same sequences"):
        write_routes_report([tmp_path / "a", tmp_path / "b"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_other_path_and_the_same_page_twice(tmp_path):
    save_routes(tmp_path / "a", route_tables(0, 2))
    first = write_routes_report([tmp_path / "a"], tmp_path / "new" / "page.html")
    assert first == tmp_path / "new" / "page.html"
    assert first.read_bytes() == write_routes_report([str(tmp_path / "a")]).read_bytes()
