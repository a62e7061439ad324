"""Settings under which routes would be wrong are refused by name: in extra_flags, in the server's own process, on connecting."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.push.session import weight_group_size
from megatron_pr2.rollout.sglang.refusals import RUNNERS_PAST_CAPTURE, check_server_info, refusals, settings_from_flags
from megatron_pr2.rollout.sglang.server import SGLangServer
from tests.sglang.conftest import TinyModel, own_server
from tests.sglang.fake_server import FakeServer
from tests.sglang.preload import Preloaded
from tests.sglang.test_versions import interpreter_of_0519

# Flags, the setting that they mean, and a word of the reason.
REFUSED = [
    (("--moe-runner-backend", "flashinfer_trtllm"), "moe_runner_backend=flashinfer_trtllm", "chooses the experts itself"),
    (("--moe-runner-backend=experimental_sgl_trtllm",), "moe_runner_backend=experimental_sgl_trtllm", "chooses the experts itself"),
    (("--moe-runner-backend", "flashinfer_mxfp4"), "moe_runner_backend=flashinfer_mxfp4", "chooses the experts itself"),
    (("--moe-runner-backend", "triton_kernel"), "moe_runner_backend=triton_kernel", "chooses the experts itself"),
    (("--speculative-algorithm", "EAGLE"), "speculative_algorithm=EAGLE", "not sized"),
    (("--pp-size", "2"), "pp_size=2", "pipeline stage"),
    (("--pipeline-parallel-size", "4"), "pp_size=4", "pipeline stage"),
    (("--enable-two-batch-overlap",), "enable_two_batch_overlap=True", "same rows"),
    (("--enable-hierarchical-cache",), "enable_hierarchical_cache=True", "slot of the KV cache"),
    (("--enable-lmcache",), "enable_lmcache=True", "slot of the KV cache"),
    (("--enable-flexkv",), "enable_flexkv=True", "slot of the KV cache"),
    (("--disaggregation-mode", "prefill"), "disaggregation_mode=prefill", "different servers"),
    (("--chunked-prefill-size", "-1"), "chunked_prefill_size=-1", "kills the scheduler"),
    (("--chunked-prefill-size", "0"), "chunked_prefill_size=0", "kills the scheduler"),
    (("--tokenizer-worker-num", "4"), "tokenizer_worker_num=4", "weight version"),
    (("--dp-size", "2"), "dp_size=2", "replicas within one server"),
]
HARMLESS: list[dict[str, Any]] = [
    {},
    {"moe_runner_backend": "auto"},
    {"moe_runner_backend": "triton"},
    {"moe_runner_backend": "flashinfer_trtllm_routed"},
    {"moe_runner_backend": "deep_gemm"},
    {"speculative_algorithm": None},
    {"disaggregation_mode": "null"},
    {"chunked_prefill_size": 8192},
    {"chunked_prefill_size": None},
    {"dp_size": 2, "enable_dp_attention": True},
    {"pp_size": 1, "tokenizer_worker_num": 1, "enable_two_batch_overlap": False, "enable_hierarchical_cache": False},
]


@pytest.mark.parametrize(("flags", "setting", "reason"), REFUSED)
def test_refused_before_anything_is_started_and_on_connecting(flags: tuple[str, ...], setting: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=r"sglang\.extra_flags: ") as refused:
        SGLangServer(SGLangConfig(model_path="m", extra_flags=("--mem-fraction-static", "0.5", *flags)))
    assert all(words in str(refused.value) for words in (setting, reason, "; use "))
    name, _, value = setting.partition("=")
    typed: Any = True if value == "True" else int(value) if value.lstrip("-").isdigit() else value
    with pytest.raises(RolloutError, match=rf"^SGLang server X cannot be used with .*{reason}"):
        check_server_info(FakeServer().info | {name: typed}, "SGLang server X")


@pytest.mark.parametrize("settings", HARMLESS)
def test_harmless_settings_pass(settings: dict[str, Any]) -> None:
    assert refusals(settings) == []


def test_several_refusals_are_all_named() -> None:
    found = refusals({"pp_size": 2, "moe_runner_backend": "triton_kernel"})
    assert len(found) == 2
    assert {name.partition("=")[0] for name in found} == {"pp_size", "moe_runner_backend"}


def test_flags_are_read_as_sglang_reads_them() -> None:
    flags = ("--pp-size=2", "--enable-x", "--name", "value", "--last")
    assert settings_from_flags(flags) == {"pp_size": "2", "enable_x": True, "name": "value", "last": True}
    assert settings_from_flags(("--chunked-prefill-size", "-1")) == {"chunked_prefill_size": "-1"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("version", ["0.5.18", "0.5.12", "0.4.10.post2"])
def test_older_releases_are_refused(version: str, device: str) -> None:
    with pytest.raises(RolloutError, match=rf"runs SGLang {version}: .*0\.5\.19.*wrong routes without an error; upgrade"):
        check_server_info(FakeServer().info | {"version": version, "device": device}, "server")


@pytest.mark.parametrize(("version", "warned"), [("0.5.19", False), ("0.5.23.post1", False), ("0.5.21", True), ("0.7.0", True)])
def test_untested_releases_are_warned_of(version: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_server_info(FakeServer().info | {"version": version}, "server")
    assert ("tested with 0.5.19 and 0.5.23" in caplog.text) == warned


def test_the_weight_group_counts_the_ranks() -> None:
    assert weight_group_size({"tp_size": 4}, "server") == 5
    with pytest.raises(RolloutError, match="tp_size=None"):
        weight_group_size({}, "server")


@pytest.mark.sglang
@pytest.mark.parametrize("release", ["0.5.19", "0.5.23"])
def test_the_servers_own_process_refuses_what_sglang_resolved(
    preloaded: Preloaded, sglang_python: str, release: str, tiny: TinyModel, tmp_path: Path
) -> None:
    """An abbreviated flag, which the first check does not see, as it does not see what SGLang chooses by itself."""
    python = sglang_python if release == "0.5.23" else interpreter_of_0519()
    server = SGLangServer(own_server(tiny.path, tmp_path / "log", python=python, extra_flags=("--moe-runner-b", "triton_kernel")))
    with pytest.raises(RolloutError, match="SGLang server ended with code 1") as refused:
        server.start()
    last = str(refused.value).splitlines()[-1]
    assert "refused before the start" in last
    assert "moe_runner_backend=triton_kernel" in last


@pytest.mark.sglang
def test_the_names_are_those_of_this_release(preloaded: Preloaded, sglang_python: str) -> None:
    """A setting or runner that SGLang renames must not slip through under its new name."""
    code = """
from megatron_pr2.rollout.sglang import refusals as sglang_refusals
from sglang.srt.server_args import ServerArgs
from sglang.srt.layers.moe.utils import MoeRunnerBackend
import dataclasses
try:
    fields = {field.name for field in dataclasses.fields(ServerArgs)}
except TypeError:
    fields = set(ServerArgs.__annotations__) | set(ServerArgs.__struct_fields__)
print(sorted({rule[0] for rule in sglang_refusals._RULES} - fields))
print(sorted(set(sglang_refusals.RUNNERS_PAST_CAPTURE) - {backend.value for backend in MoeRunnerBackend}))
"""
    returned, output = preloaded.run(sglang_python, code, os.environ)
    assert returned == 0, output[-2000:]
    assert output.splitlines()[-2:] == ["[]", "[]"]
    assert len(RUNNERS_PAST_CAPTURE) == 4
