"""Trains a GPT with experts, Megatron-LM's way, with routes that are recorded once per batch and replayed in several updates.

Without a GPU and without Megatron-LM, on megatron-core alone (prefix the second with torchrun):

    python examples/pretrain_gpt_pr2.py --pr2-cpu --pr2-preset r2 --train-iters 10
    torchrun --nproc-per-node 2 examples/pretrain_gpt_pr2.py --pr2-cpu --pr2-preset pr2 --pr2-routes actor \\
        --expert-model-parallel-size 2 --pr2-mini-steps 4 --train-iters 10

With Megatron-LM on PYTHONPATH, on GPUs, with its own flags:

    torchrun --nproc-per-node 8 examples/pretrain_gpt_pr2.py --num-layers 24 ... --pr2-preset r2 --pr2-mini-steps 4

Every global batch goes through the model once to record its routes (the old-log-prob pass of RL), and is then trained on in
--pr2-mini-steps updates, which replay them. There is no rollout engine that routes could come from; an RL loop has the same lines
and the engine's (docs/megatron_lm.md). The text is synthetic: each token follows from the one before it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pretrain_gpt_cpu
import torch
from torch import Tensor

from megatron_pr2.errors import ConfigError, PR2Error
from megatron_pr2.integrations.megatron_lm import add_pr2_args, pr2_config_from_args, pr2_layer_spec

# Megatron-Core is imported by the functions that need it: after the platform is known, and not for --help.

logger = logging.getLogger("pretrain_gpt_pr2")
Item = dict[str, Any]


# ---- what pretrain() and initialize_megatron() of Megatron-LM take -------------------------------------------------------


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """PR2's flags and this script's own."""
    group = add_pr2_args(parser).add_argument_group(title="this script")
    group.add_argument(
        "--pr2-mini-steps",
        type=int,
        default=4,
        help="Updates that a global batch is split into (the paper's kappa). Routes are those of the weights before the first; the "
        "predictor learns from the second on. Default: 4.",
    )
    group.add_argument(
        "--pr2-cpu",
        action="store_true",
        help="Run on the CPU with gloo (megatron_pr2.host), on megatron-core alone, with the flags listed here.",
    )
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags of Megatron-LM that this script would ignore.

    Raises:
        ConfigError: naming them.
    """
    ignored = {
        "mtp_num_layers": None, "rotary_percent": 1.0, "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None,
        "fp16_lm_cross_entropy": False, "context_parallel_size": 1,
    }  # fmt: skip
    if found := [name for name, default in ignored.items() if getattr(args, name, default) not in (default, None)]:
        flags = ", ".join("--" + name.replace("_", "-") for name in found)
        raise ConfigError(f"{flags}: this example does not pass them on; leave them out, or extend gpt_pr2_builder()")


def gpt_pr2_builder(
    args: argparse.Namespace,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> torch.nn.Module:
    """A model chunk, as Megatron-LM's gpt_builder() makes it of the flags that this script knows, with routers that can replay."""
    check_flags(args)
    from megatron.core.models.gpt import GPTModel

    if config is None:
        from megatron.training.arguments import core_transformer_config_from_args

        config = core_transformer_config_from_args(args)
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
    """Megatron-LM's forward step; PR2 needs nothing in it."""
    item = next(data_iterator)
    device = next(model.parameters()).device
    tokens, labels, loss_mask = (item[name].to(device) for name in ("tokens", "labels", "loss_mask"))
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    return model(tokens, positions, None, labels=labels), partial(loss_func, loss_mask)


# ---- data ----------------------------------------------------------------------------------------------------------------


def global_batch(args: argparse.Namespace, iteration: int, rank: int, ranks: int) -> list[list[Item]]:
    """This data-parallel rank's micro-batches of every mini-step, and for PR2 which sequence is in which row of each.

    A mini-step has the same sequences whatever the number of ranks.
    """
    from megatron_pr2.attach import MicroBatch

    size, unit = args.micro_batch_size, args.pr2_mini_steps * ranks * args.micro_batch_size
    micro_batches, rest = divmod(args.global_batch_size, unit)
    if rest or not micro_batches:
        raise ConfigError(
            f"--global-batch-size {args.global_batch_size}: expected a multiple of {unit} = --pr2-mini-steps {args.pr2_mini_steps} "
            f"x data-parallel size {ranks} x --micro-batch-size {size}"
        )
    vocabulary = args.padded_vocab_size
    successor = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(args.seed))
    first = torch.randint(vocabulary, (args.global_batch_size,), generator=torch.Generator().manual_seed(args.seed + iteration))
    mini_batches = []
    for ids_of_mini_step in torch.arange(args.global_batch_size).chunk(args.pr2_mini_steps):
        items = []
        for ids in ids_of_mini_step.chunk(ranks)[rank].split(size):
            text = [first[ids]]
            for _ in range(args.seq_length):
                text.append(successor[text[-1]])
            tokens_BS = torch.stack(text, dim=1)
            items.append(
                {
                    "tokens": tokens_BS[:, :-1],
                    "labels": tokens_BS[:, 1:],
                    "loss_mask": torch.ones(size, args.seq_length),
                    "ids": ids.tolist(),
                    "micro_batch": MicroBatch.padded(ids.tolist(), [args.seq_length] * size, args.seq_length),
                }
            )
        mini_batches.append(items)
    return mini_batches


