"""`python -m megatron_pr2.rollout.sglang.gateway.launch <settings as JSON>`: SGLang's router as a child of ours.

`python -m sglang_router.launch_router` imports SGLang, which fails on a CPU build of torch, and takes its API key from the
command line, which every user of the machine can read. The settings are fields of sglang_router's RouterArgs.
"""

from __future__ import annotations

import json
import os
import sys

from megatron_pr2.rollout.sglang.child_process import die_with_parent

# Key that clients have to present and that the router presents to its engines.
API_KEY_VARIABLE = "MEGATRON_PR2_ROUTER_API_KEY"


def main(argv: list[str]) -> None:
    """Serves until the process is told to stop."""
    from sglang_router.router import Router
    from sglang_router.router_args import RouterArgs

    arguments = RouterArgs(**json.loads(argv[0]), api_key=os.environ.pop(API_KEY_VARIABLE, None) or None)
    Router.from_args(arguments).start()


if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1:])
