"""Every rank exports what it owns: together the full export to the bit, every name once, nothing held twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.bridge import export_weights, load_model
from megatron_pr2.hf.owned_export import owned_engine_weights, owned_gates, owns_dense_weights
from megatron_pr2.prediction.gates import GATE_NAME, set_aside
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.host.models import make_checkpoint, tiny_config

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
TP2_EP2 = {"tensor": 2, "expert": 2, "expert_tensor": 1}


def export_job(
    path: Path, layout: dict[str, Any], wrap_with_ddp: bool, bridge_name: str = "auto"
) -> tuple[list[str], Tensors, Tensors]:
    """(names in order, owned tensors, full export)"""
    host.init(**layout)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=wrap_with_ddp, bridge=bridge_name)
    full = {name: tensor.clone() for name, tensor in export_weights(bridge, chunks)}
    owned = [(name, tensor.clone()) for name, tensor in bridge.export_owned_weights(chunks)]
    return [name for name, _ in owned], dict(owned), full


def check_union(results: list[tuple[list[str], Tensors, Tensors]]) -> None:
    names = [name for owned, _, _ in results for name in owned]
    assert len(names) == len(set(names))
    full = results[0][2]
    assert set(names) == set(full)
    for _, owned, _ in results:
        for name, tensor in owned.items():
            assert tensor.dtype == full[name].dtype, name
            assert torch.equal(tensor, full[name]), name


def experts_of(names: list[str]) -> set[int]:
    return {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}


def is_dense(name: str) -> bool:
    return ".experts." not in name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {}),
        (2, {}),
        (2, {"expert": 2}),
        (2, TP2_EP2),
        (2, {"tensor": 2}),
        (2, {"context": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param(4, {"expert": 2}, marks=pytest.mark.exhaustive),
        pytest.param(4, {"pipeline": 2, "expert": 2}, marks=pytest.mark.exhaustive),
        pytest.param(4, {"tensor": 2, "expert": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_union_over_the_ranks_is_the_full_export(processes: int, layout: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe", tie_word_embeddings=tied))
    results = pool(processes).run(export_job, path, layout, not tied)
    check_union(results)
    if layout == {"expert": 2}:
        assert experts_of(results[0][0]) == set(range(8))
        assert experts_of(results[1][0]) == set(range(8, 16))
        assert not any(is_dense(name) for names, _, _ in results[1:] for name in names)
        assert not any(names for names, _, _ in results[2:])  # data-parallel replicas
    elif "pipeline" in layout:  # nothing crosses stages
        layers = [{int(name.split(".")[2]) for name in names if ".layers." in name} for names, _, _ in results]
        stages = [set().union(*layers[: processes // 2]), set().union(*layers[processes // 2 :])]
        assert not stages[0] & stages[1]
        assert stages[0] | stages[1] == set(range(4))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Shared experts, selection biases, latent attention, dense first layers."""
    path = make_checkpoint(tmp_path / family, tiny_config(family))
    check_union(pool(2).run(export_job, path, TP2_EP2, False))


def gates_job(path: Path, layout: dict[str, Any]) -> tuple[bool, Tensors, Tensors]:
    """(whether this rank owns dense weights, owned with merged gates, full export with merged gates)"""
    from megatron_pr2.attach import attach

    host.init(**layout)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    pr2 = attach(chunks, toy.preset("pr2"))
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    full = {name: tensor.clone() for name, tensor in pr2.engine_weights(export_weights(bridge, chunks))}
    owned = {name: tensor.clone() for name, tensor in owned_engine_weights(pr2, bridge, chunks)}
    gates: Tensors = {}
    late = owned_gates(pr2, gates, horizon=0.0), owned_gates(pr2, gates)
    apart = {name: tensor.clone() for name, tensor in set_aside(bridge.export_owned_weights(chunks), gates)}
    assert not apart.keys() & gates.keys()
    of_r3, merged = map(dict, late)
    assert all(torch.equal(of_r3[name], gate) for name, gate in gates.items())
    assert {**apart, **merged}.keys() == owned.keys()
    assert all(torch.equal({**apart, **merged}[name], tensor) for name, tensor in owned.items())
    plain = {name: tensor for name, tensor in export_weights(bridge, chunks) if GATE_NAME.search(name)}
    assert not any(torch.equal(plain[name], full[name]) for name in plain)
    return owns_dense_weights(), owned, full


@pytest.mark.parametrize("layout", [{"expert": 2}, {"pipeline": 2}, {}])
def test_gates_come_merged(layout: dict[str, Any], tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe"))
    results = pool(2).run(gates_job, path, layout)
    check_union([(list(owned), owned, full) for _, owned, full in results])
    for owns, owned, _ in results:
        assert owns == any(GATE_NAME.search(name) for name in owned)


def memory_job(path: Path) -> tuple[int, int]:
    """(bytes of this rank's part, bytes of the largest tensor of it that is not a view of a parameter)"""
    host.init(**TP2_EP2)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    part, largest = 0, 0
    for _, tensor in bridge.export_owned_weights(chunks):
        part += tensor.nbytes
        if tensor.untyped_storage().data_ptr() not in own:
            largest = max(largest, tensor.untyped_storage().nbytes())
    return part, largest


def test_what_is_gathered_is_gathered_tensor_by_tensor(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe"))
    for part, largest in pool(2).run(memory_job, path):
        assert part > 10 * largest
        assert largest <= 264 * 64 * 4  # the embedding


def refused_job(path: Path) -> str:
    host.init(expert=2)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    bridge.inner.mpu.etp_size = 2
    try:
        next(bridge.export_owned_weights(chunks))
    except ConfigError as error:
        return str(error)
    return ""


def test_shards_that_the_bridge_cannot_join_are_refused_everywhere(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe"))
    assert all("expert_tensor_parallel_size=2" in error for error in pool(2).run(refused_job, path))
