"""Which decoder layers each pipeline stage computes: Megatron-Core's rules as one pure function.

A stage holds one chunk of layers, or several under a virtual pipeline. Layers are numbered along the first chunk of every stage,
then along the second chunk of every stage, and so on; so the sizes of the chunks say everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.decoder_layers import DecoderLayers, pattern_segments

# [pipeline stage][virtual chunk] -> 0-based decoder layers, ascending.
Stages = tuple[tuple[tuple[int, ...], ...], ...]
LayoutRows = str | tuple[tuple[str, ...], ...]
_LAYOUT = "pipeline_model_parallel_layout"
_NUMBERS = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_ACCOUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


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
        virtual_pipeline: chunks per stage; None for one, or for as many as `layout` has.
        in_first, in_last: `num_layers_in_first_pipeline_stage`, `..._last_...`; the stages between them share the rest.
        account_for_embedding, account_for_loss: the embedding, the loss take a layer's place (`account_for_..._in_pipeline_split`).
        layout: `pipeline_model_parallel_layout`, see `layout_rows`; excludes the settings above.
        mtp_num_layers: multi-token-prediction heads; they are no decoder layers, but a layout must place them.
        hybrid_pattern: `hybrid_layer_pattern` of a HybridModel, whose "|" alone place all layers; without them its layers are
            shared out evenly, or as in_first and in_last say.

    Returns:
        [pipeline][virtual_pipeline or 1] tuples of 0-based layer indices; a chunk may be empty.

    Raises:
        ConfigError: settings with which Megatron-Core would refuse to build the model, or would silently build another one.
    """
    numbers = {name: value for name, value in zip(_NUMBERS, (in_first, in_last), strict=True) if value is not None}
    accounts = {name: True for name, on in zip(_ACCOUNTS, (account_for_embedding, account_for_loss), strict=True) if on}
    if hybrid_pattern is not None:
        unread = {**({} if layout is None else {_LAYOUT: layout}), **accounts}
        advice = "HybridModel ignores the latter; cut the pattern into stages by '|'"
        _alone({"hybrid_layer_pattern": hybrid_pattern}, unread, advice)
        sizes = _pattern_sizes(num_layers, pipeline, virtual_pipeline, hybrid_pattern, numbers)
    elif layout is not None:
        _alone({_LAYOUT: layout}, {**numbers, **accounts}, "the layout alone places all layers; drop the others")
        sizes = _layout_sizes(num_layers, pipeline, virtual_pipeline, layout, mtp_num_layers)
    elif numbers:
        advice = "Megatron-Core takes one or the other; count embedding and loss yourself, or drop the numbers"
        _alone(numbers, accounts, advice)
        sizes = _uneven_sizes(num_layers, pipeline, virtual_pipeline, numbers)
    else:
        sizes = _even_sizes(num_layers, pipeline, virtual_pipeline, accounts)
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
    num_layers: int, pipeline: int, virtual: int | None, pattern: str, numbers: Mapping[str, int]
) -> list[list[int]]:
    layers, segments = DecoderLayers.of_pattern(pattern), pattern_segments(pattern)
    named = f"hybrid_layer_pattern={pattern!r}"
    if layers.count != num_layers:
        raise ConfigError(f"{named} has {layers.count} layers, num_layers is {num_layers}; make them agree")
    if len(segments) == 1:
        if virtual is not None and pipeline > 1:
            raise ConfigError(
                f"{named} with virtual_pipeline_model_parallel_size={virtual}: only '|' in the pattern cut it into chunks; "
                f"expected {pipeline * virtual} segments between them"
            )
        even = not numbers
        return _even_sizes(num_layers, pipeline, virtual, {}) if even else _uneven_sizes(num_layers, pipeline, virtual, numbers)
    _alone({"hybrid_layer_pattern": pattern}, numbers, "its '|' alone place all layers; drop the numbers")
    chunks = pattern_chunks(pattern, pipeline)
    _check_chunks(named, chunks, pipeline, virtual)
    return [[len(segments[chunk * pipeline + stage]) for chunk in range(chunks)] for stage in range(pipeline)]


