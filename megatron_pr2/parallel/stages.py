"""Which decoder layers each pipeline stage computes: Megatron-Core's rules as one pure function.

A stage holds one chunk of layers, or several under a virtual pipeline. Layers are numbered along the first chunk of every stage,
then along the second chunk of every stage, and so on; so the sizes of the chunks say everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.decoder_layers import DecoderLayers, pattern_segments

# [pipeline stage][virtual chunk] -> 0-based decoder layers, ascending.
Stages = tuple[tuple[tuple[int, ...], ...], ...]
LayoutRows = str | tuple[tuple[str, ...], ...]


def cut_layers(
    num_layers: int,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    *,
    in_first: int | None = None,
    in_last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    layout: LayoutRows | None = None,
    mtp_num_layers: int | None = None,
    hybrid_pattern: str | None = None,
) -> Stages:
    """Layers of every chunk of every stage.

    Args:
        num_layers: decoder layers of the model.
        pipeline: stages.
        virtual_pipeline: chunks per stage; None for one, or for what `layout` says.
        in_first, in_last: layers of the first and of the last stage (`num_layers_in_first_pipeline_stage`, `..._last_...`); the
            stages between them share the rest.
        account_for_embedding, account_for_loss: the embedding, the loss take the place of one layer
            (`account_for_embedding_in_pipeline_split`, `account_for_loss_in_pipeline_split`).
        layout: `pipeline_model_parallel_layout`, see `layout_rows`; says everything alone.
        mtp_num_layers: multi-token-prediction heads; they are no decoder layers, but a layout must place them.
        hybrid_pattern: `hybrid_layer_pattern` of a HybridModel, whose "|" say everything alone; without them its layers are shared
            out evenly, or as in_first and in_last say.

    Returns:
        [pipeline][virtual_pipeline or 1] tuples of 0-based layer indices; a chunk may be empty.

    Raises:
        ConfigError: settings with which Megatron-Core would refuse to build the model, or would silently build another one.
    """
    if hybrid_pattern is not None:
        if layout is not None or account_for_embedding or account_for_loss:
            raise ConfigError(
                f"hybrid_layer_pattern={hybrid_pattern!r} and pipeline_model_parallel_layout={layout!r}, "
                f"account_for_embedding_in_pipeline_split={account_for_embedding}, account_for_loss_in_pipeline_split="
                f"{account_for_loss}: HybridModel ignores the latter; cut the pattern into stages by '|'"
            )
        sizes = _pattern_sizes(num_layers, pipeline, virtual_pipeline, hybrid_pattern, in_first, in_last)
    elif layout is not None:
        if in_first is not None or in_last is not None or account_for_embedding or account_for_loss:
            raise ConfigError(
                f"pipeline_model_parallel_layout={layout!r} and num_layers_in_first_pipeline_stage={in_first}, "
                f"num_layers_in_last_pipeline_stage={in_last}, account_for_embedding_in_pipeline_split={account_for_embedding}, "
                f"account_for_loss_in_pipeline_split={account_for_loss}: the layout says everything alone; drop the others"
            )
        sizes = _layout_sizes(num_layers, pipeline, virtual_pipeline, layout, mtp_num_layers)
    elif in_first is not None or in_last is not None:
        if account_for_embedding or account_for_loss:
            raise ConfigError(
                f"num_layers_in_first_pipeline_stage={in_first}, num_layers_in_last_pipeline_stage={in_last} and "
                f"account_for_embedding_in_pipeline_split={account_for_embedding}, account_for_loss_in_pipeline_split="
                f"{account_for_loss}: Megatron-Core takes one or the other; count embedding and loss yourself, or drop the numbers"
            )
        sizes = _uneven_sizes(num_layers, pipeline, virtual_pipeline, in_first, in_last)
    else:
        sizes = _even_sizes(num_layers, pipeline, virtual_pipeline, account_for_embedding, account_for_loss)
    stages: list[list[tuple[int, ...]]] = [[] for _ in range(pipeline)]
    start = 0
    for chunk in range(len(sizes[0])):
        for stage in range(pipeline):
            stages[stage].append(tuple(range(start, start + sizes[stage][chunk])))
            start += sizes[stage][chunk]
    return tuple(tuple(chunks) for chunks in stages)


def layout_rows(layout: Any) -> LayoutRows | None:
    """A `pipeline_model_parallel_layout` in any of the forms that Megatron-Core takes, as a string or as tuples of layer names."""
    layout = getattr(layout, "input_data", layout)
    if layout is None or isinstance(layout, str):
        return layout
    return tuple(tuple(getattr(layer, "name", layer) for layer in row) for row in layout)


def layout_chunks(layout: LayoutRows, pipeline: int) -> int:
    """Chunks per stage that a layout asks for.

    Raises:
        ConfigError: it cannot be read, or its rows are not a multiple of the stages.
    """
    return _parse_layout(layout, pipeline).virtual_pipeline_model_parallel_size


def pattern_chunks(pattern: str, pipeline: int) -> int:
    """Chunks per stage that the pattern of a HybridModel asks for; 1 where it has no "|".

    Raises:
        ConfigError: its segments are not a multiple of the stages.
    """
    segments = len(pattern_segments(pattern))
    if segments == 1:
        return 1
    if segments % pipeline or pipeline == 1:
        raise ConfigError(
            f"hybrid_layer_pattern={pattern!r} has {segments} segments between '|', pipeline_model_parallel_size={pipeline}: "
            f"expected {'one' if pipeline == 1 else 'a multiple'}; Megatron-Core would refuse it, or build a part of it"
        )
    return segments // pipeline


def _pattern_sizes(
    num_layers: int, pipeline: int, virtual: int | None, pattern: str, in_first: int | None, in_last: int | None
) -> list[list[int]]:
    layers, segments = DecoderLayers.of_pattern(pattern), pattern_segments(pattern)
    if layers.count != num_layers:
        raise ConfigError(
            f"hybrid_layer_pattern={pattern!r} has {layers.count} layers, num_layers is {num_layers}; make them agree"
        )
    if len(segments) == 1:
        if virtual is not None and pipeline > 1:
            raise ConfigError(
                f"hybrid_layer_pattern={pattern!r} with virtual_pipeline_model_parallel_size={virtual}: only '|' in the pattern "
                f"cut it into chunks; expected {pipeline * virtual} segments between them"
            )
        if in_first is None and in_last is None:
            return _even_sizes(num_layers, pipeline, virtual, False, False)
        return _uneven_sizes(num_layers, pipeline, virtual, in_first, in_last)
    if in_first is not None or in_last is not None:
        raise ConfigError(
            f"hybrid_layer_pattern={pattern!r} and num_layers_in_first_pipeline_stage={in_first}, "
            f"num_layers_in_last_pipeline_stage={in_last}: its '|' say everything alone; drop the numbers"
        )
    chunks = pattern_chunks(pattern, pipeline)
    if chunks != (virtual or 1):
        raise ConfigError(
            f"hybrid_layer_pattern={pattern!r} has {chunks} chunks per stage for pipeline_model_parallel_size={pipeline}, but "
            f"virtual_pipeline_model_parallel_size={virtual}; make them agree"
        )
    return [[len(segments[chunk * pipeline + stage]) for chunk in range(chunks)] for stage in range(pipeline)]


def _even_sizes(num_layers: int, pipeline: int, virtual: int | None, embedding: bool, loss: bool) -> list[list[int]]:
    chunks = virtual or 1
    places = num_layers + embedding + loss
    if places % (pipeline * chunks):
        taken = "".join(
            f" + 1 ({name})"
            for name, on in (
                ("account_for_embedding_in_pipeline_split", embedding),
                ("account_for_loss_in_pipeline_split", loss),
            )
            if on
        )
        raise ConfigError(
            f"num_layers={num_layers}{taken} is not a multiple of {_product(pipeline, virtual)}; change one of them, or place the "
            "layers by num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage or pipeline_model_parallel_layout"
        )
    sizes = [[places // (pipeline * chunks)] * chunks for _ in range(pipeline)]
    sizes[0][0] -= embedding
    sizes[-1][-1] -= loss
    return sizes


def _uneven_sizes(
    num_layers: int, pipeline: int, virtual: int | None, in_first: int | None, in_last: int | None
) -> list[list[int]]:
    chunks = virtual or 1
    given = {"num_layers_in_first_pipeline_stage": in_first, "num_layers_in_last_pipeline_stage": in_last}
    named = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    for name, value in given.items():
        if value is not None and (value < 1 or value % chunks):
            raise ConfigError(
                f"{name}={value} with virtual_pipeline_model_parallel_size={virtual}: expected a positive multiple of {chunks}"
            )
    middle_stages = pipeline - sum(value is not None for value in given.values())
    middle_layers = num_layers - sum(value or 0 for value in given.values())
    if middle_stages < 0:
        raise ConfigError(
            f"{named} with pipeline_model_parallel_size={pipeline}: one stage cannot be both; Megatron-Core would build it without "
            f"{middle_layers} of the layers. Drop both"
        )
    if virtual is not None and not middle_stages and pipeline > 1:
        raise ConfigError(
            f"{named} with pipeline_model_parallel_size={pipeline} and virtual_pipeline_model_parallel_size={virtual}: "
            "Megatron-Core divides by the stages in between, and there is none; use pipeline_model_parallel_layout"
        )
    share = middle_stages * chunks
    if not middle_stages and middle_layers:
        raise ConfigError(
            f"{named} of num_layers={num_layers} leave {middle_layers} layers, and pipeline_model_parallel_size={pipeline} no "
            "stage for them; the numbers must add up to num_layers"
        )
    if middle_stages and (middle_layers < 1 or middle_layers % share):
        raise ConfigError(
            f"{named} of num_layers={num_layers} leave {middle_layers} layers for {middle_stages} of "
            f"{_product(pipeline, virtual)} stages; expected a positive multiple of {share}"
        )
    sizes = [[middle_layers // share if share else 0] * chunks for _ in range(pipeline)]
    if in_first is not None:
        sizes[0] = [in_first // chunks] * chunks
    if in_last is not None:
        sizes[-1] = [in_last // chunks] * chunks
    return sizes


def _parse_layout(layout: LayoutRows, pipeline: int) -> Any:
    # Megatron-Core's own reading of the format: there is no second one that could drift from it.
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    rows = layout if isinstance(layout, str) else [list(row) for row in layout]
    try:
        return PipelineParallelLayerLayout(rows, pipeline)
    except AssertionError as error:
        raise ConfigError(
            f"pipeline_model_parallel_layout={layout!r} with pipeline_model_parallel_size={pipeline}: {error}"
        ) from error


def _layout_sizes(
    num_layers: int, pipeline: int, virtual: int | None, layout: LayoutRows, mtp_num_layers: int | None
) -> list[list[int]]:
    parsed = _parse_layout(layout, pipeline)
    chunks: int = parsed.virtual_pipeline_model_parallel_size
    if virtual is not None and chunks != virtual:
        raise ConfigError(
            f"pipeline_model_parallel_layout={layout!r} has {chunks} chunks per stage for pipeline_model_parallel_size={pipeline}, "
            f"but virtual_pipeline_model_parallel_size={virtual}; make them agree, or leave the latter out"
        )
    try:
        parsed.validate_layer_layout(num_layers, mtp_num_layers)
    except (AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"pipeline_model_parallel_layout={layout!r} with num_layers={num_layers}, mtp_num_layers={mtp_num_layers}: {error}"
        ) from error
    return [[sum(layer.name == "decoder" for layer in chunk) for chunk in stage] for stage in parsed.layout]


def _product(pipeline: int, virtual: int | None) -> str:
    if virtual is None:
        return f"pipeline_model_parallel_size={pipeline}"
    return f"pipeline_model_parallel_size={pipeline} x virtual_pipeline_model_parallel_size={virtual}"


def moe_columns(layers: Sequence[int], moe_layers: Sequence[int]) -> tuple[int, ...]:
    """Positions among the model's MoE layers of those MoE layers that are in `layers`: the L axis of a RouteTable."""
    mine = set(layers)
    return tuple(column for column, layer in enumerate(moe_layers) if layer in mine)
