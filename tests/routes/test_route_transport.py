"""Tables between processes: pickle, shared memory and Ray's object store move the arrays once, or not at all."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import pickle
import secrets
import tempfile
import tracemalloc
import warnings
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.errors import RouteError
from megatron_pr2.parallel.grid import packed
from megatron_pr2.routes.scatter import slice_tables
from megatron_pr2.routes.table import RouteTable
from tests.helpers.ids import assert_same_table, random_ids

MB = 1 << 20


def table_of(tokens: int = 50, layers: int = 3, topk: int = 4, experts: int = 64, seed: int = 0) -> RouteTable:
    ids = random_ids(tokens, layers, topk, experts, seed)
    ids[tokens // 2 : tokens // 2 + 2] = -1
    return RouteTable.from_ids(ids, experts)


def mapped(table: RouteTable, directory: Path) -> RouteTable:
    """The same on np.memmap, a subclass of np.ndarray."""
    arrays = []
    for name in ("experts", "valid"):
        np.save(directory / f"{name}.npy", getattr(table, name))
        arrays.append(np.load(directory / f"{name}.npy", mmap_mode="r"))
    assert all(type(each) is np.memmap for each in arrays)
    return RouteTable(*arrays, table.num_experts)


def strided(table: RouteTable) -> RouteTable:
    """The same on arrays that are not contiguous."""
    experts = np.repeat(np.repeat(table.experts, 2, axis=1), 3, axis=0)[::3, ::2]
    valid = np.repeat(table.valid, 2)[::2]
    assert not experts.flags.c_contiguous
    assert not valid.flags.c_contiguous
    return RouteTable(experts, valid, table.num_experts)


@pytest.fixture(scope="module")
def large() -> RouteTable:
    """32K tokens of Qwen3-30B: 48 layers, top-8 of 128, 12.6 MB."""
    start = np.random.default_rng(0).integers(0, 128, size=(32768, 48, 1))
    table = RouteTable.from_ids((start + np.arange(8) * 5) % 128, 128)
    assert 12.5e6 < table.nbytes < 12.7e6
    return table


class Peak:
    """Most bytes allocated by Python and NumPy at once within the block."""

    def __enter__(self) -> Peak:
        tracemalloc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


class TestPickle:
    @pytest.mark.parametrize("kind", ["plain", "mapped", "strided", "wide", "empty"])
    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_every_protocol_returns_the_same_table(self, kind: str, protocol: int, tmp_path: Path) -> None:
        plain = table_of()
        table = {
            "plain": lambda: plain,
            "mapped": lambda: mapped(plain, tmp_path),
            "strided": lambda: strided(plain),
            "wide": lambda: table_of(experts=300),
            "empty": lambda: RouteTable.missing(0, 3, 4, 64),
        }[kind]()
        assert_same_table(pickle.loads(pickle.dumps(table, protocol=protocol)), table)

    @pytest.mark.parametrize("kind", ["plain", "mapped"])
    def test_arrays_leave_the_stream_and_come_back_where_they_are(self, kind: str, large: RouteTable, tmp_path: Path) -> None:
        table = large if kind == "plain" else mapped(large, tmp_path)
        buffers: list[pickle.PickleBuffer] = []
        with Peak() as peak:
            stream = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
            again = pickle.loads(stream, buffers=buffers)
        assert len(stream) < 1000
        assert len(buffers) == 2
        assert np.shares_memory(again.experts, table.experts)
        assert np.shares_memory(again.valid, table.valid)
        assert_same_table(again, table)
        assert peak.bytes < 0.1 * MB

    def test_arrays_that_are_not_contiguous_leave_it_after_one_copy(self, large: RouteTable) -> None:
        part = RouteTable(large.experts[:, ::2], large.valid, large.num_experts)
        buffers: list[pickle.PickleBuffer] = []
        with Peak() as peak:
            stream = pickle.dumps(part, protocol=5, buffer_callback=buffers.append)
        assert len(stream) < 1000
        assert peak.bytes < 1.1 * part.nbytes
        assert_same_table(pickle.loads(stream, buffers=buffers), part)

    def test_read_only_buffers_give_read_only_tables(self) -> None:
        buffers: list[pickle.PickleBuffer] = []
        table = table_of()
        stream = pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
        again = pickle.loads(stream, buffers=[buffer.raw().toreadonly() for buffer in buffers])
        assert not again.experts.flags.writeable
        assert_same_table(again, table)

    def test_copies_are_of_their_own(self) -> None:
        table = table_of()
        deep = copy.deepcopy(table)
        assert_same_table(deep, table)
        assert not np.shares_memory(deep.experts, table.experts)


class TestBuffers:
    @given(st.integers(0, 40), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 256, 300]), st.integers(0, 9))
    def test_in_place_is_what_encode_returns(self, tokens: int, layers: int, topk: int, experts: int, room: int) -> None:
        table = RouteTable.from_ids(random_ids(tokens, layers, topk, experts, seed=room), experts)
        for source in (table, strided(table)) if tokens > 1 else (table,):
            assert source.encode() == table.encode()
            buffer = bytearray(b"\xaa" * (table.encoded_size + room))
            assert source.encode_into(buffer) == table.encoded_size == len(table.encode())
            assert buffer == table.encode() + b"\xaa" * room
        again = RouteTable.decode(memoryview(buffer)[: table.encoded_size])
        assert_same_table(again, table)
        assert not again.experts.flags.writeable
        assert np.shares_memory(again.experts, np.frombuffer(buffer, np.uint8)) or not again.experts.size

    def test_any_contiguous_buffer_will_do(self) -> None:
        table = table_of()
        payload = table.encode()
        words = np.frombuffer(payload + b"\0" * (-len(payload) % 4), dtype=np.uint32)
        for buffer in (payload, bytearray(payload), memoryview(payload), np.frombuffer(payload, np.uint8)):
            assert_same_table(RouteTable.decode(buffer), table)
        assert_same_table(RouteTable.decode(words.view(np.uint8)[: len(payload)]), table)

    @pytest.mark.parametrize(
        ("buffer", "message"),
        [
            (bytearray(10), "writable buffer of 10 bytes; expected a writable one of at least encoded_size=627"),
            (bytes(627), "read-only buffer of 627 bytes"),
            (memoryview(bytearray(2000))[::2], "contiguous"),
            (7, "contiguous"),
        ],
    )
    def test_unfit_buffers_are_refused(self, buffer: Any, message: str) -> None:
        with pytest.raises(RouteError, match=message):
            table_of().encode_into(buffer)

    def test_a_view_with_gaps_is_refused(self) -> None:
        with pytest.raises(RouteError, match="route payload: expected a contiguous buffer"):
            RouteTable.decode(memoryview(table_of().encode())[::2])

    def test_marked_rows_are_checked_in_every_piece(self, large: RouteTable) -> None:
        payload = bytearray(large.encode())
        for token in (0, 20_000, 32_767):
            damaged = bytearray(payload)
            at = 20 + (token * 48 + 47) * 8
            damaged[at] = damaged[at + 1]
            with pytest.raises(RouteError, match=f"route payload: .*token {token} is marked as valid"):
                RouteTable.decode(damaged)

    def test_encoding_and_decoding_in_place_allocate_next_to_nothing(self, large: RouteTable) -> None:
        buffer = bytearray(large.encoded_size)
        with Peak() as encoding:
            large.encode_into(buffer)
        with Peak() as decoding:
            again = RouteTable.decode(buffer)
        with Peak() as once:
            payload = large.encode()
        assert payload == buffer
        assert_same_table(again, large)
        assert encoding.bytes < 0.1 * MB
        assert decoding.bytes < 1 * MB
        assert once.bytes < len(payload) + 0.1 * MB


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _replay_from_shared_memory(name: str, size: int, answers: Any) -> None:
    """In another process: a slice of the shared table, as a rank would take it."""
    shared = SharedMemory(name)
    try:
        with Peak() as peak:
            table = RouteTable.decode(shared.buf[:size])
        offset = address(table.experts) - address(np.frombuffer(shared.buf, np.uint8))
        grid = packed([1], [table.num_tokens], [table.num_tokens])
        ids = slice_tables(grid, {1: table}, range(2, 5), 8, 128, torch.device("cpu"))
        answers.put((peak.bytes, offset, table.experts.flags.writeable, int(ids.ids_TLK().long().sum()), os.getpid()))
        del table
    finally:
        shared.close()


def test_another_process_replays_from_shared_memory_without_a_copy(large: RouteTable) -> None:
    shared = SharedMemory(create=True, size=large.encoded_size)
    try:
        with Peak() as encoding:
            large.encode_into(shared.buf)
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=_replay_from_shared_memory, args=(shared.name, large.encoded_size, answers))
        child.start()
        peak, offset, writeable, total, pid = answers.get(timeout=120)
        child.join(60)
        assert child.exitcode == 0
        assert pid != os.getpid()
        assert encoding.bytes < 0.1 * MB
        assert peak < 1 * MB  # of 12.6
        assert offset == 20  # behind the header, in the shared pages
        assert not writeable
        assert total == int(large.experts[:, 2:5].sum())
    finally:
        shared.close()
        shared.unlink()


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One local node that listens on loopback, asks for a token of its own and leaves nothing behind."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    # Not pytest's directory: paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory, pytest.MonkeyPatch.context() as patch:
        token = Path(directory, "token")
        token.write_text(secrets.token_hex(32))
        for name, value in (("AUTH_MODE", "token"), ("AUTH_TOKEN_PATH", str(token)), ("USAGE_STATS_ENABLED", "0")):
            patch.setenv(f"RAY_{name}", value)
        ray = pytest.importorskip("ray")  # reads its settings when it is imported
        ray.init(
            num_cpus=1,
            object_store_memory=128 * MB,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=directory,
        )
        yield ray
        ray.shutdown()


def object_store_maps() -> list[range]:
    """Addresses of Ray's object store in this process."""
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "plasma" in line:
            first, last = (int(each, 16) for each in line.split()[0].split("-"))
            maps.append(range(first, last))
    return maps


