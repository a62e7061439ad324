"""Real engines: responses that go on under new weights, over turns, and after an early stop; every row is that of its token."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pr2.errors import EnvironmentFailed
from megatron_pr2.rollout.base import Progress, RolloutRequest, RolloutResponse, SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.helpers.rounding import LOGPROB
from tests.sglang.conftest import SHAPE, TinyModel
from tests.sglang.test_engine import assert_matches, make_requests

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.usefixtures("preloaded"),
]


# Long enough for a push to come in the middle, on any machine.
LONG = SamplingParams(360)


def attached(engine: SGLangEngine, tmp_path: Any, **changes: Any) -> SGLangEngine:
    """Another engine on the shared server, with other settings."""
    key = tmp_path / "key"
    key.write_text(engine.replicas[0].api_key or "")
    settings = {"urls": (engine.replicas[0].url,), "api_key_file": str(key), "weight_bucket_bytes": 256 << 10}
    return SGLangEngine(SGLangConfig(**(settings | changes)), SHAPE)


@pytest.fixture(params=["abort", "in_place"])
def interrupted(request: pytest.FixtureRequest, fresh: SGLangEngine, tmp_path: Any) -> Iterator[SGLangEngine]:
    guest = attached(fresh, tmp_path, interrupt=request.param, concurrency=12)
    guest.start()
    yield guest
    guest.close()


def generate_across_a_push(engine: SGLangEngine, requests: list[RolloutRequest], new: dict[str, torch.Tensor], version: int) -> Any:
    """Responses of a generate call in whose middle weights are replaced."""
    out: list[Any] = []
    begun = threading.Event()
    engine.on_progress = lambda progress: begun.set()
    thread = threading.Thread(target=lambda: out.append(engine.generate(requests, LONG, return_routes=True)))
    thread.start()
    fleet = engine._fleet
    assert fleet is not None
    while not fleet.busy:
        time.sleep(0.005)
    time.sleep(0.25)
    engine.update_weights(new.items(), version)
    thread.join()
    (batch,) = out
    return batch


def routes_by_version(response: RolloutResponse, tiny: TinyModel, gates: dict[int, Any]) -> np.ndarray:
    """[T - 1, L, K] sorted ids: row i as computed by the weights that sampled token i + 1; prompt rows as the first token's."""
    first = len(response.prompt_ids)
    versions = np.concatenate([np.full(first - 1, response.weight_versions[0]), response.weight_versions])
    rows = {v: tiny.routes_and_logprobs(list(response.token_ids), gates[v])[0].numpy() for v in set(versions.tolist())}
    return np.stack([rows[v][i] for i, v in enumerate(versions.tolist())])


def test_a_response_goes_on_under_new_weights_and_every_token_knows_its_version(
    interrupted: SGLangEngine, fresh: SGLangEngine, tiny: TinyModel
) -> None:
    gates: dict[int, Any] = {1: None, 21: tiny.merged_gates(seed=21)}
    batch = generate_across_a_push(interrupted, make_requests(8, seed=3), gates[21], 21)
    fresh.replicas[0].labels.append("21")
    mixed = 0
    for response in batch.responses:
        versions = response.weight_versions
        assert (np.diff(versions) >= 0).all()
        assert set(versions.tolist()) <= {1, 21}
        mixed += len(set(versions.tolist())) == 2
        assert response.routes is not None
        assert response.routes.num_missing == 1
        got = np.sort(response.routes.experts[:-1], axis=-1)
        want = routes_by_version(response, tiny, gates)
        # In place, old keys and values stay in the attention of later tokens: only the first layer's input is free of them.
        layers = slice(None) if interrupted.config.interrupt == "abort" else slice(0, 1)
        equal = (got[:, layers] == want[:, layers]).all(axis=(1, 2))
        if interrupted.config.interrupt == "in_place":
            # The overlap scheduler had computed one more token with the old weights, which it labels with the new version.
            boundary = len(response.prompt_ids) - 1 + int(np.argmax(versions == 21))
            late = tiny.routes_and_logprobs(list(response.token_ids))[0].numpy()[boundary, layers]
            equal[boundary] |= (got[boundary, layers] == late).all()
        assert equal.all()
        other = tiny.routes_and_logprobs(list(response.token_ids), gates[21])[0].numpy()[:-1]
        if versions[0] == 1:
            assert (got[: len(response.prompt_ids) - 1, 0] != other[: len(response.prompt_ids) - 1, 0]).any()
    assert mixed == len(batch.responses)
    assert interrupted.weight_version == 21
    assert batch.stats.extra["rerolls"] == 0
    if interrupted.config.interrupt == "abort":
        assert batch.stats.extra["interrupted"] >= 8
        for response in batch.responses:
            for version in (1, 21):
                _, logprobs = tiny.routes_and_logprobs(list(response.token_ids), gates[version])
                mine = response.weight_versions == version
                want = logprobs.numpy()[len(response.prompt_ids) - 1 :]
                np.testing.assert_allclose(response.logprobs[mine], want[mine], atol=LOGPROB)


