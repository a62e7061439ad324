"""Responses of several turns with the embedded engine: what an environment writes is marked, routed like any token, and learned by
neither the policy nor the predictor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.sequences import ReplaySequence, sampled_tokens
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.loop import SMALL, digest
from tests.helpers.rounding import LOGPROB

pytestmark = pytest.mark.usefixtures("host_platform")

STOPS = tuple(range(88))  # a third of the vocabulary: a random policy ends a turn every few tokens
LONGEST = 12
MAX_TURNS = 4


class Parrot:
    """Replies the last token and the number of its reply, one to three times; says nothing to what makes it tired."""

    stop_token_ids = STOPS

    def __init__(self) -> None:
        self.replies: list[tuple[int, tuple[int, ...]]] = []

    def reply(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> tuple[int, ...] | None:
        if response_ids[-1] % 4 == 0:
            return None
        told = (response_ids[-1], 200 + len(self.replies)) * (1 + len(self.replies) % 3)
        self.replies.append((len(response_ids), told))
        return told


def requests() -> list[Any]:
    from megatron_pr2.rollout.base import RolloutRequest

    return [RolloutRequest(tuple(range(100 + 3 * i, 104 + 4 * i)), seed=i, environment=Parrot()) for i in range(12)]


def sampling() -> Any:
    from megatron_pr2.rollout.base import SamplingParams

    return SamplingParams(LONGEST, temperature=0.8, stop_token_ids=STOPS, max_turns=MAX_TURNS)


# ---- what the engine returns ---------------------------------------------------------------------------------------------


def engine_job(path: Path) -> list[dict[str, Any]]:
    """Generates under merged gates with random W_p; compares each response with one forward of the finished sequence."""
    import torch.distributed as dist

    from megatron_pr2 import host
    from megatron_pr2.attach import attach
    from megatron_pr2.hf.bridge import load_model
    from megatron_pr2.rollout.collective import share
    from megatron_pr2.rollout.embedded import MegatronEngine

    host.init(expert=2)
    _, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    model = chunks[0].eval()
    pr2 = attach(model, toy.preset("pr2"))
    w_LEH = pr2.predictor.weight_LEH
    w_LEH.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    engine = MegatronEngine(model, pr2, pad_id=258)
    engine.update_weights([], 7)
    asked = requests()
    out = []
    responses = engine.generate(asked, sampling(), return_routes=True).responses
    own = asked[share(len(asked), dist.get_world_size(), dist.get_rank())]
    for request, response in zip(own, responses, strict=True):
        tokens = torch.tensor([response.token_ids])
        with toy.observed(model) as calls, torch.no_grad(), pr2.merged_gates():
            logits = model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None)[0, :-1].float() / 0.8
        routes = {"engine": [], "q_hat": [], "p": []}  # type: dict[str, list[Any]]
        for call in calls:
            h_TH = call.hidden_TH[:-1]
            p_TE = h_TH @ pr2.sites[call.layer].router.weight.t()
            routes["engine"].append(np.sort(response.routes.experts[:-1, call.layer], 1).tolist())
            routes["q_hat"].append((p_TE + h_TH @ w_LEH[call.layer].t()).topk(2).indices.sort(1).values.tolist())
            routes["p"].append(p_TE.topk(2).indices.sort(1).values.tolist())
        logprobs = torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None])[len(response.prompt_ids) - 1 :, 0]
        out.append(
            {
                "routes": routes,
                "valid": response.routes.valid.tolist(),
                "expected logprobs": logprobs.numpy(),
                "response": response,
                "request": request,
            }
        )
    return out


@pytest.fixture(scope="module")
def told(tiny_checkpoint: Path) -> list[dict[str, Any]]:
    return [entry for result in pool(2).run(engine_job, tiny_checkpoint) for entry in result]


def test_the_rollout_is_not_trivial(told: list[dict[str, Any]]) -> None:
    turns = [entry["response"].turns for entry in told]
    assert set(turns) == set(range(1, MAX_TURNS + 1))
    assert {entry["response"].finish_reason for entry in told} == {"stop", "length"}


def test_masks_are_off_where_the_environment_wrote_and_nowhere_else(told: list[dict[str, Any]]) -> None:
    for entry in told:
        response, replies = entry["response"], entry["request"].environment.replies
        expected = np.ones(len(response.response_ids), dtype=bool)
        # A reply that finds no room is left out: then it is the last one.
        heard = replies[: response.turns - 1]
        assert len(replies) - len(heard) in (0, 1)
        for at, reply in heard:
            assert response.response_ids[at : at + len(reply)] == reply
            expected[at : at + len(reply)] = False
        assert response.loss_mask.tolist() == expected.tolist()
        assert expected[-1], "a response ends with a token of the policy"
        assert expected.sum() <= LONGEST
        assert response.weight_versions.tolist() == np.where(expected, 7, -1).tolist()
        for index in np.flatnonzero(expected[:-1] & ~expected[1:]):
            assert response.response_ids[index] in STOPS


def test_logprobs_are_those_of_the_finished_sequence(told: list[dict[str, Any]]) -> None:
    for entry in told:
        response = entry["response"]
        expected = np.where(response.loss_mask, entry["expected logprobs"], 0.0)
        np.testing.assert_allclose(response.logprobs, expected, rtol=0, atol=LOGPROB)


def test_routes_are_those_of_the_finished_sequence_replies_included(told: list[dict[str, Any]]) -> None:
    for entry in told:
        assert entry["valid"] == [True] * (len(entry["response"].token_ids) - 1) + [False]
        assert entry["routes"]["engine"] == entry["routes"]["q_hat"]
    assert any(entry["routes"]["q_hat"] != entry["routes"]["p"] for entry in told)


# ---- what is learned from it ---------------------------------------------------------------------------------------------


@contextmanager
def advantages_at(chosen: Any, value: float) -> Iterator[None]:
    """Overwrites the advantages of the positions that `chosen` picks of (mask, positions of responses) in every micro-batch."""
    from megatron_pr2.rl import actor

    cut = actor.micro_batches

    def tampered(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        items = cut(*args, **kwargs)
        for item in items:
            item["advantages"][chosen(item["mask"] > 0, item["advantages"] != 0)] = value
        return items

    with mock.patch.object(actor, "micro_batches", tampered):
        yield


def update_job(path: Path, run: Path) -> dict[str, Any]:
    """Two mini-steps on responses of several turns; the same with old log-probs and advantages tampered with."""
    from megatron_pr2 import host
    from megatron_pr2.rl.actor import Actor
    from megatron_pr2.rl.batch import Sample, micro_batches
    from megatron_pr2.rl.config import load_config
    from megatron_pr2.rollout.embedded import MegatronEngine

    host.init(expert=2)
    settings = ["rollout.temperature=0.8", "algorithm.micro_batch_size=2", "pr2.alpha=3", "pr2.hold_back=false"]
    config = load_config(None, [*SMALL, f"run={run}", *settings])
    out: dict[str, Any] = {}
    for name in ("plain", "old masked", "advantages masked", "old own", "advantages own"):
        actor = Actor(config, path, 258)
        engine = MegatronEngine(actor.model, actor.pr2, pad_id=258)
        responses = engine.generate(requests(), sampling(), return_routes=True).responses
        samples = [Sample(i, response, 0.0, (-1.0) ** i) for i, response in enumerate(responses)]
        actor.pr2.begin_rollout([sample.replay_sequence() for sample in samples])
        actor.old_logprobs(samples)
        for sample in samples:
            mask = sample.response.loss_mask
            if name == "old masked":
                sample.old_logprobs[~mask] = -20.0
            elif name == "old own":
                sample.old_logprobs[np.flatnonzero(mask)[:1]] -= 0.1
        positions = {"advantages masked": lambda own, all_: all_ & ~own, "advantages own": lambda own, all_: own}
        with advantages_at(positions.get(name, lambda own, all_: torch.zeros_like(own)), 5.0):
            reports = [actor.update(samples, step) for step in (1, 2)]
        losses = [report["loss"] for report in reports]
        weights = [chunk.state_dict() for chunk in actor.chunks]
        out[name] = digest([losses, weights, actor.pr2.predictor.weight_LEH])
        if name == "plain":
            (item,) = micro_batches(samples, len(samples), 258)
            held = np.concatenate([segment.tokens for segment in actor.pr2.features.segments])
            out["own"] = [int(s.response.loss_mask.sum()) for s in samples]
            out["labels"] = [item["labels"][row][item["mask"][row] > 0].tolist() for row in range(len(samples))]
            out["said"] = [np.array(s.response.response_ids)[s.response.loss_mask].tolist() for s in samples]
            out["sampled"] = np.flatnonzero(actor.pr2.feature_plan.sampled).tolist()
            out["held"] = sorted(held.tolist())
            out["learned from"] = reports[1]["predictor"]["tokens"]
            starts = np.cumsum([0, *(s.length for s in samples)])
            out["bear loss"] = [
                int(start) + s.loss_span[0] + int(at)
                for start, s in zip(starts, samples, strict=False)
                for at in np.flatnonzero(s.response.loss_mask)
            ]
    return out


@pytest.fixture(scope="module")
def updates(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return pool(2).run(update_job, tiny_checkpoint, tmp_path_factory.mktemp("update"))


def test_masked_positions_change_no_weight(updates: list[dict[str, Any]]) -> None:
    """Bit for bit: policy, predictor and reported losses; positions that bear loss do change them."""
    for rank in updates:
        assert rank["plain"] == rank["old masked"] == rank["advantages masked"]
        assert len({rank["plain"], rank["old own"], rank["advantages own"]}) == 3


def test_what_bears_loss_is_what_the_policy_said(updates: list[dict[str, Any]]) -> None:
    for rank in updates:
        assert rank["labels"] == rank["said"]


def test_features_are_those_of_the_policys_tokens_only(updates: list[dict[str, Any]]) -> None:
    """sample_fraction=1: all tokens that bear loss, the inputs that they were sampled behind, and no others."""
    for rank in updates:
        assert rank["sampled"] == rank["held"] == rank["bear loss"]
        assert len(rank["held"]) == sum(rank["own"])
    layers = 2
    assert updates[0]["learned from"] == layers * sum(sum(rank["own"]) for rank in updates)


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_only_unmasked_positions_are_sampled(fraction: float) -> None:
    rng = np.random.default_rng(0)
    sequences = [
        ReplaySequence(i, length, start, length - 1, loss_mask=rng.random(length - 1 - start) < 0.5)
        for i, (length, start) in enumerate([(40, 3), (25, 10), (9, 0), (30, 28)])
    ]
    sequences.append(ReplaySequence(9, 20, 5, 19, loss_mask=np.zeros(14, dtype=bool)))
    tokens = TokenIndex({s.id: s.length for s in sequences})
    valid = rng.random(tokens.total) < 0.9
    allowed = np.zeros(tokens.total, dtype=bool)
    for sequence in sequences:
        first = tokens.span(sequence.id).start + sequence.loss_start
        allowed[first : first + sequence.loss_stop - sequence.loss_start] = sequence.loss_mask
    sampled = sampled_tokens(sequences, tokens, valid, 0, fraction)
    assert not (sampled & ~(allowed & valid)).any()
    assert sampled.any()
    if fraction == 1.0:
        assert (sampled == (allowed & valid)).all()
