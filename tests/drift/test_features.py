"""FeatureStore, the choice of sampled tokens, and how features follow tokens between ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.drift.feature_plan import FeaturePlan
from megatron_pr2.drift.features import FeatureStore
from megatron_pr2.parallel.grid import IntArray, TokenGrid, packed, padded
from megatron_pr2.parallel.replica import Member, RankGroup
from megatron_pr2.parallel.tokens import TokenIndex, sample_positions, spread_order
from tests.helpers.distributed import pool

L, E, H = 2, 4, 3
BYTES = L * (H * 2 + E * 4)
CPU = torch.device("cpu")


# ---- tokens and samples ----------------------------------------------------------------------------------------------


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


@given(st.dictionaries(st.integers(0, 10**12), st.integers(1, 30), max_size=6))
def test_token_index_numbers_every_token_once(lengths: dict[int, int]) -> None:
    index = TokenIndex(lengths)
    assert index.total == sum(lengths.values())
    grid = packed(list(lengths), list(lengths.values()), [n + 3 for n in lengths.values()])
    flat = index.of_grid(grid)
    assert flat[flat >= 0].tolist() == list(range(index.total))
    assert ((flat < 0) == (grid.rows()[0] < 0)).all()
    places = index.sequence_of(flat[flat >= 0])
    for place, (sid, length) in enumerate(lengths.items()):
        span = index.span(sid)
        assert span.stop - span.start == length
        assert (places[span] == place).all()


def test_token_index_knows_no_other_tokens() -> None:
    index = TokenIndex({4: 3, 2: 2})
    sequence, position = np.array([4, 4, 2, 2, 3, 5, -1]), np.array([0, 3, 1, 2, 0, 0, -1])
    assert index.of(sequence, position).tolist() == [0, -1, 4, -1, -1, -1, -1]
    assert TokenIndex({}).of(sequence, position).tolist() == [-1] * 7


# ---- the store -------------------------------------------------------------------------------------------------------


def store(num_tokens: int = 100, device: torch.device = CPU) -> FeatureStore:
    features = FeatureStore(L, E, H, device=device, h_dtype=torch.bfloat16)
    features.begin(num_tokens)
    return features


def inputs(tokens_T: IntArray, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router inputs and logits that tell token and layer; padding would be noticed."""
    token = torch.from_numpy(tokens_T).float()
    return ((token + layer) / 1024)[:, None].repeat(1, H), (token - layer)[:, None].repeat(1, E)


def write(features: FeatureStore, tokens_T: IntArray) -> None:
    where = features.locate(tokens_T, CPU)
    for layer in range(L):
        h, p = inputs(tokens_T, layer)
        features.write(layer, where, h[where.rows], p[where.rows])


