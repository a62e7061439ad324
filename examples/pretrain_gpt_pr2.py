"""Trains a GPT with experts by Megatron-LM's megatron.training; routes are recorded once per batch and replayed in several updates.

On GPUs, with Megatron-LM's own flags:

    torchrun --nproc-per-node 8 examples/pretrain_gpt_pr2.py --num-layers 24 ... --pr2-preset r2 --pr2-mini-steps 4

Without a GPU, with a model that trains in seconds unless flags say otherwise (prefix the second with torchrun):

    python examples/pretrain_gpt_pr2.py --pr2-cpu --pr2-preset r2
    torchrun --nproc-per-node 2 examples/pretrain_gpt_pr2.py --pr2-cpu --pr2-preset pr2 --pr2-routes actor \\
        --expert-model-parallel-size 2

--pr2-mini-steps updates of --global-batch-size sequences make a rollout batch. It goes through the model once to record its routes
(the old-log-prob pass of RL); then each update replays its share of them. There is no rollout engine that routes could come from;
an RL loop has the same lines and the engine's (docs/megatron_lm.md). The text is synthetic: each token follows from the one before
it. --save, --save-interval and --load are Megatron-LM's; PR2's state is kept beside its checkpoints.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_pr2 import host
from megatron_pr2.errors import ConfigError, PR2Error
from megatron_pr2.integrations.megatron_lm import add_pr2_args, pr2_config_from_args, pr2_layer_spec

# Megatron-Core and megatron.training are imported by the functions that need them: after the platform is known.

Item = dict[str, Any]
Chunks = Sequence[torch.nn.Module]

# With --pr2-cpu: Megatron-LM's flags that a small model needs, where the command line has none.
CPU_DEFAULTS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "seq_length": 32,
    "max_position_embeddings": 512, "position_embedding_type": "rope", "normalization": "RMSNorm", "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "num_experts": 8, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "tokenizer_type": "NullTokenizer", "vocab_size": 63, "make_vocab_size_divisible_by": 32,  # and one token for the end: 64
    "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 40, "lr": 3e-3, "min_lr": 3e-3, "weight_decay": 0.0,
    "lr_decay_style": "constant", "distributed_backend": "gloo",
}  # fmt: skip


# ---- what megatron.training is given -------------------------------------------------------------------------------------

def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """PR2's flags and this script's own."""
    group = add_pr2_args(parser).add_argument_group(title="this script")
    group.add_argument(
        "--pr2-mini-steps",
        type=int,
        default=4,
        help="Updates of --global-batch-size sequences per rollout batch (the paper's kappa). Routes are those of the weights "
        "before the first; the predictor learns from the second on. Default: 4.",
    )
    text = "Run on the CPU with gloo (megatron_pr2.host), with the defaults of a small model."
    group.add_argument("--pr2-cpu", action="store_true", help=text)
    if host.is_enabled():
        parser.set_defaults(**CPU_DEFAULTS, **host.config_overrides())
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError for flags of Megatron-LM that this script would ignore, parts of rollout batches, and engine routes."""
    ignored = {
        "mtp_num_layers": None, "rotary_percent": 1.0, "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None,
        "fp16_lm_cross_entropy": False, "context_parallel_size": 1, "rampup_batch_size": None, "train_samples": None,
    }  # fmt: skip
    if found := [name for name, default in ignored.items() if getattr(args, name, default) not in (default, None)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in found)
        raise ConfigError(f"{flags}: this example does not pass them on; leave them out, or extend gpt_pr2_builder()")
    for name in ("train_iters", "save_interval"):
        if (getattr(args, name) or 0) % args.pr2_mini_steps:
            raise ConfigError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: expected a multiple of --pr2-mini-steps {args.pr2_mini_steps}, "
                "the updates of a rollout batch"
            )
    if pr2_config_from_args(args).routes == "engine":
        raise ConfigError(
            f"--pr2-preset {args.pr2_preset}: its routes come from a rollout engine, and pretraining has none; use "
            "--pr2-preset r2, or --pr2-routes actor for the routes of the pass before the updates"
        )


