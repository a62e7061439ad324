"""Mamba-2 layers on the host: Megatron-Core's mixer with plain torch in the place of the two kernels of ``mamba_ssm``.

Megatron-Core's mixer has a path that needs no fused kernel (``use_mamba_mem_eff_path=False``): a convolution of torch, a scan and a
gated norm, and only the latter two come from ``mamba_ssm``, whose kernels are Triton's and run on GPUs alone. Training with padded
batches works; packed sequences need the fused kernel, and inference its decoding kernels.

Suffixes: B batch, S positions, h heads, g groups, P head dimension, N state.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_pr2.errors import ConfigError
from megatron_pr2.host.patches import PatchSet


def scan(
    x_BShP: torch.Tensor,
    dt_BSh: torch.Tensor,
    decay_h: torch.Tensor,
    in_BSgN: torch.Tensor,
    out_BSgN: torch.Tensor,
    chunk_size: int,
    *,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor,
    dt_softplus: bool = True,
    return_final_states: bool = False,
    initial_states: torch.Tensor | None = None,
    state_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The selective state space of Mamba-2 (arXiv 2405.21060) as it is defined, position by position, in fp32.

    ``h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`` and ``y_t = C_t h_t + D x_t`` in every head; `decay_h` is A, `in_BSgN` B and
    `out_BSgN` C. The signature is that of ``mamba_ssm.mamba_chunk_scan_combined``; `chunk_size` is the kernel's and unused.

    Raises:
        ConfigError: inference, or a mixer without a norm of its own (`z`).
    """
    if z is not None or return_final_states or initial_states is not None:
        raise ConfigError("Mamba layers on the host: training with a gated norm only; inference and rmsnorm=False need mamba_ssm")
    heads = x_BShP.shape[2]
    dt = dt_BSh.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    in_BShN, out_BShN = (part.float().repeat_interleave(heads // part.shape[2], dim=2) for part in (in_BSgN, out_BSgN))
    kept_BSh = torch.exp(dt * decay_h)
    added_BShPN = (dt[..., None] * x_BShP.float())[..., None] * in_BShN[..., None, :]
    state_BhPN = torch.zeros_like(added_BShPN[:, 0])
    outputs = []
    for position in range(x_BShP.shape[1]):
        state_BhPN = kept_BSh[:, position, :, None, None] * state_BhPN + added_BShPN[:, position]
        outputs.append((state_BhPN * out_BShN[:, position, :, None, :]).sum(-1))
    skip = D.float() if D.dim() == 2 else D.float()[:, None]
    return (torch.stack(outputs, dim=1) + skip * x_BShP.float()).to(x_BShP.dtype)


class HostGatedNorm(torch.nn.Module):
    """Stands in for the mixer's ``ExtendedRMSNorm``: RMSNorm of ``x * silu(z)`` within groups; parameter ``weight``."""

    tp_group: torch.distributed.ProcessGroup | None = None

    def __init__(
        self, hidden_size: int, eps: float, group_size: int, norm_before_gate: bool, device: Any, dtype: torch.dtype
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ConfigError("Mamba layers on the host: norm_before_gate=True is not supported, nor by Megatron-Core")
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, hidden: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        gated = hidden.float() * F.silu(z.float())
        grouped = gated.unflatten(-1, (-1, self.group_size))
        normed = F.rms_norm(grouped, (self.group_size,), eps=self.eps).flatten(-2)
        return (normed * self.weight.float()).to(hidden.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        group = self.tp_group or parallel_state.get_tensor_model_parallel_group()
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets, tp_group=group, dp_cp_group=(metadata or {})["dp_cp_group"]
        )


def patch_mamba(patches: PatchSet) -> None:
    """Gives the mixer what it would take from ``mamba_ssm``; a real one that is installed is replaced, too: it needs a GPU."""
    mixer = importlib.import_module("megatron.core.ssm.mamba_mixer")
    patches.set(mixer, "HAVE_MAMBA_SSM", True)
    patches.set(mixer, "mamba_chunk_scan_combined", scan)
    patches.set(mixer, "ExtendedRMSNorm", HostGatedNorm)
    patches.set(mixer, "causal_conv1d_fn", None)
