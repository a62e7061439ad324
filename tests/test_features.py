"""FeatureStore and the choice of sampled tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.features import FeatureStore, sample_positions
from megatron_pr2.layout import packed, padded

L, E, H = 2, 4, 3
BYTES = L * (H * 2 + E * 4)


def store(tokens: int = 100) -> FeatureStore:
    return FeatureStore(L, E, H, budget_bytes=tokens * BYTES, device=torch.device("cpu"), h_dtype=torch.bfloat16)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(0, 200), st.integers(0, 50), st.floats(0.01, 1.0))
def test_samples_are_a_sorted_share_of_the_candidates(seed: int, sequence: int, count: int, start: int, fraction: float) -> None:
    candidates = np.arange(start, start + count, dtype=np.int64)
    sample = sample_positions(seed, sequence, candidates, fraction)
    assert len(sample) == (min(count, max(1, round(count * fraction))) if count else 0)
    assert (np.diff(sample) > 0).all()
    assert np.isin(sample, candidates).all()
    assert np.array_equal(sample, sample_positions(seed, sequence, candidates.copy(), fraction))


def test_samples_depend_on_seed_and_sequence() -> None:
    candidates = np.arange(1000)
    drawn = {sample_positions(seed, sequence, candidates, 0.1).tobytes() for seed in range(3) for sequence in range(3)}
    assert len(drawn) == 9


def test_the_global_random_state_is_neither_used_nor_moved() -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    sample_positions(1, 2, np.arange(50), 0.5)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.get_rng_state())


def test_sampling_is_uniform() -> None:
    """Chi-square over 20 positions of 4,000 sequences; the 99.99 % quantile of 19 degrees of freedom is 52."""
    counts = np.zeros(20)
    for sequence in range(4000):
        counts[sample_positions(0, sequence, np.arange(20), 0.25)] += 1
    expected = counts.sum() / 20
    # Drawing without replacement lowers the variance by (20 - 5) / (20 - 1).
    assert ((counts - expected) ** 2 / expected).sum() / ((20 - 5) / 19) < 52


def test_budget_drops_whole_sequences_and_counts_them() -> None:
    features = store(tokens=10)
    assert features.bytes_per_token == BYTES
    samples = {i: np.arange(n) for i, n in enumerate((4, 5, 3, 1))}
    features.allocate(samples)
    assert features.sampled_tokens == 4 + 5 + 1  # the third does not fit, the fourth does
    assert features.dropped_sequences == 1
    assert features.nbytes == 10 * BYTES
    rows, slots = features.locate(np.array([0, 2, 3]), np.array([0, 0, 0]))
    assert rows.tolist() == [0, 2]
    assert slots.tolist() == [0, 9]


def test_no_budget_and_no_layers() -> None:
    features = store(tokens=0)
    features.allocate({0: np.arange(3)})
    assert (features.sampled_tokens, features.dropped_sequences, features.nbytes) == (0, 1, 0)
    empty = FeatureStore(0, E, H, budget_bytes=100, device=torch.device("cpu"), h_dtype=torch.bfloat16)
    empty.allocate({0: np.arange(3)})
    assert len(empty.locate(np.array([0]), np.array([0]))[0]) == 0


def write(features: FeatureStore, sequence: np.ndarray, position: np.ndarray, layers: range = range(L)) -> None:
    """Writes features that name their token."""
    rows, slots = features.locate(sequence, position)
    token = torch.from_numpy(sequence * 100 + position)[torch.from_numpy(rows)].float()
    for layer in layers:
        features.write(
            layer,
            slots,
            torch.from_numpy(slots),
            (token + layer).unsqueeze(1).expand(-1, H) / 1024,
            (token - layer).unsqueeze(1).expand(-1, E),
        )


def test_features_follow_the_token_through_other_micro_batches() -> None:
    """Written from a padded batch of two, read from packed and reordered ones."""
    features = store()
    samples = {0: np.array([1, 3]), 1: np.array([0, 2, 4])}
    features.allocate(samples)
    write(features, *padded([0, 1], [5, 5], 6).rows())
    for grid in (packed([1, 0], [5, 5]), padded([1], [5], 9), padded([0], [4], 4)):
        sequence, position = grid.rows()
        rows, slots = features.locate(sequence, position)
        assert (np.diff(rows) > 0).all()
        wanted = [s >= 0 and p in samples[s].tolist() for s, p in zip(sequence.tolist(), position.tolist(), strict=True)]
        assert rows.tolist() == np.nonzero(wanted)[0].tolist()
        assert features.written(slots).all()
        for layer in range(L):
            h, p = features.read(layer, torch.from_numpy(slots), torch.device("cpu"))
            token = torch.from_numpy(sequence[rows] * 100 + position[rows]).float()
            assert h.dtype == torch.bfloat16
            assert p.dtype == torch.float32
            torch.testing.assert_close(h[:, 0], ((token + layer) / 1024).bfloat16(), rtol=0, atol=0)
            torch.testing.assert_close(p[:, -1], token - layer, rtol=0, atol=0)


def test_what_was_not_written_in_every_layer_is_known_to_be_absent() -> None:
    features = store()
    features.allocate({0: np.array([1, 3]), 1: np.array([0])})
    write(features, *padded([0], [5], 5).rows())
    write(features, *padded([1], [5], 5).rows(), layers=range(1))
    assert features.written(np.array([0, 1, 2])).tolist() == [True, True, False]


def test_copies_from_another_device_are_filed_once_they_have_arrived(
    host_platform: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read from a copy in flight, and the whole pass waits once."""
    features = store()
    features.allocate({0: np.array([1, 3])})
    monkeypatch.setattr(FeatureStore, "_elsewhere", lambda self, tensor: True)
    waits = []
    stream = type("Stream", (), {"synchronize": lambda self: waits.append(1)})
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    write(features, *padded([0], [5], 5).rows())
    assert not features._h_LSH.any()
    assert not waits
    for layer in range(L):
        h, p = features.read(layer, torch.tensor([0, 1]), torch.device("cpu"))
        torch.testing.assert_close(h[:, 0], ((torch.tensor([1.0, 3.0]) + layer) / 1024).bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(p[:, 0], torch.tensor([1.0, 3.0]) - layer, rtol=0, atol=0)
    assert len(waits) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_reach_host_memory_behind_a_busy_device() -> None:
    features = FeatureStore(1, E, 4096, budget_bytes=1 << 30, device=torch.device("cpu"), h_dtype=torch.bfloat16)
    slots = np.arange(4096)
    features.allocate({0: slots})
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 100
    h, p = torch.ones(4096, 4096, device="cuda"), torch.ones(4096, E, device="cuda")
    features.write(0, slots, torch.from_numpy(slots), h + busy[:4096, :4096] * 0, p)
    h_old, p_old = features.read(0, torch.from_numpy(slots), torch.device("cuda"))
    assert (h_old == 1).all()
    assert (p_old == 1).all()


def test_padding_never_matches_a_sample() -> None:
    features = store()
    features.allocate({0: np.array([0])})
    rows, _ = features.locate(np.array([-1, -1, 0]), np.array([-1, -1, 0]))
    assert rows.tolist() == [2]


def test_a_new_rollout_forgets_the_last_one() -> None:
    features = store()
    features.allocate({0: np.array([1])})
    write(features, *padded([0], [3], 3).rows())
    features.allocate({0: np.array([1])})
    assert not features.written(np.array([0])).any()
    features.clear()
    assert features.nbytes == 0


@pytest.mark.parametrize("sequence", [0, 5])
def test_unknown_sequences_have_no_features(sequence: int) -> None:
    features = store()
    features.allocate({3: np.array([1])})
    assert len(features.locate(np.full(4, sequence), np.arange(4))[0]) == 0
