"""verl's platform for a machine without an accelerator, through verl's own registry; megatron_pr2.host does the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

GIB = 1 << 30


class DeviceModule:
    """torch.cuda as the host has it, with a memory that can be asked for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        return GIB, GIB

    def get_device_name(self, *_: Any) -> str:
        return "CPU"

    def device_count(self) -> int:
        return 1

    def memory_allocated(self, *_: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated


@PlatformRegistry.register(platform="host")
class HostPlatform(PlatformBase):
    """The CPU as verl's device."""

    device_name = "cpu"
    vendor_name = "host"
    device_module = DeviceModule()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def use_host() -> None:
    """Makes the CPU verl's platform in this process."""
    set_platform(HostPlatform())
