"""tools/compare_methods.py: which cells there are, that finished ones stay, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from rich.console import Console

from megatron_pr2.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "compare_methods.py"
EXAMPLE = ROOT / "examples" / "compare.yaml"
SMALL = """
  config: settings.yaml
  steps: {steps}
  seeds: [3]
  overrides: [parallel.processes=1, parallel.expert=1]
"""


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/compare_grid.py, as the tool itself sees it."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import compare_grid

    return compare_grid


@pytest.fixture
def runner(grid: ModuleType) -> ModuleType:
    import compare_runner

    return compare_runner


def write_grid(folder: Path, groups: str, steps: int = 2, settings: str = "preset: pr2\n") -> Path:
    (folder / "settings.yaml").write_text(settings)
    (folder / "grid.yaml").write_text(f"full:{SMALL.format(steps=steps)}  groups:\n{groups}")
    return folder / "grid.yaml"


# ---- cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["full", "lookahead", "quick"])
def test_the_example_is_valid(grid: ModuleType, section: str, tmp_path: Path) -> None:
    cells = grid.expand(grid.read_grid(EXAMPLE, section), tmp_path)
    assert len({cell.name for cell in cells}) == len(cells) >= 20
    methods = {cell.method for cell in cells}
    assert {"r3", "pr2-post"} <= methods <= set(grid.METHODS)
    assert {cell.config.parallel.processes for cell in cells} == {1}
    assert len({cell.config.rollout.prompts * cell.config.steps for cell in cells}) == 1, "the same budget for all"

    def point(cell: Any) -> tuple[Any, ...]:
        return cell.group, cell.seed, cell.config.algorithm.mini_steps, cell.config.optimizer.lr

    with_r3 = {point(cell) for cell in cells if cell.method == "r3"}
    assert all(point(cell) in with_r3 for cell in cells), "without r3 beside it nobody could say whether a method is better"


def test_cells_share_the_warm_start_of_their_seed_and_sizes(grid: ModuleType, runner: ModuleType, tmp_path: Path) -> None:
    small = "{methods: [grpo, r3], mini_steps: [4], lr: [1.0e-4]}"
    large = "{methods: [r3], mini_steps: [4], lr: [1.0e-4], name: large, overrides: [model.sizes.num_experts=64]}"
    file = write_grid(tmp_path, f"    - {small}\n    - {large}\n")
    jobs = runner.jobs_of(grid.expand(grid.read_grid(file, "full"), tmp_path), tmp_path / "settings.yaml", tmp_path)
    starts = ["warm start seed_3", "warm start num_experts_64_seed_3"]
    assert [job.name for job in jobs if job.cell is None] == starts
    assert [job.after for job in jobs if job.cell is not None] == [starts[0], starts[0], starts[1]]
    assert len({job.log for job in jobs}) == len(jobs)


def test_every_method_is_what_its_name_says(grid: ModuleType, tmp_path: Path) -> None:
    file = write_grid(tmp_path, f"    - {{methods: [{', '.join(grid.METHODS)}], mini_steps: [4], lr: [1.0e-4]}}\n")
    configs = {cell.method: cell.config for cell in grid.expand(grid.read_grid(file, "full"), tmp_path)}
    assert list(configs) == list(grid.METHODS)
    cells = {name: config.replay() for name, config in configs.items()}
    assert [(cells[name].routes, cells[name].predictor) for name in ("grpo", "gspo", "r2", "r3")] == [
        ("live", "none"), ("live", "none"), ("actor", "none"), ("engine", "none"),
    ]  # fmt: skip
    assert {name: config.algorithm.loss for name, config in configs.items()} == dict.fromkeys(configs, "grpo") | {"gspo": "gspo"}
    for name, pr2 in cells.items():
        if name not in ("grpo", "gspo", "r2", "r3"):
            base, _, at = name.removesuffix("+hold").partition("@")
            assert pr2.routes == (at if at == "actor" else "engine")
            assert pr2.hold_back == (name.endswith("+hold") or base == "lookahead")
            assert pr2.predictor == {"pr2-post": "learned", "pr2-delta": "learned"}.get(base, base)
            assert pr2.target == ("delta" if base == "pr2-delta" else "post")


def test_cells_are_all_combinations_seed_by_seed(grid: ModuleType, tmp_path: Path) -> None:
    groups = """    - {methods: [r3, grpo], mini_steps: [2, 4], lr: [1.0e-4], seeds: [0, 1]}
    - {methods: [r3], mini_steps: [4], lr: [1e-4, 1.5e-3], seeds: [0]}
