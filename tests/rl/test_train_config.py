"""Every setting that is refused, and how settings are combined."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_pr2.config import PRESETS, PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.rl import launch
from megatron_pr2.rl.config import TrainConfig, load_config
from megatron_pr2.rl.deal import group_horizons
from megatron_pr2.rl.launch import _claim


def test_defaults_are_valid_and_a_file_and_the_command_line_override_them(tmp_path: Path) -> None:
    assert load_config(None) == TrainConfig()
    file = tmp_path / "train.yaml"
    file.write_text("preset: r3\nsteps: 7\nrollout:\n  prompts: 8\npr2:\n  sample_fraction: 0.5\n")
    config = load_config(file, ["steps=9", "optimizer.lr=1e-4", "pr2.betas=[0.8,0.9]", "pr2.alpha=2", "pr2.eps=1e-9"])
    assert (config.preset, config.steps, config.rollout.prompts, config.optimizer.lr) == ("r3", 9, 8, 1e-4)
    replay = config.replay()
    assert (replay.routes, replay.predictor) == ("engine", "none")
    assert (replay.sample_fraction, replay.betas, replay.alpha, replay.eps) == (0.5, (0.8, 0.9), 2, 1e-9)
    assert load_config(None, ["seed=5"]).replay().seed == 5
    assert load_config(None, ["seed=5", "pr2.seed=6"]).replay().seed == 6
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == TrainConfig()


def test_presets() -> None:
    found = {}
    for preset in PRESETS:
        config = load_config(None, [f"preset={preset}"])
        replay = config.replay()
        assert replay.replays == (replay.routes != "live")
        assert replay.learns == (replay.predictor == "learned")
        found[preset] = (replay.routes, replay.predictor, config.pr2_needs_engine_routes)
    assert found == {
        "grpo": ("live", "none", False),
        "r2": ("actor", "none", False),
        "r3": ("engine", "none", True),
        "pr2": ("engine", "learned", True),
        "pr2-lookahead": ("engine", "lookahead", True),
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preset=ppo"], "preset 'ppo' is unknown; expected one of grpo, r2, r3, pr2, pr2-lookahead"),
        (["stepz=3"], "stepz"),
        (["rollout.promptz=3"], "rollout.promptz"),
        (["steps=many"], "steps"),
        (["rollout=3"], "RolloutConfig"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["rollout.handshake=perhaps"], "rollout.handshake"),
        (["steps"], "override 'steps': expected key=value"),
        (["steps=[1,"], "command line"),
        *[
            ([f"{name}=0"], f"{name}=0: expected at least 1")
            for name in (
                *("steps", "checkpoint_every", "parallel.processes", "parallel.expert", "algorithm.mini_steps"),
                *("algorithm.micro_batch_size", "rollout.prompts", "rollout.responses", "rollout.max_new_tokens"),
            )
        ],
        (["seed=-1"], "seed=-1: expected"),
        (["rollout.restarts=-1"], "rollout.restarts=-1: expected at least 0"),
        (["algorithm.clip_low=1.5"], "algorithm.clip_low=1.5"),
        (["algorithm.clip_high=-0.1"], "algorithm.clip_high=-0.1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0"),
        (["optimizer.lr=.nan"], "optimizer.lr=nan"),
        (["algorithm.loss=ppo"], "algorithm.loss='ppo': expected one of grpo, gspo, cispo, gmpo, icepop, kpop, opsm, rspo"),
        (["algorithm.mask_threshold=-1"], "algorithm.mask_threshold=-1.0: expected at least 0, or null"),
        (["algorithm.router_shift_floor=0"], "algorithm.router_shift_floor=0.0: expected a number in"),
        (["algorithm.loss=cispo"], "algorithm.loss=cispo needs algorithm.clip_high, which has no default"),
        (["algorithm.loss=kpop"], "algorithm.loss=kpop needs algorithm.mask_threshold, which has no default"),
        (["algorithm.loss=opsm"], "algorithm.loss=opsm needs algorithm.mask_threshold, which has no default"),
        (["preset=r3", "algorithm.loss=icepop", "algorithm.old_logprobs=rollout"], "loss=icepop compares .* they are the same"),
        (
            ["preset=r3", "algorithm.loss=kpop", "algorithm.mask_threshold=1", "algorithm.old_logprobs=rollout"],
            "loss=kpop compares .* set old_logprobs=recompute, or loss=grpo",
        ),
        (["algorithm.loss=icepop", "algorithm.importance=mis"], "algorithm.importance=mis another one; set importance=none"),
        (["preset=r3", "algorithm.loss=rspo", "algorithm.old_logprobs=rollout"], "rspo needs algorithm.old_logprobs=recompute"),
        (["parallel.context=2"], "parallel.context"),
        (["algorithm.importance=vtrace"], "algorithm.importance='vtrace': expected one of none, tis, mis"),
        (["algorithm.importance_level=turn"], "algorithm.importance_level='turn': expected one of token, sequence"),
        (["algorithm.importance_cap=0.5"], "algorithm.importance_cap=0.5: expected at least 1"),
        (["algorithm.importance_cap=.nan"], "algorithm.importance_cap=nan"),
        (["algorithm.importance_floor=1.5"], "algorithm.importance_floor=1.5"),
        (["algorithm.proximal_decay=1.0"], "algorithm.proximal_decay=1.0"),
        (["algorithm.proximal_device=disk"], "algorithm.proximal_device='disk': expected one of device, cpu"),
        (["rollout.engine=vllm"], "rollout.engine='vllm': expected one of megatron, sglang"),
        (["rollout.urls=[http://localhost:1]"], "needs rollout.engine=sglang"),
        (["rollout.groups=-1"], "rollout.groups=-1: expected auto, turns, or at least 0"),
        (["rollout.groups=all"], "rollout.groups='all': expected auto, turns, or at least 0"),
        (["rollout.groups=5"], "rollout.groups=5: expected at most algorithm.mini_steps=4"),
        (["rollout.groups=2", "preset=r3"], "rollout.groups=2 needs .*not engine and none"),
        (["rollout.groups=turns", "pr2.routes=actor"], "rollout.groups=turns needs .*not actor and learned"),
        (["rollout.groups=0", "rollout.oversample=1.5", "rollout.responses=6"], "responses=6 is a multiple of"),
        (["rollout.delay=2"], "rollout.delay=2: expected 0 or 1"),
        (["rollout.delay=1", "pr2.predictor=learned+momentum"], r"rollout.delay=1 does not go with .*learned\+momentum"),
        (["rollout.temperature=0"], "rollout.temperature=0"),
        (["rollout.temperature=.nan"], "rollout.temperature=nan"),
        (["model.sizes={experts: 64}"], "model.sizes.experts: not a size of the tiny model; expected some of hidden_size, "),
        (["model.sizes.num_experts=64.5"], "model.sizes.num_experts=64.5: expected an integer above 0"),
        (["model.sizes.init_std=.nan"], "model.sizes.init_std=nan: expected a number above 0"),
        (["model.sizes.num_hidden_layers=true"], "model.sizes.num_hidden_layers=True: expected an integer"),
        (["model.sizes.num_experts_per_tok=17"], "model.sizes: num_experts_per_tok=17; expected at most num_experts=16"),
        (["model.sizes.num_attention_heads=3"], "num_attention_heads=3; expected a multiple of num_key_value_heads=2"),
        (["model.sizes.head_dim=5"], "head_dim=5; expected an even number"),
        (["model.sizes.vocab_size=256"], "vocab_size=256; expected at least 259"),
        (["model.sizes.num_experts=64", "model.path=."], "model.sizes=.* contradicts model.path=."),
        (["model.dtype=float16"], "model.dtype='float16': expected one of float32, bfloat16"),
        (["parallel.processes=3"], "parallel.processes=3 is not a multiple of parallel.expert=2"),
        (["rollout.prompts=33"], "rollout.prompts=33 is not a multiple of parallel.processes=2"),
        (["algorithm.mini_steps=7"], "not a multiple of algorithm.mini_steps=7"),
        (["pr2.alpa=1"], r"unknown pr2 setting\(s\) alpa; known: alpha"),
        (["pr2.alpha=fast"], "pr2.alpha='fast': expected a number"),
        (["pr2.strict=perhaps"], "pr2.strict='perhaps': expected true or false"),
        (["pr2.strict=1"], "pr2.strict=1: expected true or false"),
        (["pr2.alpha=true"], "pr2.alpha=True: expected a number"),
        (["pr2.feature_bytes=1.5"], "pr2.feature_bytes=1.5: expected an integer"),
        (["pr2.betas=0.9"], "pr2.betas=0.9: expected two numbers"),
        (["pr2.betas=[0.9,x]"], r"pr2.betas=\[0.9, 'x'\]: expected two numbers"),
        (["pr2.target=3"], "pr2.target=3: expected one of post, delta"),
    ],
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize("predictor", ["learned", "momentum", "lookahead"])
def test_predictions_for_a_delayed_rollout_reach_further(predictor: str) -> None:
    """n = (i - 1) + D kappa for the i-th of kappa mini-steps: 4 to 7 of 4, and 8 to 15 of 8."""

    def horizon(*overrides: str) -> float:
        return load_config(None, ["rollout.delay=1", f"pr2.predictor={predictor}", *overrides]).replay().horizon

    extrapolates = predictor != "learned"
    assert horizon() == (5.5 if extrapolates else 0.0)
    assert horizon("algorithm.mini_steps=8") == (11.5 if extrapolates else 0.0)
    assert horizon("algorithm.mini_steps=1") == (1.0 if extrapolates else 0.0)
    assert horizon("pr2.horizon=3") == 3.0
    assert horizon("rollout.delay=0") == 0.0
    assert horizon("pr2.routes=actor") == 0.0, "the actor records routes under the weights that the training begins with"


def test_horizons_of_groups() -> None:
    assert group_horizons(4, 4) == [0.0, 1.0, 2.0, 3.0]
    assert group_horizons(4, 2) == [0.0, 0.0, 2.5, 2.5]
    assert group_horizons(4, 4, 4) == [4.0, 5.0, 6.0, 7.0]
    assert group_horizons(4, 2, 4) == [4.5, 4.5, 6.5, 6.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"routes": "replay"}, "pr2.routes='replay': expected one of live, actor, engine"),
        ({"predictor": "oracle"}, "pr2.predictor='oracle'"),
        ({"target": "pre"}, "pr2.target='pre'"),
        ({"feature_device": "disk"}, "pr2.feature_device='disk'"),
        ({"routes": "live"}, "pr2.predictor='learned' contradicts pr2.routes='live'"),
        ({"alpha": -1.0}, "pr2.alpha=-1.0"),
        ({"alpha": float("nan")}, "pr2.alpha=nan"),
        ({"eps": -1.0}, "pr2.eps=-1.0"),
        ({"max_missing_share": 1.5}, "pr2.max_missing_share=1.5"),
        ({"sample_fraction": 0.0}, "pr2.sample_fraction=0.0"),
        ({"sample_fraction": 1.1}, "pr2.sample_fraction=1.1"),
        ({"feature_bytes": -1}, "pr2.feature_bytes=-1"),
        ({"betas": (0.9,)}, "pr2.betas="),
        ({"betas": (0.9, 1.0)}, "pr2.betas="),
        ({"seed": -1}, "pr2.seed=-1"),
    ],
)
def test_what_pr2_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PR2Config(**values)
    with pytest.raises(ConfigError, match=message):
        PR2Config.from_dict(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"steps: [1, 2", "train.yaml"),
        (b"- steps\n- 3\n", "expected a mapping"),
        (b"steps: \xff\xfe", "train.yaml"),
        (b"steps: ${nothing}", "train.yaml"),
        (b"rollout: {prompt: 3}", "rollout.prompt"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "train.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    file = tmp_path / "secret.yaml"
    file.write_text("steps: 3")
    file.chmod(0)
    if not os.access(file, os.R_OK):  # root may read everything
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(file)


# ---- the directory of an unfinished run ------------------------------------------------------------------------------


def unfinished(directory: Path, settings: dict[str, Any]) -> Path:
    """What an unfinished run leaves of its settings."""
    directory.mkdir()
    OmegaConf.save(OmegaConf.create(settings), directory / "config.yaml")
    (directory / "metrics.jsonl").write_text("", encoding="utf-8")
    return directory


def test_a_run_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    """It does not know the settings that came later; their defaults are what it ran with."""
    config = TrainConfig()
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    del settings["rollout"]["oversample"], settings["algorithm"]["clip_high"]
    _claim(unfinished(tmp_path / "run", settings), config)
    changed = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, clip_high=0.9))
    with pytest.raises(ConfigError, match=r"other settings \(algorithm\.clip_high\)"):
        _claim(unfinished(tmp_path / "changed", settings), changed)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_bounds_that_an_earlier_release_wrote_out_are_grpos_own(tmp_path: Path, loss: str) -> None:
    config = load_config(None, [f"algorithm.loss={loss}"])
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    settings["algorithm"] |= {"clip_low": 0.2, "clip_high": 0.28}
    directory = unfinished(tmp_path / "run", settings)
    if loss == "grpo":
        _claim(directory, config)
    else:
        with pytest.raises(ConfigError, match=r"other settings \(algorithm\.clip_high, algorithm\.clip_low\)"):
            _claim(directory, config)


@pytest.mark.parametrize(
    ("overrides", "bounds"),
    [
        ([], (0.2, 0.28)),
        (["algorithm.loss=gspo"], (3e-4, 4e-4)),
        (["algorithm.loss=gspo", "algorithm.clip_high=1e-3"], (3e-4, 1e-3)),
        (["algorithm.loss=cispo", "algorithm.clip_high=0.5"], (1.0, 0.5)),
        (["algorithm.loss=rspo"], (pytest.approx(1 - math.exp(-0.4)), pytest.approx(math.exp(0.4) - 1))),
        (["algorithm.loss=kpop", "algorithm.mask_threshold=1"], (0.2, 0.28)),
    ],
)
def test_bounds_are_the_losss_own_unless_they_are_set(overrides: list[str], bounds: tuple[float, float]) -> None:
    assert load_config(None, overrides).algorithm.clip == bounds


def test_icepop_corrects_for_a_moving_average() -> None:
    algorithm = load_config(None, ["algorithm.loss=icepop", "algorithm.old_logprobs=ewma"]).algorithm
    assert algorithm.corrects
    assert algorithm.needs_rollout_logprobs


def test_a_finished_run_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same command starts again in an empty directory, which it holds alone."""
    run = tmp_path / "run"
    config = load_config(None, [f"run={run}", "steps=1", "model.path=model", "data=data"])
    unfinished(run, OmegaConf.to_container(OmegaConf.structured(config)))
    (run / "final").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0}\n', encoding="utf-8")
    monkeypatch.setattr(launch, "check", lambda config: None)
    monkeypatch.setattr(launch, "_run_ranks", lambda *_: None)
    assert launch.train(config) == run
    assert (tmp_path / "run.1" / "final").is_dir()
    assert sorted(file.name for file in run.iterdir()) == ["config.yaml", "lock"]


