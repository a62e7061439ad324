"""Which SGLang servers can be used: checks of what a server says of itself, before anything is asked of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang_wire import parse_release

logger = logging.getLogger(__name__)

TESTED_RELEASES = ((0, 5, 19), (0, 5, 23))
# Before this, routes on CPU are silently wrong under the overlap scheduler (measured with 0.5.12 and 0.5.15).
FIRST_GOOD_ON_CPU = (0, 5, 19)
# MoE runners that select experts inside a fused kernel, past the hook that records them.
_RUNNERS_PAST_CAPTURE = ("flashinfer_trtllm", "flashinfer_trtllm_routed", "triton_kernel")


def check_server_info(info: Mapping[str, Any], where: str) -> None:
    """Refuses a server whose routes would be absent or wrong, or that cannot be given weights; warns of the untested.

    Args:
        info: answer of /server_info.
        where: names the server in errors.

    Raises:
        RolloutError: says which setting of the server is in the way.
    """
    if not info.get("enable_return_routed_experts"):
        raise RolloutError(f"{where} does not return routes; start it with --enable-return-routed-experts")
    release = parse_release(info.get("version"), where)
    device = str(info.get("device"))
    if device == "cpu" and release < FIRST_GOOD_ON_CPU and not info.get("disable_overlap_schedule"):
        raise RolloutError(
            f"{where} runs SGLang {info.get('version')} on CPU, which returns wrong routes without an error; "
            f"use {'.'.join(map(str, FIRST_GOOD_ON_CPU))} or later, or start it with --disable-overlap-schedule"
        )
    if release[:3] not in TESTED_RELEASES:
        tested = " and ".join(".".join(map(str, r)) for r in TESTED_RELEASES)
        logger.warning("%s runs SGLang %s; tested with %s", where, info.get("version"), tested)
    runner = info.get("moe_runner_backend")
    if runner in _RUNNERS_PAST_CAPTURE:
        logger.warning(
            "%s uses moe_runner_backend=%s, which may bypass the recording of routes; the handshake decides", where, runner
        )
    weight_group_size(info, where)


def weight_group_size(info: Mapping[str, Any], where: str) -> int:
    """Ranks of the weight update group: this process and the server's tensor-parallel ranks.

    Raises:
        RolloutError: the server has data-parallel replicas or pipeline stages, for which SGLang has no such update.
    """
    sizes = {name: int(info.get(name) or 1) for name in ("tp_size", "pp_size", "dp_size")}
    if sizes["pp_size"] > 1 or (sizes["dp_size"] > 1 and not info.get("enable_dp_attention")):
        raise RolloutError(
            f"{where} runs with {', '.join(f'{name}={size}' for name, size in sizes.items())}; weights can be pushed to "
            "tensor-parallel servers only (DP attention included): start one server per replica"
        )
    return 1 + sizes["tp_size"]
