"""Hugging Face checkpoints to Megatron-Core and back, by mbridge or Megatron-Bridge.

In: a model directory, or a trained model. Out: model chunks, weights in Hugging Face names, ModelShape.
May import attach and below.
"""
