"""The arithmetic task: answers are right, splits are disjoint, seeds decide everything."""

from __future__ import annotations

import random
import re

import pytest

from megatron_pr2.errors import ConfigError
from megatron_pr2.rl.data import load_examples
from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.task import SPLITS, TaskConfig, guess, make_problems, split_of, write_problems


def test_problems_are_right_and_of_the_asked_shape():
    problems = make_problems(TaskConfig(), "train", 500, 0)
    for problem in problems:
        assert re.fullmatch(r"\d(\+\d){2,3}=", problem.prompt)
        terms = [int(term) for term in problem.prompt[:-1].split("+")]
        assert int(problem.answer) == sum(terms)
        assert [int(s) for s in problem.worked.split(" ")] == [sum(terms[:n]) for n in range(2, len(terms) + 1)]
        assert exact_match(problem.worked, problem.answer) == 1.0
    assert {problem.prompt.count("+") for problem in problems} == {2, 3}


def test_splits_share_no_prompt_whatever_the_seed():
    prompts = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(3):
            problems = make_problems(TaskConfig(), split, 300, seed)
            assert len({p.prompt for p in problems}) == 300
            prompts[split] |= {p.prompt for p in problems}
            assert all(split_of(p.prompt) == split for p in problems)
    assert not prompts["train"] & prompts["eval"]
    assert not prompts["train"] & prompts["warmstart"]
    assert not prompts["warmstart"] & prompts["eval"]


def test_seeds_decide():
    assert make_problems(TaskConfig(), "train", 50, 1) == make_problems(TaskConfig(), "train", 50, 1)
    assert make_problems(TaskConfig(), "train", 50, 1) != make_problems(TaskConfig(), "train", 50, 2)


def test_guesses_are_near_and_seldom_right():
    rng = random.Random(0)
    problem = make_problems(TaskConfig(), "train", 1, 0)[0]
    answer = int(problem.answer)
    guesses = [guess(problem, 5, rng) for _ in range(1100)]
    assert all(re.fullmatch(r"~\d+", text) for text in guesses)
    assert {int(text[1:]) for text in guesses} <= set(range(max(0, answer - 5), answer + 6))
    right = sum(exact_match(text, problem.answer) for text in guesses)
    assert 50 < right < 150  # one in eleven


def test_written_problems_load(tmp_path):
    problems = make_problems(TaskConfig(), "eval", 20, 0)
    examples = load_examples(write_problems(problems, tmp_path / "new" / "eval.jsonl"))
    assert [(e.prompt, e.answer) for e in examples] == [(p.prompt, p.answer) for p in problems]


def test_more_problems_than_there_are() -> None:
    few = TaskConfig(max_digit=1, min_terms=2, max_terms=2)
    with pytest.raises(ConfigError, match=r"only \d different train prompts found"):
        make_problems(few, "train", 5, 0)
