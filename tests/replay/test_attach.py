"""attach(): what it accepts, what it refuses, what it leaves behind, and the life of a rollout batch."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter

from megatron_pr2.attach import PR2, ReplaySequence, attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError, RouteError
from megatron_pr2.replay.router import PredictiveTopKRouter
from megatron_pr2.routes.table import RouteTable
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.ids import random_ids

pytestmark = pytest.mark.usefixtures("host_platform")

PR2_CONFIG = toy.preset("pr2", sample_fraction=0.5)
LENGTHS = {0: 40, 1: 60}


class CustomRouter(TopKRouter):
    """Somebody's router with a selection of its own."""


class DerivedRouter(PredictiveTopKRouter):
    """Somebody's router on the class that the error message recommends."""


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "router_class", "message"),
    [
        ({"moe_router_load_balancing_type": "sinkhorn"}, TopKRouter, "sinkhorn"),
        ({"moe_enable_routing_replay": True}, TopKRouter, "moe_enable_routing_replay"),
        ({}, CustomRouter, "router class CustomRouter .* derive it from megatron_pr2.replay.router.PredictiveTopKRouter"),
    ],
)
def test_routers_that_cannot_be_replayed(changes: dict[str, Any], router_class: type, message: str) -> None:
    chunk = toy.ToyChunk(toy.toy_config(**changes), router_class=router_class)
    with pytest.raises(AttachError, match=f"decoder.layers.0.mlp.router: .*{message}"):
        attach(chunk, PR2_CONFIG)
    assert all(type(router) is router_class for router in toy.routers(chunk))


def test_nothing_is_changed_when_a_later_router_is_refused() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    chunk.decoder.layers[1].mlp.router.__class__ = CustomRouter
    with pytest.raises(AttachError, match=r"layers\.1"):
        attach(chunk, PR2_CONFIG)
    assert type(toy.routers(chunk)[0]) is TopKRouter


def test_attaching_twice() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, PR2_CONFIG)
    with pytest.raises(AttachError, match=r"already attached; call detach\(\)"):
        attach(chunk, PR2_CONFIG)
    pr2.detach()
    attach(chunk, PR2_CONFIG)


def test_models_without_experts_and_no_model() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    chunk.config = toy.toy_config(num_moe_experts=None, moe_ffn_hidden_size=None)
    with pytest.raises(AttachError, match="num_moe_experts is not set"):
        attach(chunk, PR2_CONFIG)
    with pytest.raises(AttachError, match="no model chunk"):
        attach([], PR2_CONFIG)


def wrong_layout_job(kind: str) -> str:
    from megatron_pr2 import host

    order = {"order": "cp-tp-ep-dp-pp"} if kind == "order" else {}
    if kind == "groups":
        try:
            attach(toy.ToyChunk(toy.toy_config()), PR2_CONFIG)
        except AttachError as error:
            return str(error)
    if kind == "order":
        host.enable()
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2, **order)
        config = toy.toy_config(tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True)
    else:
        host.init(context=2)
        config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    try:
        attach(chunk, PR2_CONFIG)
    except AttachError as error:
        assert type(toy.routers(chunk)[0]) is TopKRouter
        return str(error)
    return "attached"


