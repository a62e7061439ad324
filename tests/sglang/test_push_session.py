"""The two phases of a push against a scripted server, and what a target says and does not say."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.channel import own_address
from megatron_pr2.rollout.sglang.push.distributed import Bucket, WeightSender
from megatron_pr2.rollout.sglang.push.session import PushSession, PushTarget, push_target
from tests.sglang.fake_server import Answer, FakeServer, serve

OK = (200, {"success": True, "message": "fine"})
PATHS = ("/begin_weight_update", "/end_weight_update", "/flush_cache", "/update_weight_version")


class Recorder:
    """A fake server that takes pushes and notes what it was asked, in order."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[Answer]] = {}
        for path in PATHS:
            server.overrides[path] = self._answering(path)

    def _answering(self, path: str) -> Any:
        def answer(body: dict[str, Any], call: int) -> Answer:
            self.asked.append((path, body))
            queue = self.answers.get(path)
            return queue.pop(0) if queue else OK

        return answer

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with serve(FakeServer()) as server:
        yield Recorder(server)


@pytest.fixture
def session(recorder: Recorder) -> Iterator[PushSession]:
    http = HttpClient(recorder.server.url, api_key=None, retries=3, backoff_s=0.01)
    yield PushSession(http, where="weight update of X")
    http.close()


def target(**changes: Any) -> PushTarget:
    fields: dict[str, Any] = {"world_size": 2, "backend": "gloo", "device": "cpu", "bucket_bytes": 64, "timeout_s": 5.0}
    return PushTarget("http://127.0.0.1:9", "s3cret", **(fields | changes))


def test_the_phases_in_order(session: PushSession, recorder: Recorder) -> None:
    session.begin()
    session.finish("7", flush_cache=True)
    assert recorder.paths == list(PATHS)
    assert recorder.asked[-1][1] == {"new_version": "7", "abort_all_requests": False}
    recorder.asked.clear()
    session.begin()
    session.finish("8", flush_cache=False)
    assert recorder.paths == [path for path in PATHS if path != "/flush_cache"]


def test_releases_without_sessions(session: PushSession, recorder: Recorder) -> None:
    recorder.answers["/begin_weight_update"] = [(404, {"detail": "Not Found"})]
    for label in ("1", "2"):
        session.begin()
        session.finish(label, flush_cache=True)
    session.abandon()
    assert recorder.paths == ["/begin_weight_update", *2 * ["/flush_cache", "/update_weight_version"]]


def test_a_session_that_somebody_left_open_is_closed(session: PushSession, recorder: Recorder) -> None:
    recorder.answers["/begin_weight_update"] = [(400, {"success": False, "message": "a session is already open; call end"})]
    session.begin()
    assert recorder.paths == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/begin_weight_update", (400, {"success": False, "message": "no"}), r"/begin_weight_update was refused.*no"),
        ("/begin_weight_update", (200, {"success": False, "message": "no"}), r"/begin_weight_update was refused: no"),
        ("/begin_weight_update", (200, ["?"]), r"/begin_weight_update was refused: \['\?'\]"),
        ("/end_weight_update", (200, {"success": False, "message": "no"}), r"/end_weight_update was refused: no"),
        ("/end_weight_update", (500, b"crash"), r"/end_weight_update failed 1 times"),
        ("/flush_cache", (400, b"busy"), r"cache still holds what the old weights computed: busy; push while"),
        ("/update_weight_version", (400, {"success": False, "message": "no"}), r"/update_weight_version was refused"),
        ("/update_weight_version", (404, {"detail": "Not Found"}), r"/update_weight_version was refused"),
    ],
)
def test_every_reply_counts(session: PushSession, recorder: Recorder, path: str, answer: Answer, message: str) -> None:
    recorder.answers[path] = [answer]
    with pytest.raises(RolloutError, match=rf"weight update of X: .*{message}"):  # noqa: PT012
        session.begin()
        session.finish("7", flush_cache=True)
    assert recorder.paths.count(path) == 1  # none of these may be repeated
    assert path == "/update_weight_version" or "/update_weight_version" not in recorder.paths


