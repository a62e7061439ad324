"""Prints what policies write with the calculator at hand, on prompts that no training saw.

    python examples/calculator/transcripts.py runs/warmstart/calculator_seed_0 runs/calculator/final
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from megatron_pr2 import host


def main(
    models: Annotated[list[Path], typer.Argument(help="Directories of tiny policies: a warm start, RUN/final.")],
    prompts: Annotated[int, typer.Option(help="Prompts to sample one response to.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Decides prompts and responses.")] = 0,
) -> None:
    """Samples one response per prompt at temperature 1; the calculator's replies are blue (and in the text behind each "]")."""
    if not torch.cuda.is_available():
        host.enable()  # Transformers is imported on its CPU platform
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from megatron_pr2.rl.calculator import Calculator
    from megatron_pr2.rl.rewards import exact_match
    from megatron_pr2.rl.task import TaskConfig, make_problems
    from megatron_pr2.rl.warmstart import sample_responses

    logging.disable_progress_bar()
    console = Console(highlight=False)
    problems = make_problems(TaskConfig(), "eval", prompts, seed)
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path)
        calculator = Calculator(AutoTokenizer.from_pretrained(path))
        console.print(f"{path}", style="bold")
        responses = sample_responses(model, [p.prompt for p in problems], seed, calculator)
        for problem, response in zip(problems, responses, strict=True):
            line = Text(f"  {problem.prompt}")
            for index, part in enumerate(response):
                line.append(part, style="blue" if index % 2 else "")
            line.append("  right" if exact_match(response[-1], problem.answer) else f"  wrong, it is {problem.answer}", style="dim")
            console.print(line)


if __name__ == "__main__":
    typer.run(main)
