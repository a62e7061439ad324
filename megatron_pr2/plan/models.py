"""What is planned: some public models by name, any other from its Hugging Face config, and a layout of ranks for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.shape import ModelShape, model_shape
from megatron_pr2.parallel.layout import ParallelLayout, data_size
from megatron_pr2.plan.dense import DenseWeights, dense_weights


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ModelShape):
    """A model's shape and the sizes that features, predictors and layouts depend on.

    Attributes:
        name: as the user gave it.
        hidden: size of a router's input.
        score_function: of the routers, as Megatron-Core names it.
        attention_heads, query_groups: decide which tensor-parallel sizes are refused; None where unknown.
        mtp_layers: multi-token-prediction heads of the checkpoint; they are not replayed and take no memory here.
        dense: the weights that a look-ahead changes; None where unknown.
    """

    name: str
    hidden: int
    score_function: str = "softmax"
    attention_heads: int | None = None
    query_groups: int | None = None
    mtp_layers: int = 0
    dense: DenseWeights | None = None


# https://huggingface.co/Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1 and deepseek-ai/DeepSeek-V3: their config.json.
MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            48, tuple(range(48)), 128, 8, 151936, name="qwen3-30b-a3b", hidden=2048, attention_heads=32, query_groups=4,
            dense=DenseWeights(attention=18_874_368, whole=4352, mlp=37_748_736),
        ),
        ModelSpec(
            32, tuple(range(32)), 8, 2, 32000, name="mixtral-8x7b", hidden=4096, attention_heads=32, query_groups=8,
            dense=DenseWeights(attention=41_943_040, whole=8192, mlp=176_160_768),
        ),
        ModelSpec(
            61, tuple(range(3, 61)), 256, 8, 129280, name="deepseek-v3", hidden=7168, score_function="sigmoid",
            attention_heads=128, query_groups=128, mtp_layers=1,
            dense=DenseWeights(attention=171_966_464, whole=15_155_200, mlp=396_361_728, shared=44_040_192),
        ),
    )
}  # fmt: skip

# Options of `megatron-pr2 plan` and their names as arguments of make_layout.
LAYOUT_OPTIONS = {
    "tp": "tensor", "pp": "pipeline", "ep": "expert", "cp": "context", "dp": "data", "etp": "expert_tensor", "world": "world",
    "vpp": "virtual_pipeline", "sequence_parallel": "sequence_parallel", "first_stage": "layers_in_first",
    "last_stage": "layers_in_last", "count_embedding": "account_for_embedding", "count_loss": "account_for_loss",
    "pipeline_layout": "pipeline_layout",
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
        config = AutoConfig.from_pretrained(str(file)).get_text_config()
        shape = model_shape(config)
    except ConfigError as error:
        raise ConfigError(f"--model {file}: {error}") from None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {file}: not a Hugging Face config that Transformers can read: {error}") from error
    heads = getattr(config, "num_attention_heads", None)
    # Grouped sigmoid routing (DeepSeek-V3, GLM-4.5) does not always name its score function.
    sigmoid = config.model_type in ("deepseek_v3", "glm4_moe")
    return ModelSpec(
        **vars(shape),
        name=model,
        hidden=int(config.hidden_size),
        score_function=getattr(config, "scoring_func", None) or ("sigmoid" if sigmoid else "softmax"),
        attention_heads=heads,
        query_groups=getattr(config, "num_key_value_heads", None) or heads,
        mtp_layers=int(getattr(config, "num_nextn_predict_layers", None) or 0),
        dense=dense_weights(config),
    )


def make_layout(
    model: ModelSpec, *, data: int | None = None, world: int | None = None, pipeline_layout: str | None = None, **sizes: Any
) -> ParallelLayout:
    """The layout of a model under these sizes, refused with the same message as in training.

    Args:
        data: data-parallel size; None for 1, or for what `world` leaves over.
        world: ranks in all; None for tensor x pipeline x context x data.
        pipeline_layout: Megatron-Core's string; its multi-token-prediction heads are those of the model.
        sizes: other fields of ParallelLayout.

    Raises:
        ConfigError: sizes that are not positive or contradict each other, or a layout that Megatron-Core refuses or computes
            wrongly.
    """
    tp, pp, cp = (sizes.get(name, 1) for name in ("tensor", "pipeline", "context"))
    given = {**sizes, "data": data, "world": world}
    for option in ("tp", "pp", "ep", "cp", "dp", "etp", "world"):
        if (size := given.get(LAYOUT_OPTIONS[option])) is not None and size < 1:
            raise ConfigError(f"{option}={size}: expected at least 1")
    if world is not None and data is not None and world != tp * pp * cp * data:
        raise ConfigError(
            f"world={world} contradicts tp={tp} x pp={pp} x cp={cp} x dp={data} = {tp * pp * cp * data}; give only one of world "
            "and dp"
        )
    return ParallelLayout(
        num_layers=model.num_hidden_layers,
        moe_layer_freq=[int(layer in model.moe_layers) for layer in range(model.num_hidden_layers)],
        num_experts=model.num_experts,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups,
        data=(data or 1) if world is None else data_size(world, tp, pp, cp),
        pipeline_layout=pipeline_layout,
        mtp_num_layers=model.mtp_layers if pipeline_layout is not None and "m" in pipeline_layout else None,
        **sizes,
    )
