"""Who can reach a server, what can be read of its key, and what never runs: pickles, code from an answer, code from a model."""

from __future__ import annotations

import ast
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron_pr2
from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.doctor import client as doctor_client
from megatron_pr2.rollout.doctor.client import EngineClient
from megatron_pr2.rollout.sglang.config import SGLangConfig, is_loopback
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.server import SGLangServer, check_weight_files
from tests.sglang.conftest import SHAPE, TinyModel
from tests.sglang.fake_server import FakeServer, serve
from tests.sglang.test_lifecycle import group_members

PACKAGE = Path(megatron_pr2.__file__).parent
PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


@pytest.mark.sglang
def test_our_server_listens_on_loopback_only(engine: SGLangEngine) -> None:
    """Every process of it, the store in which its ranks meet included."""
    import psutil

    server = engine.replicas[0].server
    assert server is not None
    assert server.pid is not None
    listening = [
        connection.laddr.ip
        for pid in group_members(server.pid)
        for connection in psutil.Process(pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 1
    assert all(is_loopback(address) for address in listening), listening


def test_a_server_for_other_machines_needs_a_key(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret")
    for address in ("0.0.0.0", "::", "192.0.2.7"):
        with pytest.raises(ConfigError, match=r"sglang\.bind=.*api_key_file"):
            SGLangConfig(model_path="m", bind=address)
        config = SGLangConfig(model_path="m", python=sys.executable, bind=address, api_key_file=str(key))
        command = SGLangServer(config).command(31)
        assert command[command.index("--host") + 1] == address
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "10.0.0.1", "example.org")] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


def test_an_address_that_is_not_ours(tmp_path: Path, tiny: TinyModel) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret")
    server = SGLangServer(SGLangConfig(model_path=tiny.path, python=sys.executable, bind="192.0.2.7", api_key_file=str(key)))
    with pytest.raises(ConfigError, match=r"sglang\.bind='192\.0\.2\.7' is no address of this machine"):
        server.start()
    assert server.pid is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"urls": ("http://10.0.0.1:30000",)}, "other hosts are not supported without allow_remote=true"),
        ({"urls": ("https://engine.example:30000",)}, "expected http://127.0.0.1:PORT"),
        ({"urls": ("http://10.0.0.1:30000",), "allow_remote": True}, "set api_key_file"),
        ({"urls": ("http://user:pw@127.0.0.1:30000",)}, "user name or password"),
        ({"urls": ("http://127.0.0.1",)}, "expected http://127.0.0.1:PORT"),
        ({"urls": ("http://127.0.0.1:99999",)}, "expected http://127.0.0.1:PORT"),
        ({"urls": ("http://127.0.0.1:30000/v1",)}, "expected http://127.0.0.1:PORT"),
    ],
)
def test_urls_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        SGLangConfig(**fields)
    assert "pw" not in str(refused.value)


def test_remote_urls_with_leave_and_key(tmp_path: Path) -> None:
    key = str(tmp_path / "key")
    for url in ("http://10.0.0.1:30000", "https://engine.example", "https://engine.example:8443", "https://127.0.0.1:30000"):
        assert SGLangConfig(urls=(url,), allow_remote=True, api_key_file=key).urls == (url,)