# ---- the loop ------------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, chunks: Sequence[torch.nn.Module], optimizer: Any, scheduler: Any = None
) -> list[dict[str, float]]:
    """Trains for --train-iters global batches; collective.

    Returns:
        Per global batch: "lm loss" of the pass that records, "mini-step lm loss" of the last update, and PR2's metrics.
    """
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    from megatron_pr2.attach import ReplaySequence, attach

    config = get_model_config(chunks[0])
    config.grad_scale_func, config.finalize_model_grads_func = optimizer.scale_loss, finalize_model_grads
    pr2_config = pr2_config_from_args(args)
    if pr2_config.routes == "engine":
        raise ConfigError(
            f"--pr2-preset {args.pr2_preset}: its routes come from a rollout engine, and pretraining has none; use "
            "--pr2-preset r2, or --pr2-routes actor for the routes of the pass before the updates"
        )
    pr2 = attach(chunks, pr2_config)
    pr2.follow(optimizer)
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    history = []
    for iteration in range(1, args.train_iters + 1):
        mini_batches = global_batch(args, iteration, rank, ranks)
        items = [item for mini_batch in mini_batches for item in mini_batch]
        pr2.begin_rollout(
            [
                ReplaySequence(sid, args.seq_length, 0, args.seq_length, mini_step=mini_step)
                for mini_step, mini_batch in enumerate(mini_batches, start=1)
                for item in mini_batch
                for sid in item["ids"]
            ]
        )
        with pr2.old_logprobs([item["micro_batch"] for item in items]):
            row = {"lm loss": run_schedule(args, chunks, items, forward_only=True)}
        for mini_step, mini_batch in enumerate(mini_batches, start=1):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            with pr2.actor_update([item["micro_batch"] for item in mini_batch], mini_step) as session:
                row["mini-step lm loss"] = run_schedule(args, chunks, mini_batch, forward_only=False)
            optimizer.step()
            pr2.step(optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step(increment=args.global_batch_size // args.pr2_mini_steps)
            row["replayed rows"] = row.get("replayed rows", 0.0) + session.replayed_rows
        history.append(row | pr2.metrics())
        pr2.end_rollout()
        report(args, iteration, history[-1])
    return history


def run_schedule(args: argparse.Namespace, chunks: Sequence[torch.nn.Module], items: list[Item], *, forward_only: bool) -> float:
    """Mean loss per token of some micro-batches, over all data-parallel ranks; the same on every rank."""
    from megatron.core import parallel_state as mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in chunks:
        chunk.train(not forward_only)
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(items) for _ in chunks] if len(chunks) > 1 else iter(items),
        model=list(chunks),
        num_microbatches=len(items),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )
    device = next(chunks[0].parameters()).device
    total = torch.zeros(2, device=device)  # only the last pipeline stage has results
    for result in results:
        total += result["lm loss"]
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX, group=mpu.get_pipeline_model_parallel_group())
    return (total[0] / total[1]).item()


def report(args: argparse.Namespace, iteration: int, row: dict[str, float]) -> None:
    """One line per global batch, on the first rank."""
    if torch.distributed.get_rank() == 0:
        shown = {name: row[name] for name in ("lm loss", "mini-step lm loss", "pr2/agreement", "pr2/lift") if name in row}
        values = " | ".join(f"{name} {value:.4f}" for name, value in shown.items())
        logger.info("iteration %*d/%d | %s", len(str(args.train_iters)), iteration, args.train_iters, values)


# ---- with Megatron-LM ----------------------------------------------------------------------------------------------------


def set_up_megatron_lm() -> tuple[argparse.Namespace, list[torch.nn.Module], Any, Any]:
    """Arguments, model chunks, optimizer and scheduler by Megatron-LM (core_v0.16).

    Not by its pretrain(), which makes one update per batch: replay is about several.
    """
    try:
        from megatron.core.enums import ModelType
        from megatron.training import get_args
        from megatron.training.initialize import initialize_megatron
        from megatron.training.training import setup_model_and_optimizer
    except ImportError as error:
        raise ConfigError(
            f"Megatron-LM is not importable ({error}): put its repository on PYTHONPATH, the megatron-core package has no "
            "megatron.training; or pass --pr2-cpu to run on megatron-core alone"
        ) from error
    initialize_megatron(extra_args_provider=extra_args_provider)
    args = get_args()

    def model_provider(*positional: Any, **named: Any) -> torch.nn.Module:
        return gpt_pr2_builder(args, *positional, **named)

    chunks, optimizer, scheduler = setup_model_and_optimizer(model_provider, ModelType.encoder_or_decoder)
    return args, chunks, optimizer, scheduler


def set_up_cpu(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[torch.nn.Module], Any, None]:
    """The same from megatron-core alone, on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args = extra_args_provider(pretrain_gpt_cpu.add_megatron_args(parser)).parse_args(arguments)
    return args, *pretrain_gpt_cpu.set_up(args, gpt_pr2_builder), None


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Sets up and trains; the history of :func:`train`, whose last entry is printed as JSON.

    Args:
        arguments: of the command line; Megatron-LM reads its own from there.
    """
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else list(arguments)
    on_cpu = "--pr2-cpu" in given or "-h" in given or "--help" in given
    args, chunks, optimizer, scheduler = set_up_cpu(arguments) if on_cpu else set_up_megatron_lm()
    history = train(args, chunks, optimizer, scheduler)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(history[-1]))
    return history


if __name__ == "__main__":
    try:
        main()
    except PR2Error as failure:
        sys.exit(f"{type(failure).__name__}: {failure}")
    torch.distributed.destroy_process_group()