@pytest.mark.parametrize(
    ("kind", "ranks", "message"),
    [
        ("order", 4, "it would lose expert gradients"),
        ("config", 2, "context_parallel_size=1, Megatron-Core's process groups say 2"),
        ("groups", 2, "2 processes, but Megatron-Core's parallel_state is not initialised"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused_on_all_ranks(kind: str, ranks: int, message: str) -> None:
    errors = pool(ranks).run(wrong_layout_job, kind, timeout=60.0)
    assert all(message in error for error in errors)


def test_wrong_or_repeated_layer_numbers() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    toy.routers(chunk)[1].set_layer_number(1)
    with pytest.raises(AttachError, match="both claim layer_number 1"):
        attach(chunk, PR2_CONFIG)
    chunk = toy.ToyChunk(toy.toy_config())
    toy.routers(chunk)[1].set_layer_number(3)
    with pytest.raises(AttachError, match="layer_number 3 is not a MoE layer"):
        attach(chunk, PR2_CONFIG)


def other_router(setting: str) -> toy.ToyChunk:
    """A model whose last layer's router is of another kind than its config says."""
    chunk = toy.ToyChunk(toy.toy_config())
    changes = {"num_moe_experts": 16, "moe_router_topk": 3, "moe_router_score_function": "sigmoid", "hidden_size": 64}
    other = toy.ToyChunk(toy.toy_config(**{setting: changes[setting]}))
    chunk.decoder.layers[1].mlp = other.decoder.layers[1].mlp
    return chunk


@pytest.mark.parametrize(
    ("setting", "values"),
    [("num_moe_experts", "16, the model's config 8"), ("moe_router_topk", "3, the model's config 2"),
     ("moe_router_score_function", "'sigmoid', the model's config 'softmax'"), ("hidden_size", "64, the model's config 32")],
)  # fmt: skip
def test_a_layer_that_differs_from_the_config_is_refused_by_name(setting: str, values: str) -> None:
    """Ids of one layer would be looked up among another one's experts, and drift measured by the wrong divergence."""
    chunk = other_router(setting)
    with pytest.raises(AttachError, match=rf"decoder\.layers\.1\.mlp\.router: this layer's router has {setting}={values}"):
        attach(chunk, PR2_CONFIG)
    assert all(type(router) is TopKRouter for router in toy.routers(chunk))


def test_routers_that_are_nowhere_are_missed() -> None:
    """A vision-language wrapper, or a forgotten chunk: silently replaying nothing is what happened elsewhere."""
    wrapper = torch.nn.Module()
    wrapper.config = toy.toy_config()
    wrapper.language_model = toy.ToyChunk(wrapper.config)
    with pytest.raises(AttachError, match=r"no router found for the MoE layers \[0, 1\]"):
        attach(wrapper, PR2_CONFIG)
    with pytest.raises(AttachError, match=r"no router found for the MoE layers \[0\]"):
        attach(toy.ToyChunk(toy.toy_config(), layers=[2]), PR2_CONFIG)
    attach(wrapper.language_model, PR2_CONFIG)


# ---- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frequency", "layers"), [(1, [0, 1, 2, 3]), (2, [0, 2]), ([0, 1, 1, 1], [1, 2, 3]), ([0, 0, 1, 0], [2])]
)
def test_layers_are_numbered_globally(frequency: Any, layers: list[int]) -> None:
    chunk = toy.ToyChunk(toy.toy_config(num_layers=4, moe_layer_freq=frequency))
    pr2 = attach(chunk, PR2_CONFIG)
    assert pr2.moe_layers == tuple(layers)
    assert [site.layer for site in pr2.sites] == layers
    assert [site.column for site in pr2.sites] == [site.local for site in pr2.sites] == list(range(len(layers)))
    assert pr2.predictor is not None
    assert pr2.predictor.weight_LEH.shape == (len(layers), toy.EXPERTS, toy.HIDDEN)


def test_construction_order_does_not_matter() -> None:
    """Chunks in any order; sites ascend by layer and remember their chunk."""
    config = toy.toy_config(num_layers=4)
    chunks = [toy.ToyChunk(config, layers=[2, 4]), toy.ToyChunk(config, layers=[3, 1])]
    pr2 = attach(chunks, PR2_CONFIG)
    assert [(site.layer, site.chunk) for site in pr2.sites] == [(0, 1), (1, 0), (2, 1), (3, 0)]


def test_mtp_heads_are_left_alone() -> None:
    """They restart the numbering at 1 and would alias decoder layers."""
    chunk = toy.ToyChunk(toy.toy_config(), mtp=True)
    pr2 = attach(chunk, PR2_CONFIG)
    assert len(pr2.sites) == toy.LAYERS
    assert type(chunk.mtp.layers[0].mlp.router) is TopKRouter


def test_a_derived_router_keeps_its_class() -> None:
    chunk = toy.ToyChunk(toy.toy_config(), router_class=DerivedRouter)
    pr2 = attach(chunk, PR2_CONFIG)
    assert all(type(router) is DerivedRouter for router in toy.routers(chunk))
    pr2.detach()
    assert all(type(router) is DerivedRouter for router in toy.routers(chunk))


# ---- what is left behind ---------------------------------------------------------------------------------------------


def test_detach_gives_the_routers_back() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    before = [dict(router.__dict__) for router in toy.routers(chunk)]
    x = toy.token_inputs(toy.batches(LENGTHS, 2)[0].micro_batch.grid)
    expected = chunk(x)
    pr2 = attach(chunk, PR2_CONFIG)
    pr2.predictor.weight_LEH.normal_()
    assert torch.equal(chunk(x), expected)  # attached, but outside of any session
    pr2.detach()
    assert [type(router) for router in toy.routers(chunk)] == [TopKRouter] * toy.LAYERS
    assert [router.__dict__.keys() for router in toy.routers(chunk)] == [d.keys() for d in before]
    assert torch.equal(chunk(x), expected)
    with pytest.raises(AttachError, match="was detached"):
        pr2.begin_rollout([])


def test_the_predictor_is_no_part_of_the_model() -> None:
    """Exporters, offloaders, DDP and optimizers walk parameters, buffers and state dicts."""
    chunk = toy.ToyChunk(toy.toy_config())
    names = [list(dict(f()).keys()) for f in (chunk.named_parameters, chunk.named_buffers, chunk.state_dict)]
    identities = [id(p) for p in chunk.parameters()]
    attach(chunk, PR2_CONFIG)
    assert names == [list(dict(f()).keys()) for f in (chunk.named_parameters, chunk.named_buffers, chunk.state_dict)]
    assert identities == [id(p) for p in chunk.parameters()]


@pytest.mark.parametrize("wrap", ["bfloat16", "Float16Module"])
def test_the_predictor_stays_in_fp32(wrap: str) -> None:
    config = toy.toy_config(bf16=True)
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, PR2_CONFIG)
    model = chunk.bfloat16() if wrap == "bfloat16" else Float16Module(config, chunk)
    assert toy.routers(model)[0].weight.dtype == torch.bfloat16
    assert pr2.predictor.weight_LEH.dtype == torch.float32
    with pr2.merged_gates():
        assert toy.routers(model)[0].weight.dtype == torch.bfloat16


def test_wrapped_models_are_looked_into() -> None:
    config = toy.toy_config(bf16=True)
    pr2 = attach(Float16Module(config, toy.ToyChunk(config)), PR2_CONFIG)
    assert len(pr2.sites) == toy.LAYERS


# ---- a rollout batch -------------------------------------------------------------------------------------------------


def begin(config: PR2Config, **changes: Any) -> Any:
    """begin_rollout on the toy with sequence 1 changed."""
    toy_config = toy.toy_config()
    tables = toy.random_tables(LENGTHS, toy_config)
    sequences = toy.sequences(LENGTHS, tables)
    sequences[1] = ReplaySequence(**{**vars(sequences[1]), **changes})
    return attach(toy.ToyChunk(toy_config), config).begin_rollout(sequences)


def table(tokens: int = 60, layers: int = 2, topk: int = 2, experts: int = 8, missing: int = 0) -> RouteTable:
    ids = random_ids(tokens, layers, topk, experts)
    ids[:missing] = -1
    ids[-1] = -1
    return RouteTable.from_ids(ids, experts)


def test_the_report_counts() -> None:
    report = begin(PR2_CONFIG)
    assert report.tokens == 39 + 59  # the last tokens have no route by nature
    assert report.missing == 0
    assert report.route_bytes == (40 + 60) * 4 + 5 + 8


def kept_features(config: PR2Config, tables: dict[int, RouteTable], lengths: dict[int, int]) -> PR2:
    """A handle after its log-prob pass."""
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, config)
    pr2.begin_rollout(toy.sequences(lengths, tables))
    toy.old_logprobs(pr2, chunk, toy.batches(lengths, 1))
    return pr2


