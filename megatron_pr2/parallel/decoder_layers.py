"""The decoder layers of a model, and which of them have a router: by Megatron-Core's numbers and by Hugging Face's.

A layer of GPTModel is one of Hugging Face's: attention and a feed-forward part. HybridModel (MambaModel, in releases that do not
have it) makes each of the two a layer of its own and takes their order from a pattern: in "*E*-" the layers are attention, experts,
attention, a dense feed-forward part. "|" cuts the pattern into pipeline stages and is no layer, "/" begins the patterns of
multi-token-prediction heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_pr2.parallel.grid import moe_layer_indices

# Symbols of megatron.core.models.hybrid.hybrid_layer_allocation, which older releases do not have.
EXPERTS, DENSE, STAGE_END, HEADS = "E", "-", "|", "/"
# Where a built model keeps its pattern: HybridModel, and MambaModel of older releases.
_PATTERN_NAMES = ("hybrid_layer_pattern", "hybrid_override_pattern")


@dataclass(frozen=True)
class DecoderLayers:
    """Megatron-Core's decoder layers and Hugging Face's hidden layers of the same model; all indices are 0-based.

    Attributes:
        count: decoder layers of the model.
        moe: those with a router, ascending: the L axis of a RouteTable.
        per_hidden_layer: decoder layers that make one hidden layer of Hugging Face's: 2 for a pattern in which an attention, Mamba
            or DeltaNet layer and a feed-forward layer take turns, else 1 (GPTModel, Nemotron-H).
    """

    count: int
    moe: tuple[int, ...]
    per_hidden_layer: int = 1

    @classmethod
    def of_model(cls, model: Any) -> DecoderLayers:
        """Of a GPTModel, HybridModel or MambaModel without its wrappers.

        Raises:
            ConfigError: a list in `moe_layer_freq` of another length than `num_layers`.
        """
        pattern = hybrid_pattern(model)
        if pattern is not None:
            return cls.of_pattern(pattern)
        return cls(model.config.num_layers, moe_layer_indices(model.config.num_layers, model.config.moe_layer_freq))

    @classmethod
    def of_pattern(cls, pattern: str) -> DecoderLayers:
        """Of the pattern of a HybridModel."""
        kinds = "".join(pattern_segments(pattern))
        turns = [kind in (EXPERTS, DENSE) for kind in kinds]
        paired = len(kinds) % 2 == 0 and not any(turns[::2]) and all(turns[1::2])
        return cls(len(kinds), tuple(i for i, kind in enumerate(kinds) if kind == EXPERTS), 2 if paired else 1)

    @property
    def hidden_count(self) -> int:
        """Hidden layers in Hugging Face's sense."""
        return self.count // self.per_hidden_layer

    @property
    def hidden_moe(self) -> tuple[int, ...]:
        """Hidden layers that have a router, in the order of `moe`."""
        return tuple(layer // self.per_hidden_layer for layer in self.moe)

    @property
    def of_hidden(self) -> Mapping[int, int]:
        """Hidden layer -> the decoder layer that has its router."""
        return dict(zip(self.hidden_moe, self.moe, strict=True))


def hybrid_pattern(model: Any) -> str | None:
    """The pattern that a HybridModel or MambaModel was built from, None for any other model."""
    return next((pattern for name in _PATTERN_NAMES if (pattern := getattr(model, name, None)) is not None), None)


def pattern_segments(pattern: str) -> list[str]:
    """The decoder's part of a pattern, cut at the ends of pipeline stages; one segment where it has no "|"."""
    return pattern.split(HEADS)[0].split(STAGE_END)
