"""Models that mbridge and Megatron-Bridge build: they attach, and their exports give gates merged or plain."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_pr2.errors import AttachError
from megatron_pr2.gates import GATE_NAME, merge_gates
from megatron_pr2.router import PredictiveTopKRouter
from tests.distributed import pool

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/integrations/megatron_bridge_script.py"


class HFWeightTuple(NamedTuple):
    """What Megatron-Bridge's export_hf_weights yields; the names of its fields are Megatron-Bridge's."""

    param_name: str
    weight: torch.Tensor


# ---- what an export may look like --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [HFWeightTuple, lambda *values: values, lambda *values: list(values)], ids=["named", "tuple", "list"]
)
def test_any_iterable_of_pairs_is_taken(pair: Any) -> None:
    def export() -> Iterator[Any]:
        yield pair("model.layers.1.mlp.gate.weight", torch.ones(4, 2))
        yield pair("model.layers.1.mlp.gate.e_score_correction_bias", torch.ones(4))

    merged = dict(merge_gates(export(), {1: torch.full((4, 2), 0.5)}))
    assert torch.equal(merged["model.layers.1.mlp.gate.weight"], torch.full((4, 2), 1.5))
    assert torch.equal(merged["model.layers.1.mlp.gate.e_score_correction_bias"], torch.ones(4))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.gate.weight", 7),  # Qwen, DeepSeek, GLM, OLMoE
        ("model.layers.7.block_sparse_moe.gate.weight", 7),  # Mixtral
        ("model.language_model.layers.7.mlp.gate.weight", 7),  # decoders of vision-language models
        ("model.layers.7.mlp.shared_experts.gate.weight", None),
        ("model.layers.7.mlp.shared_expert_gate.weight", None),
        ("model.layers.7.mlp.experts.0.gate_proj.weight", None),
        ("mtp.layers.0.mlp.gate.weight", None),  # heads of Qwen3-Next, which number their layers anew
    ],
)
def test_gates_by_the_names_that_bridges_give_them(name: str, layer: int | None) -> None:
    found = GATE_NAME.search(name)
    assert (int(found.group(1)) if found else None) == layer


def test_megatron_bridge_takes_the_router_for_replicated() -> None:
    """It goes by class name, knows only TopKRouter's, and then asks the module for this attribute."""
    assert PredictiveTopKRouter.tensor_model_parallel is False


# ---- mbridge -----------------------------------------------------------------------------------------------------------


def mbridge_job(checkpoint: Path, expert: int, pipeline: int) -> dict[str, Any]:
    from megatron_pr2 import host
    from megatron_pr2.attach import PR2Config, attach
    from megatron_pr2.bridge import load_model

    host.init(expert=expert, pipeline=pipeline)
    # The bridge is mbridge's own class; load_model() fits its configuration to Transformers 5 and to the host.
    bridge, chunks = load_model(checkpoint, dtype=torch.float32)

    def plain_export() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {name: tensor.clone() for name, tensor in bridge.export_weights(chunks)}

    before = plain_export()
    pr2 = attach(chunks, PR2Config.preset("pr2", hold_back=False))
    assert pr2.predictor is not None
    for site in pr2.sites:  # the same on every rank that has the layer
        pr2.predictor.weight_LEH[site.local].normal_(generator=torch.Generator().manual_seed(site.layer))
    plain = plain_export()
    with torch.no_grad():
        merged = dict(pr2.engine_weights(bridge.export_weights(chunks)))
    gates = {name: int(found.group(1)) for name in plain if (found := GATE_NAME.search(name))}

    def w_p(layer: int) -> torch.Tensor:
        shape = plain[f"model.layers.{layer}.mlp.gate.weight"].shape
        return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(layer))

    with pytest.raises(AttachError, match="merged the gates of layers"):
        list(pr2.engine_weights((f"decoder.{name}.x", tensor) for name, tensor in plain.items()))
    pr2.detach()
    after = plain_export()
    return {
        "gates": sorted(gates.values()),
        "unchanged": all(torch.equal(before[name], plain[name]) and torch.equal(before[name], after[name]) for name in before),
        "merged": all(torch.equal(merged[name], plain[name] + w_p(layer)) for name, layer in gates.items()),
        "rest": all(torch.equal(merged[name], plain[name]) for name in plain if name not in gates),
        "same names": list(merged) == list(plain) == list(before),
    }


@pytest.mark.parametrize(("ranks", "expert", "pipeline"), [(1, 1, 1), (2, 2, 1), (2, 1, 2)], ids=["one", "expert", "pipeline"])
def test_mbridge_exports_gates_merged_or_plain(tiny_checkpoint: Path, ranks: int, expert: int, pipeline: int) -> None:
    for found in pool(ranks).run(mbridge_job, tiny_checkpoint, expert, pipeline):
        assert found == {"gates": [0, 1], "unchanged": True, "merged": True, "rest": True, "same names": True}


# ---- Megatron-Bridge ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("megatron.bridge") is None, reason="pip install --no-deps megatron-bridge==0.3.1")
def test_megatron_bridge_exports_gates_merged_or_plain(tiny_checkpoint: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(SCRIPT), str(tiny_checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("model") == "GPTModel"
    assert found.pop("sites") == 2
    assert all(found.values()), found
