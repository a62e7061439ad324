"""What the policy's optimizer says of the gates: their learning rate, and Adam's, Lion's or Muon's next update, sharded or not.

    Adam  update = -lr (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta),   m_hat = m / (1 - beta1^t),  v_hat = v / (1 - beta2^t)
    Lion  update = -lr (sign(m) + weight_decay * theta)
    Muon  update = -lr (orthogonalize(m) + weight_decay * theta)

(Adam, arXiv 1412.6980, Algorithm 1, with decoupled weight decay, arXiv 1711.05101; with the L2 form the decay is part of m. Lion,
arXiv 2302.06675, Algorithm 2, and Muon, https://kellerjordan.github.io/posts/muon/, for a gradient that goes on as its mean: it
leaves m as it is, Nesterov's too. `orthogonalize` is the optimizer's own function.) Read from the state that the last step left:
nothing is added to the optimizer and nothing is changed in it.

Updates of other optimizers are refused by their class, not by their state: SOAP keeps moments of Adam's names in another basis, and
the adaptive kinds of Muon divide by a second moment that their next step changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from megatron_pr2.errors import AttachError
from megatron_pr2.parallel.consensus import largest


@torch.no_grad()
def next_updates(optimizer: Any, parameters: Sequence[nn.Parameter], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The update that the optimizer would make again, [len(parameters), *shape] fp32; zeros before its first step.

    Collective over the data-parallel group of a distributed optimizer, whose ranks hold slices of the moments, or of a layer-wise
    one, whose ranks hold other parameters; of any other optimizer every rank holds its parameters' moments whole.

    Args:
        optimizer: Megatron-Core's (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer,
            LayerWiseDistributedOptimizer, ChainedOptimizer of these) or a torch.optim.Adam or AdamW, a Lion, or a Muon.
        parameters: of the model, all of one shape.
        shape, device: of the parameters, for a rank that has none.

    Raises:
        AttachError: a parameter is in none of the optimizers, or its optimizer's update is not known.
    """
    holders = find_holders(optimizer, parameters)
    flat = torch.zeros(len(parameters), math.prod(shape), dtype=torch.float32, device=device)
    # Elements whose update is known, per parameter: the shards of all ranks make a whole, or some would silently stay zero.
    known = torch.zeros(len(parameters), dtype=torch.float32, device=device)
    for part in partial_updates(holders, parameters):
        if part.update is not None:
            flat[part.row, part.span] = part.update.to(device)
            known[part.row] = part.update.numel()
    for group in {id(group): group for group in sharding_groups(holders) if group is not None}.values():
        joined = torch.cat([flat.view(-1), known])
        dist.all_reduce(joined, group=group)
        flat, known = joined[: flat.numel()].view_as(flat), joined[flat.numel() :]
    # As tensors: before the first step all are zero, and no read of the device is needed to know.
    return torch.where((known == flat.shape[1]).unsqueeze(1), flat, 0.0).view(len(parameters), *shape)


@dataclass(frozen=True)
class PartialUpdate:
    """What this rank knows of one parameter's next update.

    Attributes:
        row: which of the parameters.
        span: the elements of the flattened parameter that it is of.
        weight: these elements, flat, as the optimizer steps them: in fp32 where it keeps an fp32 copy.
        update: what the optimizer would add to them, flat fp32; None before its first step.
    """

    row: int
    span: slice
    weight: Tensor
    update: Tensor | None


@torch.no_grad()
def partial_updates(holders: Sequence[Any], parameters: Sequence[nn.Parameter]) -> Iterator[PartialUpdate]:
    """The next update of whatever this rank's optimizers hold of the parameters.

    Args:
        holders: of each parameter, from :func:`find_holders`.

    Raises:
        AttachError: as :func:`update_rule`.
    """
    for row, (parameter, holder) in enumerate(zip(parameters, holders, strict=True)):
        rule, piece = update_rule(holder), _piece(holder, parameter)
        if piece is not None:
            update = rule(piece).reshape(-1) if piece.state else None
            yield PartialUpdate(row, piece.span, piece.master.view(-1), update)


