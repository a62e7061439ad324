"""The micro-batches that verl is going to make of a batch, and which token lies in which of their rows.

verl cuts a batch inside its forward_backward_batch. The cut depends on lengths and settings only, so calling verl's own function
beforehand gives the same one. A column of row numbers is added to the batch, by which each micro-batch is recognised when it runs,
and a cut that differs is refused. Padding comes from verl's own functions as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils as tu
from verl.workers.engine.utils import prepare_micro_batches

from megatron_pr2.errors import ReplayError
from megatron_pr2.integrations.verl.batch import LIVE
from megatron_pr2.replay.micro_batch import MicroBatch

ROW_KEY = "pr2_row"
# What prepare_micro_batches reads besides the tokens.
_CUT_KEYS = ("use_dynamic_bsz", "sp_size", "force_group_size", "max_token_len_per_gpu", "micro_batch_size_per_gpu")


def number_rows(data: Any) -> None:
    """Adds the column that :func:`rows_of` reads."""
    data[ROW_KEY] = torch.arange(len(data), dtype=torch.int64)


def rows_of(batch: Any) -> tuple[int, ...]:
    """The rows of the whole batch that a micro-batch is made of; ReplayError if the column is not there."""
    rows = batch.get(ROW_KEY, None)
    if rows is None:
        raise ReplayError(f"a micro-batch has no column {ROW_KEY!r}: it is not cut from the batch that this pass was opened for")
    return tuple(rows.tolist())


def cut(data: Any, *, dp_group: Any, divided_by: int | None) -> list[Any]:
    """The micro-batches of numbered rows, without anything but tokens and numbers; collective over the data-parallel group.

    Args:
        dp_group: verl's data-parallel group.
        divided_by: the number of micro-batches is a multiple of it (virtual pipeline), or None.
    """
    light = TensorDict({"input_ids": data["input_ids"], ROW_KEY: data[ROW_KEY]}, batch_size=data.batch_size)
    for key in _CUT_KEYS:
        if key in data.keys():  # noqa: SIM118, a TensorDict is no mapping
            tu.assign_non_tensor_data(light, key, tu.get_non_tensor_data(data, key, None))
    parts, _ = prepare_micro_batches(
        data=light, dp_group=dp_group, num_batches_divided_by=divided_by, same_micro_num_in_dp=True, min_num_micro_batch=None
    )
    return list(parts)


def describe(
    part: Any, ids: Sequence[int], *, packed: bool, fp8: bool, pad_to_bucket: int | None, longest: int | None
) -> MicroBatch:
    """The micro-batch that the model sees; its key are its rows.

    Args:
        part: of :func:`cut`.
        ids: sequence id, or LIVE, of every row of the whole batch.
        packed: sequences on one token axis (`use_remove_padding`), else padded ones.
        fp8: with the alignment that FP8 needs.
        pad_to_bucket: the total is padded to a multiple of it, or None.
        longest: tokens of the longest sequence of all micro-batches, where verl pads all of them alike, or None.
    """
    rows = rows_of(part)
    input_ids = part["input_ids"]
    chosen = [ids[row] for row in rows]
    # To replay, a sequence that has no part in it is padding.
    lengths = [0 if sid == LIVE else int(n) for sid, n in zip(chosen, input_ids.offsets().diff().tolist(), strict=True)]
    if packed:
        _, params, _ = preprocess_thd_engine(input_ids, pre_process=False, use_fp8_padding=fp8, pad_to_length_bucket=pad_to_bucket)
        return MicroBatch.packed(chosen, lengths, params.cu_seqlens_q_padded.diff().tolist(), key=rows)
    tokens, _, _ = preprocess_bshd_engine(input_ids, use_fp8_padding=fp8, forced_max_seqlen=longest)
    return MicroBatch.padded(chosen, lengths, tokens.shape[1] * mpu.get_context_parallel_world_size(), key=rows)
