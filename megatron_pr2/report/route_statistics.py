"""Numbers about saved route tables: the load of experts, how sticky routes are, and how two files of the same sequences differ.

Shape suffixes (legend in docs/design.md): T tokens, L MoE layers, K top-k, E experts; N a piece of tokens.

Tables are read one by one and worked on in pieces, so that memory does not grow with the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_pr2.errors import DataError
from megatron_pr2.report.records import Array
from megatron_pr2.routes.files import RouteFile
from megatron_pr2.routes.table import RouteTable

Counts = npt.NDArray[np.int64]
Ids = npt.NDArray[np.unsignedinteger]

POSITION_BINS = 24
# Tokens x layers x top-k of a piece: what is made of it stays in the cache.
_PIECE_IDS = 1 << 20


@dataclass(frozen=True)
class RouteStatistics:
    """What one file says.

    Attributes:
        missing: tokens without a route; `missing_last` of them are the last token of their sequence, which never was an input.
        topk: K.
        load_LE: [L, E] how many tokens took the expert.
        repeated_L: [L] experts that a token shares with the token before it, over `neighbours` pairs of tokens with routes.
    """

    sequences: int
    tokens: int
    missing: int
    missing_last: int
    topk: int
    load_LE: Counts
    repeated_L: Counts
    neighbours: int

    @property
    def routed(self) -> int:
        """Tokens with a route."""
        return self.tokens - self.missing

    def share_LE(self) -> Array:
        """[L, E] load relative to an even one: 1 is an expert's fair share; NaN without a route, as all that follows."""
        return _ratio(self.load_LE, self.routed * self.topk / self.load_LE.shape[1])

    def imbalance_L(self) -> Array:
        """[L] load of the busiest expert relative to the mean: 1 is perfectly even."""
        return self.share_LE().max(axis=1)

    def entropy_L(self) -> Array:
        """[L] entropy of the load, relative to that of an even one: 1 is even, 0 means that one expert does everything."""
        p_LE = _ratio(self.load_LE, self.load_LE.sum(axis=1, keepdims=True))
        return -(p_LE * np.log(np.where(p_LE == 0, 1.0, p_LE))).sum(axis=1) / np.log(max(2, p_LE.shape[1]))

    def unused_L(self) -> Array:
        """[L] share of the experts that no token took."""
        return np.where(self.routed, (self.load_LE == 0).mean(axis=1), np.nan)

    def stickiness_L(self) -> Array:
        """[L] share of a token's experts that the token before it took too; NaN without neighbours."""
        return _ratio(self.repeated_L, self.neighbours * self.topk)

    def chance_L(self) -> Array:
        """[L] what `stickiness_L` would be if the experts' load were the same and neighbours had nothing to do with each other."""
        return (_ratio(self.load_LE, self.routed) ** 2).sum(axis=1) / self.topk


@dataclass(frozen=True)
class RouteDifference:
    """How the second file's routes differ from the first's, for the same tokens.

    Attributes:
        sequences: that both files hold; `only_first` and `only_second` are in one file alone.
        tokens: of those sequences with a route in both files; `skipped` have none in at least one.
        touched: tokens that differ in at least one layer.
        topk: K.
        changed_L4: [L, 4] (token, layer) pairs with 0, 1, 2, 3 or more changed experts.
        edges: [P + 1] positions that bound the bins of the next two; each has about as many tokens as any other.
        kept_LP, pairs_P: [L, P] experts in both sets, and [P] tokens.
    """

    sequences: int
    only_first: int
    only_second: int
    tokens: int
    skipped: int
    touched: int
    topk: int
    changed_L4: Counts
    edges: Counts
    kept_LP: Counts
    pairs_P: Counts

    @property
    def kept_L(self) -> Counts:
        """[L] experts that are in both sets."""
        return self.kept_LP.sum(axis=1)

    def changed(self) -> Array:
        """[4] shares of (token, layer) pairs with 0, 1, 2, 3 or more changed experts."""
        return _ratio(self.changed_L4.sum(axis=0), self.changed_L4.sum())

    def changed_shares_L4(self) -> Array:
        """[L, 4] the same by layer."""
        return _ratio(self.changed_L4, self.changed_L4.sum(axis=1, keepdims=True))

    def agreement_L(self) -> Array:
        """[L] share of the first file's experts that are in the second's too."""
        return _ratio(self.kept_L, self.tokens * self.topk)

    def agreement_LP(self) -> Array:
        """[L, P] the same by position; NaN where no token is."""
        return _ratio(self.kept_LP, self.pairs_P * self.topk)


def _ratio(counts: Counts, of: npt.ArrayLike) -> Array:
    """Shares; NaN where there is nothing to take a share of."""
    whole = np.asarray(of, dtype=np.float64)
    return counts / np.where(whole > 0, whole, np.nan)


