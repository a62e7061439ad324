"""plan(): the memory that PR2 takes and the bytes that it moves, per rank of a layout that need not exist.

Nothing is estimated separately: rows, layers and owners come from ParallelLayout, sizes from the classes that hold and
send the bytes (FeatureStore, RouteTable, the predictor). What lasts is counted, and what a whole pass holds; what one layer of one
micro-batch needs for a moment is not.

Shape suffixes: G kinds of replicas, D pipeline stages, P places of a stage (tokens.py); E experts, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from megatron_pr2.config import PR2Config
from megatron_pr2.drift.features import H_DTYPE, STAGING_BYTES, FeatureStore
from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.layout import Coordinates, ParallelLayout
from megatron_pr2.plan.models import ModelSpec
from megatron_pr2.plan.tokens import IntArray, ReplicaTokens, Workload, replica_tokens
from megatron_pr2.prediction.predictor import predictor_bytes
from megatron_pr2.routes.table import RouteTable, expert_dtype

# What is counted: name -> (where it is held, what it is). "features" is where PR2Config.feature_device says.
MEMORY: dict[str, tuple[str, str]] = {
    "weight": ("device", "predictor: W_p"),
    "gradient": ("device", "predictor: gradient sums"),
    "adam": ("device", "predictor: Adam's moments"),
    "momentum": ("device", "predictor: W_p from the policy's momentum"),
    "snapshot": ("device", "predictor: W_p as it was pushed"),
    "features": ("features", "features (router inputs and logits under the old policy)"),
    "features_fetched": ("features", "features fetched for one mini-step"),
    "features_under_way": ("host", "features on their way to host memory, at most"),
    "tables": ("host", "route tables"),
    "slices": ("device", "routes of this rank's tokens and layers"),
    "routes_under_way": ("device", "routes on their way, when a pass opens"),
    "token_ids": ("device", "token ids of the replica, to compare with the model's input"),
    "index": ("host", "bookkeeping per token of the replica"),
}
MOVED: dict[str, str] = {
    "engine_routes": "routes from the engine, as SGLang sends them",
    "compact_routes": "the same as compact tables, to whoever holds them",
    "validity_received": "which tokens have a route, from its first rank",
    "routes_sent": "routes sent to the ranks of the replica",
    "routes_received": "routes received from its first rank",
    "features_sent": "features sent to ranks that train on their tokens",
    "features_received": "features received",
    "gradient_reduced": "predictor gradient, all-reduced (ring)",
    "momentum_reduced": "gate updates of a distributed optimizer, all-reduced (ring)",
    "gates_pushed": "gates pushed to the engine (as without prediction)",
}

# Gates as an engine takes them.
GATE_BYTES = torch.bfloat16.itemsize
# Arrays over the tokens of a replica, on each of its ranks: RouteStore.valid, FeaturePlan's sample and Measurement.held_out (bool),
# FeaturePlan's holder and FeatureStore's segment (int32) and slot (int64).
INDEX_BYTES = 1 + 1 + 1 + 4 + 4 + 8


@dataclass(frozen=True)
class RankPlan:
    """One rank, or the sum of all.

    Attributes:
        rank: its number; None for the sum.
        place: its coordinates; None for the sum.
        memory, moved: bytes by the names of MEMORY and MOVED.
    """

    rank: int | None
    place: Coordinates | None
    memory: dict[str, int]
    moved: dict[str, int]


def plan(model: ModelSpec, layout: ParallelLayout, work: Workload, config: PR2Config) -> Plan:
    """Computes the plan; identical ranks are computed once.

    Raises:
        ConfigError: routes do not come from the engine.
        RouteError: more experts than route tables can name.
    """
    if config.routes != "engine":
        raise ConfigError(f"pr2.routes={config.routes!r}: a plan is made for routes from the engine ('engine')")
    return Plan(model, layout, work, config)


class Plan:
    """Memory and traffic of every rank, as arrays over kinds of ranks.

    Attributes:
        model, layout, work, config: what was planned.
        tokens: per kind of replica.
        memory, moved: bytes [G, D, P] by the names of MEMORY and MOVED.
    """

    def __init__(self, model: ModelSpec, layout: ParallelLayout, work: Workload, config: PR2Config) -> None:
        self.model, self.layout, self.work, self.config = model, layout, work, config
        self._layers_D = np.array([len(layout.moe_columns(pp)) for pp in range(layout.pipeline)], dtype=np.int64)
        # 1 on all ranks, on the first one of a replica, on those that are given tables, send routes and receive them; [D, P] each.
        self._all = np.ones((layout.pipeline, layout.context * layout.tensor), dtype=np.int64)
        self._owner = np.zeros_like(self._all)
        self._owner[0, 0] = 1
        scatter = config.route_delivery == "scatter"
        self._given = self._owner if scatter else self._all
        self._senders, self._receivers = scatter * self._owner, scatter * (self._all - self._owner)
        # [(first data-parallel index, replicas)]: the first replica pushes weights, the first ones may train a sequence more.
        self._kinds = _kinds(work.batch, layout.data)
        hidden = model.hidden if config.keeps_inputs else 0
        store = FeatureStore(0, model.num_experts, hidden, device=torch.device("cpu"), h_dtype=H_DTYPE)
        self._feature_D = np.array([store.bytes_of(int(layers)) for layers in self._layers_D], dtype=np.int64)
        # The stage with most layers decides for all of them.
        self._room = config.feature_bytes // store.bytes_of(int(self._layers_D.max()))
        made: dict[int, ReplicaTokens] = {}
        for dp, _ in self._kinds:
            if (count := work.sequences(dp, layout.data)) not in made:
                made[count] = replica_tokens(layout, work, config, count, self._room)
        self.tokens = [made[work.sequences(dp, layout.data)] for dp, _ in self._kinds]
        self._table = RouteTable.missing(work.seq, len(layout.moe_layers), model.topk, model.num_experts)
        self.memory = {name: np.stack([rows[name] for rows in map(self._memory, self.tokens)]) for name in MEMORY}
        moved = [self._moved(tokens, dp) for tokens, (dp, _) in zip(self.tokens, self._kinds, strict=True)]
        self.moved = {name: np.stack([rows[name] for rows in moved]) for name in MOVED}

    # ---- answers -----------------------------------------------------------------------------------------------------

    def rank(self, rank: int) -> RankPlan:
        """One rank.

        Raises:
            ConfigError: the world has no such rank.
        """
        place = self.layout.coordinates(rank)
        kind = max(i for i, (first, _) in enumerate(self._kinds) if first <= place.dp)
        at = kind, place.pp, place.cp * self.layout.tensor + place.tp
        memory, moved = ({name: int(each[at]) for name, each in part.items()} for part in (self.memory, self.moved))
        return RankPlan(rank, place, memory, moved)

    @cached_property
    def total(self) -> RankPlan:
        """The sum over all ranks."""
        replicas = np.array(self.replicas, dtype=np.int64)
        memory, moved = (
            {name: int(each.sum(axis=(1, 2)) @ replicas) for name, each in part.items()} for part in (self.memory, self.moved)
        )
        return RankPlan(None, None, memory, moved)

    @cached_property
    def typical(self) -> RankPlan:
        """The rank with the median of memory."""
        flat = self._sums.reshape(len(self._kinds), -1)
        order = np.argsort(flat, axis=None, kind="stable")
        weights = np.repeat(self.replicas, flat.shape[1])[order]
        middle = order[int(np.searchsorted(np.cumsum(weights), (weights.sum() + 1) // 2))]
        return self._at(int(middle))

    @cached_property
    def largest(self) -> RankPlan:
        """The rank with most memory, the first one of equals."""
        return self._at(int(np.argmax(self._sums)))

    @property
    def dropped_sequences(self) -> int:
        """Sequences of the whole batch whose features exceed the byte budget of a rank."""
        return sum(n * (each.sequences - each.kept_sequences) for n, each in zip(self.replicas, self.tokens, strict=True))

    @property
    def fitting_fraction(self) -> float:
        """The sample fraction at which every rank's features just fit into the byte budget; at most 1."""
        wanted = max(each.wanted for each in self.tokens)
        return min(1.0, self.config.sample_fraction * self._room / wanted) if wanted else 1.0

    @property
    def replicas(self) -> list[int]:
        """How many replicas are of each kind."""
        return [count for _, count in self._kinds]

    @property
    def distinct_ranks(self) -> int:
        """Ranks that were computed; every other one is identical to one of them."""
        return self._sums.size

    def device_of(self, name: str) -> str:
        """Where an entry of MEMORY is held: "device" or "host"."""
        where = MEMORY[name][0]
        return ("host" if self.config.feature_device == "cpu" else "device") if where == "features" else where

    def held(self, part: RankPlan, device: str) -> int:
        """Bytes of a rank, or of all, in one kind of memory: "device" or "host"."""
        return sum(count for name, count in part.memory.items() if self.device_of(name) == device)

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _sums(self) -> IntArray:
        return np.sum([self.memory[name] for name in MEMORY], axis=0, dtype=np.int64)

    def _at(self, index: int) -> RankPlan:
        kind, stage, place = (int(i) for i in np.unravel_index(index, self._sums.shape))
        tensor = self.layout.tensor
        return self.rank(self.layout.rank(Coordinates(place % tensor, place // tensor, self._kinds[kind][0], stage)))

    def _route_bytes(self, tokens_P: IntArray) -> IntArray:
        """Compact ids of tokens in a stage's layers, [D, P]."""
        return self._layers_D[:, None] * tokens_P * self.model.topk * expert_dtype(self.model.num_experts).itemsize

    def _sent_by_owner(self, tokens_P: IntArray) -> IntArray:
        """[D, P], everybody's routes but its own."""
        shares = self._route_bytes(tokens_P)
        return self._senders * (shares.sum() - shares[0, 0])

    def _predictor(self, strategy: str) -> dict[str, IntArray]:
        """Bytes of a predictor's tensors, [D, P]."""
        model, hold_back = self.model, self.config.hold_back
        sizes_D = [
            predictor_bytes(int(n), model.num_experts, model.hidden, strategy, hold_back=hold_back) for n in self._layers_D
        ]
        return {name: self._all * np.array([[size[name]] for size in sizes_D]) for name in sizes_D[0]}

    def _memory(self, tokens: ReplicaTokens) -> dict[str, IntArray]:
        feature_D1 = self._feature_D[:, None]
        features = feature_D1 * tokens.sampled_P
        replica_tokens = tokens.sequences * self.work.seq
        return {
            **self._predictor(self.config.predictor),
            "features": features,
            "features_fetched": feature_D1 * tokens.held_P,
            "features_under_way": np.minimum(features, STAGING_BYTES) * (self.config.feature_device == "cpu"),
            "tables": self._given * (tokens.sequences * self._table.nbytes),
            "slices": self._route_bytes(tokens.rows_P),
            # The owner holds what the others wait for, they hold the numbers of the rows that it goes to.
            "routes_under_way": self._receivers * 8 * tokens.opened_P + self._sent_by_owner(tokens.opened_P),
            "token_ids": self._all * torch.int32.itemsize * (replica_tokens + 1),
            "index": self._all * INDEX_BYTES * replica_tokens,
        }

    def _moved(self, tokens: ReplicaTokens, dp: int) -> dict[str, IntArray]:
        feature_D1 = self._feature_D[:, None]
        layout, learning = self.layout, self.work.mini_steps - 1
        holders = layout.data * layout.context
        learners = holders * (layout.tensor if layout.sequence_parallel else 1)
        layers_D1 = self._layers_D[:, None]
        pushed = np.zeros_like(self._all)
        if dp == 0:
            pushed[:, :1] = layers_D1 * self.model.num_experts * self.model.hidden * GATE_BYTES
        # A gate's update per layer, and of how many elements it is (optimizer_moments.next_updates).
        followed = (self._predictor("momentum")["momentum"] + 4 * layers_D1) * self.config.follows
        gradient = self._predictor(self.config.predictor)["gradient"]
        # replay.intake: a bit per token.
        validity = math.ceil(tokens.sequences * self.work.seq / 8)
        return {
            "engine_routes": self._owner * (tokens.sequences * sglang_route_bytes(self.work.seq, self.model)),
            "compact_routes": self._given * (tokens.sequences * self._table.encoded_size),
            "validity_received": self._receivers * validity,
            "routes_sent": self._sent_by_owner(tokens.routed_P),
            "routes_received": self._receivers * self._route_bytes(tokens.routed_P),
            "features_sent": feature_D1 * tokens.sent_P,
            "features_received": feature_D1 * tokens.fetched_P,
            "gradient_reduced": learning * ring_bytes(gradient, learners),
            "momentum_reduced": self.work.mini_steps * ring_bytes(followed, holders),
            "gates_pushed": pushed,
        }


def _kinds(batch: int, data: int) -> list[tuple[int, int]]:
    """(first data-parallel index, replicas) of identical replicas."""
    firsts = sorted({0, *((1,) if data > 1 else ()), *((batch % data,) if 0 < batch % data < data else ())})
    return [(first, end - first) for first, end in zip(firsts, [*firsts[1:], data], strict=True)]


def ring_bytes(payload: IntArray, ranks: int) -> IntArray:
    """Bytes that a rank sends in a ring all-reduce: each share goes round twice, once to be summed and once as the sum."""
    return payload * 2 * (ranks - 1) // ranks


def sglang_route_bytes(tokens: int, model: ModelSpec) -> int:
    """Characters of the base64 of int32 [tokens - 1, decoder layers, K], dense layers included (rollout/sglang/routes.py)."""
    return math.ceil((tokens - 1) * model.num_hidden_layers * model.topk * 4 / 3) * 4
