"""What is planned: some public models by name, any other from its Hugging Face config, and a layout of ranks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.layout import ParallelLayout
from megatron_pr2.parallel.ranks import ORDER


@dataclass(frozen=True)
class ModelSpec:
    """The sizes that routes, features and predictors depend on.

    Attributes:
        name: as the user gave it.
        num_layers: decoder layers, dense ones included, multi-token-prediction heads not.
        moe_layers: 0-based indices of those with routed experts.
        hidden: size of a router's input.
        experts, topk: routed experts, and how many of them a token takes.
        score_function: of the routers, as Megatron-Core names it.
        attention_heads, query_groups: decide which tensor-parallel sizes are refused; None where unknown.
        mtp_layers: multi-token-prediction heads of the checkpoint; they are not replayed and take no memory here.
    """

    name: str
    num_layers: int
    moe_layers: tuple[int, ...]
    hidden: int
    experts: int
    topk: int
    score_function: str = "softmax"
    attention_heads: int | None = None
    query_groups: int | None = None
    mtp_layers: int = 0

    @property
    def moe_layer_freq(self) -> list[int]:
        """Megatron-Core's `moe_layer_freq`: 1 for a MoE layer, 0 for a dense one."""
        return [int(layer in set(self.moe_layers)) for layer in range(self.num_layers)]

    @property
    def first_dense_layers(self) -> int:
        """Dense layers before the first MoE layer."""
        return self.moe_layers[0]


# https://huggingface.co/Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1 and deepseek-ai/DeepSeek-V3: their config.json.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "qwen3-30b-a3b", 48, tuple(range(48)), hidden=2048, experts=128, topk=8, attention_heads=32, query_groups=4
        ),
        ModelSpec("mixtral-8x7b", 32, tuple(range(32)), hidden=4096, experts=8, topk=2, attention_heads=32, query_groups=8),
        ModelSpec(
            "deepseek-v3", 61, tuple(range(3, 61)), hidden=7168, experts=256, topk=8, score_function="sigmoid",
            attention_heads=128, query_groups=128, mtp_layers=1,
        ),
    )
}  # fmt: skip


def load_spec(model: str) -> ModelSpec:
    """A built-in model by name, or one from a Hugging Face directory or config.json on this machine; nothing is downloaded.

    Raises:
        ConfigError: neither, or a model without routed experts.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"--model {model}: no such model; expected {', '.join(MODELS)}, or a directory with a Hugging Face config.json"
        )
    # Heavy, and needed for unknown models only.
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(file))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {file}: not a Hugging Face config that Transformers can read: {error}") from error
    try:
        return spec_of(model, config)
    except ConfigError as error:
        raise ConfigError(f"--model {file}: {error}") from None


def spec_of(name: str, hf_config: Any) -> ModelSpec:
    """The sizes of a Hugging Face config (Qwen MoE, Mixtral, DeepSeek, GLM MoE).

    Raises:
        ConfigError: the model has no routed experts, or no layer that uses them.
    """
    from megatron_pr2.hf.shape import model_shape

    shape = model_shape(hf_config)
    config = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    heads = getattr(config, "num_attention_heads", None)
    # Grouped sigmoid routing (DeepSeek-V3, GLM-4.5) does not always name its score function.
    sigmoid = config.model_type in ("deepseek_v3", "glm4_moe")
    return ModelSpec(
        name,
        shape.num_hidden_layers,
        shape.moe_layers,
        hidden=int(config.hidden_size),
        experts=shape.num_experts,
        topk=shape.topk,
        score_function=getattr(config, "scoring_func", None) or ("sigmoid" if sigmoid else "softmax"),
        attention_heads=heads,
        query_groups=getattr(config, "num_key_value_heads", None) or heads,
        mtp_layers=int(getattr(config, "num_nextn_predict_layers", None) or 0),
    )


def make_layout(
    model: ModelSpec,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    context: int = 1,
    data: int | None = None,
    world: int | None = None,
    expert_tensor: int | None = None,
    virtual_pipeline: int | None = None,
    sequence_parallel: bool | None = None,
    layers_in_first: int | None = None,
    layers_in_last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    pipeline_layout: str | None = None,
    order: str = ORDER,
) -> ParallelLayout:
    """The layout of a model under these sizes, refused with the words of the code that builds it.

    Args:
        data: data-parallel size; None for 1, or for what `world` leaves over.
        world: ranks in all; None for tensor x pipeline x context x data.
        sequence_parallel: None for tensor > 1.
        pipeline_layout: Megatron-Core's string; its multi-token-prediction heads are those of the model.

    Raises:
        ConfigError: sizes that are not positive or contradict each other, or a layout that Megatron-Core refuses or computes
            wrongly.
    """
    sizes = {"tp": tensor, "pp": pipeline, "ep": expert, "cp": context, "dp": data, "etp": expert_tensor, "world": world}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name}={size}: expected at least 1")
    model_size = tensor * pipeline * context
    if world is not None and data is not None and world != model_size * data:
        raise ConfigError(
            f"world={world} contradicts tp={tensor} x pp={pipeline} x cp={context} x dp={data} = {model_size * data}; give only "
            "one of world and dp"
        )
    heads = model.mtp_layers if pipeline_layout is not None and "m" in pipeline_layout else None
    # What ParallelLayout.of reads of a TransformerConfig, so that a plan and a run are refused by the same lines.
    config = SimpleNamespace(
        num_layers=model.num_layers,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        sequence_parallel=tensor > 1 if sequence_parallel is None else sequence_parallel,
        moe_layer_freq=model.moe_layer_freq,
        num_moe_experts=model.experts,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups,
        num_layers_in_first_pipeline_stage=layers_in_first,
        num_layers_in_last_pipeline_stage=layers_in_last,
        account_for_embedding_in_pipeline_split=account_for_embedding,
        account_for_loss_in_pipeline_split=account_for_loss,
        pipeline_model_parallel_layout=pipeline_layout,
        mtp_num_layers=heads,
    )
    return ParallelLayout.of(config, world_size=model_size * (data or 1) if world is None else world, order=order)
