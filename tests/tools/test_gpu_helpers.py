"""The GPU checks on the CPU: whatever they run on a device runs here on the host, so that only the device is left to fail."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer import transformer_config
from megatron.core.transformer.moe import moe_utils

from tests.gpu import (
    models,
    needs,
    test_bench,
    test_cuda_graphs,
    test_flex,
    test_invariants,
    test_models,
    test_no_sync,
    test_trainer,
    test_transformer_engine,
    toys,
)
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = [pytest.mark.usefixtures("host_platform"), pytest.mark.exhaustive]

CPU, BF16 = torch.device("cpu"), torch.bfloat16


# ---- the toy model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["groups", "fp32-router"])
def test_i1_and_i2_hold_here_too(kind: str) -> None:
    test_invariants.test_i1_a_zero_predictor_is_r3_bit_by_bit(kind, True, CPU)
    for strategy in test_invariants.STRATEGIES:
        test_invariants.test_i2_a_learning_predictor_does_not_touch_the_policy(kind, strategy, False, CPU)


@pytest.mark.parametrize("target", ["post", "delta"])
@pytest.mark.parametrize("kind", ["pre-softmax", "groups", "fp32-router"])
def test_i5_holds_here_too(kind: str, target: str) -> None:
    config = toy.toy_config(params_dtype=BF16, **toy.ROUTERS[kind])
    assert test_invariants.largest_error(config, toys.LENGTHS, target, True, CPU) > 0.0


@pytest.mark.parametrize("kind", test_cuda_graphs.KINDS)
def test_static_routes_are_a_sessions_routes(kind: str) -> None:
    test_cuda_graphs.check_replay(kind, CPU)
    test_cuda_graphs.check_record(kind, CPU)


@pytest.mark.parametrize("name", test_no_sync.PASSES)
def test_passes_can_be_repeated(name: str) -> None:
    pr2, one_pass, _ = test_no_sync.prepared(name, "groups", True, CPU, layers=3)
    called: list[str] = []
    for new_batch in (False, True):
        one_pass(lambda: called.append("before"), lambda: called.append("after"), new_batch=new_batch)
    assert called == ["before", "after"] * 2
    report = pr2.step(0.1)
    assert (report["predictor"]["tokens"] > 0) == (name in ("learn", "everything"))
    assert ("hold_back" in report) == (name == "everything")


# ---- whole models ----------------------------------------------------------------------------------------------------


def model_job() -> dict[str, Any]:
    """Every check of whole models with both layer specs, as far as a CPU goes."""
    from megatron_pr2 import host

    host.init()
    told: dict[str, Any] = {}
    for spec in models.SPECS:
        told[f"i1 i2 {spec}"] = test_models.check_i1_i2(spec, on_gpu=False)
        told[f"padding {spec}"] = test_models.check_padding(spec, on_gpu=False)
    for dispatcher in ("alltoall", "allgather"):
        told[dispatcher] = test_transformer_engine.check_permute_fusion("te", dispatcher, on_gpu=False)
    kernel = moe_utils.topk_routing_with_score_function
    with (
        mock.patch.object(moe_utils, "HAVE_TE", True),
        mock.patch.object(moe_utils, "fused_topk_with_score_function", lambda **settings: kernel(**settings), create=True),
    ):
        told["fused router"] = test_transformer_engine.check_fused_router("te", on_gpu=False)
    test_transformer_engine.check_modules(models.build("te", models.model_config("te", on_gpu=False)))
    # Padding changes the routing map after the router returned it: without a copy every padded row looks wrong.
    with mock.patch.object(models, "observed", toy.observed):
        config = models.model_config("te", on_gpu=False)
        told["wrong if not copied"] = models.replay("te", config, padding=True).wrong
    return told


def test_checks_of_whole_models_pass_on_the_host() -> None:
    (told,) = pool(1).run(model_job)
    assert told.pop("wrong if not copied") > 0
    assert len(told) == 7
    assert all(told.values())


def dispatcher_job() -> dict[str, Any]:
    from megatron_pr2 import host

    host.init(expert=2)
    return test_flex.compare_dispatchers("te", "alltoall", "allgather", on_gpu=False)


def test_dispatchers_are_compared_under_expert_parallelism() -> None:
    results = pool(2).run(dispatcher_job)
    assert test_flex.judge(results).startswith("losses off by")
    with pytest.raises(AssertionError):
        test_flex.judge([results[0], {**results[1], "wrong": 1}])


def trainer_job(directory: Path) -> str:
    from megatron_pr2 import host

    host.init()
    return test_trainer.check_trainer(directory)


def test_the_trainers_check_passes_on_the_host(tmp_path: Path) -> None:
    assert pool(1).run(trainer_job, tmp_path)[0].startswith("8 mini-steps")


def test_transformer_engines_settings_are_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks ask of TransformerConfig passes its own validation, told that Transformer Engine is there."""
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *_: True)
    for name in ("permute", "permute_with_probs", "sort_chunks_by_index", "sort_chunks_by_index_with_probs", "unpermute"):
        monkeypatch.setattr(moe_utils, f"fused_{name}", object(), raising=False)
    for recipe in test_transformer_engine.FP8:
        for option in ("moe_router_padding_for_quantization", "moe_router_padding_for_fp8"):
            settings = {**test_transformer_engine.fp8_settings(recipe), option: True}
            config = models.model_config("te", on_gpu=True, **settings)
            assert config.moe_router_padding_for_quantization
            assert moe_utils.get_align_size_for_quantization(config) == 16
            assert not config.use_cpu_initialization
    assert models.model_config("te", on_gpu=True, moe_permute_fusion=True, moe_router_fusion=True).moe_permute_fusion
    flex = models.model_config("te", on_gpu=True, expert_model_parallel_size=2, moe_token_dispatcher_type="flex")
    assert flex.moe_flex_dispatcher_backend == "deepep"


