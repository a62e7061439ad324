"""What Adam, Lion and Muon do next, read from their state: against the step that they make. Other optimizers are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from megatron_pr2 import host
from megatron_pr2.attach import attach
from megatron_pr2.config import PR2Config
from megatron_pr2.errors import AttachError
from megatron_pr2.prediction.ahead_weights import ahead
from megatron_pr2.prediction.optimizer_moments import next_updates
from tests.helpers import toy
from tests.helpers.distributed import pool
from tests.helpers.rounding import rounding

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
        # A difference of weights has their rounding; the decay is of the weights before the step.
        rounded = rounding(1) * float(before.abs().max())
        torch.testing.assert_close(next_updates(optimizer, parameters, (4, 3), CPU), made, rtol=2e-3, atol=rounded)


def test_before_the_first_step_it_is_zero() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    assert not next_updates(torch.optim.AdamW([parameter]), [parameter], (4, 3), CPU).any()


def test_what_cannot_be_read_is_refused() -> None:
    trained, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    with pytest.raises(AttachError, match=r"none of the optimizers \(AdamW\)"):
        next_updates(torch.optim.AdamW([trained]), [other], (4, 3), CPU)
    with pytest.raises(AttachError, match=r"the gates are trained by SGD: .* of Adam, Lion and Muon"):
        next_updates(torch.optim.SGD([trained], lr=0.1, momentum=0.9), [trained], (4, 3), CPU)
    adam = torch.optim.Adam([trained])
    adam.state[trained] = {"exp_avg": torch.zeros_like(trained)}
    with pytest.raises(AttachError, match=r"Adam keeps \['exp_avg'\]"):
        next_updates(adam, [trained], (4, 3), CPU)


class Lion(torch.optim.Optimizer):
    """Lion by its paper (arXiv 2302.06675, Algorithm 2)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                made = torch.sign(beta1 * mean + (1.0 - beta1) * p.grad) + group["weight_decay"] * p
                p -= group["lr"] * made
                mean.mul_(beta2).add_(p.grad, alpha=1.0 - beta2)


def real(name: str) -> Any:
    """An optimizer of the library that Megatron-Core takes them from."""
    module, kind = name.rsplit(".", 1)
    return getattr(pytest.importorskip(f"emerging_optimizers.{module}"), kind)


@pytest.fixture
def _eager() -> Iterator[None]:
    """The library compiles its steps, which needs a C++ compiler and means nothing here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("kind", ["paper", "library"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lions_next_step_for_a_gradient_that_goes_on_as_its_mean(kind: str, decay: float) -> None:
    make = Lion if kind == "paper" else real("scalar_optimizers.Lion")
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = make(parameters, lr=1e-2, weight_decay=decay)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    read = next_updates(optimizer, parameters, (4, 3), CPU)
    before = torch.stack([p.detach().clone() for p in parameters])
    for p in parameters:
        p.grad = optimizer.state[p]["exp_avg"].clone()
    optimizer.step()
    made = torch.stack([p.detach() for p in parameters]) - before
    # Of weights near 1 an fp32 difference of 1e-2 has a resolution of eps, which is 2e-5 of it.
    torch.testing.assert_close(read, made, rtol=0, atol=8 * torch.finfo(torch.float32).eps)
    assert read.abs().min() > 5e-3


def test_lion_with_another_weight_decay_is_refused() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = Lion([parameter], 1e-2, 0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.weight_decay_method = "independent"  # type: ignore[attr-defined]
    with pytest.raises(AttachError, match="Lion with weight_decay_method='independent'"):
        next_updates(optimizer, [parameter], (4, 3), CPU)


@pytest.mark.usefixtures("_eager")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", ["", "decoupled", "l2"])
@pytest.mark.parametrize("kind", ["library", "Megatron-Core"])
def test_muons_next_step_for_a_gradient_that_goes_on_as_its_mean(kind: str, decay: str, nesterov: bool) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    settings = {"lr": 1e-2, "weight_decay": 0.1 if decay else 0.0, "nesterov": nesterov}
    if kind == "library":
        optimizer = real("orthogonalized_optimizers.Muon")(parameters, weight_decay_method=decay or "decoupled", **settings)
    else:
        emerging = pytest.importorskip("megatron.core.optimizer.emerging_optimizers")
        optimizer = emerging.TensorParallelMuon(parameters, use_decoupled_weight_decay=decay != "l2", **settings)
    assert not next_updates(optimizer, parameters, (4, 3), CPU).any()
    for _ in range(3):
        before = torch.stack([p.detach().clone() for p in parameters])
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    read = next_updates(optimizer, parameters, (4, 3), CPU)
    if not nesterov:  # that of the last step, then, but for the decay
        made = torch.stack([p.detach() for p in parameters]) - before
        torch.testing.assert_close(read, made, rtol=0, atol=1e-4 if decay == "decoupled" else 1e-6)
    before = torch.stack([p.detach().clone() for p in parameters])
    for p in parameters:
        # The library adds the decay of the L2 form to the gradient.
        p.grad = optimizer.state[p]["momentum_buffer"] - (0.1 if decay == "l2" else 0.0) * p.detach()
    optimizer.step()
    made = torch.stack([p.detach() for p in parameters]) - before
    torch.testing.assert_close(read, made, rtol=0, atol=1e-6)
    assert read.abs().amax(dim=(1, 2)).min() > 1e-3


def test_muon_with_another_weight_decay_is_refused() -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = real("orthogonalized_optimizers.Muon")([parameter], weight_decay_method="palm")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(AttachError, match=r"Muon with weight_decay_method='palm': .* 'decoupled' and 'l2' only"):
        next_updates(optimizer, [parameter], (4, 3), CPU)


class SOAP(torch.optim.Optimizer):
    """Moments of Adam's names, in another basis."""