def shared_experts(a_NLK: Ids, b_NLK: Ids) -> npt.NDArray[np.uint16]:
    """[N, L] how many experts two sets of routes have in common, whatever their order; no set holds an expert twice."""
    shared = np.zeros(a_NLK.shape[:2], dtype=np.uint16)
    # Whole planes at a time: numpy is slow along a short axis.
    a_KNL, b_KNL = (np.ascontiguousarray(np.moveaxis(ids, 2, 0)) for ids in (a_NLK, b_NLK))
    for a_NL in a_KNL:
        for b_NL in b_KNL:
            shared += a_NL == b_NL
    return shared


def describe(tables: Mapping[int, RouteTable]) -> RouteStatistics:
    """The numbers of one file: at least one table, all of one model."""
    tokens = missing = missing_last = neighbours = 0
    load_LE: Counts | None = None
    for table in tables.values():
        if load_LE is None:
            load_LE = np.zeros((table.num_layers, table.num_experts), dtype=np.int64)
            repeated_L: Counts = np.zeros(table.num_layers, dtype=np.int64)
            topk = table.topk
        tokens += table.num_tokens
        missing += table.num_missing
        missing_last += int(table.num_tokens > 0 and not table.valid[-1])
        for piece in _pieces(table.experts):
            ids_NLK, valid = table.experts[piece], table.valid[piece]
            load_LE += _load(ids_NLK[valid], table.num_experts)
            # With the last token of the piece before.
            first = max(0, piece.start - 1)
            pair = table.valid[first : piece.stop - 1] & table.valid[first + 1 : piece.stop]
            before, after = table.experts[first : piece.stop - 1][pair], table.experts[first + 1 : piece.stop][pair]
            repeated_L += shared_experts(after, before).sum(axis=0, dtype=np.int64)
            neighbours += len(after)
    if load_LE is None:
        raise DataError("no route tables; expected at least one sequence")
    return RouteStatistics(len(tables), tokens, missing, missing_last, topk, load_LE, repeated_L, neighbours)


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
    if not both:
        raise DataError(
            f"{first.path} and {second.path} share no sequence; expected routes of the same sequences under the same numbers"
        )
    if odd := [sid for sid in both if lengths[sid] != others[sid]]:
        raise DataError(
            f"sequence {odd[0]} has {lengths[odd[0]]} tokens in {first.path} and {others[odd[0]]} in {second.path} "
            f"({len(odd)} of {len(both)} differ); expected routes of the same sequences under the same numbers"
        )
    edges = position_edges([lengths[sid] for sid in both])
    bins = len(edges) - 1
    changed_L4: Counts = np.zeros((first.num_layers, 4), dtype=np.int64)
    kept_LP: Counts = np.zeros((first.num_layers, bins), dtype=np.int64)
    pairs_P: Counts = np.zeros(bins, dtype=np.int64)
    touched = 0
    for sid in both:
        a, b = first[sid], second[sid]
        for piece in _pieces(a.experts):
            (rows,) = np.nonzero(a.valid[piece] & b.valid[piece])
            kept_NL = shared_experts(a.experts[piece][rows], b.experts[piece][rows])
            changed_NL = np.minimum(first.topk - kept_NL, 3)
            touched += int(np.count_nonzero(changed_NL.any(axis=1)))
            for c in range(4):
                changed_L4[:, c] += (changed_NL == c).sum(axis=0)
            bin_N = np.searchsorted(edges, rows + piece.start, side="right") - 1
            pairs_P += np.bincount(bin_N, minlength=bins)
            for at in np.unique(bin_N):
                kept_LP[:, at] += kept_NL[bin_N == at].sum(axis=0, dtype=np.int64)
    tokens = int(pairs_P.sum())
    return RouteDifference(
        sequences=len(both),
        only_first=len(lengths) - len(both),
        only_second=len(others) - len(both),
        tokens=tokens,
        skipped=sum(lengths[sid] for sid in both) - tokens,
        touched=touched,
        topk=first.topk,
        changed_L4=changed_L4,
        edges=edges,
        kept_LP=kept_LP,
        pairs_P=pairs_P,
    )


def position_edges(lengths: list[int], bins: int = POSITION_BINS) -> Counts:
    """Edges of at most `bins` position bins with about as many tokens each; the last edge is the greatest length."""
    longest = max(lengths, default=0)
    if not longest:
        return np.array([0, 1], dtype=np.int64)
    # How many sequences are longer than each position: the tokens at that position.
    there = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(longest), side="right")
    below = np.cumsum(there)
    wanted = below[-1] * np.arange(1, bins) / bins
    inner = np.searchsorted(below, wanted) + 1
    return np.unique(np.concatenate([[0], inner, [longest]])).astype(np.int64)


def _load(ids_NLK: Ids, num_experts: int) -> Counts:
    """[L, E] how often each expert occurs."""
    layers = ids_NLK.shape[1]
    flat = ids_NLK + (np.arange(layers, dtype=np.int64) * num_experts)[:, None]
    return np.bincount(flat.ravel(), minlength=layers * num_experts).reshape(layers, num_experts)


def _pieces(experts_TLK: Ids) -> Iterator[slice]:
    tokens = len(experts_TLK)
    step = max(1, _PIECE_IDS * tokens // max(1, experts_TLK.size))
    for start in range(0, tokens, step):
        yield slice(start, min(tokens, start + step))
