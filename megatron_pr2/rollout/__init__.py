"""Engines that sample: the protocol, the actor's own model as engine, the handshake, one engine for all ranks.

In: prompts, weights. Out: responses with log-probs and routes.
May import hf and below; `sglang/` and `doctor/` are rooms of their own.
"""
