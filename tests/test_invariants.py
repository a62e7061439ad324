"""The design's invariants I1, I2, I5, I7 and I8. I4 is in test_replay.py."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pr2.attach import PR2, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.drift.moments import EXPLAINED, MOMENTS
from megatron_pr2.parallel.grid import padded
from megatron_pr2.parallel.groups import everyone
from megatron_pr2.parallel.tokens import sample_positions
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.passes import agree_on_outcome, agree_on_pass
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.divergence import kl
from tests.helpers.loop import train_job
from tests.helpers.rounding import assert_near, rounding

pytestmark = pytest.mark.usefixtures("host_platform")

LENGTHS = {0: 17, 1: 23, 2: 9}
HALF = toy.preset("pr2", sample_fraction=0.5, max_missing_share=1.0)
MISSING = [(0, 5), (1, 20), (1, 8)]


# ---- I1, I2: the predictor and the policy ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Two steps of r3, pr2 that does not learn, and pr2, each on two ranks."""
    directory = tmp_path_factory.mktemp("runs")
    presets = {
        "r3": ["preset=r3"],
        "zero": ["preset=pr2", "pr2.alpha=0", "pr2.hold_back=false"],
        "held": ["preset=pr2", "pr2.alpha=3"],
        "pr2": ["preset=pr2", "pr2.alpha=3", "pr2.hold_back=false"],
    }
    jobs = [(directory / name, ["steps=2", *overrides], False) for name, overrides in presets.items()]
    results = pool(2).run(train_job, tiny_checkpoint, jobs)
    return {name: [result[i] for result in results] for i, name in enumerate(presets)}


def same(a: Any, b: Any) -> bool:
    """Equal, NaN included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def without(record: Any, *names: str) -> Any:
    """The record less what one of two runs measures in addition, wherever in it that is."""
    if isinstance(record, list):
        return [without(each, *names) for each in record]
    return {k: without(v, *names) for k, v in record.items() if k not in names} if isinstance(record, dict) else record


def test_the_runs_are_not_trivial(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Rewards differ within groups, the policy moves, routes drift: otherwise the tests below prove nothing."""
    for rank in range(2):
        weights = runs["r3"][rank]["weights"]
        assert len(set(weights)) == len(weights) == 8
    records = runs["r3"][0]["records"]
    assert 0.1 < records[0]["reward"] < 0.9
    assert records[0]["mini_steps"][1]["kl_frozen"] > 1e-4
    assert records[0]["grad_norm"] > 1e-3


def test_i1_a_zero_predictor_is_r3_bit_by_bit(runs: dict[str, list[dict[str, Any]]]) -> None:
    for zero, r3 in zip(runs["zero"], runs["r3"], strict=True):
        for name in ("rollouts", "samples", "weights", "optimizer"):
            assert zero[name] == r3[name], name
        for a, b in zip(zero["records"], r3["records"], strict=True):
            assert same(*(without(each, "preset", "predictor", "delivered", "bytes", *MOMENTS, *EXPLAINED) for each in (a, b)))
            # r3 keeps no router inputs.
            assert a["bytes"]["features"] > b["bytes"]["features"] > 0
        assert zero["records"][0]["predictor"]["grad_norm"] > 0.0
        assert zero["predictor"] == 0.0