def test_abandoning_never_raises(session: PushSession, recorder: Recorder) -> None:
    for answer in ((500, b"crash"), (200, {"success": False, "message": "no"}), (400, b"no")):
        recorder.answers["/end_weight_update"] = [answer]
        session.abandon()
    assert recorder.paths == 3 * ["/end_weight_update"]


def test_targets_travel_with_their_key_and_do_not_show_it() -> None:
    one = target()
    assert pickle.loads(pickle.dumps(one)) == one
    assert "s3cret" not in repr(one)
    assert one != target()  # another connection


def test_the_target_of_a_server() -> None:
    config = SGLangConfig(model_path="m", weight_bucket_bytes=99, request_timeout_s=7.0)
    made = push_target(config, "http://127.0.0.1:9", None, {"device": "cpu", "tp_size": 2}, "X")
    assert (made.world_size, made.backend, made.device, made.bucket_bytes, made.timeout_s) == (3, "gloo", "cpu", 99, 7.0)
    made = push_target(config, "http://127.0.0.1:9", None, {"device": "cuda", "tp_size": 1}, "X")
    assert (made.world_size, made.backend, made.device) == (2, "nccl", "cuda")
    gloo = SGLangConfig(model_path="m", weight_backend="gloo")
    assert push_target(gloo, "http://127.0.0.1:9", None, {"device": "cuda", "tp_size": 1}, "X").backend == "gloo"


def test_own_address() -> None:
    for url in ("http://127.0.0.1:30000", "http://localhost:30000", "http://127.0.0.9:1", "http://[::1]:30000"):
        assert own_address(url) == "127.0.0.1"
    with pytest.raises(RolloutError, match=r"no way to 'no-such-host\.invalid'"):
        own_address("http://no-such-host.invalid:30000")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to other hosts")
        assert own_address("http://192.0.2.1:30000") == probe.getsockname()[0] != "127.0.0.1"


def test_a_sender_without_a_server_and_with_nothing_to_send() -> None:
    weights = [("w", torch.zeros(4))]
    with pytest.raises(RolloutError, match="there is no server to push to"):
        WeightSender().push(weights)
    sender = WeightSender([target()])
    assert sender.push([]) == 0  # opens nothing: nobody listens there
    with pytest.raises(RolloutError, match=r"http://127.0.0.1:9: .*does not answer"):
        sender.push(weights)
    sender.close()
    sender.close()
    assert not sender._channels


def test_one_push_packs_for_one_kind_of_device() -> None:
    with pytest.raises(RolloutError, match=r"\['cpu', 'cuda'\]"):
        WeightSender([target(), target(device="cuda")])


def test_a_server_that_refuses_the_group(recorder: Recorder) -> None:
    recorder.server.overrides["/init_weights_update_group"] = lambda body, call: (400, {"success": False, "message": "no room"})
    sender = WeightSender([PushTarget(recorder.server.url, None, 2, "gloo", "cpu", 64, 30.0)])
    for _ in range(2):
        with pytest.raises(RolloutError, match="no room"):
            sender.push([("w", torch.zeros(4))])
    sender.close()
    assert recorder.server.calls["/init_weights_update_group"] == 2


class ClosableChannel:
    """In place of a WeightChannel: takes buckets until it is closed."""

    def __init__(self, target: PushTarget) -> None:
        self.target = target
        self.taken = 0
        self.closed = False

    def open(self) -> None:
        if self.closed:
            raise RolloutError("the channel was closed")

    def start(self, bucket: Bucket) -> None:
        self.taken += 1

    def wait(self) -> None:
        return None

    def abandon(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


def test_a_sender_that_is_closed_in_the_middle_of_a_push_does_not_report_success() -> None:
    target = PushTarget("http://127.0.0.1:1", None, 2, "gloo", "cpu", bucket_bytes=64, timeout_s=1.0)
    sender, channel = WeightSender(), ClosableChannel(target)
    sender._channels = {target: channel}  # type: ignore[dict-item]

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            yield name, torch.zeros(8)
        assert channel.taken == 1
        sender.close()
        yield "d", torch.zeros(8)

    with pytest.raises(RolloutError, match="closed"):
        sender.push(weights())
