"""Warm-start: a short supervised phase that turns the untrained tiny model into a policy that is sometimes right.

RL needs rewards that are neither all 0 nor all 1. The model first learns to work sums out (task.py), or to call a calculator
(calculator.py), with a guess now and then, and at the end to guess more often than not, so its exact match at temperature 1 starts
in a band that leaves room above. Plain Transformers and AdamW in one process on one thread; same configuration, same weights on the
same machine.

A load-balancing loss per layer (Switch Transformer, arXiv 2101.03961, Eq. 4) keeps experts alive here; the checkpoint that is
written has it switched off, because it would pull against the policy objective in RL.

Shape suffixes: B sequences, S positions, T tokens (B * S), E experts.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from megatron_pr2.errors import CheckpointError
from megatron_pr2.rl.calculator import Calculator, demonstration
from megatron_pr2.rl.rewards import exact_match
from megatron_pr2.rl.task import Problem, TaskConfig, guess, make_problems
from megatron_pr2.rl.tiny import EOS_ID, NUM_BYTES, PAD_ID, TinyModelConfig, build_tiny_model, byte_tokenizer, save_tiny_model

if TYPE_CHECKING:
    from transformers import Qwen3MoeForCausalLM

    from megatron_pr2.rollout.base import Environment

logger = logging.getLogger(__name__)

RECORD = "warm_start.json"
# Raised when the code below changes what a configuration trains, so that cached checkpoints are made again.
_RECIPE = 1
_LR_WARMUP_STEPS = 20
# The label that torch's cross-entropy skips.
IGNORED = -100
# Of one sampled turn.
MAX_NEW_TOKENS = 20
MAX_TURNS = 8
# What is learned from: one turn of the policy, or the policy's turns with an environment's replies between them.
Response = str | tuple[str, ...]


@dataclass(frozen=True)
class WarmStartConfig:
    """The supervised phase; the defaults are the quickstart's.

    Attributes:
        seed: decides initial weights, data and order.
        model, task: sizes of the policy, and what the prompts look like.
        lesson: what is shown beside guesses: "worked" sums, or calls of a "calculator" and its replies, which bear no loss.
        steps, batch_size, lr: AdamW with a linear decay to zero after a short warm-up.
        problems: different warm-start prompts.
        guess_share, guess_spread: share of guessed responses at the end, and how far a guess may be off.
        early_guess_share, early: share of guessed responses during the first `early` of the steps.
        balance: weight of the load-balancing loss.
        band: lowest and highest exact match of sampled responses to held-out prompts that RL should start from.
        extra_rounds: further rounds of steps/4, at a quarter of the learning rate, while the exact match is below the band.
        eval_prompts: held-out prompts sampled to measure it.
    """

    seed: int = 0
    model: TinyModelConfig = field(default_factory=TinyModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    lesson: str = "worked"
    steps: int = 450
    batch_size: int = 64
    lr: float = 4e-3
    problems: int = 4000
    guess_share: float = 0.6
    guess_spread: int = 5
    early_guess_share: float = 0.1
    early: float = 0.8
    balance: float = 0.01
    band: tuple[float, float] = (0.25, 0.5)
    extra_rounds: int = 3
    eval_prompts: int = 256

    @classmethod
    def of(cls, lesson: str, seed: int, model: TinyModelConfig) -> WarmStartConfig:
        """What `model.warm_start` names. Calls of a calculator are learned sooner than sums."""
        steps = 150 if lesson == "calculator" else cls.steps
        return cls(seed, model, lesson=lesson, steps=steps)

    def digest(self) -> str:
        """Two configurations with the same digest give the same checkpoint."""
        settings = asdict(self)
        if self.lesson == "worked":  # as before there were lessons: what was cached then is the same
            del settings["lesson"]
        return hashlib.sha256(json.dumps([_RECIPE, settings], sort_keys=True).encode()).hexdigest()


def ensure_warm_start(path: Path, config: WarmStartConfig, *, show_progress: bool = True) -> Path:
    """The warm-started model directory at `path`, made if it is not there yet.

    It is a Hugging Face model directory with `warm_start.json` (configuration, exact match) beside the weights. One of another
    configuration is replaced. The directory appears complete or not at all, also if the process is killed half-way.

    Raises:
        CheckpointError: something else is at `path`, or it cannot be written.
    """
    try:
        record = dict(json.loads((path / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        record = {}
    if record.get("digest") == config.digest():
        logger.info("warm start: %s is already there", path)
        return path
    if "digest" not in record and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(
            f"{path} exists and has no {RECORD}: it is no warm start of this program and is not overwritten; "
            "choose another directory or remove it"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            made = Path(scratch) / "made"
            model, result = warm_start(config, show_progress=show_progress)
            save_tiny_model(model, made)
            record = {"digest": config.digest(), "config": asdict(config), **result}
            (made / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                path.rename(Path(scratch) / "old")
            made.rename(path)
    except OSError as error:
        raise CheckpointError(f"warm start: cannot write {path} ({error}); choose a directory that can be written") from error
    return path


def warm_start(config: WarmStartConfig, *, show_progress: bool = False) -> tuple[Qwen3MoeForCausalLM, dict[str, Any]]:
    """Trains a tiny model and returns it with {"exact_match", "in_band", "steps"}.

    An exact match outside the band is logged as a warning and left to the caller: a deliberately small configuration may want it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the result does not depend on the number of cores
    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    low, high = config.band
    early = int(config.early * config.steps)
    try:
        with Progress(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note, disable=not show_progress) as progress:
            trainer = _Trainer(config, progress)
            first = [config.early_guess_share] * early + [config.guess_share] * (config.steps - early)
            further = [config.guess_share] * max(1, config.steps // 4)
            for shares, lr in [(first, config.lr), *[(further, config.lr / 4)] * config.extra_rounds]:
                rate = trainer.round(shares, lr)
                if rate >= low:
                    break
    finally:
        torch.set_num_threads(threads)
    if not low <= rate <= high:
        logger.warning("warm start: exact match %.3f on held-out prompts is outside %.2f..%.2f", rate, low, high)
    return trainer.model, {"exact_match": rate, "in_band": low <= rate <= high, "steps": trainer.steps}


class _Trainer:
    """Model, optimizer and data of one warm start."""

    def __init__(self, config: WarmStartConfig, progress: Progress) -> None:
        self.model = build_tiny_model(config.model, config.seed)
        self.steps = 0
        self._config, self._progress = config, progress
        self._bar = progress.add_task("warm start", total=0, note="")
        self._held_out = make_problems(config.task, "eval", config.eval_prompts, config.seed)
        self._problems = make_problems(config.task, "warmstart", config.problems, config.seed)
        self._environment = Calculator(byte_tokenizer()) if config.lesson == "calculator" else None
        self._rng = random.Random(config.seed)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def round(self, guess_shares: Sequence[float], peak_lr: float) -> float:
        """One supervised step per entry of `guess_shares`, with a learning rate that rises to `peak_lr` and falls to zero.

        Returns:
            The exact match on held-out prompts.
        """
        self._progress.update(self._bar, total=self.steps + len(guess_shares))
        self.model.train()
        for step, guess_share in enumerate(guess_shares):
            lr = peak_lr * min((step + 1) / _LR_WARMUP_STEPS, 1 - step / len(guess_shares))
            loss = self._step(self._demonstrations(guess_share), lr)
            self.steps += 1
            self._progress.update(self._bar, completed=self.steps, note=f"loss {loss:.3f}")
        self.model.eval()
        rate = exact_match_rate(self.model, self._held_out, self._config.seed, self._environment)
        self._progress.update(self._bar, note=f"exact match {rate:.1%}")
        return rate

    def _demonstrations(self, guess_share: float) -> list[tuple[str, Response]]:
        lesson = demonstration if self._config.lesson == "calculator" else lambda problem: problem.worked
        return [
            (p.prompt, guess(p, self._config.guess_spread, self._rng) if self._rng.random() < guess_share else lesson(p))
            for p in self._rng.sample(self._problems, self._config.batch_size)
        ]

    def _step(self, pairs: Sequence[tuple[str, Response]], lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        input_ids_BS, labels_BS = supervised_batch(pairs)
        out = self.model(input_ids=input_ids_BS, labels=labels_BS, use_cache=False, output_router_logits=True)
        real_T = (input_ids_BS != PAD_ID).flatten()
        balance = balance_loss(out.router_logits, real_T, self._config.model.num_experts_per_tok)
        (out.loss + self._config.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(out.loss.detach())


def supervised_batch(pairs: Sequence[tuple[str, Response]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, S] int64 of (prompt, response) pairs, padded on the right; only the policy's turns bear loss."""
    rows = []
    for prompt, response in pairs:
        texts = [prompt, *((response,) if isinstance(response, str) else response)]
        parts = [*(torch.tensor(list(text.encode())) for text in texts), torch.tensor([EOS_ID])]
        # The policy writes every second text, and then ends.
        labels = [part if i % 2 or part is parts[-1] else torch.full_like(part, IGNORED) for i, part in enumerate(parts)]
        rows.append((torch.cat(parts), torch.cat(labels)))
    input_ids, labels_of = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(input_ids, batch_first=True, padding_value=PAD_ID), pad(labels_of, batch_first=True, padding_value=IGNORED)


def balance_loss(router_logits: Sequence[Tensor], real: Tensor, topk: int) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e: f_e the share of routes that expert e gets, P_e its mean probability; 1 at balance.

    Transformers' own loss pools all layers, so that an unused expert in one layer may be balanced by an expert of another.

    Args:
        router_logits: per layer [T, E].
        real: [T] bool, False for padding.
        topk: K.
    """
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE[real].float().softmax(dim=-1)
        load_E = torch.zeros_like(probs_TE).scatter_(1, probs_TE.topk(topk, dim=-1).indices, 1.0).mean(dim=0) / topk
        losses.append(probs_TE.shape[1] * (load_E * probs_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def sample_responses(
    model: Qwen3MoeForCausalLM, prompts: Sequence[str], seed: int, environment: Environment | None = None
) -> list[tuple[str, ...]]:
    """One response per prompt at temperature 1: the policy's turns, with the environment's replies between them.

    The global random state is left as it was.

    Args:
        environment: None for a single turn.
    """
    heads = [tuple(prompt.encode()) for prompt in prompts]
    tails: list[tuple[int, ...]] = [()] * len(prompts)
    turns: list[list[str]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    stops = [EOS_ID, *(environment.stop_token_ids if environment is not None else ())]

    def add(i: int, ids: tuple[int, ...]) -> None:
        tails[i] += ids
        turns[i].append(bytes(t for t in ids if t < NUM_BYTES).decode("utf-8", "replace"))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for turn in range(MAX_TURNS):
            sampled = _sample_turn(model, [heads[i] + tails[i] for i in active], stops)
            going_on = []
            for i, ids in zip(active, sampled, strict=True):
                add(i, ids)
                reply = environment.reply(heads[i], tails[i]) if environment is not None and ids[-1:] != (EOS_ID,) else None
                if reply is not None and turn + 1 < MAX_TURNS:
                    add(i, reply)
                    going_on.append(i)
            active = going_on
            if not active:
                break
    return [tuple(response) for response in turns]


def _sample_turn(model: Qwen3MoeForCausalLM, rows: Sequence[tuple[int, ...]], stops: Sequence[int]) -> list[tuple[int, ...]]:
    """What the model writes behind each row, up to and with a stop token."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD_ID] * (width - len(row)) + list(row) for row in rows])
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=real, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=list(stops))
    sampled = []
    for row in out[:, width:].tolist():
        length = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
        sampled.append(tuple(row[:length]))
    return sampled


def exact_match_rate(
    model: Qwen3MoeForCausalLM, problems: Sequence[Problem], seed: int, environment: Environment | None = None
) -> float:
    """Share of correct responses at temperature 1, one per prompt; of several turns, the last one has to be correct."""
    responses = sample_responses(model, [p.prompt for p in problems], seed, environment)
    return sum(exact_match(response[-1], p.answer) for response, p in zip(responses, problems, strict=True)) / len(problems)
