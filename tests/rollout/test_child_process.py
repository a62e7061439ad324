"""A child process of ours ends when it is told to, when its parent ends, and takes its own children with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.child_process import ChildProcess, log_tail

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def wait_until(condition: object, timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_end_is_described_with_the_log_and_without_secrets(tmp_path: Path) -> None:
    script = r"print('\x1b[31mkey sk-123\x1b[0m', 'leak of nothing', sep='\n', flush=True); raise SystemExit(3)"
    child = ChildProcess("toy server", log_path=tmp_path / "log", secrets=["sk-123"], noise=["leak of"])
    assert "was not started" in child.describe_end()
    child.spawn([sys.executable, "-c", script], environment())
    assert child.wait(30)
    assert not child.alive()
    assert child.describe_end() == f"toy server ended with code 3. Last lines of {tmp_path / 'log'}:\nkey <redacted>"
    child.stop()


def test_stop_ends_a_process_that_ignores_sigterm_and_its_children(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen({SLEEP!r}).pid, flush=True)
        time.sleep(300)
    """)
    child = ChildProcess("toy server", log_path=tmp_path / "log")
    child.spawn([sys.executable, "-c", script], environment())
    assert wait_until(lambda: log_tail(tmp_path / "log", 1))
    grandchild = int(log_tail(tmp_path / "log", 1))
    pid = child.pid
    assert pid is not None
    assert running(pid)
    assert running(grandchild)
    child.stop(grace_s=0.3)
    assert not child.alive()
    assert wait_until(lambda: not running(pid) and not running(grandchild))
    child.stop()


def test_children_are_swept_when_the_leader_is_killed(tmp_path: Path) -> None:
    script = f"import subprocess, time; print(subprocess.Popen({SLEEP!r}).pid, flush=True); time.sleep(300)"
    child = ChildProcess("toy server", log_path=tmp_path / "log")
    child.spawn([sys.executable, "-c", script], environment())
    assert wait_until(lambda: log_tail(tmp_path / "log", 1))
    grandchild = int(log_tail(tmp_path / "log", 1))
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30)
    assert "was killed by signal 9" in child.describe_end()
    assert wait_until(lambda: not running(grandchild))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_child_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    served = (
        "from megatron_pr2.rollout.sglang.child_process import die_with_parent; die_with_parent(); "
        "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
    )
    parent = textwrap.dedent(f"""
        import os, sys, time
        from megatron_pr2.rollout.sglang.child_process import ChildProcess
        ChildProcess("toy server", log_path={str(tmp_path / "log")!r}).spawn([sys.executable, "-c", {served!r}], os.environ)
        time.sleep(300)
    """)
    with subprocess.Popen([sys.executable, "-c", parent], env=environment()) as process:
        assert wait_until(lambda: log_tail(tmp_path / "log", 1))
        child = int(log_tail(tmp_path / "log", 1))
        assert running(child)
        process.kill()
    assert wait_until(lambda: not running(child))


def test_what_cannot_be_started_is_named(tmp_path: Path) -> None:
    child = ChildProcess("toy server", log_path=tmp_path / "log")
    with pytest.raises(RolloutError, match=r"could not start toy server \(/no/such/binary a .*No such file"):
        child.spawn(["/no/such/binary", "a"], environment())
    assert not child.alive()


def test_second_start_is_refused_and_the_temporary_log_goes() -> None:
    child = ChildProcess("toy server")
    child.spawn(SLEEP, environment())
    try:
        with pytest.raises(RolloutError, match="already runs"):
            child.spawn(SLEEP, environment())
        log = child.log_path
        assert log is not None
        assert log.exists()
    finally:
        child.stop()
    child.remove_log()
    assert not log.exists()
    assert child.log_path is None
