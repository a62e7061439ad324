"""Megatron-LM: flags for every setting of PR2Config, and the layer spec of a model builder."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from megatron_pr2.config import PRESETS, PR2Config
from megatron_pr2.errors import AttachError, ConfigError
from megatron_pr2.integrations.megatron_lm import add_pr2_args, flag, pr2_config_from_args, pr2_layer_spec
from megatron_pr2.integrations.spec import with_pr2_routers
from tests.helpers.distributed import pool
from tests.integrations.two_ways import contents, gpt_config, moe_submodules

NAMES = [field.name for field in fields(PR2Config)]
# A valid value other than the default, as it is written and as it arrives.
OTHER: dict[str, tuple[list[str], Any]] = {
    "routes": (["actor"], "actor"),
    "route_delivery": (["local"], "local"),
    "predictor": (["momentum"], "momentum"),
    "target": (["delta"], "delta"),
    "betas": (["0.5", "0.75"], (0.5, 0.75)),
    "feature_device": (["cpu"], "cpu"),
    "min_agreement": (["0.7"], 0.7),
}
# What a setting contradicts at its other value.
WITH = {"drift": (["--pr2-predictor", "none"], {"predictor": "none"})}


def parser() -> argparse.ArgumentParser:
    return add_pr2_args(argparse.ArgumentParser())


def config(*arguments: str) -> PR2Config:
    return pr2_config_from_args(parser().parse_args(arguments))


def actions() -> dict[str, argparse.Action]:
    """The flags, by the name of their value."""
    return {action.dest: action for action in parser()._actions if action.dest != "help"}


def other(field: Any) -> tuple[list[str], Any]:
    """Words on the command line that change a setting, and the value that they give it."""
    if isinstance(field.default, bool):
        return ([flag(field.name).replace("--", "--no-", 1)], False) if field.default else ([flag(field.name)], True)
    if field.name in OTHER:
        words, value = OTHER[field.name]
    else:
        value = field.default + 1 if isinstance(field.default, int) else field.default * 0.7 + 0.11
        words = [str(value)]
    return [flag(field.name), *words], value


# ---- flags -------------------------------------------------------------------------------------------------------------


def test_every_setting_has_a_flag_and_every_flag_a_setting() -> None:
    assert set(actions()) == {"pr2_preset", *(f"pr2_{name}" for name in NAMES)}
    for name in NAMES:
        action = actions()[f"pr2_{name}"]
        assert flag(name) in action.option_strings
        assert action.default is None, f"{flag(name)} would override the preset when it is absent"


@pytest.mark.parametrize("preset", PRESETS)
def test_absent_flags_keep_the_preset(preset: str) -> None:
    assert config("--pr2-preset", preset) == PR2Config.preset(preset)


def test_the_preset_is_pr2_unless_told_otherwise() -> None:
    assert config() == PR2Config.preset("pr2") == PR2Config()


@pytest.mark.parametrize("field", fields(PR2Config), ids=lambda field: field.name)
def test_a_flag_changes_its_setting_and_no_other(field: Any) -> None:
    words, value = other(field)
    more, settings = WITH.get(field.name, ([], {}))
    assert value != field.default
    assert config(*words, *more) == replace(PR2Config(), **settings, **{field.name: value})


def test_a_switch_can_be_given_both_ways() -> None:
    assert config("--no-pr2-hold-back", "--no-pr2-strict") == PR2Config(hold_back=False, strict=False)
    assert config("--pr2-hold-back", "--pr2-strict") == PR2Config()


def test_help_says_what_every_flag_means_and_its_default() -> None:
    text = " ".join(parser().format_help().split())
    for field in fields(PR2Config):
        action = actions()[f"pr2_{field.name}"]
        meaning, _, default = (action.help or "").rpartition(" Default: ")
        assert len(meaning) > 20, f"{flag(field.name)}: {action.help}"
        assert re.match(r"[\"A-Z].*[.]$", meaning), meaning
        assert default, flag(field.name)
        assert meaning.replace(" ", "") in text.replace(" ", "")  # lines end at hyphens, too
    assert "Decay rates of the predictor's own Adam. Default: 0.9 0.999." in text
    assert "prediction is used. Lower values use predictions earlier, and wrong ones more often. Default: 2.0." in text
    assert "Default: by --pr2-preset." in text


def test_flags_live_beside_megatrons_own() -> None:
    """The provider returns the parser, in a group of its own, and can be chained."""
    given = argparse.ArgumentParser()
    given.add_argument("--num-experts", type=int)
    assert add_pr2_args(given) is given
    args = given.parse_args(["--num-experts", "8", "--pr2-alpha", "2"])
    assert args.num_experts == 8
    assert pr2_config_from_args(args).alpha == 2.0
    assert "predictive routing replay" in given.format_help()


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pr2-alpha", "-1"], "--pr2-alpha -1.0: expected a number in"),
        (["--pr2-betas", "0.9", "2"], "--pr2-betas 0.9 2.0: expected two numbers in [0, 1)"),
        (["--pr2-seed", "-2"], "--pr2-seed -2: expected an integer >= 0"),
        (["--pr2-sample-fraction", "0"], "--pr2-sample-fraction 0.0: expected a share in (0, 1]"),
        (
            ["--pr2-held-out-share", "1"],
            "--pr2-held-out-share 1.0 leaves no sampled token to learn from; lower it, or set --no-pr2-hold-back",
        ),
        (
            ["--pr2-preset", "grpo", "--pr2-predictor", "learned"],
            "--pr2-predictor learned contradicts --pr2-routes live: a prediction that nothing replays has no effect; use "
            "--pr2-routes engine (or actor), or --pr2-predictor none",
        ),
    ],
)
def test_errors_name_the_flags(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config(*words)
    assert message in str(raised.value)
    assert "pr2." not in str(raised.value)


@pytest.mark.parametrize(
    "words", [["--pr2-alpha", "much"], ["--pr2-routes", "mine"], ["--pr2-betas", "0.9"], ["--pr2-preset", "r4"]]
)
def test_words_that_no_flag_takes_end_the_program(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config(*words)
    assert words[0] in capsys.readouterr().err


def test_values_that_did_not_come_from_the_command_line() -> None:
    """Megatron-LM's --yaml-cfg sets what it likes."""
    args = parser().parse_args([])
    args.pr2_hold_back, args.pr2_betas = "maybe", [0.9, 0.99]
    with pytest.raises(ConfigError, match="--pr2-hold-back maybe: expected true or false"):
        pr2_config_from_args(args)
    args.pr2_hold_back = None
    assert pr2_config_from_args(args).betas == (0.9, 0.99)
    args.pr2_preset = "r4"
    with pytest.raises(ConfigError, match="preset 'r4' is unknown"):
        pr2_config_from_args(args)