def test_features_are_counted() -> None:
    pr2 = kept_features(PR2_CONFIG, toy.random_tables(LENGTHS, toy.toy_config()), LENGTHS)
    assert pr2.feature_plan.sampled_tokens == round(0.5 * 37) + round(0.5 * 57)
    assert pr2.measurement.sample_fraction == 0.5
    assert pr2.features.nbytes == pr2.feature_plan.sampled_tokens * 2 * (toy.HIDDEN * 2 + toy.EXPERTS * 4)


def test_a_missing_table_is_refused() -> None:
    with pytest.raises(RouteError, match="sequence 1: routes='engine' but there are none on the rank that owns them"):
        begin(PR2_CONFIG, routes=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 0}, "sequence id 0 is negative, has more than 63 bits or is given twice"),
        ({"id": -1}, "sequence id -1 is negative"),
        ({"loss_stop": 61}, r"sequence 1: loss-bearing positions \[2, 61\) are outside its 60 tokens"),
        ({"loss_start": 59, "loss_stop": 58}, r"\[59, 58\) are outside"),
    ],
)
def test_sequences_that_contradict_themselves_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        begin(PR2_CONFIG, **changes)


@pytest.mark.parametrize("wrong", [{"tokens": 59}, {"layers": 3}, {"topk": 3}, {"experts": 9}])
def test_tables_of_another_shape_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RouteError, match=r"sequence 1: .*expected \(60, 2, 2, 8\)"):
        begin(PR2_CONFIG, routes=table(**wrong))


