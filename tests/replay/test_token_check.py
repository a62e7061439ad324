# ruff: noqa: PT012 (what fails is a whole pass inside of a session)
"""Whether the model runs the tokens whose routes are replayed: seen from the ids, under every cut of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron_pr2.attach import PR2, attach
from megatron_pr2.errors import AttachError, ReplayError, RouteError
from megatron_pr2.parallel.grid import TokenGrid, context_parallel
from megatron_pr2.parallel.replica import Member, RankGroup
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.sequences import ReplaySequence, sampled_tokens
from megatron_pr2.replay.token_check import TokenCheck
from tests.helpers import toy
from tests.helpers.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {0: 7, 1: 7, 2: 5, 3: 5}
CPU = torch.device("cpu")


def token_id(sequence: int, position: int) -> int:
    return 1000 * sequence + position + 1


def ids_of(grid: TokenGrid) -> Tensor:
    """The model's input [B, S] for a grid: every token has an id of its own, padding 0."""
    ids = np.where(grid.sequence >= 0, 1000 * grid.sequence + grid.position + 1, 0)
    return torch.from_numpy(ids).t().contiguous()


def check(cp_size: int, cp_rank: int, lengths: dict[int, int], known: Sequence[int]) -> TokenCheck:
    ranks = RankGroup(None, (Member(cp_rank, 0, (0,), True),), 0, cp_size, 1)
    found = TokenCheck(ranks, [nn.Identity()], CPU)
    sequences = [
        ReplaySequence(s, n, 0, n - 1, token_ids=[token_id(s, p) for p in range(n)] if s in known else None)
        for s, n in lengths.items()
    ]
    found.begin(TokenIndex(lengths), sequences)
    return found


