"""ParallelLayout against Megatron-Core itself: rank numbers, stages and cuts, for up to 4,096 simulated ranks."""

from __future__ import annotations

import dataclasses
import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state as mpu

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import PADDING, packed, padded
from megatron_pr2.parallel.layout import Coordinates, ParallelLayout
from megatron_pr2.parallel.ranks import ORDER
from tests.helpers.simulated import (
    ORDERS,
    accepted,
    config_fields,
    divisors,
    generators,
    grids,
    initialize,
    layouts,
    make_config,
    megatron_cut,
    megatron_layers,
    megatron_world,
)


def expert_place(layout: ParallelLayout, rank: int) -> list[int]:
    """A rank's place in its expert-tensor-, expert-, expert-data- and pipeline-parallel group."""
    digits = layout.expert_ranks.digits(rank)
    return [digits[kind] for kind in ("tp", "ep", "dp", "pp")]


# ---- who computes what ------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.data(), st.booleans())
def test_every_token_and_layer_is_where_it_is_computed(data: st.DataObject, moe: bool) -> None:
    """One rank of every replica per (token, layer), or all tensor-parallel ranks without sequence parallelism; no more, no less."""
    layout = ParallelLayout(**data.draw(layouts(moe=moe)))
    grid, tokens = data.draw(grids(layout.alignment))
    _, real_sequences, real_positions = grid.real()
    number = {token: i for i, token in enumerate(zip(real_sequences.tolist(), real_positions.tolist(), strict=True))}
    assert len(number) == tokens
    counts = np.zeros((layout.data, tokens, layout.num_layers), dtype=np.int64)
    per_place: dict[tuple[int, int], list[int]] = {}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        # Cutting is the slow part; that it depends on nothing else is checked on the ranks that are drawn below.
        if (place.tp, place.cp) not in per_place:
            _, sequence, position = layout.cut(grid, rank).real()
            per_place[place.tp, place.cp] = [number[t] for t in zip(sequence.tolist(), position.tolist(), strict=True)]
        layers = [layer for chunk in layout.layers(place.pp) for layer in chunk]
        np.add.at(counts, np.ix_([place.dp], per_place[place.tp, place.cp], layers), 1)
    copies = 1 if layout.sequence_parallel else layout.tensor
    assert (counts == copies).all()
    for rank in data.draw(st.lists(st.integers(0, layout.world_size - 1), min_size=1, max_size=4)):
        rows = layout.cut(grid, rank).rows()
        assert tuple(r.tolist() for r in rows) == megatron_cut(grid, layout, layout.coordinates(rank))
        assert len(rows[0]) * layout.context * (layout.tensor // copies) == grid.num_rows


@given(layouts())
def test_moe_columns_are_dealt_out_once(sizes: dict[str, Any]) -> None:
    layout = ParallelLayout(**sizes)
    columns = [layout.moe_columns(pp) for pp in range(layout.pipeline)]
    assert sorted(itertools.chain(*columns)) == list(range(len(layout.moe_layers)))
    for pp, mine in enumerate(columns):
        layers = list(itertools.chain(*layout.layers(pp)))
        assert [layout.moe_layers[c] for c in mine] == [layer for layer in layers if layer in layout.moe_layers]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("context", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor", [2, 3, 4, 6])
def test_alignment_is_what_megatron_needs_and_no_more(tensor: int, context: int, sequence_parallel: bool) -> None:
    layout = ParallelLayout(num_layers=1, tensor=tensor, context=context, sequence_parallel=sequence_parallel)
    aligned = 0
    # Everything that cuts is a factor of this, so the lengths that miss the alignment by one factor are among these.
    for length in divisors(4 * context * tensor):
        grid = padded([0], [length], length)
        try:
            megatron_cut(grid, layout, Coordinates(0, 0, 0, 0))
        except (AssertionError, RuntimeError):
            assert length % layout.alignment
            with pytest.raises(ConfigError, match="parallel"):
                layout.cut(grid, 0)
        else:
            assert length % layout.alignment == 0
            assert layout.cut(grid, 0).num_rows == layout.cut(packed([0], [length]), 0).num_rows > 0
            aligned += 1
    assert aligned


# ---- ranks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(layouts(max_ranks=4096), st.data())
def test_ranks_and_coordinates_are_inverse(sizes: dict[str, Any], data: st.DataObject) -> None:
    layout = ParallelLayout(**sizes)
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    every = itertools.product(range(layout.tensor), range(layout.context), range(layout.data), range(layout.pipeline))
    assert sorted(places) == sorted(every)
    assert len({tuple(expert_place(layout, rank)) for rank in range(layout.world_size)}) == layout.world_size
    rank = data.draw(st.integers(0, layout.world_size - 1))
    mine = layout.replica(rank)
    assert mine == tuple(other for other, place in enumerate(places) if place.dp == places[rank].dp)
    assert places[mine[0]] == (0, 0, places[rank].dp, 0)


@settings(max_examples=40)
@given(layouts(max_ranks=512, orders=tuple(ORDERS)))
@example({"num_layers": 4, "tensor": 8, "context": 4, "data": 32, "pipeline": 4, "expert": 64, "expert_tensor": 2})
@example({"num_layers": 2, "tensor": 4, "context": 4, "data": 4, "pipeline": 2, "expert": 4, "order": "tp-cp-ep-pp-dp"})
def test_groups_are_megatrons(sizes: dict[str, Any]) -> None:
    layout = accepted(sizes)
    if layout is None:  # not every order goes with these sizes
        return
    assert layout.expert_tensor is not None
    attention, experts = generators({"order": ORDER, **sizes}, layout.expert_tensor)
    for kinds in ("tp", "cp", "pp", "dp", "tp-cp", "tp-pp", "tp-cp-pp", "dp-cp", "tp-dp-cp"):
        assert layout.ranks.groups(*kinds.split("-")).tolist() == attention.get_ranks(kinds), kinds
    for kinds in ("tp", "ep", "dp", "pp", "tp-ep", "tp-ep-pp", "ep-dp"):
        assert layout.expert_ranks.groups(*kinds.split("-")).tolist() == experts.get_ranks(kinds), kinds


@settings(max_examples=40)
@given(layouts(max_ranks=96, orders=tuple(ORDERS)), st.data())
def test_coordinates_are_those_of_an_initialized_megatron(sizes: dict[str, Any], data: st.DataObject) -> None:
    layout = accepted(sizes)
    if layout is None:
        return
    rank = data.draw(st.integers(0, layout.world_size - 1))
    with megatron_world(layout.world_size, rank):
        initialize(config_fields(sizes), sizes["order"])
        assert layout.coordinates(rank) == (
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_data_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
        )
        assert expert_place(layout, rank) == [
            mpu.get_expert_tensor_parallel_rank(),
            mpu.get_expert_model_parallel_rank(),
            mpu.get_expert_data_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
        ]
        assert layout.expert_data == mpu.get_expert_data_parallel_world_size()


def test_a_layout_by_hand() -> None:
    """TP2 x CP2 x PP2 on 16 ranks, EP4: numbers that can be checked on paper."""
    layout = ParallelLayout(
        num_layers=8, tensor=2, context=2, pipeline=2, data=2, expert=4, expert_tensor=1, num_experts=8, virtual_pipeline=2,
        moe_layer_freq=[0, 1, 1, 1, 1, 1, 1, 0],
    )  # fmt: skip
    assert layout.coordinates(11) == Coordinates(tp=1, cp=1, dp=0, pp=1)
    assert expert_place(layout, 11) == [0, 3, 0, 1]
    assert layout.replica(11) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert layout.replica(15)[0] == 4
    assert layout.layers(1) == ((2, 3), (6, 7))
    assert layout.moe_columns(1) == (1, 2, 5)
    assert layout.alignment == 4
    grid = packed([5, 6], [7, 3], [8, 4])
    assert layout.cut(grid, 11).sequence[:, 0].tolist() == [5, 6, 6]
    assert layout.cut(grid, 11).position[:, 0].tolist() == [5, 1, 2]
    assert layout.cut(grid, 9).position[:, 0].tolist() == [PADDING, 0, PADDING]


def test_the_picture_shows_this_layout() -> None:
    """docs/parallelism.svg: the rows that it draws for each of its eight ranks are those of the layout."""
    layout = ParallelLayout(num_layers=4, tensor=2, context=2, pipeline=2, expert=4, expert_tensor=1, num_experts=8)
    grid = packed([0, 1], [7, 3], [8, 4])
    picture = ElementTree.parse(Path(__file__).parents[2] / "docs/parallelism.svg").getroot()
    texts = ["".join(element.itertext()) for element in picture.iter() if element.tag.endswith("text")]
    texts = [text for text in texts if text != "–"]
    for rank in range(layout.world_size):
        at = texts.index(f"rank {rank}")
        place = layout.coordinates(rank)
        assert texts[at + 1] == f"cp {place.cp} · tp {place.tp}"
        rows = zip(*(r.tolist() for r in layout.cut(grid, rank).rows()), strict=True)
        assert texts[at + 2 : at + 5] == ["pad" if s == PADDING else f"{'AB'[s]} {p}" for s, p in rows]
        assert layout.moe_columns(place.pp) == ((0, 1), (2, 3))[place.pp]
        assert f"MoE layers {2 * place.pp} and {2 * place.pp + 1}" in texts
        assert expert_place(layout, rank)[1] == rank % 4


def test_the_documented_example_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs/parallelism.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    code, *shown = re.split(r"^(?=layout\.)", snippet, flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    assert len(shown) == 5
    for line in shown:
        expression, _, comment = line.partition("#")
        assert comment.strip().startswith(repr(eval(expression, names))), line


# ---- stages -----------------------------------------------------------------------------------------------------------


@given(layouts(moe=False))
def test_layers_are_those_that_megatron_builds(sizes: dict[str, Any]) -> None:
    layout, config = ParallelLayout(**sizes), make_config(sizes)
    assert (layout.virtual_pipeline or 1) == (config.virtual_pipeline_model_parallel_size or 1)
    for pp in range(layout.pipeline):
        expected = [megatron_layers(config, pp, chunk) for chunk in range(layout.virtual_pipeline or 1)]
        assert [list(chunk) for chunk in layout.layers(pp)] == expected


@given(layouts())
def test_a_config_and_a_world_say_it_all(sizes: dict[str, Any]) -> None:
    layout = ParallelLayout(**sizes)
    config = make_config(sizes)
    of = ParallelLayout.of(config, world_size=layout.world_size)
    known = {"num_attention_heads": config.num_attention_heads, "num_query_groups": config.num_query_groups}
    # The config turns layouts into an object of Megatron-Core's, and takes chunks from them.
    assert of == dataclasses.replace(layout, **known, virtual_pipeline=of.virtual_pipeline)
    assert of.stages == layout.stages
