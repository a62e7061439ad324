"""Megatron-LM's set-up without Megatron-LM and without a GPU: some of its flags, model, DDP and Adam, on megatron-core alone.

What pretrain_gpt_pr2.py needs to run on a laptop; nothing in here is about PR2.
"""

from __future__ import annotations

import argparse
import ast
import os
import socket
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from megatron_pr2 import host


def add_megatron_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Those of Megatron-LM's flags that a small model on the CPU needs, under its names."""
    group = parser.add_argument_group("Megatron-LM's flags", "A selection; the defaults are a model that trains in seconds.")
    for name, default, text in (
        ("--num-layers", 2, "decoder layers"),
        ("--hidden-size", 64, "width of the model, and of the routers' input"),
        ("--num-attention-heads", 4, "attention heads"),
        ("--ffn-hidden-size", 128, "width of dense layers' MLPs"),
        ("--moe-ffn-hidden-size", 32, "width of an expert"),
        ("--num-experts", 8, "experts of a MoE layer"),
        ("--moe-router-topk", 2, "experts per token"),
        ("--vocab-size", 64, "tokens of the synthetic text"),
        ("--seq-length", 32, "tokens per sequence"),
        ("--max-position-embeddings", 512, "longest sequence"),
        ("--micro-batch-size", 2, "sequences per forward pass"),
        ("--global-batch-size", 16, "sequences per recorded batch, over all ranks and mini-steps"),
        ("--train-iters", 10, "batches"),
        ("--tensor-model-parallel-size", 1, "ranks that share each layer; above 1 with --sequence-parallel"),
        ("--pipeline-model-parallel-size", 1, "pipeline stages"),
        ("--expert-model-parallel-size", 1, "ranks that share the experts"),
        ("--seed", 1234, "of weights and text"),
    ):
        group.add_argument(name, type=int, default=default, help=f"{text}; default: {default}")
    group.add_argument("--expert-tensor-parallel-size", type=int, help="the same within experts; default: as for the layers")
    group.add_argument("--lr", type=float, default=3e-3, help="learning rate, constant; default: 3e-3")
    group.add_argument("--clip-grad", type=float, default=1.0, help="limit of the gradient's norm; default: 1.0")
    group.add_argument("--moe-layer-freq", type=moe_layer_freq, default=1, help='N for every N-th layer, or a list: "[0,1,1,1]"')
    group.add_argument("--moe-router-score-function", choices=("softmax", "sigmoid"), default="softmax", help="of the routers")
    group.add_argument(
        "--moe-token-dispatcher-type", choices=("alltoall", "allgather"), default="alltoall", help="how tokens get to their experts"
    )
    group.add_argument("--recompute-granularity", choices=("full", "selective"), help="recompute activations in the backward pass")
    group.add_argument("--recompute-method", choices=("uniform", "block"), help="with --recompute-granularity full")
    group.add_argument("--recompute-num-layers", type=int, help="with --recompute-granularity full")
    group.add_argument("--sequence-parallel", action="store_true", help="split the tokens between tensor-parallel ranks, too")
    group.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="transformer_engine",
        help="which of Megatron-Core's layer specs; with --pr2-cpu both are built from plain torch modules")  # fmt: skip
    parser.set_defaults(
        spec=None,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_grouped_gemm=False,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        position_embedding_type="rope",
        rotary_base=10000,
        untie_embeddings_and_output_weights=True,
    )
    return parser


def moe_layer_freq(text: str) -> int | list[int]:
    """Megatron-LM's --moe-layer-freq: a number or a list."""
    value = ast.literal_eval(text)
    if isinstance(value, int) or (isinstance(value, list) and all(isinstance(each, int) for each in value)):
        return value
    raise argparse.ArgumentTypeError(f"{text}: expected a number or a list of 0 and 1")


def transformer_config(args: argparse.Namespace) -> Any:
    """The model's TransformerConfig by field names, as Megatron-LM's core_transformer_config_from_args() makes it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    named = {field.name: getattr(args, field.name) for field in fields(TransformerConfig) if hasattr(args, field.name)}
    config = TransformerConfig(**{**named, "num_moe_experts": args.num_experts, **host.config_overrides()})
    return host.adapt_config(config)


def set_up(args: argparse.Namespace, builder: Callable[..., torch.nn.Module]) -> tuple[list[torch.nn.Module], Any]:
    """Process groups, this rank's model chunk in DDP, and its optimizer; completes `args`.

    Args:
        builder: as Megatron-LM's gpt_builder: (args, pre_process, post_process, vp_stage, config, pg_collection) -> model.
    """
    args.padded_vocab_size = args.vocab_size
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    alone = {} if "RANK" in os.environ or torch.distributed.is_initialized() else single_process()
    host.init(
        tensor=args.tensor_model_parallel_size,
        pipeline=args.pipeline_model_parallel_size,
        expert=args.expert_model_parallel_size,
        expert_tensor=args.expert_tensor_parallel_size,
        seed=args.seed,
        **alone,
    )
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = transformer_config(args)
    model = builder(args, mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage(), config=config)
    chunks: list[torch.nn.Module] = [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]
    settings = OptimizerConfig(optimizer="adam", lr=args.lr, min_lr=args.lr, weight_decay=0.0, clip_grad=args.clip_grad)
    return chunks, get_megatron_optimizer(settings, chunks)


def single_process() -> dict[str, Any]:
    """Process group settings for a run without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"rank": 0, "world_size": 1, "init_method": f"tcp://127.0.0.1:{port}"}
