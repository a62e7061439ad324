"""The ways in are one: a model built by a layer spec and one that was upgraded train alike, bit by bit; detached, it is untouched.

The third way, verl's engine, is compared in tests/verl/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pr2.attach import PR2, attach
from tests.helpers import toy
from tests.helpers.distributed import pool

LENGTHS = {0: 7, 1: 9, 2: 5, 3: 6}
VOCABULARY, STEPS = 64, 3


def build(spec_with_pr2: bool) -> Any:
    """A GPTModel with random weights, alike whichever way its routers came in."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_pr2 import host
    from megatron_pr2.integrations.spec import with_pr2_routers

    settings = dict(host.config_overrides())
    settings |= {
        "num_layers": 3, "moe_layer_freq": [0, 1, 1], "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
        "num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 16, "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0, "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid", "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "pipeline_dtype": torch.float32, "params_dtype": torch.float32,
        "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
    }  # fmt: skip
    config = TransformerConfig(**settings)
    torch.manual_seed(3)
    model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    return GPTModel(config, with_pr2_routers(spec) if spec_with_pr2 else spec, VOCABULARY, 32)


def inputs(batch: toy.Batch) -> Tensor:
    grid = batch.micro_batch.grid
    return torch.from_numpy((grid.sequence * 31 + grid.position * 7 + 5) % VOCABULARY).t().contiguous()


def logits(model: Any, batch: toy.Batch) -> Tensor:
    tokens = inputs(batch)
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


def train(model: Any, pr2: PR2) -> dict[str, list[Tensor]]:
    """A rollout batch of three mini-steps by SGD; everything that can be seen of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = toy.batches(LENGTHS, 2)
    micro_batches = [b.micro_batch for b in data]
    tables = toy.random_tables(LENGTHS, model.config, [(0, 2), (3, 4)])
    pr2.begin_rollout(toy.sequences(LENGTHS, tables))
    seen: dict[str, list[Tensor]] = {"logits": [], "gradients": []}
    with pr2.old_logprobs(micro_batches), torch.no_grad():
        seen["logits"] += [logits(model, b) for b in data]
    for mini_step in range(1, STEPS + 1):
        optimizer.zero_grad()
        with pr2.actor_update(micro_batches, mini_step=mini_step):
            for batch in data:
                output = logits(model, batch)
                seen["logits"].append(output.detach())
                toy.loss(output).backward()
        seen["gradients"] += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        pr2.step(lr=0.05)
    assert pr2.predictor is not None
    seen["predictor"] = [pr2.predictor.weight_LEH.clone()]
    seen["weights"] = [p.detach().clone() for p in model.parameters()]
    return seen


def parity_job() -> dict[str, bool]:
    from megatron_pr2 import host

    host.init()
    config = toy.preset("pr2", sample_fraction=1.0, max_missing_share=1.0)
    upgraded, built = build(False), build(True)
    assert all(torch.equal(a, b) for a, b in zip(upgraded.parameters(), built.parameters(), strict=True))
    first, second = train(upgraded, attach(upgraded, config)), train(built, attach(built, config))
    result = {name: all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)) for name in first}
    result["learned"] = bool(first["predictor"][0].abs().max() > 0)
    # Without replay the same batch takes other experts: the comparison above could have failed.
    plain = build(False)
    with torch.no_grad():
        result["replay matters"] = not torch.equal(logits(plain, toy.batches(LENGTHS, 2)[0]), first["logits"][0])
    return result


def test_a_spec_and_an_upgrade_train_alike() -> None:
    pytest.importorskip("megatron_pr2.integrations.spec")
    (result,) = pool(1).run(parity_job)
    assert result == dict.fromkeys(result, True)
    assert {"logits", "gradients", "predictor", "weights"} <= set(result)


def state(model: Any) -> Iterator[tuple[str, Any]]:
    """Everything that attach() could have touched: classes, attributes, hooks, parameters, buffers."""
    for name, module in model.named_modules():
        kept = {key: value for key, value in vars(module).items() if not key.startswith("_") or key == "_control"}
        yield name, (type(module), sorted(vars(module)), {key: id(value) for key, value in kept.items()})
        yield f"{name} hooks", [len(vars(module)[key]) for key in sorted(vars(module)) if key.endswith("_hooks")]
    for name, tensor in model.state_dict().items():
        yield name, tensor.tolist() if isinstance(tensor, Tensor) else tensor


def detach_job() -> dict[str, bool]:
    from megatron_pr2 import host

    host.init()
    result = {}
    for way in ("attached", "by spec"):
        model, untouched = build(way == "by spec"), build(way == "by spec")
        before = dict(state(model))
        pr2 = attach(model, toy.preset("pr2"))
        with pr2.record([toy.batches(LENGTHS, 2)[0].micro_batch]), torch.no_grad():
            logits(model, toy.batches(LENGTHS, 2)[0])
        result[f"{way}: seen"] = dict(state(model)) != before
        pr2.detach()
        result[f"{way}: state"] = dict(state(model)) == before
        # Two updates without PR2, beside a model that never knew of it.
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, untouched)]
        for batch in toy.batches(LENGTHS, 2):
            outputs = []
            for m, optimizer in zip((model, untouched), optimizers, strict=True):
                optimizer.zero_grad()
                outputs.append(logits(m, batch))
                toy.loss(outputs[-1]).backward()
                optimizer.step()
            result[f"{way}: logits {batch.micro_batch.key}"] = torch.equal(*outputs)
        result[f"{way}: weights"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
        attach(model, toy.preset("pr2")).detach()  # it can be attached again
    return result


def test_detach_leaves_the_model_as_it_was() -> None:
    (result,) = pool(1).run(detach_job)
    assert result == dict.fromkeys(result, True)
