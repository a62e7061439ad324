"""What a bridge between Hugging Face checkpoints and Megatron-Core models does for this package, and which rank owns which weight.

The rest of the package knows this interface only. Its back ends are :mod:`megatron_pr2.hf.mbridge_backend` and
:mod:`megatron_pr2.hf.megatron_bridge_backend`; :func:`megatron_pr2.hf.bridge.load_model` chooses one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2.hf.files import TensorIndex

Chunks = list[torch.nn.Module]


class Bridge(Protocol):
    """One model family under one parallel state. Whatever takes chunks is collective: every rank calls it.

    Attributes:
        source_config: the Hugging Face config as it was read.
        dtype: of the parameters.
        config: Megatron's TransformerConfig of the model.
    """

    source_config: Any
    dtype: torch.dtype
    config: Any

    def build(self, *, wrap_with_ddp: bool, ddp_config: Mapping[str, Any]) -> Chunks:
        """This rank's part of the model, its weights not loaded: one chunk, or one per virtual pipeline stage.

        Args:
            ddp_config: fields of DistributedDataParallelConfig.
        """

    def parameter_names(self, chunks: Chunks) -> set[str]:
        """Hugging Face names of the tensors that this rank's parameters are made of.

        Raises:
            ConfigError: a parameter that the library has no name for.
        """

    def load_weights(self, chunks: Chunks, files: TensorIndex) -> None:
        """Fills the chunks from a Hugging Face directory whose names have been checked."""

    def export_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of the whole model on every rank; a tied embedding may come twice."""

    def export_owned_weights(self, chunks: Chunks) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, full tensor) of every parameter that this rank owns (:func:`owns_weights`).

        Ranks yield different numbers of tensors, some none; yet every rank must walk it to the end, because tensor-parallel peers
        send it their shards on the way. At most one gathered tensor is held at a time. Tensors may alias the model's parameters:
        copy what must survive the next update.

        Raises:
            ConfigError: at the first step and on every rank, for a layout in which the library cannot put a tensor together.
        """


def owns_weights(*, experts: bool) -> bool:
    """Whether this rank's data-parallel replica yields weights of its stage; its first tensor-parallel rank then has them whole.

        experts        the ranks of expert-data-parallel rank 0, each its own (with expert tensor parallelism its first rank)
        anything else  tensor-parallel rank 0 of data-parallel rank 0 of each pipeline stage
    """
    return (mpu.get_expert_data_parallel_rank() if experts else mpu.get_data_parallel_rank(with_context_parallel=True)) == 0
