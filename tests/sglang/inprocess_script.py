"""Run by test_push_inprocess.py as a main module without a guard: whoever imports it again leaves a line behind."""

import json
import logging
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

model_path, other_path, out = sys.argv[1:4]
with open(f"{out}/imports", "a") as imports:
    imports.write(f"{__name__}\n")

from safetensors.torch import load_file  # noqa: E402

from megatron_pr2.errors import RolloutError  # noqa: E402
from megatron_pr2.rollout.sglang_inprocess import InProcessServer, TensorSender  # noqa: E402
from megatron_pr2.rollout.sglang_push import PushSession  # noqa: E402
from tests.sglang.conftest import own_server  # noqa: E402

IDS = [5, 17, 99, 200, 3, 44, 71, 128, 250, 9, 33, 64]


@dataclass
class Result:
    served: list = field(default_factory=list)
    changed: list = field(default_factory=list)
    refused: str = ""
    died: str = ""
    left: list = field(default_factory=list)
    bystander: bool = False


def surroundings() -> dict:
    root = logging.getLogger()
    return {
        "environment": {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"},
        "start method": mp.get_start_method(allow_none=True),
        "main": sys.modules["__main__"].__name__,
        "handlers": [id(handler) for handler in root.handlers],
        "level": root.level,
    }


def serve(http) -> dict:
    payload = {
        "input_ids": IDS,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "return_routed_experts": True,
    }
    http.run(http.body("POST", "/flush_cache", {}, where="test"))
    meta = http.run(http.json("POST", "/generate", payload, where="test"))["meta_info"]
    return {
        "routes": meta["routed_experts"],
        "logprobs": [entry[0] for entry in meta["input_token_logprobs"][1:]],
        "version": meta["weight_version"],
    }


logging.basicConfig(filename=f"{out}/log")
before, quit_before = surroundings(), signal.getsignal(signal.SIGQUIT)
result = Result()
config = own_server(model_path, Path(out) / "unused", weight_bucket_bytes=64 << 10)
server = InProcessServer(config)
settings = {"concurrency": 8, "timeout_s": 120.0, "retries": 0, "backoff_s": 0.1, "why_dead": server.why_dead}


def push(weights, label: str) -> None:
    session = PushSession(http)
    session.begin()
    try:
        TensorSender(server, config.weight_bucket_bytes).push(weights)
    except RolloutError:
        session.abandon()
        raise
    session.finish(label, flush_cache=True)


stranger = subprocess.Popen(["sleep", "600"])  # a child of this process that is not SGLang's
server.start()
after = surroundings()
result.changed = [name for name in before if before[name] != after[name]]
http = server.client(**settings)
result.served.append(serve(http))
push(load_file(f"{other_path}/model.safetensors").items(), "1")
result.served.append(serve(http))
try:
    TensorSender(server, 64 << 10).push(load_file(f"{model_path}/model.safetensors").items())
except RolloutError as error:  # no session
    result.refused = str(error)
push(load_file(f"{model_path}/model.safetensors").items(), "2")
result.served.append(serve(http))

# A scheduler that dies must cost neither this process nor the request's time-out.
long = {"input_ids": IDS, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
request = http.submit(http.json("POST", "/generate", long, where="long"))
time.sleep(1.0)
victim = next(process for process in server._processes if "scheduler" in process.name.lower() or process is server._processes[0])
os.kill(victim.pid, signal.SIGKILL)
try:
    request.result(60)
except RolloutError as error:
    result.died = str(error)
time.sleep(2.0)  # SGLang's own watchdog would have ended this process by now
http.close()
pids = [process.pid for process in server._processes]
server.stop()
server.stop()
result.left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
result.bystander = stranger.poll() is None
if signal.getsignal(signal.SIGQUIT) is not quit_before:
    result.changed.append("SIGQUIT")

server.start()  # once more, in the same process
http = server.client(**settings)
result.served.append(serve(http))
http.close()
server.stop()
stranger.kill()
stranger.wait()
Path(f"{out}/result.json").write_text(json.dumps(asdict(result)))