def test_i1_a_prediction_that_is_held_back_is_r3_bit_by_bit(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Two rollout batches are too few to use any prediction, however much was learned."""
    for held, r3 in zip(runs["held"], runs["r3"], strict=True):
        assert held["predictor"] > 0.1
        assert held["records"][-1]["hold_back"]["beta"] == [0.0, 0.0]
        for name in ("rollouts", "samples", "weights", "optimizer"):
            assert held[name] == r3[name], name


def test_i2_a_learning_predictor_does_not_touch_the_policy(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Within the first rollout batch the routes are the same, so every policy update must be."""
    for learning, r3 in zip(runs["pr2"], runs["r3"], strict=True):
        assert learning["predictor"] > 0.1  # it learns from mini-step 2 on, so W_p is not zero in mini-steps 3 and 4
        assert learning["rollouts"][0] == r3["rollouts"][0]
        for name in ("samples", "weights", "optimizer"):
            assert learning[name][:4] == r3[name][:4], name
        for key in ("policy_loss", "grad_norm", "clip_fraction"):
            assert learning["records"][0][key] == r3["records"][0][key]
        # From the second batch on the rollouts are the merged gates'.
        assert learning["rollouts"][1] != r3["rollouts"][1]


def test_ranks_report_the_same(runs: dict[str, list[dict[str, Any]]]) -> None:
    for first, second in runs.values():
        assert same(first["records"], second["records"])
        assert first["predictor"] == second["predictor"]


# ---- I5: the predictor's gradient through a whole session ------------------------------------------------------------


def by_token(calls: list[toy.Call], data: list[toy.Batch], chunk: torch.nn.Module) -> dict[tuple[int, int, int], Any]:
    """(layer, sequence, position) -> (router input, logits), from what the routers saw."""
    seen = {}
    for call in (c for c in calls if not c.recomputed):
        logits = call.hidden_TH @ toy.routers(chunk)[call.layer].weight.detach().t()
        for row, key in enumerate(zip(*data[call.number].micro_batch.grid.rows(), strict=True)):
            if key[0] >= 0:
                seen[call.layer, int(key[0]), int(key[1])] = call.hidden_TH[row], logits[row]
    return seen


def mini_step(
    config: Any, pr2_config: PR2Config, lengths: dict[int, int], *, recompute: bool = False
) -> tuple[PR2, dict[Any, Any], dict[Any, Any], dict[int, Any], Tensor]:
    """A rollout batch up to the predictor's gradient: (pr2, old and new (h, p) by token, tables, W_p).

    The passes cut micro-batches differently.
    """
    chunk = toy.ToyChunk(config, recompute=recompute)
    pr2 = attach(chunk, pr2_config)
    generator = torch.Generator().manual_seed(3)
    assert pr2.predictor is not None
    pr2.predictor.weight_LEH.normal_(0.0, 0.1, generator=generator)
    tables = toy.random_tables(lengths, config, MISSING)
    pr2.begin_rollout(toy.sequences(lengths, tables))
    first, second = toy.batches(lengths, 2), toy.batches(dict(reversed(lengths.items())), 1)
    with toy.observed(chunk) as calls:
        toy.old_logprobs(pr2, chunk, first)
    old = by_token(calls, first, chunk)
    toy.drift(chunk)
    with toy.observed(chunk) as calls:
        toy.update(pr2, chunk, second, 2)
    new = by_token(calls, second, chunk)
    return pr2, old, new, tables, pr2.predictor.weight_LEH.clone()


def autograd_gradient(
    layer: int, w_EH: Tensor, tokens: list[tuple[int, int]], old: dict[Any, Any], new: dict[Any, Any], target: str, function: str
) -> Tensor:
    """Gradient of the mean KL over tokens, in float64, by autograd."""
    keys = [(layer, *token) for token in tokens]
    h_old = torch.stack([old[key][0] for key in keys]).bfloat16().double()  # kept in bf16
    p_old = torch.stack([old[key][1] for key in keys]).double()
    p = torch.stack([new[key][1] for key in keys]).double()
    w = w_EH.double().requires_grad_(True)
    loss = kl(p, p_old + h_old @ w.t(), function) if target == "post" else kl(p - p_old, h_old @ w.t(), "softmax")
    return torch.autograd.grad(loss.mean(), w)[0]


def sampled(pr2: PR2, tables: dict[int, Any], lengths: dict[int, int]) -> list[tuple[int, int]]:
    """Loss-bearing tokens with a route, of these the seeded sample."""
    out = []
    for sequence in toy.sequences(lengths, tables):
        span = np.arange(sequence.loss_start, sequence.loss_stop)
        span = span[tables[sequence.id].valid[span]]
        positions = sample_positions(pr2.config.seed, sequence.id, span, pr2.config.sample_fraction)
        out += [(sequence.id, int(p)) for p in positions]
    return out


@pytest.mark.parametrize("target", ["post", "delta"])
@pytest.mark.parametrize("kind", toy.ROUTERS)
def test_i5_a_sessions_gradient_is_autograd_of_the_mean_kl(kind: str, target: str) -> None:
    """Over exactly the sampled tokens: neither padding nor prompts nor tokens without a route or a sample contribute."""
    config = toy.toy_config(**toy.ROUTERS[kind])
    pr2_config = toy.preset("pr2", sample_fraction=0.4, target=target, max_missing_share=1.0, seed=5)
    pr2, old, new, tables, w_LEH = mini_step(config, pr2_config, LENGTHS, recompute=kind == "groups")
    assert pr2.predictor is not None
    tokens = sampled(pr2, tables, LENGTHS)
    assert 0 < len(tokens) < sum(LENGTHS.values()) / 2
    assert pr2.predictor.token_count_L.tolist() == [len(tokens)] * toy.LAYERS
    for layer in range(toy.LAYERS):
        expected = autograd_gradient(layer, w_LEH[layer], tokens, old, new, target, config.moe_router_score_function)
        actual = pr2.predictor.grad_sum_LEH[layer].double() / len(tokens)
        assert_near(actual, expected, len(tokens) * toy.HIDDEN, dtype=torch.float32)
        assert expected.abs().max() > 1e-3


def test_the_predictor_does_not_learn_in_the_first_mini_step() -> None:
    """Then the policy is still the one that the features come from."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0, alpha=1.0))
    pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config)))
    data = toy.batches(LENGTHS, 2)
    toy.old_logprobs(pr2, chunk, data)
    toy.update(pr2, chunk, data, 1)
    assert pr2.step(1.0)["predictor"] == {"tokens": 0.0, "grad_norm": 0.0, "weight_norm": 0.0}
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    report = pr2.step(0.01)["predictor"]
    assert report["tokens"] > 0
    assert report["weight_norm"] == pytest.approx(0.01 * math.sqrt(pr2.predictor.weight_LEH.numel()), rel=0.01)  # Adam's first step


def two_rank_job(shares: list[dict[int, int]]) -> tuple[dict[str, Any], Tensor]:
    from megatron_pr2 import host

    host.init()
    pr2, *_ = mini_step(toy.toy_config(), HALF, shares[dist.get_rank()])
    return pr2.step(0.1), pr2.predictor.weight_LEH


@pytest.mark.parametrize("second", [{2: 9}, {2: 2}])
def test_i5_two_ranks_are_one_process(second: dict[int, int]) -> None:
    """With different numbers of sampled tokens, also none at all (two tokens are all prompt)."""
    shares = [{0: 17, 1: 23}, second]
    results = pool(2).run(two_rank_job, shares)
    lengths = {**shares[0], **shares[1]}
    pr2, _, _, tables, _ = mini_step(toy.toy_config(), HALF, lengths)
    expected = pr2.step(0.1)
    assert expected["predictor"]["tokens"] == len(sampled(pr2, tables, lengths)) * toy.LAYERS
    for report, weight in results:
        bound = rounding(sum(lengths.values()), factor=32)  # Adam divides by what may be small
        torch.testing.assert_close(weight, pr2.predictor.weight_LEH, rtol=bound, atol=0.1 * bound)
        assert report["predictor"] == pytest.approx(expected["predictor"], rel=bound)
        for name, values in expected["drift"].items():
            assert report["drift"][name] == pytest.approx(values, rel=bound, abs=bound), name
    assert torch.equal(results[0][1], results[1][1])


def test_an_actor_that_records_can_predict_too() -> None:
    """routes=actor with a predictor: what is recorded is TopK(p_old + W_p h_old)."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", routes="actor"))
    pr2.predictor.weight_LEH.normal_(0.0, 0.1)
    pr2.begin_rollout(toy.sequences(LENGTHS, None))
    data = toy.batches(LENGTHS, 3)
    with toy.observed(chunk) as calls:
        toy.old_logprobs(pr2, chunk, data)
    for call in calls:
        p_TE = call.hidden_TH @ toy.routers(chunk)[call.layer].weight.t()
        ids = (p_TE + call.hidden_TH @ pr2.predictor.weight_LEH[call.layer].t()).topk(toy.TOPK).indices
        assert torch.equal(call.map_TE, torch.zeros_like(call.map_TE).scatter(1, ids, True))
        assert not torch.equal(call.map_TE, torch.zeros_like(call.map_TE).scatter(1, p_TE.topk(toy.TOPK).indices, True))
        # The gate weights stay the live router's.
        torch.testing.assert_close(call.probs_TE.gather(1, ids), torch.softmax(p_TE.gather(1, ids), -1))
    with toy.observed(chunk) as again:
        toy.update(pr2, chunk, data, 1)
    rows = torch.from_numpy(data[0].micro_batch.grid.rows()[0] >= 0)
    assert all(torch.equal(a.map_TE[rows], b.map_TE[rows]) for a, b in zip(calls, again, strict=True))


