"""What the tests run in processes of their own; imported there only, since importing verl takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from verl.utils import tensordict_utils as tu

from megatron_pr2.attach import PR2, MicroBatch, PR2Config, ReplaySequence, attach
from megatron_pr2.errors import PR2Error
from megatron_pr2.replay.sites import unwrapped
from megatron_pr2.routes.table import RouteTable
from tests.verl.worker import EXPERTS, LAYERS, MEGATRON, SETTINGS, TOPK, Loop, Sample, gates, make_worker, pushed, samples

# Routes are random here, and predictions are to be seen.
EASY = {"min_agreement": 0.0, "sample_fraction": 1.0, "hold_back": False}


def settings(preset: str | None) -> list[str]:
    """Overrides of a preset, or none for verl's own engine."""
    return (
        [] if preset is None else [f"{SETTINGS}.preset={preset}", *(f"{SETTINGS}.{name}={value}" for name, value in EASY.items())]
    )


def sizes(**parallel: int) -> list[str]:
    """Overrides of parallel sizes."""
    names = {
        "tensor": "tensor_model",
        "pipeline": "pipeline_model",
        "virtual": "virtual_pipeline_model",
        "context": "context",
        "expert": "expert_model",
    }
    chosen = [f"{MEGATRON}.{names[name]}_parallel_size={size}" for name, size in parallel.items()]
    return [*chosen, f"{MEGATRON}.expert_tensor_parallel_size=1"]


@contextmanager
def verl_only() -> Iterator[None]:
    """The engine that verl takes where nobody registered another: its own."""
    os.environ.update(VERL_ENGINE_DEVICE="cuda", VERL_ENGINE_VENDOR="nobody")
    try:
        yield
    finally:
        del os.environ["VERL_ENGINE_DEVICE"], os.environ["VERL_ENGINE_VENDOR"]


