"""Tables beyond the budget: equal to those in memory wherever they are used, in files that nothing outlives."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.parallel.grid import packed, padded
from megatron_pr2.rollout.sglang import route_spill
from megatron_pr2.rollout.sglang.route_spill import RouteSpill
from megatron_pr2.routes.scatter import slice_tables
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import assert_same_table, random_ids

CPU = torch.device("cpu")


def table_of(tokens: int = 100, layers: int = 4, topk: int = 2, experts: int = 64, seed: int = 0) -> RouteTable:
    ids = random_ids(tokens, layers, topk, experts, seed)
    ids[-1:] = -1
    return RouteTable.from_ids(ids, experts)


def held(table: RouteTable) -> int:
    return table.experts.nbytes + table.valid.nbytes


def open_files(directory: Path) -> list[str]:
    """Files of this process in a directory that have no name any more."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:
            continue
        if target.startswith(str(directory)):
            found.append(target)
    return found


def mappings(directory: Path) -> int:
    return sum(str(directory) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.fixture(scope="module", autouse=True)
def collection_is_quick() -> Iterator[None]:
    """The session's objects need not be looked through after each test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """Where files go; nothing may remain in it, not even open."""
    yield tmp_path
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert not open_files(tmp_path)
    assert mappings(tmp_path) == 0


class TestBudget:
    def test_tables_that_were_dropped_make_room(self, directory: Path) -> None:
        table = table_of()
        spill = RouteSpill(held(table), directory)
        kept = spill.keep(table)
        assert spill.keep(table_of(seed=1)).experts.flags.owndata is False
        del table, kept
        assert spill.memory_bytes == 0
        again = table_of(seed=2)
        assert spill.keep(again) is again
        assert spill.spilled_bytes == held(again)

    def test_a_view_keeps_its_memory_in_the_books(self, directory: Path) -> None:
        """As when the last row of a table is cut off: the array behind it lives on."""
        table = table_of()
        size = held(table)
        spill = RouteSpill(10 * size, directory)
        spill.keep(table)
        part = table.experts[:3]
        del table
        assert spill.memory_bytes == part.base.nbytes
        del part
        assert spill.memory_bytes == 0

    def test_what_is_kept_twice_counts_once(self, directory: Path) -> None:
        table = table_of()
        spill = RouteSpill(held(table), directory)
        assert spill.keep(spill.keep(table)) is table
        assert spill.keep(RouteTable(table.experts[:-1], table.valid[:-1], 64)).experts.base is table.experts
        spilled = spill.keep(table_of(seed=1))
        assert spill.keep(spilled) is spilled
        assert (spill.memory_bytes, spill.spilled_bytes) == (held(table), held(table))

    def test_nonsense_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            RouteSpill(1, tmp_path / "nowhere")


class TestFiles:
    def test_tables_share_a_file_that_has_no_name(self, directory: Path) -> None:
        spill = RouteSpill(0, directory, file_bytes=1 << 20)
        kept = [spill.keep(table_of(seed=i)) for i in range(50)]
        assert not list(directory.iterdir())
        assert mappings(directory) == 1
        for i, table in enumerate(kept):
            assert_same_table(table, table_of(seed=i))

    def test_a_full_file_is_followed_by_another_one(self, directory: Path) -> None:
        size = held(table_of())
        spill = RouteSpill(0, directory, file_bytes=3 * size)
        kept = [spill.keep(table_of(seed=i)) for i in range(7)]
        assert mappings(directory) == 4  # offsets are aligned: two tables each
        large = spill.keep(table_of(tokens=5000, seed=9))
        assert mappings(directory) == 5
        assert_same_table(large, table_of(tokens=5000, seed=9))
        for i, table in enumerate(kept):
            assert_same_table(table, table_of(seed=i))

    def test_a_file_goes_with_its_last_array(self, directory: Path) -> None:
        spill = RouteSpill(0, directory, file_bytes=1 << 20)
        first, second = spill.keep(table_of(seed=0)), spill.keep(table_of(seed=1))
        rows = second.experts[5:7]
        del first, second
        assert len(open_files(directory)) > 0
        assert np.array_equal(rows, table_of(seed=1).experts[5:7])
        del rows
        assert not open_files(directory)
        assert mappings(directory) == 0
        assert_same_table(spill.keep(table_of(seed=2)), table_of(seed=2))

    def test_files_outlive_the_object_that_made_them(self, directory: Path) -> None:
        spill = RouteSpill(0, directory)
        table = spill.keep(table_of())
        del spill
        gc.collect()
        assert_same_table(table, table_of())

    def test_a_full_disk_is_an_error_that_says_so(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        spill = RouteSpill(0, directory)
        before = spill.keep(table_of(seed=0))
        real = os.pwrite

        def full(fd: int, data: memoryview, offset: int) -> int:
            if offset % 4096 + len(data) > 1500:  # a part still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(fd, data, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(RolloutError, match=r"900 bytes could not .*No space left.*make room"):
                spill.keep(table_of(seed=1))
        assert_same_table(before, table_of(seed=0))
        assert spill.spilled_bytes == held(before)
        after = spill.keep(table_of(seed=2))
        assert_same_table(after, table_of(seed=2))

    def test_short_writes_are_continued(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:17], offset))
        assert_same_table(RouteSpill(0, directory).keep(table_of()), table_of())

    def test_a_directory_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone"
        gone.mkdir()
        spill = RouteSpill(0, gone)
        gone.rmdir()
        with pytest.raises(RolloutError, match=r"gone.*name another directory"):
            spill.keep(table_of())

    @pytest.mark.parametrize(("kind", "level"), [("tmpfs", "WARNING"), ("ext4", "INFO"), ("overlayfs", "INFO")])
    def test_a_directory_in_memory_is_warned_of_once(
        self, directory: Path, kind: str, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(route_spill, "_filesystem", lambda directory: kind)
        spill = RouteSpill(held(table_of()), directory)
        with caplog.at_level("INFO", logger="megatron_pr2"):
            kept = [spill.keep(table_of(seed=i)) for i in range(4)]
        assert len(kept) == 4
        assert [record.levelname for record in caplog.records] == [level]
        assert ("memory itself" in caplog.text) == (kind == "tmpfs")

    @pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm here")
    def test_the_kernel_is_asked_what_a_directory_is(self, tmp_path: Path) -> None:
        assert route_spill._filesystem(Path("/dev/shm")) == "tmpfs"
        assert route_spill._filesystem(tmp_path / "nowhere") == "unknown file system"


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([8, 64, 300]), st.integers(0, 4)), max_size=12),
    st.integers(0, 4000),
    st.integers(1, 3000),
)
def test_any_tables_in_any_order_come_back_equal(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]], budget: int, file_bytes: int
) -> None:
    """Some are dropped on the way; the books are those of what is alive."""
    spill = RouteSpill(budget, tmp_path_factory.getbasetemp(), file_bytes=file_bytes)
    alive: dict[int, tuple[RouteTable, bool]] = {}
    for i, (tokens, experts, drop) in enumerate(steps):
        table = table_of(tokens, 3, 2, experts, seed=i)
        kept = spill.keep(table)
        alive[i] = kept, kept is table
        del table, kept
        alive.pop(i - drop if drop else -1, None)
        memory = sum(held(t) for t, here in alive.values() if here)
        assert spill.memory_bytes == memory <= budget
    for i, (table, _) in alive.items():
        assert_same_table(table, table_of(steps[i][0], 3, 2, steps[i][1], seed=i))


def test_threads_share_the_books(directory: Path) -> None:
    """Tables are made, kept and dropped on all sides."""
    size = held(table_of())
    spill = RouteSpill(20 * size, directory, file_bytes=10 * size)
    made = [table_of(seed=i) for i in range(8)]
    failures: list[BaseException] = []
    left: list[RouteTable] = []

    def work(number: int) -> None:
        try:
            mine: list[RouteTable] = []
            for i in range(200):
                mine.append(spill.keep(RouteTable(made[number].experts.copy(), made[number].valid.copy(), 64)))
                assert_same_table(mine[i % len(mine)], made[number])
                if len(mine) > 5:
                    del mine[:3]
            left.extend(mine)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 0 < spill.memory_bytes <= min(20, len(left)) * size
    left.clear()
    assert spill.memory_bytes == 0


@pytest.mark.parametrize("experts", [64, 300])
def test_a_spilled_table_is_a_table(tmp_path: Path, experts: int) -> None:
    """In slices, which can be written to, and pickled, without a warning about read-only arrays."""
    made = {sid: table_of(tokens, 5, 3, experts, seed=sid) for sid, tokens in ((3, 11), (1, 24), (8, 5))}
    spill = RouteSpill(0, tmp_path)
    spilled = {sid: spill.keep(table) for sid, table in made.items()}
    assert all(not t.experts.flags.writeable and not t.valid.flags.writeable for t in spilled.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for grid in (packed([3, 1], [11, 24], [12, 24]), padded([1, 8], [24, 5], 24)):
            found = slice_tables(grid, spilled, range(1, 4), 3, experts, CPU).ids_TLK()
            assert torch.equal(found, slice_tables(grid, made, range(1, 4), 3, experts, CPU).ids_TLK())
            found.zero_()
        for sid, table in spilled.items():
            assert_same_table(RouteTable.decode(table.encode()), made[sid])
            assert_same_table(pickle.loads(pickle.dumps(table, protocol=2)), made[sid])
            buffers: list[pickle.PickleBuffer] = []
            stream = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
            assert np.shares_memory(pickle.loads(stream, buffers=buffers).experts, table.experts)
            del buffers