# ---- I7: the engine's routes under merged gates ----------------------------------------------------------------------


def engine_job(path: Path) -> dict[str, Any]:
    """Generates with random W_p; returns the engine's routes, TopK(q_hat) and TopK(p) of the same tokens, and the export."""
    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import export_weights, load_model
    from megatron_pr2.rollout.base import RolloutRequest, SamplingParams
    from megatron_pr2.rollout.embedded import MegatronEngine

    host.init(expert=2)
    bridge, chunks = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    model = chunks[0].eval()
    pr2 = attach(model, toy.preset("pr2"))
    w_LEH = pr2.predictor.weight_LEH
    w_LEH.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    engine = MegatronEngine(model, pr2, pad_id=258)
    requests = [RolloutRequest(tuple(range(40 + 3 * i, 44 + 4 * i)), seed=i) for i in range(6)]
    responses = engine.generate(requests, SamplingParams(6), return_routes=True).responses
    sets: dict[str, list[Any]] = {"engine": [], "q_hat": [], "p": []}
    for response in responses:
        tokens = torch.tensor([response.token_ids])
        with toy.observed(model) as calls, torch.no_grad(), pr2.merged_gates():
            model(tokens, torch.arange(tokens.shape[1]).unsqueeze(0), None)
        for call in calls:
            h_TH = call.hidden_TH[:-1]
            p_TE = h_TH @ pr2.sites[call.layer].router.weight.t()  # W: the gates are the actor's own again
            q_hat_TE = p_TE + h_TH @ w_LEH[call.layer].t()
            routes = response.routes
            assert routes.valid.tolist() == [True] * (len(response.token_ids) - 1) + [False]
            sets["engine"] += np.sort(routes.experts[:-1, call.layer], 1).tolist()
            sets["q_hat"] += q_hat_TE.topk(2).indices.sort(1).values.tolist()
            sets["p"] += p_TE.topk(2).indices.sort(1).values.tolist()
    plain = {name: tensor.clone() for name, tensor in export_weights(bridge, chunks)}
    pushed = dict(pr2.engine_weights(export_weights(bridge, chunks)))
    gates = {f"model.layers.{layer}.mlp.gate.weight": w_LEH[layer] for layer in range(2)}
    return {
        **sets,
        "same names": list(plain) == list(pushed) and set(gates) <= set(plain),
        "gates merged": all(torch.equal(pushed[name], plain[name] + w) for name, w in gates.items()),
        "rest untouched": all(torch.equal(pushed[name], plain[name]) for name in plain if name not in gates),
    }


