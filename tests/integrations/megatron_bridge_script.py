"""Megatron-Bridge on the CPU in a process of its own; prints one JSON object.

    python tests/integrations/megatron_bridge_script.py HF_DIRECTORY

`import megatron.bridge` (0.3.1) fails without Transformer Engine, though only its adapters (PEFT) use it; stand-ins for the names
that it looks up are enough for the rest. They are put in place after the host platform has imported Megatron-Core, which would take
them for the real ones.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from megatron_pr2 import host

# The host's modules under what Megatron-Bridge calls their kind; Transformer Engine's own are registered there.
KINDS = {
    "HostColumnParallelGroupedLinear": "column",
    "HostLayerNormColumnParallelLinear": "column",
    "HostRowParallelGroupedLinear": "row",
    "HostLinear": "replicated",
    "HostNorm": "replicated",
}


def stand_in_for_transformer_engine() -> None:
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    pytorch: Any = sys.modules["transformer_engine.pytorch"]
    for name in ("Linear", "LayerNormLinear", "GroupedLinear", "TransformerLayer"):
        setattr(pytorch, name, type(name, (torch.nn.Module,), {}))
    pytorch.ops = SimpleNamespace(Sequential=type("Sequential", (torch.nn.Module,), {}))
    sys.modules["transformer_engine"].__dict__["pytorch"] = pytorch


def run(directory: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as store:
        host.init(rank=0, world_size=1, init_method=f"file://{store}/store")
        import megatron.core.models.gpt
        import megatron.core.optimizer  # noqa: F401

        stand_in_for_transformer_engine()
        return export(directory)


def export(directory: str) -> dict[str, Any]:
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.param_mapping import AutoMapping
    from safetensors.torch import load_file

    from megatron_pr2.attach import PR2Config, attach

    for name, kind in KINDS.items():
        AutoMapping.register_module_type(name, kind)
    bridge = AutoBridge.from_hf_pretrained(directory, dtype=torch.float32)
    provider = bridge.to_megatron_provider(load_weights=True)
    for name, value in {**host.config_overrides(), "params_dtype": torch.float32, "bf16": False, "fp16": False}.items():
        setattr(provider, name, value)
    provider.moe_router_load_balancing_type, provider.moe_aux_loss_coeff = "none", 0.0
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, bf16=False, fp16=False, use_cpu_initialization=True)

    pr2 = attach(model, PR2Config.preset("pr2", hold_back=False))
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_()
    plain = {name: weight.clone() for name, weight in bridge.export_hf_weights(model, show_progress=False)}
    merged = {name: weight.clone() for name, weight in pr2.engine_weights(bridge.export_hf_weights(model, show_progress=False))}
    given = {name: tensor for file in Path(directory).glob("*.safetensors") for name, tensor in load_file(file).items()}
    gates = {f"model.layers.{site.layer}.mlp.gate.weight": pr2.predictor.weight_LEH[site.local] for site in pr2.sites}
    # Loading into an attached model: the other direction of the same mapping.
    bridge.load_hf_weights(model)
    again = dict(bridge.export_hf_weights(model, show_progress=False))
    pr2.detach()
    detached = dict(bridge.export_hf_weights(model, show_progress=False))
    return {
        "model": type(model[0]).__name__,
        "sites": len(pr2.sites),
        "same names": set(plain) == set(merged) == set(given),
        "plain": all(torch.equal(plain[name], tensor) for name, tensor in given.items()),
        "merged": all(torch.equal(merged[name], plain[name] + w_EH) for name, w_EH in gates.items()),
        "rest": all(torch.equal(merged[name], plain[name]) for name in plain if name not in gates),
        "loaded": all(torch.equal(again[name], plain[name]) for name in plain),
        "detached": all(torch.equal(detached[name], plain[name]) for name in plain),
    }


if __name__ == "__main__":
    result = run(sys.argv[1])
    torch.distributed.destroy_process_group()
    sys.stdout.write(json.dumps(result) + "\n")
