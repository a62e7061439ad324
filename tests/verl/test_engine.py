"""verl's actor worker on the CPU, with its own configuration, batches and mini-batches, and PR2's engine in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import close_pools, pool
from tests.helpers.rounding import BF16


def job(name: str, *arguments: Any, **keywords: Any) -> Any:
    """Runs in the worker: a function of tests/verl/jobs.py."""
    from tests.verl import jobs

    return getattr(jobs, name)(*arguments, **keywords)


def run(name: str, *arguments: Any, **keywords: Any) -> Any:
    (result,) = pool(1).run(job, name, *arguments, **keywords)
    return result


def assert_same(found: dict[str, Any], expected: dict[str, Any], *names: str) -> None:
    for name in names:
        if isinstance(expected[name], dict):
            assert found[name].keys() == expected[name].keys()
            assert [k for k in expected[name] if not torch.equal(found[name][k], expected[name][k])] == [], name
        else:
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
def test_a_preset_trains(model: str, preset: str, jagged: bool) -> None:
    result = run("train", model, preset, jagged=jagged)
    assert result["engine"] == "PR2MegatronEngine"
    assert torch.isfinite(result["log_probs"]).all()
    metrics = result["metrics"]
    assert len(metrics["pr2/frozen_agreement"]) == len(metrics["grad_norm"]) == 2
    assert all(norm > 0 for norm in metrics["grad_norm"])
    assert metrics["pr2/missing_share"] == [0.0, 0.0]
    assert metrics["pr2/features_absent"] == [0.0, 0.0]
    # What was replayed agrees with the live router where it is its own, and not where it is random.
    agreement = {"grpo": (0.999, 1.0), "r2": (0.999, 1.0), "r3": (0.05, 0.6), "pr2": (0.05, 0.6)}[preset]
    assert agreement[0] <= metrics["pr2/agreement"][0] <= agreement[1]
    changed = {name for name in result["weights"] if not torch.equal(result["weights"][name], result["pushed"][name])}
    expected = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(4)} if preset == "pr2" else set()
    assert changed == expected, "only a prediction changes what the rollout engine gets, and only its gates"
    assert (metrics["pr2/predictor/tokens"] == [0.0, 0.0]) == (preset != "pr2")
    assert result["sequences"] == 0, "after the last mini-step the batch is let go"


def test_both_forms_of_a_batch_train_alike(model: str) -> None:
    padded, jagged = run("train", model, "pr2"), run("train", model, "pr2", jagged=True)
    assert_same(jagged, padded, "log_probs", "weights", "pushed", "W_p")


@pytest.mark.parametrize("preset", ["r2", "r3", "pr2"])
def test_the_same_as_attach_by_hand(model: str, preset: str) -> None:
    through_verl, by_hand = run("train", model, preset), run("direct", model, preset)
    assert (through_verl["engine"], by_hand["engine"]) == ("PR2MegatronEngine", "MegatronEngineWithLMHead")
    assert_same(through_verl, by_hand, "log_probs", "weights")
    assert through_verl["metrics"]["grad_norm"] == by_hand["metrics"]["grad_norm"]
    if preset == "pr2":
        assert_same(through_verl, by_hand, "W_p")
        assert by_hand["W_p"].abs().max() > 0


def test_the_live_routers_own_routes_change_nothing(model: str) -> None:
    results = run("with_live_routes", model)
    replayed, plain = results["r3"], results["verl"]
    assert (replayed["engine"], plain["engine"]) == ("PR2MegatronEngine", "MegatronEngineWithLMHead")
    assert_same(replayed, plain, "log_probs", "weights", "pushed")
    assert replayed["metrics"]["grad_norm"] == plain["metrics"]["grad_norm"]


def test_without_settings_the_engine_is_verls(model: str) -> None:
    ours, plain = run("train", model, None), run("train", model, None, plain=True)
    assert (ours["engine"], plain["engine"]) == ("PR2MegatronEngine", "MegatronEngineWithLMHead")
    assert_same(ours, plain, "log_probs", "weights", "pushed")
    assert not [name for name in ours["metrics"] if name.startswith("pr2/")]


RECOMPUTE = [
    "actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity=full",
    "actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method=uniform",
    "actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers=1",
]


def test_recomputation_replays_the_same_routes(model: str) -> None:
    recomputed, kept = run("train", model, "pr2", *RECOMPUTE), run("train", model, "pr2")
    assert_same(recomputed, kept, "log_probs", "weights", "W_p")


def test_offloading_changes_nothing(model: str) -> None:
    """verl moves parameters and optimizer to host memory between passes; PR2 is attached before it does so for the first time."""
    switches = [f"actor_rollout_ref.actor.megatron.{name}_offload=true" for name in ("param", "optimizer")]
    assert_same(run("train", model, "pr2", *switches), run("train", model, "pr2"), "log_probs", "weights", "pushed", "W_p")


def test_dynamic_micro_batches(model: str) -> None:
    """verl sorts rows into micro-batches by tokens; routes go with the rows, and so does everything else."""
    dynamic = ["actor_rollout_ref.actor.use_dynamic_bsz=true", "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true"]
    names = {"actor.ppo": 28, "rollout.log_prob": 40}
    budgets = [f"actor_rollout_ref.{name}_max_token_len_per_gpu={tokens}" for name, tokens in names.items()]
    by_tokens = run("train", model, "pr2", *dynamic, *budgets, mini_batch_size=4)
    by_rows = run("train", model, "pr2", mini_batch_size=4)
    assert (by_tokens["log_probs"] - by_rows["log_probs"]).abs().max() < BF16
    assert by_tokens["metrics"]["grad_norm"] == pytest.approx(by_rows["metrics"]["grad_norm"], rel=BF16)
    assert by_tokens["metrics"]["pr2/agreement"] == pytest.approx(by_rows["metrics"]["pr2/agreement"], abs=BF16)


def test_padded_micro_batches(model: str) -> None:
    unpacked = run("train", model, "pr2", "actor_rollout_ref.model.use_remove_padding=false", mini_batch_size=4)
    packed = run("train", model, "pr2", mini_batch_size=4)
    assert (unpacked["log_probs"] - packed["log_probs"]).abs().max() < BF16
    assert unpacked["metrics"]["grad_norm"] == pytest.approx(packed["metrics"]["grad_norm"], rel=BF16)


def test_padding_to_buckets(model: str) -> None:
    """verl's own replay has none; here it is padding like any other."""
    bucket = [f"actor_rollout_ref.actor.megatron.{name}" for name in ("pad_to_length=true", "pad_to_length_bucket=32")]
    filled, tight = run("train", model, "r3", *bucket), run("train", model, "r3")
    assert (filled["log_probs"] - tight["log_probs"]).abs().max() < BF16
    assert filled["metrics"]["grad_norm"] == pytest.approx(tight["metrics"]["grad_norm"], rel=BF16)


