"""I8 on a device: no router and no micro-batch waits for it, while recording, replaying, and replaying and learning.

tests/test_invariants.py counts operators that would wait; here CUDA itself says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from megatron_pr2.attach import PR2, attach
from megatron_pr2.errors import ReplayError
from megatron_pr2.parallel.replica import Member, RankGroup
from megatron_pr2.parallel.tokens import TokenIndex
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.replay.token_check import TokenCheck
from tests.gpu import toys
from tests.gpu.needs import needs
from tests.helpers import toy

pytestmark = [pytest.mark.gpu, needs()]

KINDS = ("softmax", "groups", "fp32-router", "top-1")
PASSES = ("record", "replay", "learn", "everything", "log-probs")
EVERYTHING = {"predictor": "learned+momentum", "hold_back": True}
CYCLES = 2_000_000_000  # about a second, far longer than it takes to issue a pass


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever waits for the device raises. (Copies from pageable memory are not noticed: see the busy device below.)"""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def nothing() -> None:
    """Between opening and closing a pass."""


def prepared(
    name: str, kind: str, recompute: bool, device: torch.device, *, layers: int = toy.LAYERS, size: int = 2
) -> tuple[PR2, Callable[..., None], torch.optim.Optimizer]:
    """A handle, a pass that can be repeated, and the policy's optimizer.

    `one_pass(before, after)` calls them around all of its micro-batches. With `new_batch` it is the first one of a rollout batch,
    for which nothing is made yet that is made once for a batch; its old-log-prob pass comes before `waits`.

    Args:
        size: sequences of a micro-batch, of three.
    """
    config = toy.toy_config(num_layers=layers, params_dtype=torch.bfloat16, **toy.ROUTERS[kind])
    model = toys.chunk(config, device, torch.bfloat16, recompute=recompute)
    preset = "r2" if name == "record" else "pr2"
    settings = EVERYTHING if name == "everything" else {}
    pr2 = attach(model, toy.preset(preset, sample_fraction=0.5, max_missing_share=1.0, **settings))
    optimizer = torch.optim.Adam(model.parameters())
    pr2.optimizer = optimizer
    tables = None if name == "record" else toy.random_tables(toys.LENGTHS, config, toys.MISSING)
    data = toys.batches(toys.LENGTHS, size, device, torch.bfloat16)
    micro_batches = [batch.micro_batch for batch in data]
    trains = name not in ("record", "log-probs")

    def begin() -> None:
        pr2.begin_rollout(toy.sequences(toys.LENGTHS, tables))
        if trains:
            toy.old_logprobs(pr2, model, data)
            toy.drift(model)

    def one_pass(
        before: Callable[[], None] = nothing,
        after: Callable[[], None] = nothing,
        *,
        new_batch: bool = False,
        waits: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if new_batch and trains:
            begin()
        with waits():
            if not trains:
                begin()
            context = pr2.actor_update(micro_batches, 1 if name == "replay" else 2) if trains else pr2.old_logprobs(micro_batches)
            with context as session:
                before()
                toy.run(session, model, data, backward=trains)
                after()

    begin()
    return pr2, one_pass, optimizer


def test_the_debug_mode_notices_a_wait(device: torch.device) -> None:
    total = torch.ones(3, device=device).sum()
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        total.item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["record", "replay", "learn", "everything"])
def test_a_pass_never_synchronises(name: str, kind: str, recompute: bool, device: torch.device) -> None:
    """Opening and closing it included. (A log-prob pass under replay reads the engine's agreement once, when it closes.)"""
    pr2, one_pass, _ = prepared(name, kind, recompute, device)
    one_pass()  # kernels are compiled and memory is allocated
    one_pass(new_batch=True, waits=waiting_is_an_error)
    if name in ("learn", "everything"):
        assert pr2.step(0.1)["predictor"]["grad_norm"] > 0.0


@pytest.mark.parametrize("name", PASSES)
def test_micro_batches_are_issued_while_the_device_is_busy(name: str, device: torch.device) -> None:
    """All of a pass's work queues up behind a kernel that runs for a second; whoever waited would find it done."""
    # Small: a queue of about a thousand kernels is full, and the host then waits whatever they are.
    _, one_pass, _ = prepared(name, "softmax", False, device, layers=1, size=3)
    for _ in range(2):  # kernels are compiled, memory is allocated
        one_pass()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    found: list[bool] = []

    def occupy() -> None:
        torch.cuda._sleep(CYCLES)
        done.record()

    one_pass(occupy, lambda: found.append(done.query()), new_batch=True)
    assert found == [False]
    torch.cuda.synchronize()
    assert done.query()


def test_token_ids_are_compared_while_the_device_is_busy(device: torch.device) -> None:
    """32K rows in each micro-batch: a copy of their numbers from pageable memory would wait here."""
    rows = 1 << 15
    tokens = TokenCheck(RankGroup(None, (Member(0, 0, (0,), True),), 0, 1, 1), [nn.Identity()], device)
    tokens.begin(TokenIndex({0: rows, 1: rows}), ())
    micro_batches = [MicroBatch.packed([i], [rows]) for i in (0, 1)]
    ids = [torch.randint(1000, (1, rows), device=device) for _ in micro_batches]

    def look(order: tuple[int, int]) -> None:
        for micro_batch, number in zip(micro_batches, order, strict=True):
            tokens.look(nn.Identity(), micro_batch, (ids[number],), {})

    for _ in range(2):  # kernels are compiled, memory is allocated
        tokens.open(micro_batches)
        look((0, 1))
        tokens.require("warm-up")
    tokens.open(micro_batches)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(CYCLES)
    done.record()
    look((1, 0))
    assert not done.query()
    with pytest.raises(ReplayError, match="of the tokens that the model ran"):
        tokens.require("swapped")


def waits_of_a_step(layers: int, device: torch.device) -> int:
    """How often the end of a mini-step waits for the device, once everything is warm."""
    pr2, one_pass, optimizer = prepared("everything", "softmax", False, device, layers=layers)
    for _ in range(2):
        one_pass()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                pr2.step(0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


def test_a_step_waits_no_more_often_for_more_layers(device: torch.device, record_property: Callable[[str, Any], None]) -> None:
    """With a learned predictor, the optimizer's moments and hold-back all at work."""
    few, many = (waits_of_a_step(layers, device) for layers in (2, 6))
    record_property("detail", f"{few} waits per mini-step for 2 layers, {many} for 6")
    assert 0 < few == many
