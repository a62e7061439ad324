"""PR2's checkpoints (I6): written in one layout, read in another, with the same numbers; the policy's own stays as it was."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import checkpoints as jobs
from tests.helpers.distributed import pool
from tests.helpers.rounding import assert_near, rounding
from tests.host.models import make_checkpoint, tiny_config
from tests.parallel import batch
from tests.parallel.batch import Split
from tests.parallel.replay import Case

pytestmark = pytest.mark.slow

CASES = {
    "one": Case(old=Split(3), new=Split(2)),
    "dp2": Case(2, new=Split(2)),
    "ep2": Case(2, {"expert": 2}, new=Split(2)),
    "tp2": Case(2, {"tensor": 2}, old=Split(4), new=Split(2, reverse=True)),
    "cp2": Case(2, {"context": 2}, packed=True, old=Split(2), new=Split(budget=48)),
    "pp2": Case(2, {"pipeline": 2}, delivery="local"),
    "pp2-vpp2": Case(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-pp2": Case(4, {"tensor": 2, "pipeline": 2}),
}
RESUMED = [
    ("tp2", "one"), ("tp2", "ep2"), ("tp2", "pp2-vpp2"), ("tp2", "cp2"), ("pp2-vpp2", "dp2"), ("pp2-vpp2", "tp2"), ("ep2", "pp2"),
    ("ep2", "tp2"), ("one", "cp2"), ("one", "tp2-pp2"), ("tp2-pp2", "ep2"),
]  # fmt: skip
SAME = ["tp2", "cp2", "pp2-vpp2"]

Straight = Callable[..., tuple[Path, list[jobs.Outcome]]]


def model_config(**changes: Any) -> Any:
    """Qwen3-MoE: 4 MoE layers, 8 experts, top-2, hidden 32."""
    sizes = {"vocab_size": batch.VOCABULARY, "hidden_size": 32, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}
    return tiny_config("qwen3_moe", **{**sizes, "moe_intermediate_size": 16, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), model_config())


@pytest.fixture(scope="module")
def straight(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The checkpoint of an uninterrupted run in a layout, and its end; runs once for each."""
    done: dict[Any, tuple[Path, list[jobs.Outcome]]] = {}

    def get(name: str, **settings: Any) -> tuple[Path, list[jobs.Outcome]]:
        key = name, repr(settings)
        if key not in done:
            directory, case = tmp_path_factory.mktemp("saved") / name, CASES[name]
            done[key] = directory, pool(case.processes).run(jobs.straight_job, model, case, directory, **settings)
        return done[key]

    return get


def every_layer(outcomes: list[jobs.Outcome]) -> dict[int, Tensor]:
    """W_p of all ranks; ranks that have the same layer have the same W_p."""
    layers: dict[int, Tensor] = {}
    for outcome in outcomes:
        for layer, weight in outcome.weights.items():
            torch.testing.assert_close(weight, layers.setdefault(layer, weight), rtol=rounding(1), atol=0)
    return layers


def assert_continued(resumed: list[jobs.Outcome], expected: list[jobs.Outcome], *, layers: int = 4) -> None:
    ends, wanted = every_layer(resumed), every_layer(expected)
    assert ends.keys() == wanted.keys()
    assert len(ends) == layers
    for layer, weight in ends.items():
        # Two updates of lr = 0.01: where a gradient is almost zero, Adam turns its rounding into a share of them.
        assert_near(weight, wanted[layer], 64)
    for outcome in resumed:
        assert outcome.report["features_absent"] == 0
        assert outcome.report["predictor"]["tokens"] == expected[0].report["predictor"]["tokens"] > 0
        for name, values in outcome.report["drift"].items():
            assert values == pytest.approx(expected[0].report["drift"][name], abs=rounding(64), nan_ok=True), name
    judged = {layer: counts for outcome in expected for layer, counts in outcome.judged.items()}
    for outcome in resumed:
        for layer, counts in outcome.judged.items():
            assert torch.equal(counts, judged[layer])
            assert counts.any()


QUICK = {("tp2", "one"), ("one", "cp2"), ("pp2-vpp2", "dp2"), ("ep2", "pp2")}
ROWS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.exhaustive) for pair in RESUMED]


@pytest.mark.parametrize(("source", "target"), ROWS)
def test_another_layout_continues_with_the_same_numbers(source: str, target: str, model: Path, straight: Straight) -> None:
    """Saved between two mini-steps: W_p, Adam, routes and features; one step further W_p is what it would have been."""
    directory, expected = straight(source)
    case = CASES[target]
    resumed = pool(case.processes).run(jobs.resumed_job, model, case, directory, expected[0].logprobs)
    assert_continued(resumed, expected)


