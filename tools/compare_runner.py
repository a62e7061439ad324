"""Runs cells as processes: some at a time, each resumable, none left behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compare_grid import Cell
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from megatron_pr2.errors import ConfigError
from megatron_pr2.report import formats
from megatron_pr2.rl.preflight import examples_model

POLL_SECONDS = 0.3
# A cell that is asked to stop writes its report; one that does not within this time is killed, and loses nothing but time.
PATIENCE_SECONDS = 30.0

# One process per policy and not per cell: cells of one start from the same weights, and must not make them at the same time.
_WARM_START = "import sys; from megatron_pr2.rl.config import load_config; from megatron_pr2.rl import launch; "
_WARM_START += "launch.warm_start(load_config(sys.argv[1], sys.argv[2:]))"


@dataclass
class Job:
    """A process to run.

    Attributes:
        after: name of a job that has to succeed first.
        cell: None for a warm start.
    """

    name: str
    command: list[str]
    log: Path
    after: str | None = None
    cell: Cell | None = None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0


@dataclass
class Outcome:
    """What became of the jobs; `failed` maps names to a reason that says where to read more."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def jobs_of(cells: Sequence[Cell], config: Path, out: Path) -> list[Job]:
    """A job per cell, and one before them per warm start that they share."""
    warm_starts: dict[Path, Job] = {}
    jobs = []
    for cell in cells:
        after = None
        if cell.config.model.path is None:
            policy = examples_model(cell.config)
            command = [sys.executable, "-c", _WARM_START, str(config), *cell.settings]
            job = Job(f"warm start {policy.name}", command, out / "logs" / f"warm_start_{policy.name}.log")
            after = warm_starts.setdefault(policy, job).name
        command = [sys.executable, "-m", "megatron_pr2.cli", "train", "--config", str(config), *cell.settings]
        jobs.append(Job(cell.name, command, out / "logs" / f"{cell.name}.log", after, cell))
    return [*warm_starts.values(), *jobs]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Holds `out` for this process and the cells that inherit the descriptor: what an earlier run left behind still writes there.

    Raises:
        ConfigError: someone else holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"{out} is in use by another comparison, or by cells that a killed one left running (process ids so far: "
                f"{' '.join(file.read().split())}); wait for them or end them"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


class Runner:
    """Runs jobs in order, `slots` at a time; a context manager that ends what still runs when it is left, also by Ctrl-C."""

    def __init__(self, jobs: Sequence[Job], slots: int, lock: int, console: Console) -> None:
        self._waiting, self._slots, self._lock = list(jobs), slots, lock
        self._running: list[Job] = []
        self.outcome = Outcome()
        self._display = _Display(jobs, console)

    def __enter__(self) -> Runner:
        self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.stop()
        for job in self._running:
            _signal(job, signal.SIGINT)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for job in self._running:
            assert job.process is not None
            try:
                job.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            finally:
                _signal(job, signal.SIGKILL)  # whatever of its group outlived it, too
                job.process.wait()

    def run(self) -> Outcome:
        """Until nothing is left to do; a job whose predecessor failed fails with it."""
        while self._waiting or self._running:
            for job in [job for job in self._running if job.process is not None and job.process.poll() is not None]:
                self._settle(job)
            for job in [job for job in self._waiting if job.after in self.outcome.failed]:
                self._waiting.remove(job)
                self._fail(job, f"needs the {job.after}, which failed")
            while len(self._running) < self._slots and (job := self._next()) is not None:
                self._start(job)
            self._display.refresh(self._running)
            if self._running:
                time.sleep(POLL_SECONDS)
        return self.outcome

    def _next(self) -> Job | None:
        ready = (job for job in self._waiting if job.after is None or job.after in self.outcome.finished)
        job = next(ready, None)
        if job is not None:
            self._waiting.remove(job)
        return job

    def _start(self, job: Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
        with job.log.open("ab") as log:
            job.process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this program, which passes it on
                pass_fds=(self._lock,),
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
            )
        os.write(self._lock, f"{job.process.pid}\n".encode())
        job.started = time.monotonic()
        self._running.append(job)

    def _settle(self, job: Job) -> None:
        assert job.process is not None
        self._running.remove(job)
        code = job.process.returncode
        if code == 0 and (job.cell is None or job.cell.finished):
            self.outcome.finished.append(job.name)
            self._display.settled(job, "finished")
        else:
            self._fail(job, f"{_last_line(job.log) or 'no message'} (exit code {code}, log {job.log})")

    def _fail(self, job: Job, reason: str) -> None:
        self.outcome.failed[job.name] = reason
        self._display.settled(job, f"FAILED: {reason}")


class _Display:
    """Cells done, what runs, and the time left; plain lines where there is no terminal."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._console = console
        cells = [job.cell for job in jobs if job.cell is not None]
        self._cells, self._done = len(cells), 0
        self._base = {cell.name: cell.steps_done for cell in cells}
        self._left = {cell.name: max(0, cell.config.steps - cell.steps_done) for cell in cells}
        self._total = max(1, sum(self._left.values()))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console, disable=not console.is_terminal)
        self._overall = self._progress.add_task("cells", total=self._cells, note="")
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def start(self) -> None:
        self._started = time.monotonic()
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def refresh(self, running: Sequence[Job]) -> None:
        if not self._console.is_terminal:
            return
        for job in running:
            if job.name not in self._tasks:
                total = job.cell.config.steps if job.cell is not None else None
                self._tasks[job.name] = self._progress.add_task(f"  {job.name}", total=total, note="")
            if job.cell is not None:
                self._progress.update(self._tasks[job.name], completed=job.cell.steps_done)
        self._progress.update(self._overall, completed=self._done, note=self._eta(running))

    def settled(self, job: Job, how: str) -> None:
        if (task := self._tasks.pop(job.name, None)) is not None:
            self._progress.remove_task(task)
        if job.cell is not None:
            self._done += 1
            self._left[job.name] = 0
        elif how == "finished" and time.monotonic() - job.started < 15:
            return  # it was there already
        took = f" in {formats.duration(time.monotonic() - job.started)}" if job.started else ""
        line = f"{self._done}/{self._cells} {job.name}: {how}{took}{f'; {eta}' if (eta := self._eta(())) else ''}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, running: Sequence[Job]) -> str:
        left = dict(self._left)
        for job in running:
            if job.cell is not None:
                left[job.name] = max(0, job.cell.config.steps - job.cell.steps_done)
        remaining = sum(left.values())
        done = self._total - remaining
        if done <= 0 or not remaining:
            return ""
        return f"about {formats.duration((time.monotonic() - self._started) * remaining / done)} left"


def _signal(job: Job, number: signal.Signals) -> None:
    assert job.process is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.process.pid, number)


def _last_line(log: Path) -> str:
    """The last line that says something: an `error:` of ours, if there is one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1][:500]