def test_too_many_missing_rows_fail_or_warn(caplog: pytest.LogCaptureFixture) -> None:
    message = r"2 of 98 tokens \(2.0%\) have no valid route.*worst of this rank is sequence 1 with 2 of 60"
    with pytest.raises(RouteError, match=message):
        begin(toy.preset("pr2", max_missing_share=0.02), routes=table(missing=2))
    assert begin(toy.preset("pr2", max_missing_share=0.021), routes=table(missing=2)).missing == 2
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        report = begin(toy.preset("pr2", max_missing_share=0.02, strict=False), routes=table(missing=2))
    assert report.missing == 2
    assert "2 of 98 tokens" in caplog.text


def test_only_loss_bearing_tokens_with_a_route_are_sampled() -> None:
    tables = toy.random_tables({0: 20}, toy.toy_config(), missing=[(0, 7), (0, 11)])
    pr2 = kept_features(toy.preset("pr2", sample_fraction=1.0, max_missing_share=1.0), tables, {0: 20})
    (segment,) = pr2.features.segments
    assert segment.tokens.tolist() == [p for p in range(2, 19) if p not in (7, 11)]


def test_a_byte_budget_lowers_the_share_of_tokens() -> None:
    per_token = 2 * (toy.HIDDEN * 2 + toy.EXPERTS * 4)
    config = toy.preset("pr2", sample_fraction=1.0, feature_bytes=40 * per_token)
    pr2 = kept_features(config, toy.random_tables(LENGTHS, toy.toy_config()), LENGTHS)
    assert pr2.feature_plan.sampled_tokens == 40
    assert pr2.measurement.sample_fraction == pr2.feature_plan.share == pytest.approx(40 / 94, abs=0.15)


