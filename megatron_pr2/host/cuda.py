"""torch.cuda on the CPU: what Megatron-Core calls of it, answered by no-ops or by the CPU's own functions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from megatron_pr2.host.patches import PatchSet

# Factory functions that Megatron-Core (or mbridge) calls with device="cuda" or with pinned memory.
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint")


class _Idle:
    """What a stream and an event have in common when nothing is ever under way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = _nothing

    def query(self) -> bool:
        return True


class HostStream(_Idle):
    """A stream that is always idle. All streams are equal, so no code takes this one for a side stream."""

    wait_stream = wait_event = _Idle._nothing

    def record_event(self, event: Any = None) -> HostEvent:
        return HostEvent()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostStream)

    def __hash__(self) -> int:
        return hash(HostStream)


class HostEvent(_Idle):
    """An event that has already happened."""

    record = wait = _Idle._nothing

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wraps a factory function: device="cuda" becomes "cpu", pinned memory (which needs a driver) plain memory."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return tensor_type


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """The CPU generator's state; the arguments of both torch.cuda.get_rng_state and Megatron's _get_cuda_rng_state."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda", graph_safe: bool = False) -> None:
    """Sets the CPU generator's state; see :func:`get_rng_state`."""
    torch.set_rng_state(new_state)


def manual_seed(seed: int) -> None:
    """Seeds the CPU generator."""
    torch.default_generator.manual_seed(seed)


def patch_cuda(patches: PatchSet) -> None:
    """Applies everything of this module."""
    # Megatron asks for "the" device of the process; every device= argument that comes from here then means the CPU.
    patches.set(torch.cuda, "current_device", lambda: "cpu")
    patches.set(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    # Streams only order work on a device; on the host, program order is the order.
    patches.set(torch.cuda, "Stream", HostStream)
    patches.set(torch.cuda, "Event", HostEvent)
    patches.set(torch.cuda, "current_stream", lambda *args, **kwargs: HostStream())
    patches.set(torch.cuda, "default_stream", lambda *args, **kwargs: HostStream())
    patches.set(torch.cuda, "stream", lambda *args, **kwargs: contextlib.nullcontext())
    # There is one generator, the CPU's.
    patches.set(torch.cuda, "get_rng_state", get_rng_state)
    patches.set(torch.cuda, "set_rng_state", set_rng_state)
    patches.set(torch.cuda, "manual_seed", manual_seed)
    # Moving to the device: already there.
    patches.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    patches.set(torch.Tensor, "record_stream", lambda self, stream: None)
    # The optimizers and clip_grads sort parameters by the string "torch.cuda.FloatTensor" and refuse anything else.
    patches.set(torch.Tensor, "type", _tensor_type(torch.Tensor.type))
    # `with torch.device(...)` looks functions up in a set that is built once, on first use; it must hold the real ones, or
    # Transformers' loading on the meta device leaves buffers uninitialized.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        patches.set(torch, name, on_cpu(getattr(torch, name)))
