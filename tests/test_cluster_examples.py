"""examples/clusters: every configuration is a layout that Megatron-Core, SGLang and verl take; launchers do what they say."""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig
from typer.testing import CliRunner

from megatron_pr2.cli import app
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import ConfigError
from megatron_pr2.integrations.megatron_lm import add_pr2_args, pr2_config_from_args
from megatron_pr2.plan.models import MODELS
from megatron_pr2.plan.verl import DEFAULTS, MEGATRON, PR2, ROLLOUT, read_verl

pytestmark = pytest.mark.slow

CLUSTERS = Path(__file__).resolve().parents[1] / "examples/clusters"
NAMES = tuple(sorted(path.stem for path in CLUSTERS.glob("*.yaml") if path.stem != "ray_job"))
GIB = 1 << 30


def settings(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8"))
    return loaded


def changed(tmp_path: Path, name: str, key: str, value: Any) -> Path:
    """The configuration with one setting changed, or removed where the value is `...`."""
    tree = settings(name)
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    if value is ...:
        del node[last]
    else:
        node[last] = value
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def plan(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "150"})
    return result.exit_code, result.output


def planned(*arguments: str | Path) -> dict[str, Any]:
    code, output = plan(*arguments, "--json")
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    return found


def refused(*arguments: str | Path) -> str:
    code, output = plan(*arguments)
    assert code == 1, output
    assert output.startswith("error: ")
    return output


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_model() -> None:
    assert sorted(MODELS) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_trained_and_planned(name: str) -> None:
    tree, found, spec = settings(name), planned("--config", CLUSTERS / f"{name}.yaml"), MODELS[name]
    layout, work = found["layout"], found["workload"]
    assert found["model"]["name"] == name
    gpus = tree["trainer"]["nnodes"] * tree["trainer"]["n_gpus_per_node"]
    assert tree["trainer"]["n_gpus_per_node"] == 8
    assert layout["world"] == gpus == layout["tp"] * layout["cp"] * layout["pp"] * layout["dp"]
    assert gpus % (layout["ep"] * layout["etp"] * layout["pp"]) == 0
    assert spec.attention_heads is not None
    assert spec.query_groups is not None
    assert spec.attention_heads % layout["tp"] == spec.query_groups % layout["tp"] == spec.num_experts % layout["ep"] == 0
    # A tensor-parallel group within a node.
    assert 8 % layout["tp"] == 0
    # Every replica trains equally many sequences, in every mini-step; a mini-step has micro-batches enough for the pipeline.
    assert found["sequences_per_replica"][0] == found["sequences_per_replica"][1] == work["batch"] // layout["dp"]
    per_step = work["batch"] // work["mini_steps"]
    assert per_step * work["mini_steps"] == work["batch"]
    assert per_step % layout["dp"] == 0
    assert per_step // layout["dp"] // work["micro_batch"] >= 8 * layout["pp"]
    assert work["mini_steps"] >= 2, "with one mini-step nothing is learned"
    # Prediction is a small part of 80 GB, features fit, and nothing is left out.
    for rank in ("typical", "largest"):
        assert found[rank]["device_bytes"] < 2 * GIB
        assert found[rank]["host_bytes"] < 16 * GIB
    assert found["sample_fraction"] == work["sample_fraction"]
    assert (work["predictor"], work["feature_device"], work["route_delivery"]) == ("learned", "cpu", "local")
    # SGLang: whole engines, whole experts, whole heads on every GPU.
    rollout = found["rollout"]
    assert rollout["engines"] * rollout["gpus"] == gpus
    assert rollout["gpus"] in (1, 2, 4, 8) or rollout["gpus"] % 8 == 0
    assert spec.num_experts % rollout["expert"] == spec.attention_heads % (rollout["gpus"] // rollout["attention_data"]) == 0


def test_what_is_planned_for_qwen3_is_what_a_hand_computes() -> None:
    """48 layers x 128 experts x 2048; 1024 sequences of 16384 tokens on TP 2 x CP 2 x DP 4."""
    found = planned("--config", CLUSTERS / "qwen3-30b-a3b.yaml")
    memory, total = found["typical"]["memory"], found["total"]["memory"]
    work = found["workload"]
    assert (work["batch"], work["seq"], work["prompt"], work["mini_steps"]) == (1024, 16384, 2048, 4)
    assert (work["micro_batch"], work["log_prob_micro_batch"]) == (2, 4)
    assert memory["weight"] == 48 * 128 * 2048 * 4 == 50_331_648
    assert memory["adam"] == 2 * memory["weight"]
    # Tables of a replica's 256 sequences on every one of its ranks: an id is a byte, and a bit per token says whether it is valid.
    assert memory["tables"] == 256 * (16384 * 48 * 8 + 16384 // 8) == 1_611_137_024
    # Routes of two cuts: 4 sequences in a log-prob micro-batch, 2 in a training one; a rank holds a quarter of a replica's tokens.
    assert memory["slices"] == 2 * (256 * 16384 // 4) * 48 * 8
    # 3 % of 14336 response tokens of each sequence, once over all ranks: router inputs in bf16, logits in fp32.
    assert total["features"] == 1024 * round(0.03 * 14336) * 48 * (2048 * 2 + 128 * 4)


def test_stages_of_deepseek_are_uneven_and_its_dense_layers_count() -> None:
    found = planned("--config", CLUSTERS / "deepseek-v3.yaml")
    assert found["layout"]["moe_layers_per_stage"] == [4, 8, 8, 8, 8, 8, 8, 6]
    assert sum(found["layout"]["moe_layers_per_stage"]) + 3 == 61
    assert found["model"]["score_function"] == "sigmoid"
    assert found["rollout"] == {"engines": 4, "gpus": 64, "attention_data": 16, "expert": 64}
    mtp = settings("deepseek-v3")["actor_rollout_ref"]["model"]["mtp"]
    assert not any(mtp.values())


# ---- broken ones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "value", "words"),
    [
        ("qwen3-30b-a3b", f"{MEGATRON}.expert_model_parallel_size", 12, "expert_model_parallel_size=12"),
        ("mixtral-8x7b", f"{MEGATRON}.expert_model_parallel_size", 16, "num_moe_experts=8 is not a multiple of expert_model_"),
        ("mixtral-8x7b", f"{MEGATRON}.tensor_model_parallel_size", 3, "tensor_model_parallel_size=3"),
        ("deepseek-v3", f"{MEGATRON}.override_transformer_config.num_layers_in_first_pipeline_stage", ..., "61"),
        ("qwen3-30b-a3b", "trainer.nnodes", 3, "256 sequences are not a multiple of the 6 data-parallel replicas"),
        ("qwen3-30b-a3b", "trainer.nnodes", 0, "trainer.nnodes=0: expected an integer"),
        ("qwen3-30b-a3b", "data.train_batch_size", 100, "data.train_batch_size=100 is not a multiple of"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.n", 1.5, f"{ROLLOUT}.n=1.5: expected an integer"),
        ("mixtral-8x7b", "actor_rollout_ref.actor.ppo_mini_batch_size", 1, None),
        ("qwen3-30b-a3b", "actor_rollout_ref.actor.ppo_epochs", 2, "ppo_epochs=2: a plan is made for one pass"),
        ("qwen3-30b-a3b", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu", 4096, "does not fit into a micro-batch"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.log_prob_max_token_len_per_gpu", 4096, f"{ROLLOUT}.log_prob_max_token_len_per_gpu=4096"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.tensor_model_parallel_size", 3, f"{ROLLOUT}.tensor_model_parallel_size=3"),
        ("deepseek-v3", f"{ROLLOUT}.expert_parallel_size", 8, f"{ROLLOUT}.expert_parallel_size=8: verl takes 1 or all GPUs"),
        ("deepseek-v3", f"{ROLLOUT}.engine_kwargs.sglang.enable_dp_attention", ..., "dp_size=16: weights cannot be pushed"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.engine_kwargs.sglang.moe_runner_backend", "flashinfer_mxfp4", "moe_runner_backend=flash"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.engine_kwargs.sglang.speculative_algorithm", "EAGLE", "speculative_algorithm=EAGLE"),
        ("qwen3-30b-a3b", f"{ROLLOUT}.enable_rollout_routing_replay", False, "no routes would be returned"),
        ("qwen3-30b-a3b", f"{MEGATRON}.router_replay.mode", "R3", "router_replay.mode='R3' is verl's own replay"),
        ("qwen3-30b-a3b", f"{PR2}.sample_fraktion", 0.1, "unknown pr2 setting(s) sample_fraktion"),
        ("qwen3-30b-a3b", "actor_rollout_ref.model.path", "openai/gpt-2", "openai/gpt-2: no such model"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_the_settings_name(
    tmp_path: Path, name: str, key: str, value: Any, words: str | None
) -> None:
    file = changed(tmp_path, name, key, value)
    if words is None:
        # 8 sequences on 4 replicas: small, and right.
        assert planned("--config", file)["workload"]["mini_steps"] == 256
        return
    assert words in refused("--config", file)


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    for text, words in (("- 1\n", "expected a mapping"), ("a: [\n", "not YAML"), ("trainer: {nnodes: '${nowhere}'}\n", "nnodes")):
        file = tmp_path / "wrong.yaml"
        file.write_text(text, encoding="utf-8")
        assert words in refused("--config", file)
    assert "cannot be read" in refused("--config", tmp_path / "absent.yaml")
    assert "no model; give --model" in refused()


def test_static_micro_batches(tmp_path: Path) -> None:
    """Without dynamic batches the sizes are sequences, and have to divide."""
    file = changed(tmp_path, "qwen3-30b-a3b", "actor_rollout_ref.actor.use_dynamic_bsz", False)
    assert "ppo_micro_batch_size_per_gpu=None: expected an integer" in refused("--config", file)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["actor_rollout_ref"]["actor"]["ppo_micro_batch_size_per_gpu"] = 2
    tree["actor_rollout_ref"]["rollout"]["log_prob_micro_batch_size_per_gpu"] = 4
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    work = planned("--config", file)["workload"]
    assert (work["micro_batch"], work["log_prob_micro_batch"]) == (2, 4)
    tree["actor_rollout_ref"]["actor"]["ppo_micro_batch_size_per_gpu"] = 3
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert "ppo_micro_batch_size_per_gpu=3 does not divide a replica's 64 sequences" in refused("--config", file)


def test_options_override_the_file() -> None:
    file = CLUSTERS / "qwen3-30b-a3b.yaml"
    plain = planned("--config", file)
    changes = (
        ("--dp", "8"), ("--world", "32"), ("--tp", "4"), ("--cp", "1"), ("--ep", "4"), ("--batch", "2048"), ("--seq", "4096"),
        ("--mini-steps", "2"), ("--sample-fraction", "0.01"), ("--feature-device", "device"), ("--predictor", "none"),
        ("--route-delivery", "scatter"), ("--model", "mixtral-8x7b"),
    )  # fmt: skip
    for change in changes:
        assert planned("--config", file, *change) != plain, change
    assert planned("--config", file, "--dp", "8")["layout"]["world"] == 32
    # What is the default of an option overrides, too, where it is given.
    assert planned("--config", file, "--cp", "1")["layout"]["cp"] == 1
    assert planned("--config", file, "--feature-bytes", str(GIB))["sample_fraction"] < plain["sample_fraction"]


def test_the_layout_is_told_as_flags_of_megatron_lm() -> None:
    code, output = plan("--config", CLUSTERS / "deepseek-v3.yaml")
    assert code == 0
    assert "Rollouts by 4 SGLang engines on 64 GPUs each: attention TP 4 x DP 16, experts EP 64" in output
    flags = json.loads(output.splitlines()[-1])["megatron_lm"]
    assert all(f"  {flag}" in output for flag in flags)
    for flag in ("--decoder-first-pipeline-num-layers 7", "--decoder-last-pipeline-num-layers 6", "--sequence-parallel"):
        assert flag in flags
    # Ours are flags of our own parser, and mean the same as the file.
    parser = add_pr2_args(argparse.ArgumentParser())
    args, rest = parser.parse_known_args([word for flag in flags for word in flag.split()])
    assert not [word for word in rest if word.startswith("--pr2")]
    assert pr2_config_from_args(args) == PR2Config.preset("pr2", sample_fraction=0.04, feature_device="cpu", feature_bytes=6 * GIB)


def test_precision_overlays_say_fp8(tmp_path: Path) -> None:
    """They are read with a configuration that names them, in the order of its defaults list."""
    (tmp_path / "precision").symlink_to(CLUSTERS / "precision")
    for overlay in ("fp8", "fp8-rollout"):
        file = changed(tmp_path, "qwen3-30b-a3b", "defaults", ["ppo_trainer", {"precision": overlay}, "_self_"])
        flags = planned("--config", file)["megatron_lm"]
        assert {"--fp8-format e4m3", "--fp8-recipe blockwise"} <= set(flags)
        assert not any("padding" in flag for flag in flags)
    assert read_verl(CLUSTERS / "qwen3-30b-a3b.yaml").transformer.get("fp8") is None


# ---- what Megatron-Core and verl make of them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_overridden_settings_are_those_of_a_transformer_config(name: str) -> None:
    overrides = dict(read_verl(CLUSTERS / f"{name}.yaml").transformer)
    fp8 = yaml.safe_load((CLUSTERS / "precision/fp8.yaml").read_text(encoding="utf-8"))
    fp8 = fp8["actor_rollout_ref"]["actor"]["megatron"]["override_transformer_config"]
    known = set(TransformerConfig.__dataclass_fields__)
    assert set(overrides) | set(fp8) <= known
    # Megatron-Core takes them together; FP8 and fused permutation it checks where Transformer Engine is.
    overrides.pop("moe_permute_fusion")
    spec, layout = MODELS[name], planned("--config", CLUSTERS / f"{name}.yaml")["layout"]
    TransformerConfig(
        num_layers=spec.num_hidden_layers,
        hidden_size=256,
        num_attention_heads=spec.attention_heads or 1,
        num_moe_experts=spec.num_experts,
        moe_router_topk=spec.topk,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        context_parallel_size=layout["cp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        sequence_parallel=layout["tp"] > 1,
        pipeline_dtype="bf16",
        bf16=True,
        add_bias_linear=False,
        **overrides,
    )


# Sections that verl passes on as they are.
FREE = (f"{MEGATRON}.override_transformer_config", f"{MEGATRON}.override_mcore_model_config", f"{ROLLOUT}.engine_kwargs.sglang")


def leaves(tree: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in tree.items():
        path = f"{above}.{key}" if above else key
        if isinstance(value, dict) and value and path not in FREE:
            yield from leaves(value, path)
        else:
            yield path


def composed(name: str, *overrides: str) -> Any:
    """What verl's entry point would get."""
    pytest.importorskip("verl")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CLUSTERS), version_base=None):
        return compose(name, overrides=list(overrides))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overlay", [None, "fp8", "fp8-rollout"])
def test_verl_knows_every_key_and_takes_the_configuration(name: str, overlay: str | None) -> None:
    config = composed(name, *([f"+precision={overlay}"] if overlay else []))
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    with initialize_config_module("verl.trainer.config", version_base=None):
        own = compose("ppo_trainer", overrides=["model_engine=megatron"])
    for file in (CLUSTERS / f"{name}.yaml", *CLUSTERS.glob("precision/*.yaml")):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        for key in leaves({k: v for k, v in tree.items() if k not in ("hydra", "defaults")}):
            *above, last = key.split(".")
            section = OmegaConf.select(own, ".".join(above))
            assert section is not None, f"{file.name}: {key}"
            # Not `in`: that denies values that have to be given.
            assert last in set(section), f"{file.name}: {key}"
    # The checks of verl's entry point, and its dataclasses, which refuse unknown fields.
    validate_config(config, use_reference_policy=False, use_critic=False)
    for section in ("actor", "rollout"):
        omega_conf_to_dataclass(config.actor_rollout_ref[section])
    assert config.actor_rollout_ref.actor.megatron.override_transformer_config.get("fp8") == (overlay and "e4m3")
    assert config.actor_rollout_ref.rollout.quantization == ("fp8" if overlay == "fp8-rollout" else None)


def test_verls_defaults_are_what_a_plan_takes_for_them() -> None:
    pytest.importorskip("verl")
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    with initialize_config_module("verl.trainer.config", version_base=None):
        own = compose("ppo_trainer", overrides=["model_engine=megatron"])
    for key, value in DEFAULTS.items():
        assert OmegaConf.select(own, key) == value, key
    from megatron_pr2.integrations.verl import settings as integration

    assert integration.WHERE == PR2


@pytest.mark.parametrize("name", NAMES)
def test_verl_hands_our_engine_the_same_settings(name: str) -> None:
    engine = composed(name).actor_rollout_ref.actor.megatron
    from megatron_pr2.integrations.verl.settings import read_settings

    run = read_verl(CLUSTERS / f"{name}.yaml")
    assert run.preset is not None
    assert read_settings(engine) == PR2Config.preset(run.preset, route_delivery="local", **run.pr2)


def test_gates_stay_unquantized_and_qwen3_is_quantized_whole() -> None:
    """Which of the three models' weights verl's FP8 quantizer knows by name; why fp8-rollout is for Qwen3."""
    pytest.importorskip("verl")
    fp8 = pytest.importorskip("verl.utils.fp8_utils", exc_type=ImportError)
    knows = fp8.FP8QuantizerHelper({"weight_block_size": [128, 128]}).should_quantize_param
    layer = "model.layers.7"
    assert not knows(f"{layer}.mlp.gate.weight")
    assert not knows(f"{layer}.block_sparse_moe.gate.weight")
    projections = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.experts.5.{x}_proj" for x in ("gate", "up", "down")]
    assert all(knows(f"{layer}.{each}.weight") for each in projections)
    assert not knows(f"{layer}.block_sparse_moe.experts.5.w1.weight")
    assert not knows(f"{layer}.self_attn.q_a_proj.weight")


# ---- launchers -------------------------------------------------------------------------------------------------------

# Notes its name and arguments; Ray's nodes join after a while and run until they are ended, and who comes too early fails.
FAKE = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "${LOG}"
case "$(basename "$0") $*" in
    "scontrol show hostnames "*) printf 'n1\\nn2\\n' ;;
    "srun "*" hostname --ip-address") echo "10.0.0.1 fe80::1" ;;
    "srun "*" ray start --head "*)
        [[ -n "${HEAD_FAILS:-}" ]] && exit 1
        sleep 0.3; touch "${LOG}.head"; exec sleep 60 ;;
    "srun "*" ray start "*)
        [[ -e "${LOG}.head" ]] || exit 1
        sleep 0.3; touch "${LOG}.worker"; exec sleep 60 ;;
    "ray status "*)
        [[ -e "${LOG}.head" ]] || exit 1
        joined=8; [[ -e "${LOG}.worker" ]] && joined=16
        printf 'Resources\\nUsage:\\n 0.0/32.0 CPU\\n 0.0/%s.0 GPU\\n' "${joined}" ;;
    "ray job submit "*)
        [[ -n "${SLURM_JOB_NODELIST:-}" && ! -e "${LOG}.worker" ]] && exit 9
        exit "${JOB_STATUS:-0}" ;;
    "megatron-pr2 plan "*) exit "${PLAN_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment in which Slurm, Ray and the plan are noted down instead of run."""
    for program in ("srun", "scontrol", "ray", "megatron-pr2"):
        file = tmp_path / "bin" / program
        file.parent.mkdir(exist_ok=True)
        file.write_text(FAKE, encoding="utf-8")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "SLURM_SUBMIT_DIR": str(CLUSTERS.parents[1]),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "RAY_POLL_SECONDS": "0.05",
    }


