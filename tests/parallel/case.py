"""What a run in some layout is given and what it returns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_pr2.replay.alignment import Agreement
from tests.host.training import Weights
from tests.parallel.batch import ONE, Split

LogProbs = dict[tuple[int, int], float]


@dataclass(frozen=True)
class Case:
    """A layout and everything else that must not change the numbers.

    Attributes:
        processes: of the whole run; what the layout leaves over is data parallelism.
        layout: sizes, as host.init takes them.
        packed: one row of packed sequences (THD) instead of a padded batch.
        old, new: micro-batches of the old-log-prob pass and of the training pass.
        config: fields of TransformerConfig.
        ddp: fields of DistributedDataParallelConfig.
        delivery: PR2Config.route_delivery.
        bind: how a forward finds its micro-batch: by "order", or by "identity" (a wrapped forward step).
        pattern: of a HybridModel with the checkpoint's weights; None for the checkpoint's GPTModel.
        routes: PR2Config.routes: "engine", or "actor" for routes that the old-log-prob pass records.
    """

    processes: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    old: Split = ONE
    new: Split = ONE
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, bool] = field(default_factory=dict)
    delivery: str = "scatter"
    routes: str = "engine"
    bind: str = "order"
    pattern: str | None = None


@dataclass
class Seen:
    """What one router really selected for one micro-batch.

    Attributes:
        training: the training pass, not the old-log-prob pass.
        recomputed: outside of the model's forward.
        layer: 0-based, in Hugging Face's sense.
        rows: [T, 2] (sequence, position), -1 for padding.
        experts: [T] int64, bit e is set where expert e was selected.
    """

    training: bool
    recomputed: bool
    layer: int
    rows: Tensor
    experts: Tensor


@dataclass
class Result:
    """This rank's results; `predictor`, `absent`, `counts`, `rows`, `seen` are of its own layers and rows.

    Attributes:
        loss: the policy loss per token of the whole batch.
        logprobs: old log-probs of all loss-bearing tokens of the batch.
        gradients: reduced policy gradient under Hugging Face names; on the first rank only.
        grad_norm: of Megatron's distributed optimizer, where the case has one.
        predictor: reduced gradient sum [E, H] and token count per layer.
        drift: per layer and column, of the whole model.
        update: tokens and norms that the predictor's step reported, of the whole model.
        absent: sampled tokens without features.
        agreement: of the routes with the routers in the old-log-prob pass; of_sequence is of this replica's.
        counts: (replayed_rows, missing_rows) of the two sessions.
        rows: rows of this rank's routers in the two passes.
        seen: every call of a decoder router.
        other_calls: calls of routers that are not the decoder's (multi-token prediction): "live" where Megatron-Core's own router
            decided, else "attached".
    """

    loss: float
    logprobs: LogProbs
    gradients: Weights | None
    grad_norm: float | None
    predictor: dict[int, tuple[Tensor, float]]
    drift: dict[int, dict[str, float]]
    update: dict[str, float]
    absent: int
    agreement: Agreement | None
    counts: list[tuple[int, int]]
    rows: list[int]
    seen: list[Seen]
    other_calls: Counter[str]
