"""Megatron-Core as one rank of a world that does not exist, and random layouts to ask it about.

Its own functions run in this process with made-up process groups; nothing communicates.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import strategies as st
from megatron.core import parallel_state as mpu
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from megatron.core.parallel_state import RankGenerator
from megatron.core.tensor_parallel.mappings import _split_along_first_dim
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import TokenGrid, packed, padded
from megatron_pr2.parallel.layout import CONFIG_NAMES, Coordinates, ParallelLayout
from megatron_pr2.parallel.ranks import ORDER

ORDERS = [ORDER, "tp-cp-ep-pp-dp", "tp-pp-cp-ep-dp", "cp-tp-ep-dp-pp", "dp-tp-ep-cp-pp", "ep-tp-dp-cp-pp"]


# ---- Megatron-Core without processes ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FakeGroup:
    """As much of a process group as Megatron-Core's arithmetic asks for."""

    ranks: tuple[int, ...]
    me: int

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self.me)


def group(size: int, rank: int) -> FakeGroup:
    return FakeGroup(tuple(range(size)), rank)


@contextmanager
def megatron_world(world_size: int = 1, rank: int = 0) -> Iterator[list[tuple[int, ...]]]:
    """Megatron-Core acts as one rank of a world; yields the ranks of the groups that it makes."""
    made: list[tuple[int, ...]] = []

    def create_group(ranks: list[int], **_: Any) -> FakeGroup:
        made.append(tuple(ranks))
        return FakeGroup(tuple(ranks), rank)

    def get_rank(group: FakeGroup | None = None) -> int:
        return rank if group is None else group.rank()

    def get_world_size(group: FakeGroup | None = None) -> int:
        return world_size if group is None else group.size()

    assert not mpu.model_parallel_is_initialized()
    answers = {"is_initialized": lambda: True, "get_world_size": get_world_size, "get_rank": get_rank}
    with patch.multiple("torch.distributed", **answers), patch.object(mpu, "create_group", create_group):
        try:
            yield made
        finally:
            mpu.destroy_model_parallel()


def initialize(fields: dict[str, Any], order: str) -> None:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=fields["tensor_model_parallel_size"],
        pipeline_model_parallel_size=fields["pipeline_model_parallel_size"],
        virtual_pipeline_model_parallel_size=fields["virtual_pipeline_model_parallel_size"],
        context_parallel_size=fields["context_parallel_size"],
        expert_model_parallel_size=fields["expert_model_parallel_size"],
        expert_tensor_parallel_size=fields["expert_tensor_parallel_size"],
        order=order,
        create_gloo_process_groups=False,
    )


DEFAULTS = {field.name: field.default for field in dataclasses.fields(ParallelLayout) if field.name != "num_layers"}