def test_forgotten_flags() -> None:
    with pytest.raises(ConfigError, match="pass extra_args_provider=add_pr2_args"):
        pr2_config_from_args(argparse.Namespace(lr=1e-3))


# ---- the layer spec ----------------------------------------------------------------------------------------------------


def arguments(**values: Any) -> argparse.Namespace:
    defaults = {"transformer_impl": "local", "normalization": "RMSNorm", "qk_l2_norm": False, "spec": None}
    return argparse.Namespace(**{**defaults, **values})


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
@pytest.mark.usefixtures("host_platform")
def test_the_spec_is_megatrons_own_with_other_routers(implementation: str) -> None:
    model = gpt_config(qk_layernorm=True)
    found = pr2_layer_spec(arguments(transformer_impl=implementation), model, pp_rank=0)
    use_te = implementation == "transformer_engine"
    megatrons = get_gpt_decoder_block_spec(model, use_te, normalization="RMSNorm", pp_rank=0)
    assert contents(found) == contents(with_pr2_routers(megatrons))
    assert contents(found) != contents(megatrons)


def stage_job() -> list[int]:
    from megatron_pr2 import host

    host.init(pipeline=2)
    spec = pr2_layer_spec(arguments(), gpt_config(pipeline_model_parallel_size=2, moe_layer_freq=[0, 0, 1, 1]))
    return [int(hasattr(moe_submodules(layer.submodules.mlp), "router")) for layer in spec.layer_specs]


def test_a_pipeline_stage_of_dense_layers() -> None:
    assert pool(2).run(stage_job) == [[0, 0], [1, 1]]


@pytest.mark.usefixtures("host_platform")
def test_what_the_spec_is_refused_for() -> None:
    with pytest.raises(AttachError, match=r"--num-experts is not set"):
        pr2_layer_spec(arguments(), gpt_config(num_moe_experts=None, moe_ffn_hidden_size=None, moe_layer_freq=1), pp_rank=0)
    with pytest.raises(AttachError, match=r"--spec my_package my_spec: the model gets that spec.*with_pr2_routers\(\)"):
        pr2_layer_spec(arguments(spec=["my_package", "my_spec"]), gpt_config(), pp_rank=0)
    with pytest.raises(AttachError, match="--transformer-impl inference_optimized: its routers are for inference"):
        pr2_layer_spec(arguments(transformer_impl="inference_optimized"), gpt_config(), pp_rank=0)
    absent = dict.fromkeys(("megatron.training", "megatron.training.arguments"))
    refused = pytest.raises(AttachError, match=r"needs Megatron-LM's megatron\.training.*TransformerConfig as config")
    with mock.patch.dict(sys.modules, absent), refused:
        pr2_layer_spec(arguments())


# ---- the documentation -------------------------------------------------------------------------------------------------


def flags_table() -> str:
    """docs/megatron_lm.md's table of flags."""
    lines = ["| Flag | Default | Meaning |", "| --- | --- | --- |"]
    for action in actions().values():
        meaning, _, default = (action.help or "").replace("%%", "%").rpartition(" Default: ")
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        lines.append(f"| {names} | {default.removesuffix('.')} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_flags_are_the_flags() -> None:
    text = (DOCS / "megatron_lm.md").read_text(encoding="utf-8")
    assert flags_table() in text, f"put this table into docs/megatron_lm.md:\n\n{flags_table()}"


@pytest.mark.parametrize("document", ["megatron_lm.md", "bridges.md"])
def test_the_documented_lines_are_python_and_import_what_exists(document: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(blocks) >= 3
    imports = []
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_pr2"):
                imports += [(str(node.module), alias.name) for alias in node.names]
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{document}: from {module} import {name}"


@pytest.mark.parametrize("field", ["experimental_attention_variant", "heterogeneous_block_specs"])
def test_models_of_another_spec_are_refused_by_name(field: str) -> None:
    config = SimpleNamespace(num_moe_experts=4, **{field: "gated_delta_net"})
    with pytest.raises(AttachError, match=rf"{field}='gated_delta_net': .*with_pr2_routers"):
        pr2_layer_spec(argparse.Namespace(transformer_impl="local"), config)