@pytest.mark.parametrize("name", SAME)
def test_the_same_layout_continues_with_the_same_bits(name: str, model: Path, straight: Straight) -> None:
    directory, expected = straight(name)
    resumed = pool(2).run(jobs.resumed_job, model, CASES[name], directory, expected[0].logprobs)
    for after, before in zip(resumed, expected, strict=True):
        assert after.weights.keys() == before.weights.keys()
        assert all(torch.equal(after.weights[layer], before.weights[layer]) for layer in before.weights)
        assert repr(after.report) == repr(before.report)


@pytest.mark.parametrize(("source", "target"), [("cp2", "pp2-vpp2"), ("pp2-vpp2", "one")])
def test_a_prediction_along_the_momentum_continues(source: str, target: str, model: Path, straight: Straight) -> None:
    """In the middle of a rollout batch there are two: the one its routes were predicted with, and the newest."""
    settings = {"predictor": "learned+momentum"}
    directory, expected = straight(source, **settings)
    case = CASES[target]
    resumed = pool(case.processes).run(jobs.resumed_job, model, case, directory, expected[0].logprobs, **settings)
    assert_continued(resumed, expected)
    assert expected[0].report["predictor"]["weight_norm"] > 0.1


def test_features_are_read_once_and_follow_their_tokens(model: Path, straight: Straight) -> None:
    """From one rank to two of a stage: each reads half of the sample, and gets from the other what it computes of the rest."""
    directory, expected = straight("one", hold_back=False)
    resumed = pool(2).run(jobs.resumed_job, model, CASES["cp2"], directory, expected[0].logprobs, hold_back=False)
    sampled = expected[0].report["predictor"]["tokens"] / 4
    assert [outcome.held for outcome in resumed] == [sampled / 2] * 2
    assert all(outcome.moved for outcome in resumed)


def test_routes_that_the_actor_recorded(model: Path, straight: Straight) -> None:
    """They are nowhere as a whole: each pipeline stage has its layers, each context rank its tokens."""
    for source, target in (("cp2", "pp2-vpp2"), ("pp2-vpp2", "cp2")):
        directory, expected = straight(source, routes="actor")
        resumed = pool(2).run(jobs.resumed_job, model, CASES[target], directory, expected[0].logprobs, routes="actor")
        assert_continued(resumed, expected)


def test_replay_without_a_predictor_continues_without_router_inputs(model: Path, straight: Straight) -> None:
    """They were never kept. A run that needs them goes on and counts the tokens that it has none of."""
    directory, expected = straight("cp2", predictor="none")
    for case, settings in ((CASES["one"], {"predictor": "none"}), (CASES["tp2"], {})):
        resumed = pool(case.processes).run(jobs.resumed_job, model, case, directory, expected[0].logprobs, **settings)
        for outcome in resumed:
            if not settings:
                assert (outcome.held, outcome.report["drift"]["tokens"]) == (0, [0.0] * 4)
                assert outcome.report["features_absent"] > 0
                continue
            assert (outcome.held > 0, outcome.report["features_absent"]) == (True, 0)
            for name, values in outcome.report["drift"].items():
                assert values == pytest.approx(expected[0].report["drift"][name], abs=rounding(64)), name


def test_a_stage_without_routers_takes_part(tmp_path: Path) -> None:
    dense_first = make_checkpoint(tmp_path / "model", model_config(mlp_only_layers=[0, 1]))
    expected = pool(2).run(jobs.straight_job, dense_first, CASES["pp2"], tmp_path / "saved")
    assert not expected[0].weights
    for target in ("pp2", "one"):
        case = CASES[target]
        resumed = pool(case.processes).run(jobs.resumed_job, dense_first, case, tmp_path / "saved", expected[0].logprobs)
        assert_continued(resumed, expected, layers=2)


def test_features_beyond_the_byte_budget_are_thinned(model: Path, straight: Straight) -> None:
    """Fewer ranks than before may have less room: a smaller share of the tokens stays, and is learned from."""
    directory, expected = straight("ep2", hold_back=False)
    settings = {"hold_back": False, "feature_bytes": 20 * 4 * (32 * 2 + 8 * 4)}
    resumed = pool(1).run(jobs.resumed_job, model, CASES["one"], directory, expected[0].logprobs, **settings)[0]
    assert resumed.held == 20
    assert resumed.report["predictor"]["tokens"] == 4 * resumed.held
    assert resumed.report["features_absent"] == 0


# ---- the pipeline's own checkpoint -------------------------------------------------------------------------------------


def without_chance(metadata: bytes) -> Any:
    """torch's index of a checkpoint without the random id of the save and the directory's name."""
    index = pickle.loads(metadata)
    index.storage_meta = None
    return index


def test_the_policys_checkpoint_is_the_same_with_and_without_pr2(model: Path, tmp_path: Path) -> None:
    directories = [tmp_path / "without", tmp_path / "with"]
    for directory in directories:
        directory.mkdir()
    pool(2).run(jobs.policy_job, model, CASES["tp2"], directories)
    without, attached = ({p.name: p.read_bytes() for p in directory.iterdir()} for directory in directories)
    assert without.keys() == attached.keys()
    assert sum(name.endswith(".distcp") for name in without) >= 2
    assert without_chance(without.pop(".metadata")) == without_chance(attached.pop(".metadata"))
    assert without == attached


