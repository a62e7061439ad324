"""Registration, settings and refusals: what can be known before a model is built. Most of it needs no process of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, ConfigError, PR2Error
from megatron_pr2.integrations.verl.check import check_config, compose, main
from megatron_pr2.integrations.verl.settings import check_engine, read_settings

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "verl"
PREFIX = "actor_rollout_ref.actor.megatron"
SETTINGS = f"{PREFIX}.override_mcore_model_config.pr2"


@pytest.fixture(scope="module")
def engine_class() -> Any:
    from tests.verl.cpu import use_host

    use_host()
    import megatron_pr2.integrations.verl as integration
    from megatron_pr2.integrations.verl.engine import PR2MegatronEngine

    integration.register()  # a second time
    return PR2MegatronEngine


def composed(*overrides: str) -> Any:
    """verl's configuration, of the example unless told otherwise."""
    return compose(EXAMPLE, "qwen3_30b_a3b", overrides)


def test_the_engine_stands_beside_verls(engine_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.megatron import MegatronEngineWithLMHead, MegatronEngineWithValueHead

    def chosen(model_type: str, device: str, vendor: str | None) -> Any:
        monkeypatch.setenv("VERL_ENGINE_DEVICE", device)
        if vendor is None:
            monkeypatch.delenv("VERL_ENGINE_VENDOR", raising=False)
        else:
            monkeypatch.setenv("VERL_ENGINE_VENDOR", vendor)
        return EngineRegistry.get_engine_cls(model_type, "megatron")

    assert chosen("language_model", "cuda", "pr2") is engine_class
    assert chosen("language_model", "cpu", "pr2") is engine_class
    assert chosen("language_model", "cpu", None) is engine_class, "the platform's own vendor"
    assert chosen("language_model", "cuda", "somebody") is MegatronEngineWithLMHead, "verl's is as it was"
    assert chosen("value_model", "cuda", "pr2") is MegatronEngineWithValueHead, "a critic is verl's"
    assert issubclass(engine_class, MegatronEngineWithLMHead)


def test_a_name_that_is_taken_is_left_alone(engine_class: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from verl.workers.engine.base import EngineRegistry

    import megatron_pr2.integrations.verl as integration

    engines = EngineRegistry._engines["language_model"]["megatron"]
    monkeypatch.setitem(engines, ("cpu", "host"), SimpleNamespace(__name__="Another"))
    integration.register()
    assert engines[("cpu", "host")].__name__ == "Another"
    assert "set VERL_ENGINE_VENDOR=pr2" in caplog.text


def engine_config(**values: Any) -> Any:
    from verl.workers.config import McoreEngineConfig

    return McoreEngineConfig(**values)


@pytest.mark.parametrize("preset", ["grpo", "r2", "r3", "pr2"])
def test_settings_are_read_from_verls_dataclass(preset: str) -> None:
    given = {"pr2": {"preset": preset, "alpha": 3.0, "betas": [0.8, 0.9]}, "moe_config": {"freeze_moe_router": False}}
    found = read_settings(engine_config(override_mcore_model_config=given))
    assert found == PR2Config.preset(preset, alpha=3.0, betas=(0.8, 0.9), route_delivery="local")
    short = read_settings(engine_config(override_mcore_model_config={"pr2": preset}))
    assert short == PR2Config.preset(preset, route_delivery="local")


def test_no_settings_are_no_pr2() -> None:
    assert read_settings(engine_config()) is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"preset": "r4"}, "preset 'r4' is unknown"),
        ({"presets": "r3"}, "unknown pr2 setting(s) presets"),
        ({"alpha": -1.0}, "pr2.alpha=-1.0"),
        (7, "expected a preset or settings"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings(engine_config(override_mcore_model_config={"pr2": given}))
    assert told in str(error.value)
    assert SETTINGS in str(error.value)


def test_settings_survive_hydra() -> None:
    from verl.utils.config import omega_conf_to_dataclass

    config = composed(f"++{SETTINGS}.alpha=2")
    engine = omega_conf_to_dataclass(config.actor_rollout_ref.actor).engine
    expected = PR2Config.preset(
        "pr2", alpha=2, sample_fraction=0.05, feature_device="cpu", feature_bytes=8 << 30, route_delivery="local"
    )
    assert read_settings(engine) == expected == read_settings(config.actor_rollout_ref.actor.megatron)
    reference = config.actor_rollout_ref.ref.megatron
    assert read_settings(reference) is None, "a reference does not inherit them"


def test_verl_accepts_the_example() -> None:
    """verl's own validation, its dataclasses, and the layout."""
    from verl.utils.config import validate_config

    from megatron_pr2.parallel.layout import ParallelLayout

    config = composed()
    validate_config(config, use_reference_policy=False, use_critic=False)
    megatron = config.actor_rollout_ref.actor.megatron
    assert check_config(config).predictor == "learned"
    tensor = megatron.tensor_model_parallel_size
    layout = ParallelLayout(
        num_layers=48,
        num_experts=128,
        num_attention_heads=32,
        num_query_groups=4,
        tensor=tensor,
        data=config.trainer.nnodes * config.trainer.n_gpus_per_node // tensor,
        expert=megatron.expert_model_parallel_size,
        expert_tensor=megatron.expert_tensor_parallel_size,
    )
    assert layout.data == 4
    rows = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    assert rows % (layout.data * config.actor_rollout_ref.actor.ppo_mini_batch_size) == 0


BAD = {
    f"{PREFIX}.router_replay.mode=R3": "router_replay.mode='R3' is verl's own replay",
    f"{PREFIX}.router_replay.mode=R2": f"{SETTINGS}.preset=r2",
    f"{PREFIX}.dynamic_context_parallel=true": "dynamic_context_parallel=true",
    f"{PREFIX}.use_megatron_fsdp=true": "use_megatron_fsdp=true",
    f"{PREFIX}.qat.enable=true": "qat.enable=true",
    "actor_rollout_ref.model.lora.rank=8": "actor_rollout_ref.model.lora",
    "actor_rollout_ref.model.lora_rank=8": "actor_rollout_ref.model.lora",
    "actor_rollout_ref.model.mtp.enable_rollout=true": "mtp.enable_rollout=true",
    "actor_rollout_ref.rollout.enable_rollout_routing_replay=false": "enable_rollout_routing_replay=false",
    "algorithm.rollout_correction.bypass_mode=true": "bypass_mode=true",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded": "backend='delta_sharded'",
    "actor_rollout_ref.ref.megatron.router_replay.mode=R2": "actor_rollout_ref.ref.megatron.router_replay.mode='R2'",
    "critic.megatron.router_replay.mode=R2": "critic.megatron.router_replay.mode='R2'",
    "actor_rollout_ref.model.external_lib=null": "set it to megatron_pr2.integrations.verl",
    "model_engine=dp": "set model_engine=megatron",
    "trainer.v1.trainer_mode=separate_async": "trainer_mode='separate_async' makes every update a rollout batch of its own",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64": "1 update per rollout batch",
    "actor_rollout_ref.rollout.name=vllm": "its routes were never checked",
    "actor_rollout_ref.rollout.disaggregation.enabled=true": "disaggregation.enabled=true",
    f"{PREFIX}.vanilla_mbridge=false": "vanilla_mbridge=false builds the model by Megatron-Bridge",
    f"~{SETTINGS}": f"add +{SETTINGS}.preset=pr2",
}


@pytest.mark.parametrize("override", BAD)
def test_contradictions_are_refused(override: str) -> None:
    with pytest.raises(PR2Error) as error:
        check_config(composed(override))
    assert BAD[override] in str(error.value)


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("r2", "actor_rollout_ref.rollout.enable_rollout_routing_replay=false"),
        ("r3", "algorithm.rollout_correction.bypass_mode=true"),
        ("r3", "actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded"),
        ("r2", "actor_rollout_ref.model.mtp.enable_rollout=true"),
        ("r2", "actor_rollout_ref.rollout.name=vllm"),
        ("r3", "trainer.v1.trainer_mode=separate_async"),
        ("r3", "actor_rollout_ref.actor.ppo_mini_batch_size=64"),
    ],
)
def test_what_a_preset_does_not_need_may_be_absent(preset: str, override: str) -> None:
    check_config(composed(f"{SETTINGS}.preset={preset}", override))