def test_i7_the_engine_takes_the_predicted_routes(tiny_checkpoint: Path) -> None:
    for result in pool(2).run(engine_job, tiny_checkpoint):
        assert len(result["engine"]) > 50
        assert result["engine"] == result["q_hat"]
        assert np.mean([a != b for a, b in zip(result["engine"], result["p"], strict=True)]) > 0.1
        assert result["same names"]
        assert result["gates merged"]
        assert result["rest untouched"]


# ---- I8: no host-device synchronisation ------------------------------------------------------------------------------

# Operators whose result, or the shape of it, the host has to wait for.
SYNCHRONISING = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "is_nonzero",
    "repeat_interleave.Tensor",
    "histc",
    "randint",  # the host's random numbers, which are then copied
)
# Methods that read on the host without an operator.
READING = ("tolist", "item", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__contains__")


class SyncCounter(TorchDispatchMode):
    """Counts operators that would stop the host until the device has caught up."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        boolean_index = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
            for a in args
            if isinstance(a, list | tuple)
            for i in a
        )
        if boolean_index or name.startswith(SYNCHRONISING):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class ReadCounter(TorchFunctionMode):
    """Counts methods that copy values to the host. What is then done with such a copy waits for nothing and is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rsplit(".", 1)[-1]
        tensors = [a for a in args if isinstance(a, Tensor)]
        copied = bool(tensors) and all(getattr(tensor, "host_copy", False) for tensor in tensors)
        reads = name in READING or (name == "to" and "cpu" in [a for a in args if isinstance(a, str)])
        if reads and not copied:
            self.found[name] += 1
        result = func(*args, **(kwargs or {}))
        # Without a device, a copy to the host may be the tensor itself, which stays what it is.
        if isinstance(result, Tensor) and (copied or (reads and all(result is not tensor for tensor in tensors))):
            result.host_copy = True
        return result


def counted(function: Callable[[], Any]) -> Counter[str]:
    with SyncCounter() as operators, ReadCounter() as reads:
        function()
    return operators.found + reads.found


def test_the_counter_counts() -> None:
    x = torch.arange(4.0)
    for sync in (
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: bool(x[0]),
        lambda: float(x[0]),
        lambda: x.unique(),
        lambda: x.numpy(),
        lambda: x.to("cpu"),
        lambda: torch.masked_select(x, x > 1),
        lambda: x.index_put_((x > 1,), torch.zeros(())),
        lambda: torch.randint(0, 2, (3,), generator=torch.Generator()),
    ):
        assert counted(sync), sync
    assert counted(lambda: (x.to("cpu", copy=True)[1:] / 2).tolist()) == Counter(to=1)
    assert counted(lambda: (x.to("cpu"), (x + 1).tolist())) == Counter(to=1, tolist=1)
    assert not counted(lambda: (x @ x, x.gather(0, torch.tensor([1])), x.index_select(0, torch.tensor([2])), x.topk(2)))


def reads(
    layers: int, micro_batches: int, *, recompute: bool = False, routes: str = "engine", context: int = 1, **settings: Any
) -> dict[str, Counter[str]]:
    """What every call of a rollout batch of two mini-steps makes the host wait for."""
    config = toy.toy_config(num_layers=layers, context_parallel_size=context)
    chunk = toy.ToyChunk(config, recompute=recompute)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0, max_missing_share=1.0, routes=routes, **settings))
    pr2.optimizer = torch.optim.Adam([site.router.weight for site in pr2.sites])
    lengths = {i: 17 + i for i in range(micro_batches)}
    tables = toy.random_tables(lengths, config, [(0, 4)]) if routes == "engine" else None

    def padded_to(width: int) -> list[toy.Batch]:
        grids = [padded([i], [n], width) for i, n in lengths.items()]
        rows = pr2.feature_plan._tp_cp.rows
        return [toy.Batch(MicroBatch(i, grid), toy.token_inputs(rows(grid))) for i, grid in enumerate(grids)]

    # The training passes are cut otherwise: routes are sliced and, among several ranks, features move once more.
    first, second = padded_to(20), padded_to(28)
    found = {"begin_rollout": counted(lambda: pr2.begin_rollout(toy.sequences(lengths, tables)))}
    found["old_logprobs"] = counted(lambda: toy.old_logprobs(pr2, chunk, first))
    assert (pr2.engine_agreement is None) == (routes == "actor")
    for number in (1, 2):
        toy.drift(chunk, seed=number)
        found[f"actor_update {number}"] = counted(lambda number=number: toy.update(pr2, chunk, second, number))
        reports: list[dict[str, Any]] = []
        found[f"step {number}"] = counted(lambda into=reports: into.append(pr2.step(0.1)))
        assert min(reports[0]["drift"]["tokens"]) > 0
        assert (reports[0]["predictor"]["tokens"] > 0) == (number == 2)
    if context > 1:
        assert pr2.feature_plan.moved_tokens > 0
        # Among several ranks a pass begins with telling each other its micro-batches, and ends with hearing who refuses it, once.
        told = counted(lambda: agree_on_pass(pr2.replica.ranks, [batch.micro_batch for batch in second]))
        assert told
        # Before the log-prob pass they agree on the share of tokens that features are kept of.
        agreed = counted(lambda: pr2.feature_plan._thin([], []))
        assert sum(agreed.values()) == 2
        assert not agreed - found["old_logprobs"]
        found["old_logprobs"] -= agreed
        heard = counted(lambda: agree_on_outcome(everyone(pr2.token_group), "a pass", None, pr2.token_check))
        assert sum(heard.values()) == 2  # one read, seen at two levels
        for name in ("old_logprobs", "actor_update 1", "actor_update 2"):
            assert not told + heard - found[name]
            found[name] -= told + heard
    return found


