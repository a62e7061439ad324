"""Scatter of routes against a broadcast of the whole table: bytes received per rank and time, in one run.

Both end when every rank holds the slice that its routers replay: its tokens x its MoE layers x top-k. The broadcast is of the same
compact table, one sequence after the other; `--int32` adds one of the 4-byte ids that engines return. Prints a table, then one line
of JSON.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_pr2.parallel.grid import TokenGrid, packed
from megatron_pr2.parallel.replica import Member, RankGroup
from megatron_pr2.routes.scatter import scatter_tables, slice_tables
from megatron_pr2.routes.table import RouteTable

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One measurement: tensor x context x pipeline ranks and a table of tokens x layers x top-k."""

    tensor: int
    context: int
    pipeline: int
    tokens: int
    layers: int
    topk: int
    experts: int
    sequence: int
    rows: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.context * self.pipeline

    def members(self) -> tuple[Member, ...]:
        """Tensor fastest, then context, then pipeline; stages of neighbouring layers."""
        stages = np.array_split(np.arange(self.layers), self.pipeline)
        return tuple(
            Member(c, t, tuple(stages[p].tolist()), (t, c, p) == (0, 0, 0))
            for p in range(self.pipeline)
            for c in range(self.context)
            for t in range(self.tensor)
        )

    def grids(self) -> list[TokenGrid]:
        """Micro-batches of packed sequences."""
        count = self.tokens // self.sequence
        per = max(1, self.rows // self.sequence)
        return [packed(list(range(i, min(i + per, count))), [self.sequence] * min(per, count - i)) for i in range(0, count, per)]


def random_tables(case: Case) -> dict[int, RouteTable]:
    """Valid routes; which experts they name does not matter to a transfer."""
    rng = np.random.default_rng(0)
    shape = (case.sequence, case.layers, case.topk)
    base = np.arange(case.topk, dtype=np.int64)
    tables = {}
    for sid in range(case.tokens // case.sequence):
        start = rng.integers(0, case.experts, size=(*shape[:2], 1))
        tables[sid] = RouteTable.from_ids((start + base) % case.experts, case.experts)
    return tables


def scattered(
    case: Case, group: RankGroup, tables: dict[int, RouteTable], grids: list[TokenGrid]
) -> tuple[list[torch.Tensor], int]:
    """What PR2 does."""
    slices = scatter_tables(group, grids, tables, case.topk, case.experts, CPU)
    return [each.ids_TLK() for each in slices], sum(each.received_bytes for each in slices)


def broadcast(
    case: Case, group: RankGroup, tables: dict[int, RouteTable], grids: list[TokenGrid], int32: bool
) -> tuple[list[torch.Tensor], int]:
    """What is usually done: every rank receives every table and cuts its slice out of it."""
    received: dict[int, RouteTable] = {}
    total = 0
    valid = np.ones(case.sequence, dtype=bool)
    dtype = torch.int32 if int32 else torch.uint8 if case.experts <= 256 else torch.int16
    for sid in range(case.tokens // case.sequence):
        if group.me == group.owner:
            experts = tables[sid].experts
            whole = torch.from_numpy(experts.view(np.int16) if experts.dtype == np.uint16 else experts).to(dtype)
        else:
            whole = torch.empty(case.sequence, case.layers, case.topk, dtype=dtype)
            total += whole.nbytes
        dist.broadcast(whole, src=group.owner, group=group.handle)
        ids = whole.numpy().astype(np.uint8 if case.experts <= 256 else np.uint16, copy=False)
        received[sid] = RouteTable.checked(ids, valid, case.experts)
    columns = group.members[group.me].columns
    slices = [slice_tables(group.rows(grid), received, columns, case.topk, case.experts, CPU).ids_TLK() for grid in grids]
    return slices, total


def worker(rank: int, store: str, cases: list[Case], repeats: int, int32: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    size = cases[0].ranks
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    for case in cases:
        group = RankGroup(dist.group.WORLD, case.members(), rank, case.context, case.tensor)
        tables = random_tables(case) if rank == group.owner else {}
        given = case, group, tables, case.grids()
        ways: dict[str, Callable[[], tuple[list[torch.Tensor], int]]] = {
            "scatter": partial(scattered, *given),
            "broadcast": partial(broadcast, *given, False),
        }
        if int32:
            ways["broadcast_int32"] = partial(broadcast, *given, True)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        received: dict[str, int] = {}
        results: dict[str, list[torch.Tensor]] = {}
        for repeat in range(repeats + 1):
            # Alternating, so that a noisy moment hits all of them; the first round warms up.
            for way, run in ways.items():
                dist.barrier()
                started = time.perf_counter()
                results[way], received[way] = run()
                dist.barrier()
                if repeat:
                    seconds[way].append(time.perf_counter() - started)
        same = all(
            all(torch.equal(a, b) for a, b in zip(results["scatter"], other, strict=True)) for other in results.values()
        )
        shares: list[Any] = [None] * size
        dist.all_gather_object(shares, (received, same))
        if rank == 0:
            pipe.send(
                {
                    **asdict(case),
                    "ranks": size,
                    "table_bytes": sum(table.experts.nbytes for table in tables.values()),
                    "identical": all(ok for _, ok in shares),
                    "received_bytes": {way: max(share[way] for share, _ in shares) for way in ways},
                    "seconds": {way: statistics.median(times) for way, times in seconds.items()},
                }
            )
    dist.barrier()
    dist.destroy_process_group()


def measure(cases: list[Case], repeats: int, int32: bool) -> Iterator[dict[str, Any]]:
    """Runs the cases of one number of ranks in one set of processes."""
    context = mp.get_context("forkserver")
    # Imported once, not by every process.
    context.set_forkserver_preload(["megatron_pr2.routes.scatter"])
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=worker, args=(rank, str(Path(directory) / "store"), cases, repeats, int32, theirs))
            for rank in range(cases[0].ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            for _ in cases:
                yield ours.recv()
        finally:
            for process in processes:
                process.join(30)
                if process.is_alive():
                    process.kill()


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the largest case; halves and quarters are measured as well.")] = 65536,
    layers: Annotated[int, typer.Option(help="MoE layers (Qwen3-30B: 48).")] = 48,
    topk: Annotated[int, typer.Option(help="Experts per token (Qwen3-30B: 8).")] = 8,
    experts: Annotated[int, typer.Option(help="Routed experts (Qwen3-30B: 128).")] = 128,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    rows: Annotated[int, typer.Option(help="Tokens of a micro-batch.")] = 8192,
    max_ranks: Annotated[int, typer.Option(help="Largest number of processes: 2, 4 or 8.")] = 4,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 5,
    int32: Annotated[bool, typer.Option(help="Also broadcast 4-byte ids.")] = True,
) -> None:
    """Measures how the routes of a rollout batch reach the ranks that replay them, on gloo processes of this machine."""
    layouts = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
    by_ranks: dict[int, list[Case]] = {}
    for tp, cp, pp in layouts:
        if tp * cp * pp > max_ranks:
            continue
        # How it grows with tokens is measured in one layout per number of ranks.
        sizes = [tokens // 4, tokens // 2, tokens] if (tp, cp, pp) in ((2, 1, 1), (2, 1, 2), (2, 2, 2)) else [tokens]
        for size in sizes:
            case = Case(tp, cp, pp, max(size, sequence), layers, topk, experts, sequence, rows)
            by_ranks.setdefault(case.ranks, []).append(case)
    console = Console()
    total = sum(map(len, by_ranks.values()))
    found = (result for cases in by_ranks.values() for result in measure(cases, repeats, int32))
    results = list(track(found, total=total, description="measuring", console=Console(stderr=True)))
    table = Table("TP x CP x PP", "tokens", "way", "MiB received", "of the table", "ms", "time / broadcast")
    for result in results:
        for way, seconds in result["seconds"].items():
            got = result["received_bytes"][way]
            table.add_row(
                f"{result['tensor']} x {result['context']} x {result['pipeline']}",
                str(result["tokens"]),
                way,
                f"{got / 2**20:.2f}",
                f"{got / result['table_bytes']:.1%}",
                f"{seconds * 1e3:.1f}",
                f"{seconds / result['seconds']['broadcast']:.2f}",
            )
    console.print(table)
    print(json.dumps({"bench": "scatter", "repeats": repeats, "cases": results}))


if __name__ == "__main__":
    typer.run(main)