"""
    cells = grid.expand(grid.read_grid(write_grid(tmp_path, groups), "full"), tmp_path / "out", ["rollout.prompts=8"])
    assert [cell.name for cell in cells] == [
        "grpo_off2_lr1e-4_seed0", "r3_off2_lr1e-4_seed0", "grpo_off4_lr1e-4_seed0", "r3_off4_lr1e-4_seed0",
        "r3_off4_lr1.5e-3_seed0",
        "grpo_off2_lr1e-4_seed1", "r3_off2_lr1e-4_seed1", "grpo_off4_lr1e-4_seed1", "r3_off4_lr1e-4_seed1",
    ]  # fmt: skip
    fifth = cells[4]
    assert (fifth.config.optimizer.lr, fifth.config.algorithm.mini_steps, fifth.config.seed) == (1.5e-3, 4, 0)
    assert fifth.config.rollout.prompts == 8
    assert fifth.config.run == str(tmp_path / "out/cells/r3_off4_lr1.5e-3_seed0")


def test_a_group_with_overrides_needs_a_name_where_cells_would_collide(grid: ModuleType, tmp_path: Path) -> None:
    groups = """    - {{methods: [pr2-post], mini_steps: [4], lr: [1.0e-4]}}
    - {{methods: [pr2-post], mini_steps: [4], lr: [1.0e-4], overrides: [pr2.alpha=10.0]{name}}}
"""
    with pytest.raises(ConfigError, match="two groups have the cell pr2-post_off4_lr1e-4_seed3"):
        grid.expand(grid.read_grid(write_grid(tmp_path, groups.format(name="")), "full"), tmp_path)
    cells = grid.expand(grid.read_grid(write_grid(tmp_path, groups.format(name=", name: bold")), "full"), tmp_path)
    assert [(c.name, c.group, c.config.replay().alpha) for c in cells] == [
        ("pr2-post_off4_lr1e-4_seed3", "", 0.1),
        ("pr2-post_bold_off4_lr1e-4_seed3", "bold", 10.0),
    ]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("    - {methods: [r4], mini_steps: [4], lr: [1.0e-4]}\n", "method 'r4' is unknown; expected some of grpo, gspo, r2"),
        ("    - {methods: [r3], mini_steps: [3], lr: [1.0e-4]}\n", "cell r3_off3_lr1e-4_seed3: .*not a multiple"),
        ("    - {methods: [r3], mini_steps: 4, lr: [1.0e-4]}\n", r"groups\[0\].mini_steps=4: expected a list of integers"),
        ("    - {methods: [r3], mini_steps: [4]}\n", r"groups\[0\]: lr missing"),
        ("    - {methods: [r3], mini_steps: [4], lr: [1.0e-4], seed: 1}\n", r"unknown key\(s\) seed"),
        ("    - {methods: [r3], mini_steps: [4], lr: [1.0e-4], overrides: [learning_rate=1]}\n", "cell r3.*learning_rate"),
        ("    []\n", "expected a list of groups"),
    ],
)
def test_mistakes_are_told_before_anything_starts(grid: ModuleType, tmp_path: Path, groups: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid.expand(grid.read_grid(write_grid(tmp_path, groups), "full"), tmp_path)


def test_a_grid_that_cannot_be_read_is_told(grid: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        grid.read_grid(tmp_path / "none.yaml", "full")
    (tmp_path / "bad.yaml").write_text("full: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        grid.read_grid(tmp_path / "bad.yaml", "full")
    with pytest.raises(ConfigError, match="no section 'slow'"):
        grid.read_grid(EXAMPLE, "slow")


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    done = compare("--dry-run", "--out", str(tmp_path), "--methods", "r3", "--mini-steps", "3")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: cell r3_off3")
    axes = ["--methods", "r3,momentum", "--mini-steps", "2", "--seeds", "7", "--lr", "2e-4", "--steps", "9"]
    listed = compare("--dry-run", "--quick", "--out", str(tmp_path), *axes)
    assert listed.stdout.splitlines()[:2] == [f"{name}_off2_lr2e-4_seed7: 0 of 9 steps done" for name in ("r3", "momentum")]
    assert json.loads(listed.stdout.splitlines()[-1])["left"] == 2
    assert not list(tmp_path.iterdir())


# ---- processes -----------------------------------------------------------------------------------------------------------


def run_jobs(runner: ModuleType, folder: Path, commands: dict[str, tuple[str, str | None]], slots: int = 2) -> Any:
    """Runs Python snippets, name -> (code, name of its predecessor)."""
    jobs = [
        runner.Job(name, [sys.executable, "-c", code], folder / f"{name}.log", after) for name, (code, after) in commands.items()
    ]
    with runner.locked(folder) as lock, runner.Runner(jobs, slots, lock, Console(stderr=True)) as running:
        return running.run()


def test_a_failure_stops_what_needs_it_and_nothing_else(runner: ModuleType, tmp_path: Path) -> None:
    outcome = run_jobs(
        runner,
        tmp_path,
        {
            "bad": ("import sys; print('error: no luck'); print('bye'); sys.exit(3)", None),
            "good": ("print('fine')", None),
            "after-bad": ("open('never', 'w')", "bad"),
            "after-good": (f"open({str(tmp_path / 'made')!r}, 'w')", "good"),
        },
    )
    assert sorted(outcome.finished) == ["after-good", "good"]
    assert outcome.failed["bad"] == f"error: no luck (exit code 3, log {tmp_path / 'bad.log'})"
    assert outcome.failed["after-bad"] == "needs the bad, which failed"
    assert (tmp_path / "made").exists()


def test_what_runs_is_ended_with_its_children(runner: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a process that ignores Ctrl-C, and whatever it started."""
    monkeypatch.setattr(runner, "PATIENCE_SECONDS", 1.0)
    pids = tmp_path / "pids"
    stubborn = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n'); time.sleep(600)"
    )
    job = runner.Job("stubborn", [sys.executable, "-c", stubborn], tmp_path / "log")

    def interrupted(_: float) -> None:
        if pids.exists() and pids.read_text().endswith("\n"):
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.time, "sleep", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        runner.locked(tmp_path) as lock,
        runner.Runner([job], 1, lock, Console(stderr=True)) as running,
    ):
        running.run()
    monkeypatch.undo()
    for pid in map(int, pids.read_text().split()):
        wait_until(lambda pid=pid: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_directory_in_use_is_refused(runner: ModuleType, tmp_path: Path) -> None:
    """Also by a cell whose comparison was killed: it inherited the lock."""
    done = tmp_path / "done"
    waits = f"import os, time\nwhile not os.path.exists({str(done)!r}): time.sleep(0.02)"
    job = runner.Job("orphan", [sys.executable, "-c", waits], tmp_path / "log")
    with runner.locked(tmp_path) as lock:
        runner.Runner([job], 1, lock, Console(stderr=True))._start(job)
        with pytest.raises(ConfigError, match=f"is in use .*{os.getpid()} {job.process.pid}"), runner.locked(tmp_path):
            pass
    with pytest.raises(ConfigError, match="is in use"), runner.locked(tmp_path):
        pass
    done.touch()
    assert job.process.wait(timeout=60) == 0
    with runner.locked(tmp_path):
        pass


# ---- the whole ---------------------------------------------------------------------------------------------------------


def compare(*arguments: str, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=timeout, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def tiny_grid(folder: Path, checkpoint: Path, groups: str, steps: int) -> Path:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a in range(4) for b in range(4)))
    settings = f"""
model: {{path: {checkpoint}}}
data: {data}
checkpoint_every: 1
rollout: {{prompts: 4, responses: 4, max_new_tokens: 6}}
algorithm: {{micro_batch_size: 8}}
pr2: {{sample_fraction: 1.0}}
"""
    return write_grid(folder, groups, steps, settings)