def seen(loop: Loop, log_probs: Any, metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that can be seen of a rollout batch from outside."""
    pr2 = getattr(loop.engine, "pr2", None)
    return {
        "engine": type(loop.engine).__name__,
        "log_probs": log_probs,
        "metrics": metrics,
        "weights": gates(loop.engine),
        "pushed": pushed(loop.engine),
        "W_p": None if pr2 is None or pr2.predictor is None else pr2.predictor.weight_LEH.clone(),
        "sequences": None if pr2 is None else len(pr2.sequences),
    }


def train(
    model: str,
    preset: str | None,
    *overrides: str,
    made: list[Sample] | None = None,
    jagged: bool = False,
    mini_batch_size: int = 2,
    epochs: int = 1,
    shuffle: bool = False,
    parallel: dict[str, int] | None = None,
    plain: bool = False,
) -> dict[str, Any]:
    """One rollout batch of four rows through verl's worker."""
    arguments = model, *settings(preset), *sizes(**(parallel or {})), *overrides
    if plain:
        with verl_only():
            worker = make_worker(*arguments)
    else:
        worker = make_worker(*arguments)
    loop = Loop(worker, made or samples(), jagged=jagged, routes=preset not in ("grpo", "r2"))
    log_probs = loop.old_log_probs()
    return seen(loop, log_probs, loop.update(mini_batch_size, epochs=epochs, shuffle=shuffle))


def direct(model: str, preset: str) -> dict[str, Any]:
    """The same without the integration: attach() to the model of verl's own engine, micro-batches described by hand."""
    with verl_only():
        worker = make_worker(model, *sizes())
    loop = Loop(worker, samples(), routes=False)
    pr2 = attach(loop.engine.module, PR2Config.preset(preset, **EASY), loop.engine.optimizer)
    pr2.begin_rollout([sequence(i, sample, preset) for i, sample in enumerate(loop.samples)])

    def micro_batch(*rows: int) -> MicroBatch:
        return MicroBatch.packed(rows, [loop.samples[row].length for row in rows])

    with pr2.old_logprobs([micro_batch(0, 1), micro_batch(2, 3)]):
        log_probs = loop.old_log_probs()
    norms = []
    for mini_step, rows in enumerate([[0, 1], [2, 3]], start=1):
        data = loop.batch(rows, calculate_entropy=False, global_batch_size=2, compute_loss=True)
        with pr2.actor_update([micro_batch(row) for row in rows], mini_step):
            output = worker.actor.train_batch(data)
        norms.append(tu.get(output, "metrics")["grad_norm"])
        pr2.step(lr=loop.engine.optimizer.param_groups[0]["lr"])
    loop.engine.pr2 = pr2
    return seen(loop, log_probs, {"grad_norm": norms})


def sequence(number: int, sample: Sample, preset: str) -> ReplaySequence:
    """What PR2 is told of a sample by hand."""
    table = None
    if preset in ("r3", "pr2"):
        table = RouteTable.from_engine(
            sample.routes,
            num_tokens=sample.length,
            moe_layers=range(LAYERS),
            num_hidden_layers=LAYERS,
            topk=TOPK,
            num_experts=EXPERTS,
        )
    return ReplaySequence(number, sample.length, len(sample.prompt) - 1, sample.length - 1, table)


def live_routes(model: str) -> list[Sample]:
    """The samples with the routes that the untrained model itself takes."""
    with verl_only():
        worker = make_worker(model, *sizes())
    loop = Loop(worker, samples(), routes=False)
    pr2 = attach(loop.engine.module, PR2Config.preset("r3"))
    lengths = {i: sample.length for i, sample in enumerate(loop.samples)}
    pairs = [MicroBatch.packed(rows, [lengths[row] for row in rows]) for rows in ((0, 1), (2, 3))]
    with pr2.record(pairs) as session:
        loop.old_log_probs()
    tables = pr2.recorded_tables(session, lengths)
    return [
        Sample(sample.prompt, sample.response, tables[i].experts[:-1].astype("int16"), sample.mask)
        for i, sample in enumerate(loop.samples)
    ]


def with_live_routes(model: str) -> dict[str, Any]:
    """One update with the live router's own routes replayed, and one by verl's own engine."""
    made = live_routes(model)
    common: dict[str, Any] = {"made": made, "mini_batch_size": 4}
    return {"r3": train(model, "r3", **common), "verl": train(model, None, plain=True, **common)}


def refused(action: Callable[[], Any]) -> str:
    """The message with which PR2 refuses something; what it does not refuse is an error."""
    try:
        action()
    except PR2Error as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")


def build_refused(model: str, *overrides: str) -> str:
    return refused(lambda: make_worker(model, *settings("r3"), *overrides))


def build_refused_when_patched(model: str) -> str:
    from verl.utils.megatron.router_replay_patch import apply_router_replay_patch

    apply_router_replay_patch()
    return build_refused(model)


def wrong_rows(model: str) -> dict[str, str]:
    """Updates on rows that the old-log-prob pass did not see as they are."""
    worker = make_worker(model, *settings("r3"), *sizes())
    made = samples()
    messages = {}
    for name, changed in {
        "other tokens": [*made[:3], *samples(1, seed=9)],
        "twice": [*made[:3], made[2]],
        "other routes of a twin": None,
    }.items():
        first = samples(twins=True) if changed is None else made
        loop = Loop(worker, first)
        loop.old_log_probs()
        twin = first[3]
        strange = Sample(twin.prompt, twin.response, made[0].routes[:1].repeat(twin.length - 1, 0), twin.mask)
        other = Loop(worker, changed or [*first[:2], twin, strange])
        other.columns = loop.columns
        messages[name] = refused(lambda other=other: other.update(4))
    return messages


def without_old_log_probs(model: str) -> dict[str, Any]:
    """verl's bypass mode: the rollout's own log-probs, no pass before the update."""
    found: dict[str, Any] = {}
    for preset in ("r3", "pr2", "r2"):
        loop = Loop(make_worker(model, *settings(preset), *sizes()), samples())
        loop.columns["old_log_probs"] = torch.full((4, 8), -5.0)
        found[preset] = loop.update(2) if preset == "r3" else refused(lambda loop=loop: loop.update(2))
    return found


def without_routes(model: str) -> str:
    return refused(Loop(make_worker(model, *settings("pr2"), *sizes()), samples(), routes=False).old_log_probs)


def outside(model: str) -> dict[str, Any]:
    """Passes that are no part of a rollout batch: the log-probs of an evaluation, and a reference engine's."""
    worker = make_worker(model, *settings("r3"), *sizes())
    loop = Loop(worker, samples())
    replayed = loop.old_log_probs()
    kept = len(loop.engine.pr2.sequences)
    engine = loop.engine

    def evaluated() -> torch.Tensor:
        collected: list[Any] = []

        def loss(model_output: Any, data: Any, dp_group: Any) -> tuple[torch.Tensor, dict[str, Any]]:
            collected.extend(model_output["log_probs"].unbind())
            return torch.zeros(()), {}

        extra = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2, "calculate_entropy": False}
        with engine.eval_mode():
            engine.infer_batch(loop.batch(**extra), loss_function=loss)
        return torch.cat([part.float() for part in collected])

    live = evaluated()
    with verl_only():
        plain_loop = Loop(make_worker(model, *sizes()), samples())
    plain = plain_loop.old_log_probs()
    rows = [s.length for s in loop.samples]
    response = [p[len(s.prompt) - 1 : s.length - 1] for p, s in zip(live.split(rows), loop.samples, strict=True)]
    expected = [plain[i, : len(s.response)] for i, s in enumerate(loop.samples)]
    plain_rate, rate = (unwrapped(each.module[0]).config.moe_router_bias_update_rate for each in (plain_loop.engine, engine))
    return {
        "expert biases stay, which verl moves": plain_rate > 0.0 == rate,
        "evaluation is verl's": all(torch.equal(a, b) for a, b in zip(response, expected, strict=True)),
        "replay is not": not torch.equal(replayed, plain),
        "batch is kept": kept == len(engine.pr2.sequences) == 4,
    }


