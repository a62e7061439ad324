"""Warm-start: deterministic, cached by configuration, atomic; its loss and its measurements against hand-made cases."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_pr2.errors import CheckpointError
from megatron_pr2.rl import launch, warmstart
from megatron_pr2.rl.calculator import Calculator, demonstration
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.task import Problem, TaskConfig, make_problems
from megatron_pr2.rl.tiny import EOS_ID, PAD_ID, TinyModelConfig, build_tiny_model, byte_tokenizer
from megatron_pr2.rl.warmstart import RECORD, WarmStartConfig, ensure_warm_start, sample_responses, warm_start

MODEL = TinyModelConfig(
    hidden_size=16, num_hidden_layers=2, head_dim=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
)
FAST = WarmStartConfig(model=MODEL, steps=8, batch_size=8, problems=100, extra_rounds=0, eval_prompts=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return ensure_warm_start(tmp_path_factory.mktemp("warm") / "start", FAST, show_progress=False)


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_it_is_a_complete_model_directory_with_its_record(made):
    record = json.loads((made / RECORD).read_text())
    assert record["digest"] == FAST.digest()
    assert record["config"]["steps"] == record["steps"] == 8
    assert AutoTokenizer.from_pretrained(made).eos_token_id == EOS_ID
    assert AutoModelForCausalLM.from_pretrained(made).config.router_aux_loss_coef == 0.0
    assert [entry.name for entry in made.parent.iterdir()] == ["start"]  # no temporary left behind


def test_a_complete_one_is_kept_and_another_configuration_replaces_it(made, tmp_path, monkeypatch):
    path = ensure_warm_start(tmp_path / "a", FAST, show_progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(made).values(), weights(path).values(), strict=True))
    before = (path / "model.safetensors").stat().st_mtime_ns
    assert ensure_warm_start(path, FAST) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == before
    other = dataclasses.replace(FAST, seed=1)
    ensure_warm_start(path, other, show_progress=False)
    assert json.loads((path / RECORD).read_text())["digest"] == other.digest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert not torch.equal(weights(path)["lm_head.weight"], weights(made)["lm_head.weight"])


def test_a_run_starts_from_the_sizes_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr(warmstart, "ensure_warm_start", lambda path, config: (path, config))
    path, config = launch.warm_start(load_config(None, [f"model.cache={tmp_path}", "seed=3", "model.sizes={num_experts: 64}"]))
    assert path == tmp_path / "num_experts_64_seed_3"
    assert config == WarmStartConfig(3, TinyModelConfig(num_experts=64))
    usual = launch.warm_start(load_config(None, [f"model.cache={tmp_path}", "seed=3"]))[1]
    assert usual == WarmStartConfig(3)
    assert usual.digest() != config.digest()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path = ensure_warm_start(tmp_path / "a", FAST, show_progress=False)
    before = (path / "model.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(warmstart, "save_tiny_model", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        ensure_warm_start(path, dataclasses.replace(FAST, seed=1), show_progress=False)
    assert (path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_somebody_elses_directory_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not overwritten"):
        ensure_warm_start(tmp_path, FAST, show_progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_every_setting_is_part_of_the_digest():
    changes = [
        {"seed": 1},
        {"lr": 1e-3},
        {"guess_share": 0.5},
        {"lesson": "calculator"},
        {"band": (0.1, 0.5)},
        {"task": TaskConfig(max_terms=5)},
        {"model": dataclasses.replace(MODEL, num_experts=8)},
    ]
    digests = {dataclasses.replace(FAST, **change).digest() for change in changes} | {FAST.digest()}
    assert len(digests) == len(changes) + 1
    assert dataclasses.replace(FAST).digest() == FAST.digest()


def test_the_quickstarts_digest_is_what_it_always_was():
    """What users have cached stays valid."""
    assert WarmStartConfig().digest() == "7b79fd5172b6d94b5f462659f7fca2e1b39f0524e3b3b213dc123448f6de6c4b"


def test_training_moves_the_loss_and_restores_the_thread_count():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        model, result = warm_start(dataclasses.replace(FAST, steps=40, lr=2e-2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    problems = make_problems(TaskConfig(), "eval", 64, 0)
    input_ids, labels = warmstart.supervised_batch([(p.prompt, p.worked) for p in problems])
    with torch.no_grad():
        loss = model(input_ids=input_ids, labels=labels).loss
        before = build_tiny_model(FAST.model, FAST.seed)(input_ids=input_ids, labels=labels).loss
    assert loss < before - 1.0
    assert result["steps"] == 40


def test_rounds_are_added_while_the_rate_is_below_the_band(monkeypatch, caplog):
    rates = iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(warmstart, "exact_match_rate", lambda *_: next(rates))
    _, result = warm_start(dataclasses.replace(FAST, extra_rounds=3))
    assert (result["steps"], result["exact_match"], result["in_band"]) == (8 + 2 + 2, 0.3, True)
    assert not caplog.records
    monkeypatch.setattr(warmstart, "exact_match_rate", lambda *_: 0.1)
    _, result = warm_start(dataclasses.replace(FAST, extra_rounds=1))
    assert (result["steps"], result["in_band"]) == (10, False)
    assert "outside 0.25..0.50" in caplog.text


def test_only_responses_bear_loss():
    input_ids, labels = warmstart.supervised_batch([("1+2=", "3"), ("10+2=", "~9")])
    assert input_ids.tolist() == [[*b"1+2=3", EOS_ID, PAD_ID, PAD_ID], [*b"10+2=~9", EOS_ID]]
    assert labels.tolist() == [[-100] * 4 + [ord("3"), EOS_ID, -100, -100], [-100] * 5 + [*b"~9", EOS_ID]]


def test_of_several_turns_only_the_policys_bear_loss():
    """Between prompt and end: calls and the answer are learned, what the calculator writes is not."""
    problem = Problem("8+7+5=", "15 20", "20")
    input_ids, labels = warmstart.supervised_batch([(problem.prompt, demonstration(problem)), ("1+2=", "3")])
    assert bytes(input_ids[0, :-1].tolist()) == b"8+7+5=[8+7]=15 [15+5]=20 20"
    assert input_ids[0, -1] == EOS_ID
    learned = "".join(chr(i) if m != -100 else "." for i, m in zip(input_ids[0, :-1], labels[0, :-1], strict=True))
    assert learned == "......[8+7]....[15+5]....20"
    borne = labels != -100
    assert torch.equal(labels[borne], input_ids[borne])
    assert labels[0, -1] == EOS_ID
    assert borne.sum() == 5 + 6 + 2 + 1 + 2


def test_balance_loss_is_one_at_balance_and_experts_over_topk_at_collapse():
    real = torch.tensor([True, True, False])
    high = 50.0
    balanced = torch.tensor([[high, 0.0], [0.0, high], [high, high]])
    collapsed = torch.tensor([[high, 0.0], [high, 0.0], [0.0, high]])
    assert warmstart.balance_loss([balanced], real, 1).item() == pytest.approx(1.0)
    assert warmstart.balance_loss([collapsed], real, 1).item() == pytest.approx(2.0)
    assert warmstart.balance_loss([balanced, collapsed], real, 1).item() == pytest.approx(1.5)
    # Two layers that collapse on different experts are balanced when pooled; each of them is not.
    assert warmstart.balance_loss([collapsed, collapsed.flip(1)], real, 1).item() == pytest.approx(2.0)


class _Scripted:
    """Stands for a model whose responses are given."""

    def __init__(self, responses):
        self._responses = responses

    def generate(self, input_ids, attention_mask, **_):
        assert input_ids[:, -1].eq(ord("=")).all()  # padded on the left
        assert torch.equal(attention_mask, (input_ids != PAD_ID).long())
        rows = [[*r.encode(), EOS_ID] for r in self._responses]
        width = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([r + [PAD_ID] * (width - len(r)) for r in rows])], dim=1)


def test_exact_match_rate_counts_right_answers():
    problems = make_problems(TaskConfig(), "eval", 4, 0)
    model = _Scripted([problems[0].worked, "~" + problems[1].answer, "999", ""])
    assert warmstart.exact_match_rate(model, problems, 0) == 0.5


class _Caller:
    """Stands for a model that says a line per turn; checks that it is given what was said so far."""

    def __init__(self, lines):
        self._lines, self.seen = lines, []

    def generate(self, input_ids, attention_mask, eos_token_id, **_):
        assert eos_token_id == [EOS_ID, ord("]")]
        texts = [bytes(ids[mask.bool()].tolist()).decode() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        self.seen.append(texts)
        said = [self._lines[text] for text in texts]
        width = max(map(len, said))
        rows = [[EOS_ID if c == "$" else ord(c) for c in line] + [PAD_ID] * (width - len(line)) for line in said]
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)


def test_sampling_goes_on_behind_replies_and_scores_the_last_turn():
    model = _Caller(
        {
            "8+7+5=": "[8+7]",
            "8+7+5=[8+7]=15 ": "[15+5]",
            "8+7+5=[8+7]=15 [15+5]=20 ": "20$",
            "1+1=": "~3$",
            "2+2=": "[2+2]",
            "2+2=[2+2]=4 ": "5$",
        }
    )
    prompts = ["8+7+5=", "1+1=", "2+2="]
    problems = [Problem(p, "", a) for p, a in zip(prompts, ["20", "2", "4"], strict=True)]
    calculator = Calculator(byte_tokenizer())
    responses = sample_responses(model, prompts, 0, calculator)
    assert responses == [("[8+7]", "=15 ", "[15+5]", "=20 ", "20"), ("~3",), ("[2+2]", "=4 ", "5")]
    assert [len(texts) for texts in model.seen] == [3, 2, 1]
    assert warmstart.exact_match_rate(model, problems, 0, calculator) == pytest.approx(1 / 3)


def test_a_policy_that_never_stops_calling_is_stopped():
    class Endless(dict):
        def __missing__(self, _):
            return "[1+1]"

    (response,) = sample_responses(_Caller(Endless()), ["1+1="], 0, Calculator(byte_tokenizer()))
    assert response == ("[1+1]", "=2 ") * 7 + ("[1+1]",)
