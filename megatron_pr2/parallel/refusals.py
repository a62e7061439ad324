"""Layouts that Megatron-Core refuses, somewhere between its configuration and the first training step, or computes wrongly.

All of them are refused here before anything is built, naming the settings that do not go together. Layers that do not fit their
stages are refused in `stages.py`, kinds of parallelism that an order lacks in `ranks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.ranks import ORDER

if TYPE_CHECKING:
    from megatron_pr2.parallel.layout import ParallelLayout


def check_positive(layout: ParallelLayout) -> None:
    """Every size is at least 1.

    Raises:
        ConfigError: naming the field.
    """
    names = (
        "num_layers", "tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor", "num_experts",
        "num_attention_heads", "num_query_groups",
    )  # fmt: skip
    for name in names:
        value = getattr(layout, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    if isinstance(layout.moe_layer_freq, int) and layout.moe_layer_freq < 1:
        raise ConfigError(f"moe_layer_freq={layout.moe_layer_freq}: expected at least 1, or a list of 0 and 1 per layer")


def check_sizes(layout: ParallelLayout) -> None:
    """The parallel sizes go together.

    Raises:
        ConfigError: a virtual pipeline without a pipeline, sequence parallelism without tensor parallelism, or a world that the
            experts do not divide.
    """
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size={layout.virtual_pipeline} with pipeline_model_parallel_size=1: only the stages "
            "of a pipeline can be interleaved; leave the former out, or raise the latter"
        )
    if layout.sequence_parallel and layout.tensor == 1:
        raise ConfigError(
            "sequence_parallel=True with tensor_model_parallel_size=1: there is nothing to share; set it to False"
        )
    if layout.world_size % layout.expert_model_size:
        raise ConfigError(
            f"world_size={layout.world_size} (tensor {layout.tensor} x context {layout.context} x data {layout.data} x pipeline "
            f"{layout.pipeline}) is not a multiple of expert_tensor_parallel_size={layout.expert_tensor} x "
            f"expert_model_parallel_size={layout.expert} x pipeline_model_parallel_size={layout.pipeline} = "
            f"{layout.expert_model_size}; lower the expert sizes, or add data parallelism"
        )


def check_order(layout: ParallelLayout) -> None:
    """Attention and experts agree on what a pipeline stage is.

    Raises:
        ConfigError: they do not, in this order of rank numbers.
    """
    if layout.pipeline == 1:
        return
    why = None
    if layout.ranks.strides["pp"] != layout.expert_ranks.strides["pp"]:
        why = "attention and experts would be in different pipeline-parallel groups"
    elif not layout.order.endswith("pp") and layout.expert_data != layout.data:
        why = f"data parallelism of attention ({layout.data}) and of experts ({layout.expert_data}) must then agree"
    if why:
        raise ConfigError(
            f"order={layout.order!r} with pipeline_model_parallel_size={layout.pipeline}, expert_model_parallel_size="
            f"{layout.expert}, expert_tensor_parallel_size={layout.expert_tensor}: {why}; put pp last, as in {ORDER!r}"
        )


def check_model(layout: ParallelLayout) -> None:
    """The model can be cut into these sizes; what the layout does not say about the model is not checked.

    Raises:
        ConfigError: heads, query groups or experts do not divide, MoE layers under tensor parallelism without sequence
            parallelism, or lost expert gradients (`check_expert_gradients`).
    """
    tensor = layout.tensor
    if layout.num_attention_heads is not None and layout.num_attention_heads % tensor:
        raise ConfigError(
            f"num_attention_heads={layout.num_attention_heads} is not a multiple of tensor_model_parallel_size={tensor}; "
            "lower the latter"
        )
    if (groups := layout.num_query_groups) is not None and groups % tensor and tensor % groups:
        raise ConfigError(
            f"num_query_groups={groups} is neither a multiple nor a divisor of tensor_model_parallel_size={tensor}; "
            "change the latter"
        )
    if layout.num_experts is None:
        if layout.expert > 1:
            raise ConfigError(
                f"expert_model_parallel_size={layout.expert} with num_moe_experts=None: there are no experts to share out; "
                "set the former to 1"
            )
        return
    if layout.num_experts % layout.expert:
        raise ConfigError(
            f"num_moe_experts={layout.num_experts} is not a multiple of expert_model_parallel_size={layout.expert}; "
            "lower the latter"
        )
    if tensor > 1 and not layout.sequence_parallel:
        raise ConfigError(
            f"tensor_model_parallel_size={tensor} with sequence_parallel=False: Megatron-Core does not train MoE layers like that; "
            "set sequence_parallel=True"
        )
    check_expert_gradients(layout)


def check_expert_gradients(layout: ParallelLayout) -> None:
    """Refuses the layouts in which Megatron-Core 0.16 computes wrong expert gradients without a word.

    With one expert-parallel rank it takes experts for sharded like everything else and reduces their gradients over the data x
    context parallel group. That is wrong unless this is the group that holds the copies of each share.

    Raises:
        ConfigError: it is not, because the experts' tensor-parallel size is another one, or because of the order of ranks.
    """
    if layout.expert > 1 or np.array_equal(layout.ranks.groups("dp", "cp"), layout.expert_ranks.groups("dp")):
        return
    sizes = (
        f"tensor_model_parallel_size={layout.tensor}, expert_tensor_parallel_size={layout.expert_tensor}, "
        f"expert_model_parallel_size=1, order={layout.order!r}: Megatron-Core would lose expert gradients; set "
        "expert_model_parallel_size above 1, or "
    )
    if layout.expert_tensor != layout.tensor:
        raise ConfigError(f"{sizes}expert_tensor_parallel_size to {layout.tensor}")
    raise ConfigError(f"{sizes}order to {ORDER!r}")
