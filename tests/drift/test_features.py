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
from megatron_pr2.parallel.tokens import TokenIndex, fitting_share, sample_positions
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


@given(st.lists(st.lists(st.floats(0, 0.999), max_size=20, unique=True), min_size=1, max_size=4), st.integers(0, 25))
def test_the_largest_share_that_fits(keys: list[list[float]], room: int) -> None:
    arrays = [np.array(each) for each in keys]
    share = fitting_share(arrays, [room] * len(keys))
    counts = [int((each < share).sum()) for each in arrays]
    assert max(counts) <= room
    assert share == 1.0 or room in counts


def test_a_budget_lowers_the_share_of_every_sequence() -> None:
    """No sequence is left out for want of room: a mini-step of its own would not be measured."""
    lengths = {7 * i: 100 for i in range(20)}
    made, features = plan(stage(), tokens=500, lengths=lengths)
    made.make_room([whole(lengths)])
    assert (made.sampled_tokens, features.nbytes) == (500, 500 * BYTES)
    assert made.share == pytest.approx(0.25, abs=0.04)
    of_sequence = np.bincount(TokenIndex(lengths).sequence_of(features.segments[0].tokens), minlength=20)
    assert of_sequence.min() > 5  # 25 on average
    assert made.absent(np.arange(2000)) == 0  # what there is no room for is not sampled any more


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_budget_of_next_to_nothing(tokens: int) -> None:
    made, features = plan(stage(), tokens, {0: 3})
    made.make_room([whole({0: 3})])
    assert (made.sampled_tokens, features.nbytes) == (tokens, tokens * BYTES)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 40))
def test_passes_share_one_budget(sizes: list[int], budget: int) -> None:
    """A trainer may compute log-probs mini-batch by mini-batch, and repeat one: each part gets its share of the budget."""
    sequences = dict(enumerate([9, 4, 11, 1, 6, 8, 5, 3, 2, 12, 7, 10, 9, 2, 5][: sum(sizes)]))
    made, features = plan(stage(), budget, sequences)
    todo, total = dict(sequences), sum(sequences.values())
    for size in sizes:
        part = {i: todo.pop(i) for i in list(todo)[:size]}
        before = made.sampled_tokens
        made.make_room([whole(part)])
        # Within the rounding of one token per pass before it.
        assert made.sampled_tokens - before >= min(1.0, budget / total) * sum(part.values()) - len(sizes)
        made.make_room([whole(part)])
        assert features.nbytes <= budget * BYTES
    assert budget < total or (made.sampled_tokens, made.share) == (total, 1.0)


def test_a_failed_pass_leaves_nothing() -> None:
    made, features = plan(stage(), tokens=100)
    made.make_room([whole({0: 4})])
    made.forget_last()
    assert features.nbytes == 0
    assert made.absent(np.arange(4)) == 4
    made.make_room([whole({0: 4})])
    assert made.sampled_tokens == 4


def test_a_pass_is_thinned_alike_when_it_is_repeated() -> None:
    made, features = plan(stage(), tokens=6)
    made.make_room([whole({0: 4, 2: 3})])
    kept = features.segments[0].tokens.tolist()
    made.forget_last()
    assert made.absent(np.arange(13)) == 13
    made.make_room([whole({0: 4, 2: 3})])
    assert 0 < made.sampled_tokens == len(kept) < 7
    assert features.segments[0].tokens.tolist() == kept


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6), st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 2)]), st.integers(0, 60)
)
def test_ranks_agree_on_who_keeps_what(lengths: list[int], size: tuple[int, int], budget: int) -> None:
    cp, tp = size
    sequences = dict(enumerate(lengths))
    grids = [whole({i: n}, 2 * cp * tp) for i, n in sequences.items()]
    held, loads, shares = [], [], set()
    for me in range(cp * tp):
        made, features = plan(stage(me, cp, tp), budget, sequences)
        made.make_room(grids)
        held += features.segments[0].tokens.tolist()
        loads.append(made.sampled_tokens)
        shares.add((made.share, made.sampled.tobytes()))
        assert features.nbytes <= budget * BYTES
    assert len(shares) == 1
    assert len(held) == len(set(held))
    assert sorted(held) == np.nonzero(made.sampled)[0].tolist()
    assert made.share == 1.0 or max(loads) == budget


def share_job(lengths: dict[int, int]) -> tuple[float, list[int]]:
    """A rank that holds other sequences than the others, with room for 20 tokens."""
    import torch.distributed as dist

    features = store(0)
    made = FeaturePlan(
        features, stage(), budget_bytes=20 * BYTES, most_layers=L, device=CPU, seed=3, token_group=dist.group.WORLD
    )
    mine = dict(list(lengths.items())[dist.get_rank() :: 2])
    index = TokenIndex(mine)
    made.begin(index, np.ones(index.total, dtype=bool))
    made.make_room([whole(mine)])
    tokens = features.segments[0].tokens
    return made.share, np.bincount(index.sequence_of(tokens), minlength=len(mine)).tolist()


def test_all_ranks_keep_the_share_of_the_fullest() -> None:
    """Or a rank with short sequences would weigh more in what is learned and measured."""
    (share, full), (other, spare) = pool(2).run(share_job, {0: 40, 1: 20, 2: 40, 3: 10})
    assert share == other < 0.5
    assert sum(full) == 20
    assert 0 < sum(spare) < 20  # of 30


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
