"""A planned layout as the flags of Megatron-LM's training scripts, for pipelines that are not verl's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pr2.parallel.layout import CONFIG_NAMES, ParallelLayout
from megatron_pr2.plan.tokens import Workload

# TransformerConfig's names that Megatron-LM (megatron/training/arguments.py) calls otherwise; the rest is spelled with hyphens.
_RENAMED = {
    "virtual_pipeline_model_parallel_size": "num-virtual-stages-per-pipeline-rank",
    "fp8": "fp8-format",
    "num_layers_in_first_pipeline_stage": "decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "decoder-last-pipeline-num-layers",
}
_SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor", "sequence_parallel")
# Of a TransformerConfig, what shapes memory and speed on a cluster.
_TRANSFORMER = (
    "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout", "recompute_granularity", "recompute_method",
    "recompute_num_layers", "recompute_modules", "moe_token_dispatcher_type", "moe_router_dtype", "moe_router_load_balancing_type",
    "moe_router_bias_update_rate", "moe_grouped_gemm", "moe_permute_fusion", "fp8", "fp8_recipe",
    "moe_router_padding_for_quantization",
)  # fmt: skip


def megatron_lm_flags(
    layout: ParallelLayout, work: Workload, transformer: Mapping[str, Any], preset: str | None, pr2: Mapping[str, Any]
) -> list[str]:
    """Flags of the layout, the batch, `override_transformer_config` and PR2 (integrations/megatron_lm.py); a flag per entry.

    The model's own flags are not among them: they come with its checkpoint or its script.
    """
    given: dict[str, Any] = {
        **{CONFIG_NAMES[name]: getattr(layout, name) for name in _SIZES},
        "use_distributed_optimizer": True,
        "seq_length": work.seq,
        "micro_batch_size": work.micro_batch,
        "global_batch_size": work.batch // work.mini_steps,
        **{name: transformer.get(name) for name in _TRANSFORMER},
        "pr2_preset": preset,
        **{f"pr2_{name}": value for name, value in pr2.items()},
    }
    flags = []
    for name, value in given.items():
        flag = _RENAMED.get(name, name.replace("_", "-"))
        if value is True:
            flags.append(f"--{flag}")
        elif value is False and name.startswith("pr2_"):  # Megatron-LM's switches are off where they are absent
            flags.append(f"--no-{flag}")
        elif value is not None and value is not False:
            flags.append(f"--{flag} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return flags
