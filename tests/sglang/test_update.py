"""The other way for weights into an engine: by disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_pr2.errors import ConfigError, RolloutError
from megatron_pr2.rollout.base import SamplingParams
from megatron_pr2.rollout.sglang.config import SGLangConfig
from megatron_pr2.rollout.sglang.engine import SGLangEngine
from tests.sglang.conftest import SHAPE, TinyModel, own_server
from tests.sglang.test_engine import assert_matches, make_requests


def merged_model(tiny: TinyModel, seed: int) -> dict[str, torch.Tensor]:
    """All weights of the checkpoint, with merged gates."""
    from safetensors.torch import load_file

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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push": "disk", "model_path": None, "urls": ("http://127.0.0.1:1",)}, "push='disk' is for own servers"),
        ({"push": "pigeon"}, "expected one of distributed, disk"),
        ({"push": "tensor"}, "expected one of distributed, disk"),
    ],
)
def test_ways_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SGLangConfig(**({"model_path": "somewhere"} | changes))  # type: ignore[arg-type]