# Five reads per rollout batch of two mini-steps, and one that torch's Adam makes of its step count, which it keeps on the host.
READS = {
    "begin_rollout": Counter(),
    "old_logprobs": Counter(tolist=1),  # the engine's agreement
    "actor_update 1": Counter(),
    "step 1": Counter(to=1),  # the drift metrics
    "actor_update 2": Counter(),
    # The same, the predictor's tokens and gradient norm, and its weight norm. (item and float() count as an operator as well.)
    "step 2": Counter({"to": 1, "tolist": 1, "__float__": 1, "item": 1, "_local_scalar_dense.default": 2}),
}


def passes(layers: int, micro_batches: int, kind: str, recompute: bool, predictor: str) -> Counter[str]:
    """What the passes of a rollout batch make the host wait for."""
    # A learned predictor alone without hold-back, which does the least; or everything at once, pushed in bf16.
    settings = {"predictor": predictor, "hold_back": predictor != "learned"}
    dtype = torch.bfloat16 if settings["hold_back"] else torch.float32
    config = toy.toy_config(num_layers=layers, params_dtype=dtype, **toy.ROUTERS[kind])
    chunk = toy.ToyChunk(config, recompute=recompute)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=0.5, max_missing_share=1.0, **settings))
    pr2.optimizer = torch.optim.Adam([site.router.weight for site in pr2.sites])
    lengths = {i: 8 + i for i in range(micro_batches)}
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, config, [(0, 4)])))
    data = toy.batches(lengths, 1)
    with pr2.old_logprobs([b.micro_batch for b in data]) as session:
        found = counted(lambda: toy.run(session, chunk, data, backward=False))
    toy.drift(chunk)
    with pr2.actor_update([b.micro_batch for b in data], 2) as session:
        found += counted(lambda: toy.run(session, chunk, data))
    assert not settings["hold_back"] or pr2.measurement.pushes.in_use[0]._candidates
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "groups", "top-1"])
@pytest.mark.parametrize("predictor", ["learned", "learned+momentum"])
def test_i8_passes_do_not_wait_for_the_device(predictor: str, kind: str, recompute: bool) -> None:
    assert not passes(2, 3, kind, recompute, predictor)


