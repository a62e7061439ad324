"""verl's own actor worker on the CPU, without Ray: its configuration composed by Hydra, its batches made and cut by verl's code.

`B` rows, `P` prompt and `R` response columns, `L` layers, `K` top-k.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_pr2 import host
from tests.verl.cpu import use_host

use_host()

import torch.distributed as dist  # noqa: E402
from hydra import compose, initialize_config_module  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.engine_workers import ActorRolloutRefWorker  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding  # noqa: E402

LAYERS, EXPERTS, TOPK = 4, 8, 2
PROMPT, RESPONSE = 6, 8
MEGATRON = "actor_rollout_ref.actor.megatron"
SETTINGS = f"+{MEGATRON}.override_mcore_model_config.pr2"


def verl_config(model: str, *overrides: str) -> DictConfig:
    """verl's configuration as `python -m verl.trainer.main_ppo` composes it, with what the host and the tiny model need."""
    transformer = [f"++{MEGATRON}.override_transformer_config.{k}={v}" for k, v in host.config_overrides().items()]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            [
                "model_engine=megatron",
                f"actor_rollout_ref.model.path={model}",
                "+actor_rollout_ref.model.override_config.attn_implementation=eager",
                "actor_rollout_ref.model.external_lib=megatron_pr2.integrations.verl",
                "actor_rollout_ref.rollout.name=sglang",
                "actor_rollout_ref.rollout.n=1",
                "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
                "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32",
                "actor_rollout_ref.actor.ppo_mini_batch_size=4",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32",
                "actor_rollout_ref.actor.optim.lr=1e-3",
                "actor_rollout_ref.actor.optim.lr_warmup_init=1e-3",
                "actor_rollout_ref.actor.optim.total_training_steps=10",
                f"{MEGATRON}.vanilla_mbridge=true",
                f"{MEGATRON}.override_transformer_config.attention_backend=auto",
                *transformer,
                *overrides,
            ],
        )


def make_worker(model: str, *overrides: str) -> ActorRolloutRefWorker:
    """The worker of the role `actor` in this process, as verl's trainer makes it; the process group exists already."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=world)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    worker = ActorRolloutRefWorker(verl_config(model, *overrides).actor_rollout_ref, role="actor")
    worker.init_model()
    for chunk in worker.actor.engine.module:
        for module in chunk.modules():
            if type(module).__name__ == "HostAttention":
                module.register_forward_pre_hook(_causal_only, with_kwargs=True)
    return worker


def _causal_only(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # verl gives its padding mask [B, S] to causal attention, where Transformer Engine does not look at it; the host's would.
    return (*args[:3], None, *args[4:]), {**kwargs, **({"attention_mask": None} if "attention_mask" in kwargs else {})}


@dataclass(frozen=True)
class Sample:
    """What a rollout returned: `routes` [P + R - 1, L, K], one row per input token."""

    prompt: list[int]
    response: list[int]
    routes: np.ndarray
    mask: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)


def samples(count: int = 4, seed: int = 0, twins: bool = False) -> list[Sample]:
    """Random ones; with `twins` the last has the tokens of the one before it, and other routes."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = generator.integers(5, 250, int(generator.integers(2, PROMPT + 1))).tolist()
        response = generator.integers(5, 250, int(generator.integers(3, RESPONSE + 1))).tolist()
        made.append(Sample(prompt, response, random_routes(generator, len(prompt) + len(response) - 1), [1] * len(response)))
    if twins:
        last = made[-2]
        made[-1] = Sample(last.prompt, last.response, random_routes(generator, last.length - 1), last.mask)
    return made


def random_routes(generator: np.random.Generator, rows: int) -> np.ndarray:
    shape = (rows, LAYERS, EXPERTS)
    return np.argsort(generator.random(shape), axis=-1)[..., :TOPK].astype(np.int16)


def padded_batch(made: list[Sample], routes: bool = True) -> DataProto:
    """As verl's agent loop pads: prompts left, responses right, routes at the tokens' places, zeros elsewhere."""
    count, width = len(made), PROMPT + RESPONSE
    ids, attention = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.long)
    mask = torch.zeros(count, RESPONSE, dtype=torch.long)
    experts = torch.zeros(count, width, LAYERS, TOPK, dtype=torch.int16)
    for row, sample in enumerate(made):
        first = PROMPT - len(sample.prompt)
        ids[row, first : first + sample.length] = torch.tensor(sample.prompt + sample.response)
        attention[row, first : first + sample.length] = 1
        mask[row, : len(sample.mask)] = torch.tensor(sample.mask)
        experts[row, first : first + len(sample.routes)] = torch.from_numpy(sample.routes)
    tensors = {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0),
        "response_mask": mask,
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        **({"routed_experts": experts} if routes else {}),
    }
    return DataProto.from_dict(tensors, non_tensors={"uid": np.array([f"u{i // 2}" for i in range(count)], dtype=object)})


