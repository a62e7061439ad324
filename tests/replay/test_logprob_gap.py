"""The engine's log-probs against the actor's: which gap is refused, and which cause is named."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pr2.replay.logprob_gap import BOUNDS, LEAST_TOKENS, OLDER_BOUNDS, Sums, judge, measured

COUNT, VOCAB = 48, 200


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Of 4 sequences, [4, 48, 200]."""
    return np.random.default_rng(0).normal(size=(4, COUNT, VOCAB)) * 2.0


@pytest.fixture(scope="module")
def tokens(logits: np.ndarray) -> np.ndarray:
    drawn = np.random.default_rng(1).random((4, COUNT, 1))
    return (np.exp(log_softmax(logits)).cumsum(-1) < drawn).sum(-1).clip(0, VOCAB - 1)


def chosen(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_softmax(logits), tokens[..., None], -1)[..., 0].astype(np.float32)


def compared(engine: np.ndarray, old: np.ndarray, mask: np.ndarray | None = None) -> Sums:
    return measured(engine, old, np.ones(old.shape, dtype=bool) if mask is None else mask)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_engines_that_work_are_within_the_bounds(logits: np.ndarray, tokens: np.ndarray, dtype: str) -> None:
    noise = 1e-5 if dtype == "float32" else 0.01
    engine = chosen(logits + noise * np.random.default_rng(2).normal(size=logits.shape), tokens)
    sums = compared(engine, chosen(logits, tokens))
    assert sums.mean < 2 * noise
    assert judge(sums, BOUNDS[dtype]) is None
    assert judge(sums, OLDER_BOUNDS) is None


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_is_named(logits: np.ndarray, tokens: np.ndarray, shift: int) -> None:
    old = chosen(logits, tokens)
    found = judge(compared(np.roll(old, shift, axis=1), old), OLDER_BOUNDS)
    assert found is not None
    assert found.refuse
    where = "the actor's lie one token before" if shift == 1 else "the actor's lie one token behind"
    assert "shifted by one" in found.text
    assert where in found.text


def test_a_shift_is_refused_above_the_warning_already(logits: np.ndarray, tokens: np.ndarray) -> None:
    """A nearly uniform policy: neighbours differ by little, but plainly."""
    old = chosen(logits * 0.05, tokens)
    sums = compared(np.roll(old, 1, axis=1), old)
    assert BOUNDS["bfloat16"][0] < sums.mean < BOUNDS["bfloat16"][1]
    found = judge(sums, BOUNDS["bfloat16"])
    assert found is not None
    assert found.refuse


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.4])
def test_another_temperature_is_named_with_its_direction(logits: np.ndarray, tokens: np.ndarray, temperature: float) -> None:
    found = judge(compared(chosen(logits / temperature, tokens), chosen(logits, tokens)), BOUNDS["bfloat16"])
    assert found is not None
    assert found.refuse
    assert "another temperature" in found.text
    slope = float(found.text.partition("slope ")[2].split()[0])
    assert slope == pytest.approx(temperature, rel=0.2)


def test_other_weights_are_neither(logits: np.ndarray, tokens: np.ndarray) -> None:
    other = np.random.default_rng(3).normal(size=logits.shape) * 2.0
    for engine in (other, logits + 0.6 * np.random.default_rng(4).normal(size=logits.shape)):
        found = judge(compared(chosen(engine, tokens), chosen(logits, tokens)), BOUNDS["bfloat16"])
        assert found is not None
        assert found.refuse
        assert "other weights" in found.text


def test_between_the_bounds_is_a_warning(logits: np.ndarray, tokens: np.ndarray) -> None:
    engine = chosen(logits + 0.12 * np.random.default_rng(5).normal(size=logits.shape), tokens)
    sums = compared(engine, chosen(logits, tokens))
    found = judge(sums, BOUNDS["bfloat16"])
    assert found is not None
    assert not found.refuse
    assert judge(sums, OLDER_BOUNDS) is None
    strict = judge(sums, BOUNDS["float32"])
    assert strict is not None
    assert strict.refuse


def test_masked_and_unknown_log_probs_do_not_count(logits: np.ndarray, tokens: np.ndarray) -> None:
    old = chosen(logits, tokens)
    engine, mask = old.copy(), np.ones(old.shape, dtype=bool)
    engine[:, 3], mask[:, 3] = 5.0, False
    engine[:, 7] = np.nan
    sums = compared(engine, old, mask)
    assert (sums.tokens, sums.mean, sums.largest, sums.kl) == (4 * (COUNT - 2), 0.0, 0.0, 0.0)
    assert measured([engine[0, :-1]], [old[0]], [mask[0]]).tokens == 0
    assert np.isnan(Sums().mean)
    assert judge(Sums(), BOUNDS["float32"]) is None


def test_few_tokens_are_not_judged_and_sums_add_up(logits: np.ndarray, tokens: np.ndarray) -> None:
    old = chosen(logits, tokens)
    few = LEAST_TOKENS - 1
    assert judge(compared(old[:1, :few] + 9.0, old[:1, :few]), BOUNDS["float32"]) is None
    engine = np.roll(old, 1, axis=1)
    whole, parts = compared(engine, old), [compared(engine[i : i + 2], old[i : i + 2]) for i in (0, 2)]
    np.testing.assert_allclose(whole.values, sum(part.values for part in parts), rtol=1e-12)
