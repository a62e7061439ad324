"""What a plan reads of a verl configuration: the model, the layout, the batch, PR2's settings and the rollout engine's layout.

A file as verl's `--config-path` and `--config-name` take it, read without Hydra and without verl: keys that it does not set have
the defaults of verl 0.9.1; entries of its `defaults` list are read if they are in the same directory. Only what a plan needs is
read; whether verl knows every key is checked where verl is installed (tests/test_cluster_examples.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_pr2.config import PRESETS, read_yaml
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.layout import CONFIG_NAMES, data_size
from megatron_pr2.plan.models import LAYOUT_OPTIONS, MODELS
from megatron_pr2.rollout.sglang.refusals import refusals

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
MEGATRON = f"{ACTOR}.megatron"
# megatron_pr2.integrations.verl reads its settings there.
PR2 = f"{MEGATRON}.override_mcore_model_config.pr2"

# verl/trainer/config of verl 0.9.1 with model_engine=megatron.
DEFAULTS: dict[str, Any] = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "data.train_batch_size": 1024,
    "data.max_prompt_length": 512,
    "data.max_response_length": 512,
    f"{ACTOR}.ppo_mini_batch_size": 256,
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": None,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.use_dynamic_bsz": False,
    f"{ACTOR}.ppo_max_token_len_per_gpu": 16384,
    f"{MEGATRON}.tensor_model_parallel_size": 1,
    f"{MEGATRON}.pipeline_model_parallel_size": 1,
    f"{MEGATRON}.virtual_pipeline_model_parallel_size": None,
    f"{MEGATRON}.context_parallel_size": 1,
    f"{MEGATRON}.expert_model_parallel_size": 1,
    f"{MEGATRON}.expert_tensor_parallel_size": None,
    f"{MEGATRON}.use_remove_padding": True,
    f"{MEGATRON}.router_replay.mode": "disabled",
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.tensor_model_parallel_size": 2,
    f"{ROLLOUT}.data_parallel_size": 1,
    f"{ROLLOUT}.expert_parallel_size": 1,
    f"{ROLLOUT}.pipeline_model_parallel_size": 1,
    f"{ROLLOUT}.enable_rollout_routing_replay": False,
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": None,
}


class VerlRun(NamedTuple):
    """A configuration as a plan takes it.

    Attributes:
        options: values of `megatron-pr2 plan`'s options, by their names.
        pr2: values of PR2Config.
        preset: they start from it, or None.
        transformer: `override_transformer_config`.
        rollout: SGLang on the same GPUs: `engines`, `gpus` of each, `attention_data` (data-parallel attention groups of an engine,
            1 without DP attention) and `expert` (expert-parallel size; 1 shares every expert out over all GPUs of an engine).
    """

    options: dict[str, Any]
    pr2: dict[str, Any]
    preset: str | None
    transformer: dict[str, Any]
    rollout: dict[str, int]


def read_verl(path: Path) -> VerlRun:
    """Reads a configuration.

    Raises:
        ConfigError: an unreadable file, or sizes that do not go together, by verl's names of them. What the layout of the actor
            refuses is found when it is built.
    """
    tree = _Tree(path)
    world = tree.count("trainer.nnodes") * tree.count("trainer.n_gpus_per_node")
    sizes = {option: tree.count(f"{MEGATRON}.{_setting(option)}") for option in ("tp", "pp", "cp", "ep")}
    try:
        data = data_size(world, sizes["tp"], sizes["pp"], sizes["cp"])
    except ConfigError as error:
        raise tree.error(f"trainer.nnodes x trainer.n_gpus_per_node: {error}") from None
    transformer = tree.mapping(f"{MEGATRON}.override_transformer_config")
    pr2 = tree.mapping(PR2)
    preset = pr2.pop("preset", None)
    options = {
        "model": _model_name(str(tree.get("actor_rollout_ref.model.path") or "")),
        **sizes,
        "world": world,
        **{option: tree.count(f"{MEGATRON}.{_setting(option)}", optional=True) for option in ("etp", "vpp")},
        **{option: transformer.get(_setting(option)) for option in ("first_stage", "last_stage", "pipeline_layout")},
        **{option: bool(transformer.get(_setting(option))) for option in ("count_embedding", "count_loss")},
        "padded": not tree.get(f"{MEGATRON}.use_remove_padding"),
        **_batch(tree, data, sizes["cp"]),
        # Under verl every rank of a replica is given the routes.
        "route_delivery": pr2.get("route_delivery", "local"),
    }
    run = VerlRun(options, pr2, preset, transformer, _rollout(tree, world))
    _check_routes(tree, run)
    return run


def _setting(option: str) -> str:
    """A layout option's name in a TransformerConfig, which is verl's, too."""
    return CONFIG_NAMES[LAYOUT_OPTIONS[option]]


def _batch(tree: _Tree, data: int, context: int) -> dict[str, int]:
    responses = tree.count(f"{ROLLOUT}.n")
    prompts, mini = tree.count("data.train_batch_size"), tree.count(f"{ACTOR}.ppo_mini_batch_size")
    if prompts % mini:
        raise tree.error(f"data.train_batch_size={prompts} is not a multiple of {ACTOR}.ppo_mini_batch_size={mini}")
    if mini * responses % data:
        raise tree.error(
            f"{ACTOR}.ppo_mini_batch_size={mini} x {ROLLOUT}.n={responses} = {mini * responses} sequences are not a multiple of "
            f"the {data} data-parallel replicas; every replica trains equally many"
        )
    if (epochs := tree.count(f"{ACTOR}.ppo_epochs")) != 1:
        raise tree.error(f"{ACTOR}.ppo_epochs={epochs}: a plan is made for one pass over each rollout batch; set it to 1")
    prompt = tree.count("data.max_prompt_length")
    seq = prompt + tree.count("data.max_response_length")
    of_replica = mini * responses // data
    if tree.get(f"{ACTOR}.use_dynamic_bsz"):
        train_key, log_key = f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"
        micro = _sequences(tree, train_key, context, seq)
        log_prob = micro if tree.get(log_key) is None else _sequences(tree, log_key, context, seq)
    else:
        train_key = f"{ACTOR}.ppo_micro_batch_size_per_gpu"
        micro = tree.count(train_key)
        log_prob = tree.count(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu")
        if of_replica % micro:
            raise tree.error(f"{train_key}={micro} does not divide a replica's {of_replica} sequences of a mini-batch")
    return {
        "batch": prompts * responses,
        "seq": seq,
        "prompt": prompt,
        "mini_steps": prompts // mini,
        "micro_batch": micro,
        "log_prob_micro_batch": log_prob,
    }


def _sequences(tree: _Tree, key: str, context: int, seq: int) -> int:
    """Sequences of full length in a micro-batch that is filled up to a number of tokens."""
    tokens = tree.count(key)
    if tokens * context < seq:
        raise tree.error(
            f"{key}={tokens} x context_parallel_size={context} = {tokens * context} tokens: a sequence of "
            f"data.max_prompt_length + data.max_response_length = {seq} does not fit into a micro-batch"
        )
    return tokens * context // seq


def _rollout(tree: _Tree, world: int) -> dict[str, int]:
    attention, data = tree.count(f"{ROLLOUT}.tensor_model_parallel_size"), tree.count(f"{ROLLOUT}.data_parallel_size")
    expert, per_node = tree.count(f"{ROLLOUT}.expert_parallel_size"), tree.count("trainer.n_gpus_per_node")
    gpus = attention * data
    product = f"{ROLLOUT}.tensor_model_parallel_size={attention} x data_parallel_size={data} = {gpus}"
    if world % gpus:
        raise tree.error(f"{product} GPUs of an engine do not divide trainer.nnodes x trainer.n_gpus_per_node = {world}")
    if gpus > per_node and gpus % per_node:
        raise tree.error(f"{product} GPUs of an engine are no whole number of nodes of trainer.n_gpus_per_node={per_node}")
    if expert not in (1, gpus):
        raise tree.error(f"{ROLLOUT}.expert_parallel_size={expert}: verl takes 1 or all GPUs of an engine, {product}")
    settings = {
        "tp_size": gpus,
        "dp_size": data,
        "ep_size": expert,
        "pp_size": tree.count(f"{ROLLOUT}.pipeline_model_parallel_size"),
        **tree.mapping(f"{ROLLOUT}.engine_kwargs.sglang"),
    }
    if wrong := refusals(settings):
        raise tree.error(f"{ROLLOUT}.engine_kwargs.sglang: {'; '.join(wrong)}")
    return {"engines": world // gpus, "gpus": gpus, "attention_data": data, "expert": expert}


def _check_routes(tree: _Tree, run: VerlRun) -> None:
    """Replay has to be verl's or PR2's, and routes have to be asked for."""
    if (mode := tree.get(f"{MEGATRON}.router_replay.mode")) != "disabled":
        raise tree.error(f"{MEGATRON}.router_replay.mode={mode!r} is verl's own replay; set it to 'disabled'")
    routes = run.pr2.get("routes", PRESETS.get(run.preset or "", {}).get("routes", "engine"))
    if routes == "engine" and not tree.get(f"{ROLLOUT}.enable_rollout_routing_replay"):
        raise tree.error(f"{ROLLOUT}.enable_rollout_routing_replay=false: no routes would be returned; set it to true")


def _model_name(path: str) -> str:
    """A directory as it is; the built-in model that a name of the hub stands for; any other name as it is, to be refused."""
    if Path(path).expanduser().exists():
        return path
    name = Path(path).name.lower()
    return next((known for known in MODELS if name == known or name.startswith(f"{known}-")), path)


class _Tree:
    """The settings of a file and of the files in its directory that it names, over verl's defaults."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._settings = OmegaConf.merge(*_parts(path))
        except OmegaConfBaseException as error:
            raise self.error(str(error).splitlines()[0]) from error

    def error(self, message: str) -> ConfigError:
        """An error that names the file."""
        return ConfigError(f"{self._path}: {message}")

    def get(self, key: str) -> Any:
        """A value, verl's default where the file has none."""
        try:
            found = OmegaConf.select(self._settings, key)
        except OmegaConfBaseException as error:
            raise self.error(f"{key}: {str(error).splitlines()[0]}") from error
        return DEFAULTS.get(key) if found is None else found

    def count(self, key: str, *, optional: bool = False) -> Any:
        """A number of things, at least 1; None where it is optional and not set."""
        value = self.get(key)
        if value is None and optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{key}={value!r}: expected an integer of at least 1")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A section as plain values, empty where there is none."""
        found = self.get(key)
        values = OmegaConf.to_container(found, resolve=True) if isinstance(found, DictConfig) else found or {}
        if not isinstance(values, dict):
            raise self.error(f"{key}={values!r}: expected a mapping of settings")
        return {str(name): value for name, value in values.items()}


def _parts(path: Path) -> Iterator[DictConfig]:
    """The files in the order in which they override each other."""
    loaded = read_yaml(path)
    for entry in loaded.pop("defaults", None) or ():
        group, name = next(iter(entry.items())) if isinstance(entry, Mapping) else ("", str(entry))
        beside = path.parent / str(group) / f"{name}.yaml"
        if name != "_self_" and beside.is_file():
            yield from _parts(beside)
    yield loaded
