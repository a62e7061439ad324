"""Seeded sampling in SGLang's CPU engine: a token depends on its request's seed, its position and the probabilities alone.

SGLang honours `sampling_seed` only under --enable-deterministic-inference, which needs Triton kernels and a compiled hash. Here
one uniform number per row comes from a hash of (seed, position) and is looked up in the cumulative distribution over token ids,
so the same request draws the same token whatever else is in the batch, up to rounding of the probabilities.

One request with top-k, top-p or min-p, a greedy one such as a health check among them, takes its whole batch to another sampler of
SGLang's, which draws by rank of probability instead of token id. `sample_filtered` stands in for that one.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), determined by its arguments (finaliser of SplitMix64, https://prng.di.unimi.it/splitmix64.c)."""
    x = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def sample_with_seeds(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """REPLACE `multinomial_with_seed`: one index per row, drawn by inverting the cumulative distribution in float64.

    Args:
        logprobs: [rows, columns], not necessarily normalised; -inf is never drawn.
        seed, positions: [rows] int64, of the request and of the token to draw in its sequence.
    """
    cumulative = logprobs.to(torch.float64).exp().cumsum(dim=1)
    draws = [uniform(s, p) for s, p in zip(seed.tolist(), positions.tolist(), strict=True)]
    target = torch.tensor(draws, dtype=torch.float64, device=logprobs.device).unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=logprobs.shape[1] - 1)


def sample_filtered(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor,
    positions: torch.Tensor,
    *,
    return_filtered_probs: bool = False,
    max_top_k: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """REPLACE `top_k_top_p_min_p_sampling_from_probs_torch`: a row without filters draws what it draws in a batch without filters.

    Args:
        probs: [rows, columns], left as it is.
        top_ks: [rows], at least the number of columns for no limit.
        top_ps: [rows], of the probability before each column in falling order, 1 for no limit.
        min_ps: [rows], relative to the likeliest column; looked at with `need_min_p_sampling` only.
        max_top_k: a bound on top_ks that the original makes use of.

    Returns:
        [rows] int32. With `return_filtered_probs` also what is left of the probabilities in falling order [rows, columns], the
        token ids in that order (int32) and the probability of each drawn token [rows].
    """
    kept, order = probs.sort(dim=-1, descending=True)
    before = kept.cumsum(dim=-1) - kept
    # A top-p of 1 drops nothing, also where rounding takes the sum above 1.
    drop = (before > top_ps.view(-1, 1)) & (top_ps.view(-1, 1) < 1)
    drop |= torch.arange(kept.shape[-1], device=kept.device) >= top_ks.view(-1, 1)
    if need_min_p_sampling:
        drop |= kept < kept[:, :1] * min_ps.view(-1, 1)
    kept = kept.masked_fill(drop, 0.0)
    left = torch.zeros_like(kept).scatter_(-1, order, kept)
    drawn = sample_with_seeds(left.log(), sampling_seed, positions)
    token_ids = drawn.view(-1).to(torch.int32)
    if not return_filtered_probs:
        return token_ids
    return token_ids, kept, order.to(torch.int32), left.gather(1, drawn).view(-1)


def fill_sampling_seeds(info: Any, _cls: type, batch: Any, vocab_size: int) -> None:
    """AFTER `SamplingBatchInfo.from_schedule_batch`: gives the sampler the `sampling_seed` of every request.

    A request without a seed gets a random one of its own, because rows with and without a seed cannot share a batch.
    """
    if info.sampling_seed is not None:
        return
    for request in batch.reqs:
        if request.sampling_params.sampling_seed is None:
            request.sampling_params.sampling_seed = secrets.randbits(62)
    info.sampling_seed = torch.tensor([r.sampling_params.sampling_seed for r in batch.reqs], dtype=torch.int64)
