"""What can be known before anything starts, checked in a second: no torch, no Megatron-Core, no process.

`megatron-pr2 train` calls :func:`check` in the parent. Settings that contradict each other are refused earlier still, when they are
read (config.py); what only a built model or a running server can tell is refused later, on the ranks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import choose_bridge
from megatron_pr2.hf.shape import EXPERTS, model_shape
from megatron_pr2.hf.weight_files import tensor_files
from megatron_pr2.rl.config import TrainConfig
from megatron_pr2.rl.data import Example, check_length, load_examples
from megatron_pr2.rl.prompts import load_environment
from megatron_pr2.rl.task import training_problems
from megatron_pr2.rl.tiny import TinyModelConfig
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.python import find_python
from megatron_pr2.rollout.sglang.refusals import settings_from_flags

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = 3.0
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.*", "*.tiktoken"
)  # fmt: skip
# Classes that bring no end-of-sequence token of their own; a model's own class does, which is taken where none is named.
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Prompts are encoded up to this many characters, which takes about a second; the rest is looked at when it is asked for.
_CHARACTERS = 2_000_000


def check(config: TrainConfig) -> None:
    """Refuses a job that would fail: files, directories, model, tokenizer, data, environment and servers.

    Raises:
        ConfigError: what is wrong, where, what was expected and what to do.
        DataError: a line of the data, or a prompt, cannot be used.
    """
    check_place(Path(config.run), "run")
    generated = "generated arithmetic (set data to use your own)"
    examples = (
        load_examples(config.data)
        if config.data
        else [Example(problem.prompt, problem.answer, generated) for problem in training_problems(config.seed)]
    )
    load_environment(config.rollout.environment)
    model: dict[str, Any] = {}
    longest = 0
    if config.model.path is None:
        if not examples_model(config).is_dir():  # one that is there is only read
            check_place(Path(config.model.cache), "model.cache")
        choose_bridge("qwen3_moe", config.model.bridge)
        _check_experts(TinyModelConfig.of(config.model.sizes).num_experts, config.parallel.expert)
    else:
        directory = Path(config.model.path)
        model = _check_model(directory, config.parallel.expert, config.model.bridge)
        longest = check_tokenizer(directory, model.get("vocab_size"), examples)
    if config.rollout.engine == "sglang":
        _check_groups(config)
        _check_sglang(sglang_config(config, config.model.path or ""), model, longest)


def examples_model(config: TrainConfig) -> Path:
    """Where the policy of the examples is cached, and made if it is not there."""
    lesson = config.model.warm_start.replace("worked", "")
    parts = [lesson, TinyModelConfig.of(config.model.sizes).name, f"seed_{config.seed}"]
    return Path(config.model.cache) / "_".join(filter(None, parts))


def check_place(directory: Path, setting: str) -> None:
    """Refuses a directory that can neither be made nor written to."""
    # Not Path.exists(), which raises where a parent may not be searched.
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    wrong = "is a file" if not existing.is_dir() else "" if os.access(existing, os.W_OK | os.X_OK) else "cannot be written to"
    if wrong:
        raise ConfigError(f"{setting}={directory}: {existing} {wrong}; choose another directory")


# ---- the model -------------------------------------------------------------------------------------------------------


def _check_model(directory: Path, expert_parallel: int, bridge: str) -> dict[str, Any]:
    """Config and weights of a Hugging Face directory; returns what config.json sets of the text model."""
    file = directory / "config.json"
    if not file.is_file():
        found = "no config.json there" if directory.is_dir() else "no such directory"
        raise ConfigError(f"model.path={directory}: {found}; expected a Hugging Face model directory")
    raw = _read_json(file)
    kind, text = raw.get("model_type"), raw.get("text_config")
    given = {**raw, **(text if isinstance(text, dict) else {}), "model_type": kind}
    try:
        choose_bridge(kind, bridge)
        # What is not given is left to Transformers' defaults.
        if {"num_experts_per_tok", "num_hidden_layers", "vocab_size"} <= given.keys() and given.keys() & {*EXPERTS}:
            shape = model_shape(SimpleNamespace(**given))
            _check_experts(shape.num_experts, expert_parallel)
            if not 1 <= shape.topk <= shape.num_experts:
                raise ConfigError(f"top-{shape.topk} of {shape.num_experts} experts; expected 1 to all")
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{file}: a size or a list of layers cannot be used ({error})") from error
    tensor_files(directory)
    return given


def _check_experts(experts: int, expert_parallel: int) -> None:
    if experts % expert_parallel:
        fitting = [str(size) for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigError(
            f"the model's {experts} experts cannot be spread over parallel.expert={expert_parallel} processes; expected one of "
            f"{', '.join(fitting)}"
        )


def check_tokenizer(directory: Path, vocab_size: int | None, examples: Sequence[Example]) -> int:
    """Tokenizer files, and the prompts as they encode, unless Transformers would have to convert the tokenizer first.

    Args:
        vocab_size: rows of the model's embedding.

    Returns:
        The largest number of tokens of a prompt that was encoded; 0 without any.
    """
    if not any(next(directory.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise ConfigError(
            f"model.path={directory}: no tokenizer files there; expected tokenizer.json or what it can be made of "
            "(tokenizer.model, vocab.json and merges.txt): copy them from where the model came from"
        )
    named = [directory / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map")]
    settings, special = (_read_json(file) if file.is_file() else {} for file in named)
    if settings.get("tokenizer_class") in _PLAIN_TOKENIZERS and not (settings.get("eos_token") or special.get("eos_token")):
        raise ConfigError(
            f"{directory}/tokenizer_config.json: no eos_token; expected the token that ends a response, or no response would end"
        )
    file = directory / "tokenizer.json"
    if not file.is_file():
        return 0
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{file} cannot be read ({error}); copy it again") from error
    # As they were when it was saved; Transformers takes neither from the file.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    longest = characters = 0
    for example in examples:
        characters += len(example.prompt)
        if characters > _CHARACTERS:
            break
        ids = tokenizer.encode(example.prompt, add_special_tokens=False).ids
        check_length(ids, example.prompt, f"{example.where}: the prompt")
        longest = max(longest, len(ids))
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ConfigError(
                f"{example.where}: the prompt has token {max(ids)}, and the model's vocab_size is {vocab_size}; the tokenizer in "
                "model.path is another model's"
            )
    return longest


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a JSON {type(found).__name__}; expected an object")
    return found


# ---- servers ---------------------------------------------------------------------------------------------------------


def _check_sglang(settings: SGLangConfig, model: dict[str, Any], longest: int) -> None:
    settings.read_api_key()
    for name in ("push_directory", "spill_directory"):
        if (place := getattr(settings, name)) is not None:
            check_place(Path(place), f"rollout.sglang.{name}")
    for url in (*settings.urls, *([settings.router] if settings.router not in ("none", "own") else [])):
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((str(parts.hostname), port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            raise ConfigError(f"{url}: nothing answers there ({error}); start the server first") from error
    if settings.router == "own":
        find_python(settings.python, module="sglang_router")
    if not settings.urls:
        _check_context(settings, model, longest)
        find_python(settings.python)


def _check_groups(config: TrainConfig) -> None:
    """`rollout.groups` against the servers, each of which holds one set of routers at a time."""
    rollout, count, replay = config.rollout, len(set(config.horizons)), config.replay()
    if not count:
        if replay.looks_ahead and replay.routes == "engine" and (kappa := config.algorithm.mini_steps) > 1:
            logger.warning(
                "one set of routers for all mini-steps: a prediction can only be wrong in the first, and gains %s; for more take "
                "rollout.groups=turns, an engine for each mini-step, or pr2.routes=actor",
                "nothing: this runs r3" if kappa == 2 and replay.hold_back else "little",
            )
        return
    given, servers = f"rollout.groups={rollout.groups}", len(rollout.urls) or rollout.engines
    if rollout.sglang.get("push") == "disk":
        raise ConfigError(f"{given} needs rollout.sglang.push=distributed, not disk: from disk all servers load the same model")
    if rollout.groups == "turns":
        if rollout.oversample > 1:
            raise ConfigError(
                f"{given} contradicts rollout.oversample={rollout.oversample}: no prompt is finished before the last turn; use a "
                "server for each group, or rollout.oversample=1"
            )
    elif count > servers:
        raise ConfigError(
            f"{given} needs {count} SGLang servers, one at least for each set of routers, and there are {servers}; start more "
            "(rollout.engines, rollout.urls), use fewer groups, or rollout.groups=turns"
        )
    elif rollout.router != "none":
        raise ConfigError(
            f"{given} needs rollout.router=none, not {rollout.router}: a router does not know which server has which routers"
        )


def _check_context(settings: SGLangConfig, model: dict[str, Any], longest: int) -> None:
    limits = {"rollout.sglang.max_total_tokens": settings.max_total_tokens}
    scaled = model.get("rope_scaling") or "factor" in (model.get("rope_parameters") or {})
    if not scaled and not any(flag.startswith("--context-length") for flag in settings.extra_flags):
        limits["the model's max_position_embeddings"] = model.get("max_position_embeddings")
    for name, limit in limits.items():
        if isinstance(limit, int) and longest >= limit:
            raise ConfigError(
                f"a prompt has {longest} tokens, and {name} is {limit}, for prompt and response together; use shorter prompts or a "
                "larger limit"
            )


def context_length(sglang: Mapping[str, Any]) -> float:
    """Tokens of prompt and response that `rollout.sglang` allows; infinity where it says nothing of it."""
    flags = settings_from_flags(list(map(str, sglang.get("extra_flags") or ())))
    # What is no number SGLang refuses by its name.
    given = (str(each) for each in (sglang.get("max_total_tokens"), flags.get("context_length")))
    return min((float(each) for each in given if each.isdigit()), default=math.inf)


def sglang_config(config: TrainConfig, model_path: str) -> SGLangConfig:
    """The settings of the SGLang engines: `rollout.sglang` over what the job implies.

    Raises:
        ConfigError: an unknown field, or values that SGLangConfig refuses.
    """
    rollout = config.rollout
    implied: dict[str, Any] = {
        "urls": tuple(rollout.urls),
        "model_path": None if rollout.urls else model_path,
        "engines": rollout.engines,
        "router": rollout.router,
        "dtype": config.model.dtype,
        "log_path": None if rollout.urls else str(Path(config.run) / "sglang.log"),
    }
    allowed = {entry.name for entry in fields(SGLangConfig)} - {"urls", "model_path", "engines", "router"}
    if unknown := sorted(set(rollout.sglang) - allowed):
        raise ConfigError(f"rollout.sglang.{unknown[0]}: not a setting here; expected one of {', '.join(sorted(allowed))}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in rollout.sglang.items()}
    try:
        return SGLangConfig(**{**implied, **given})
    except TypeError as error:
        raise ConfigError(f"rollout.sglang: a value has a wrong type ({error}); see docs/sglang.md") from error