@pytest.mark.parametrize("size", [(2, 1), (6, 1), (2, 4), (6, 4)])
def test_i8_the_reads_of_a_step_are_few_and_constant(size: tuple[int, int]) -> None:
    """However many layers and micro-batches there are."""
    assert reads(*size) == READS


def test_i8_hold_back_reads_once_more_and_no_more_for_more_layers() -> None:
    """What was counted, once per mini-step; what it then decides on the host is no wait, but is counted here as well."""
    few, many = (reads(*size, hold_back=True) for size in ((2, 1), (6, 4)))
    assert few == many
    for name, found in few.items():
        assert found["to"] == READS[name]["to"] + name.startswith("step")
        if not name.startswith(("step", "begin_rollout")):
            assert found == READS[name]


@pytest.mark.parametrize("recompute", [False, True])
def test_i8_recording_reads_no_more(recompute: bool) -> None:
    """An actor's own routes stay on the device, unless passes are cut differently: then they are read once per rollout batch."""
    cut_again = Counter({"cpu": 1, "numpy": 1})
    found = reads(3, 2, routes="actor", recompute=recompute)
    assert found == {**READS, "old_logprobs": Counter(), "actor_update 1": cut_again}


def reads_job(sizes: list[tuple[int, int]]) -> list[dict[str, Counter[str]]]:
    from megatron_pr2 import host

    host.init(context=2)
    return [reads(*size, context=2) for size in sizes]


def test_i8_moving_routes_and_features_reads_nothing() -> None:
    for few, many in pool(2).run(reads_job, [(2, 1), (6, 4)]):
        assert few == many
        # Beside what the ranks tell each other of the sequences, once per rollout batch, and of the micro-batches, once per pass.
        assert {**few, "begin_rollout": Counter()} == READS
