"""Megatron-LM: PR2's command-line flags and layer spec (docs/megatron_lm.md).

    initialize_megatron(extra_args_provider=add_pr2_args)    # --pr2-preset pr2 --pr2-alpha 2 ...
    spec = pr2_layer_spec(args, config, vp_stage=vp_stage)   # in the model builder, in place of get_gpt_decoder_block_spec()
    pr2 = attach(model, pr2_config_from_args(args))

The flags are made from the fields of PR2Config and their descriptions. A flag that is absent keeps the preset's value.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from typing import Any

from megatron_pr2.config import CHOICES, PRESETS, PR2Config, setting_texts
from megatron_pr2.errors import AttachError, ConfigError


def add_pr2_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds one flag per setting, as `extra_args_provider` of `pretrain` or `initialize_megatron`.

    The values are in `args.pr2_preset`, `args.pr2_alpha`, ...; those of absent flags are None.
    """
    group = parser.add_argument_group(
        title="predictive routing replay",
        description="Experts of MoE layers replayed in training and predicted for the rollout (megatron_pr2, arXiv 2606.00395).",
    )
    group.add_argument(
        "--pr2-preset",
        choices=tuple(PRESETS),
        default="pr2",
        help="Method that the other --pr2- flags start from: grpo (live routes), r2 (routing replay), r3 (rollout routing replay), "
        "pr2 (with predicted routes), pr2-lookahead (predicted by a look-ahead); they differ in --pr2-routes and --pr2-predictor. "
        "Default: pr2.",
    )
    texts = setting_texts(PR2Config)
    for field in fields(PR2Config):
        default = "by --pr2-preset" if field.name in PRESETS["pr2"] else _shown(field.default)
        text = f"{texts.get(field.name, '')} Default: {default}."
        # argparse takes % as the start of a placeholder.
        group.add_argument(flag(field.name), default=None, help=text.replace("%", "%%"), **_kind(field.name, field.default))
    return parser


def pr2_config_from_args(args: argparse.Namespace) -> PR2Config:
    """The settings by the flags of :func:`add_pr2_args`.

    Raises:
        ConfigError: a value is out of range or contradicts another; naming the flags. Or the flags were never added.
    """
    if not hasattr(args, "pr2_preset"):
        raise ConfigError("args has no pr2_preset: pass extra_args_provider=add_pr2_args to pretrain() or initialize_megatron()")
    given = {field.name: value for field in fields(PR2Config) if (value := getattr(args, f"pr2_{field.name}", None)) is not None}
    try:
        return PR2Config.preset(args.pr2_preset, **given)
    except ConfigError as error:
        raise ConfigError(_in_flags(str(error))) from None


# Fields of TransformerConfig by which Megatron-LM's builder takes another spec, and where it comes from.
_OTHER_SPECS = {
    "experimental_attention_variant": "get_transformer_block_with_experimental_attention_variant_spec()",
    "heterogeneous_block_specs": "get_gpt_heterogeneous_layer_spec()",
}


def pr2_layer_spec(args: argparse.Namespace, config: Any = None, *, vp_stage: int | None = None, pp_rank: int | None = None) -> Any:
    """Block spec of this pipeline stage whose MoE layers have PredictiveTopKRouters, for a model builder of Megatron-LM.

    It is what Megatron-LM's own builder takes: get_gpt_decoder_block_spec(), or hybrid_stack_spec with --hybrid-layer-pattern.

    Args:
        args: Megatron-LM's; read are `transformer_impl`, `normalization`, `qk_l2_norm`, `hybrid_layer_pattern` and `spec`.
        config: the model's TransformerConfig; None makes it from `args` as Megatron-LM does (needs megatron.training).
        vp_stage, pp_rank: of the chunk that is being built.

    Raises:
        AttachError: the model has no experts, gets another spec (args.spec, other attention, heterogeneous layers), or has a layer
            that cannot be replayed.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megatron_pr2.integrations.spec import with_pr2_routers

    if getattr(args, "spec", None) is not None:
        raise AttachError(
            f"--spec {' '.join(args.spec)}: the model gets that spec, not PR2's. Megatron-LM takes an object there, not a function "
            "of the arguments: drop --spec, or put with_pr2_routers() around that object (megatron_pr2.integrations.spec)"
        )
    config = _config_from(args) if config is None else config
    if not config.num_moe_experts:
        raise AttachError("the model has no experts (--num-experts is not set): nothing to route; PR2 needs a MoE model")
    # Not by --transformer-impl alone: builders that are given a config have set it there.
    implementation = getattr(args, "transformer_impl", None) or getattr(config, "transformer_impl", "transformer_engine")
    if implementation not in ("transformer_engine", "local"):
        raise AttachError(
            f"--transformer-impl {implementation}: its routers are for inference; use transformer_engine or local to train"
        )
    if getattr(args, "hybrid_layer_pattern", None) is not None:
        try:
            from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
        except ModuleNotFoundError as error:
            raise AttachError(
                f"--hybrid-layer-pattern: this Megatron-Core has no HybridModel ({error}); put with_pr2_routers() around the spec "
                "that your model is built from (megatron_pr2.integrations.spec)"
            ) from error
        return with_pr2_routers(hybrid_stack_spec)
    for name, maker in _OTHER_SPECS.items():
        if getattr(config, name, None):
            raise AttachError(
                f"{name}={getattr(config, name)!r}: Megatron-LM builds such layers from another spec; put with_pr2_routers() "
                f"around the result of {maker} (megatron_pr2.integrations.spec)"
            )
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=implementation == "transformer_engine",
        normalization=getattr(args, "normalization", None),
        qk_l2_norm=getattr(args, "qk_l2_norm", False),
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    return with_pr2_routers(spec, require_moe=False)  # a stage may have dense layers only


def flag(name: str) -> str:
    """The flag of a field of PR2Config."""
    return "--pr2-" + name.replace("_", "-")


def _config_from(args: argparse.Namespace) -> Any:
    try:
        from megatron.training.arguments import core_transformer_config_from_args
    except ImportError as error:
        raise AttachError(
            "pr2_layer_spec(args) without a config needs Megatron-LM's megatron.training, which the megatron-core package has from "
            f"0.17.1 on ({error}); pass the model's TransformerConfig as config"
        ) from error
    return core_transformer_config_from_args(args)


def _kind(name: str, default: Any) -> dict[str, Any]:
    """Arguments of add_argument() for a field, by the type of its default."""
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, tuple):
        return {"type": type(default[0]), "nargs": len(default), "metavar": tuple("VALUE" for _ in default)}
    if name in CHOICES:
        return {"choices": CHOICES[name]}
    return {"type": float if default is None else type(default)}  # numbers whose default is a rule


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


_NAMES = "|".join(sorted((field.name for field in fields(PR2Config)), key=len, reverse=True))
_SETTING = re.compile(rf"\b(?:pr2\.({_NAMES})\b|({_NAMES})(?==))(?:=('[^']*'|\([^)]*\)|\[[^]]*\]|[\w.+-]*[\w+-]))?")


def _in_flags(message: str) -> str:
    """A ConfigError's message with settings written as flags: `pr2.alpha=-1` is `--pr2-alpha -1` here."""

    def written(match: re.Match[str]) -> str:
        name, value = match[1] or match[2], match[3]
        if value is None:
            return flag(name)
        if value.lower() in ("true", "false"):
            return flag(name) if value.lower() == "true" else flag(name).replace("--", "--no-", 1)
        return f"{flag(name)} {value.strip('()[]').replace(',', '') if value[0] in '([' else value.strip(chr(39))}"

    return _SETTING.sub(written, message)