def config_fields(sizes: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig's fields for ParallelLayout's arguments."""
    full = {**DEFAULTS, **sizes}
    fields = {theirs: full[ours] for ours, theirs in CONFIG_NAMES.items()}
    if fields["sequence_parallel"] is None:
        fields["sequence_parallel"] = full["tensor"] > 1
    fields["num_attention_heads"] = fields["num_attention_heads"] or 64 * 27 * 25 * 7
    return fields


def make_config(sizes: dict[str, Any]) -> TransformerConfig:
    fields = config_fields(sizes)
    if fields["num_moe_experts"] is not None:
        fields |= {"moe_ffn_hidden_size": 8, "moe_router_load_balancing_type": "none"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            hidden_size=fields["num_attention_heads"] * 8, pipeline_dtype=torch.float32, add_bias_linear=False, **fields
        )


def megatron_layers(config: TransformerConfig, pp: int, chunk: int) -> list[int]:
    """0-based layers that Megatron-Core builds for one chunk of one stage."""
    virtual = config.virtual_pipeline_model_parallel_size
    vp_stage = None if virtual is None else chunk
    # A pipeline layout asks the global state instead of its arguments.
    mpu.set_pipeline_model_parallel_rank(pp)
    mpu.set_virtual_pipeline_model_parallel_world_size(virtual)
    try:
        count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp)
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp)
    finally:
        mpu.set_pipeline_model_parallel_rank(None)
        mpu.set_virtual_pipeline_model_parallel_world_size(None)
    return list(range(offset, offset + count))


def megatron_cut(grid: TokenGrid, layout: ParallelLayout, place: Coordinates) -> tuple[list[int], list[int]]:
    """(sequence, position) of every row of one rank, by Megatron-Core's own cuts."""
    context = group(layout.context, place.cp)
    both = torch.from_numpy(np.stack([grid.sequence, grid.position]))
    if grid.padded_lengths is None:
        with megatron_world():
            # [B, S], as a batch holds its tokens.
            rows = {str(i): t.transpose(0, 1) for i, t in enumerate(both)}
            # Since 0.19 the caller says that all sequences have one context-parallel size.
            same = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
            rows = get_batch_on_this_cp_rank(rows, cp_group=context, **same)
        sequence, position = (rows[str(i)].transpose(0, 1) for i in range(2))
    else:
        # Rotary embedding says which positions the rows of each packed sequence have.
        parts = []
        for slots in torch.split(both.transpose(0, 1), grid.padded_lengths):
            local = torch.empty(slots.shape[0] // layout.context)
            parts.append(_get_thd_freqs_on_this_cp_rank(place.cp, layout.context, local, slots))
        sequence, position = torch.cat(parts).transpose(0, 1) if parts else both
    if layout.sequence_parallel:
        tensor = group(layout.tensor, place.tp)
        sequence, position = _split_along_first_dim(sequence, tensor), _split_along_first_dim(position, tensor)
    return sequence.reshape(-1).tolist(), position.reshape(-1).tolist()


class Experts(BaseMoELayer):
    """The part of a MoE layer that counts its experts."""

    def forward(self, hidden_states: torch.Tensor) -> None:
        raise NotImplementedError


def layer_specs() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says on import that Apex is not there
        return importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")


def megatron_refuses(sizes: dict[str, Any]) -> str | None:
    """What Megatron-Core says to a layout between its configuration and the first training step; None if it trains it.

    A silent mistake (layers that are built twice or never, gradients that are reduced over the wrong ranks) counts as refused.
    """
    sizes = {**DEFAULTS, **sizes}
    world = sizes["tensor"] * sizes["context"] * sizes["pipeline"] * sizes["data"]
    try:
        config = make_config(sizes)
        layer_specs().get_gpt_decoder_layer_specs(config, use_transformer_engine=False)
        with megatron_world(world) as made:
            initialize({name: getattr(config, name) for name in CONFIG_NAMES.values()}, sizes["order"])
            if config.num_moe_experts is not None:
                Experts(config, pg_collection=SimpleNamespace(ep=mpu.get_expert_model_parallel_group(), tp=None))
                tensor = mpu.get_tensor_model_parallel_group()
                if tensor.size() > 1 and not config.sequence_parallel:
                    MoELayer.forward(SimpleNamespace(training=True, attn_tp_group=tensor, config=config), None)
                assert made
        chunks = config.virtual_pipeline_model_parallel_size or 1
        stages = itertools.product(range(chunks), range(config.pipeline_model_parallel_size))
        built = [layer for chunk, pp in stages for layer in megatron_layers(config, pp, chunk)]
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    if built != list(range(config.num_layers)):
        return f"builds layers {built} of {config.num_layers}"
    if config.num_moe_experts is not None and config.expert_model_parallel_size == 1:
        attention, experts = generators(sizes, config.expert_tensor_parallel_size)
        if attention.get_ranks("dp-cp") != experts.get_ranks("dp"):
            return "reduces expert gradients over ranks that hold other experts"
    return None


def generators(sizes: dict[str, Any], expert_tensor: int) -> tuple[RankGenerator, RankGenerator]:
    """The two rank generators of `initialize_model_parallel`."""
    tp, cp, pp, dp, ep = (sizes[name] for name in ("tensor", "context", "pipeline", "data", "expert"))
    order = sizes["order"]
    experts_dp = tp * cp * dp // (expert_tensor * ep)
    return (
        RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order),
        RankGenerator(tp=expert_tensor, ep=ep, dp=experts_dp, pp=pp, cp=1, order=order),
    )


# ---- random layouts ---------------------------------------------------------------------------------------------------


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def layouts(draw: st.DrawFn, max_ranks: int = 4096, orders: tuple[str, ...] = (ORDER,), moe: bool = True) -> dict[str, Any]:
    """Arguments of a ParallelLayout that Megatron-Core trains; every size may be odd."""
    rest = max_ranks
    sizes: dict[str, Any] = {}
    for name in draw(st.permutations(["tensor", "context", "pipeline", "data"])):
        sizes[name] = draw(st.sampled_from([s for s in (1, 2, 3, 4, 6, 8, 16, 32, 64) if s <= rest]))
        rest //= sizes[name]
    sizes["order"] = draw(st.sampled_from(orders))
    if moe:
        within = sizes["tensor"] * sizes["context"] * sizes["data"]
        sizes["expert"] = draw(st.sampled_from(divisors(within)))
        sizes["expert_tensor"] = draw(st.sampled_from(divisors(within // sizes["expert"])))
        sizes["num_experts"] = sizes["expert"] * draw(st.integers(1, 3))
        if sizes["expert"] == 1:
            sizes["expert_tensor"] = sizes["tensor"]
    else:
        sizes["sequence_parallel"] = draw(st.booleans()) and sizes["tensor"] > 1
    pipeline = sizes["pipeline"]
    sizes["virtual_pipeline"] = virtual = draw(st.sampled_from([None, 1, 2, 3])) if pipeline > 1 else None
    chunks = virtual or 1
    cut = draw(st.sampled_from(["even", "embedding", "uneven", "layout"]))
    if cut == "layout":
        counts = draw(st.lists(st.integers(0, 3), min_size=pipeline * chunks, max_size=pipeline * chunks))
        counts[-1] += 1
        rows = [["decoder"] * n for n in counts]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        sizes |= {"pipeline_layout": rows, "num_layers": sum(counts)}
        if draw(st.booleans()):
            sizes["pipeline_layout"] = "|".join("".join({"d": "t", "e": "E", "l": "L"}[name[0]] for name in row) for row in rows)
    elif cut == "uneven" and pipeline > 2:
        first, last = draw(st.sampled_from([(1, 2), (2, None), (None, 1)]))
        middle = (pipeline - (first is not None) - (last is not None)) * draw(st.integers(1, 2))
        sizes |= {"layers_in_first": first and first * chunks, "layers_in_last": last and last * chunks}
        sizes["num_layers"] = chunks * ((first or 0) + (last or 0) + middle)
    else:
        sizes |= {"account_for_embedding": cut == "embedding" and draw(st.booleans()), "account_for_loss": cut == "embedding"}
        places = pipeline * chunks * draw(st.integers(1, 3)) - sizes["account_for_embedding"] - sizes["account_for_loss"]
        sizes["num_layers"] = places if places > 0 else places + pipeline * chunks * 2
    frequency = st.lists(st.integers(0, 1), min_size=sizes["num_layers"], max_size=sizes["num_layers"])
    sizes["moe_layer_freq"] = draw(st.integers(1, 3) | frequency)
    return sizes


@st.composite
def grids(draw: st.DrawFn, alignment: int) -> tuple[TokenGrid, int]:
    """A micro-batch of odd lengths, padded or packed, and the number of its tokens."""
    lengths = draw(st.lists(st.integers(0, 41), min_size=1, max_size=3))
    ids = [10 + 3 * i for i in range(len(lengths))]
    slots = [alignment * (-(-n // alignment) + draw(st.integers(0, 1))) for n in lengths]
    grid = packed(ids, lengths, slots) if draw(st.booleans()) else padded(ids, lengths, max(slots))
    return grid, sum(lengths)


def accepted(sizes: dict[str, Any]) -> ParallelLayout | None:
    try:
        return ParallelLayout(**sizes)
    except ConfigError:
        return None