@pytest.mark.parametrize("newer", [True, False])
def test_a_batch_that_does_not_fill_its_last_mini_batch(newer: bool) -> None:
    """64 sequences in mini-batches of 48: the newer trainer fills up the second, the older one has only the first."""
    config = composed("actor_rollout_ref.actor.ppo_mini_batch_size=48", f"trainer.use_v1={newer}")
    assert config.data.train_batch_size == 64
    if newer:
        check_config(config)
    else:
        with pytest.raises(PR2Error, match="1 update per rollout batch"):
            check_config(config)


def test_vision_models_are_refused() -> None:
    model = SimpleNamespace(lora={}, lora_rank=0, hf_config=SimpleNamespace(vision_config={}), mtp=None)
    with pytest.raises(AttachError, match="vision"):
        check_engine(engine_config(), model, PR2Config.preset("r3"))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--config-path", str(EXAMPLE), "--config-name", "qwen3_30b_a3b"]
    assert main(where) == 0
    assert "routes=engine, predictor=learned" in capsys.readouterr().out
    assert main([*where, "actor_rollout_ref.rollout.enable_rollout_routing_replay=false"]) == 1
    assert "set it to true" in capsys.readouterr().err
    assert main(["model_engine=megatron", f"+{SETTINGS}.preset=r2"]) == 1
    assert "external_lib" in capsys.readouterr().err


def test_the_commands_of_the_documentation() -> None:
    """docs/verl.md: what main_ppo is given composes, verl validates it, and it is what the text says."""
    from verl.utils.config import validate_config

    text = (ROOT / "docs" / "verl.md").read_text(encoding="utf-8")
    training, checking = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    # The driver picks the class of the SGLang servers, and imports no external_lib.
    environment, _, training = training.partition("\n")
    assert environment == "export VERL_USE_EXTERNAL_MODULES=megatron_pr2.integrations.verl_sglang"
    words = shlex.split(training.replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "verl.trainer.main_ppo"]
    config = compose(None, "ppo_trainer", words[3:])
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert check_config(config) == PR2Config.preset("pr2", sample_fraction=0.05, route_delivery="local")
    program, module, *options = shlex.split(checking)[1:]
    assert (program, module) == ("-m", "megatron_pr2.integrations.verl.check")
    options[1] = str(ROOT / options[1])
    assert main(options) == 0
