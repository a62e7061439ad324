"""SGLang on a machine without a GPU. On a machine with CUDA every piece does nothing: a GPU engine runs unmodified SGLang.

    shims    what has to be there before SGLang can be imported: operators of torchvision, a package `sgl_kernel`
    plugin   hooks through SGLang's own plugin registry (host memory for routes, experts of other ranks, seeded sampling, ...)
    launch   `python -m megatron_pr2.rollout.sglang.cpu.launch`: installs the above, then starts SGLang's server
"""
