"""ProximalPolicy: an exponential moving average of the policy's weights, which the model can be run with.

PPO-EWMA (Hilton, Cobbe, Schulman 2021, https://arxiv.org/abs/2110.00641; weights as in `EwmaModel` of
https://github.com/openai/ppo-ewma/blob/master/ppo_ewma/ppg.py). After n updates

    average = sum_k decay^(n-k) theta_k / sum_k decay^(n-k),    k = 0 .. n,

so that the first weights count no more than any others. Its mean age tends to decay / (1 - decay) updates, and its half-life is
log(1/2) / log(decay): an average that is a updates old is decay = a / (1 + a).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from megatron_pr2.errors import CheckpointError, ConfigError
from megatron_pr2.prediction.ahead_weights import require_no_gathering, swapped_in
from megatron_pr2.replay.sites import unwrapped


class ProximalPolicy:
    """The average of this rank's weights; each rank keeps its own part, under any parallel layout.

    It is fp32 whatever the weights are: in bf16 an average does not follow weights that move by less than 1 / (1 - decay) of its
    spacing. It takes 4 bytes per parameter of the rank, also under a distributed optimizer, and while it is swapped in the weights
    themselves once more. Buffers (an expert bias) are not averaged; they stay the trainer's.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], decay: float, *, device: torch.device | None = None) -> None:
        """Begins at the current weights.

        Args:
            chunks: the model, plain or wrapped.
            decay: weight of the average's past per update, in [0, 1).
            device: where the average is kept; None keeps each part where its weights are. On the CPU it costs one copy of the
                weights over the bus per update, and two more per swap.

        Raises:
            ConfigError: decay is out of range.
            AttachError: the chunks gather weights during the forward, which would undo the swap.
        """
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"proximal_decay={decay}: expected a number in [0, 1)")
        require_no_gathering(chunks, "the average that is swapped in", "old_logprobs=ewma")
        self.decay = decay
        self.updates = 0
        # The sum of the weights in the average.
        self._total = 1.0
        self._parameters = {
            f"{i}.{name}": parameter for i, chunk in enumerate(chunks) for name, parameter in unwrapped(chunk).named_parameters()
        }
        self._average = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the current weights into the average; after every update of the policy."""
        self._total = self.decay * self._total + 1.0
        for name, parameter in self._parameters.items():
            average = self._average[name]
            average.lerp_(parameter.detach().to(average.device, torch.float32), 1.0 / self._total)
        self.updates += 1

    def swapped_in(self) -> AbstractContextManager[None]:
        """The model runs with the average; see :func:`megatron_pr2.prediction.ahead_weights.swapped_in`."""
        return swapped_in(self._parameters.values(), self._average.values())

    def sharded_state_dict(self, model: dict[str, Any]) -> dict[str, Any]:
        """The average as shards that any parallel layout can read; `model` are the chunks' own (checkpoint.model_shards).

        Raises:
            CheckpointError: the model does not say how one of its weights is sharded.
        """
        sharded = get_param_id_to_sharded_param_map(model, self._parameters.values())
        if absent := [name for i, name in enumerate(self._parameters) if i not in sharded]:
            raise CheckpointError(
                f"the model's sharded state dict has no entry for {absent[0]} and {len(absent) - 1} other weights; a module "
                "without sharded_state_dict() cannot be in a checkpoint of the moving average"
            )
        shards = {
            name: make_sharded_optimizer_tensor(sharded[i], average, "proximal")
            for i, (name, average) in enumerate(self._average.items())
        }
        return {"average": shards, "total": self._total, "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Takes what was read for :meth:`sharded_state_dict`."""
        for name, average in self._average.items():
            average.copy_(loaded["average"][name])
        self._total, self.updates = float(loaded["total"]), int(loaded["updates"])