def test_shuffled_epochs(model: str) -> None:
    """Every row finds its routes wherever verl's shuffling puts it; the routes of the old-log-prob pass are its own."""
    result = run("train", model, "r2", mini_batch_size=2, epochs=2, shuffle=True)
    assert len(result["metrics"]["grad_norm"]) == 4
    # At the first mini-step the router is the one that was recorded: a route on another row would show.
    assert result["metrics"]["pr2/agreement"][0] == 1.0
    assert result["metrics"]["actor/ppo_kl"][0] == pytest.approx(0.0, abs=BF16)


def test_rows_that_were_not_seen_are_refused(model: str) -> None:
    messages = run("wrong_rows", model)
    for name, message in messages.items():
        assert message.startswith("ReplayError: row"), name
        assert "compute_log_prob and update_actor must get the same rows on the same ranks" in message


def test_without_an_old_log_prob_pass(model: str) -> None:
    found = run("without_old_log_probs", model)
    assert len(found["r3"]["grad_norm"]) == 2
    assert found["r3"]["pr2/missing_share"] == [0.0, 0.0]
    for preset in ("r2", "pr2"):
        assert "algorithm.rollout_correction.bypass_mode=false" in found[preset]


def test_a_batch_without_routes_is_refused(model: str) -> None:
    message = run("without_routes", model)
    assert "actor_rollout_ref.rollout.enable_rollout_routing_replay=true" in message


def test_other_passes_run_outside(model: str) -> None:
    result = run("outside", model)
    assert result == dict.fromkeys(result, True)


def test_a_reference_is_verls(model: str) -> None:
    assert run("reference", model) == {"pr2": None, "settings": None, "module": 1}


def test_checkpoints(model: str, tmp_path: Path) -> None:
    result = run("checkpoints", model, str(tmp_path / "actor"))
    assert {"pr2", "ckpt_contents.json"} <= set(result.pop("files"))
    assert result == {"learned": True, "restored": True, "export is plain": True}


def test_a_batch_that_nothing_trains_on_is_let_go_at_the_push(model: str) -> None:
    result = run("abandoned", model)
    assert result["held"] > 0
    assert result["left"] == 0
    assert len(result["goes on"]["pr2/agreement"]) > 1


def test_shards_are_refused_while_predicting(model: str) -> None:
    for name, message in run("shards", model).items():
        assert message.startswith("AttachError: actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded"), name


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("actor_rollout_ref.actor.megatron.router_replay.mode=R3", "set it to 'disabled' and"),
        ("+actor_rollout_ref.actor.megatron.override_mcore_model_config.pr2.alpha=-1", "pr2.alpha=-1"),
    ],
)
def test_contradicting_settings_are_refused(model: str, override: str, told: str) -> None:
    assert told in run("build_refused", model, override)


def test_a_process_with_verls_patch_is_refused(model: str) -> None:
    try:
        assert "apply_router_replay_patch() has replaced methods" in run("build_refused_when_patched", model)
    finally:
        close_pools()  # the patch cannot be undone