def test_a_run_of_a_later_release_is_refused(tmp_path: Path) -> None:
    config = TrainConfig()
    settings = OmegaConf.to_container(OmegaConf.structured(config)) | {"from_the_future": 1}
    with pytest.raises(ConfigError, match=r"other settings \(from_the_future\)"):
        _claim(unfinished(tmp_path / "run", settings), config)


SGLANG = ["rollout.engine=sglang"]


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ([], 4),
        (["algorithm.mini_steps=1"], 0),
        (["rollout.groups=1"], 0),
        (["pr2.routes=actor"], 0),
        (["preset=pr2"], 0),
        (SGLANG, 0),
        ([*SGLANG, "rollout.engines=3"], 3),
        ([*SGLANG, "rollout.urls=[http://a:1,http://b:1]"], 2),
        ([*SGLANG, "rollout.engines=8"], 4),
        ([*SGLANG, "rollout.engines=8", "rollout.router=own"], 0),
        ([*SGLANG, "rollout.engines=8", "rollout.sglang.push=disk"], 0),
        ([*SGLANG, "rollout.groups=turns"], 4),
        (["rollout.oversample=1.5", "rollout.responses=6"], 0),
        (["rollout.oversample=1.5", "rollout.responses=8"], 4),
    ],
)
def test_groups_by_themselves(settings: list[str], groups: int) -> None:
    assert len(set(load_config(None, ["preset=pr2-lookahead", *settings]).horizons)) == groups


def test_a_run_goes_on_with_the_groups_that_it_had(tmp_path: Path) -> None:
    """Servers may change, what they made of "auto" may not; a run from before there were groups had one."""
    ahead = ["preset=pr2-lookahead", *SGLANG, f"run={tmp_path}"]
    four = load_config(None, [*ahead, "rollout.engines=4"])
    _claim(tmp_path, four)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    _claim(tmp_path, load_config(None, [*ahead, "rollout.engines=8"]))
    _claim(tmp_path, load_config(None, [*ahead, "rollout.engines=4", "rollout.groups=0"]))
    with pytest.raises(ConfigError, match=r"other settings \(rollout.groups\)"):
        _claim(tmp_path, load_config(None, [*ahead, "rollout.engines=1"]))
    plain = OmegaConf.to_container(OmegaConf.structured(four))
    assert isinstance(plain, dict)
    del plain["rollout"]["groups"]
    OmegaConf.save(OmegaConf.create(plain), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"other settings \(rollout.groups\)"):
        _claim(tmp_path, four)
    _claim(tmp_path, load_config(None, [*ahead, "rollout.engines=4", "rollout.groups=1"]))