def launch(script: str, environment: dict[str, str], *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and which programs were called in which order; polling once."""
    done = subprocess.run(
        ["bash", str(CLUSTERS / script), *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    log = Path(environment["LOG"])
    calls = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, list(dict.fromkeys(calls))


def test_scripts_are_bash() -> None:
    for script in ("slurm.sbatch", "ray_job.sh"):
        subprocess.run(["bash", "-n", str(CLUSTERS / script)], check=True)
        text = (CLUSTERS / script).read_text(encoding="utf-8")
        assert "set -euo pipefail" in text
        assert os.access(CLUSTERS / script, os.X_OK)
    assert "#SBATCH --gpus-per-node=8" in (CLUSTERS / "slurm.sbatch").read_text(encoding="utf-8")


def test_slurm_starts_the_head_then_the_others_then_the_job(cluster: dict[str, str]) -> None:
    code, said, calls = launch("slurm.sbatch", cluster, "qwen3-30b-a3b", "data.train_files=a b.parquet")
    assert code == 0, said
    order = [
        "scontrol show hostnames n[1-2]",
        "srun --nodes=1 --ntasks=1 --nodelist=n1 hostname --ip-address",
        "srun --nodes=1 --ntasks=1 --cpu-bind=none --nodelist=n1 --export=ALL ray start --head --node-ip-address=10.0.0.1 "
        "--port=6379 "
        "--dashboard-host=127.0.0.1 --dashboard-port=8265 --num-gpus=8 --block",
        "srun --nodes=1 --ntasks=1 --cpu-bind=none --nodelist=n2 --export=ALL ray start --address=10.0.0.1:6379 "
        "--num-gpus=8 --block",
        f"megatron-pr2 plan --config {CLUSTERS}/qwen3-30b-a3b.yaml --json",
        f"ray job submit --address http://127.0.0.1:8265 --working-dir {CLUSTERS} --runtime-env {CLUSTERS}/ray_job.yaml -- "
        "python3 -m verl.trainer.main_ppo --config-dir . --config-name qwen3-30b-a3b data.train_files=a b.parquet",
    ]
    assert [call for call in calls if not call.startswith("ray status")] == order
    # Nobody is started before the head answers, and no job before all GPUs are there.
    polls = [index for index, call in enumerate(calls) if call.startswith("ray status --address=10.0.0.1:6379")]
    assert len(polls) == 1
    assert calls.index(order[2]) < polls[0] < calls.index(order[3]) or polls[0] < calls.index(order[2])


def test_slurm_ends_with_what_ended_it(cluster: dict[str, str]) -> None:
    code, _, _ = launch("slurm.sbatch", {**cluster, "JOB_STATUS": "7"}, "qwen3-30b-a3b")
    assert code == 7
    code, said, calls = launch("slurm.sbatch", {**cluster, "HEAD_FAILS": "1", "LOG": cluster["LOG"] + "2"}, "qwen3-30b-a3b")
    assert code == 1
    assert "Ray ended on a node before all had joined" in said
    assert not any("job submit" in call for call in calls)


def test_launchers_refuse_before_anything_is_started(cluster: dict[str, str]) -> None:
    code, said, calls = launch("slurm.sbatch", {**cluster, "SLURM_JOB_NUM_NODES": "3"}, "qwen3-30b-a3b")
    assert (code, calls) == (2, [])
    assert "laid out for 2 nodes, the allocation has 3; sbatch --nodes 2" in said
    for script in ("slurm.sbatch", "ray_job.sh"):
        code, said, calls = launch(script, {**cluster, "RAY_ADDRESS": "http://10.0.0.1:8265"}, "gpt-2")
        assert (code, calls) == (2, [])
        assert "no configuration" in said
        assert launch(script, cluster)[0] != 0
    code, said, calls = launch("ray_job.sh", cluster, "mixtral-8x7b")
    assert code != 0
    assert "set RAY_ADDRESS" in said
    # A layout that cannot be trained never reaches the cluster.
    environment = {**cluster, "RAY_ADDRESS": "http://10.0.0.1:8265", "PLAN_STATUS": "1"}
    code, _, calls = launch("ray_job.sh", environment, "mixtral-8x7b")
    assert code == 1
    assert [call.split()[0] for call in calls] == ["megatron-pr2"]


def test_the_runtime_environment_selects_our_engine() -> None:
    variables = yaml.safe_load((CLUSTERS / "ray_job.yaml").read_text(encoding="utf-8"))["env_vars"]
    assert variables["VERL_USE_EXTERNAL_MODULES"] == "megatron_pr2.integrations.verl_sglang"
    assert all(isinstance(value, str) for value in variables.values()), "Ray takes texts only"
    for name in NAMES:
        model = settings(name)["actor_rollout_ref"]["model"]
        assert model["external_lib"] == "megatron_pr2.integrations.verl"


def test_the_launched_command_is_one_of_verl(tmp_path: Path) -> None:
    """The job's own command line, as far as it goes without a GPU: verl's entry point prints its configuration."""
    pytest.importorskip("verl")
    text = (CLUSTERS / "ray_job.sh").read_text(encoding="utf-8")
    command = re.search(r"python3 -m (verl\S+) --config-dir \. --config-name", text)
    assert command
    done = subprocess.run(
        [
            sys.executable, "-m", command.group(1), "--config-dir", ".", "--config-name", "deepseek-v3", "+precision=fp8",
            "data.train_files=a.parquet", "--cfg", "job", "-p", "actor_rollout_ref.actor.megatron",
        ],
        cwd=CLUSTERS, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = yaml.safe_load(done.stdout)
    assert found["pipeline_model_parallel_size"] == 8
    assert found["override_transformer_config"]["fp8"] == "e4m3"
    assert found["override_mcore_model_config"]["pr2"]["preset"] == "pr2"


def test_the_table_in_the_documentation_is_generated() -> None:
    """docs/clusters.md: layouts and what a plan says per rank."""
    text = (CLUSTERS.parents[1] / "docs/clusters.md").read_text(encoding="utf-8")
    for name in NAMES:
        found, largest = planned("--config", CLUSTERS / f"{name}.yaml"), None
        layout, largest = found["layout"], found["largest"]
        sizes = f"TP {layout['tp']} x PP {layout['pp']} x CP {layout['cp']} x DP {layout['dp']}"
        memory, moved = largest["memory"], largest["moved"]
        predictor = sum(memory[part] for part in ("weight", "gradient", "adam", "pushes"))
        shown = [
            f"{predictor / (1 << 20):.0f} MiB", f"{memory['slices'] / (1 << 20):.0f} MiB", f"{memory['features'] / GIB:.1f} GiB",
            f"{memory['tables'] / GIB:.1f} GiB", f"{largest['host_bytes'] / GIB:.1f} GiB",
            f"{moved['features_received'] / GIB:.1f} GiB",
        ]  # fmt: skip
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` | {layout['world']} |"))
        assert sizes in line, sizes
        numbers = [line for line in text.splitlines() if line.startswith(f"| `{name}` |") and "MiB" in line]
        assert numbers == [f"| `{name}` | {' | '.join(shown)} |"]


def test_errors_are_those_of_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_verl(tmp_path / "absent.yaml")
