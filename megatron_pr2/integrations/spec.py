"""PredictiveTopKRouter through the layer spec: `MoESubmodules.router`, Megatron-Core's own hook.

    spec = with_pr2_routers(get_gpt_decoder_block_spec(config, use_transformer_engine=True))
    model = GPTModel(config, spec, ...)
    pr2 = attach(model, PR2Config.preset("pr2"))

The spec decides which class a model is built with; `attach` still makes the handle, and upgrades plain TopKRouters anyway. Use the
spec where something looks at module classes before `attach` can run: FSDP wrapping, torch.compile, quantization, a class check.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_pr2.errors import AttachError
from megatron_pr2.releases import TRIED
from megatron_pr2.replay.router import PredictiveTopKRouter


def with_pr2_routers(spec: Any, *, require_moe: bool = True) -> Any:
    """A copy of a spec whose MoE layers are built with PredictiveTopKRouter; the given one is not changed.

    Args:
        spec: what get_gpt_decoder_block_spec, get_gpt_decoder_layer_specs, get_gpt_layer_local_spec,
            get_gpt_layer_with_transformer_engine_spec, get_moe_module_spec and their like return: TransformerBlockSubmodules, a
            ModuleSpec, a functools.partial of MoELayer, or a list of these; or the spec of a HybridModel's stack. Layers that share
            one spec share the copy. The spec of multi-token-prediction heads comes back unchanged: nothing is replayed there.
        require_moe: refuse a spec without MoE layers. Set it to False for the spec of one pipeline stage, which may have only dense
            ones.

    Raises:
        AttachError: no MoE layer, a router class that cannot be replayed, or a kind of spec that is not known; naming where.
    """
    if isinstance(spec, MultiTokenPredictionBlockSubmodules):
        return spec
    transform = _Transform()
    changed = transform.apply(spec, "spec")
    if require_moe and not transform.routers:
        raise AttachError(
            "with_pr2_routers(): the spec has no MoE layer; build it from a config with num_moe_experts, or, if this is a pipeline "
            "stage of dense layers only, pass require_moe=False"
        )
    return changed


class _Transform:
    """Copies a spec along the paths that lead to routers, each shared part once."""

    def __init__(self) -> None:
        self.routers = 0
        # The original is kept beside its copy: an id is only unique among living objects.
        self._done: dict[int, tuple[Any, Any]] = {}

    def apply(self, spec: Any, where: str) -> Any:
        if id(spec) not in self._done:
            self._done[id(spec)] = (spec, self._changed(spec, where))
        return self._done[id(spec)][1]

    def _changed(self, spec: Any, where: str) -> Any:
        if isinstance(spec, list | tuple):
            return type(spec)(self.apply(layer, f"{where}[{index}]") for index, layer in enumerate(spec))
        if isinstance(spec, MoESubmodules):
            return self._moe(spec, where)
        if isinstance(spec, TransformerBlockSubmodules):
            return _copy(spec, layer_specs=self.apply(list(spec.layer_specs or ()), f"{where}.layer_specs"))
        if isinstance(spec, ModuleSpec):
            return self._module(spec, where)
        if isinstance(spec, functools.partial) and _builds_moe(spec):
            return self._partial(spec, where)
        raise AttachError(
            f"{where}: {type(spec).__name__} is no spec of a GPT decoder; expected TransformerBlockSubmodules, a ModuleSpec, a "
            "partial of MoELayer or a list of these, as megatron.core.models.gpt.gpt_layer_specs returns them"
        )

    def _module(self, spec: ModuleSpec, where: str) -> ModuleSpec:
        """A module with submodules: a MoE layer, a block, a stack, or a layer, dense or with a MoE layer as its `mlp`."""
        inner = spec.submodules
        if isinstance(inner, MoESubmodules | TransformerBlockSubmodules):
            return _copy(spec, submodules=self.apply(inner, f"{where}.submodules"))
        if _builds_moe(spec):
            raise _unreachable(where, spec.module, inner)
        if isinstance(experts := getattr(inner, "moe_layer", None), ModuleSpec):  # a HybridModel's stack has one spec per kind
            changed = self.apply(experts, f"{where}.submodules.moe_layer")
            return spec if changed is experts else _copy(spec, submodules=_copy(inner, moe_layer=changed))
        mlp = getattr(inner, "mlp", None)
        if isinstance(mlp, ModuleSpec) or (isinstance(mlp, functools.partial) and _builds_moe(mlp)):
            changed = self.apply(mlp, f"{where}.submodules.mlp")
            return spec if changed is mlp else _copy(spec, submodules=_copy(inner, mlp=changed))
        if _builds_moe(mlp):
            raise AttachError(
                f"{where}.submodules.mlp: {_name(mlp)} without submodules; expected ModuleSpec(module=MoELayer, submodules="
                "MoESubmodules(...)) or functools.partial(MoELayer, submodules=MoESubmodules(...))"
            )
        return spec  # a dense layer

    def _partial(self, spec: functools.partial[Any], where: str) -> functools.partial[Any]:
        """A MoE layer as later releases write it: the class with its submodules bound."""
        inner = spec.keywords.get("submodules")
        if not isinstance(inner, MoESubmodules):
            raise _unreachable(where, spec.func, inner)
        changed = self.apply(inner, f"{where}.submodules")
        return spec if changed is inner else functools.partial(spec.func, *spec.args, **{**spec.keywords, "submodules": changed})

    def _moe(self, submodules: MoESubmodules, where: str) -> MoESubmodules:
        if not hasattr(submodules, "router"):
            raise AttachError(
                f"{where}: MoESubmodules of this Megatron-Core has no `router`, and its routers no hook for replay; use one of the "
                f"tested releases: {', '.join(TRIED)}"
            )
        router = submodules.router
        self.routers += 1
        if router is TopKRouter:
            return _copy(submodules, router=PredictiveTopKRouter)
        if isinstance(router, type) and issubclass(router, PredictiveTopKRouter):
            return submodules
        raise AttachError(
            f"{where}.router: {_name(router)} is not Megatron-Core's TopKRouter, and its routing is unknown here; derive it from "
            "megatron_pr2.replay.router.PredictiveTopKRouter or use TopKRouter"
        )


def _copy(spec: Any, **changes: Any) -> Any:
    """A shallow copy with other fields; subclasses of Megatron's dataclasses keep what they add."""
    copied = copy.copy(spec)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied


def _unreachable(where: str, module: Any, inner: Any) -> AttachError:
    return AttachError(
        f"{where}: {_name(module)} is a MoE layer with {type(inner).__name__} as submodules; expected MoESubmodules, "
        "whose `router` names the class to build; without it build the model first and call attach()"
    )


def _builds_moe(builder: Any) -> bool:
    """Whether building it makes a MoE layer: the class, a ModuleSpec of it, or a functools.partial."""
    module = getattr(builder, "func", getattr(builder, "module", builder))
    return isinstance(module, type) and issubclass(module, MoELayer)


def _name(builder: Any) -> str:
    return getattr(builder, "__name__", None) or repr(builder)