class LayerWiseDistributedOptimizer:
    """Megatron-Core's chain whose parts hold other parameters on every rank: here, those of another one."""

    def __init__(self, gates: list[nn.Parameter]) -> None:
        self.chained_optimizers = (torch.optim.SGD([nn.Parameter(torch.zeros(2, 2))], lr=0.1),)
        self.param_groups = self.chained_optimizers[0].param_groups
        self.dp_cp_params_list = [gates, self.param_groups[0]["params"]]


@pytest.mark.parametrize("kind", ["SGD", "SOAP", "layer-wise", "offloaded", "library's SOAP", "library's AdaptiveMuon"])
def test_other_optimizers_are_refused_when_they_are_told(kind: str) -> None:
    """Before the first step, when there is no state to tell them by; on every rank of a layer-wise one."""
    chunk = toy.ToyChunk(toy.toy_config())
    gates = [router.weight for router in toy.routers(chunk)]
    name, optimizer = {
        "SGD": lambda: ("SGD", torch.optim.SGD(gates, lr=0.1, momentum=0.9)),
        "SOAP": lambda: ("SOAP", SOAP(gates, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0})),
        "layer-wise": lambda: ("SGD", LayerWiseDistributedOptimizer(gates)),
        "offloaded": lambda: ("AdamW and SGD", offloaded(gates)),
        "library's SOAP": lambda: ("SOAP", real("soap.SOAP")(gates, lr=0.1)),
        "library's AdaptiveMuon": lambda: ("AdaptiveMuon", adaptive_muon(gates)),
    }[kind]()
    pr2 = attach(chunk, toy.preset("pr2", predictor="momentum"))
    with pytest.raises(AttachError, match=f"the gates are trained by {name}: .*use predictor='learned'"):
        pr2.optimizer = optimizer
    pr2.detach()
    pr2 = attach(chunk, toy.preset("pr2"), optimizer)  # its next update is not asked for, its learning rate is
    assert pr2.optimizer is optimizer


def adaptive_muon(gates: list[nn.Parameter]) -> torch.optim.Optimizer:
    adaptive = real("orthogonalized_optimizers.AdaptiveMuon")
    return adaptive(gates, 0.1, 0.9, 0.0, nesterov=False, moment2_method="adamuon")  # type: ignore[no-any-return]


def offloaded(gates: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As Megatron-Core's HybridDeviceOptimizer: two optimizers behind one."""
    whole = torch.optim.SGD(gates, lr=0.1)
    whole.gpu_optimizer, whole.cpu_optimizers = torch.optim.AdamW(gates[:1]), [torch.optim.SGD(gates[1:], lr=0.1)]  # type: ignore[attr-defined]
    return whole


def test_an_optimizer_that_does_not_train_the_gates_is_refused_when_it_is_told() -> None:
    pr2 = attach(toy.ToyChunk(toy.toy_config()), toy.preset("pr2", predictor="momentum"))
    with pytest.raises(AttachError, match="none of the optimizers"):
        pr2.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(3))])


def test_a_fused_optimizer_counts_in_its_group() -> None:
    """Without a count there is no bias correction: many times too large in the beginning."""
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    expected = next_updates(optimizer, [parameter], (4, 3), CPU)
    del optimizer.state[parameter]["step"]
    with pytest.raises(AttachError, match="how many updates"):
        next_updates(optimizer, [parameter], (4, 3), CPU)
    optimizer.param_groups[0]["step"] = 3
    torch.testing.assert_close(next_updates(optimizer, [parameter], (4, 3), CPU), expected)


