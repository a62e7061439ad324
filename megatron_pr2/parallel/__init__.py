"""Who computes what: the ranks of a layout, the layers of a stage, the tokens of a rank.

In: Megatron-Core's sizes, or its running process groups. Out: ParallelLayout, TokenGrid, Replica.
Imports errors only: everything else builds on it.
"""
