"""What Adam does next, read from its state: against the step that it then makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_pr2.attach import attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError
from megatron_pr2.optimizer_moments import adam_updates
from tests import toy
from tests.distributed import pool

pytestmark = pytest.mark.usefixtures("host_platform")
CPU = torch.device("cpu")


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_step_that_was_made(make: Any, decay: float) -> None:
    """Read after a step, it is that step: the same moments, and nearly the same weights for the decay."""
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = make(parameters, lr=1e-3, weight_decay=decay)
    for step in range(3):
        before = torch.stack([p.detach().clone() for p in parameters])
        for p in parameters:
            p.grad = torch.randn_like(p) + 0.1 * step
        optimizer.step()
        made = torch.stack([p.detach() for p in parameters]) - before
        # rtol: of weights near 1 an fp32 difference has few digits; the decay is of the weights before the step.
        torch.testing.assert_close(adam_updates(optimizer, parameters, (4, 3), CPU), made, rtol=2e-3, atol=1e-6)


def test_before_the_first_step_it_is_zero() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    assert not adam_updates(torch.optim.AdamW([parameter]), [parameter], (4, 3), CPU).any()


def test_what_cannot_be_read_is_refused() -> None:
    trained, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    with pytest.raises(AttachError, match=r"none of the optimizers \(AdamW\)"):
        adam_updates(torch.optim.AdamW([trained]), [other], (4, 3), CPU)
    sgd = torch.optim.SGD([trained], lr=0.1, momentum=0.9)
    trained.grad = torch.ones_like(trained)
    sgd.step()
    with pytest.raises(AttachError, match="momentum_buffer"):
        adam_updates(sgd, [trained], (4, 3), CPU)


def test_an_optimizer_that_does_not_train_the_gates_is_refused_when_it_is_told() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("pr2", predictor="momentum"))
    with pytest.raises(AttachError, match="none of the optimizers"):
        pr2.follow(torch.optim.AdamW([nn.Parameter(torch.zeros(3))]))


def test_a_fused_optimizer_counts_in_its_group() -> None:
    """Without a count there is no bias correction: many times too large in the beginning."""
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    expected = adam_updates(optimizer, [parameter], (4, 3), CPU)
    del optimizer.state[parameter]["step"]
    with pytest.raises(AttachError, match="how many updates"):
        adam_updates(optimizer, [parameter], (4, 3), CPU)
    optimizer.param_groups[0]["step"] = 3
    torch.testing.assert_close(adam_updates(optimizer, [parameter], (4, 3), CPU), expected)


def test_momentum_without_an_optimizer_is_refused() -> None:
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", predictor="momentum"))
    lengths = {0: 12}
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, config)))
    data = toy.batches(lengths, 1)
    toy.old_logprobs(pr2, chunk, data)
    with pytest.raises(AttachError, match=r"call pr2\.follow\(optimizer\)"):
        toy.update(pr2, chunk, data, 1)


def megatron_job(path: Path, dtype: torch.dtype, sharded: bool) -> tuple[Tensor, Tensor, str]:
    """(read after the second step, made by the second step, kind) on one rank of several, with Megatron-Core's optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_pr2 import host
    from megatron_pr2.bridge import load_model

    host.init(expert=2)
    _, chunks = load_model(
        path, dtype=dtype, ddp_config={"use_distributed_optimizer": sharded}, extra_config={"moe_token_dispatcher_type": "alltoall"}
    )
    pr2 = attach(chunks, PR2Config.preset("pr2", predictor="momentum"))
    settings = OptimizerConfig(
        lr=1e-2, weight_decay=0.0, clip_grad=0.0, bf16=dtype is torch.bfloat16, params_dtype=dtype,
        use_distributed_optimizer=sharded,
    )
    optimizer = get_megatron_optimizer(settings, chunks)
    pr2.follow(optimizer)
    gates = [site.router.weight for site in pr2.sites]
    assert not pr2.forecast.gate_updates().any()
    before = torch.empty(0)
    for step in range(2):
        before = torch.stack([gate.detach().float().clone() for gate in gates])
        for chunk in chunks:
            chunk.zero_grad_buffer()
            for number, parameter in enumerate(chunk.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            if sharded:
                chunk.finish_grad_sync()
        optimizer.step()
        if sharded:
            for chunk in chunks:
                chunk.start_param_sync(force_sync=True)
    made = torch.stack([gate.detach().float() for gate in gates]) - before
    return pr2.forecast.gate_updates(), made, type(optimizer).__name__


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_megatrons_optimizers(tiny_checkpoint: Path, dtype: torch.dtype, sharded: bool) -> None:
    """Experts have an optimizer of their own under expert parallelism, and a sharded one keeps a slice of each gate per rank."""
    results = pool(2).run(megatron_job, tiny_checkpoint, dtype, sharded)
    rounding = 2e-3 if dtype is torch.float32 else 6e-2
    for read, made, _ in results:
        assert read.abs().max() > 5e-3
        # What the bf16 gate shows of its fp32 copy's step is rounded to the gate's own digits.
        torch.testing.assert_close(read, made, rtol=rounding, atol=1e-5 if dtype is torch.float32 else 4e-3)
    assert torch.equal(results[0][0], results[1][0])
