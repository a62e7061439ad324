"""Which mini-step trains on a response: dealt before the response is sampled, by its number alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mini_step_of(number: int, mini_steps: int, seed: int) -> int:
    """The mini-step, from 0, of a response; of every `mini_steps` numbers in a row one goes into each, at random.

    A prompt's responses are spread over all of them. The same whenever, and on how many ranks, the response is sampled.

    Args:
        number: of the response over the whole run.
    """
    block, place = divmod(number, mini_steps)
    return int(np.random.default_rng([seed, block]).permutation(mini_steps)[place])


def mini_batch_order(numbers: Sequence[int], mini_steps: int, seed: int) -> list[int]:
    """The order in which a rank trains on its responses, as indices: its share of the first mini-step, of the second ...

    Mini-batches are equal parts of it: where an early stop left unequally many, some go to the next mini-step or the one before.
    """
    return sorted(range(len(numbers)), key=lambda index: mini_step_of(numbers[index], mini_steps, seed))


def group_horizons(mini_steps: int, groups: int, behind: int = 0) -> list[float]:
    """Updates that each mini-step's responses are predicted for: the mean of its group; 0 where the first one has none.

    Args:
        groups: sets of routers, each for about equally many mini-steps in a row.
        behind: updates between the sampling and the first mini-step.
    """
    group_of = [step * groups // mini_steps for step in range(mini_steps)]
    mean = [float(np.mean([step for step in range(mini_steps) if group_of[step] == group])) for group in range(groups)]
    return [mean[group] + behind if group or behind else 0.0 for group in group_of]
