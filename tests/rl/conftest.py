"""Transformers imports torchvision where it is installed; its CUDA wheel needs a word on a CPU build of torch."""

from megatron_pr2.host import torchvision_ops

torchvision_ops.install()
