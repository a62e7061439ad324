"""Numbers about saved route tables: the load of experts, how sticky routes are, and how two files of the same sequences differ.

Shape suffixes (legend in docs/design.md): T tokens, L MoE layers, K top-k, E experts; P bins of positions. Tables are read one by
one, so that memory does not grow with the files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import entropy

from megatron_pr2.errors import DataError
from megatron_pr2.routes.files import RouteFile
from megatron_pr2.routes.table import RouteTable

Counts = npt.NDArray[np.int64]
POSITION_BINS = 24
CHANGED = ("0 changed", "1", "2", "3 or more")


@dataclass(frozen=True)
class RouteStatistics:
    """What one file says; shares of nothing are NaN.

    Attributes:
        missing: tokens without a route; `missing_last` of them are the last token of their sequence, which never was an input.
        neighbours: pairs of neighbouring tokens with routes.
        load: by MoE layer and expert: tokens that took it, relative to an even load: 1 is an expert's fair share.
        layers: by MoE layer: `busiest` expert's load relative to the mean; `entropy` of the load, 1 is even, 0 one expert for all;
            `unused` share of the experts; `stickiness`, the share of a token's experts that the token before it took too, and what
            it would be by `chance`, if the load were the same and neighbours had nothing to do with each other.
    """

    sequences: int
    tokens: int
    missing: int
    missing_last: int
    neighbours: int
    load: pd.DataFrame
    layers: pd.DataFrame


@dataclass(frozen=True)
class RouteDifference:
    """How the second file's routes differ from the first's, for the same tokens; shares of nothing are NaN.

    Attributes:
        sequences: that both files hold; `only_first` and `only_second` are in one file alone.
        tokens: of those sequences with a route in both files; `skipped` have none in at least one.
        touched: tokens that differ in at least one layer.
        layers: by MoE layer: `agreement`, the share of the first file's experts that are in the second's too, and the shares of
            tokens with CHANGED experts.
        positions: agreement by position (where its bin begins, each has about as many tokens) and MoE layer.
        end: of the last bin.
    """

    sequences: int
    only_first: int
    only_second: int
    tokens: int
    skipped: int
    touched: int
    layers: pd.DataFrame
    positions: pd.DataFrame
    end: int


def shared_experts(a_TLK: npt.NDArray[Any], b_TLK: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """[T, L] how many experts two sets of routes have in common, whatever their order; no set holds an expert twice."""
    shared_TL = np.zeros(a_TLK.shape[:2], dtype=np.int64)
    for i, j in itertools.product(range(a_TLK.shape[2]), repeat=2):
        shared_TL += a_TLK[..., i] == b_TLK[..., j]
    return shared_TL


def describe(tables: Mapping[int, RouteTable]) -> RouteStatistics:
    """The numbers of one file: at least one table, all of one model."""
    if not tables:
        raise DataError("no route tables; expected at least one sequence")
    tokens = routed = missing_last = neighbours = 0
    load_LE: Any = 0
    repeated_L: Any = 0
    for table in tables.values():
        valid, layers, experts = table.valid, table.num_layers, table.num_experts
        offsets_L = np.arange(layers)[:, None] * experts
        ids = (table.experts[valid] + offsets_L).ravel()
        load_LE = load_LE + np.bincount(ids, minlength=layers * experts).reshape(layers, experts)
        pairs = valid[1:] & valid[:-1]
        repeated_L = repeated_L + shared_experts(table.experts[1:][pairs], table.experts[:-1][pairs]).sum(axis=0)
        tokens, routed = tokens + table.num_tokens, routed + int(valid.sum())
        missing_last += int(table.num_tokens > 0 and not valid[-1])
        neighbours += int(pairs.sum())
    p_LE = _shares(load_LE, routed * table.topk)
    statistics = {
        "busiest": p_LE.max(axis=1) * experts,
        "entropy": entropy(p_LE, axis=1) / np.log(max(2, experts)),
        "unused": np.where(routed, (load_LE == 0).mean(axis=1), np.nan),
        "stickiness": _shares(repeated_L, neighbours * table.topk),
        "chance": (p_LE**2).sum(axis=1) * table.topk,
    }
    index = _layers(layers)
    load = pd.DataFrame(p_LE * experts, index=index, columns=pd.RangeIndex(experts, name="expert"))
    frame = pd.DataFrame(statistics, index=index)
    return RouteStatistics(len(tables), tokens, tokens - routed, missing_last, neighbours, load, frame)


def compare(first: RouteFile, second: RouteFile) -> RouteDifference:
    """How two files of the same sequences differ; sequences that only one of them holds are counted and left out.

    Raises:
        DataError: the files are of two models, share no sequence, or a sequence has another number of tokens in each.
    """
    models = [f"{f.num_layers} MoE layers, top-{f.topk} of {f.num_experts} experts" for f in (first, second)]
    if models[0] != models[1]:
        raise DataError(f"{first.path} has {models[0]}; {second.path} has {models[1]}: routes of two models cannot be compared")
    lengths, others = first.lengths(), second.lengths()
    both = [sid for sid in lengths if sid in others]
    expected = "expected routes of the same sequences under the same numbers"
    if not both:
        raise DataError(f"{first.path} and {second.path} share no sequence; {expected}")
    if odd := [sid for sid in both if lengths[sid] != others[sid]]:
        raise DataError(
            f"sequence {odd[0]} has {lengths[odd[0]]} tokens in {first.path} and {others[odd[0]]} in {second.path} "
            f"({len(odd)} of {len(both)} differ); {expected}"
        )
    edges = position_edges([lengths[sid] for sid in both])
    bins, layers = len(edges) - 1, first.num_layers
    kept_PL, changed_4L, tokens_P = np.zeros((bins, layers)), np.zeros((4, layers)), np.zeros(bins)
    touched = 0
    for sid in both:
        a, b = first[sid], second[sid]
        (places,) = np.nonzero(a.valid & b.valid)
        kept_TL = shared_experts(a.experts[places], b.experts[places])
        at_T = np.searchsorted(edges, places, side="right") - 1
        np.add.at(kept_PL, at_T, kept_TL)
        tokens_P += np.bincount(at_T, minlength=bins)
        changed_4L += [(np.minimum(first.topk - kept_TL, 3) == c).sum(axis=0) for c in range(4)]
        touched += int((kept_TL < first.topk).any(axis=1).sum())
    tokens = int(tokens_P.sum())
    shares = {"agreement": _shares(kept_PL.sum(axis=0), tokens * first.topk)}
    shares |= {name: _shares(row, tokens) for name, row in zip(CHANGED, changed_4L, strict=True)}
    positions = _shares(kept_PL, tokens_P[:, None] * first.topk)
    return RouteDifference(
        sequences=len(both),
        only_first=len(lengths) - len(both),
        only_second=len(others) - len(both),
        tokens=tokens,
        skipped=sum(lengths[sid] for sid in both) - tokens,
        touched=touched,
        layers=pd.DataFrame(shares, index=_layers(layers)),
        positions=pd.DataFrame(positions, pd.Index(edges[:-1], name="position in the sequence"), _layers(layers)),
        end=int(edges[-1]),
    )


def position_edges(lengths: Sequence[int]) -> Counts:
    """Edges of at most POSITION_BINS bins of positions with about as many tokens each; the last edge is the greatest length."""
    places = np.concatenate([np.arange(length) for length in lengths])
    shares = np.arange(1, POSITION_BINS) / POSITION_BINS
    inner = np.quantile(places, shares, method="higher") if places.size else []
    return np.unique([0, *inner, max(1, *lengths)]).astype(np.int64)


def _shares(counts: npt.NDArray[Any], of: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """NaN where there is nothing to take a share of."""
    whole = np.asarray(of, dtype=np.float64)
    return counts / np.where(whole > 0, whole, np.nan)


def _layers(count: int) -> pd.RangeIndex:
    return pd.RangeIndex(1, count + 1, name="MoE layer")
