"""SGLang plugin: a request asks for its routes through its request id.

SGLang's router silently drops fields of /generate that it does not know, `return_routed_experts` among them, while `rid` arrives as
it was sent. So a client behind a router encodes the two fields in the request id, and this plugin, loaded inside the server,
sets them from it. A request with any other id is not changed.

SGLang loads it through the entry point group `sglang.srt.plugins` in every one of its processes, in every environment in which this
package is installed; so nothing is imported here but the standard library. A plugin that fails is only logged by SGLang.
`GenerateReqInput.normalize_batch_and_arguments` is the first thing that SGLang (0.5.19 and 0.5.23) does with a generation request.
"""

from __future__ import annotations

import logging
import re
from typing import Any

logger = logging.getLogger(__name__)

HOOK_TARGET = "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"

# SGLang aborts every request whose id *starts with* the id that was named. The third dot ends an id and none comes before it
# but the first two, so no id of this form is the beginning of another; the letters before the first dot keep it apart from SGLang's
# own ids (32 hexadecimal digits, HEALTH_CHECK_...).
_UNIQUE = re.compile(r"[0-9A-Za-z_-]{1,200}", re.ASCII)
_RID = re.compile(r"pr2\.[0-9A-Za-z_-]{1,200}\.(?:x|r(0|[1-9][0-9]{0,9}))\.", re.ASCII)
_MAX_START = 10**10 - 1

_registered = False


def encode_rid(unique: str, start_len: int | None) -> str:
    """The request id that asks for routes from row `start_len` on (SGLang's routed_experts_start_len), or for none with None."""
    if not isinstance(unique, str) or _UNIQUE.fullmatch(unique) is None:
        raise ValueError(f"request id {unique!r}: expected 1 to 200 characters out of 0-9 A-Z a-z _ -")
    if start_len is None:
        return f"pr2.{unique}.x."
    if isinstance(start_len, bool) or not isinstance(start_len, int) or not 0 <= start_len <= _MAX_START:
        raise ValueError(f"request id {unique}: start_len={start_len!r}, expected an integer in [0, {_MAX_START}] or None")
    return f"pr2.{unique}.r{start_len}."


def decode_rid(rid: object) -> int | None:
    """The row that the routes shall start from, or None if this id asks for none, is no string, or only looks similar."""
    match = _RID.fullmatch(rid) if isinstance(rid, str) else None
    start = match.group(1) if match is not None else None
    return None if start is None else int(start)


def request_routes(obj: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE `GenerateReqInput.normalize_batch_and_arguments`: sets the two fields of `obj` if its id asks for routes.

    A list of ids (a batch) is left alone: its items share one pair of fields, and no router sends one.
    """
    start = decode_rid(getattr(obj, "rid", None))
    if start is not None:
        obj.return_routed_experts = True
        obj.routed_experts_start_len = start


def register() -> None:
    """Registers the hook with SGLang's HookRegistry, once per process; the function that the entry point names."""
    global _registered
    if _registered:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(HOOK_TARGET, request_routes, HookType.BEFORE)
    _registered = True
    logger.info("megatron_pr2: routes can be asked for through the request id")