@given(st.data())
def test_every_wrong_token_is_counted_and_no_other(data: st.DataObject) -> None:
    lengths = dict(enumerate(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))))
    cp_size = data.draw(st.sampled_from([1, 2, 3]))
    cp_rank = data.draw(st.integers(0, cp_size - 1))
    known = data.draw(st.lists(st.sampled_from(sorted(lengths)), unique=True))
    up = 2 * cp_size

    def described(packed: bool, slack: int) -> MicroBatch:
        slots = [-(-n // up) * up + slack * up for n in lengths.values()]
        ids, counts = list(lengths), list(lengths.values())
        return MicroBatch.packed(ids, counts, slots) if packed else MicroBatch.padded(ids, counts, max(slots))

    tokens = check(cp_size, cp_rank, lengths, known)
    first, second = described(data.draw(st.booleans()), 0), described(data.draw(st.booleans()), data.draw(st.integers(0, 1)))
    seen = set()
    rows = context_parallel(first.grid, cp_size, cp_rank)
    tokens.open([first])
    tokens.look(nn.Identity(), first, (ids_of(rows),), {})
    seen |= {(int(s), int(p)) for s, p in zip(*(axis[rows.real()[0]] for axis in rows.rows()), strict=True)}
    tokens.require("the first pass")
    # The second pass is cut otherwise, so that this rank may hold tokens that it has not seen.
    rows = context_parallel(second.grid, cp_size, cp_rank)
    inputs = ids_of(rows)
    wrong = 0
    for row, sequence, position in zip(*rows.real(), strict=True):
        if data.draw(st.integers(0, 9)) == 0:
            inputs[row % rows.sequence.shape[1], row // rows.sequence.shape[1]] += 7
            wrong += int(sequence) in known or (int(sequence), int(position)) in seen
    padding = ids_of(rows) == 0
    inputs[padding] = data.draw(st.integers(0, 5))  # padding is not looked at
    tokens.open([second])
    tokens.look(nn.Identity(), second, (), {"input_ids": inputs})
    if not wrong:
        tokens.require("the second pass")
        return
    with pytest.raises(ReplayError, match=rf"the second pass: {wrong} of the tokens.*do not apply this update"):
        tokens.require("the second pass")
    tokens.open([])
    tokens.require("nothing is left of it")


class TokenChunk(nn.Module):
    """A toy that is called as a GPTModel is: token ids in, [S, B, H] out."""

    def __init__(self) -> None:
        super().__init__()
        inner = toy.ToyChunk(toy.toy_config())
        self.config, self.decoder, self.inner = inner.config, inner.decoder, [inner]
        self.table = torch.randn(4000, toy.HIDDEN, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None) -> Tensor:
        return self.inner[0](self.table[input_ids.t()].contiguous())


def prepared(given: bool) -> tuple[TokenChunk, PR2, list[MicroBatch]]:
    chunk = TokenChunk()
    pr2 = attach(chunk, toy.preset("r3"))
    tables = toy.random_tables(LENGTHS, chunk.config)
    pr2.begin_rollout(
        [
            ReplaySequence(i, n, 2, n - 1, tables[i], token_ids=np.array([token_id(i, p) for p in range(n)]) if given else None)
            for i, n in LENGTHS.items()
        ]
    )
    return chunk, pr2, [MicroBatch.padded([i, i + 1], [LENGTHS[i]] * 2, 8) for i in (0, 2)]


def run(chunk: TokenChunk, micro_batches: Sequence[MicroBatch]) -> None:
    for micro_batch in micro_batches:
        chunk(ids_of(micro_batch.grid)).sum().backward()


@pytest.mark.parametrize("announced", [False, True])
def test_a_micro_batch_in_the_place_of_another_is_refused(announced: bool) -> None:
    """Equal shapes, the right number of forwards: only the tokens tell."""
    chunk, pr2, micro_batches = prepared(False)
    with pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches)
    with pr2.actor_update(micro_batches, 1):
        run(chunk, micro_batches)
    with pytest.raises(ReplayError, match="mini-step 2: 24 of the tokens"), pr2.actor_update(micro_batches, 2) as session:
        for told, ran in zip(micro_batches, reversed(micro_batches), strict=True):
            if announced:
                session.begin(chunk, told)
            output = chunk(ids_of(ran.grid))
            if announced:
                session.end(chunk, told, output)
    with pytest.raises(ReplayError, match="replay: 24 of the tokens"), pr2.replay(micro_batches):
        run(chunk, micro_batches[::-1])
    # A pass that is not of the rollout batch has other tokens under the same numbers.
    with pr2.record(micro_batches):
        run(chunk, micro_batches[::-1])
    with pr2.actor_update(micro_batches, 2):
        run(chunk, micro_batches)


def test_ids_that_came_with_the_rollout_check_the_first_pass() -> None:
    chunk, pr2, micro_batches = prepared(True)
    grids = [TokenGrid(np.roll(mb.grid.sequence, 1, 0), np.roll(mb.grid.position, 1, 0)) for mb in micro_batches]
    shifted = [MicroBatch(index, grid) for index, grid in enumerate(grids)]
    with pytest.raises(ReplayError, match=r"old_logprobs: 24 of the tokens"), pr2.old_logprobs(shifted):
        run(chunk, micro_batches)
    with pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches)


@pytest.mark.parametrize("given", [False, True])
def test_a_pass_that_failed_leaves_nothing_behind(given: bool) -> None:
    """What it ran is not what later passes are compared with."""
    chunk, pr2, micro_batches = prepared(given)
    with pytest.raises(ZeroDivisionError), pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches[::-1])
        raise ZeroDivisionError
    with pytest.raises(ReplayError, match="routed 0 times"), pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches[1:])
    with pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches)
    with pytest.raises(ReplayError, match="replay: 24 of the tokens"), pr2.replay(micro_batches):
        run(chunk, micro_batches[::-1])


def test_a_pass_that_another_rank_refused_leaves_nothing_behind() -> None:
    own, others = pool(2).run(refused_elsewhere_job, timeout=60.0)
    assert own == others == "accepted"