@pytest.mark.parametrize("old", [False, True])
def test_a_gpu_without_a_recipe_says_why(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Transformer Engine's releases answer: by functions, or by a manager in its fp8 module."""
    why = "needs compute capability 9.0"
    answers = {
        "is_fp8_available": lambda **_: (True, ""),
        "is_fp8_block_scaling_available": lambda **_: (False, why),
    }
    modules = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    modules["transformer_engine"].pytorch = modules["transformer_engine.pytorch"]  # type: ignore[attr-defined]
    if old:
        modules["transformer_engine.pytorch.fp8"] = ModuleType("transformer_engine.pytorch.fp8")
        manager = SimpleNamespace(**answers)
        modules["transformer_engine.pytorch.fp8"].FP8GlobalStateManager = manager  # type: ignore[attr-defined]
    else:
        vars(modules["transformer_engine.pytorch"]).update(answers)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert test_transformer_engine.unsupported("tensorwise") is None
    assert test_transformer_engine.unsupported("blockwise") == f"FP8 blockwise: {why}"


# ---- around them -----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert needs.unmet() == "needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert needs.unmet() is None
    assert needs.unmet(gpus=2) == "needs 2 CUDA devices, 1 here"
    assert needs.unmet(packages=("torch", "no_such", "nor_this")) == "needs no_such, nor_this, which are not installed"
    monkeypatch.setattr(needs, "has", lambda package: False)
    assert needs.unmet(te="2.3.0") == "needs Transformer Engine >= 2.3.0, which is not installed"
    monkeypatch.setattr(needs, "has", lambda package: True)
    monkeypatch.setattr(needs, "get_te_version", lambda: "2.2.0")
    monkeypatch.setattr(needs, "is_te_min_version", lambda wanted: wanted <= "2.2.0")
    assert needs.unmet(te="2.2.0") is None
    assert needs.unmet(te="2.3.0") == "needs Transformer Engine >= 2.3.0, 2.2.0 here"
    assert not needs.needs(te="2.2.0").args[0]


def test_the_benchmarks_report_is_understood() -> None:
    settings = ["--shrink", "32", "--gates", "mixtral", "--scopes", "router", "--tokens", "64", "--sequence", "32"]
    report = test_bench.bench(*settings, "--repeats", "1", "--warm-up", "0", "--device", "cpu")
    told = test_bench.ratios(report)
    assert told.startswith("mixtral router 64: ")
    assert "replay " in told
    assert "learn " in told