def test_features_that_were_never_kept_are_counted() -> None:
    """The old-log-prob pass saw sequence 0 only."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0))
    pr2.begin_rollout(toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config)))
    toy.old_logprobs(pr2, chunk, toy.batches({0: 40}, 1))
    toy.update(pr2, chunk, toy.batches(LENGTHS, 2), 2)
    report = pr2.step(0.1)
    assert report["features_absent"] == 57
    assert report["predictor"]["tokens"] == 2 * 37
    assert report["drift"]["tokens"] == [37.0, 37.0]
    assert pr2.step(0.1)["features_absent"] == 0


# ---- weights for the engine, state -----------------------------------------------------------------------------------


def hf_weights(name: str, layers: range = range(2)) -> list[tuple[str, torch.Tensor]]:
    """Every gate and names that look like one."""
    out = []
    for layer in layers:
        prefix = f"model.layers.{layer}.{name}"
        out += [
            (f"{prefix}.gate.weight", torch.randn(toy.EXPERTS, toy.HIDDEN)),
            (f"{prefix}.gate.e_score_correction_bias", torch.randn(toy.EXPERTS)),
            (f"{prefix}.gate_proj.weight", torch.randn(4, 4)),
            (f"{prefix}.shared_expert_gate.weight", torch.randn(1, 4)),
            (f"{prefix}.experts.0.gate.weight", torch.randn(toy.EXPERTS, toy.HIDDEN)),
        ]
    return [*out, ("lm_head.weight", torch.randn(3, 3))]


@pytest.mark.parametrize("name", ["mlp", "block_sparse_moe", "feed_forward"])
def test_engine_weights_merge_the_gates_and_nothing_else(name: str) -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), PR2_CONFIG)
    pr2.predictor.weight_LEH.normal_()
    # A multi-token-prediction head follows the decoder in the numbering; it has no predictor.
    weights = hf_weights(name, range(3))
    pushed = list(pr2.engine_weights(iter(weights)))
    for (key, tensor), (pushed_key, pushed_tensor) in zip(weights, pushed, strict=True):
        assert key == pushed_key
        gates = [f"model.layers.{layer}.{name}.gate.weight" for layer in range(2)]
        if key in gates:
            expected = tensor + pr2.predictor.weight_LEH[gates.index(key)]
            assert torch.equal(pushed_tensor, expected)
        else:
            assert pushed_tensor is tensor


def test_engine_weights_of_another_naming_fail_after_the_last_one() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), PR2_CONFIG)
    for weights in (hf_weights("moe"), hf_weights("mlp", range(1)), []):
        seen = []
        with pytest.raises(AttachError, match=r"the model has MoE layers \[0, 1\]; (their names do not follow|.*own_stage)"):  # noqa: PT012
            for name, _ in pr2.engine_weights(iter(weights)):
                seen.append(name)
        assert seen == [name for name, _ in weights]


def test_without_a_predictor_weights_pass_through() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("r3"))
    weights = hf_weights("anything")
    assert [t is u for (_, t), (_, u) in zip(weights, pr2.engine_weights(iter(weights)), strict=True)] == [True] * len(weights)
    with pr2.merged_gates():
        pass


def pipeline_job() -> dict[str, Any]:
    """Stage 0 holds a dense layer only, stage 1 the model's only MoE layer."""
    from megatron_pr2 import host

    host.init(pipeline=2)
    stage = torch.distributed.get_rank()
    config = toy.toy_config(moe_layer_freq=[0, 1], pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    try:
        attach(toy.ToyChunk(config, layers=[1]), PR2_CONFIG)  # no rank holds layer 1 then
        refused = ""
    except AttachError as error:
        refused = str(error)
    chunk = toy.ToyChunk(config, layers=[stage + 1])
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0))
    sequences = toy.sequences(LENGTHS, toy.random_tables(LENGTHS, config))
    data = toy.batches(LENGTHS, 1)
    reports = []
    for told in (None, "unknown"):
        pr2.begin_rollout(sequences, version=told)
        toy.old_logprobs(pr2, chunk, data)
        toy.drift(chunk)
        toy.update(pr2, chunk, data, 2)
        reports.append(pr2.step(0.1))
        with pr2.merged_gates("pushed"):
            pass
    report = reports[0]
    gate = torch.zeros(toy.EXPERTS, toy.HIDDEN)
    weights = dict(pr2.engine_weights([("model.layers.1.mlp.gate.weight", gate)]))
    if pr2.sites:  # a stage that sends its own layers does not wait for the other
        own = dict(pr2.engine_weights([("model.layers.1.mlp.gate.weight", gate)], own_stage=True))
        assert torch.equal(own["model.layers.1.mlp.gate.weight"], weights["model.layers.1.mlp.gate.weight"])
    return {
        "refused": refused,
        "sites": len(pr2.sites),
        "tokens": report["predictor"]["tokens"],
        "drift": report["drift"]["tokens"],
        "same": [[(name, list(value) if isinstance(value, dict) else 0) for name, value in each.items()] for each in reports],
        "norm": weights["model.layers.1.mlp.gate.weight"].norm().item(),
        "layers": [site.layer for site in pr2.sites],
    }


def test_a_pipeline_rank_without_any_moe_layer_takes_part() -> None:
    first, last = pool(2).run(pipeline_job)
    assert "no router found for the MoE layers [1]" in first["refused"]
    assert first["refused"] == last["refused"]
    assert (first["sites"], last["sites"]) == (0, 1)
    assert first["tokens"] == last["tokens"] == 37 + 57  # reports are of the whole model
    assert first["drift"] == last["drift"] == [37 + 57]
    assert first["norm"] == last["norm"] > 0.1
    assert first["same"] == last["same"]
    assert all(("delivered", 0) in each for each in first["same"])
    assert (first["layers"], last["layers"]) == ([], [1])


@pytest.mark.parametrize("fails", [False, True])
def test_merged_gates_come_back_bit_by_bit(fails: bool) -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, PR2_CONFIG)
    pr2.predictor.weight_LEH.normal_()
    gates = [router.weight for router in toy.routers(chunk)]
    before = [(id(w), w.data_ptr(), w.detach().clone()) for w in gates]
    try:
        with pr2.merged_gates():
            for site, (_, _, saved) in zip(pr2.sites, before, strict=True):
                assert torch.equal(site.router.weight, saved + pr2.predictor.weight_LEH[site.local])
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    for router, (identity, pointer, saved) in zip(toy.routers(chunk), before, strict=True):
        assert (id(router.weight), router.weight.data_ptr()) == (identity, pointer)
        assert torch.equal(router.weight, saved)


