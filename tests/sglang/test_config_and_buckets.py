"""Settings that are refused, the server's command line and environment, and how weights are packed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pr2.errors import ConfigError
from megatron_pr2.rollout.sglang.child_process import log_tail
from megatron_pr2.rollout.sglang.config import SGLangConfig, server_environment
from megatron_pr2.rollout.sglang.push.distributed import buckets
from megatron_pr2.rollout.sglang.python import package_path
from megatron_pr2.rollout.sglang.refusals import parse_release
from megatron_pr2.rollout.sglang.server import LOG_NOISE, SGLangServer
from megatron_pr2.rollout.sglang.wire import parse_version


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of model_path"),
        ({"model_path": "m", "urls": ("http://127.0.0.1:1",)}, "exactly one of model_path"),
        ({"model_path": "m", "device": "tpu"}, "sglang.device='tpu'"),
        ({"model_path": "m", "weight_backend": "mpi"}, "sglang.weight_backend='mpi'"),
        ({"model_path": "m", "concurrency": 0}, "sglang.concurrency=0"),
        ({"model_path": "m", "request_timeout_s": -1.0}, "sglang.request_timeout_s=-1.0"),
        ({"model_path": "m", "concurrency": "64"}, "sglang.concurrency='64'"),
        ({"model_path": "m", "request_timeout_s": None}, "sglang.request_timeout_s=None"),
        ({"model_path": "m", "tp_size": True}, "sglang.tp_size=True"),
        ({"model_path": "m", "rerolls": None}, "sglang.rerolls=None"),
        ({"model_path": "m", "retries": -1}, "sglang.retries=-1"),
        ({"urls": ("http://127.0.0.1:1", "http://127.0.0.1:1")}, "named twice"),
        ({"urls": ("http://127.0.0.1:1",), "engines": 2}, "number of own servers"),
        ({"urls": ("http://127.0.0.1:1",), "push": "disk"}, "push='disk' is for own servers"),
        ({"model_path": "m", "push": "tensor"}, "expected one of distributed, disk"),
        ({"model_path": "m", "router": "http://example.org:1"}, "other hosts are not supported"),
        ({"model_path": "m", "interrupt": "retract"}, "expected one of abort, in_place"),
        ({"model_path": "m", "route_bytes": 0}, "a positive number"),
        ({"model_path": "m", "extra_flags": ("--host=0.0.0.0",)}, "--host is set by the engine"),
        ({"model_path": "m", "extra_flags": ("--api-key", "secret")}, "--api-key is set by the engine"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SGLangConfig(**fields)


def test_device_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert SGLangConfig(model_path="m").resolved_device() == "cpu"
    with pytest.raises(ConfigError, match="CUDA is not available"):
        SGLangConfig(model_path="m", device="cuda").resolved_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert SGLangConfig(model_path="m").resolved_device() == "cuda"
    with pytest.raises(ConfigError, match="CUDA is available"):
        SGLangConfig(model_path="m", device="cpu").resolved_device()


def test_api_key_comes_from_a_file_and_stays_off_the_command_line(tmp_path: Path) -> None:
    key = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        SGLangConfig(model_path="m", api_key_file=str(key)).read_api_key()
    key.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        SGLangConfig(model_path="m", api_key_file=str(key)).read_api_key()
    key.write_text("s3cret\n")
    server = SGLangServer(SGLangConfig(model_path="m", python=sys.executable, api_key_file=str(key)))
    assert server.api_key == "s3cret"
    assert not any("s3cret" in word for word in server.command(1))
    random = [SGLangServer(SGLangConfig(model_path="m")).api_key for _ in range(2)]
    assert random[0] != random[1]
    assert len(random[0]) >= 32


def test_command_line_on_cpu_and_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = SGLangConfig(model_path="m", python=sys.executable, extra_flags=("--chunked-prefill-size", "64"))
    command = SGLangServer(config).command(31)
    joined = " ".join(command)
    for part in ("--host 127.0.0.1 --port 31", "--device cpu", "torch_native", "--enable-return-routed-experts"):
        assert part in joined
    assert command[-2:] == ["--chunked-prefill-size", "64"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command = SGLangServer(SGLangConfig(model_path="m", python=sys.executable, max_total_tokens=None)).command(31)
    assert "torch_native" not in command
    assert "--max-total-tokens" not in command
    assert command[command.index("--device") + 1] == "cuda"


def test_environment_finds_this_package_and_hides_the_trainers_rendezvous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("MASTER_ADDR", "trainer")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    env = server_environment(SGLangConfig(model_path=str(tmp_path), env={"EXTRA": "1"}))
    assert env["PYTHONPATH"].split(os.pathsep) == [package_path(), "/somewhere"]
    assert not {"MASTER_ADDR", "RANK", "TORCHELASTIC_RUN_ID"} & set(env)
    assert (env["EXTRA"], env["HF_HUB_OFFLINE"], env["GLOO_SOCKET_IFNAME"]) == ("1", "1", "lo")
    assert "HF_HUB_OFFLINE" not in server_environment(SGLangConfig(model_path="org/model"))


def test_log_tail_leaves_out_noise_and_reads_the_end_only(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log, 3) == ""
    log.write_text("\n".join(["old"] * 100_000 + ["cause", "", "nanobind: leaked 4 instances!", ' - leaked type "x"', "w" * 900]))
    assert log_tail(log, 2, LOG_NOISE) == "cause\n" + "w" * 400


def test_versions() -> None:
    assert parse_release("0.5.23.post1", "x") == (0, 5, 23)
    assert parse_release("0.5.9rc1", "x") == (0, 5, 9)
    assert parse_release("0.5.9", "x") < parse_release("0.5.19", "x")
    assert (parse_version("12"), parse_version("default"), parse_version(None)) == (12, -1, -1)


def test_buckets_hold_every_byte_aligned_and_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [
        ("a", torch.randn(5, 3, generator=generator).to(torch.bfloat16)),
        ("b", torch.randn(7, generator=generator)),
        ("c", torch.randn(2, 3, generator=generator).T),  # not contiguous
        ("d", torch.randint(0, 99, (3,), dtype=torch.int8, generator=generator)),
        ("big", torch.randn(100, generator=generator)),
        ("scalar", torch.tensor(2.5, dtype=torch.float64)),
        ("grad", torch.randn(4, generator=generator, requires_grad=True)),
    ]
    packed = list(buckets(iter(weights), 96, torch.device("cpu")))
    assert all(b.flat.numel() <= 96 or b.names == ["big"] for b in packed)
    assert len(packed) >= 3
    found = {}
    for bucket in packed:
        offset = 0
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            torch_dtype = getattr(torch, dtype)
            assert offset % torch_dtype.itemsize == 0
            end = offset + torch.Size(shape).numel() * torch_dtype.itemsize
            found[name] = bucket.flat[offset:end].view(torch_dtype).reshape(shape)
            offset = end
        assert offset == bucket.flat.numel()
    assert set(found) == {name for name, _ in weights}
    for name, tensor in weights:
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
    assert list(buckets([], 96, torch.device("cpu"))) == []


def test_buckets_are_made_as_they_are_consumed() -> None:
    """A model is never held as a whole: nothing beyond the tensor that closes a bucket is asked for before it is taken."""
    taken = []

    def exporter():
        for index in range(10):
            taken.append(index)
            yield f"w{index}", torch.zeros(8)

    stream = buckets(exporter(), 64, torch.device("cpu"))
    next(stream)
    assert taken == [0, 1, 2]