def gpt_pr2_builder(
    args: argparse.Namespace, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:  # fmt: skip
    """A model chunk, as Megatron-LM's gpt_builder() makes it of the flags that this script knows, with routers that can replay."""
    from megatron.core.models.gpt import GPTModel
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args) if config is None else config
    if host.is_enabled():
        host.adapt_config(config)
    return GPTModel(
        config=config,
        transformer_layer_spec=pr2_layer_spec(args, config, vp_stage=vp_stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def loss_func(loss_mask_BS: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses, tokens, and both for the report."""
    loss = (output.float().view(-1) * loss_mask_BS.reshape(-1)).sum()
    tokens = loss_mask_BS.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator: Iterator[Item], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron-LM's forward step; PR2 adds nothing to it."""
    item = next(data_iterator)
    device = next(model.parameters()).device
    tokens, labels, loss_mask = (item[name].to(device) for name in ("tokens", "labels", "loss_mask"))
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), partial(loss_func, loss_mask)


# ---- data ----------------------------------------------------------------------------------------------------------------

def rollout_batch(args: argparse.Namespace, number: int, rank: int, ranks: int) -> list[list[Item]]:
    """This data-parallel rank's micro-batches of every mini-step, and for PR2 which sequence is in which row of each.

    A mini-step has the same sequences whatever the number of ranks.

    Args:
        number: of the rollout batch, from 1.
    """
    from megatron_pr2.attach import MicroBatch

    size, sequences = args.micro_batch_size, args.pr2_mini_steps * args.global_batch_size
    vocabulary = args.padded_vocab_size
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(args.seed))
    first = torch.randint(vocabulary, (sequences,), generator=torch.Generator().manual_seed(args.seed + number))
    mini_batches = []
    for ids_of_mini_step in torch.arange(sequences).chunk(args.pr2_mini_steps):
        items = []
        for ids in ids_of_mini_step.chunk(ranks)[rank].split(size):
            text = [first[ids]]
            for _ in range(args.seq_length):
                text.append(successor[text[-1]])
            tokens_BS = torch.stack(text, dim=1)
            items.append({
                "tokens": tokens_BS[:, :-1], "labels": tokens_BS[:, 1:], "loss_mask": torch.ones(size, args.seq_length),
                "ids": ids.tolist(), "micro_batch": MicroBatch.padded(ids.tolist(), [args.seq_length] * size, args.seq_length),
            })  # fmt: skip
        mini_batches.append(items)
    return mini_batches


def iterators(items: list[Item], chunks: Chunks) -> Any:
    """An iterator over the micro-batches, or one for each chunk of an interleaved pipeline, as schedules take it."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    each = [RerunDataIterator(iter(items)) for _ in chunks]
    return each if len(each) > 1 else each[0]


# ---- the loop ------------------------------------------------------------------------------------------------------------

def train(args: argparse.Namespace, chunks: Chunks, optimizer: Any, scheduler: Any) -> list[dict[str, float]]:
    """Trains up to --train-iters updates, from where a checkpoint ended; collective.

    Returns:
        Per rollout batch: "lm loss" of the pass that records, "mini-step lm loss" of the last update, and PR2's metrics.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.training import train_step

    from megatron_pr2.attach import ReplaySequence, attach

    config, schedule = get_model_config(chunks[0]), get_forward_backward_func()
    # What megatron.training.training.train() sets.
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    pr2 = attach(chunks, pr2_config_from_args(args), optimizer)
    if args.iteration:
        pr2.load(pr2_directory(args.load, args.iteration))
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    history = []
    while args.iteration < args.train_iters:
        mini_batches = rollout_batch(args, args.iteration // args.pr2_mini_steps + 1, rank, ranks)
        items = [item for mini_batch in mini_batches for item in mini_batch]
        pr2.begin_rollout([
            ReplaySequence(sid, args.seq_length, 0, args.seq_length, mini_step=mini_step)
            for mini_step, mini_batch in enumerate(mini_batches, start=1)
            for item in mini_batch
            for sid in item["ids"]
        ])  # fmt: skip
        with pr2.old_logprobs([item["micro_batch"] for item in items]):
            row = {"lm loss": score(args, chunks, items)}
        for mini_batch in mini_batches:
            with pr2.actor_update([item["micro_batch"] for item in mini_batch]) as session:
                losses, *_ = train_step(
                    forward_step, iterators(mini_batch, chunks), chunks, optimizer, scheduler, config, schedule, args.iteration
                )
            pr2.step()
            args.iteration += 1
            args.consumed_train_samples += args.global_batch_size
            row["mini-step lm loss"] = of_last_stage(losses.get("lm loss", torch.zeros(())))
            row["replayed rows"] = row.get("replayed rows", 0.0) + session.replayed_rows
        history.append(row | pr2.metrics())
        pr2.end_rollout()
        report(args, history[-1])
        if args.save and (args.iteration == args.train_iters or (args.save_interval and args.iteration % args.save_interval == 0)):
            pr2.save(pr2_directory(args.save, args.iteration))  # first: Megatron-LM's names the checkpoint as the newest
            save_checkpoint(args.iteration, chunks, optimizer, scheduler, args.num_floating_point_operations_so_far)
    return history


def pr2_directory(root: str, iteration: int) -> Path:
    """PR2's state of a checkpoint: beside Megatron-LM's directory of the same number."""
    return Path(root) / "pr2" / f"iter_{iteration:07d}"


def score(args: argparse.Namespace, chunks: Chunks, items: list[Item]) -> float:
    """Mean loss per token of some micro-batches under the present weights, over all data-parallel ranks; the same on every rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.eval()
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators(items, chunks),
        model=list(chunks),
        num_microbatches=len(items),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
    )
    for chunk in chunks:
        chunk.train()
    total = torch.zeros(2, device=next(chunks[0].parameters()).device)  # only the last pipeline stage has results
    for result in results:
        total += result["lm loss"]
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return of_last_stage(total[0] / total[1].clamp(min=1))


def of_last_stage(value: Tensor) -> float:
    """A number that the last pipeline stage has, on all of its stages; the others come with 0."""
    from megatron.core import parallel_state as mpu

    value = value.clone()
    torch.distributed.all_reduce(value, group=mpu.get_pipeline_model_parallel_group())
    return value.item()


def report(args: argparse.Namespace, row: dict[str, float]) -> None:
    """One line per rollout batch, on the first rank."""
    if torch.distributed.get_rank() == 0:
        names = ("lm loss", "mini-step lm loss", "pr2/agreement", "pr2/lift")
        values = " | ".join(f"{name} {row[name]:.4f}" for name in names if name in row)
        print(f"iteration {args.iteration}/{args.train_iters} | {values}", flush=True)


# ---- by megatron.training ------------------------------------------------------------------------------------------------

def set_up() -> tuple[argparse.Namespace, list[torch.nn.Module], Any, Any]:
    """Arguments of the command line, model chunks, optimizer and scheduler, loaded from --load if there is something."""
    # Not by pretrain(), which makes one update per batch: replay is about several.
    try:
        from megatron.core.enums import ModelType
        from megatron.training import arguments, get_args
        from megatron.training.initialize import initialize_megatron
        from megatron.training.training import setup_model_and_optimizer
    except ImportError as error:
        raise ConfigError(
            f"megatron.training is not importable ({error}): the megatron-core package has it from release 0.17.1 on; install one, "
            "or put a checkout of Megatron-LM of your release on PYTHONPATH"
        ) from error
    if "extra_args_provider" in inspect.signature(initialize_megatron).parameters:
        initialize_megatron(extra_args_provider=extra_args_provider)
    else:  # from 0.18 on arguments are parsed before
        arguments.parse_and_validate_args(extra_args_provider=extra_args_provider)
        initialize_megatron()
    args = get_args()
    check_flags(args)

    def model_provider(*positional: Any, **named: Any) -> torch.nn.Module:
        return gpt_pr2_builder(args, *positional, **named)

    # By name: 0.19 changed the order.
    chunks, optimizer, scheduler = setup_model_and_optimizer(
        model_provider_func=model_provider, model_type=ModelType.encoder_or_decoder
    )
    return args, chunks, optimizer, scheduler


def on_cpu() -> None:
    """megatron.training on the CPU of this process, and the environment of torchrun where there is none."""
    host.enable_training()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        os.environ.update(alone)


def main() -> list[dict[str, float]]:
    """Trains by the command line; the history of :func:`train`, whose last entry is printed as JSON."""
    if "-h" in sys.argv or "--help" in sys.argv:
        # The flags of this script; Megatron-LM has some 600 more.
        text, style = "All of Megatron-LM's flags are accepted as well.", argparse.RawDescriptionHelpFormatter
        extra_args_provider(argparse.ArgumentParser(description=__doc__, epilog=text, formatter_class=style)).print_help()
        return []
    if "--pr2-cpu" in sys.argv:
        on_cpu()
    history = train(*set_up())
    if history and torch.distributed.get_rank() == 0:
        print(json.dumps(history[-1]))
    return history


if __name__ == "__main__":
    try:
        main()
    except PR2Error as failure:
        sys.exit(f"{type(failure).__name__}: {failure}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
