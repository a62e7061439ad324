"""W_p and the current rollout batch, saved in one parallel layout and loaded in any other.

In: what contents.py lists of a handle. Out: Megatron-Core ShardedTensors, directories.
May import drift and below; does not know the handle itself.
"""
