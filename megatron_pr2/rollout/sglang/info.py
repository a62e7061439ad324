"""Which SGLang servers can be used: checks of what a server reports of itself, before anything is asked of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.refusals import refusals
from megatron_pr2.rollout.sglang.wire import parse_release

logger = logging.getLogger(__name__)

TESTED_RELEASES = ((0, 5, 19), (0, 5, 23))
# Before this, routes on CPU are silently wrong under the overlap scheduler (measured with 0.5.12 and 0.5.15), and nobody has looked
# at GPUs. There is no switch to go on regardless: a server whose routes nobody checked is what this package exists to prevent.
FIRST_RELEASE = TESTED_RELEASES[0]


def release_text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))


TESTED = " and ".join(map(release_text, TESTED_RELEASES))


def check_server_info(info: Mapping[str, Any], where: str) -> None:
    """Refuses a server whose routes would be absent or wrong, or that cannot be given weights; warns of the untested.

    Args:
        info: response of /server_info.
        where: names the server in errors.

    Raises:
        RolloutError: says which setting of the server is in the way.
    """
    check_release(info.get("version"), where)
    if not info.get("enable_return_routed_experts"):
        raise RolloutError(f"{where} does not return routes; start it with --enable-return-routed-experts")
    refused = refusals(info)
    if refused:
        raise RolloutError(f"{where} cannot be used with {'; and with '.join(refused)}")


def check_release(version: Any, where: str) -> None:
    """Warns of untested releases of SGLang.

    Raises:
        RolloutError: the routes of this release are known to be wrong.
    """
    release = parse_release(version, where)[:3]
    if release < FIRST_RELEASE:
        raise RolloutError(
            f"{where} runs SGLang {version}: releases before {release_text(FIRST_RELEASE)} are known to return wrong routes "
            f"without an error; upgrade it (tested: {TESTED})"
        )
    if release not in TESTED_RELEASES:
        logger.warning("%s runs SGLang %s; tested with %s", where, version, TESTED)


def weight_group_size(info: Mapping[str, Any], where: str) -> int:
    """Ranks of the weight update group: this process and the server's tensor-parallel ranks, DP attention's included.

    Raises:
        RolloutError: the server does not report how many it has.
    """
    try:
        return 1 + int(info["tp_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise RolloutError(f"{where} reports tp_size={info.get('tp_size')!r}, expected a number of ranks") from error
