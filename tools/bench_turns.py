"""What horizon groups in turns cost on one SGLang server (`rollout.groups=turns`), against one set of gates for all.

One server, one batch of requests whose responses end at random. In each repeat all weights are pushed and all requests sampled at
once; then, turn by turn, the gates alone are pushed and a turn's share is sampled. Prints a table, then one line of JSON: bytes and
seconds of both kinds of push, and tokens per second while the server samples, medians over the repeats.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_pr2 import host
from megatron_pr2.hf.shape import model_shape
from megatron_pr2.prediction.gates import set_aside
from megatron_pr2.rl.tiny import TinyModelConfig, make_tiny_checkpoint
from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory; the quickstart's sizes by default.")] = None,
    turns: Annotated[int, typer.Option(min=2)] = 4,
    responses: Annotated[int, typer.Option(help="Of a batch, a multiple of the turns.")] = 256,
    max_new_tokens: Annotated[int, typer.Option()] = 64,
    stop: Annotated[float, typer.Option(help="Chance that a token ends a response.")] = 0.03,
    repeats: Annotated[int, typer.Option(min=2, help="The first one is left out.")] = 6,
) -> None:
    """Measures both ways; a few minutes on two CPU cores."""
    console = Console(stderr=True)
    if not torch.cuda.is_available():
        host.enable()
    with tempfile.TemporaryDirectory() as scratch:
        path = model or make_tiny_checkpoint(Path(scratch) / "model", TinyModelConfig(), seed=0)
        config = SGLangConfig(model_path=str(path), dtype="float32", start_timeout_s=900.0, log_path=f"{scratch}/sglang.log")
        shape = model_shape(AutoConfig.from_pretrained(path))
        everything = {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        gates: dict[str, torch.Tensor] = {}
        rest = dict(set_aside(everything.items(), gates))
        ends = tuple(range(shape.vocab_size - round(stop * shape.vocab_size), shape.vocab_size))
        sampling = SamplingParams(max_new_tokens, stop_token_ids=ends)
        prompts = [(3 + seed % 50, 4, 5, 6) for seed in range(responses)]
        requests = [RolloutRequest(ids, seed, group=seed, horizon=float(seed % turns)) for seed, ids in enumerate(prompts)]
        undealt = [replace(request, horizon=0.0) for request in requests]
        seconds: dict[str, list[float]] = {name: [] for name in ("push", "push_of_gates", "at_once", "in_turns")}
        tokens = 0
        engine = SGLangEngine(config, shape)
        try:
            with console.status("starting the server"):
                engine.start()
            for repeat in range(repeats):
                console.print(f"repeat {repeat + 1} of {repeats}")
                began = time.monotonic()
                engine.update_weights(rest.items(), repeat, {0.0: gates.items()})
                seconds["push"].append(time.monotonic() - began)
                stats = engine.generate(undealt, sampling, return_routes=True).stats
                seconds["at_once"].append(stats.seconds)
                tokens, in_turns, pushes = stats.generated_tokens, 0.0, []
                for turn in range(turns):
                    began = time.monotonic()
                    engine.update_gates(gates.items(), repeat, float(turn))
                    pushes.append(time.monotonic() - began)
                    in_turns += engine.generate(requests[turn::turns], sampling, return_routes=True).stats.seconds
                seconds["push_of_gates"].append(median(pushes))
                seconds["in_turns"].append(in_turns)
        finally:
            engine.close()
    middle = {name: median(values[1:]) for name, values in seconds.items()}
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in (everything, gates)]
    table = Table("", "all weights, all at once", "gates, in turns", title=f"{tokens} tokens, {turns} turns")
    table.add_row("bytes of a push", *(f"{size:,}" for size in sizes))
    table.add_row("seconds of a push", *(f"{middle[name]:.3f}" for name in ("push", "push_of_gates")))
    table.add_row("tokens per second", *(f"{tokens / middle[name]:.0f}" for name in ("at_once", "in_turns")))
    console.print(table)
    report = {"turns": turns, "responses": responses, "tokens": tokens, "weights_bytes": sizes[0], "gates_bytes": sizes[1]}
    sys.stdout.write(json.dumps({**report, "seconds": middle, "all": seconds}) + "\n")


if __name__ == "__main__":
    typer.run(main)