def jagged_batch(made: list[Sample], routes: bool = True) -> Any:
    """As verl's agent loop writes to its TransferQueue: no padding anywhere."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput

    fields = []
    for index, sample in enumerate(made):
        output = AgentLoopOutput(
            prompt_ids=sample.prompt,
            response_ids=sample.response,
            response_mask=sample.mask,
            routed_experts=sample.routes if routes else None,
            metrics=AgentLoopMetrics(),
        )
        field = output.as_dict()
        field = {key: value for key, value in field.items() if isinstance(value, torch.Tensor)}
        field["input_ids"] = torch.cat([field["prompts"], field["responses"]])
        field["position_ids"] = torch.arange(len(field["input_ids"]))
        field["loss_mask"] = field["response_mask"]
        field["uid"] = f"u{index // 2}"
        fields.append(field)
    keys = fields[0].keys()
    tensors = {
        key: torch.nested.as_nested_tensor([f[key] for f in fields], layout=torch.jagged)
        if isinstance(fields[0][key], torch.Tensor)
        else [f[key] for f in fields]
        for key in keys
    }
    return tu.get_tensordict(tensors)


class Loop:
    """What verl's trainer does with one rollout batch, on this rank's share of it."""

    def __init__(self, worker: ActorRolloutRefWorker, made: list[Sample], *, jagged: bool = False, routes: bool = True) -> None:
        self.worker, self.engine = worker, worker.actor.engine
        share = self.engine.get_data_parallel_size(), self.engine.get_data_parallel_rank()
        size = len(made) // share[0]
        self.samples = made[share[1] * size : (share[1] + 1) * size]
        self.jagged, self.routes = jagged, routes
        self.columns: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(5)
        advantages = torch.randn(len(made), RESPONSE, generator=generator)
        self.columns["advantages"] = advantages[share[1] * size : (share[1] + 1) * size]

    def batch(self, only: list[int] | None = None, **extra: Any) -> Any:
        """What a worker is sent: the TensorDict without padding, with the engine's settings."""
        made = self.samples if only is None else [self.samples[i] for i in only]
        columns = {k: v if only is None else v[only] for k, v in self.columns.items()}
        if self.jagged:
            data = jagged_batch(made, self.routes)
            for key, value in columns.items():
                parts = [row[: len(sample.response)] for row, sample in zip(value, made, strict=True)]
                data[key] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        else:
            proto = padded_batch(made, self.routes)
            for key, value in columns.items():
                proto.batch[key] = value
            data = left_right_2_no_padding(proto.to_tensordict())
        tu.assign_non_tensor(data, temperature=1.0, **extra)
        return data

    def old_log_probs(self) -> torch.Tensor | None:
        """compute_log_prob; [B, R] where this rank has the outputs."""
        data = self.batch(calculate_entropy=True, compute_loss=False)
        output = self.worker.compute_log_prob(data)
        mine = None if output is None else _response(tu.get(output, "log_probs"), self.samples)
        # As verl's driver does: outputs are collected from one rank of a replica, and go to all of them.
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.engine.get_data_parallel_rank(), mine))
        here = self.engine.get_data_parallel_rank()
        self.columns["old_log_probs"] = next(found for rank, found in everyone if rank == here and found is not None)
        return mine

    def update(self, mini_batch_size: int, epochs: int = 1, shuffle: bool = False) -> dict[str, list[float]]:
        """update_actor; the metrics, a list per mini-step, empty where this rank has no outputs."""
        data = self.batch(
            calculate_entropy=False,
            global_batch_size=mini_batch_size,
            mini_batch_size=mini_batch_size,
            epochs=epochs,
            seed=1,
            dataloader_kwargs={"shuffle": shuffle},
            compute_loss=True,
        )
        output = self.worker.update_actor(data)
        return {} if output is None else dict(tu.get(output, "metrics"))


def _response(values: torch.Tensor, made: list[Sample]) -> torch.Tensor:
    """[B, R] of the outputs that are the response, from outputs of all tokens."""
    rows = []
    for part, sample in zip(values.unbind(), made, strict=True):
        response = part[len(sample.prompt) - 1 : sample.length - 1].float()
        rows.append(torch.nn.functional.pad(response, (0, RESPONSE - len(response))))
    return torch.stack(rows)


def gates(engine: Any) -> dict[str, torch.Tensor]:
    """The policy's weights in Hugging Face names, as the engine itself has them."""
    return {name: tensor.detach().float().clone() for name, tensor in engine.bridge.export_weights(engine.module)}


def pushed(engine: Any) -> dict[str, torch.Tensor]:
    """What a rollout engine would get."""
    weights, _ = engine.get_per_tensor_param()
    return {name: tensor.detach().float().clone() for name, tensor in weights}
