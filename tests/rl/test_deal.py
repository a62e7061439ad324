"""Mini-steps are dealt by a response's number alone: before it is sampled, on any number of ranks, whenever it is finished."""

from __future__ import annotations

import numpy as np

from megatron_pr2.rl.deal import mini_batch_order, mini_step_of


def test_a_responses_mini_step_does_not_depend_on_the_ranks() -> None:
    kappa, count = 4, 48
    whole = np.array(mini_batch_order(range(count), kappa, 3)).reshape(kappa, -1)
    assert sorted(whole.reshape(-1).tolist()) == list(range(count))
    assert mini_batch_order(range(count), kappa, 4) != whole.reshape(-1).tolist()
    assert mini_batch_order(range(count, 2 * count), kappa, 3) != whole.reshape(-1).tolist()
    for ranks in (2, 3, 4):
        size = count // ranks
        parts = [np.array(mini_batch_order(range(r * size, (r + 1) * size), kappa, 3)) + r * size for r in range(ranks)]
        shares = np.concatenate([part.reshape(kappa, -1) for part in parts], axis=1)
        assert np.array_equal(np.sort(shares), np.sort(whole))


def test_prompts_in_any_order_fill_the_mini_steps_as_they_were_dealt() -> None:
    """As after an early stop, with some carried over: eight responses a prompt, off-4."""
    numbers = [prompt * 8 + place for prompt in (3, 7, 20, 21, 4) for place in range(8)]
    order = mini_batch_order(numbers, 4, 0)
    for step in range(4):
        assert {mini_step_of(numbers[place], 4, 0) for place in order[10 * step : 10 * step + 10]} == {step}


def test_mini_batches_are_equal_parts_where_responses_are_dealt_unequally() -> None:
    """Six responses a prompt, off-4, three of four prompts: nobody is left out, and steps are at most one off."""
    numbers = [number for prompt in (0, 2, 3) for number in range(prompt * 6, prompt * 6 + 6)][:16]
    order = mini_batch_order(numbers, 4, 0)
    assert sorted(order) == list(range(16))
    dealt = [mini_step_of(numbers[place], 4, 0) for place in order]
    assert dealt == sorted(dealt)
    assert all(abs(step - place // 4) <= 1 for place, step in enumerate(dealt))
