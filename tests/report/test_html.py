"""The report: one page that is complete, needs no network and says what happened."""

from __future__ import annotations

import json

import matplotlib
import pytest

from megatron_pr2.errors import DataError
from megatron_pr2.report import theme
from megatron_pr2.report.html import write_report
from megatron_pr2.rl.summary import drift_summary
from tests.report.page import Page
from tests.report.synthetic import run

pytestmark = pytest.mark.slow

CONFIG = "pr2:\n  routes: engine\n  note: '<script>alert(1)</script> & \"quotes\"'\n"
HOLD_BACK_PLOTS = {"beta", "expected-lift"}
ROUTE_PLOTS = {"lift", "mismatch", "agreement", "changed", "kl", "coverage", "layer-profile", "layer-agreement", "layer-lift"}
PREDICTION_PLOTS = {"r-squared", "correlation", "drift-parts", "multiples"}
COMMON_PLOTS = {"reward", "length", "ratio", "clip", "gradient", "gap", "seconds", "bytes"}


def report(run_dir, records, config=CONFIG):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if config is not None:
        (run_dir / "config.yaml").write_text(config)
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path)


@pytest.fixture(scope="module")
def pr2_page(tmp_path_factory):
    return report(tmp_path_factory.mktemp("runs") / "my-run", run(30))


def test_headline(pr2_page):
    text = pr2_page.text
    assert text.index("Prediction removed") < text.index("Learning Reward")
    for label in ("my-run", "Reward", "Response length", "Steps", "Agreement", "Lift", "Missing routes", "Log-prob gap"):
        assert label in text
    rewards = [r["reward"] for r in run(30)]
    assert f"{sum(rewards[:6]) / 6:.3f} → {sum(rewards[-6:]) / 6:.3f}" in text
    assert "pr2 : the rollout engine samples with predicted routes" in text
    assert f"final reward {sum(rewards[-6:]) / 6:.3f} mean reward {sum(rewards) / 30:.3f} lift +" in text


def test_every_plot_is_there(pr2_page):
    assert pr2_page.plots == ROUTE_PLOTS | COMMON_PLOTS | PREDICTION_PLOTS | {"predictor", "layer-interval", "missing"}
    assert any(i.startswith("reward-") for i in pr2_page.references)
    for text in ("paper: frozen, off-2", "76.9 % unchanged", "92.2 % unchanged"):
        assert text in pr2_page.source
    assert len({light for light, _ in theme.COLOURS.values()}) == len(theme.COLOURS)  # a colour is found by its value


def test_config_and_names_are_escaped(tmp_path):
    records = [r | {"preset": "<img src=x onerror=alert(2)>"} for r in run(2)]
    page = report(tmp_path / "<b>&run", records)
    assert "<script>" not in page.source
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quotes&#34;" in page.source
    assert "&lt;b&gt;&amp;run" in page.source
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
@pytest.mark.parametrize("total", [1, 7])
def test_every_preset(tmp_path, preset, total):
    page = report(tmp_path / preset, run(total, preset=preset, kappa=2, layers=3), config=None)
    expected = COMMON_PLOTS | (ROUTE_PLOTS | {"missing"} if preset != "grpo" else set())
    assert page.plots == expected | (PREDICTION_PLOTS | {"predictor", "layer-interval"} if preset == "pr2" else set())
    assert ("No moments of predicted and true drift are recorded" in page.text) == (preset != "pr2")
    assert ("Nothing was replayed in this run" in page.text) == (preset == "grpo")
    assert ("nothing was predicted" in page.text) == (preset != "pr2")
    assert "The run directory has no config.yaml." in page.text


def test_hold_back(tmp_path):
    page = report(tmp_path / "held", run(20, hold_back=True))
    assert page.plots >= HOLD_BACK_PLOTS | {"layer-interval", "lift"}
    last = run(20, hold_back=True)[-1]["hold_back"]["beta"]
    mean, held = sum(last) / len(last), last.count(0.0)
    assert f"Beta, last rollout {mean:.2f} 0 is R3; prediction disabled in {held} of 6 layers" in page.text
    assert "In the last rollout beta was 0 in 1 of 6 layers" in page.text


def test_held_back_entirely(tmp_path):
    page = report(tmp_path / "held", run(20, hold_back=True, gain=0.0))
    assert "No gain over R3: prediction stayed disabled (hold-back)" in page.text
    assert "Beta, last rollout 0.00 0 is R3; prediction disabled in 6 of 6 layers" in page.text


def test_lift_cards_tell_all_mini_steps_from_the_stale_ones(tmp_path):
    records = [r | {"lift_all": 0.001, "lift": 0.004} for r in run(8)]
    text = report(tmp_path / "run", records).text
    assert "Lift over R3 +0.100 pp ± 0.000 standard error; all mini-steps" in text
    assert "Lift on stale routes +0.400 pp ± 0.000 standard error; mini-steps from the second on" in text