def _even_sizes(num_layers: int, pipeline: int, virtual: int | None, accounts: Mapping[str, bool]) -> list[list[int]]:
    chunks = virtual or 1
    places = num_layers + len(accounts)
    if places % (pipeline * chunks):
        taken = "".join(f" + 1 ({name})" for name in accounts)
        raise ConfigError(
            f"num_layers={num_layers}{taken} is not a multiple of {_product(pipeline, virtual)}; change one of them, or place the "
            "layers by num_layers_in_first_pipeline_stage, num_layers_in_last_pipeline_stage or pipeline_model_parallel_layout"
        )
    sizes = [[places // (pipeline * chunks)] * chunks for _ in range(pipeline)]
    sizes[0][0] -= _ACCOUNTS[0] in accounts
    sizes[-1][-1] -= _ACCOUNTS[1] in accounts
    return sizes


def _uneven_sizes(num_layers: int, pipeline: int, virtual: int | None, numbers: Mapping[str, int]) -> list[list[int]]:
    chunks, named = virtual or 1, _named(numbers)
    for name, value in numbers.items():
        if value < 1 or value % chunks:
            raise ConfigError(
                f"{name}={value} with virtual_pipeline_model_parallel_size={virtual}: expected a positive multiple of {chunks}"
            )
    # What the stages between the first and the last share.
    stages, layers = pipeline - len(numbers), num_layers - sum(numbers.values())
    if stages < 0:
        raise ConfigError(
            f"{named} with pipeline_model_parallel_size={pipeline}: one stage cannot be both; Megatron-Core would build it without "
            f"{layers} of the layers. Drop both"
        )
    if virtual is not None and not stages and pipeline > 1:
        raise ConfigError(
            f"{named} with pipeline_model_parallel_size={pipeline} and virtual_pipeline_model_parallel_size={virtual}: "
            "Megatron-Core divides by the stages in between, and there is none; use pipeline_model_parallel_layout"
        )
    share = stages * chunks
    if not stages and layers:
        raise ConfigError(
            f"{named} of num_layers={num_layers} leave {layers} layers, and pipeline_model_parallel_size={pipeline} no stage for "
            "them; the numbers must add up to num_layers"
        )
    if stages and (layers < 1 or layers % share):
        raise ConfigError(
            f"{named} of num_layers={num_layers} leave {layers} layers for {stages} of {_product(pipeline, virtual)} stages; "
            f"expected a positive multiple of {share}"
        )
    sizes = [[layers // share if share else 0] * chunks for _ in range(pipeline)]
    for name, stage in zip(_NUMBERS, (0, -1), strict=True):
        if name in numbers:
            sizes[stage] = [numbers[name] // chunks] * chunks
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
    if virtual is not None:
        _check_chunks(f"{_LAYOUT}={layout!r}", parsed.virtual_pipeline_model_parallel_size, pipeline, virtual)
    try:
        parsed.validate_layer_layout(num_layers, mtp_num_layers)
    except (AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"pipeline_model_parallel_layout={layout!r} with num_layers={num_layers}, mtp_num_layers={mtp_num_layers}: {error}"
        ) from error
    return [[sum(layer.name == "decoder" for layer in chunk) for chunk in stage] for stage in parsed.layout]


def _check_chunks(named: str, chunks: int, pipeline: int, virtual: int | None) -> None:
    if chunks != (virtual or 1):
        raise ConfigError(
            f"{named} has {chunks} chunks per stage for pipeline_model_parallel_size={pipeline}, but "
            f"virtual_pipeline_model_parallel_size={virtual}; make them agree"
        )


def _alone(settings: Mapping[str, Any], others: Mapping[str, Any], why: str) -> None:
    """Refuses settings together with others that contradict them."""
    if others:
        raise ConfigError(f"{_named(settings)} and {_named(others)}: {why}")


def _named(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _product(pipeline: int, virtual: int | None) -> str:
    chunks = "" if virtual is None else f" x virtual_pipeline_model_parallel_size={virtual}"
    return f"pipeline_model_parallel_size={pipeline}{chunks}"
