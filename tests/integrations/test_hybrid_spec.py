"""with_pr2_routers() and pr2_layer_spec() on the spec of a HybridModel's stack, and the model that is built from it."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter

from megatron_pr2 import host
from megatron_pr2.attach import PR2Config, attach
from megatron_pr2.errors import AttachError
from megatron_pr2.integrations.megatron_lm import pr2_layer_spec
from megatron_pr2.integrations.spec import with_pr2_routers
from megatron_pr2.replay.router import PredictiveTopKRouter
from tests.helpers.distributed import pool
from tests.integrations.two_ways import gpt_config
from tests.parallel.hybrid import hybrid_model

pytestmark = pytest.mark.usefixtures("host_platform")


def stack_spec() -> Any:
    hybrid_model()
    from megatron.core.models.hybrid import hybrid_layer_specs

    return hybrid_layer_specs.hybrid_stack_spec


def router_of(spec: Any) -> Any:
    mlp = spec.submodules.moe_layer.submodules.mlp
    return (mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules).router


def test_the_experts_of_a_stack_and_nothing_else() -> None:
    spec = stack_spec()
    before = copy.copy(vars(spec.submodules))
    changed = with_pr2_routers(spec)
    assert router_of(changed) is PredictiveTopKRouter
    assert router_of(spec) is TopKRouter
    assert vars(spec.submodules) == before, "the given spec was changed"
    others = {name: value for name, value in vars(changed.submodules).items() if name != "moe_layer"}
    assert all(value is before[name] for name, value in others.items())
    assert others.keys() | {"moe_layer"} == before.keys()
    assert router_of(with_pr2_routers(changed)) is PredictiveTopKRouter


def test_stacks_without_experts_and_with_other_routers() -> None:
    class Custom(TopKRouter):
        """Somebody's router with a selection of its own."""

    spec = copy.copy(stack_spec())
    dense = copy.copy(spec)
    dense.submodules = copy.copy(spec.submodules)
    dense.submodules.moe_layer = IdentityOp
    with pytest.raises(AttachError, match="the spec has no MoE layer"):
        with_pr2_routers(dense)
    assert with_pr2_routers(dense, require_moe=False) is dense
    custom = copy.deepcopy(spec)
    mlp = custom.submodules.moe_layer.submodules.mlp
    (mlp.keywords["submodules"] if hasattr(mlp, "keywords") else mlp.submodules).router = Custom
    with pytest.raises(AttachError, match=r"spec\.submodules\.moe_layer\.submodules\.mlp\.submodules\.router: Custom is not"):
        with_pr2_routers(custom)


def test_the_spec_that_megatron_lms_arguments_ask_for() -> None:
    stack_spec()
    args = argparse.Namespace(hybrid_layer_pattern="*E*E", transformer_impl="transformer_engine", spec=None)
    spec = pr2_layer_spec(args, gpt_config(moe_layer_freq=1))
    assert router_of(spec) is PredictiveTopKRouter
    assert spec.module is stack_spec().module
    args.spec = ["my_package", "my_spec"]
    with pytest.raises(AttachError, match="--spec my_package my_spec"):
        pr2_layer_spec(args, gpt_config(moe_layer_freq=1))


def build(spec: Any, pattern: str, heads: int | None) -> torch.nn.Module:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    torch.manual_seed(1)
    config = gpt_config(moe_layer_freq=1, moe_grouped_gemm=True, gated_linear_unit=True, mtp_num_layers=heads)
    return HybridModel(config, spec, 64, 64, hybrid_layer_pattern=pattern, position_embedding_type="rope", parallel_output=False)


def model_job() -> dict[str, Any]:
    """A model with a multi-token-prediction head, built from the changed spec and from Megatron-Core's, attached."""
    host.init()
    from megatron.core.models.hybrid import hybrid_layer_specs

    pattern = "*-*E*E/*E"
    by_spec = build(with_pr2_routers(hybrid_layer_specs.hybrid_stack_spec), pattern, heads=1)
    plain = build(hybrid_layer_specs.hybrid_stack_spec, pattern, heads=1)
    by_spec.load_state_dict(plain.state_dict())
    tokens = torch.arange(20).view(2, 10)
    found: dict[str, Any] = {}
    for name, model in (("spec", by_spec), ("plain", plain)):
        routers = {key: type(module).__name__ for key, module in model.named_modules() if isinstance(module, TopKRouter)}
        pr2 = attach(model, PR2Config.preset("pr2"))
        attached = {key for key, module in model.named_modules() if getattr(module, "attached", False)}
        loss = model.eval()(tokens, torch.arange(10).expand(2, -1), None, labels=tokens)
        found[name] = (routers, attached, pr2.moe_layers, loss.detach())
    return found


def test_a_model_is_built_and_its_heads_run_live() -> None:
    stack_spec()
    (found,) = pool(1).run(model_job)
    decoder = {"decoder.layers.3.mlp.router", "decoder.layers.5.mlp.router"}
    for name, kind in (("spec", "PredictiveTopKRouter"), ("plain", "TopKRouter")):
        routers, attached, moe_layers, loss = found[name]
        assert set(routers.values()) == {kind}
        assert decoder < routers.keys(), "the head has no router"
        assert all(key.startswith("mtp.") for key in routers.keys() - decoder)
        assert attached == decoder
        assert moe_layers == (3, 5)
        assert torch.equal(loss, found["plain"][3])