def refused_elsewhere_job() -> str:
    """Both ranks run the wrong tokens, only rank 0 knows: rank 1 hears of it and must not learn them."""
    from megatron_pr2 import host

    host.init()
    chunk, pr2, micro_batches = prepared(torch.distributed.get_rank() == 0)
    with pytest.raises(ReplayError), pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches[::-1])
    with pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches)
    return "accepted"


def test_ids_beside_an_embedding_of_the_pipeline_are_not_looked_at() -> None:
    """`decoder_input` takes the place of the embedding; what goes with it under input_ids is not looked at."""
    micro_batch = MicroBatch.padded([0], [5], 8)
    tokens = check(1, 0, {0: 5}, [0])
    tokens.open([micro_batch])
    dummy = torch.zeros_like(ids_of(micro_batch.grid))
    tokens.look(nn.Identity(), micro_batch, (), {"input_ids": dummy, "decoder_input": torch.zeros(8, 1, 4)})
    tokens.require("embedded elsewhere")
    tokens.look(nn.Identity(), micro_batch, (), {"input_ids": dummy, "decoder_input": None})
    with pytest.raises(ReplayError, match="5 of the tokens"):
        tokens.require("embedded here")


def test_a_new_rollout_batch_has_its_own_tokens() -> None:
    chunk, pr2, micro_batches = prepared(True)
    tables = toy.random_tables(LENGTHS, chunk.config)
    pr2.begin_rollout([ReplaySequence(i, n, 2, n - 1, tables[i]) for i, n in LENGTHS.items()])
    with pr2.old_logprobs(micro_batches):
        for micro_batch in micro_batches:
            chunk(ids_of(micro_batch.grid) + 1)


def test_ids_of_another_length_are_refused() -> None:
    _, pr2, _ = prepared(False)
    for ids, message in (
        ([1, 2, 3], r"sequence 4: token_ids are int64 \[3\], expected 5 integers"),
        ([1.0] * 5, r"sequence 4: token_ids are float64 \[5\], expected 5 integers"),
        ([1, 2, 3, 4, 2**31], r"sequence 4: token_ids from 1 to 2147483648; expected ids in \[0, 2\^31\)"),
        ([1, 2, 3, 4, -1], "token_ids from -1 to 4"),
    ):
        with pytest.raises(RouteError, match=message):
            pr2.begin_rollout([ReplaySequence(4, 5, 2, 4, token_ids=ids)])
    assert set(pr2.tokens.lengths) == set(LENGTHS)  # the current batch is whole


# ---- several ranks -------------------------------------------------------------------------------------------------------


def refusal_job(kind: str) -> list[str]:
    """What each of two data-parallel ranks raises when rank 0 alone does something wrong, in both kinds of passes."""
    from megatron_pr2 import host

    host.init()
    first = torch.distributed.get_rank() == 0
    chunk, pr2, micro_batches = prepared(True)
    heard = []
    for mini_step in (None, 1):
        order = {"swapped": micro_batches[::-1], "left out": micro_batches[:1]}[kind] if first else micro_batches
        opened = pr2.old_logprobs(micro_batches) if mini_step is None else pr2.actor_update(micro_batches, mini_step)
        try:
            with opened:
                run(chunk, order)
            heard.append("nothing")
        except ReplayError as error:
            heard.append(str(error))
    with pr2.old_logprobs(micro_batches):  # and both can go on
        run(chunk, micro_batches)
    return heard


@pytest.mark.parametrize(("kind", "message"), [("swapped", "24 of the tokens"), ("left out", "routed 0 times forward")])
def test_all_ranks_hear_of_what_one_refuses(kind: str, message: str) -> None:
    """Else the others would wait in the next collective until it times out, and the reason would be lost."""
    own, others = pool(2).run(refusal_job, kind, timeout=60.0)
    for index, name in enumerate(("old_logprobs", "mini-step 1")):
        assert message in own[index]
        assert others[index].startswith(f"{name}: another rank refused this pass")


