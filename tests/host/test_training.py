"""Adam on the host: plain and distributed optimizer, fp32 and bf16, repeatable to the bit; distributed checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pr2 import host
from megatron_pr2.hf.bridge import export_weights, load_model
from tests.helpers.distributed import pool
from tests.helpers.rounding import rounding
from tests.host import training
from tests.host.models import make_checkpoint, tiny_config

pytestmark = pytest.mark.exhaustive

EP2 = {"expert": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), tiny_config("qwen3_moe", num_hidden_layers=2))


@pytest.fixture(scope="module")
def sequences() -> training.Sequences:
    return training.random_sequences()


def _same(first: training.Weights, second: training.Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_to_the_bit(
    checkpoint: Path, sequences: training.Sequences, distributed_optimizer: bool, dtype: torch.dtype
) -> None:
    runs = [
        pool(2).run(training.train, checkpoint, EP2, sequences, distributed_optimizer=distributed_optimizer, dtype=dtype)
        for _ in range(2)
    ]
    for (losses, norms, weights), (again, norms_again, weights_again) in zip(*runs, strict=True):
        assert losses == again
        assert norms == norms_again
        assert _same(weights, weights_again)
        assert losses[-1] < losses[0] - 0.1


def test_both_optimizers_and_one_process_agree(checkpoint: Path, sequences: training.Sequences) -> None:
    losses, norms, weights = pool(1).run(training.train, checkpoint, {}, sequences)[0]
    for distributed_optimizer in (False, True):
        other_losses, other_norms, other = pool(2).run(
            training.train, checkpoint, EP2, sequences, distributed_optimizer=distributed_optimizer
        )[0]
        bound = rounding(64, factor=128)  # after several steps of Adam
        assert other_losses == pytest.approx(losses, rel=bound)
        assert other_norms == pytest.approx(norms, rel=bound)
        for name, weight in other.items():
            # Adam turns rounding into steps of lr where a gradient is almost zero; almost all weights agree much better.
            error = (weight - weights[name]).abs()
            assert float(error.max()) < 3e-2, name
            assert float(error.mean()) < bound * float(weight.abs().max()), name


def test_gradient_norm_counts_every_expert_once(checkpoint: Path, sequences: training.Sequences) -> None:
    norms = [
        pool(processes).run(training.train, checkpoint, layout, sequences, steps=1)[0][1][0]
        for processes, layout in ((1, {}), (2, EP2), (2, {"tensor": 2, "expert": 2, "expert_tensor": 1}), (2, {"tensor": 2}))
    ]
    assert norms == pytest.approx([norms[0]] * 4, rel=rounding(64))


def _sharded_state(chunk: torch.nn.Module) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return chunk.sharded_state_dict(metadata={"dp_cp_group": group})


def _save(checkpoint: Path, layout: dict[str, Any], directory: Path) -> tuple[list[str], training.Weights]:
    from megatron.core import dist_checkpointing

    host.init(**layout)
    bridge, (chunk,) = load_model(checkpoint, dtype=torch.float32, wrap_with_ddp=False)
    state = _sharded_state(chunk)
    keys = sorted({entry.key for entry in state.values() if not entry.key.endswith("_extra_state")})
    dist_checkpointing.save(state, str(directory))
    return keys, {name: tensor.clone() for name, tensor in export_weights(bridge, [chunk])}


def _load(checkpoint: Path, layout: dict[str, Any], directory: Path) -> training.Weights:
    from megatron.core import dist_checkpointing

    host.init(**layout)
    bridge, (chunk,) = load_model(checkpoint, dtype=torch.float32, wrap_with_ddp=False)
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.zero_()
    chunk.load_state_dict(dist_checkpointing.load(_sharded_state(chunk), str(directory)))
    return {name: tensor.clone() for name, tensor in export_weights(bridge, [chunk])}


@pytest.mark.parametrize("source", [EP2, {"tensor": 2}])
def test_distributed_checkpoint_into_another_layout(checkpoint: Path, tmp_path: Path, source: dict[str, int]) -> None:
    directory = tmp_path / "saved"
    directory.mkdir()
    keys, saved = pool(2).run(_save, checkpoint, source, directory)[0]
    # Megatron stacks the layers; these are the keys that Transformer Engine's modules have.
    assert keys == sorted(
        [
            "embedding.word_embeddings.weight",
            "decoder.layers.self_attention.linear_proj.weight",
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.self_attention.linear_qkv.weight",
            "decoder.layers.self_attention.q_layernorm.weight",
            "decoder.layers.self_attention.k_layernorm.weight",
            "decoder.layers.pre_mlp_layernorm.weight",
            "decoder.layers.mlp.router.weight",
            "decoder.layers.mlp.experts.experts.linear_fc1.weight",
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            "decoder.final_layernorm.weight",
            "output_layer.weight",
        ]
    )
    for processes, layout in ((1, {}), (2, {"tensor": 2, "expert": 2, "expert_tensor": 1})):
        assert _same(pool(processes).run(_load, checkpoint, layout, directory)[0], saved)


def _parameter_marks(checkpoint: Path) -> dict[str, tuple[bool, bool]]:
    """Of the first layer: whether the gradient is reduced over all data-parallel ranks, and summed over the tensor ranks."""
    host.init(tensor=2, expert=2, expert_tensor=1)
    _, (chunk,) = load_model(checkpoint, dtype=torch.float32, wrap_with_ddp=False)
    return {
        name: (getattr(parameter, "allreduce", True), getattr(parameter, "sequence_parallel", False))
        for name, parameter in chunk.named_parameters()
        if name.startswith("decoder.layers.0.")
    }


def test_parameters_are_named_and_marked_as_with_transformer_engine(checkpoint: Path) -> None:
    marks = pool(2).run(_parameter_marks, checkpoint)[0]
    prefix = "decoder.layers.0."
    experts = {f"{prefix}mlp.experts.linear_fc{layer}.weight{index}" for layer in (1, 2) for index in range(8)}
    assert {name for name, (allreduce, _) in marks.items() if not allreduce} == experts
    norms = {f"{prefix}self_attention.linear_qkv.layer_norm_weight", f"{prefix}pre_mlp_layernorm.weight"}
    norms |= {f"{prefix}self_attention.{name}_layernorm.weight" for name in "qk"}
    # The router sees a slice of the tokens, too, and is marked by Megatron itself.
    summed = {name for name, (_, sequence_parallel) in marks.items() if sequence_parallel}
    assert summed == norms | {f"{prefix}mlp.router.weight"}
