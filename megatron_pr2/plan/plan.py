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
from megatron_pr2.plan.dense import dense_elements
from megatron_pr2.plan.models import ModelSpec
from megatron_pr2.plan.tokens import IntArray, ReplicaTokens, Workload, replica_tokens, sampled, share_of_room
from megatron_pr2.prediction.predictor import predictor_bytes, push_bytes
from megatron_pr2.prediction.ridge import fit_bytes, reduced_bytes
from megatron_pr2.routes.ids import expert_dtype
from megatron_pr2.routes.table import RouteTable

# What is counted: name -> (where it is held, what it is). "features" is where PR2Config.feature_device says.
MEMORY: dict[str, tuple[str, str]] = {
    "weight": ("device", "predictor: W_p"),
    "gradient": ("device", "predictor: gradient sums"),
    "adam": ("device", "predictor: Adam's moments"),
    "momentum": ("device", "predictor: W_p from the policy's momentum or a look-ahead"),
    "pushes": ("device", "predictor: last pushes and old gates, to judge batches by"),
    "features": ("features", "features (router inputs and logits under the old policy)"),
    "features_fetched": ("features", "features fetched for one mini-step"),
    "features_under_way": ("host", "features on their way to host memory, at most"),
    "tables": ("host", "route tables"),
    "slices": ("device", "routes of this rank's tokens and layers"),
    "routes_under_way": ("device", "routes on their way, when a pass opens"),
    "token_ids": ("device", "token ids of the replica, to compare with the model's input"),
    "look_weights": ("device", "look-ahead: all weights but the experts, while others take their place"),
    "look_inputs": ("device", "look-ahead: router inputs and logits of the tokens looked at"),
    "look_fit": ("device", "look-ahead: regression"),
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
    "look_weights_reduced": "look-ahead: weights of a distributed optimizer, all-reduced (ring)",
    "look_fit_reduced": "look-ahead: sums of the regression and its result, reduced (ring)",
    "gates_pushed": "gates pushed to the engine (as without prediction)",
}

# Gates as an engine takes them, and weights of a bf16 policy.
GATE_BYTES = WEIGHT_BYTES = torch.bfloat16.itemsize
# Arrays over the tokens of a replica, on each of its ranks: RouteStore.valid, FeaturePlan's sample, Measurement.held_out, the rows
# that AgreementCheck compares and Progress's two (bool), FeaturePlan's holder and FeatureStore's segment (int32) and slot (int64).
INDEX_BYTES = 6 * 1 + 4 + 4 + 8
# Pushed.of_token (int16), where something is predicted.
PUSH_INDEX_BYTES = 2


@dataclass(frozen=True)
class RankPlan:
    """One rank, or the sum of all.

    Attributes:
        rank, place: its number and coordinates; None for the sum.
        memory, moved: bytes by the names of MEMORY and MOVED.
    """

    rank: int | None
    place: Coordinates | None
    memory: dict[str, int]
    moved: dict[str, int]


def plan(model: ModelSpec, layout: ParallelLayout, work: Workload, config: PR2Config) -> Plan:
    """Computes the plan; identical ranks are computed once.

    Raises:
        ConfigError: routes do not come from the engine, or a look-ahead changes weights whose sizes are not known.
        RouteError: more experts than route tables can name.
    """
    if config.looks_ahead and model.dense is None:
        raise ConfigError(
            f"predictor={config.predictor!r}: the sizes of the weights of {model.name} are not known; plan another predictor"
        )
    if config.routes != "engine":
        raise ConfigError(f"pr2.routes={config.routes!r}: a plan is made for routes from the engine ('engine')")
    return Plan(model, layout, work, config)


