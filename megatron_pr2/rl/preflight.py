"""What can be known before anything starts, checked in a second: no torch, no Megatron-Core, no process.

`megatron-pr2 train` calls :func:`check` in the parent. Settings that contradict each other are refused earlier still, when they are
read (config.py); what only a built model or a running server can tell is refused later, on the ranks.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import choose_bridge
from megatron_pr2.rl.config import TrainConfig, sglang_config
from megatron_pr2.rl.data import Example, load_examples
from megatron_pr2.rl.preflight_model import check_experts, check_model, check_tokenizer
from megatron_pr2.rl.prompts import load_environment
from megatron_pr2.rl.task import TaskConfig, make_problems
from megatron_pr2.rl.tiny import TinyModelConfig
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.python import find_python

# The arithmetic problems of a run without data.
MADE_UP = 2048
_CONNECT_SECONDS = 3.0


def check(config: TrainConfig) -> None:
    """Refuses a job that would fail: files, directories, model, tokenizer, data, environment and servers.

    Raises:
        ConfigError: what is wrong, where, what was expected and what to do.
        DataError: a line of the data, or a prompt, cannot be used.
    """
    check_place(Path(config.run), "run")
    examples = load_examples(config.data) if config.data else None
    load_environment(config.rollout.environment)
    if config.model.path is None:
        if not examples_model(config).is_dir():  # one that is there is only read
            check_place(Path(config.model.cache), "model.cache")
        choose_bridge("qwen3_moe", config.model.bridge)
        check_experts(TinyModelConfig().num_experts, config.parallel.expert, "the examples' model")
        _check_engine(config, None, 0)
        return
    directory = Path(config.model.path)
    model = check_model(directory, config.parallel.expert, config.model.bridge)
    longest = check_tokenizer(directory, getattr(model, "vocab_size", None), examples or _made_up(config.seed))
    _check_engine(config, model, longest)


def examples_model(config: TrainConfig) -> Path:
    """Where the policy of the examples is cached, and made if it is not there."""
    lesson = config.model.warm_start
    return Path(config.model.cache) / (f"seed_{config.seed}" if lesson == "worked" else f"{lesson}_seed_{config.seed}")


def check_place(directory: Path, setting: str) -> None:
    """Whether a directory can be made, or written to where it exists.

    Raises:
        ConfigError: something else is there, or it may not be written to.
    """
    # Not Path.exists(), which raises where a parent may not be searched.
    existing = next(path for path in (directory, *directory.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise ConfigError(f"{setting}={directory}: {existing} is a file; choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting}={directory}: {existing} cannot be written to; choose another directory")


def _made_up(seed: int) -> Sequence[Example]:
    problems = make_problems(TaskConfig(), "train", MADE_UP, seed)
    return [Example(problem.prompt, problem.answer, "made-up arithmetic (set data to use your own)") for problem in problems]


def _check_engine(config: TrainConfig, model: SimpleNamespace | None, longest: int) -> None:
    if config.rollout.engine != "sglang":
        return
    settings = sglang_config(config, config.model.path or "")
    settings.read_api_key()
    for name in ("push_directory", "spill_directory"):
        if (place := getattr(settings, name)) is not None:
            check_place(Path(place), f"rollout.sglang.{name}")
    for url in (*settings.urls, *([settings.router] if settings.router not in ("none", "own") else [])):
        _check_answers(url)
    if not settings.urls and model is not None:
        _check_context(settings, model, longest)
    if not settings.urls:
        find_python(settings.python)
    if settings.router == "own":
        find_python(settings.python, module="sglang_router")


def _check_answers(url: str) -> None:
    """Something has to listen where a server is said to run."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((str(parts.hostname), port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{url}: nothing answers there ({error}); start the server first") from error


def _check_context(settings: SGLangConfig, model: SimpleNamespace, longest: int) -> None:
    limits = {"rollout.sglang.max_total_tokens": settings.max_total_tokens}
    scaled = getattr(model, "rope_scaling", None) or "factor" in (getattr(model, "rope_parameters", None) or {})
    if not scaled and not any(flag.startswith("--context-length") for flag in settings.extra_flags):
        limits["the model's max_position_embeddings"] = getattr(model, "max_position_embeddings", None)
    for name, limit in limits.items():
        if isinstance(limit, int) and longest >= limit:
            raise ConfigError(
                f"a prompt has {longest} tokens, and {name} is {limit}, for prompt and response together; use shorter prompts or a "
                "larger limit"
            )