def test_prefixes_of_old_weights_are_not_used_after_a_push_in_place(fresh: SGLangEngine, tiny: TinyModel, tmp_path: Any) -> None:
    """Nothing can be flushed while requests are paused, so that new requests must not find the old prefixes."""
    guest = attached(fresh, tmp_path, interrupt="in_place")
    guest.start()
    merged = tiny.merged_gates(seed=22)
    requests = make_requests(6, seed=4)
    generate_across_a_push(guest, requests, merged, 22)
    after = guest.generate(requests, SamplingParams(8), return_routes=True)
    assert_matches(after.responses, tiny, merged)
    guest.close()
    fresh.replicas[0].labels.append("22")


def test_rows_that_were_computed_anew_by_a_retraction_are_rolled_again(fresh: SGLangEngine, tiny: TinyModel, tmp_path: Any) -> None:
    guest = attached(fresh, tmp_path, interrupt="in_place")
    guest.start()
    fleet = guest._fleet
    assert fleet is not None
    post = fleet._post

    async def retracting(replica: Any, path: str, payload: dict[str, Any]) -> None:
        await post(replica, path, {"mode": "retract"} if path == "/pause_generation" else payload)

    fleet._post = retracting  # type: ignore[method-assign]
    merged = tiny.merged_gates(seed=23)
    batch = generate_across_a_push(guest, make_requests(4, seed=5), merged, 23)
    assert batch.stats.extra["rerolls"] == 4
    assert all(set(r.weight_versions.tolist()) == {23} for r in batch.responses)
    assert_matches(batch.responses, tiny, merged)
    guest.close()
    fresh.replicas[0].labels.append("23")


class Echo:
    """Replies a few tokens to the first turns and counts what it was asked."""

    def __init__(self, stop: tuple[int, ...], turns: int) -> None:
        self.stop_token_ids = stop
        self.turns = turns
        self.calls = 0

    def reply(self, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> tuple[int, ...] | None:
        assert response_ids[-1] in self.stop_token_ids
        self.calls += 1
        return None if self.calls > self.turns else (200 + self.calls, 210, 220)


def test_turns_are_spliced_and_the_environments_tokens_bear_no_loss(fresh: SGLangEngine, tiny: TinyModel) -> None:
    stops = tuple(range(3, 90))
    requests = [replace(r, environment=Echo(stops, 3)) for r in make_requests(8, seed=6)]
    batch = fresh.generate(requests, SamplingParams(96, stop_token_ids=stops), return_routes=True)
    assert batch.stats.extra["turns"] > 16
    for request, response in zip(requests, batch.responses, strict=True):
        environment = request.environment
        assert isinstance(environment, Echo)
        replies = min(environment.calls, environment.turns)
        assert response.turns == replies + 1
        assert (~response.loss_mask).sum() == 3 * replies
        assert [i for i, own in zip(response.response_ids, response.loss_mask, strict=True) if not own] == [
            token for call in range(1, replies + 1) for token in (200 + call, 210, 220)
        ]
        assert (response.logprobs[~response.loss_mask] == 0).all()
        assert (response.weight_versions[response.loss_mask] == 1).all()
        assert response.routes is not None
        routes, logprobs = tiny.routes_and_logprobs(list(response.token_ids))
        assert response.routes.num_missing == 1
        assert (np.sort(response.routes.experts[:-1], axis=-1) == routes.numpy()[:-1]).all()
        own = response.loss_mask
        np.testing.assert_allclose(response.logprobs[own], logprobs.numpy()[len(response.prompt_ids) - 1 :][own], atol=LOGPROB)


def test_an_early_stop_carries_the_rest_over_and_changes_no_response(fresh: SGLangEngine, tiny: TinyModel) -> None:
    lengths = SamplingParams(200, stop_token_ids=(7, 8, 9))
    requests = [replace(r, key=str(i), group=i // 2) for i, r in enumerate(make_requests(24, seed=7))]
    whole = fresh.generate([replace(r, key="") for r in requests], lengths, return_routes=True)
    seen: list[Progress] = []
    fresh.on_progress = seen.append
    first = fresh.generate(requests, lengths, return_routes=True, enough=5)
    fresh.on_progress = None
    assert len(first.finished) == len(first.responses) == 10
    assert len({requests[i].group for i in first.finished}) == 5
    rest = [i for i in range(24) if i not in first.finished]
    second = fresh.generate([requests[i] for i in rest], lengths, return_routes=True)
    assert second.stats.extra["resumed"] > 0
    assert second.stats.generated_tokens < sum(len(whole.responses[i].response_ids) for i in rest)
    for index, response in [*zip(first.finished, first.responses, strict=True), *zip(rest, second.responses, strict=True)]:
        assert response.response_ids == whole.responses[index].response_ids
        assert response.routes is not None
    assert_matches(first.responses, tiny)
    assert_matches(second.responses, tiny)
    assert seen[-1].total == 24
    assert seen[-1].finished >= 10


def test_a_failing_environment_names_its_request(fresh: SGLangEngine) -> None:
    class Broken:
        stop_token_ids = tuple(range(3, 200))

        def reply(self, prompt_ids: Any, response_ids: Any) -> None:
            raise ZeroDivisionError("by the calculator")

    request = replace(make_requests(1, seed=8)[0], environment=Broken())
    with pytest.raises(EnvironmentFailed, match=r"request 0 of 1 .*environment failed: ZeroDivisionError: by the calculator"):
        fresh.generate([request], SamplingParams(64, stop_token_ids=Broken.stop_token_ids), return_routes=True)
