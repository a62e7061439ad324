"""Imported once by the fork server of helpers/distributed.py: every worker then starts with Megatron imported and the host on."""

from megatron_pr2 import host

host.enable()

import mbridge  # noqa: E402, F401
import megatron.core.distributed  # noqa: E402
import megatron.core.optimizer  # noqa: E402
import megatron.core.pipeline_parallel.schedules  # noqa: E402, F401
import transformers.modeling_utils  # noqa: E402, F401