def test_a_mini_step_that_was_not_ended_is_not_learned_from() -> None:
    """A trainer that stops early leaves out step(); the next rollout batch starts from nothing."""
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0))
    tables, data = toy.random_tables(LENGTHS, config), toy.batches(LENGTHS, 2)
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    toy.old_logprobs(pr2, chunk, data)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    assert pr2.predictor.token_count_L.sum() > 0
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    assert pr2.predictor.token_count_L.sum() == 0
    assert not pr2.predictor.grad_sum_LEH.any()
    report = pr2.step(0.1)
    assert report["predictor"]["tokens"] == report["drift"]["tokens"][0] == 0


def test_part_of_the_gates_is_not_blamed_on_their_names() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), PR2_CONFIG)
    with pytest.raises(AttachError, match=r"merged the gates of layers \[0\].*say own_stage=True"):
        list(pr2.engine_weights(hf_weights("mlp", range(1))))


# ---- other releases, other replays -----------------------------------------------------------------------------------


def somebody_elses_routing(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("never called")


@pytest.mark.parametrize("wrapped", [False, True], ids=["replaced", "wrapped by functools.wraps"])
@pytest.mark.parametrize("method", ["__init__", "routing", "gating", "forward"])
def test_a_patched_router_is_refused(method: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    patch: Any = somebody_elses_routing
    if wrapped:

        @functools.wraps(getattr(TopKRouter, method))
        def patch(self: Any, *args: Any, **kwargs: Any) -> Any:
            return somebody_elses_routing(self, *args, **kwargs)

    monkeypatch.setattr(TopKRouter, method, patch)
    with pytest.raises(AttachError, match=rf"TopKRouter\.{method} was replaced by tests\.replay\.test_attach.*switch that one off"):
        attach(chunk, PR2_CONFIG)
    assert all(type(router) is TopKRouter for router in toy.routers(chunk))
    monkeypatch.undo()
    attach(chunk, PR2_CONFIG).detach()


def test_a_release_without_the_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(logits: torch.Tensor, topk: int, use_pre_softmax: bool = False, num_groups: Any = None) -> None: ...

    monkeypatch.setattr("megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function", older)
    with pytest.raises(AttachError, match=r"has no .*topk_routing_with_score_function\(router_replay=\).*tried on: 0\.16\.1, "):
        attach(toy.ToyChunk(toy.toy_config()), PR2_CONFIG)


# ---- numbers for a logger --------------------------------------------------------------------------------------------


def test_metrics_are_the_means_of_the_report() -> None:
    chunk = toy.ToyChunk(toy.toy_config())
    pr2 = attach(chunk, toy.preset("pr2", sample_fraction=1.0, hold_back=True))
    assert pr2.metrics() == {}
    data, tables = toy.batches(LENGTHS, 2), toy.random_tables(LENGTHS, chunk.config, [(0, 1)])
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    tokens = sum(length - 1 for length in LENGTHS.values())
    assert pr2.metrics() == {"pr2/missing_share": 1 / tokens}
    toy.old_logprobs(pr2, chunk, data)
    toy.drift(chunk)
    toy.update(pr2, chunk, data, 2)
    report, metrics = pr2.step(0.1), pr2.metrics()
    for name in ("agreement", "lift", "kl_predicted", "changed_0"):
        assert metrics[f"pr2/{name}"] == pytest.approx(sum(report["drift"][name]) / toy.LAYERS)
    assert metrics["pr2/predictor/grad_norm"] == report["predictor"]["grad_norm"] > 0
    assert metrics["pr2/hold_back/beta"] == 0.0
    assert metrics["pr2/engine_agreement"] == pr2.engine_agreement
    assert metrics["pr2/missing_share"] == 1 / tokens
    # A step without a sampled token measures nothing, and says so by absence.
    report, metrics = pr2.step(0.1), pr2.metrics()
    assert math.isnan(report["drift"]["agreement"][0])
    assert "pr2/agreement" not in metrics
    metrics["pr2/agreement"] = 1.0  # the caller's own copy
    assert "pr2/agreement" not in pr2.metrics()