def test_older_records_say_the_same_without_the_new_keys(tmp_path):
    new, old = run(20), run(20)
    for record in old:
        del record["lift_all"]
    pages = [report(tmp_path / name / "run", records).source for name, records in (("new", new), ("old", old))]
    assert pages[0] == pages[1]


def test_turns_are_plotted_where_a_response_has_several(tmp_path):
    single = [r | {"rollout": {"turns": 1.0}} for r in run(4)]
    assert "turns" not in report(tmp_path / "single", single).plots
    several = [r | {"rollout": {"turns": 1.0 + r["step"]}} for r in run(4)]
    assert "turns" in report(tmp_path / "several", several).plots


def test_one_mini_step_has_no_lift(tmp_path):
    page = report(tmp_path / "off1", run(6, kappa=1))
    assert "The gain over R3 cannot be judged" in page.text
    assert not {"lift", "kl", "coverage", "layer-lift"} & page.plots


def test_replay_alone_measures_no_drift(tmp_path):
    """What the trainer records with pr2.drift=false."""
    unmeasured = drift_summary([{"mini_step": i, "drift": {}, "predictor": {}, "features_absent": 0} for i in (1, 2)])
    page = report(tmp_path / "alone", [{**each, **unmeasured} for each in run(7, preset="r3")])
    assert page.plots == COMMON_PLOTS - {"ratio", "clip"} | {"missing"}
    assert "No mini-step of this run reports routes" in page.text
    assert "no drift was measured" in page.text


def test_records_with_nothing_but_a_step(tmp_path):
    page = report(tmp_path / "bare", [{"step": 0}, {"step": 1, "reward": None, "mini_steps": None, "seconds": None}])
    assert page.plots == set()
    assert "This run has no numbers for this section." in page.text


def test_long_runs_are_thinned_and_say_so(tmp_path):
    page = report(tmp_path / "long", run(801, kappa=2, layers=2))
    assert "each point of the plots joins 3 rollouts" in page.text
    assert len(page.source) < 700_000


def test_empty_run_is_a_clear_error(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_other_path_and_the_same_page_twice(tmp_path):
    report(tmp_path / "run", run(3))
    other = write_report(tmp_path / "run", tmp_path / "elsewhere" / "page.html")
    assert other == tmp_path / "elsewhere" / "page.html"
    assert other.read_bytes() == (tmp_path / "run" / "report.html").read_bytes()
    assert [p.name for p in other.parent.iterdir()] == ["page.html"]


def test_matplotlib_settings_of_the_host_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 17.0)
    before = dict(matplotlib.rcParams)
    report(tmp_path / "run", run(1))
    assert dict(matplotlib.rcParams) == before


def test_another_run_beside_it(tmp_path):
    alone = report(tmp_path / "pr2", run(20, hold_back=True))
    report(tmp_path / "r3", run(30, preset="r3", seed=1))
    page = Page(write_report(tmp_path / "pr2", baseline=tmp_path / "r3"))
    assert page.plots == alone.plots
    assert "Against r3, over 20 rollout steps that both have:" in page.text
    assert "Against" not in alone.text
    drawn = [plot for plot in page.source.split('<figure id="plot-')[1:] if ">r3</text>" in plot or "<!-- r3 -->" in plot]
    shown = {plot.partition('"')[0] for plot in drawn}
    assert shown == {"reward", "length", "mismatch", "agreement", "coverage", "clip", "gradient", "gap"}
    with pytest.raises(DataError, match="does not exist"):
        write_report(tmp_path / "pr2", baseline=tmp_path / "absent")


def test_alarms_and_what_it_ran_on(tmp_path):
    records = run(20)
    records[7]["logprob_gap"]["mean"] = 0.3
    (tmp_path / "run").mkdir()
    environment = {"model": {"type": "qwen3_moe", "layers": 4}, "hardware": {"device": "a <GPU>"}, "versions": {"torch": "2.9"}}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment))
    page = report(tmp_path / "run", records)
    assert page.text.index("Log-prob gap above 1.0e-01: rollout step 7 (3.0e-01)") < page.text.index("Learning Reward")
    assert "No alarm" not in page.text
    assert "Model : qwen3_moe, 4 layers" in page.text
    assert "Hardware : ? processes, a <GPU>, ? cores. Versions : torch 2.9." in page.text
    (tmp_path / "run" / "environment.json").write_text("[")
    quiet = report(tmp_path / "run", run(20))
    assert "No alarm: log-prob gap" in quiet.text
    assert "Hardware" not in quiet.text


def test_one_gate_is_judged_in_a_sentence(pr2_page):
    assert "summed over mini-steps 2 to 4:" in pr2_page.text
    assert "above 1 in 6 of 6. One gate for all mini-steps pays only above 1, because the first one" in pr2_page.text