@pytest.mark.sglang
def test_the_key_is_in_no_command_line_and_no_log(engine: SGLangEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    replica = engine.replicas[0]
    server = replica.server
    assert server is not None
    assert server.pid is not None
    assert server.log_path is not None
    assert len(server.api_key) >= 32
    members = group_members(server.pid)
    assert len(members) >= 3
    assert not [command for command in members.values() if server.api_key in command]
    assert server.api_key not in server.log_path.read_text()
    key = tmp_path / "key"
    key.write_text(server.api_key)
    config = SGLangConfig(urls=(replica.url,), api_key_file=str(key))
    with caplog.at_level(logging.DEBUG):
        guest = SGLangEngine(config, SHAPE)
        guest.start()  # reads /server_info, in which SGLang itself tells the key
        guest.close()
    assert caplog.text
    assert server.api_key not in caplog.text
    assert server.api_key not in repr(config)


@pytest.mark.parametrize("flags", [("--admin-api-key", "x"), ("--admin-api=x",), ("--api-k", "x"), ("--ssl-keyfile-password", "x")])
def test_secrets_are_not_taken_from_flags(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="secret to every user of the machine"):
        SGLangServer(SGLangConfig(model_path="m", extra_flags=flags))


def test_the_log_in_an_error_message_is_redacted(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("s3cret")
    log = tmp_path / "log"
    log.write_text("api_key='s3cret' and then it died\n")
    server = SGLangServer(SGLangConfig(model_path="m", api_key_file=str(key), log_path=str(log)))
    assert "<redacted>" in server.describe_log()
    assert "s3cret" not in server.describe_log() + server.describe_end()


def dangerous(source: str) -> list[str]:
    """Calls and imports that can run code out of data, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in PICKLERS]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "np.fromfile", "torch.jit.load"):
                found.append(f"{node.lineno}: {name}")
            elif name.endswith("torch.load") and not _is_true(keywords.get("weights_only")):
                found.append(f"{node.lineno}: {name} without weights_only=True")
            elif name.endswith("np.load") and _is_true(keywords.get("allow_pickle")):
                found.append(f"{node.lineno}: {name} with allow_pickle=True")
            elif _is_true(keywords.get("trust_remote_code")) or _is_true(keywords.get("shell")):
                found.append(f"{node.lineno}: {name} with trust_remote_code or shell")
            elif name.endswith(".from_pretrained") and "Model" in name and not _is_true(keywords.get("use_safetensors")):
                found.append(f"{node.lineno}: {name} without use_safetensors=True")
            elif name.endswith("_object_list"):  # torch.distributed's, which are pickles
                found.append(f"{node.lineno}: {name}")
    return found


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from dill import loads", "eval(answer)", "exec(answer)", "torch.load(path)",
        "torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "subprocess.run(text, shell=True)",
        "AutoModelForCausalLM.from_pretrained(path)", "AutoConfig.from_pretrained(path, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert dangerous(line)


def test_nothing_on_the_way_of_an_answer_runs_code() -> None:
    # collective.py hands Python objects between the trainer's own ranks; what a server said has been parsed by then.
    allowed = {"collective.py": ("_object_list",)}
    files = sorted((PACKAGE / "rollout").rglob("*.py"))
    assert len(files) > 15
    problems = {
        str(file.relative_to(PACKAGE)): kept
        for file in files
        if (
            kept := [
                each
                for each in dangerous(file.read_text(encoding="utf-8"))
                if not each.endswith(allowed.get(file.name, ("nothing",)))
            ]
        )
    }
    assert problems == {}


@pytest.mark.parametrize("names", [("pytorch_model.bin",), ("model.pt", "consolidated.00.pth")])
def test_pickled_weights_are_refused_before_the_start(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps({}))
    server = SGLangServer(SGLangConfig(model_path=str(tmp_path), log_path=str(tmp_path / "log")))
    with pytest.raises(ConfigError, match="only safetensors are loaded") as refused:
        server.start()
    assert all(name in str(refused.value) for name in names)
    assert server.pid is None
    assert not (tmp_path / "log").exists()


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no weights"):
        check_weight_files(str(tmp_path))


def test_safetensors_are_the_only_format_that_is_asked_for(tiny: TinyModel) -> None:
    check_weight_files(tiny.path)
    command = SGLangServer(SGLangConfig(model_path=tiny.path, python=sys.executable)).command(1)
    assert command[command.index("--load-format") + 1] == "safetensors"
    with pytest.raises(ConfigError, match="--load-format is set by the engine"):
        SGLangConfig(model_path="m", extra_flags=("--load-format", "auto"))


def test_the_doctor_does_not_swallow_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_client, "_MAX_BYTES", 1 << 20)
    with serve(FakeServer()) as fake, EngineClient(fake.url, api_key=None, timeout_s=10.0) as client:
        fake.overrides["/server_info"] = lambda body, call: (200, b" " * (2 << 20))
        with pytest.raises(RolloutError, match="more than 1 MiB"):
            client.request("GET", "/server_info")
