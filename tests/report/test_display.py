"""LiveDisplay: a table on a terminal, plain lines elsewhere, and a terminal that works afterwards."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from megatron_pr2.report.display import NOTICE, LiveDisplay, sparkline
from tests.report.synthetic import record, run

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def plain_console():
    return Console(file=io.StringIO(), width=40)


def terminal(width=100):
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=True, _environ={"TERM": "xterm"})


def test_one_plain_line_per_step_without_a_terminal():
    console = plain_console()
    with LiveDisplay(3, "pr2 [tiny]", console=console) as display:
        for entry in run(3):
            display.phase("rollout")
            display.phase("mini-step 1 of 4")
            display.update(entry)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "pr2 [tiny]: 3 steps"
    assert lines[1] == NOTICE
    assert lines[-1] == "finished after 3 of 3 steps"
    assert [line.split(" | ")[0] for line in lines[2:-1]] == ["step 0 (1/3)", "step 1 (2/3)", "step 2 (3/3)"]
    assert "\x1b" not in console.file.getvalue()


def test_plain_line_holds_the_numbers():
    console = plain_console()
    entry = record(7) | {"reward": 0.4125, "lift": 0.00312, "agreement": 0.9912, "tokens_per_second": 12345.6}
    entry |= {"clip_fraction": 0.0123, "policy_loss": -0.00301, "response_length": 7.94, "logprob_gap": {"mean": 1.04e-4}}
    entry |= {"routes": {"missing": 4}}
    with LiveDisplay(20, "t", start_step=7, console=console) as display:
        display.update(entry)
    line = console.file.getvalue().splitlines()[2]
    assert line.startswith(
        "step 7 (8/20) | reward 0.412 | length 7.9 | loss -0.0030 | clip 1.2% | agreement 99.12% | lift +0.31 | "
        "tok/s 12346 | gap 1.0e-04 | missing 4 | "
    )
    assert line.endswith(" left")


def test_beta_is_shown_where_a_run_holds_back():
    console = plain_console()
    with LiveDisplay(3, "t", console=console) as display:
        display.update(record(0) | {"hold_back": {"beta": [0.0, 0.25, None, 1.0]}})
        display.update(record(1))
    first, second = console.file.getvalue().splitlines()[2:4]
    assert "| missing 0 | beta 0.42 | " in first
    assert "beta" not in second
    for beta in ({}, {"hold_back": {"beta": [0.5]}}):
        console = terminal(80)
        with LiveDisplay(2000, "pr2", console=console) as display:
            display.update(
                record(1234) | {"response_length": 12345.6, "tokens_per_second": 123456.0, "policy_loss": -0.1234} | beta
            )
        text = console.file.getvalue()
        table = text[text.rindex("2000") :]
        assert ("beta" in table) == ("0.50" in table) == bool(beta)
        assert "…" not in text


def test_absent_values_read_as_dashes():
    console = plain_console()
    with LiveDisplay(2, "grpo", console=console) as display:
        display.update(record(0, preset="grpo"))
        display.update({"step": 1})
    first, second = console.file.getvalue().splitlines()[2:4]
    assert "agreement - | lift - |" in first
    assert "reward - | length - | loss - | clip - | agreement - | lift - | tok/s - | gap - | missing - " in second


def test_terminal_shows_table_phase_and_definitions():
    console = terminal()
    with LiveDisplay(5, "pr2 on tiny", console=console) as display:
        for entry in run(4):
            display.update(entry)
        display.phase("mini-step 2 of 4")
    text = console.file.getvalue()
    final = text[text.rindex("pr2 on tiny") :]
    for word in ("4/5", "mini-step 2 of 4", "tokens", "log-prob", "missing", "agreem.", "98.", "reward "):
        assert word in final
    assert "lift = agreement predicted - frozen" in " ".join(re.sub(r"\x1b\[[0-9;?]*\w", "", text).split())


def test_table_fits_80_columns():
    console = terminal(80)
    with LiveDisplay(2000, "pr2", console=console) as display:
        display.update(record(1234) | {"response_length": 12345.6, "tokens_per_second": 123456.0, "policy_loss": -0.1234})
    text = console.file.getvalue()
    assert "…" not in text
    assert "12345.6" in text
    assert "123456" in text


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_terminal_is_restored_on_exception(error):
    console = terminal()
    out, err, threads = sys.stdout, sys.stderr, set(threading.enumerate())
    with pytest.raises(error), LiveDisplay(5, "pr2", console=console) as display:  # noqa: PT012
        display.phase("rollout")
        refresher = set(threading.enumerate()) - threads
        assert len(refresher) == 1  # it was live
        raise error
    text = console.file.getvalue()
    assert text.count(HIDE) == text.count(SHOW) == 1
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert f"stopped during rollout: {error.__name__}" in text
    assert (sys.stdout, sys.stderr) == (out, err)
    (thread,) = refresher
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_plain_mode_says_what_stopped_it():
    console = plain_console()
    with pytest.raises(ValueError, match="boom"), LiveDisplay(5, "pr2", console=console) as display:  # noqa: PT012
        display.phase("push")
        raise ValueError("boom")
    assert console.file.getvalue().splitlines()[-1] == "stopped during push: ValueError after 0 of 5 steps"


SCRIPT = """
import time
from megatron_pr2.report.display import LiveDisplay
with LiveDisplay(5, "pr2") as display:
    display.phase("rollout")
    time.sleep(60)
"""


def test_ctrl_c_on_a_real_terminal_brings_the_cursor_back():
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
    )
    os.close(child)
    seen = b""
    try:
        while b"rollout" not in seen:
            seen += os.read(parent, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            try:
                data = os.read(parent, 4096)
            except OSError:  # Linux: the other side is closed
                break
            if not data:
                break
            seen += data
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
        os.close(parent)
    text = seen.decode(errors="replace")
    assert "KeyboardInterrupt" in text
    assert text.count(HIDE) == text.count(SHOW) == 1


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 20) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"
    assert sparkline([3, 3], 5) == "▁▁"
    assert sparkline([float("nan"), 1, 2], 5) == " ▁█"
    assert sparkline([], 5) == ""
    assert len(sparkline(range(1000), 40)) == 40
