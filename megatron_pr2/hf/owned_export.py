"""Export without a whole model on any rank: every rank gives the engine the weights that it owns, in Hugging Face names.

Over all ranks that is the model, every name once; :func:`megatron_pr2.hf.base.owns_weights` says which rank has which. Shards
are gathered tensor by tensor within a tensor-parallel group; nothing is sent between pipeline stages or data-parallel ranks, and no
expert between expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_pr2.hf.base import Bridge, Chunks, owns_weights

if TYPE_CHECKING:
    from megatron_pr2.attach import PR2
    from megatron_pr2.prediction.pushes import Version


def owns_dense_weights() -> bool:
    """Whether this rank yields the weights of its pipeline stage that are not experts, the gates among them."""
    return owns_weights(experts=False) and mpu.get_tensor_model_parallel_rank() == 0


def owned_engine_weights(
    pr2: PR2, bridge: Bridge, chunks: Chunks, *, version: Version | None = None, gate_dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What this rank owns, for an engine: `bridge.export_owned_weights` with W + beta W_p in the gates.

    Args:
        bridge, chunks: of :func:`megatron_pr2.hf.bridge.load_model`.
        version, gate_dtype: as for `PR2.engine_weights`.

    Raises:
        AttachError: after the last weight, if W_p is not finite or a gate of this stage was not among them.
    """
    owned = bridge.export_owned_weights(chunks)
    # Also where no gate passes: every rank keeps what was pushed.
    return pr2.engine_weights(owned, version=version, gate_dtype=gate_dtype, own_stage=True, has_gates=owns_dense_weights())


def owned_gates(
    pr2: PR2,
    gates: Mapping[str, Tensor],
    *,
    version: Version | None = None,
    gate_dtype: torch.dtype | None = None,
    horizon: float | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of the gates for a horizon; the rest of the weights is what `set_aside` passes through.

        gates: dict[str, Tensor] = {}
        rest = set_aside(bridge.export_owned_weights(chunks), gates)
        engine.update_owned_weights(rest, version, {h: owned_gates(pr2, gates, version=version, horizon=h) for h in horizons})

    Args:
        gates: the router's own by Hugging Face name, none on ranks that do not own them; may be filled until they are walked.
        version, gate_dtype, horizon: as for `PR2.engine_weights`.
    """

    def late() -> Iterator[tuple[str, Tensor]]:
        yield from gates.items()

    how: dict[str, Any] = {"version": version, "gate_dtype": gate_dtype, "horizon": horizon}
    return pr2.engine_weights(late(), own_stage=True, has_gates=owns_dense_weights(), **how)