def sharding_groups(holders: Sequence[Any]) -> list[dist.ProcessGroup | None]:
    """The ranks that each holder's parameters, or slices of them, are spread over; None where this rank has them whole."""

    def group_of(holder: Any) -> dist.ProcessGroup | None:
        if _is_layer_wise(holder):
            return holder.pg_collection.dp_cp if holder.dp_cp_params_list is not None else None
        return holder.data_parallel_group if isinstance(holder, DistributedOptimizer) else None

    groups = [group_of(holder) for holder in holders]
    return [group if group is not None and group.size() > 1 else None for group in groups]


def learning_rate(optimizer: Any, gates: Sequence[nn.Parameter], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """The learning rate of the parameter groups that hold the gates, as it is now; the mean where layers have different ones.

    Collective over `group` where a sharded optimizer has several rates: a rank may hold no piece of a gate. That of the first group
    where all gates are frozen; 0 without gates.

    Args:
        group: the ranks that hold other tokens of the same layers.
        device: where it communicates.

    Raises:
        AttachError: a gate is in none of the optimizers.
    """
    trained = [gate for gate in gates if gate.requires_grad]
    if gates and not trained:
        return float(optimizer.param_groups[0]["lr"])
    rates, uneven = [], False
    for gate, holder in zip(trained, find_holders(optimizer, trained), strict=True):
        known = {float(settings["lr"]) for settings in holder.param_groups}
        if len(known) > 1:
            own = _settings(holder, gate)
            known = set() if own is None else {float(own["lr"])}
            uneven = uneven or isinstance(holder, DistributedOptimizer) or _is_layer_wise(holder)
        rates.append(max(known, default=-math.inf))
    if uneven and group is not None and group.size() > 1:
        rates = largest(torch.tensor(rates, dtype=torch.float64, device=device), [group]).tolist()
    return sum(rates) / max(1, len(rates))


def find_holders(optimizer: Any, parameters: Sequence[nn.Parameter]) -> list[Any]:
    """Which of the optimizers that a chain is made of trains each parameter.

    Raises:
        AttachError: none of them does.
    """
    parts = list(_parts(optimizer))
    holders = []
    for row, parameter in enumerate(parameters):
        holder = next((part for part in parts if _holds(part, parameter)), None)
        if holder is None:
            kinds = ", ".join(sorted({type(part).__name__ for part in parts})) or "none"
            raise AttachError(
                f"the gate of MoE layer {row} of this rank ('lookahead': trained weight {row} that is no expert's) is in none of "
                f"the optimizers ({kinds}) given to attach() or pr2.optimizer; give it the one that trains the routers. "
                "predictor='momentum' needs routers that are not frozen"
            )
        holders.append(holder)
    return holders


@dataclass(frozen=True)
class _Piece:
    """What an optimizer on this rank keeps of a parameter.

    Attributes:
        optimizer: torch's, which keeps it.
        state: its moments; empty before the first step.
        settings: of its parameter group.
        span: the elements of the flattened parameter that they are of.
        weight: these elements.
        master: the same as the optimizer steps them.
    """

    optimizer: Any
    state: Mapping[str, Any]
    settings: Mapping[str, Any]
    span: slice
    weight: Tensor
    master: Tensor


def _parts(optimizer: Any) -> Iterator[Any]:
    """The optimizers that a chain is made of; a layer-wise one, whose parts hold other parameters on each rank, is one."""
    if hasattr(optimizer, "chained_optimizers") and not _is_layer_wise(optimizer):
        for each in optimizer.chained_optimizers:
            yield from _parts(each)
    else:
        yield optimizer


def _is_layer_wise(part: Any) -> bool:
    return any(kind.__name__ == "LayerWiseDistributedOptimizer" for kind in type(part).__mro__)


def update_rule(part: Any) -> Callable[[_Piece], Tensor]:
    """How an optimizer makes its updates.

    Raises:
        AttachError: it is not known here.
    """
    if _is_layer_wise(part):
        # All that it is made of, so that all ranks refuse alike: a rank knows the optimizer of its own parameters only.
        for each in part.chained_optimizers:
            update_rule(each)
        return lambda piece: update_rule(piece.optimizer)(piece)
    inner = getattr(part, "optimizer", part)
    # One that offloads moments is made of others.
    within = [getattr(inner, "gpu_optimizer", None), *(getattr(inner, "cpu_optimizers", None) or ())]
    made_of = [each for each in within if each is not None] or [inner]
    kinds = [{kind.__name__ for kind in type(each).__mro__} for each in made_of]
    for rule, known in ((_adam, {"Adam", "AdamW", "FusedAdam"}), (_lion, {"Lion"}), (_muon, {"Muon", "TensorParallelMuon"})):
        if all(kind & known for kind in kinds) and (rule is not _muon or all(map(_steps_as_muon, made_of))):
            return rule
    names = " and ".join(sorted({type(each).__name__ for each in made_of}))
    raise AttachError(
        f"the gates are trained by {names}: predictor='momentum' and 'lookahead' know the next update of Adam, Lion and Muon "
        "('lookahead' for all weights but the experts), not this one's; train with one of these, or use predictor='learned'"
    )


def _steps_as_muon(optimizer: Any) -> bool:
    """Whether nothing of the step that orthogonalised optimizers share is replaced: the adaptive and hyperball kinds do so."""
    shared = ("step", "pre_weight_update_fn_inplace", "post_weight_update_fn_inplace")
    return all(getattr(type(optimizer), name).__qualname__ == f"OrthogonalizedOptimizer.{name}" for name in shared)


def _holds(part: Any, parameter: nn.Parameter) -> bool:
    """Whether an optimizer trains a parameter, also where this rank holds no piece of it."""
    if _is_layer_wise(part) and part.dp_cp_params_list is not None:
        return any(each is parameter for of_rank in part.dp_cp_params_list for each in of_rank)
    if isinstance(part, DistributedOptimizer):
        return any(each is parameter for buffer in getattr(part, "buffers", ()) for each in buffer.params)
    trained = _trained(parameter)
    return any(each is trained for group in part.param_groups for each in group["params"])


def _trained(parameter: nn.Parameter) -> Tensor:
    """What the optimizer steps: a low-precision parameter's fp32 copy, or the parameter itself."""
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


def _settings(part: Any, parameter: nn.Parameter) -> Mapping[str, Any] | None:
    """A parameter's group; None where this rank holds nothing of it."""
    if isinstance(part, DistributedOptimizer):
        place = part.model_param_group_index_map.get(parameter)
        return None if place is None else part.param_groups[place[0]]
    trained = _trained(parameter)
    return next((group for group in part.param_groups if any(each is trained for each in group["params"])), None)


def _piece(part: Any, parameter: nn.Parameter) -> _Piece | None:
    """What is known here of a parameter; None where this rank holds nothing of it."""
    settings = _settings(part, parameter)
    if settings is None:
        return None
    if _is_layer_wise(part):
        return _piece(next(each for each in part.chained_optimizers if _settings(each, parameter) is not None), parameter)
    inner = getattr(part, "optimizer", part)
    if isinstance(part, DistributedOptimizer):
        _, order = part.model_param_group_index_map[parameter]
        span = part._get_model_param_range_map(parameter)["param"]
        weight, where = parameter.detach().view(-1)[span.start : span.end], slice(span.start, span.end)
        if not inner.state.get(settings["params"][order]):
            return _Piece(inner, {}, settings, where, weight, weight)
        # Decodes what a precision-aware optimizer keeps in fewer bits.
        state = part._get_main_param_and_optimizer_states(parameter)
        # What "param" is depends on how the optimizer stores it: as 16-bit remainders for one.
        return _Piece(inner, state, settings, where, weight, state["param"])
    trained = _trained(parameter)
    return _Piece(inner, inner.state.get(trained, {}), settings, slice(None), trained, trained)


def _decayed(piece: _Piece, direction: Tensor, decay: float) -> Tensor:
    """-lr (direction + decay * theta), where the moments are: an optimizer may keep them elsewhere than the model's weights."""
    if decay:
        direction = direction + decay * piece.weight.to(direction).view_as(direction)
    return -piece.settings["lr"] * direction


def _decoupled(piece: _Piece, known: tuple[str, ...]) -> float:
    """The weight decay that is not within the moments, of an optimizer that says which of several ways it decays.

    Raises:
        AttachError: the way is none of those known.
    """
    if (method := getattr(piece.optimizer, "weight_decay_method", "decoupled")) not in known:
        raise AttachError(
            f"{type(piece.optimizer).__name__} with weight_decay_method={method!r}: predictor='momentum' and 'lookahead' know "
            f"{' and '.join(map(repr, known))} only; use that, or predictor='learned'"
        )
    return float(piece.settings["weight_decay"]) if method == "decoupled" else 0.0


def _lion(piece: _Piece) -> Tensor:
    """Lion's next update of a piece if the gradient went on as its mean."""
    return _decayed(piece, piece.state["exp_avg"].float().sign(), _decoupled(piece, ("decoupled",)))


def _muon(piece: _Piece) -> Tensor:
    """Muon's next update of a piece if the gradient went on as its mean; collective where it orthogonalises over ranks."""
    # There is no such optimizer without the package.
    from emerging_optimizers.utils import fp32_matmul_precision

    settings, inner = dict(piece.settings), piece.optimizer
    del settings["params"]
    with fp32_matmul_precision(inner.fp32_matmul_prec):
        # The weight as the optimizer has it: attributes say how it is split.
        direction = inner.orthogonalize(piece.master, piece.state["momentum_buffer"], **settings)
    return _decayed(piece, direction, _decoupled(piece, ("decoupled", "l2")))


def _adam(piece: _Piece) -> Tensor:
    """Adam's next update of a piece if the gradient went on as its mean.

    Raises:
        AttachError: the optimizer keeps other moments than Adam's, or does not say how many updates it made.
    """
    state, settings, inner = piece.state, piece.settings, piece.optimizer
    if not {"exp_avg", "exp_avg_sq"} <= set(state) or "betas" not in settings:
        raise AttachError(
            f"the gates' {type(inner).__name__} keeps {sorted(state)}: predictor='momentum' reads Adam's exp_avg and exp_avg_sq; "
            "train the routers with Adam, or use predictor='learned'"
        )
    step = _steps(state, settings, inner)
    if step is None:
        raise AttachError(
            f"{type(inner).__name__} does not say how many updates it made, which Adam's bias correction needs; "
            "predictor='momentum' cannot read it: use predictor='learned'"
        )
    beta1, beta2 = settings["betas"]
    # Torch's Adam counts on the host unless it is capturable: a scalar argument of a kernel, without a copy to wait for.
    count = torch.as_tensor(step, dtype=torch.float64)
    mean = state["exp_avg"].float() / (1.0 - beta1**count).float()
    spread = (state["exp_avg_sq"].float() / (1.0 - beta2**count).float()).sqrt()
    # Adam's L2 form has the decay within its moments: torch says so in the group, fused optimizers in an attribute.
    decoupled = settings.get("decoupled_weight_decay", getattr(inner, "adam_w_mode", True))
    return _decayed(piece, mean / (spread + settings["eps"]), settings.get("weight_decay", 0.0) if decoupled else 0.0)


def _steps(state: Mapping[str, Any], settings: Mapping[str, Any], inner: Any) -> Any:
    """Updates so far: torch's Adam counts per parameter, Transformer Engine's per group, within an offloading one in its parts."""
    counts = [state.get("step"), settings.get("step")]
    counts += [group.get("step") for group in getattr(getattr(inner, "gpu_optimizer", None), "param_groups", ())]
    return next((count for count in counts if count is not None), None)
