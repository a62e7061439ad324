"""`python -m megatron_pr2.rollout.sglang.cpu.launch <SGLang server flags>`: SGLang's server as a child of ours.

SGLang spawns its scheduler and detokenizer with multiprocessing's spawn, and a spawned child first imports the parent's main
module by name: so what stands at this module's top level runs in every SGLang process, before any of them imports SGLang.
With CUDA no CPU adapter is installed: this is SGLang's own server with one hook, routes by request id (../plugin.py).

This module and what it imports run in any environment that holds SGLang; nothing of the trainer's is needed there.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from megatron_pr2.rollout.sglang.child_process import die_with_parent

# That clients have to present; kept out of the command line and of every log record.
_API_KEY = os.environ.get("MEGATRON_PR2_SGLANG_API_KEY", "")


def _redact_api_key() -> None:
    """SGLang logs its arguments, key included, and replaces log handlers as it goes: so redact where records are made."""
    make_record = logging.getLogRecordFactory()

    def redacting(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if _API_KEY in text:
            record.msg, record.args = text.replace(_API_KEY, "<redacted>"), None
        return record

    logging.setLogRecordFactory(redacting)


def _prepare_process() -> None:
    """What every SGLang process needs before it imports SGLang."""
    import torch

    from megatron_pr2.rollout.sglang import plugin as sglang_plugin

    if _API_KEY:
        _redact_api_key()
    if not torch.cuda.is_available():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        # A CUDA build of torch brings NCCL, which ranks of a CPU engine would try to use; one that cannot be loaded is left alone.
        os.environ["SGLANG_NCCL_SO_PATH"] = os.devnull
        from megatron_pr2.rollout.sglang.cpu import plugin, shims

        shims.install()
        plugin.register()
    sglang_plugin.register()


def _refuse_what_breaks_routes(server_args: Any) -> None:
    """Ends the process if what SGLang resolved, its own choice of MoE runner included, would make routes wrong."""
    from megatron_pr2.rollout.sglang.refusals import refusals

    if not hasattr(server_args, "resolve_once"):
        return  # older than any release that is used: the client refuses it by its version
    # `run_server` resolves too, once; the record is final from here on.
    server_args.resolve_once()
    refused = refusals(server_args.resolved_dict())
    if refused:
        # One line each: the trainer shows the last lines of the log, cut at some length.
        sys.exit("\n".join(f"refused before the start (extra_flags, or SGLang's own choice): {each}" for each in refused))


def main(argv: list[str]) -> None:
    """Starts the server and serves until it is stopped."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(argv)
    server_args.api_key = _API_KEY or None
    _refuse_what_breaks_routes(server_args)
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    die_with_parent()  # first of all: the imports that follow take seconds
_prepare_process()
if __name__ == "__main__":
    main(sys.argv[1:])