@pytest.mark.exhaustive
def test_cells_are_run_once_and_a_broken_one_is_reported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    groups = """    - {methods: [r3, pr2-post], mini_steps: [2], lr: [1.0e-3]}
    - {methods: [r3], mini_steps: [2], lr: [2.0e-3], name: broken, overrides: ["rollout.environment=no_such_module:nothing"]}
"""
    out, file = tmp_path / "out", tiny_grid(tmp_path, tiny_checkpoint, groups, steps=2)
    arguments = ["--grid", str(file), "--out", str(out), "--jobs", "2", "--markdown", str(tmp_path / "results.md")]
    done = compare(*arguments)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["cells"], result["finished"]) == (3, 2)
    (reason,) = result["failed"].values()
    assert "no_such_module" in reason
    assert "failed: r3_broken_off2_lr2e-3_seed3: " in done.stderr
    for key in ("page", "cells_csv", "summary_csv", "markdown"):
        assert Path(result[key]).stat().st_size > 500
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert "missing: r3_broken_off2_lr2e-3_seed3" in page
    files = [out / "cells" / f"{name}_off2_lr1e-3_seed3" / "metrics.jsonl" for name in ("r3", "pr2-post")]
    before = [(path.stat().st_mtime_ns, path.read_bytes()) for path in files]

    file.write_text(file.read_text().split("    - {methods: [r3], ")[0])  # what failed is taken out of the grid
    again = compare(*arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["finished"] == 2
    assert [(path.stat().st_mtime_ns, path.read_bytes()) for path in files] == before
    assert len(list((out / "cells").iterdir())) == 2, "nothing was moved aside"

    other = compare(*arguments, "rollout.temperature=0.5")
    assert other.returncode == 1
    assert "holds a run with other settings (rollout.temperature)" in other.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_cell_is_continued(number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path) -> None:
    groups = "    - {methods: [pr2-post+hold], mini_steps: [2], lr: [1.0e-3]}\n"
    out, steps = tmp_path / "out", 30  # on a busy machine a signal takes its time
    arguments = ["--grid", str(tiny_grid(tmp_path, tiny_checkpoint, groups, steps)), "--out", str(out)]
    metrics = out / "cells" / "pr2-post+hold_off2_lr1e-3_seed3" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on" in errors
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, "a cell outlived its comparison"
    first = metrics.read_bytes().splitlines()
    assert 3 <= len(first) < steps, "the interruption came too late to test anything"

    done = compare(*arguments)
    assert done.returncode == 0, done.stderr
    lines = metrics.read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(steps))
    assert lines[: len(first) - 1] == first[:-1], "steps that were checkpointed are not done again"
