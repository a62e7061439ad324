"""`python -m megatron_pr2.rollout.sglang_cpu.launch <SGLang server flags>`: SGLang's server as a child of ours.

SGLang spawns its scheduler and detokenizer with multiprocessing's spawn, and a spawned child first imports the parent's main
module by name: so what stands at this module's top level runs in every SGLang process, before any of them imports SGLang.
With CUDA no adapter is installed and this is SGLang's own server.

Environment, set by :class:`megatron_pr2.rollout.sglang_server.SGLangServer`:
    MEGATRON_PR2_SGLANG_API_KEY   key that clients have to present; kept out of the command line and of every log record
    MEGATRON_PR2_SGLANG_PARENT    process id that this one must not outlive
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1
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

    if _API_KEY:
        _redact_api_key()
    if torch.cuda.is_available():
        return
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from megatron_pr2.rollout.sglang_cpu import plugin, shims

    shims.install()
    plugin.register()


def _die_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends (Linux)."""
    parent = os.environ.get("MEGATRON_PR2_SGLANG_PARENT")
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the request was in place
        sys.exit("the process that started this SGLang server is gone")


def main(argv: list[str]) -> None:
    """Starts the server and serves until it is stopped."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(argv)
    server_args.api_key = _API_KEY or None
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    _die_with_parent()  # first of all: the imports that follow take seconds
_prepare_process()
if __name__ == "__main__":
    main(sys.argv[1:])