@pytest.mark.parametrize("kind", ["Adam", "Lion", "Muon"])
def test_moments_in_host_memory(kind: str, request: pytest.FixtureRequest) -> None:
    """Offloaded between two phases or stepped there, with the weights that they are of on the GPU: no operator mixes the two."""
    request.addfinalizer(host.enable)
    host.disable()  # which makes everything on the GPU in host memory
    with FakeTensorMode():
        on_gpu, moments = nn.Parameter(torch.zeros(4, 3, device="cuda")), torch.zeros(4, 3)
        make, state = {
            "Adam": lambda: (torch.optim.AdamW, {"exp_avg": moments, "exp_avg_sq": moments, "step": 3}),
            "Lion": lambda: (Lion, {"exp_avg": moments}),
            "Muon": lambda: (real("orthogonalized_optimizers.Muon"), {"momentum_buffer": moments}),
        }[kind]()
        optimizer = make([on_gpu], lr=1e-2, weight_decay=0.1)
        optimizer.state[on_gpu] = state
        assert next_updates(optimizer, [on_gpu], (4, 3), on_gpu.device).device.type == "cuda"
        (value,) = ahead(optimizer, [on_gpu], 2.0)
        assert value.device.type == "cuda"


def test_momentum_without_an_optimizer_is_refused() -> None:
    config = toy.toy_config()
    chunk = toy.ToyChunk(config)
    pr2 = attach(chunk, toy.preset("pr2", predictor="momentum"))
    lengths = {0: 12}
    pr2.begin_rollout(toy.sequences(lengths, toy.random_tables(lengths, config)))
    data = toy.batches(lengths, 1)
    toy.old_logprobs(pr2, chunk, data)
    with pytest.raises(AttachError, match=r"attach\(model, config, optimizer\), or pr2\.optimizer = optimizer"):
        toy.update(pr2, chunk, data, 1)


# What Megatron-Core is told to make, by name.
MEGATRONS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"use_distributed_optimizer": True},
    "sharded, offloaded": {
        "use_distributed_optimizer": True, "use_precision_aware_optimizer": True, "optimizer_cpu_offload": True,
        "pin_cpu_grads": False,
    },
    "Muon": {"optimizer": "muon"},
    "Muon, layer-wise": {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True},
}  # fmt: skip


def in_halves(offloading: Any, _: float) -> tuple[list[Any], list[Any], dict[Any, Tensor], dict[Any, Tensor], dict[Any, Tensor]]:
    """Which weights HybridDeviceOptimizer steps where: it asks for `is_cuda`, so here every second one is "offloaded"."""
    there: list[Any] = []
    here: list[Any] = []
    copies, originals, masters = {}, {}, {}
    for group in offloading.param_groups:
        for index, weight in enumerate(group["params"]):
            stepped = weight.detach().clone().float() if index % 2 or weight.dtype != torch.float32 else weight
            if weight.dtype != torch.float32:
                masters[weight] = stepped
            if index % 2:
                copies[weight], originals[stepped] = stepped, weight
            (there if index % 2 else here).append({**group, "params": [stepped]})
    return there, here, copies, originals, masters


def megatron_job(path: Path, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor, str]:
    """(read after the second step, made by the second step, kind) on one rank of several, with Megatron-Core's optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    from megatron_pr2.hf.bridge import load_model

    host.init(expert=2)
    sharded = MEGATRONS[kind].get("use_distributed_optimizer", False)
    _, chunks = load_model(
        path, dtype=dtype, ddp_config={"use_distributed_optimizer": sharded}, extra_config={"moe_token_dispatcher_type": "alltoall"}
    )
    pr2 = attach(chunks, PR2Config.preset("pr2", predictor="momentum"))
    settings = OptimizerConfig(
        lr=1e-2, weight_decay=0.0, clip_grad=0.0, bf16=dtype is torch.bfloat16, params_dtype=dtype, **MEGATRONS[kind]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", in_halves)
        optimizer = get_megatron_optimizer(settings, chunks)
    if "layer-wise" in kind:
        optimizer.allgather_params = optimizer.broadcast_params  # of parts of several sizes, which gloo does not gather
    pr2.optimizer = optimizer
    gates = [site.router.weight for site in pr2.sites]
    assert not pr2.horizon.gate_updates().any()
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
    return pr2.horizon.gate_updates(), made, type(optimizer).__name__


# Megatron-Core makes the others in bf16 only.
IN_FP32 = [pytest.param(kind, torch.float32, id=f"{kind}-fp32") for kind in ("whole", "sharded", "Muon")]


@pytest.mark.parametrize(("kind", "dtype"), [*IN_FP32, *(pytest.param(kind, torch.bfloat16, id=kind) for kind in MEGATRONS)])
def test_megatrons_optimizers(tiny_checkpoint: Path, kind: str, dtype: torch.dtype) -> None:
    """Experts have an optimizer of their own under expert parallelism; a sharded one keeps a slice of each gate per rank, a
    layer-wise one some gates.
    """
    results = pool(2).run(megatron_job, tiny_checkpoint, dtype, kind)
    rounding = 2e-3 if dtype is torch.float32 else 6e-2
    for read, made, _ in results:
        assert read.abs().max() > 5e-3
        # What the bf16 gate shows of its fp32 copy's step is rounded to the gate's own digits.
        torch.testing.assert_close(read, made, rtol=rounding, atol=1e-5 if dtype is torch.float32 else 4e-3)
    assert torch.equal(results[0][0], results[1][0])
