"""What is refused before anything starts, and that nothing heavy is imported for it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from megatron_pr2.errors import ConfigError, DataError
from megatron_pr2.rl.config import load_config
from megatron_pr2.rl.data import load_examples
from megatron_pr2.rl.launch import _alone, _claim, train
from megatron_pr2.rl.preflight import check, check_place, check_tokenizer, context_length, examples_model
from megatron_pr2.rollout.sglang.python import VARIABLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A whole checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "ab", "answer": "2"}\n')
    return path


def change(file: Path, **values: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_whole_job_passes(model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    check(load_config(None, [f"model.path={model}", f"data={data}", f"run={run}"]))
    check(load_config(None, [f"run={run}", f"model.cache={tmp_path}/cache"]))
    check(load_config(None, [f"model.path={model}", f"run={run}", "rollout.environment=megatron_pr2.rl.calculator:Calculator"]))
    assert not run.parent.exists(), "a check makes nothing"


# ---- the model -------------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (shutil.rmtree, "no such directory"),
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "cut config": (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "binary config": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
    "list as config": (lambda p: (p / "config.json").write_text("[]"), "a JSON list; expected an object"),
    "unknown type": (lambda p: change(p / "config.json", model_type="mamba"), "'mamba' cannot be trained here.*qwen3_moe"),
    "dense": (lambda p: change(p / "config.json", model_type="qwen3", num_experts=None), "model_type='qwen3'.*mixture-of-experts"),
    "no type": (lambda p: change(p / "config.json", model_type=None), "model_type=None"),
    "dense layers only": (lambda p: change(p / "config.json", mlp_only_layers=[0, 1]), "MoE layers: 0"),
    "experts": (lambda p: change(p / "config.json", num_experts=7), "7 experts.*over parallel.expert=2.*expected one of 1, 7"),
    "top-k": (lambda p: change(p / "config.json", num_experts_per_tok=9), "top-9 of 8 experts"),
    "text as size": (lambda p: change(p / "config.json", num_experts="many"), "cannot be used"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no .*safetensors files there; expected"),
    "other weights": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "found pytorch_model.bin: convert it"),
    "cut weights": (lambda p: os.truncate(p / "model.safetensors", 30_000), "model.safetensors .30000 bytes. cannot be read"),
    "cut header": (lambda p: os.truncate(p / "model.safetensors", 100), "model.safetensors .100 bytes. cannot be read"),
    "a pointer": (lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "a missing shard": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors", "b": "two"}}'),
        "lacks 1 of the files that its index names, first two",
    ),
    "an empty index": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "no tokenizer": (lambda p: [file.unlink() for file in p.glob("tokenizer*")], "no tokenizer files there"),
    "cut tokenizer": (lambda p: (p / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
    "no end": (lambda p: change(p / "tokenizer_config.json", eos_token=None), "no eos_token"),
    "another's tokenizer": (lambda p: change(p / "config.json", vocab_size=60), "token 61, and the model's vocab_size is 60"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_cannot_be_trained(damage: str, model: Path, data: Path, tmp_path: Path) -> None:
    do, message = DAMAGES[damage]
    config = load_config(None, [f"model.path={model}", f"data={data}", f"run={tmp_path / 'run'}"])
    check(config)
    do(model)
    with pytest.raises((ConfigError, DataError), match=message):
        check(config)


def test_what_the_config_leaves_to_transformers_is_left_to_it(model: Path, tmp_path: Path) -> None:
    change(model / "config.json", num_experts=None, num_local_experts=None)
    check(load_config(None, [f"model.path={model}", f"run={tmp_path / 'run'}"]))


def test_a_tokenizer_without_settings_is_of_the_models_class(model: Path, tmp_path: Path) -> None:
    """Transformers takes the class that belongs to the model type, which may bring an end-of-sequence token."""
    (model / "tokenizer_config.json").unlink()
    assert AutoTokenizer.from_pretrained(model).eos_token is not None
    check(load_config(None, [f"model.path={model}", f"run={tmp_path / 'run'}"]))


def test_padding_and_truncation_saved_with_a_tokenizer_do_not_count(model: Path, data: Path, tmp_path: Path) -> None:
    """A call with padding or truncation leaves both in tokenizer.json; Transformers takes neither from there."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_padding(length=500, pad_id=258, pad_token="<|pad|>")
    tokenizer.save(str(model / "tokenizer.json"))
    assert len(AutoTokenizer.from_pretrained(model).encode("1+1=")) == 4
    examples = load_examples(str(data))
    assert check_tokenizer(model, None, examples) == 4
    tokenizer.no_padding()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(model / "tokenizer.json"))
    assert len(AutoTokenizer.from_pretrained(model).encode("1+1=")) == 4
    assert check_tokenizer(model, None, examples) == 4


