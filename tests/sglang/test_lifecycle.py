"""Own servers from start to end: failed starts, a server that dies in the middle, a trainer that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.child_process import PARENT_VARIABLE
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.python import package_environment
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.sglang.conftest import SHAPE, TinyModel, ensure_alive, own_server
from tests.sglang.test_engine import assert_matches, make_requests

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("preloaded")]


def group_members(pgid: int) -> dict[int, str]:
    """Command lines of the living processes of a process group, zombies left out."""
    members = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == pgid and state not in "ZX":
                    members[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it ended while we were looking
                continue
    return members


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("victim", ["sglang::scheduler", "sglang.cpu.launch"])
def test_engine_dies_mid_batch_and_is_restarted(
    engine: SGLangEngine, tiny: TinyModel, victim: str, request: pytest.FixtureRequest
) -> None:
    merged = tiny.merged_gates(seed=11)
    engine.update_weights(merged.items(), 7)
    requests, sampling = make_requests(64, seed=9), SamplingParams(256)
    before = engine.generate(requests[:4], SamplingParams(16), return_routes=True).responses
    assert engine.replicas[0].server is not None
    assert engine.replicas[0].server.pid is not None
    members = group_members(engine.replicas[0].server.pid)
    pid = next(pid for pid, command in members.items() if victim in command)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(
        RolloutError, match=r"request \d+ of 64 .*engine died: SGLang server was killed by signal 9.* Last lines of"
    ) as dead:
        engine.generate(requests, sampling, return_routes=True)
    killer.join()
    if victim == "sglang::scheduler":
        assert "crashed with exit code -9" in str(dead.value)
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in members), 30)
    with pytest.raises(RolloutError, match="SGLang server"):
        ensure_alive(engine)
    with pytest.raises(RolloutError, match=r"no engine is left: .*engine died"):
        engine.generate(requests[:4], sampling, return_routes=True)

    engine.restart()
    with pytest.raises(RolloutError, match=r"restarted and does not hold.*call update_weights\(\)"):
        engine.generate(requests[:4], SamplingParams(16), return_routes=True)
    engine.update_weights(merged.items(), 7)
    after = engine.generate(requests[:4], SamplingParams(16), return_routes=True).responses
    assert [r.response_ids for r in after] == [r.response_ids for r in before]
    assert_matches(after, tiny, merged)


@pytest.mark.parametrize("victim", ["sglang::scheduler", "sglang.cpu.launch"])
def test_engine_dies_in_the_middle_of_a_push(engine: SGLangEngine, tiny: TinyModel, victim: str) -> None:
    from safetensors.torch import load_file

    weights = load_file(f"{tiny.path}/model.safetensors")
    assert engine.replicas[0].server is not None
    assert engine.replicas[0].server.pid is not None
    pid = next(pid for pid, command in group_members(engine.replicas[0].server.pid).items() if victim in command)

    def exporter() -> Iterator[tuple[str, torch.Tensor]]:
        for index, item in enumerate(weights.items()):
            if index == len(weights) // 2:  # some buckets have gone
                os.kill(pid, signal.SIGKILL)
            yield item

    with pytest.raises(RolloutError, match=r"weight update: .*engine died: SGLang server was killed by signal 9"):
        engine.update_weights(exporter(), 9)
    engine.restart()
    engine.update_weights(weights.items(), 9)
    responses = engine.generate(make_requests(2), SamplingParams(4), return_routes=True).responses
    assert_matches(responses, tiny)


def test_start_with_a_broken_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    engine = SGLangEngine(own_server(str(tmp_path), tmp_path / "log"), SHAPE)
    with pytest.raises(RolloutError, match=r"(?s)SGLang server (ended with code|was killed by signal).*Last lines of .*Error"):
        engine.start()
    assert engine.replicas[0].server is not None
    assert engine.replicas[0].server.pid is None
    engine.close()


def test_engine_that_is_killed_while_it_starts(tiny: TinyModel, tmp_path: Path) -> None:
    engine = SGLangEngine(own_server(tiny.path, tmp_path / "log"), SHAPE)
    server = engine.replicas[0].server
    assert isinstance(server, SGLangServer)

    def kill() -> None:
        assert wait_for(lambda: server.pid is not None, 30)
        time.sleep(1.0)
        assert server.pid is not None
        os.killpg(server.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RolloutError, match="SGLang server was killed by signal 9"):
        engine.start()
    killer.join()
    assert server.pid is None
    engine.close()


def test_start_that_takes_too_long(tiny: TinyModel, tmp_path: Path) -> None:
    server = SGLangServer(own_server(tiny.path, tmp_path / "log", start_timeout_s=0.5))
    pids: list[int] = []
    describe = server.describe_log
    server.describe_log = lambda *args: pids.append(server.pid or 0) or describe(*args)  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(RolloutError, match=r"not healthy 0.5 s after its start"):
        server.start()
    assert len(pids) == 1
    assert pids[0] > 0
    assert wait_for(lambda: not group_members(pids[0]), 30)  # killed, but perhaps not gone yet


TRAINER = """
import sys, threading
from megatron_pr2.rollout.sglang.python import package_environment
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.sglang.conftest import own_server
server = SGLangServer(own_server(sys.argv[1], sys.argv[2]))
# As a framework would: from a thread that is not the main one.
threading.Thread(target=server.start).start()
while server.pid is None:
    pass
print(server.pid, flush=True)
threading.Event().wait()
"""


def test_server_dies_with_a_trainer_that_is_killed(tiny: TinyModel, tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, tiny.path, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    try:
        assert trainer.stdout is not None
        pgid = int(trainer.stdout.readline())
        assert wait_for(lambda: any("sglang::scheduler" in c for c in group_members(pgid).values()), 500)
        assert len(group_members(pgid)) >= 3
    finally:
        trainer.kill()
        trainer.wait()
    survivors = {} if wait_for(lambda: not group_members(pgid), 20) else group_members(pgid)
    if survivors:
        os.killpg(pgid, signal.SIGKILL)
    assert not survivors


def test_a_launcher_whose_trainer_is_already_gone_does_not_start(sglang_python: str, tiny: TinyModel) -> None:
    done = subprocess.run(
        [sglang_python, "-m", "megatron_pr2.rollout.sglang.cpu.launch", "--model-path", tiny.path],
        env=package_environment(os.environ | {PARENT_VARIABLE: "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "is gone" in done.stderr
