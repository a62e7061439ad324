"""MegatronEngine: rollouts by the actor's own model, on all ranks, under merged gates.

No KV cache: every new token costs a forward of the sequences so far. That is the simplest thing that is right, for small models
and as a reference; log-probs and routes come from one last forward of the finished sequences, so that they belong together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch.nn.utils.rnn import pad_sequence

from megatron_pr2.attach import PR2
from megatron_pr2.errors import ConfigError, EnvironmentFailed
from megatron_pr2.parallel.grid import padded
from megatron_pr2.replay.micro_batch import MicroBatch
from megatron_pr2.rollout.base import Probe, Progress, RolloutBatch, RolloutRequest, RolloutResponse, RolloutStats, SamplingParams
from megatron_pr2.rollout.collective import share
from megatron_pr2.routes.table import RouteTable


class MegatronEngine:
    """Samples with the actor's model; under data and expert parallelism."""

    name = "megatron"
    returns_routes = True
    takes_owned_weights = False

    def __init__(self, model: torch.nn.Module, pr2: PR2, *, pad_id: int, max_sequences: int = 128) -> None:
        """Args:
        model: the (possibly wrapped) GPTModel chunk; called as model(tokens, position_ids, attention_mask) -> [B, S, V].
        max_sequences: sequences generated side by side on one rank.
        """
        self._model, self._pr2, self._pad_id, self._max = model, pr2, pad_id, max_sequences
        self._version = 0
        self._told: int | None = None  # the version, where there was a push
        self.on_progress: Callable[[Progress], None] | None = None
        sizes = {
            "tensor": mpu.get_tensor_model_parallel_world_size(),
            "pipeline": mpu.get_pipeline_model_parallel_world_size(),
            "context": mpu.get_context_parallel_world_size(),
        }
        if set(sizes.values()) != {1}:
            raise ConfigError(f"the embedded rollout engine runs under data and expert parallelism only, not {sizes}; use sglang")

    def start(self) -> None:
        """Nothing to start, nor to restart or to close."""

    restart = close = start

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """The engine is the actor: the weights are its own, only the version is taken."""
        self._version = self._told = version

    @torch.no_grad()
    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingParams, *, return_routes: bool, enough: int | None = None
    ) -> RolloutBatch:
        """Samples this rank's share of the requests; all ranks run their forwards in step (experts are shared).

        With `enough`, only the requests of the first so many groups are sampled: all of them finish at the same time.
        """
        began = time.monotonic()
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        chosen = set(list(dict.fromkeys(request.group for request in requests))[:enough])
        finished = [index for index, request in enumerate(requests) if request.group in chosen]
        of_ranks = [[requests[index] for index in finished[share(len(finished), size, each)]] for each in range(size)]
        own = of_ranks[rank]
        answers: dict[int, RolloutResponse] = {}
        for horizon in dict.fromkeys(request.horizon for part in of_ranks for request in part):
            places = [place for place, request in enumerate(own) if request.horizon == horizon]
            # As many waves on every rank: their experts serve the others.
            longest = max(sum(request.horizon == horizon for request in part) for part in of_ranks)
            with self._evaluating(horizon):
                for start in range(0, longest, self._max):
                    wave = places[start : start + self._max]
                    answers |= zip(wave, self._wave([own[place] for place in wave], sampling, return_routes), strict=True)
        responses = [answers[place] for place in range(len(own))]
        tokens = torch.tensor([sum(int(r.loss_mask.sum()) for r in responses)], dtype=torch.int64)
        dist.all_reduce(tokens, group=mpu.get_data_parallel_group())
        stats = RolloutStats(time.monotonic() - began, int(tokens))
        stats.route_bytes = size * sum(r.routes.nbytes for r in responses if r.routes is not None)
        return RolloutBatch(responses, stats, finished)

    @torch.no_grad()
    def score(self, token_ids: Sequence[int], horizon: float | None = None) -> list[Probe]:
        """Every rank scores the same tokens, under merged gates."""
        with self._evaluating(horizon):
            logprobs, tables = self._forward_recorded([list(token_ids)], 1.0, True)
        return [Probe("the actor", logprobs[0].astype(np.float32), tables[0], horizon)]

    @contextlib.contextmanager
    def _evaluating(self, horizon: float | None = None) -> Iterator[None]:
        """The model in evaluation mode with the prediction for so many updates ahead merged into its gates."""
        was_training = self._model.training
        self._model.eval()
        try:
            with self._pr2.merged_gates(self._told, horizon):
                yield
        finally:
            self._model.train(was_training)

    def _wave(self, requests: list[RolloutRequest], sampling: SamplingParams, return_routes: bool) -> list[RolloutResponse]:
        sequences = [list(r.prompt_ids) for r in requests]
        sampled: list[list[bool]] = [[] for _ in requests]
        turns = [1] * len(requests)
        finish = ["length"] * len(requests)
        failure: Exception | None = None
        # One uniform number per (request, step), from the request's seed alone: what is sampled does not depend on its neighbours.
        uniform = np.stack([np.random.Generator(np.random.Philox(r.seed)).random(sampling.max_new_tokens) for r in requests])
        active = list(range(len(requests)))
        for step in range(sampling.max_new_tokens):
            if self._largest(len(active)) == 0:
                break
            logits_BV = self._next_token_logits([sequences[i] for i in active]) / sampling.temperature
            cumulative = torch.softmax(logits_BV.double(), dim=-1).cumsum(-1)
            draws = torch.from_numpy(uniform[active, step]).to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, draws, right=True).squeeze(1).clamp_(max=cumulative.shape[1] - 1).tolist()
            going_on = []
            for i, token in zip(active, chosen, strict=True):
                sequences[i].append(token)
                sampled[i].append(True)
                if token in sampling.stop_token_ids:
                    try:
                        reply = _reply(requests[i], sequences[i])
                    except Exception as error:  # raised below, by all ranks: the others wait for this one's experts
                        failure, reply = error, None
                    room = step + 1 < sampling.max_new_tokens and turns[i] < sampling.max_turns
                    if sampling.max_length is not None and reply is not None:
                        room = room and len(sequences[i]) + len(reply) < sampling.max_length
                    finish[i] = "stop" if reply is None else "length"
                    if reply is None or not room:
                        continue
                    sequences[i] += reply
                    sampled[i] += [False] * len(reply)
                    turns[i] += 1
                elif sampling.max_length is not None and len(sequences[i]) >= sampling.max_length:
                    continue
                going_on.append(i)
            active = going_on
            if self.on_progress is not None:
                self.on_progress(Progress(len(requests) - len(active), len(requests), sum(map(sum, sampled))))
        if self._largest(int(failure is not None)):
            where = f"{type(failure).__name__}: {failure}" if failure is not None else "on another rank"
            raise EnvironmentFailed(f"the environment of a request failed: {where}") from failure
        logprobs, tables = self._forward_recorded(sequences, sampling.temperature, return_routes)
        out = []
        for i, request in enumerate(requests):
            cut = len(request.prompt_ids)
            mask = np.array(sampled[i], dtype=bool)
            out.append(
                RolloutResponse(
                    prompt_ids=request.prompt_ids,
                    response_ids=tuple(sequences[i][cut:]),
                    logprobs=np.where(mask, logprobs[i][cut - 1 :], 0.0).astype(np.float32),
                    routes=tables[i] if return_routes else None,
                    finish_reason=finish[i],
                    weight_versions=np.where(mask, self._version, -1).astype(np.int64),
                    loss_mask=mask,
                    turns=turns[i],
                    horizon=request.horizon,
                )
            )
        return out

    def _largest(self, value: int) -> int:
        """Over all ranks: those with fewer sequences run along, because their experts serve the others."""
        largest = torch.tensor([value])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def _padded(self, sequences: list[list[int]]) -> torch.Tensor:
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in sequences or [[self._pad_id]]]
        return pad_sequence(rows, batch_first=True, padding_value=self._pad_id)

    def _logits(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        device = next(self._model.parameters()).device
        tokens_BS = tokens_BS.to(device)
        positions_BS = torch.arange(tokens_BS.shape[1], device=device).repeat(tokens_BS.shape[0], 1)
        logits_BSV: Any = self._model(tokens_BS, positions_BS, None)
        return logits_BSV.float()

    def _next_token_logits(self, sequences: list[list[int]]) -> torch.Tensor:
        logits_BSV = self._logits(self._padded(sequences))
        last = torch.tensor([len(s) - 1 for s in sequences], dtype=torch.int64, device=logits_BSV.device)
        return logits_BSV[torch.arange(len(sequences), device=logits_BSV.device), last]

    def _forward_recorded(
        self, sequences: list[list[int]], temperature: float, record: bool
    ) -> tuple[list[npt.NDArray[np.float64]], list[RouteTable]]:
        """Log-probs of tokens 1.. of each sequence and, if asked, the routes of all its input tokens, from one forward."""
        tokens_BS = self._padded(sequences)
        grid = padded(range(len(sequences)), [len(s) for s in sequences], tokens_BS.shape[1])
        if not sequences:  # a rank without work still runs its experts
            grid = padded([0], [0], tokens_BS.shape[1])
        micro_batch = MicroBatch("rollout", grid)
        tables: dict[int, RouteTable] = {}
        if record:
            with self._pr2.record([micro_batch]) as session:
                session.begin(self._model, micro_batch)
                logits_BSV = self._logits(tokens_BS)
            tables = self._pr2.recorded_tables(session, {i: len(s) for i, s in enumerate(sequences)})
        else:
            logits_BSV = self._logits(tokens_BS)
        logprobs_BSV = torch.log_softmax(logits_BSV / temperature, dim=-1)
        out = []
        for i, ids in enumerate(sequences):
            targets = torch.tensor(ids[1:], dtype=torch.int64, device=logits_BSV.device)
            out.append(logprobs_BSV[i, : len(ids) - 1].gather(1, targets.unsqueeze(1)).squeeze(1).double().cpu().numpy())
            if record:
                tables[i].valid[-1:] = False  # the last token was not an input of the sampling: engines return no row for it
        return out, [tables[i] for i in range(len(sequences))] if record else []


def _reply(request: RolloutRequest, token_ids: list[int]) -> tuple[int, ...] | None:
    """What the environment appends to a turn that the policy has ended; None without one."""
    if request.environment is None:
        return None
    cut = len(request.prompt_ids)
    reply = request.environment.reply(request.prompt_ids, tuple(token_ids[cut:]))
    if reply is not None and (not reply or min(reply) < 0):
        raise ValueError(f"its reply {reply!r} is empty or holds negative token ids")
    return reply
