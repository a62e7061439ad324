"""Pushing through a directory: parts of several senders are a model or are refused, and a real server loads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from megatron_pr2.rollout.sglang.push.disk import DiskPush, DiskTarget, write_part
from megatron_pr2.rollout.sglang.push.session import PushSession
from tests.sglang.conftest import SHAPE, TinyModel, own_server
from tests.sglang.plain_server import PlainServer, other_model
from tests.sglang.test_engine import assert_matches, make_requests


class Loads:
    """A session that looks at the directory while it is there."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.tensors: dict[str, torch.Tensor] = {}
        self.files: list[str] = []
        self.calls: list[tuple[str, object]] = []

    def load_directory(self, path: str) -> None:
        self.calls.append(("load", path))
        if self.refuses:
            raise RolloutError("no, thanks")
        self.files = sorted(file.name for file in Path(path).iterdir())
        index = json.loads((Path(path) / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            self.tensors[name] = load_file(Path(path) / file)[name]

    def publish(self, label: str, *, flush_cache: bool) -> None:
        self.calls.append((label, flush_cache))


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory that looks like a model with tied embeddings, a prediction layer and old rotary frequencies."""
    path = tmp_path / "model"
    path.mkdir()
    weights = {f"model.layers.{layer}.w{i}": torch.randn(4, 3) for layer in range(2) for i in range(3)}
    weights["model.embed_tokens.weight"] = torch.randn(8, 3).to(torch.bfloat16)
    extra = ("lm_head.weight", "model.layers.2.w0", "model.layers.0.rotary_emb.inv_freq")
    save_file(weights | {name: torch.ones(1) for name in extra}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "tie_word_embeddings": True}))
    (path / "tokenizer.json").write_text("{}")
    (path / "pytorch_model.bin").write_text("never")
    return path, weights


def send(target: DiskTarget, weights: dict[str, torch.Tensor], parts: int = 2) -> int:
    items = list(weights.items())
    return sum(write_part(target, part, iter(items[part::parts])) for part in range(parts))


def test_parts_become_one_model(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, weights = model
    push = DiskPush(path, tmp_path, shard_bytes=100)
    target = push.begin()
    assert send(target, weights) == sum(tensor.nbytes for tensor in weights.values())
    assert len(list(Path(target.directory).glob("part-*.safetensors"))) >= 4
    loads = [Loads(), Loads()]
    push.finish(loads, "7", flush_cache=True)  # type: ignore[arg-type]
    for each in loads:
        assert each.calls == [("load", target.directory), ("7", True)]
        assert each.tensors.keys() == weights.keys()
        assert all(torch.equal(each.tensors[name], weights[name]) for name in weights)
        assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < set(each.files)
        assert not any(name.endswith((".bin", ".partial")) for name in each.files)
    assert not Path(target.directory).exists()
    assert push.begin().directory != target.directory
    push.abandon()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_what_is_not_the_model_reaches_no_server(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, weights = model
    first = next(iter(weights))
    partial = {name: tensor for name, tensor in weights.items() if name != first}
    for given, parts, message in (
        (partial, 1, rf"1 missing \(first \['{first}'\]\)"),
        (weights | {"who.knows": torch.ones(1)}, 1, r"1 unknown \(first \['who.knows'\]\)"),
    ):
        push, loads = DiskPush(path, tmp_path), Loads()
        target = push.begin()
        send(target, given, parts)
        with pytest.raises(RolloutError, match=message):
            push.finish([loads], "7", flush_cache=True)  # type: ignore[list-item]
        assert loads.calls == []
        push.abandon()
        assert not Path(target.directory).exists()
    push = DiskPush(path, tmp_path)
    target = push.begin()
    send(target, weights, 1)
    write_part(target, 1, [(first, weights[first])])
    with pytest.raises(RolloutError, match="1 there twice"):
        push.finish([], "7", flush_cache=True)
    push.abandon()


def test_failures_name_the_place(model: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    path, weights = model
    with pytest.raises(ConfigError, match=r"no config\.json"):
        DiskPush(tmp_path, tmp_path).begin()
    with pytest.raises(RolloutError, match=r"no directory for the weights in .*nowhere"):
        DiskPush(path, tmp_path / "nowhere").begin()
    with pytest.raises(RolloutError, match="begin"):
        DiskPush(path, tmp_path).finish([], "7", flush_cache=True)
    with pytest.raises(RolloutError, match=r"gone/part-00000-00000.safetensors could not be written"):
        write_part(DiskTarget(str(tmp_path / "gone"), 1 << 20), 0, weights.items())
    push = DiskPush(path, tmp_path)
    send(push.begin(), weights)
    with pytest.raises(RolloutError, match="no, thanks"):
        push.finish([Loads(refuses=True)], "7", flush_cache=True)  # type: ignore[list-item]
    push.abandon()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.sglang
def test_a_real_server_loads_the_directory(plain: PlainServer, tiny: TinyModel, tmp_path: Path) -> None:
    other = other_model(tiny, tmp_path / "other", seed=1)
    for label, model in (("a", other), ("b", tiny)):
        push = DiskPush(tiny.path, tmp_path, shard_bytes=64 << 10)
        target = push.begin()
        send(target, load_file(f"{model.path}/model.safetensors"), parts=3)
        push.finish([PushSession(plain.http)], label, flush_cache=True)
        assert plain.version() == label
        plain.assert_serves(model, label)
        assert not Path(target.directory).exists()
    # A directory that the server cannot load leaves it as it was.
    with pytest.raises(RolloutError, match="/update_weights_from_disk was refused"):
        PushSession(plain.http).load_directory(str(tmp_path / "nowhere"))
    plain.assert_serves(tiny, "b")


def merged_model(tiny: TinyModel, seed: int) -> dict[str, torch.Tensor]:
    """All weights of the checkpoint, with merged gates."""
    return load_file(f"{tiny.path}/model.safetensors") | tiny.merged_gates(seed)


@pytest.mark.sglang
@pytest.mark.usefixtures("preloaded")
def test_by_disk(tiny: TinyModel, tmp_path: Path) -> None:
    directory = tmp_path / "pushes"
    directory.mkdir()
    config = own_server(tiny.path, tmp_path / "log", push="disk", push_directory=str(directory), weight_bucket_bytes=64 << 10)
    engine = SGLangEngine(config, SHAPE)
    engine.start()
    try:
        engine.update_weights(merged_model(tiny, 41).items(), 1)
        batch = engine.generate(make_requests(8), SamplingParams(12), return_routes=True)
        assert_matches(batch.responses, tiny, tiny.merged_gates(41))
        assert {response.weight_version for response in batch.responses} == {1}
        with pytest.raises(RolloutError, match="missing"):  # SGLang would keep old weights under the names that are not there
            engine.update_weights(tiny.gates().items(), 2)
        assert not list(directory.iterdir())
        engine.update_weights(merged_model(tiny, 42).items(), 3)
        batch = engine.generate(make_requests(8), SamplingParams(12), return_routes=True)
        assert_matches(batch.responses, tiny, tiny.merged_gates(42))
    finally:
        engine.close()
    assert not list(directory.iterdir())