def check(features: FeatureStore, tokens_T: IntArray, expected: list[int]) -> None:
    """The rows found are those of `expected` tokens, with their features."""
    where = features.locate(tokens_T, CPU)
    assert sorted(tokens_T[where.rows.numpy()].tolist()) == expected
    assert where.count == len(expected)
    for layer in range(L) if expected else ():
        h, p = features.read(layer, where, CPU)
        h_new, p_new = inputs(tokens_T[where.rows.numpy()], layer)
        assert (h.dtype, p.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(h, h_new.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(p, p_new, rtol=0, atol=0)


def test_features_are_found_by_token_in_any_order_and_segment() -> None:
    features = store()
    features.add(np.array([3, 7, 9]))
    write(features, np.array([9, -1, 3, 4, 7]))
    features.add(np.array([1, 5]))
    write(features, np.array([5, 1]))
    assert features.nbytes == 5 * BYTES
    for order in ([1, 3, 5, 7, 9], [9, 8, 7, -1, 6, 5, 4, 3, 2, 1, 0], [5, 9]):
        tokens = np.array(order)
        check(features, tokens, sorted(set(order) & {1, 3, 5, 7, 9}))
    assert features.holds(np.array([-1, 0, 1, 9])).tolist() == [False, False, True, True]


def test_the_last_segment_can_be_forgotten() -> None:
    features = store()
    features.add(np.array([2]))
    write(features, np.array([2]))
    features.add(np.array([4]))
    features.remove_last()
    check(features, np.arange(10), [2])
    assert (features.nbytes, features.peak_bytes) == (BYTES, 2 * BYTES)


def test_a_new_rollout_forgets_the_last_one() -> None:
    features = store()
    features.add(np.array([1]))
    features.begin(3)
    assert features.nbytes == features.peak_bytes == 0
    check(features, np.arange(3), [])


def test_copies_from_another_device_are_filed_once_they_have_arrived(
    host_platform: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is filed while a copy is in flight, and the whole pass waits once."""
    features = store()
    segment = features.add(np.array([1, 3]))
    waits = []
    monkeypatch.setattr(torch.cuda, "current_stream", type("Stream", (), {"synchronize": lambda self: waits.append(1)}))

    class Elsewhere:
        """A tensor that says it is on a GPU."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor, self.device = tensor, torch.device("cuda")

        def __getitem__(self, share: slice) -> torch.Tensor:
            return self.tensor[share]

    tokens = np.arange(5)
    where = features.locate(tokens, CPU)
    for layer in range(L):
        h, p = inputs(tokens, layer)
        features.write(layer, where, Elsewhere(h[where.rows]), Elsewhere(p[where.rows]))
    assert not segment.h_LSH.any()
    assert not waits
    features.settle()
    features.settle()
    assert len(waits) == 1
    check(features, tokens, [1, 3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_reach_host_memory_behind_a_busy_device() -> None:
    features = FeatureStore(1, E, 4096, device=CPU, h_dtype=torch.bfloat16)
    features.begin(4096)
    features.add(np.arange(4096))
    where = features.locate(np.arange(4096), torch.device("cuda"))
    busy = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy / 100
    h, p = torch.ones(4096, 4096, device="cuda"), torch.ones(4096, E, device="cuda")
    features.write(0, where, h + busy[:4096, :4096] * 0, p)
    features.settle()
    h_old, p_old = features.read(0, where, torch.device("cuda"))
    assert (h_old == 1).all()
    assert (p_old == 1).all()


# ---- the plan --------------------------------------------------------------------------------------------------------

LENGTHS = {0: 4, 1: 5, 2: 3, 3: 1}


def stage(me: int = 0, cp: int = 1, tp: int = 1) -> RankGroup:
    members = tuple(Member(c, t, (0, 1), (c, t) == (0, 0)) for c in range(cp) for t in range(tp))
    return RankGroup(None, members, me, cp, tp)


def plan(group: RankGroup, tokens: int, lengths: dict[int, int] = LENGTHS) -> tuple[FeaturePlan, FeatureStore]:
    """A plan with room for so many tokens; every token is sampled."""
    features = store(0)
    made = FeaturePlan(features, group, budget_bytes=tokens * BYTES, most_layers=L, device=CPU)
    index = TokenIndex(lengths)
    made.begin(index, np.ones(index.total, dtype=bool))
    return made, features


def whole(lengths: dict[int, int], multiple: int = 1) -> TokenGrid:
    return packed(list(lengths), list(lengths.values()), [-(-n // multiple) * multiple for n in lengths.values()])


@given(st.lists(st.integers(0, 2**62), unique=True, max_size=40))
def test_a_spread_order_is_an_order(ids: list[int]) -> None:
    order = spread_order(ids).tolist()
    assert sorted(order) == list(range(len(ids)))
    # A function of the ids alone, however they are told.
    assert [ids[i] for i in order] == [sorted(ids)[i] for i in spread_order(sorted(ids)).tolist()]


@pytest.mark.parametrize("count", [16, 64, 500])
def test_the_first_of_a_spread_order_are_of_everywhere(count: int) -> None:
    """Of a quarter of the room each of four mini-steps gets its share, within one sequence or two."""
    first = spread_order(range(count))[: count // 4]
    shares = np.bincount(first * 4 // count, minlength=4)
    assert abs(shares - count / 16).max() <= 1.5


def test_budget_drops_whole_sequences_and_counts_them() -> None:
    made, features = plan(stage(), tokens=10)
    made.make_room([whole(LENGTHS)])
    assert spread_order(list(LENGTHS)).tolist() == [0, 2, 1, 3]
    assert made.sampled_tokens == 4 + 3 + 1  # the second, asked as the third, does not fit; the fourth does
    assert made.dropped_sequences == 1
    assert features.nbytes == 8 * BYTES
    assert features.segments[0].tokens.tolist() == [*range(4), *range(9, 13)]
    assert made.absent(np.arange(13)) == 0  # a dropped sequence is not sampled any more


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_budget(tokens: int) -> None:
    made, features = plan(stage(), tokens, {0: 3})
    made.make_room([whole({0: 3})])
    assert (made.sampled_tokens, made.dropped_sequences, features.nbytes) == (0, 1, 0)


def test_passes_add_up_to_one_budget() -> None:
    """A trainer may compute log-probs mini-batch by mini-batch, and repeat one."""
    made, features = plan(stage(), tokens=8)
    made.make_room([whole({0: 4})])
    made.make_room([whole({0: 4})])
    made.make_room([whole({1: 5}), whole({2: 3})])
    assert (made.sampled_tokens, made.dropped_sequences) == (4 + 3, 1)
    assert features.nbytes == 7 * BYTES


def test_a_failed_pass_leaves_nothing() -> None:
    made, features = plan(stage(), tokens=100)
    made.make_room([whole({0: 4})])
    made.forget_last()
    assert features.nbytes == 0
    assert made.absent(np.arange(4)) == 4
    made.make_room([whole({0: 4})])
    assert made.sampled_tokens == 4


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 2)]), st.integers(0, 60)
)
def test_ranks_agree_on_who_keeps_what(lengths: list[int], size: tuple[int, int], budget: int) -> None:
    cp, tp = size
    sequences = dict(enumerate(lengths))
    grids = [whole({i: n}, 2 * cp * tp) for i, n in sequences.items()]
    held, dropped = [], set()
    for me in range(cp * tp):
        made, features = plan(stage(me, cp, tp), budget, sequences)
        made.make_room(grids)
        held += features.segments[0].tokens.tolist()
        dropped.add(made.dropped_sequences)
        assert features.nbytes <= budget * BYTES
    index = TokenIndex(sequences)
    assert len(dropped) == 1
    assert len(held) == len(set(held))
    kept = set(index.sequence_of(np.array(held, dtype=np.int64)).tolist())
    assert sorted(held) == [t for i in sorted(kept) for t in range(index.span(i).start, index.span(i).stop)]
    assert len(sequences) - len(kept) == dropped.pop()


def moving_job(cp: int, tp: int) -> tuple[int, int, list[bool]]:
    """The log-prob pass sees sequences one by one, the training pass all in one row and in another order."""
    import torch.distributed as dist

    from megatron_pr2 import host

    host.init(context=cp, tensor=tp)
    lengths = {0: 7, 1: 12, 2: 5, 3: 21}
    multiple = 2 * cp * tp
    group = RankGroup(dist.group.WORLD, stage(0, cp, tp).members, dist.get_rank(), cp, tp)
    made, features = plan(group, 10**6, lengths)
    index = TokenIndex(lengths)
    first = [whole({i: n}, multiple) for i, n in lengths.items()]
    second = [whole(dict(reversed(lengths.items())), multiple)]
    made.make_room(first)
    for grid in first:
        write(features, index.of_grid(group.rows(grid)))
    before = features.nbytes
    brought = [made.bring(first), made.bring(second)]
    rows = index.of_grid(group.rows(second[0]))
    check(features, rows, sorted(rows[rows >= 0].tolist()))
    moved = made.moved_tokens
    features.remove_last()
    absent = int((~features.holds(rows[rows >= 0])).sum())
    assert features.nbytes == before
    assert features.peak_bytes > before
    # Log-probs once more, under the other cut: nothing is kept twice, and training under it still fetches.
    made.make_room(second)
    assert features.nbytes == before
    brought.append(made.bring(second))
    check(features, rows, sorted(rows[rows >= 0].tolist()))
    return moved, absent, brought


@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (2, 2)])
def test_features_follow_tokens_to_another_rank(cp: int, tp: int) -> None:
    """Sequence parallelism cuts the row of all sequences, so that tokens move; those, and only those, are sent."""
    results = pool(cp * tp).run(moving_job, cp, tp)
    for moved, absent, brought in results:
        assert moved == absent
        assert brought == [False, True, True]
    assert sum(moved for moved, *_ in results) > 10


def test_padding_has_no_features() -> None:
    made, features = plan(stage(), 100, {0: 3})
    grid = padded([0], [3], 6)
    made.make_room([grid])
    tokens = TokenIndex({0: 3}).of_grid(grid)
    assert features.locate(tokens, CPU).rows.tolist() == [0, 1, 2]
