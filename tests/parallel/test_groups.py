"""The process groups that PR2 makes for itself: as patient as Megatron-Core's, named, and gone after a failed attach()."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_pr2.errors import AttachError
from tests.helpers import toy
from tests.helpers.distributed import pool


def groups_job() -> dict[str, Any]:
    """Two failing attach() and one that works, on a rank of TP2 x PP2 whose groups wait for 7 minutes."""
    import torch.distributed as dist
    from megatron.core import parallel_state as mpu

    from megatron_pr2.attach import attach
    from megatron_pr2.drift import parts
    from megatron_pr2.parallel.replica import timeout_of

    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    mpu.initialize_model_parallel(**sizes, distributed_timeout_minutes=7)
    config = toy.toy_config(**sizes, pipeline_dtype=torch.float32, sequence_parallel=True)
    known = dist.distributed_c10d._world.pg_map

    def refuse(*_: Any, **__: Any) -> None:
        raise AttachError("not today")

    before, after_failures = len(known), []
    chunk = toy.ToyChunk(config, layers=[mpu.get_pipeline_model_parallel_rank() + 1])
    make, parts.TokenCheck = parts.TokenCheck, refuse
    for _ in range(2):
        with pytest.raises(AttachError, match="not today"):
            attach(chunk, toy.preset("r3"))
        after_failures.append(len(known) - before)
    parts.TokenCheck = make
    pr2 = attach(chunk, toy.preset("r3"))
    handle = pr2.replica.ranks.handle
    found = {
        "after_failures": after_failures,
        "attached": len(known) - before,
        "minutes": timeout_of(handle).total_seconds() / 60,
        "description": handle.group_desc,
    }
    pr2.detach()
    return {**found, "detached": len(known) - before}


def test_groups_wait_as_megatrons_do_and_go_with_the_handle_or_a_failure() -> None:
    for found in pool(4).run(groups_job):
        assert found == {
            "after_failures": [0, 0],
            "attached": 1,
            "minutes": 7.0,
            "description": "PR2_REPLICA_GROUP",
            "detached": 0,
        }
