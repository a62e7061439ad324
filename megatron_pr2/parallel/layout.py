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

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from megatron_pr2.parallel.grid import TokenGrid, cut, moe_layer_indices
from megatron_pr2.parallel.ranks import LOST_EXPERT_GRADIENTS, ORDER, RankNumbering
from megatron_pr2.parallel.stages import LayoutRows, Stages, cut_layers, layout_rows, pattern_chunks

# TransformerConfig's names of the fields of a ParallelLayout.
CONFIG_NAMES = {
    "num_layers": "num_layers",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
    "sequence_parallel": "sequence_parallel",
    "moe_layer_freq": "moe_layer_freq",
    "num_experts": "num_moe_experts",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "layers_in_first": "num_layers_in_first_pipeline_stage",
    "layers_in_last": "num_layers_in_last_pipeline_stage",
    "account_for_embedding": "account_for_embedding_in_pipeline_split",
    "account_for_loss": "account_for_loss_in_pipeline_split",
    "pipeline_layout": "pipeline_model_parallel_layout",
    "mtp_num_layers": "mtp_num_layers",
}
# These are at least 1 where they are given.
_SIZES = (
    "num_layers", "tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor", "num_experts",
    "num_attention_heads", "num_query_groups",
)  # fmt: skip


class Coordinates(NamedTuple):
    """A rank's place in its tensor-, context-, data- and pipeline-parallel group."""

    tp: int
    cp: int
    dp: int
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
        for name in _SIZES:
            if (size := getattr(self, name)) is not None and size < 1:
                raise ConfigError(f"{name}={size}: expected at least 1")
        if isinstance(self.moe_layer_freq, int) and self.moe_layer_freq < 1:
            raise ConfigError(f"moe_layer_freq={self.moe_layer_freq}: expected at least 1, or a list of 0 and 1 per layer")
        self._replace("pipeline_layout", layout_rows(self.pipeline_layout))
        frequency, chunks = self.moe_layer_freq, 1
        if self.hybrid_pattern is not None:
            layers = DecoderLayers.of_pattern(self.hybrid_pattern)
            frequency = [int(layer in layers.moe) for layer in range(layers.count)]
            chunks = pattern_chunks(self.hybrid_pattern, self.pipeline)
        elif self.pipeline_layout is not None:
            chunks = len(self.stages[0])
        self._replace("moe_layer_freq", frequency if isinstance(frequency, int) else tuple(frequency))
        if self.virtual_pipeline is None and chunks > 1:
            self._replace("virtual_pipeline", chunks)
        if self.expert_tensor is None:
            self._replace("expert_tensor", self.tensor)
        if self.sequence_parallel is None:
            self._replace("sequence_parallel", self.tensor > 1)
        self._check_sizes()
        # These four raise where something does not fit.
        _ = self.ranks, self.expert_ranks, self.stages, self.moe_layers
        self._check_order()
        self._check_model()

    def _replace(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, config: Any, *, world_size: int, order: str = ORDER, hybrid_pattern: str | None = None) -> ParallelLayout:
        """The layout of a model with this TransformerConfig on `world_size` ranks.

        Args:
            hybrid_pattern: of a HybridModel, which its config does not have; counts its layers, too.

        Raises:
            ConfigError: the world is not a multiple of the sizes, or as for the constructor.
        """
        fields = {ours: getattr(config, theirs) for ours, theirs in CONFIG_NAMES.items()}
        if hybrid_pattern is not None:
            fields["num_layers"] = DecoderLayers.of_pattern(hybrid_pattern).count
        data = data_size(world_size, fields["tensor"], fields["pipeline"], fields["context"])
        return cls(**fields, data=data, order=order, hybrid_pattern=hybrid_pattern)

    # ---- ranks -------------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def _expert_model_size(self) -> int:
        """Ranks that hold one copy of all experts."""
        return (self.expert_tensor or 1) * self.expert * self.pipeline

    @property
    def expert_data(self) -> int:
        """Ranks that hold the same share of the same experts."""
        return self.world_size // self._expert_model_size

    @cached_property
    def ranks(self) -> RankNumbering:
        """Numbering of the ranks for attention and routers."""
        sizes = {"tp": self.tensor, "cp": self.context, "ep": 1, "dp": self.data, "pp": self.pipeline}
        return RankNumbering(self.order, sizes)

    @cached_property
    def expert_ranks(self) -> RankNumbering:
        """Numbering of the ranks for the experts."""
        sizes = {"tp": self.expert_tensor or 1, "cp": 1, "ep": self.expert, "dp": self.expert_data, "pp": self.pipeline}
        return RankNumbering(self.order, sizes)

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a rank, seen from attention and routers.

        Raises:
            ConfigError: the world has no such rank.
        """
        digits = self.ranks.digits(rank)
        return Coordinates(*(digits[kind] for kind in Coordinates._fields))

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at these coordinates.

        Raises:
            ConfigError: a coordinate is not below its size.
        """
        return self.ranks.rank(coordinates._asdict())

    def replica(self, rank: int) -> tuple[int, ...]:
        """The tensor x context x pipeline ranks that train on the same sequences as a rank, ascending.

        The first one (tp = cp = pp = 0) is the owner: where the routes of the replica's sequences are given.
        """
        return tuple(self.ranks.groups("tp", "cp", "pp")[self.coordinates(rank).dp].tolist())

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
        mine = {layer for chunk in self.stages[pp] for layer in chunk}
        return tuple(column for column, layer in enumerate(self.moe_layers) if layer in mine)

    # ---- tokens ------------------------------------------------------------------------------------------------------

    @property
    def alignment(self) -> int:
        """Smallest multiple to which the length of a padded batch, or of each packed sequence, must be padded.

        Context parallelism cuts a sequence into 2 x context chunks; sequence parallelism cuts what one context-parallel rank then
        holds into `tensor` shares. Megatron's own scripts pad to 2 x context x tensor, which is a multiple of it.
        """
        return math.lcm(2 * self.context if self.context > 1 else 1, self.context * self._sharing)

    def cut(self, grid: TokenGrid, rank: int) -> TokenGrid:
        """The rows of a whole micro-batch that a rank's routers see.

        Raises:
            ConfigError: a length is not a multiple of what cuts it, or the world has no such rank.
        """
        place = self.coordinates(rank)
        share = place.tp if self.sequence_parallel else 0
        return cut(grid, cp_size=self.context, cp_rank=place.cp, tp_size=self._sharing, tp_rank=share)

    @property
    def _sharing(self) -> int:
        """Tensor-parallel ranks that share the rows; without sequence parallelism each sees all of them."""
        return self.tensor if self.sequence_parallel else 1

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ConfigError(
                f"virtual_pipeline_model_parallel_size={self.virtual_pipeline} with pipeline_model_parallel_size=1: only the "
                "stages of a pipeline can be interleaved; leave the former out, or raise the latter"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ConfigError(
                "sequence_parallel=True with tensor_model_parallel_size=1: there is nothing to share; set it to False"
            )
        if self.world_size % self._expert_model_size:
            raise ConfigError(
                f"world_size={self.world_size} (tensor {self.tensor} x context {self.context} x data {self.data} x pipeline "
                f"{self.pipeline}) is not a multiple of expert_tensor_parallel_size={self.expert_tensor} x "
                f"expert_model_parallel_size={self.expert} x pipeline_model_parallel_size={self.pipeline} = "
                f"{self._expert_model_size}; lower the expert sizes, or add data parallelism"
            )

    def _check_order(self) -> None:
        """Attention and experts agree on what a pipeline stage is."""
        if self.pipeline == 1:
            return
        why = None
        if self.ranks.rank({"pp": 1}) != self.expert_ranks.rank({"pp": 1}):
            why = "attention and experts would be in different pipeline-parallel groups"
        elif not self.order.endswith("pp") and self.expert_data != self.data:
            why = f"data parallelism of attention ({self.data}) and of experts ({self.expert_data}) must then agree"
        if why:
            raise ConfigError(
                f"order={self.order!r} with pipeline_model_parallel_size={self.pipeline}, expert_model_parallel_size="
                f"{self.expert}, expert_tensor_parallel_size={self.expert_tensor}: {why}; put pp last, as in {ORDER!r}"
            )

    def _check_model(self) -> None:
        """The model can be cut into these sizes; what the layout does not say about the model is not checked."""
        tensor, heads, groups, experts = self.tensor, self.num_attention_heads, self.num_query_groups, self.num_experts
        why = None
        if heads is not None and heads % tensor:
            why = f"num_attention_heads={heads} is not a multiple of tensor_model_parallel_size={tensor}; lower the latter"
        elif groups is not None and groups % tensor and tensor % groups:
            why = (
                f"num_query_groups={groups} is neither a multiple nor a divisor of tensor_model_parallel_size={tensor}; change the "
                "latter"
            )
        elif experts is None:
            if self.expert > 1:
                why = (
                    f"expert_model_parallel_size={self.expert} with num_moe_experts=None: there are no experts to share out; set "
                    "the former to 1"
                )
        elif experts % self.expert:
            why = f"num_moe_experts={experts} is not a multiple of expert_model_parallel_size={self.expert}; lower the latter"
        elif tensor > 1 and not self.sequence_parallel:
            why = (
                f"tensor_model_parallel_size={tensor} with sequence_parallel=False: Megatron-Core does not train MoE layers like "
                "that; set sequence_parallel=True"
            )
        elif self.expert == 1 and not np.array_equal(self.ranks.groups("dp", "cp"), self.expert_ranks.groups("dp")):
            why = (
                f"tensor_model_parallel_size={tensor}, expert_tensor_parallel_size={self.expert_tensor}, order={self.order!r}, "
                f"{LOST_EXPERT_GRADIENTS}"
            )
        if why:
            raise ConfigError(why)


def data_size(world_size: int, tensor: int, pipeline: int, context: int) -> int:
    """Replicas in a world.

    Raises:
        ConfigError: the world is not a multiple of the sizes.
    """
    model_size = tensor * pipeline * context
    if world_size < 1 or world_size % model_size:
        raise ConfigError(
            f"world_size={world_size} is not a multiple of tensor_model_parallel_size={tensor} x pipeline_model_parallel_size="
            f"{pipeline} x context_parallel_size={context} = {model_size}; change sizes or processes"
        )
    return world_size // model_size
