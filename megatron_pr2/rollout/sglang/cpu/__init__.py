"""SGLang on a machine without a GPU: two import shims and one SGLang plugin, all explicit and undoable.

Scope: CPU only. On a machine with CUDA every piece refuses or does nothing, so that a GPU engine runs unmodified SGLang.

    torchvision_ops   operator schemas without which a CUDA build of torchvision cannot be imported beside a CPU torch
    kernel_stub       an import-only `sgl_kernel`, whose compiled package exists for accelerators only
    plugin            hooks through SGLang's own plugin registry (host memory for routes, experts of other ranks, ...)
    launch            `python -m megatron_pr2.rollout.sglang.cpu.launch`: installs the above, then starts SGLang's server

`install()` and `uninstall()` in :mod:`megatron_pr2.rollout.sglang.cpu.shims` do the first two in the calling process.
"""
