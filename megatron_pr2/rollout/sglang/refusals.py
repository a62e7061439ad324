"""Settings of an SGLang server under which its routes or weight versions would be wrong without an error.

One list for three moments: before an own server is spawned (from the flags that it is given), in the server's process after
SGLang has resolved what it chooses itself and before it loads a weight (cpu/launch.py), and after connecting to any server
(from /server_info). Imports nothing beyond the standard library and this package's errors, because it runs in environments that
hold SGLang alone. Read in the sources of 0.5.19 and 0.5.23; the files named below are under sglang/srt/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# layers/moe/topk.py, TopK.forward_cuda: with TRITON_KERNEL and BYPASSED outputs the kernel chooses the experts, which never come to
# `capture_routed_experts_if_allowed`. flashinfer_trtllm_routed takes finished ids, and so do all runners that are not named here.
RUNNERS_PAST_CAPTURE = ("flashinfer_trtllm", "experimental_sgl_trtllm", "flashinfer_mxfp4", "triton_kernel")


@dataclass(frozen=True)
class _Rule:
    """One setting, by SGLang's name of it: which values are refused, why, and what to use instead."""

    name: str
    refused: Callable[[Any], bool]
    reason: str
    remedy: str


def _number(value: Any) -> int:
    """The value as a number; 1, which no rule refuses, if it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 1


def _above_one(value: Any) -> bool:
    return _number(value) > 1


def _named(value: Any) -> bool:
    """Whether an option that is off by default is on; SGLang writes "null" for PD disaggregation that is off."""
    return value not in (None, False, "", "null", "none", "None")


_RULES = (
    _Rule(
        "moe_runner_backend",
        lambda value: value in RUNNERS_PAST_CAPTURE,
        "its kernel chooses the experts itself, past the place where SGLang records them, so that routes are stale or zero",
        "--moe-runner-backend triton, or flashinfer_trtllm_routed instead of flashinfer_trtllm",
    ),
    _Rule(
        # state_capturer/routed_experts.py: "FIXME: spec decoding's num_verify_tokens is still not accounted for".
        "speculative_algorithm",
        _named,
        "SGLang's recording buffer is not sized for the tokens that speculative decoding verifies",
        "no --speculative-algorithm",
    ),
    _Rule(
        # state_capturer: one buffer per process, filled by the layers of that process; nothing gathers them over stages.
        "pp_size",
        _above_one,
        "each pipeline stage records its own layers only, so that routes of the others are zero, and weights cannot be pushed",
        "tensor and expert parallelism, --pp-size 1",
    ),
    _Rule(
        # state_capturer/base.py: capture() writes rows [0, batch), and both halves of the batch begin at row 0.
        "enable_two_batch_overlap",
        bool,
        "both halves of a batch are recorded in the same rows",
        "no --enable-two-batch-overlap",
    ),
    *(
        _Rule(
            # state_capturer/base.py: routes lie in a host buffer by slot of the KV cache; they do not move with the slot.
            name,
            bool,
            "routes are kept by slot of the KV cache and do not move with a prefix that is offloaded and loaded again",
            f"no --{name.replace('_', '-')}",
        )
        for name in ("enable_hierarchical_cache", "enable_lmcache", "enable_flexkv")
    ),
    _Rule(
        # 0.5.19's disaggregation/ never collects routes; in 0.5.23 prefill and decode would each return their own part.
        "disaggregation_mode",
        _named,
        "prefill and decode run in different servers, and neither holds the routes of all tokens",
        "no --disaggregation-mode",
    ),
    _Rule(
        # state_capturer/routed_experts.py: the buffer holds max(chunked_prefill_size, max_running_requests) rows.
        "chunked_prefill_size",
        lambda value: _number(value) <= 0,
        "the recording buffer is as long as a prefill chunk, and without chunks a long prompt kills the scheduler",
        "a positive --chunked-prefill-size",
    ),
    _Rule(
        # managers/tokenizer_control_mixin.py: `_update_weight_version_if_provided` sets it in the process that took the request.
        "tokenizer_worker_num",
        _above_one,
        "each tokenizer process keeps its own weight version, and only one of them receives a weight update",
        "--tokenizer-worker-num 1",
    ),
)
_ALIASES = {"pipeline_parallel_size": "pp_size", "data_parallel_size": "dp_size"}


def refusals(settings: Mapping[str, Any]) -> list[str]:
    """What is refused of a server's settings, each with its reason and remedy; empty if nothing is.

    Args:
        settings: by SGLang's names, e.g. {"moe_runner_backend": "triton"}; absent ones are taken for harmless.
    """
    found = [
        f"{rule.name}={settings[rule.name]}: {rule.reason}; use {rule.remedy}"
        for rule in _RULES
        if rule.name in settings and settings[rule.name] is not None and rule.refused(settings[rule.name])
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
    settings: dict[str, Any] = {}
    for index, flag in enumerate(flags):
        if not flag.startswith("--"):
            continue
        name, assigned, value = flag[2:].partition("=")
        following = flags[index + 1] if index + 1 < len(flags) else "--"
        key = name.replace("-", "_")
        settings[_ALIASES.get(key, key)] = value if assigned else True if following.startswith("--") else following
    return settings