@pytest.mark.exhaustive
class TestRay:
    def test_a_table_from_the_object_store_is_a_view_into_it(self, ray: Any, large: RouteTable) -> None:
        reference = ray.put(large)
        with Peak() as peak:
            table = ray.get(reference)
        assert_same_table(table, large)
        for array in (table.experts, table.valid):
            assert not array.flags.owndata
            assert not array.flags.writeable
            assert any(address(array) in each for each in object_store_maps())
        assert np.shares_memory(table.experts, ray.get(reference).experts)
        assert peak.bytes < 4 * MB  # of 12.6; what there is, Ray imports

    def test_a_task_makes_it_and_the_trainer_slices_it_where_it_is(self, ray: Any, large: RouteTable) -> None:
        @ray.remote(num_cpus=1)
        def rollout(payload: np.ndarray) -> RouteTable:
            return RouteTable.decode(payload)

        table = ray.get(rollout.remote(np.frombuffer(large.encode(), np.uint8)), timeout=120)
        assert not table.experts.flags.owndata
        grid = packed([1], [table.num_tokens], [table.num_tokens])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch's, of tensors on memory that cannot be written to
            with Peak() as peak:
                ids = slice_tables(grid, {1: table}, range(48), 8, 128, torch.device("cpu")).ids_TLK()
        assert torch.equal(ids, torch.from_numpy(large.experts))
        assert peak.bytes < 1.2 * large.nbytes  # the slice itself, and the numbers of its rows

    def test_views_into_a_store_travel_on(self, ray: Any, large: RouteTable) -> None:
        table = ray.get(ray.put(large))
        buffers: list[pickle.PickleBuffer] = []
        pickle.dumps(table, protocol=5, buffer_callback=buffers.append)
        assert len(buffers) == 2
        assert_same_table(RouteTable.decode(table.encode()), large)