def test_pr2_in_a_pipelines_own_save_and_load(model: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    saved = pool(2).run(jobs.merged_save_job, model, CASES["pp2"], tmp_path / "merged")
    expected = {layer: weight for rank in saved for layer, weight in rank.items()}
    for weights, lines in pool(2).run(jobs.merged_load_job, model, CASES["tp2"], tmp_path / "merged"):
        assert weights.keys() == expected.keys() == {0, 1, 2, 3}
        assert all(torch.equal(weights[layer], expected[layer]) for layer in expected)
        assert not lines


def test_a_checkpoint_without_predictor_gives_a_zero_one(model: Path, tmp_path: Path) -> None:
    directories = [tmp_path / "plain"]
    directories[0].mkdir()
    pool(2).run(jobs.policy_job, model, CASES["tp2"], directories)
    results = pool(2).run(jobs.merged_load_job, model, CASES["ep2"], directories[0])
    assert all(not weight.any() for weights, _ in results for weight in weights.values())
    assert [lines for _, lines in results] == [[f"{directories[0]} has no predictor: starting with W_p = 0"], []]


def test_a_predictor_that_is_not_configured_is_left_alone(model: Path, straight: Straight) -> None:
    directory, _ = straight("tp2")
    results = pool(1).run(jobs.load_job, model, CASES["one"], directory, predictor="none")
    assert results == [("", [f"{directory} has a predictor, but predictor='none' is configured: ignored"])]


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 16}, r"weight is [experts, hidden] = [8, 32], the model has [16, 32]"),
        ({"hidden_size": 64}, r"weight is [experts, hidden] = [8, 32], the model has [8, 64]"),
        ({"num_hidden_layers": 2}, "its predictor is of the MoE layers [0, 1, 2, 3], the model has [0, 1]"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, straight: Straight, tmp_path: Path) -> None:
    directory, _ = straight("tp2")
    other = make_checkpoint(tmp_path / "other", model_config(**changes))
    for raised, _ in pool(2).run(jobs.load_job, other, CASES["ep2"], directory):
        assert raised.startswith(f"{directory}: ")
        assert message in raised


def test_what_is_not_finite_is_neither_saved_nor_loaded(model: Path, tmp_path: Path) -> None:
    """On any rank: of two stages one has the layer."""
    for saving, loading, unchanged in pool(2).run(jobs.not_finite_job, model, CASES["pp2"], tmp_path / "poisoned"):
        assert "the predictor's weight of the MoE layers [2] is not finite: it is not saved" in saving
        assert "the predictor's weight of the MoE layers [2] is not finite: it is not loaded" in loading
        assert unchanged


def test_sequences_that_are_not_there_are_named(model: Path, straight: Straight, tmp_path: Path) -> None:
    directory, _ = straight("tp2")
    for raised, _ in pool(2).run(jobs.load_job, model, CASES["ep2"], directory, sequences=[4, 99]):
        assert f"{directory}: its rollout batch has the sequences [2, 4, 5, 7, 11, 19, 23, 30], not [99]" in raised
    for raised, _ in pool(2).run(jobs.load_job, model, CASES["ep2"], tmp_path / "nowhere", sequences=["4"]):
        assert "rank 0: sequences: got <U1[1]; expected integers" in raised  # before anything is read
    assert pool(2).run(jobs.save_job, model, CASES["ep2"], tmp_path / "no" / "rollout") == ["", ""]
    for raised, _ in pool(2).run(jobs.load_job, model, CASES["ep2"], tmp_path / "no" / "rollout", sequences=[4]):
        assert f"{tmp_path}/no/rollout holds no rollout batch" in raised


def test_directories_that_cannot_be_used(model: Path, straight: Straight, tmp_path: Path) -> None:
    directory, _ = straight("tp2")
    for raised in pool(2).run(jobs.save_job, model, CASES["tp2"], directory):
        assert f"{directory} holds a checkpoint already" in raised
    (tmp_path / "file").write_text("in the way")
    for raised in pool(2).run(jobs.save_job, model, CASES["tp2"], tmp_path / "file"):
        assert "rank 0: FileExistsError" in raised
    (tmp_path / "empty").mkdir()
    for raised, _ in pool(2).run(jobs.load_job, model, CASES["tp2"], tmp_path / "empty"):
        assert "rank 0: " in raised
        assert "rank 1: " in raised
        assert "is not a distributed checkpoint" in raised


def test_a_damaged_file_is_told_on_every_rank(model: Path, tmp_path: Path) -> None:
    assert pool(2).run(jobs.save_job, model, CASES["pp2"], tmp_path / "saved") == ["", ""]
    file = tmp_path / "saved" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    for raised, _ in pool(2).run(jobs.load_job, model, CASES["pp2"], tmp_path / "saved"):
        assert "rank 1: " in raised
        assert "rank 0: " not in raised