def test_a_handle_may_be_detached_twice_and_a_name_is_no_config() -> None:
    chunk, pr2, _ = prepared(False)
    pr2.detach()
    pr2.detach()
    with pytest.raises(AttachError, match=r"PR2Config.preset\('pr2'\)"):
        attach(chunk, "pr2")  # type: ignore[arg-type]
    attach(chunk, toy.preset("r3")).detach()


def test_an_attach_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = TokenChunk()
    routers = {name: type(module) for name, module in chunk.named_modules()}
    monkeypatch.setattr("megatron_pr2.drift.parts.make_predictor", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(chunk, toy.preset("r3"))
    assert {name: type(module) for name, module in chunk.named_modules()} == routers
    monkeypatch.undo()
    attach(chunk, toy.preset("r3")).detach()


def test_micro_batches_may_come_from_a_generator() -> None:
    chunk, pr2, micro_batches = prepared(True)
    with pr2.old_logprobs(iter(micro_batches)):  # type: ignore[arg-type]
        run(chunk, micro_batches)
    with pytest.raises(ReplayError, match="a pass got one MicroBatch"), pr2.replay(micro_batches[0]):  # type: ignore[arg-type]
        pass


def test_inner_stages_may_be_given_anything() -> None:
    chunk, pr2, micro_batches = prepared(True)
    chunk.pre_process = False
    pr2 = (pr2.detach(), attach(chunk, toy.preset("r3")))[1]
    tables = toy.random_tables(LENGTHS, chunk.config)
    ids = {i: [token_id(i, p) for p in range(n)] for i, n in LENGTHS.items()}
    pr2.begin_rollout([ReplaySequence(i, n, 2, n - 1, tables[i], token_ids=ids[i]) for i, n in LENGTHS.items()])
    with pr2.old_logprobs(micro_batches):
        for micro_batch in micro_batches:
            chunk(torch.zeros_like(ids_of(micro_batch.grid)))


def test_a_rollout_may_begin_in_inference_mode() -> None:
    chunk, pr2, micro_batches = prepared(True)
    tables = toy.random_tables(LENGTHS, chunk.config)
    with torch.inference_mode():
        pr2.begin_rollout([ReplaySequence(i, n, 2, n - 1, tables[i]) for i, n in LENGTHS.items()])
    with pr2.old_logprobs(micro_batches):
        run(chunk, micro_batches)


@pytest.mark.parametrize("kind", ["list", "int64", "uint8", "float32", "torch"])
def test_a_loss_mask_of_numbers_is_one_of_booleans(kind: str) -> None:
    """Numbers would index: positions 0 and 1 instead of those that the mask names."""
    _, pr2, _ = prepared(False)
    bits = [0, 0, 1, 0, 1]
    mask = bits if kind == "list" else torch.tensor(bits) if kind == "torch" else np.array(bits, dtype=kind)
    tables = toy.random_tables({0: 8}, pr2.model_config)
    pr2.begin_rollout([ReplaySequence(0, 8, 2, 7, tables[0], loss_mask=mask)])
    positions = np.flatnonzero(sampled_tokens(pr2.sequences, pr2.tokens, None, 0, 1.0))
    assert positions.tolist() == [4, 6]
    with pytest.raises(RouteError, match="sequence 0: loss_mask of int64 has other entries than 0 and 1"):
        pr2.begin_rollout([ReplaySequence(0, 8, 2, 7, tables[0], loss_mask=np.arange(5))])


def test_lists_arrays_and_tensors_describe_the_same_micro_batch() -> None:
    numbers = ([0, 2], [7, 5])
    for make in (list, np.array, torch.tensor):
        ids, lengths = (make(n) for n in numbers)
        padded, packed = MicroBatch.padded(ids, lengths, 8), MicroBatch.packed(ids, lengths, make([8, 8]))
        assert padded.key == packed.key == (0, 2)
        assert padded.grid.fingerprint == MicroBatch.padded(*numbers, 8).grid.fingerprint
        assert packed.grid.fingerprint == MicroBatch.packed(*numbers, [8, 8]).grid.fingerprint