class Plan:
    """Memory and traffic of every rank.

    Attributes:
        model, layout, work, config: what was planned.
        tokens: per kind of replica.
        sample_fraction: share of the response tokens that features are kept of: the setting, or what feature_bytes allows.
        distinct_ranks: ranks that were computed; every other one is identical to one of them.
    """

    def __init__(self, model: ModelSpec, layout: ParallelLayout, work: Workload, config: PR2Config) -> None:
        self.model, self.layout, self.work, self.config = model, layout, work, config
        hidden = model.hidden if config.keeps_inputs else 0
        self._store = FeatureStore(0, model.num_experts, hidden, device=torch.device("cpu"), h_dtype=H_DTYPE)
        self._layers_D1 = np.array([[len(layout.moe_columns(pp))] for pp in range(layout.pipeline)], dtype=np.int64)
        sizes = {"vocab": model.vocab_size, "experts": model.num_experts, "hidden": model.hidden}
        dense = [dense_elements(model.dense, layout, pp, **sizes) if model.dense else 0 for pp in range(layout.pipeline)]
        self._dense_D1 = np.array(dense, dtype=np.int64)[:, None]
        # The stage with most layers decides for all of them.
        room = config.feature_bytes // self._store.bytes_of(int(self._layers_D1.max()))
        # The first data-parallel index of each kind: the first replica pushes weights, the first ones may train a sequence more.
        self._firsts = sorted({0, min(1, layout.data - 1), work.batch % layout.data})
        self.replicas = [end - first for first, end in zip(self._firsts, [*self._firsts[1:], layout.data], strict=True)]
        counts = [work.sequences(first, layout.data) for first in self._firsts]
        samples = {count: sampled(layout, work, config, count) for count in set(counts)}
        share = min(share_of_room(each, room) for each in samples.values())
        self.sample_fraction = config.sample_fraction * share if config.drift else 0.0
        made = {count: replica_tokens(layout, work, each, share) for count, each in samples.items()}
        self.tokens: list[ReplicaTokens] = [made[count] for count in counts]
        self._shape = (len(self._firsts), layout.pipeline, layout.context * layout.tensor)
        kinds = [self._bytes(tokens, first) for tokens, first in zip(self.tokens, self._firsts, strict=True)]
        # A column per distinct rank, in the order of [G, D, P].
        one = np.ones(self._shape[1:], dtype=np.int64)
        self._columns = {name: np.concatenate([(kind[name] * one).ravel() for kind in kinds]) for name in kinds[0]}
        self._copies = np.repeat(self.replicas, one.size)
        self._sums = np.sum([self._columns[name] for name in MEMORY], axis=0)
        self.distinct_ranks = self._sums.size

    # ---- answers -----------------------------------------------------------------------------------------------------

    def rank(self, rank: int) -> RankPlan:
        """One rank.

        Raises:
            ConfigError: the world has no such rank.
        """
        place = self.layout.coordinates(rank)
        kind = max(i for i, first in enumerate(self._firsts) if first <= place.dp)
        column = np.ravel_multi_index((kind, place.pp, place.cp * self.layout.tensor + place.tp), self._shape)
        return self._part(rank, place, {name: int(values[column]) for name, values in self._columns.items()})

    @cached_property
    def total(self) -> RankPlan:
        """The sum over all ranks."""
        return self._part(None, None, {name: int(values @ self._copies) for name, values in self._columns.items()})

    @cached_property
    def typical(self) -> RankPlan:
        """The rank with the median of memory."""
        order = np.argsort(self._sums, kind="stable")
        below = np.cumsum(self._copies[order])
        return self._first_of(order[np.searchsorted(below, (below[-1] + 1) // 2)])

    @cached_property
    def largest(self) -> RankPlan:
        """The rank with most memory, the first one of equals."""
        return self._first_of(np.argmax(self._sums))

    @cached_property
    def look_ahead(self) -> dict[str, float]:
        """What a look-ahead computes.

        Returns:
            sequences, tokens: looked at, by all replicas; share_of_passes: of a rollout batch's log-prob and training passes, where
            a backward is two forwards; fit_flops: of the regression, in fp32; solve_flops: what comes on top in float64.
        """
        model, counts = self.model, zip(self.tokens, self.replicas, strict=True)
        looked_at = [(self.work.looked_at(each.sequences), int(each.looked_P.sum()), count) for each, count in counts]
        sequences, tokens = (sum(each[i] * each[2] for each in looked_at) for i in range(2))
        layers, hidden, experts = len(self.layout.moe_layers), model.hidden, model.num_experts
        return {
            "sequences": sequences,
            "tokens": tokens,
            "share_of_passes": (2 - self.work.watched) * sequences / (4 * self.work.batch),
            "fit_flops": 2 * layers * tokens * hidden * (hidden + experts),
            "solve_flops": layers * (2 * hidden**3 // 3 + 2 * experts * hidden**2),
        }

    def device_of(self, name: str) -> str:
        """Where an entry of MEMORY is held: "device" or "host"."""
        where = MEMORY[name][0]
        return ("host" if self.config.feature_device == "cpu" else "device") if where == "features" else where

    def held(self, part: RankPlan, device: str) -> int:
        """Bytes of a rank, or of all, in one kind of memory: "device" or "host"."""
        return sum(count for name, count in part.memory.items() if self.device_of(name) == device)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _part(self, rank: int | None, place: Coordinates | None, values: dict[str, int]) -> RankPlan:
        return RankPlan(rank, place, *({name: values[name] for name in names} for names in (MEMORY, MOVED)))

    def _first_of(self, column: np.intp) -> RankPlan:
        kind, stage, place = (int(i) for i in np.unravel_index(column, self._shape))
        tensor = self.layout.tensor
        return self.rank(self.layout.rank(Coordinates(place % tensor, place // tensor, self._firsts[kind], stage)))

    def _bytes(self, tokens: ReplicaTokens, dp: int) -> dict[str, IntArray]:
        """Every quantity, on the stages and places of a replica [D, P] or what broadcasts to it."""
        model, layout, work, config = self.model, self.layout, self.work, self.config
        layers_D1, replica_tokens = self._layers_D1, tokens.sequences * work.seq
        scatter = config.route_delivery == "scatter"
        # 1 on the first rank of a replica, on those that are given tables, on those that receive routes.
        owner = np.zeros(self._shape[1:], dtype=np.int64)
        owner[0, 0] = 1
        given = owner if scatter else np.ones_like(owner)
        receivers = scatter * (1 - owner)
        table = RouteTable.missing(work.seq, len(layout.moe_layers), model.topk, model.num_experts)

        def predictor(strategy: str) -> dict[str, IntArray]:
            rest = model.num_experts, model.hidden, strategy
            sizes = []
            for n in map(int, layers_D1[:, 0]):
                pushes = push_bytes(n, *rest, hold_back=config.hold_back, horizons=work.horizons)
                sizes.append({**predictor_bytes(n, *rest), "pushes": pushes})
            return {name: np.array([[size[name]] for size in sizes]) for name in sizes[0]}

        def routes(tokens_P: IntArray) -> IntArray:
            return layers_D1 * tokens_P * model.topk * expert_dtype(model.num_experts).itemsize

        def sent(tokens_P: IntArray) -> IntArray:  # everybody's but its own
            return scatter * owner * (routes(tokens_P).sum() - routes(tokens_P)[0, 0])

        def features(tokens_P: IntArray) -> IntArray:
            return np.array([[self._store.bytes_of(int(n))] for n in layers_D1[:, 0]]) * tokens_P

        own, holders = predictor(config.predictor), layout.data * layout.context
        sizes = model.num_experts, model.hidden
        # A gate's update per layer, and of how many elements it is (optimizer_moments.next_updates).
        gates_D1 = predictor("momentum")["momentum"]
        followed = (gates_D1 + 4 * layers_D1) * (work.mini_steps * config.follows + config.looks_ahead)
        learners = holders * (layout.tensor if layout.sequence_parallel else 1)
        look = int(config.looks_ahead)
        weights_D1 = look * (not work.watched) * WEIGHT_BYTES * self._dense_D1
        fits = [(fit_bytes(n, *sizes), *reduced_bytes(n, *sizes)) if n else (0, 0, 0) for n in map(int, layers_D1[:, 0])]
        held_D1, to_owner_D1, to_all_D1 = (look * np.array([[each[i]] for each in fits]) for i in range(3))
        pushers = (np.arange(owner.shape[1]) == 0) & (dp == 0)
        return {
            **own,
            "features": features(tokens.sampled_P),
            "features_fetched": features(tokens.held_P),
            "features_under_way": np.minimum(features(tokens.sampled_P), STAGING_BYTES) * (config.feature_device == "cpu"),
            "tables": given * tokens.sequences * table.nbytes,
            "slices": routes(tokens.rows_P),
            # The owner holds what the others wait for, they hold the numbers of the rows that it goes to.
            "routes_under_way": receivers * 8 * tokens.opened_P + sent(tokens.opened_P),
            "token_ids": np.array(torch.int32.itemsize * (replica_tokens + 1)),
            "look_weights": weights_D1,
            "look_inputs": look * layers_D1 * (H_DTYPE.itemsize * model.hidden + 4 * model.num_experts) * tokens.looked_P,
            "look_fit": held_D1 + look * gates_D1,
            "index": np.array((INDEX_BYTES + PUSH_INDEX_BYTES * config.predicts) * replica_tokens),
            "engine_routes": owner * tokens.sequences * sglang_route_bytes(work.seq, model),
            "compact_routes": given * tokens.sequences * table.encoded_size,
            # replay.intake: a bit per token.
            "validity_received": receivers * math.ceil(replica_tokens / 8),
            "routes_sent": sent(tokens.routed_P),
            "routes_received": receivers * routes(tokens.routed_P),
            "features_sent": features(tokens.sent_P),
            "features_received": features(tokens.fetched_P),
            "gradient_reduced": (work.mini_steps - 1) * ring_bytes(own["gradient"], learners),
            "momentum_reduced": ring_bytes(followed, holders),
            "look_weights_reduced": ring_bytes(weights_D1, holders),
            "look_fit_reduced": to_owner_D1 * (learners - 1) // learners + ring_bytes(to_all_D1, learners),
            "gates_pushed": pushers * layers_D1 * model.num_experts * model.hidden * GATE_BYTES,
        }


def ring_bytes(payload: IntArray, ranks: int) -> IntArray:
    """Bytes that a rank sends in a ring all-reduce: each share goes round twice, once to be summed and once as the sum."""
    return payload * 2 * (ranks - 1) // ranks


def sglang_route_bytes(tokens: int, model: ModelSpec) -> int:
    """Characters of the base64 of int32 [tokens - 1, decoder layers, K], dense layers included (rollout/sglang/routes.py)."""
    return math.ceil((tokens - 1) * model.num_hidden_layers * model.topk * 4 / 3) * 4
