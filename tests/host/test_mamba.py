"""Mamba layers on the host: Megatron-Core's mixer with the host's scan and norm against Transformers' of the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.host.mamba import scan
from tests.helpers.distributed import pool
from tests.integrations.two_ways import gpt_config
from tests.parallel.hybrid import MAMBA, hybrid_model

HIDDEN, HEADS = 32, 8


def mixers() -> tuple[Any, Any]:
    """Megatron-Core's and Transformers' with the same weights, and a norm before the former that changes nothing."""
    from megatron.core.models.hybrid import hybrid_layer_specs
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    config = gpt_config(hidden_size=HIDDEN, moe_layer_freq=1, moe_grouped_gemm=True, **MAMBA)
    model = HybridModel(config, hybrid_layer_specs.hybrid_stack_spec, 64, 64, hybrid_layer_pattern="ME")
    ours = model.decoder.layers[0].mixer
    theirs = NemotronHMamba2Mixer(
        NemotronHConfig(
            hidden_size=HIDDEN,
            mamba_num_heads=HEADS,
            mamba_head_dim=MAMBA["mamba_head_dim"],
            n_groups=MAMBA["mamba_num_groups"],
            ssm_state_size=MAMBA["mamba_state_dim"],
            chunk_size=8,
        ),
        layer_idx=0,
    )
    generator = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in theirs.named_parameters()}
    theirs.load_state_dict({name: w + 1.0 if name == "norm.weight" else w for name, w in weights.items()})
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Later releases keep the convolution's two tensors without a module.
            flat = name.replace("conv1d.", "conv1d_")
            ours.get_parameter(flat if flat in dict(ours.named_parameters()) else name).copy_(parameter)
        ours.in_proj.layer_norm_weight.fill_(1.0)
    return ours, theirs


def mixer_job() -> tuple[float, float, float]:
    """Deviations of output and gradients of the input and of the state's decay, as shares of the largest entry."""
    host.init()
    ours, theirs = mixers()
    hidden_BSH = torch.randn(2, 19, HIDDEN, generator=torch.Generator().manual_seed(4))
    first, second = (hidden_BSH.clone().requires_grad_() for _ in range(2))
    output_SBH, _ = ours(first.transpose(0, 1))
    expected_BSH = theirs(F.rms_norm(second, (HIDDEN,), eps=1e-5))
    for output in (output_SBH.transpose(0, 1), expected_BSH):
        (output * torch.linspace(-1.0, 1.0, output.numel()).view_as(output)).sum().backward()
    pairs = [
        (output_SBH.transpose(0, 1), expected_BSH),
        (first.grad, second.grad),
        (ours.A_log.grad, theirs.A_log.grad),
    ]
    found = [float((value - wanted).abs().max() / wanted.abs().max()) for value, wanted in pairs]
    return found[0], found[1], found[2]


def test_the_mixer_is_that_of_transformers(host_platform: None) -> None:
    hybrid_model()
    (found,) = pool(1).run(mixer_job)
    # Sums of a few hundred fp32 terms in another order.
    assert max(found) < 500 * torch.finfo(torch.float32).eps


def test_what_only_inference_needs_is_refused() -> None:
    part, heads = torch.zeros(1, 3, 4, 8), torch.zeros(4)
    arguments: Any = (part, part[..., 0], heads, part[:, :, :2], part[:, :, :2], 128)
    assert scan(*arguments, D=heads, dt_bias=heads).shape == part.shape
    with pytest.raises(ConfigError, match="inference and rmsnorm=False need mamba_ssm"):
        scan(*arguments, D=heads, dt_bias=heads, return_final_states=True)
