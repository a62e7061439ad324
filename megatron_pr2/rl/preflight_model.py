"""What a model directory says of itself, read from its files: config.json, headers of the weights, tokenizer. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.model_types import choose_bridge
from megatron_pr2.hf.shape import EXPERTS, ModelShape, model_shape
from megatron_pr2.hf.weight_files import tensor_files
from megatron_pr2.rl.data import Example
from megatron_pr2.rl.encoding import check_length

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.*")
# Classes that bring no end-of-sequence token of their own; a model's own class does, which is taken where none is named.
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Prompts are encoded up to this many characters, which takes about a second; the rest is looked at when it is asked for.
_CHARACTERS = 2_000_000


def check_model(directory: Path, expert_parallel: int, bridge: str = "auto") -> SimpleNamespace:
    """Config and weights of a Hugging Face directory.

    Args:
        expert_parallel: size that has to divide the number of experts.
        bridge: TrainConfig's model.bridge.

    Returns:
        What config.json sets, of the text model; what it leaves to Transformers' defaults is not there.

    Raises:
        ConfigError: the directory or a file is missing or damaged, or it is no model that can be trained here.
    """
    if not directory.is_dir():
        raise ConfigError(f"model.path={directory}: no such directory; expected a Hugging Face model directory")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.path={directory}: no config.json there; expected a Hugging Face model directory")
    raw = _read_json(directory / "config.json")
    kind, text = raw.get("model_type"), raw.get("text_config")
    try:
        choose_bridge(kind, bridge)
    except ConfigError as error:
        raise ConfigError(f"{directory}/config.json: {error}") from None
    config = SimpleNamespace(**{**raw, **(text if isinstance(text, dict) else {}), "model_type": kind})
    shape = _shape(config, directory)
    if shape is not None:
        check_experts(shape.num_experts, expert_parallel, f"{directory}/config.json")
        if not 1 <= shape.topk <= shape.num_experts:
            raise ConfigError(f"{directory}/config.json: top-{shape.topk} of {shape.num_experts} experts; expected 1 to all")
    tensor_files(directory)
    return config


def check_experts(experts: int, expert_parallel: int, where: str) -> None:
    """Every process of an expert-parallel group holds the same number of experts.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if experts % expert_parallel:
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise ConfigError(
            f"{where}: {experts} experts cannot be spread over parallel.expert={expert_parallel} processes; expected one of "
            f"{', '.join(map(str, fitting))}"
        )


def check_tokenizer(directory: Path, vocab_size: int | None, examples: Sequence[Example]) -> int:
    """Tokenizer files, and the prompts as they encode.

    Args:
        vocab_size: rows of the model's embedding.
        examples: whose prompts are encoded, up to a number of characters.

    Returns:
        The largest number of tokens of a prompt that was encoded; 0 where Transformers would have to convert the tokenizer first.

    Raises:
        ConfigError: no tokenizer, or one that cannot be read or has no end-of-sequence token.
        DataError: a prompt has no tokens, or tokens that the model does not have.
    """
    if not any(next(directory.glob(pattern), None) for pattern in (*_TOKENIZER_FILES, "*.tiktoken")):
        raise ConfigError(
            f"model.path={directory}: no tokenizer files there; expected tokenizer.json or what it can be made of "
            "(tokenizer.model, vocab.json and merges.txt): copy them from where the model came from"
        )
    settings = _read_json(directory / "tokenizer_config.json", absent={})
    special = _read_json(directory / "special_tokens_map.json", absent={})
    if settings.get("tokenizer_class") in _PLAIN_TOKENIZERS and not (settings.get("eos_token") or special.get("eos_token")):
        raise ConfigError(
            f"{directory}/tokenizer_config.json: no eos_token; expected the token that ends a response, or no response would end"
        )
    if not (directory / "tokenizer.json").is_file():
        return 0
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{directory}/tokenizer.json cannot be read ({error}); copy it anew") from error
    # As they were when it was saved; Transformers takes neither from the file.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return _check_prompts(tokenizer, vocab_size, examples)


def _check_prompts(tokenizer: Any, vocab_size: int | None, examples: Sequence[Example]) -> int:
    longest = 0
    for example in _first(examples):
        ids = tokenizer.encode(example.prompt, add_special_tokens=False).ids
        check_length(ids, example.prompt, f"{example.where}: the prompt")
        longest = max(longest, len(ids))
        if vocab_size is not None and max(ids) >= vocab_size:
            raise ConfigError(
                f"{example.where}: the prompt has token {max(ids)}, and the model's vocab_size is {vocab_size}; the tokenizer in "
                "model.path is another model's"
            )
    return longest


def _first(examples: Sequence[Example]) -> Iterable[Example]:
    characters = 0
    for example in examples:
        characters += len(example.prompt)
        if characters > _CHARACTERS:
            return
        yield example


def _shape(config: SimpleNamespace, directory: Path) -> ModelShape | None:
    given = vars(config)
    if not any(name in given for name in EXPERTS) or any(
        name not in given for name in ("num_experts_per_tok", "num_hidden_layers", "vocab_size")
    ):
        return None
    try:
        return model_shape(config)
    except ConfigError as error:
        raise ConfigError(f"{directory}/config.json: {error}") from None
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{directory}/config.json: a size or a list of layers cannot be used ({error})") from error


def _read_json(file: Path, *, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; `absent` where there is no such file."""
    if absent is not None and not file.is_file():
        return absent
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: a JSON {type(found).__name__}; expected an object")
    return found