def reference(model: str) -> dict[str, Any]:
    """An engine that only runs forward has no PR2, whatever its settings."""
    worker = make_worker(model, *settings("r3"), *sizes())
    from megatron_pr2.integrations.verl.engine import PR2MegatronEngine

    config = worker.actor.engine_config
    config.forward_only = True
    engine = PR2MegatronEngine(worker.actor.model_config, config, worker.actor.optimizer_config, worker.actor.checkpoint_config)
    engine.initialize()
    return {"pr2": engine.pr2, "settings": engine._settings, "module": len(engine.module)}


def checkpoints(model: str, directory: str) -> dict[str, Any]:
    """A checkpoint between two rollout batches; and one that has no PR2 in it."""
    loop = Loop(make_worker(model, *settings("pr2"), *sizes()), samples())
    loop.old_log_probs()
    loop.update(2)
    before = loop.engine.pr2.predictor.weight_LEH.clone()
    # As a save of the same step that was cut off leaves it: verl overwrites its own, and so must we.
    loop.engine.pr2.save(Path(directory) / "pr2")
    loop.engine.save_checkpoint(directory)
    found = sorted(path.name for path in Path(directory).iterdir())
    pr2: PR2 = loop.engine.pr2
    pr2.predictor.weight_LEH.zero_()
    loop.engine.load_checkpoint(directory, del_local_after_load=False)
    after = pr2.predictor.weight_LEH.clone()
    exported = exported_gates(Path(directory) / "model" / "huggingface")
    own = {name: tensor for name, tensor in gates(loop.engine).items() if name.endswith("gate.weight")}
    return {
        "files": found,
        "learned": bool(before.abs().max() > 0),
        "restored": torch.equal(before, after),
        "export is plain": exported.keys() == own.keys() and all(torch.equal(exported[k], own[k]) for k in own),
    }


def abandoned(model: str) -> dict[str, Any]:
    """A rollout batch that nothing trains on, as in verl's critic warm-up, and the push after it."""
    loop = Loop(make_worker(model, *settings("pr2"), *sizes()), samples())
    loop.old_log_probs()
    held = loop.engine.pr2.features.nbytes
    pushed(loop.engine)
    left = loop.engine.pr2.features.nbytes
    loop.old_log_probs()
    return {"held": held, "left": left, "goes on": loop.update(2)}


def exported_gates(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        name: tensor.float()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith("gate.weight")
    }


def shards(model: str) -> dict[str, str]:
    engine = make_worker(model, *settings("pr2"), *sizes()).actor.engine
    names = ("get_per_tensor_param_shard", "get_per_tensor_param_delta_shard", "prime_delta_snapshots")
    return {name: refused(getattr(engine, name)) for name in names}
