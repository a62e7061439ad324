"""ParallelLayout refuses exactly what Megatron-Core refuses or computes wrongly, and names the settings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pr2.errors import ConfigError
from megatron_pr2.parallel.grid import padded
from megatron_pr2.parallel.layout import CONFIG_NAMES, Coordinates, ParallelLayout
from megatron_pr2.parallel.ranks import ORDER
from tests.helpers.simulated import ORDERS, accepted, initialize, layouts, make_config, megatron_refuses, megatron_world


@st.composite
def doubtful(draw: st.DrawFn) -> dict[str, Any]:
    """A good layout of a small world with up to three settings changed at random."""
    sizes = draw(layouts(max_ranks=48, orders=tuple(ORDERS)))
    sizes |= {"num_attention_heads": sizes["tensor"] * draw(st.sampled_from([2, 3])), "num_query_groups": None}
    small = st.integers(1, 4)
    changes: dict[str, st.SearchStrategy[Any]] = {
        **dict.fromkeys(("tensor", "context", "pipeline", "data", "expert", "expert_tensor"), small),
        **dict.fromkeys(("virtual_pipeline", "layers_in_first", "layers_in_last", "num_query_groups"), st.none() | small),
        **dict.fromkeys(("account_for_embedding", "account_for_loss", "sequence_parallel"), st.booleans()),
        "num_experts": st.sampled_from([None, 4, 6]),
        "num_attention_heads": st.sampled_from([2, 3, 4, 6]),
        "num_layers": st.integers(1, 12),
        "order": st.sampled_from([*ORDERS, "tp-dp-pp", "tp-cp-dp-pp", "tp-cp-ep-dp"]),
        "pipeline_layout": st.sampled_from([None, "Ett|ttL", "E|t|t|tL", "tEt|L", "Ettt|tm|L", "EtttL"]),
    }
    for name in draw(st.lists(st.sampled_from(sorted(changes)), max_size=3)):
        sizes[name] = draw(changes[name])
    return sizes


@settings(max_examples=300)
@given(doubtful())
def test_refused_is_exactly_what_megatron_refuses(sizes: dict[str, Any]) -> None:
    assert (accepted(sizes) is None) == (megatron_refuses(sizes) is not None)


TWO_STAGES = {"pipeline": 2, "num_layers": 8}
REFUSED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    # name: (layout, what Megatron-Core says, what we name)
    "virtual-without-pipeline": (
        {"virtual_pipeline": 2, "num_layers": 8},
        "greater than 1 with interleaved schedule",
        ("virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size=1"),
    ),
    "layers-by-stages": (
        {**TWO_STAGES, "num_layers": 7},
        # num_layers and the stages; how they are named differs between releases.
        "should be divisible by",
        ("num_layers=7", "pipeline_model_parallel_size=2"),
    ),
    "layers-by-chunks": (
        {**TWO_STAGES, "virtual_pipeline": 3},
        "should be divisible by vp_size 3",
        ("num_layers=8", "virtual_pipeline_model_parallel_size=3"),
    ),
    "layers-with-loss": (
        {**TWO_STAGES, "account_for_loss": True},
        "must be divisible by middle pipeline_model_parallel_size 2",
        ("num_layers=8 + 1 (account_for_loss_in_pipeline_split)", "pipeline_model_parallel_size=2"),
    ),
    "uneven-with-loss": (
        {**TWO_STAGES, "layers_in_first": 3, "account_for_loss": True},
        "cannot beset at the same time",
        ("num_layers_in_first_pipeline_stage=3", "account_for_loss_in_pipeline_split=True"),
    ),
    "uneven-by-chunks": (
        {**TWO_STAGES, "layers_in_first": 3, "virtual_pipeline": 2},
        "must be divisible by virtual",
        ("num_layers_in_first_pipeline_stage=3", "virtual_pipeline_model_parallel_size=2"),
    ),
    "uneven-middle": (
        {"pipeline": 3, "num_layers": 8, "layers_in_last": 3},
        "must be divisible bythe middle pipeline",
        ("num_layers_in_last_pipeline_stage=3", "num_layers=8", "pipeline_model_parallel_size=3"),
    ),
    "uneven-rest": (
        {**TWO_STAGES, "layers_in_first": 3, "layers_in_last": 4},
        "Mismatch: 1 middle layers remaining",
        ("num_layers_in_last_pipeline_stage=4", "num_layers=8", "pipeline_model_parallel_size=2"),
    ),
    "uneven-one-stage": (
        {"num_layers": 8, "layers_in_first": 2, "layers_in_last": 2},
        "builds layers [0, 1] of 8",
        ("num_layers_in_last_pipeline_stage=2", "pipeline_model_parallel_size=1"),
    ),
    "uneven-too-many": (
        {**TWO_STAGES, "layers_in_first": 10},
        "builds layers",
        ("num_layers_in_first_pipeline_stage=10", "num_layers=8"),
    ),
    "uneven-without-middle": (
        {**TWO_STAGES, "layers_in_first": 6, "layers_in_last": 2, "virtual_pipeline": 2},
        "ZeroDivisionError",
        ("num_layers_in_first_pipeline_stage=6", "virtual_pipeline_model_parallel_size=2"),
    ),
    "layout-and-uneven": (
        {**TWO_STAGES, "pipeline_layout": "Ettttt|tttL", "layers_in_first": 5},
        "cannot be set with other pipeline layout arguments",
        ("pipeline_model_parallel_layout='Ettttt|tttL'", "num_layers_in_first_pipeline_stage=5"),
    ),
    "layout-rows": (
        {**TWO_STAGES, "pipeline_layout": "Ettttt|tt|tL"},
        "must be divisible by pipeline_model_parallel_size",
        ("pipeline_model_parallel_layout='Ettttt|tt|tL'", "pipeline_model_parallel_size=2"),
    ),
    "layout-chunks": (
        {**TWO_STAGES, "pipeline_layout": "Ett|tt|tt|ttL", "virtual_pipeline": 1},
        "conflicts with",
        ("pipeline_model_parallel_layout='Ett|tt|tt|ttL'", "virtual_pipeline_model_parallel_size=1"),
    ),
    "layout-layers": (
        {**TWO_STAGES, "pipeline_layout": "Ett|ttL"},
        "must match num_layers 8",
        ("pipeline_model_parallel_layout='Ett|ttL'", "num_layers=8"),
    ),
    "layout-heads": (
        {**TWO_STAGES, "pipeline_layout": "Etttt|ttttmL"},
        "Number of mtp layers in layout must match mtp_num_layers",
        ("pipeline_model_parallel_layout='Etttt|ttttmL'", "mtp_num_layers=None"),
    ),
    "world-by-experts": (
        {"num_layers": 2, "tensor": 2, "data": 3, "expert": 4, "num_experts": 8},
        "not divisible by expert_tensor_model_pipeline_parallel size (8)",
        ("world_size=6", "expert_tensor_parallel_size=2", "expert_model_parallel_size=4"),
    ),
    "experts-by-ranks": (
        {"num_layers": 2, "data": 4, "expert": 4, "num_experts": 6},
        "AssertionError",
        ("num_moe_experts=6", "expert_model_parallel_size=4"),
    ),
    "ranks-without-experts": (
        {"num_layers": 2, "data": 2, "expert": 2},
        "num_moe_experts must be non None to use expert-parallel",
        ("num_moe_experts=None", "expert_model_parallel_size=2"),
    ),
    "sequence-without-tensor": (
        {"num_layers": 2, "sequence_parallel": True},
        "Cannot use sequence parallelism without tensor parallelism",
        ("sequence_parallel=True", "tensor_model_parallel_size=1"),
    ),
    "tensor-without-sequence": (
        {"num_layers": 2, "tensor": 2, "sequence_parallel": False, "num_experts": 2},
        "During training, performance may degrade",
        ("sequence_parallel=False", "tensor_model_parallel_size=2"),
    ),
    "heads": (
        {"num_layers": 2, "tensor": 2, "num_attention_heads": 3},
        "num_attention_heads (3) must be a multiple",
        ("num_attention_heads=3", "tensor_model_parallel_size=2"),
    ),
    "query-groups": (
        {"num_layers": 2, "tensor": 2, "num_attention_heads": 6, "num_query_groups": 3},
        "num_query_groups (3) must be a multiple or divisor",
        ("num_query_groups=3", "tensor_model_parallel_size=2"),
    ),
    "order-lacks-a-kind": (
        {"num_layers": 2, "context": 2, "order": "tp-dp-pp"},
        "The size of (cp) is (2)",
        ("order='tp-dp-pp'", "cp, whose size is 2"),
    ),
    "order-lacks-expert-data": (
        {"num_layers": 2, "tensor": 2, "order": "tp-cp-ep-pp", "expert_tensor": 1, "num_experts": 2},
        "The size of (dp) is (2)",
        ("order='tp-cp-ep-pp'", "dp, whose size is 2"),
    ),
    "order-of-experts": (
        {**TWO_STAGES, "order": "tp-cp-ep-pp-dp", "data": 4, "expert": 2, "num_experts": 2},
        "the data parallel size of the attention and moe layers must be the same",
        ("order='tp-cp-ep-pp-dp'", "expert_model_parallel_size=2", "pipeline_model_parallel_size=2"),
    ),
    "order-of-stages": (
        {**TWO_STAGES, "tensor": 2, "order": "tp-pp-cp-ep-dp", "expert": 2, "expert_tensor": 1, "num_experts": 2},
        "Pipeline parallel groups are expected to be the same",
        ("order='tp-pp-cp-ep-dp'", "expert_tensor_parallel_size=1"),
    ),
    "expert-gradients": (
        {"num_layers": 2, "tensor": 2, "expert_tensor": 1, "num_experts": 2},
        "reduces expert gradients over ranks that hold other experts",
        ("tensor_model_parallel_size=2", "expert_tensor_parallel_size=1", "expert_model_parallel_size=1"),
    ),
    "expert-gradients-by-order": (
        {"num_layers": 2, "tensor": 2, "context": 2, "order": "cp-tp-ep-dp-pp", "num_experts": 2},
        "reduces expert gradients over ranks that hold other experts",
        ("order='cp-tp-ep-dp-pp'", "expert_model_parallel_size=1"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_settings_and_megatron_agrees(case: str) -> None:
    sizes, theirs, ours = REFUSED[case]
    assert theirs in " ".join((megatron_refuses(sizes) or "").split())
    with pytest.raises(ConfigError) as caught:
        ParallelLayout(**sizes)
    for setting in ours:
        assert setting in str(caught.value)


def test_a_world_that_the_sizes_do_not_divide() -> None:
    config = make_config({"num_layers": 4, "tensor": 2, "pipeline": 2, "num_experts": 2})
    with megatron_world(6), pytest.raises(RuntimeError, match="not divisible by 4"):
        initialize({name: getattr(config, name) for name in CONFIG_NAMES.values()}, ORDER)
    with pytest.raises(ConfigError, match=r"world_size=6 .* tensor_model_parallel_size=2 x pipeline_model_parallel_size=2"):
        ParallelLayout.of(config, world_size=6)
    assert ParallelLayout.of(config, world_size=8).data == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ParallelLayout(num_layers=2, tensor=0), "tensor=0: expected at least 1"),
        (lambda: ParallelLayout(num_layers=2, moe_layer_freq=0), "moe_layer_freq=0: expected at least 1"),
        (lambda: ParallelLayout(num_layers=2, moe_layer_freq=[1]), "moe_layer_freq has 1 entries, num_layers is 2"),
        (lambda: ParallelLayout(num_layers=2, order="tp-xp-pp"), "expected each of tp, cp, ep, dp, pp at most once"),
        (lambda: ParallelLayout(num_layers=2, order="tp-tp-pp"), "expected each of tp, cp, ep, dp, pp at most once"),
        (lambda: ParallelLayout(num_layers=2).coordinates(1), "rank 1 of a world of 1"),
        (lambda: ParallelLayout(num_layers=2).rank(Coordinates(0, 1, 0, 0)), "cp=1 of 1 ranks"),
        (lambda: ParallelLayout(num_layers=2, context=2).cut(padded([0], [3], 6), 0), "2 \\* context_parallel_size = 4"),
    ],
)
def test_arguments_out_of_range(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
