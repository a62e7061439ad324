"""SGLang servers that cannot be used: releases and settings under which routes or weight versions would be wrong without an error.

Settings are checked at three moments: before an own server is spawned (its flags), in its process once SGLang has resolved what it
chooses itself and before it loads a weight (cpu/launch.py), and after connecting to any server (/server_info). So this imports the
standard library and this package's errors only. Read in the sources of 0.5.19 and 0.5.23; files named below are under sglang/srt/.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_pr2.errors import RolloutError

logger = logging.getLogger(__name__)

TESTED_RELEASES = ((0, 5, 19), (0, 5, 23))
# Before this, routes on CPU are silently wrong under the overlap scheduler (measured with 0.5.12 and 0.5.15), and nobody has looked
# at GPUs. There is no switch to go on regardless: a server whose routes nobody checked is what this package exists to prevent.
FIRST_RELEASE = TESTED_RELEASES[0]
# layers/moe/topk.py, TopK.forward_cuda: with TRITON_KERNEL and BYPASSED outputs the kernel chooses the experts, which never come to
# `capture_routed_experts_if_allowed`. flashinfer_trtllm_routed takes finished ids, and so do all runners that are not named here.
RUNNERS_PAST_CAPTURE = ("flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4", "triton_kernel")


def release_text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


TESTED = " and ".join(map(release_text, TESTED_RELEASES))


def _number(value: Any) -> int:
    """The value as a number; 1, which no rule refuses, if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 1


def _above_one(value: Any) -> bool:
    return _number(value) > 1


def _enabled(value: Any) -> bool:
    """Whether an option that is off by default is on; SGLang writes "null" for PD disaggregation that is off."""
    return value not in (None, False, "", "null", "none", "None")


_OFFLOADED = "routes are kept by slot of the KV cache and do not move with a prefix that is offloaded and loaded again"
# Setting by SGLang's name, which values are refused, why, and what to use instead.
_RULES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (
    ("moe_runner_backend", lambda value: value in RUNNERS_PAST_CAPTURE,
     "its kernel chooses the experts itself, past the place where SGLang records them, so that routes are stale or zero",
     "--moe-runner-backend triton, or flashinfer_trtllm_routed instead of flashinfer_trtllm"),
    # state_capturer/routed_experts.py: "FIXME: spec decoding's num_verify_tokens is still not accounted for".
    ("speculative_algorithm", _enabled,
     "SGLang's recording buffer is not sized for the tokens that speculative decoding verifies", "no --speculative-algorithm"),
    # state_capturer: one buffer per process, filled by the layers of that process; nothing gathers them over stages.
    ("pp_size", _above_one,
     "each pipeline stage records its own layers only, so that routes of the others are zero, and weights cannot be pushed",
     "tensor and expert parallelism, --pp-size 1"),
    # state_capturer/base.py: capture() writes rows [0, batch), and both halves of the batch begin at row 0.
    ("enable_two_batch_overlap", bool, "both halves of a batch are recorded in the same rows", "no --enable-two-batch-overlap"),
    # state_capturer/base.py: routes lie in a host buffer by slot of the KV cache.
    ("enable_hierarchical_cache", bool, _OFFLOADED, "no --enable-hierarchical-cache"),
    ("enable_lmcache", bool, _OFFLOADED, "no --enable-lmcache"),
    ("enable_flexkv", bool, _OFFLOADED, "no --enable-flexkv"),
    # 0.5.19's disaggregation/ never collects routes; in 0.5.23 prefill and decode would each return their own part.
    ("disaggregation_mode", _enabled,
     "prefill and decode run in different servers, and neither holds the routes of all tokens", "no --disaggregation-mode"),
    # state_capturer/routed_experts.py: the buffer holds max(chunked_prefill_size, max_running_requests) rows.
    ("chunked_prefill_size", lambda value: _number(value) <= 0,
     "the recording buffer is as long as a prefill chunk, and without chunks a long prompt kills the scheduler",
     "a positive --chunked-prefill-size"),
    # managers/tokenizer_control_mixin.py: `_update_weight_version_if_provided` sets it in the process that took the request.
    ("tokenizer_worker_num", _above_one,
     "each tokenizer process keeps its own weight version, and only one of them receives a weight update",
     "--tokenizer-worker-num 1"),
)  # fmt: skip


def refusals(settings: Mapping[str, Any]) -> list[str]:
    """What is refused of a server's settings (SGLang's names; absent ones are harmless), each with its reason and remedy."""
    found = [
        f"{name}={settings[name]}: {reason}; use {remedy}"
        for name, refused, reason, remedy in _RULES
        if settings.get(name) is not None and refused(settings[name])
    ]
    if _above_one(settings.get("dp_size")) and not settings.get("enable_dp_attention"):
        found.append(
            f"dp_size={settings['dp_size']}: weights cannot be pushed to data-parallel replicas within one server; use one "
            "server per replica, or DP attention (--enable-dp-attention)"
        )
    return found


def settings_from_flags(flags: Sequence[str]) -> dict[str, Any]:
    """What command line flags say, by SGLang's names: --pp-size 2 and --pp-size=2 are {"pp_size": "2"}, a lone flag is True.

    SGLang also takes abbreviations; those are seen by the second check, in the server's own process.
    """
    aliases = {"pipeline_parallel_size": "pp_size", "data_parallel_size": "dp_size"}
    settings: dict[str, Any] = {}
    for flag, following in zip(flags, [*flags[1:], "--"], strict=False):
        if flag.startswith("--"):
            name, assigned, value = flag[2:].partition("=")
            key = name.replace("-", "_")
            settings[aliases.get(key, key)] = value if assigned else True if following.startswith("--") else following
    return settings


def parse_release(text: Any, where: str) -> tuple[int, ...]:
    """Leading numbers of a version, "0.5.23.post1" is (0, 5, 23); raises RolloutError, which names `where`, if there are none."""
    numbers = re.match(r"[0-9]+(?:\.[0-9]+)*", str(text))
    if numbers is None:
        raise RolloutError(f"{where} reports version {text!r}; expected numbers such as 0.5.23")
    return tuple(map(int, numbers[0].split(".")))


def check_release(version: Any, where: str) -> None:
    """Warns of untested releases of SGLang; raises RolloutError for one whose routes are known to be wrong."""
    release = parse_release(version, where)[:3]
    if release < FIRST_RELEASE:
        raise RolloutError(
            f"{where} runs SGLang {version}: releases before {release_text(FIRST_RELEASE)} are known to return wrong routes "
            f"without an error; upgrade it (tested: {TESTED})"
        )
    if release not in TESTED_RELEASES:
        logger.warning("%s runs SGLang %s; tested with %s", where, version, TESTED)


def check_server_info(info: Mapping[str, Any], where: str) -> None:
    """Raises RolloutError for a server whose /server_info says that its routes would be absent or wrong, or its weights fixed."""
    check_release(info.get("version"), where)
    if not info.get("enable_return_routed_experts"):
        raise RolloutError(f"{where} does not return routes; start it with --enable-return-routed-experts")
    if refused := refusals(info):
        raise RolloutError(f"{where} cannot be used with {'; and with '.join(refused)}")
