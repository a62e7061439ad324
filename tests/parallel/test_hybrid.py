"""HybridModel, whose attention and experts are layers of their own: the numbers of a GPTModel with its weights, in any layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.attach import PR2Config, attach
from megatron_pr2.hf.bridge import export_weights
from megatron_pr2.parallel.decoder_layers import DecoderLayers
from tests.helpers.distributed import pool
from tests.host.models import make_checkpoint, tiny_config
from tests.parallel import batch, compare
from tests.parallel.batch import ONE, Split
from tests.parallel.case import Case, Result
from tests.parallel.hybrid import add_mamba, hybrid_model, load_hybrid
from tests.parallel.replay import run_case
from tests.parallel.test_matrix import BLOCK, BUDGET, MOE, OVERLAP, PARTS, PP2, REVERSED, TWO, UNIFORM, VPP, case, recomputes

pytestmark = pytest.mark.slow

HIDDEN = 32
# A dense layer first: 8 layers, experts in those with the numbers 3, 5 and 7, which are Hugging Face's 1, 2 and 3.
PATTERN, MOE_LAYERS = "*-*E*E*E", (1, 2, 3)
# Cut before an expert layer: its attention is on the other stage.
WITHIN, STAGES, CHUNKS = "*-*E*|E*E", "*-*E|*E*E", "*-|*E|*E|*E"
# Nemotron-H's kind: no two layers make one of Hugging Face's. The last chunk has no experts.
WITH_MAMBA, MAMBA_STAGES = "M*-*EM*E*EM", "M*-*E|M*E|*E|M"
TP2_EP2 = {"tensor": 2, "expert": 2, "expert_tensor": 1}


def hybrid(pattern: str, *arguments: Any, **settings: Any) -> Case:
    return replace(case(*arguments, **settings), pattern=pattern)


CASES: dict[str, Case] = {
    "one": hybrid(PATTERN, 1, {}),
    "recompute-uniform-packed": hybrid(PATTERN, 1, {}, UNIFORM, packed=True, old=TWO, new=BUDGET),
    "recompute-block": hybrid(PATTERN, 1, {}, {**BLOCK, "recompute_num_layers": 5}, old=TWO, new=Split(reverse=True)),
    "ep2-parts": hybrid(PATTERN, 2, {"expert": 2}, PARTS, old=TWO, new=BUDGET, ddp=OVERLAP),
    "tp2-packed": hybrid(PATTERN, 2, {"tensor": 2}, packed=True, old=BUDGET, new=TWO),
    "cp2-packed": hybrid(PATTERN, 2, {"context": 2}, UNIFORM, packed=True, old=REVERSED, new=BUDGET),
    "pp2-even": hybrid(PATTERN, 2, PP2, {**BLOCK, "recompute_num_layers": 2}, old=TWO, new=BUDGET),
    "pp2-within-a-layer": hybrid(WITHIN, 2, PP2, MOE, old=TWO, new=REVERSED),
    "pp2-vpp2": hybrid(CHUNKS, 2, VPP, UNIFORM, old=REVERSED, new=ONE),
    "tp2-pp2-ep2": hybrid(STAGES, 4, {**TP2_EP2, "pipeline": 2}, MOE, packed=True, old=BUDGET, new=TWO),
    "pp2-vpp2-ep2": hybrid(CHUNKS, 4, {**VPP, "expert": 2}, old=TWO, new=Split(reverse=True), bind="identity"),
}
QUICK = {"one", "pp2-vpp2"}
ROWS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.exhaustive) for name in CASES]


@pytest.fixture(scope="module", autouse=True)
def there_is_one() -> None:
    hybrid_model()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-MoE, whose attention has what HybridModel's default spec has; with a gated shared expert."""
    config = tiny_config(
        "qwen2_moe",
        vocab_size=batch.VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    )
    return make_checkpoint(tmp_path_factory.mktemp("qwen2_moe"), config)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Result:
    """The GPTModel on one process, one unpadded sequence per micro-batch."""
    return pool(1).run(run_case, checkpoint, Case())[0]


@pytest.mark.parametrize("name", ROWS)
def test_numbers_of_a_gpt_model_on_one_process(name: str, checkpoint: Path, expected: Result) -> None:
    row = CASES[name]
    assert tuple(sorted(expected.predictor)) == MOE_LAYERS
    results = pool(row.processes).run(run_case, checkpoint, row)
    compare.assert_same_numbers(results, expected)
    compare.assert_every_route_replayed_once(results, expected, recomputed=recomputes(row))


@pytest.mark.parametrize(
    "row",
    [
        hybrid(WITH_MAMBA, 1, {}, UNIFORM, old=TWO, new=BUDGET),
        pytest.param(hybrid(MAMBA_STAGES, 2, VPP, MOE, old=TWO, new=ONE), marks=pytest.mark.exhaustive),
        pytest.param(hybrid(WITH_MAMBA, 2, {"expert": 2}, PARTS, old=TWO, new=REVERSED), marks=pytest.mark.exhaustive),
    ],
    ids=["recompute", "pp2-vpp2", "ep2"],
)
def test_mamba_layers_among_them(row: Case, checkpoint: Path, tmp_path: Path) -> None:
    """A layer that carries state from token to token, in padded batches: its neighbours' routes stay theirs."""
    path = tmp_path / "mamba"
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    add_mamba(path, WITH_MAMBA, HIDDEN)
    alone = pool(1).run(run_case, path, Case(pattern=WITH_MAMBA))[0]
    assert tuple(sorted(alone.predictor)) == DecoderLayers.of_pattern(WITH_MAMBA).moe == (4, 7, 9)
    assert alone.gradients is not None
    assert alone.gradients["decoder.layers.5.mixer.A_log"].any()
    results = pool(row.processes).run(run_case, path, row)
    compare.assert_same_numbers(results, alone)
    compare.assert_every_route_replayed_once(results, alone, recomputed=recomputes(row))


def merged_job(path: Path, layout: dict[str, Any], pattern: str) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Gates that an engine gets less those of the model, by name, and W_p by Hugging Face's layer."""
    host.init(**layout)
    bridge, chunks = load_hybrid(path, pattern, ddp_config={}, extra_config={"moe_aux_loss_coeff": 0.0})
    pr2 = attach(chunks, PR2Config.preset("pr2", hold_back=False))
    assert pr2.predictor is not None
    for site in pr2.sites:
        generator = torch.Generator().manual_seed(site.column)
        pr2.predictor.weight_LEH[site.local] = torch.randn(pr2.predictor.weight_LEH.shape[1:], generator=generator)
    plain = {name: tensor.clone() for name, tensor in export_weights(bridge, chunks)}
    merged = dict(pr2.engine_weights(export_weights(bridge, chunks)))
    assert plain.keys() == merged.keys()
    changed = {name: merged[name] - tensor for name, tensor in plain.items() if not torch.equal(merged[name], tensor)}
    return changed, {site.hidden_layer: pr2.predictor.weight_LEH[site.local].clone() for site in pr2.sites}


def test_gates_go_to_the_engine_under_hugging_faces_numbers(checkpoint: Path) -> None:
    parts = pool(2).run(merged_job, checkpoint, PP2, WITHIN)
    predictions = {layer: w for _, own in parts for layer, w in own.items()}
    assert sorted(predictions) == list(MOE_LAYERS)
    for changed, _ in parts:
        assert changed.keys() == {f"model.layers.{layer}.mlp.gate.weight" for layer in MOE_LAYERS}
        for layer, w in predictions.items():
            assert torch.allclose(changed[f"model.layers.{layer}.mlp.gate.weight"], w, atol=1e-6)
