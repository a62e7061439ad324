"""ParallelLayout: which rank computes which tokens in which layers. Pure arithmetic, no process group, any number of ranks.

Ranks are numbered twice, as `megatron.core.parallel_state.initialize_model_parallel` does it: for attention and routers with
tensor and context parallelism, for the experts with expert-tensor and expert parallelism. A layout that Megatron-Core would refuse,
or in which it would silently compute something else, cannot be constructed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.parallel.grid import TokenGrid, cut, moe_layer_indices
from megatron_pr2.parallel.ranks import ORDER, RankNumbering
from megatron_pr2.parallel.refusals import check_model, check_order, check_positive, check_sizes
from megatron_pr2.parallel.stages import LayoutRows, Stages, cut_layers, layout_chunks, layout_rows, moe_columns, pattern_chunks


class Coordinates(NamedTuple):
    """A rank's place in its tensor-, context-, data- and pipeline-parallel group."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """A rank's place in its expert-tensor-, expert-, expert-data- and pipeline-parallel group."""

    etp: int
    ep: int
    edp: int
    pp: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """How a model and its micro-batches are cut over ranks.

    Attributes:
        num_layers: decoder layers of the model.
        tensor, pipeline, context, data, expert: parallel sizes; the world has tensor x context x data x pipeline ranks.
        virtual_pipeline: chunks per pipeline stage, or None; taken from `pipeline_layout` where that says more.
        expert_tensor: tensor-parallel size of the experts; None stands for `tensor` and is replaced by it.
        sequence_parallel: None stands for tensor > 1 and is replaced by it.
        order: of the kinds of parallelism in rank numbers, fastest first.
        moe_layer_freq: which layers are MoE layers, as in Megatron-Core's config.
        num_experts: routed experts, or None for a model without; for checks.
        num_attention_heads, num_query_groups: for checks; None skips them.
        layers_in_first, layers_in_last, account_for_embedding, account_for_loss, pipeline_layout, mtp_num_layers: see
            `stages.cut_layers`. A list in `pipeline_layout` is replaced by tuples.
        hybrid_pattern: `hybrid_layer_pattern` of a HybridModel, or None for a GPTModel; replaces `moe_layer_freq`, and its "|" say
            what `virtual_pipeline` is.

    Raises:
        ConfigError: a layout that Megatron-Core refuses or computes wrongly, naming the settings that do not go together.
    """

    num_layers: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    sequence_parallel: bool | None = None
    order: str = ORDER
    moe_layer_freq: int | Sequence[int] = 1
    num_experts: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    layers_in_first: int | None = None
    layers_in_last: int | None = None
    account_for_embedding: bool = False
    account_for_loss: bool = False
    pipeline_layout: LayoutRows | Sequence[Sequence[str]] | None = None
    mtp_num_layers: int | None = None
    hybrid_pattern: str | None = None

    def __post_init__(self) -> None:
        check_positive(self)
        rows = layout_rows(self.pipeline_layout)
        self._replace("pipeline_layout", rows)
        if self.expert_tensor is None:
            self._replace("expert_tensor", self.tensor)
        if self.sequence_parallel is None:
            self._replace("sequence_parallel", self.tensor > 1)
        if self.hybrid_pattern is not None:
            layers = DecoderLayers.of_pattern(self.hybrid_pattern)
            self._replace("moe_layer_freq", [int(layer in layers.moe) for layer in range(layers.count)])
            if self.virtual_pipeline is None and (chunks := pattern_chunks(self.hybrid_pattern, self.pipeline)) > 1:
                self._replace("virtual_pipeline", chunks)
        if not isinstance(self.moe_layer_freq, int):
            self._replace("moe_layer_freq", tuple(self.moe_layer_freq))
        if rows is not None and self.virtual_pipeline is None and (chunks := layout_chunks(rows, self.pipeline)) > 1:
            self._replace("virtual_pipeline", chunks)
        check_sizes(self)
        # These four raise where something does not fit.
        _ = self.ranks, self.expert_ranks, self.stages, self.moe_layers
        check_order(self)
        check_model(self)

    @classmethod
    def of(
        cls, config: Any, *, world_size: int, order: str = ORDER, hybrid_pattern: str | None = None
    ) -> ParallelLayout:
        """The layout of a model with this TransformerConfig on `world_size` ranks.

        Args:
            hybrid_pattern: of a HybridModel, which its config does not have; counts its layers, too.

        Raises:
            ConfigError: the world is not a multiple of the sizes, or as for the constructor.
        """
        tensor, pipeline = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        model_size = tensor * pipeline * config.context_parallel_size
        if world_size < 1 or world_size % model_size:
            raise ConfigError(
                f"world_size={world_size} is not a multiple of tensor_model_parallel_size={tensor} x pipeline_model_parallel_size="
                f"{pipeline} x context_parallel_size={config.context_parallel_size} = {model_size}; change sizes or processes"
            )
        return cls(
            num_layers=config.num_layers if hybrid_pattern is None else DecoderLayers.of_pattern(hybrid_pattern).count,
            tensor=tensor,
            pipeline=pipeline,
            virtual_pipeline=config.virtual_pipeline_model_parallel_size,
            context=config.context_parallel_size,
            data=world_size // model_size,
            expert=config.expert_model_parallel_size,
            expert_tensor=config.expert_tensor_parallel_size,
            sequence_parallel=config.sequence_parallel,
            order=order,
            moe_layer_freq=config.moe_layer_freq,
            num_experts=config.num_moe_experts,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            layers_in_first=config.num_layers_in_first_pipeline_stage,
            layers_in_last=config.num_layers_in_last_pipeline_stage,
            account_for_embedding=config.account_for_embedding_in_pipeline_split,
            account_for_loss=config.account_for_loss_in_pipeline_split,
            pipeline_layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            hybrid_pattern=hybrid_pattern,
        )

    # ---- ranks -------------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def expert_model_size(self) -> int:
        """Ranks that hold one copy of all experts."""
        assert self.expert_tensor is not None
        return self.expert_tensor * self.expert * self.pipeline

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same share of the same experts."""
        return self.world_size // self.expert_model_size

    @cached_property
    def ranks(self) -> RankNumbering:
        """Numbering of the ranks for attention and routers."""
        sizes = {"tp": self.tensor, "cp": self.context, "ep": 1, "dp": self.data, "pp": self.pipeline}
        return RankNumbering(self.order, sizes)

    @cached_property
    def expert_ranks(self) -> RankNumbering:
        """Numbering of the ranks for the experts."""
        assert self.expert_tensor is not None
        sizes = {"tp": self.expert_tensor, "cp": 1, "ep": self.expert, "dp": self.expert_data, "pp": self.pipeline}
        return RankNumbering(self.order, sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank, seen from attention and routers.

        Raises:
            ConfigError: the world has no such rank.
        """
        digit = self.ranks.digits(rank)
        return Coordinates(digit["tp"], digit["cp"], digit["dp"], digit["pp"])

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Place of a rank, seen from the experts.

        Raises:
            ConfigError: the world has no such rank.
        """
        digit = self.expert_ranks.digits(rank)
        return ExpertCoordinates(digit["tp"], digit["ep"], digit["dp"], digit["pp"])

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at these coordinates.

        Raises:
            ConfigError: a coordinate is not below its size.
        """
        return self.ranks.rank(coordinates._asdict())

    def replicas(self) -> npt.NDArray[np.int64]:
        """[data, tensor x context x pipeline] ranks: each row trains on the same sequences, its owner first."""
        return self.ranks.groups("tp", "cp", "pp")

    def replica(self, rank: int) -> tuple[int, ...]:
        """The row of `replicas` that a rank is in, ascending.

        Its first rank (tp = cp = pp = 0) is the owner: where the routes of the replica's sequences are given.
        """
        return tuple(self.replicas()[self.coordinates(rank).dp].tolist())

    def owner(self, rank: int) -> int:
        """The first rank of a rank's replica."""
        return self.rank(Coordinates(0, 0, self.coordinates(rank).dp, 0))

    # ---- layers ------------------------------------------------------------------------------------------------------

    @cached_property
    def stages(self) -> Stages:
        """[pipeline stage][virtual chunk] -> 0-based decoder layers."""
        return cut_layers(
            self.num_layers,
            self.pipeline,
            self.virtual_pipeline,
            in_first=self.layers_in_first,
            in_last=self.layers_in_last,
            account_for_embedding=self.account_for_embedding,
            account_for_loss=self.account_for_loss,
            layout=layout_rows(self.pipeline_layout),
            mtp_num_layers=self.mtp_num_layers,
            hybrid_pattern=self.hybrid_pattern,
        )

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """0-based indices of the model's MoE layers among its decoder layers."""
        return moe_layer_indices(self.num_layers, self.moe_layer_freq)

    def layers(self, pp: int) -> tuple[tuple[int, ...], ...]:
        """0-based decoder layers of each virtual chunk of a pipeline stage."""
        return self.stages[pp]

    def moe_columns(self, pp: int) -> tuple[int, ...]:
        """The stage's MoE layers, as indices among all MoE layers of the model (the L axis of a RouteTable); may be empty."""
        return moe_columns([layer for chunk in self.stages[pp] for layer in chunk], self.moe_layers)

    # ---- tokens ------------------------------------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """Smallest multiple to which the length of a padded batch, or of each packed sequence, must be padded.

        Context parallelism cuts a sequence into 2 x context chunks; sequence parallelism cuts what one context-parallel rank then
        holds into `tensor` shares. Megatron's own scripts pad to 2 x context x tensor, which is a multiple of it.
        """
        chunks = 2 * self.context if self.context > 1 else 1
        return math.lcm(chunks, self.context * self._sharing)

    def cut(self, grid: TokenGrid, rank: int) -> TokenGrid:
        """The rows of a whole micro-batch that a rank's routers see.

        Raises:
            ConfigError: a length is not a multiple of what cuts it, or the world has no such rank.
        """
        place = self.coordinates(rank)
        share = place.tp if self.sequence_parallel else 0
        return cut(grid, cp_size=self.context, cp_rank=place.cp, tp_size=self._sharing, tp_rank=share)

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _sharing(self) -> int:
        """Tensor-parallel ranks that share the rows; without sequence parallelism each sees all of them."""
        return self.tensor if self.sequence_parallel else 1

    def _replace(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
