"""What PR2 needs of Megatron-Core's router, looked for when it attaches: by what is there, not by a version number.

A release whose router routes otherwise, or a router that something in the process has patched, would silently replay nothing;
both are refused. A release that has everything, but is untested (megatron_pr2/releases.py), is attached to with a warning.
"""

from __future__ import annotations

import inspect
import logging

import torch
from megatron.core.package_info import __version__ as megatron_version
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from megatron_pr2.errors import AttachError
from megatron_pr2.releases import TRIED, is_tried

logger = logging.getLogger(__name__)

SELECTION = (
    "topk", "use_pre_softmax", "num_groups", "group_topk", "score_function", "expert_bias", "router_replay",
)  # fmt: skip
ROUTER_METHODS = ("__init__", "forward", "gating", "routing")


def check_release() -> None:
    """Megatron-Core's selection asks `router_replay` for its experts, and its router has the methods that PR2 extends.

    Warns on rank 0 of a release that was not tried.

    Raises:
        AttachError: it has not; naming what is absent.
    """
    have = inspect.signature(moe_utils.topk_routing_with_score_function).parameters
    absent = [f"topk_routing_with_score_function({name}=)" for name in SELECTION if name not in have]
    absent += [f"TopKRouter.{name}" for name in ROUTER_METHODS if not hasattr(TopKRouter, name)]
    if absent:
        raise AttachError(
            f"megatron-core {megatron_version} has no {', '.join(absent)}, through which routes are replayed; use one of the "
            f"releases that it was tried on: {', '.join(TRIED)}"
        )
    if not is_tried(megatron_version) and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning(
            "megatron-core %s has what replay needs, but was not tried; tried were %s", megatron_version, ", ".join(TRIED)
        )


def knows_score_function(name: str) -> bool:
    """Whether this release's selection routes by a score function: asked of the selection itself."""
    try:
        moe_utils.topk_routing_with_score_function(torch.zeros(1, 2), 1, score_function=name)
    except ValueError:
        return False
    return True


def check_unpatched() -> None:
    """Nobody has replaced methods of TopKRouter in this process.

    Raises:
        AttachError: naming the method and the module that replaced it.
    """
    for name in ROUTER_METHODS:
        # Of its globals, not its __module__, which functools.wraps copies from what it wraps.
        home = getattr(getattr(TopKRouter, name), "__globals__", {}).get("__name__", "megatron.core.")
        if not home.startswith(("megatron.core.", "torch.")):
            raise AttachError(
                f"TopKRouter.{name} was replaced by {home}: two replays would fight over one router; switch that one off before "
                "the model is built (verl: actor.megatron.router_replay.mode=disabled, on the reference as well)"
            )
