"""The quickstart's task: sums of one-digit numbers, generated from a seed and checked by exact match.

    prompt     "8+7+5+9="
    worked     "15 20 29"   the running sums; the last number is the answer
    guessed    "~27"        a number near the answer

Warm-start shows the policy both kinds of response, so it samples both; only the answer is rewarded. What RL changes therefore shows
in the text as well as in the reward: more responses are worked out. Their lengths vary with the prompt and the kind.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_pr2.errors import ConfigError

SPLITS = ("warmstart", "train", "eval")
# Every prompt belongs to exactly one split, decided by a checksum of its text: 4/10 warm-start, 5/10 train, 1/10 eval.
_BUCKETS = ("warmstart",) * 4 + ("train",) * 5 + ("eval",)
GUESS_MARK = "~"
# What a warm start shows beside guesses: running sums, or the same with a calculator (calculator.py).
LESSONS = ("worked", "calculator")


@dataclass(frozen=True)
class TaskConfig:
    """What the prompts look like: min_terms to max_terms numbers, each from 0 to max_digit, both drawn uniformly."""

    min_terms: int = 3
    max_terms: int = 4
    max_digit: int = 9


@dataclass(frozen=True)
class Problem:
    """One prompt, the worked response, and the answer that RL rewards."""

    prompt: str
    worked: str
    answer: str


def split_of(prompt: str) -> str:
    """One of SPLITS, whatever the seed."""
    return _BUCKETS[zlib.crc32(prompt.encode()) % len(_BUCKETS)]


def draw_problem(config: TaskConfig, rng: random.Random) -> Problem:
    """One problem of any split."""
    terms = [rng.randint(0, config.max_digit) for _ in range(rng.randint(config.min_terms, config.max_terms))]
    sums = [sum(terms[: count + 1]) for count in range(1, len(terms))]
    return Problem("+".join(map(str, terms)) + "=", " ".join(map(str, sums)), str(sums[-1]))


def guess(problem: Problem, spread: int, rng: random.Random) -> str:
    """A guessed response: the answer moved by -spread..spread, never below 0."""
    return f"{GUESS_MARK}{max(0, int(problem.answer) + rng.randint(-spread, spread))}"


def make_problems(config: TaskConfig, split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems of one split; the same arguments give the same problems."""
    rng = random.Random(f"{seed}:{split}")
    found: dict[str, Problem] = {}
    for _ in range(1000 + 200 * count):
        if len(found) >= count:
            break
        problem = draw_problem(config, rng)
        if split_of(problem.prompt) == split:
            found.setdefault(problem.prompt, problem)
    if len(found) < count:
        raise ConfigError(f"only {len(found)} different {split} prompts found for {config}; expected {count}: allow more terms")
    return list(found.values())


def training_problems(seed: int) -> list[Problem]:
    """What a run without data trains on."""
    return make_problems(TaskConfig(), "train", 2048, seed)


def write_problems(problems: Iterable[Problem], path: str | Path) -> Path:
    """Writes `{"prompt": ..., "answer": ...}` lines, which `data.load_examples` reads."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": problem.prompt, "answer": problem.answer}) + "\n" for problem in problems]
    path.write_text("".join(lines), encoding="utf-8")
    return path