def test_a_prompt_without_tokens_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    """A vocabulary of one letter, which drops what it does not know."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"] = {"a": 97}
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{data}:1: the prompt '1\+1=' is 0 tokens"):
        check(load_config(None, [f"model.path={model}", f"data={data}", f"run={tmp_path / 'run'}"]))
    with pytest.raises(DataError, match=r"generated arithmetic.*is 0 tokens"):
        check(load_config(None, [f"model.path={model}", f"run={tmp_path / 'run'}"]))


AHEAD = ("rollout.engine=sglang", "pr2.predictor=lookahead")

# ---- directories, data, environment, servers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run={file}/run"], "file is a file; choose another directory"),
        (["run={file}"], "file is a file"),
        (["model.cache={file}/cache"], "model.cache=.*file is a file"),
        (["data={tmp}/none.jsonl"], "none.jsonl: cannot be read"),
        (["data={tmp}"], "cannot be read"),
        (["data={file}"], "file:1: not JSON"),
        (["rollout.environment=nowhere:Tool"], "rollout.environment='nowhere:Tool'"),
        (["rollout.environment=megatron_pr2.rl.calculator:Abacus"], "Abacus"),
        (["parallel.processes=3", "parallel.expert=3", "rollout.prompts=33", "algorithm.mini_steps=1"], "16 experts cannot"),
        ([*AHEAD, "rollout.groups=0", "rollout.engines=3"], "rollout.groups=0 needs 4 SGLang servers, .* and there are 3"),
        ([*AHEAD, "rollout.groups=2", "rollout.urls=[http://127.0.0.1:1]"], "needs 2 SGLang servers, .* there are 1; .*=turns"),
        ([*AHEAD, "rollout.groups=2", "rollout.engines=2", "rollout.router=own"], "needs rollout.router=none, not own"),
        ([*AHEAD, "rollout.groups=2", "rollout.engines=2", "rollout.sglang.push=disk"], "needs rollout.sglang.push=distributed"),
        ([*AHEAD, "rollout.groups=turns", "rollout.oversample=1.5"], "rollout.groups=turns contradicts rollout.oversample=1.5"),
        (["rollout.engine=sglang", "rollout.sglang.tp=2"], "rollout.sglang.tp: not a setting here"),
        (["rollout.engine=sglang", "rollout.sglang.tp_size=0"], "tp_size=0"),
        (["rollout.engine=sglang", "rollout.urls=[localhost]"], "sglang.url='localhost'"),
        (["rollout.engine=sglang", "rollout.urls=[http://127.0.0.1:{port}]"], "nothing answers there"),
        (["rollout.engine=sglang", "rollout.router=http://127.0.0.1:{port}"], "nothing answers there"),
        (["rollout.engine=sglang", "rollout.sglang.api_key_file={tmp}/none"], "api_key_file"),
        (["rollout.engine=sglang", "rollout.sglang.python={tmp}/none"], "no such executable"),
        (["rollout.engine=sglang", "rollout.sglang.spill_directory={file}/spill"], "rollout.sglang.spill_directory=.*is a file"),
    ],
)
def test_a_job_that_cannot_run(overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        names = {"tmp": tmp_path, "file": tmp_path / "file", "port": taken.getsockname()[1]}
        given = [f"run={tmp_path / 'run'}", f"model.cache={tmp_path}/cache", *(text.format(**names) for text in overrides)]
        with pytest.raises((ConfigError, DataError), match=message):
            check(load_config(None, given))


def test_a_bridge_that_is_not_installed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_pr2.hf.model_types.has_megatron_bridge", lambda: False)
    for path in ([f"model.path={model}"], []):
        with pytest.raises(ConfigError, match="needs Megatron-Bridge, which is not installed"):
            check(load_config(None, [*path, f"run={tmp_path / 'run'}", "model.bridge=megatron-bridge"]))


def test_a_directory_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    for setting in (f"run={tmp_path}/run", f"model.cache={tmp_path}/cache"):
        with pytest.raises(ConfigError, match=f"{tmp_path} cannot be written to; choose another directory"):
            check(load_config(None, [setting]))


def test_each_set_of_sizes_has_a_policy_of_its_own(tmp_path: Path) -> None:
    def path(*overrides: str) -> str:
        return examples_model(load_config(None, [f"model.cache={tmp_path}", *overrides])).name

    big = "model.sizes={num_experts_per_tok: 8, num_experts: 64, hidden_size: 64}"
    assert path("seed=7") == path("seed=7", "model.sizes.num_experts=16") == "seed_7"
    assert path("seed=7", big) == "num_experts_64_num_experts_per_tok_8_seed_7"
    assert path("model.warm_start=calculator", big) == "calculator_num_experts_64_num_experts_per_tok_8_seed_0"
    processes = [f"run={tmp_path}/run", "parallel.processes=32", "parallel.expert=32"]
    with pytest.raises(ConfigError, match="the model's 16 experts cannot"):
        check(load_config(None, processes))
    check(load_config(None, [*processes, big]))  # 64 experts can


def test_a_cached_model_may_lie_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    (cache / "seed_7").mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != cache)
    given = [f"run={tmp_path}/run", f"model.cache={cache}"]
    check(load_config(None, [*given, "seed=7"]))
    with pytest.raises(ConfigError, match=f"model.cache={cache}: {cache} cannot be written to"):
        check(load_config(None, [*given, "seed=8"]))


def test_a_directory_that_may_not_be_looked_into(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    root = os.getuid() == 0
    try:
        if root:  # who may look everywhere
            os.setresuid(65534, 65534, 0)
        with pytest.raises(ConfigError, match="cannot be written to; choose another directory"):
            check_place(closed / "run", "run")
    finally:
        if root:
            os.setresuid(0, 0, 0)
        closed.chmod(0o700)


def test_prompts_longer_than_an_own_servers_context(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "1" * 130, "answer": "1"}))
    given = [f"model.path={model}", f"data={data}", f"run={tmp_path / 'run'}", "rollout.engine=sglang"]
    with pytest.raises(ConfigError, match="130 tokens, and the model's max_position_embeddings is 128"):
        check(load_config(None, given))
    longer = "rollout.sglang.extra_flags=['--context-length','512']"
    check(load_config(None, [*given, longer, f"rollout.sglang.python={sys.executable}"]))
    with pytest.raises(ConfigError, match="max_total_tokens is 100"):
        check(load_config(None, [*given, longer, "rollout.sglang.max_total_tokens=100"]))


def test_own_servers_need_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    given = [f"run={tmp_path / 'run'}", f"model.cache={tmp_path}/cache", "rollout.engine=sglang"]
    with pytest.raises(ConfigError, match=r"no environment with sglang was found.*make sglang"):
        check(load_config(None, given))
    with socket.create_server(("127.0.0.1", 0)) as up:
        url = f"rollout.urls=[http://127.0.0.1:{up.getsockname()[1]}]"
        with pytest.raises(ConfigError, match="no environment with sglang_router was found"):
            check(load_config(None, [*given, url, "rollout.router=own"]))


def test_a_directory_is_one_runs(tmp_path: Path) -> None:
    refusal = pytest.raises(ConfigError, match="another process is training in it")
    with _alone(tmp_path / "run"), refusal, _alone(tmp_path / "run"):
        pass
    with _alone(tmp_path / "run"):
        pass


def test_a_refused_run_leaves_the_settings_of_the_one_that_trains(tmp_path: Path) -> None:
    run = [f"run={tmp_path / 'run'}", f"model.cache={tmp_path}/cache"]
    with _alone(tmp_path / "run"):
        _claim(tmp_path / "run", load_config(None, [*run, "seed=1"]))
        settings = (tmp_path / "run" / "config.yaml").read_text()
        with pytest.raises(ConfigError, match="another process is training in it"):
            train(load_config(None, [*run, "seed=2"]))
        assert (tmp_path / "run" / "config.yaml").read_text() == settings


def test_damaged_settings_of_an_unfinished_run_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "config.yaml").write_text("steps: [")
    with pytest.raises(ConfigError, match=r"config\.yaml: not YAML"):
        _claim(tmp_path, load_config(None))


# ---- what it costs -----------------------------------------------------------------------------------------------------

CALL = """
import os, sys
from megatron_pr2.cli import app
def forbidden(*_): raise AssertionError("a process is started")
os.fork = os.posix_spawn = forbidden
try:
    app(["train", *sys.argv[1:]])
except SystemExit as end:
    print("code", end.code, sorted({"torch", "megatron", "transformers", "mbridge", "sglang"} & set(sys.modules)))
"""


def test_nothing_heavy_is_imported_and_no_process_started(model: Path, tmp_path: Path) -> None:
    """The last of the checks fails, so that all of them were made."""
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "1+1=", "answer": "2"}\n')
    change(model / "config.json", vocab_size=60)
    arguments = [f"model.path={model}", f"run={tmp_path / 'run'}", "--data", str(data)]
    arguments.append("rollout.environment=megatron_pr2.rl.calculator:Calculator")
    done = subprocess.run([sys.executable, "-c", CALL, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert "vocab_size is 60" in done.stderr, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "code 1 []"


@pytest.mark.parametrize(
    ("sglang", "length"),
    [
        ({}, math.inf),
        ({"max_total_tokens": 300}, 300.0),
        ({"extra_flags": ["--context-length", "200"], "max_total_tokens": 300}, 200.0),
        ({"extra_flags": ["--other", "--context-length=100"]}, 100.0),
    ],
)
def test_the_context_that_servers_are_given(sglang: dict[str, Any], length: float) -> None:
    assert context_length(sglang) == length
