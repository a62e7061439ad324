"""`megatron-pr2 plan`: memory and traffic of a layout that need not exist.

In: a model, sizes or a pipeline's settings. Out: bytes per rank, as table or JSON.
May import hf and below; starts nothing.
"""
