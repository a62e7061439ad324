"""Weights through process groups, in buckets, from any number of processes to all servers.

Every sender has a group of its own with each server, and a server takes one bucket at a time, so senders need not agree on
anything but begin() and finish().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.http import HttpClient
from megatron_pr2.rollout.sglang.push.channel import WeightChannel
from megatron_pr2.rollout.sglang.push.session import WHERE, PushSession, PushTarget


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, as they lie in `flat` ([bytes] uint8); dtypes by torch's names ("bfloat16")."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    flat: torch.Tensor


def buckets(weights: Iterable[tuple[str, torch.Tensor]], max_bytes: int, device: torch.device) -> Iterator[Bucket]:
    """Packs tensors, as they come, into buckets of at most `max_bytes`; a larger tensor is a bucket of its own.

    Wider dtypes come first within a bucket, which keeps every tensor aligned. One bucket, or the tensors that it is made of, are
    held at a time (both while it is packed), never the model.
    """
    pending: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if pending and size + tensor.nbytes > max_bytes:
            yield _pack(pending, device)
            size = 0
        pending.append((name, tensor.detach()))
        size += tensor.nbytes
        del tensor
    if pending:
        yield _pack(pending, device)


def _pack(tensors: list[tuple[str, torch.Tensor]], device: torch.device) -> Bucket:
    """Packs tensors and empties the list, so that they need not outlive this."""
    tensors.sort(key=lambda item: -item[1].element_size())
    flat = torch.empty(sum(t.nbytes for _, t in tensors), dtype=torch.uint8, device=device)
    offset = 0
    for _, tensor in tensors:
        flat[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor.reshape(-1))
        offset += tensor.nbytes
    names, dtypes = [name for name, _ in tensors], [str(t.dtype).removeprefix("torch.") for _, t in tensors]
    shapes = [list(t.shape) for _, t in tensors]
    tensors.clear()
    return Bucket(names, dtypes, shapes, flat)


class WeightSender:
    """Sends one stream of tensors to all targets at once, through channels that it keeps between pushes.

    Args:
        client: gives the client of a target where the caller has one that knows more of the server (why it died); it stays the
            caller's. By default the sender makes and closes its own.
    """

    def __init__(self, targets: Sequence[PushTarget] = (), *, client: Callable[[PushTarget], HttpClient] | None = None) -> None:
        self._client = client
        self._channels: dict[PushTarget, WeightChannel] = {}
        self.retarget(targets)

    def retarget(self, targets: Sequence[PushTarget]) -> None:
        """Sets where the next push goes; channels to targets that stay are kept."""
        if len({target.device for target in targets}) > 1:
            raise RolloutError(f"{WHERE}: targets on {sorted({t.device for t in targets})}; one push packs for one kind of device")
        for target in set(self._channels) - set(targets):
            self._channels.pop(target).close()
        for target in targets:
            if target not in self._channels:
                self._channels[target] = WeightChannel(target, self._client and self._client(target))

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], targets: Sequence[PushTarget] | None = None) -> int:
        """Sends tensors by Hugging Face name in buckets and returns their bytes (once, however many targets).

        A bucket is packed once and goes to all targets, or those given of them, side by side. Opens channels when the first one is
        ready.
        """
        # Taken once: closed meanwhile by another thread, they refuse the next bucket instead of being left out.
        channels = [channel for target, channel in self._channels.items() if targets is None or target in targets]
        if not channels:
            if targets is None:
                raise RolloutError(f"{WHERE}: there is no server to push to")
            for _ in weights:  # whoever exports them has to come to the end
                pass
            return 0
        smallest = min(channel.target.bucket_bytes for channel in channels)
        sent = 0
        for bucket in buckets(weights, smallest, torch.device(channels[0].target.device)):
            self._send(bucket, channels)
            sent += bucket.flat.numel()
            del bucket  # before the next one is packed
        return sent

    def _send(self, bucket: Bucket, channels: list[WeightChannel]) -> None:
        for channel in channels:
            channel.open()
        try:
            for channel in channels:
                channel.start(bucket)
            # All of them, before a failure is raised: what is under way needs the bucket and would meet the next push.
            failures = [failure for failure in [channel.wait() for channel in channels] if failure is not None]
        except BaseException:  # the user does not want to wait
            for channel in channels:
                channel.abandon()
            raise
        if failures:
            raise RolloutError("; ".join(failures))

    def close(self) -> None:
        """Leaves all groups; safe to call twice and with dead servers."""
        self.retarget(())


class DistributedPush(WeightSender):
    """Both sides in the controlling process; raises RolloutError where a server refuses or dies."""

    def begin(self, sessions: Sequence[PushSession], targets: Sequence[PushTarget]) -> list[PushTarget]:
        """Opens the sessions; returns where tensors go."""
        for session in sessions:
            session.begin()
        self.retarget(targets)
        return list(targets)

    def finish(self, sessions: Sequence[PushSession], label: str, *, flush_cache: bool) -> None:
        """The servers sample from the new weights when this returns."""
        for session in sessions:
            session.finish(label, flush_cache=flush_cache)

    def abandon(self, sessions: Sequence[PushSession]) -> None:
        """Closes a failed update as far as the servers still can."""
        for session in sessions:
            session.abandon()
