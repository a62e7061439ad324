"""Hugging Face <-> Megatron: shapes, logits, exact round trips, and directories that are whole or untouched."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_pr2 import host
from megatron_pr2.errors import CheckpointError, ConfigError
from megatron_pr2.hf import files
from megatron_pr2.hf.bridge import export_weights, load_model, save_hf
from megatron_pr2.hf.shape import model_shape
from tests.helpers.distributed import pool
from tests.helpers.rounding import assert_near
from tests.host.models import SIZES, make_checkpoint, reference_logits, tiny_config

pytestmark = pytest.mark.slow

Tensors = dict[str, torch.Tensor]
EP2 = {"expert": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
}
TP2_EP2 = {"tensor": 2, "expert": 2, "expert_tensor": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), tiny_config("qwen3_moe"))
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, 16), generator=torch.Generator().manual_seed(3))


def _tensors(path: Path) -> Tensors:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _equal(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


# --- model_shape ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "moe_layers"),
    [
        ("qwen3_moe", {}, (0, 1, 2, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1, 3)),
        ("qwen3_moe", {"mlp_only_layers": [0, 2]}, (1, 3)),
        ("qwen2_moe", {"decoder_sparse_step": 3, "num_hidden_layers": 7}, (2, 5)),
        ("mixtral", {}, (0, 1, 2, 3)),
        ("deepseek_v3", {"first_k_dense_replace": 3}, (3,)),
    ],
)
def test_model_shape(family: str, changes: dict[str, Any], moe_layers: tuple[int, ...]) -> None:
    config = tiny_config(family, **changes)
    shape = model_shape(config)
    experts, topk = (8, 2) if family == "mixtral" else (16, 4)
    assert (shape.moe_layers, shape.num_experts, shape.topk) == (moe_layers, experts, topk)
    assert (shape.num_hidden_layers, shape.vocab_size) == (config.num_hidden_layers, SIZES["vocab_size"])


def test_model_shape_is_that_of_transformers() -> None:
    from transformers import AutoModelForCausalLM

    for family, changes in (("qwen3_moe", {"decoder_sparse_step": 2}), ("deepseek_v3", {"first_k_dense_replace": 2})):
        config = tiny_config(family, **changes)
        with torch.device("meta"):
            layers = AutoModelForCausalLM.from_config(config).model.layers
        assert model_shape(config).moe_layers == tuple(index for index, layer in enumerate(layers) if hasattr(layer.mlp, "experts"))


def test_model_shape_refuses_dense_models() -> None:
    with pytest.raises(ConfigError, match="'qwen3' is not a mixture-of-experts model"):
        model_shape(tiny_config("qwen3"))
    with pytest.raises(ConfigError, match="MoE layers: 0"):
        model_shape(tiny_config("qwen3_moe", mlp_only_layers=[0, 1, 2, 3]))


# --- logits --------------------------------------------------------------------------------------------------------


def _logits(path: Path, layout: dict[str, Any], tokens: torch.Tensor, packed: bool = False) -> torch.Tensor:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    host.init(**layout)
    _, (model,) = load_model(path, dtype=torch.float32, wrap_with_ddp=False)
    model.eval()
    batch, length = tokens.shape
    params, shape = None, tokens.shape
    if packed:
        ends = torch.arange(0, tokens.numel() + 1, length, dtype=torch.int32)
        params = PackedSeqParams("thd", ends, ends, max_seqlen_q=length, max_seqlen_kv=length)
        shape = torch.Size((1, batch * length))
    positions = torch.arange(length).repeat(batch).view(shape)
    with torch.no_grad():
        logits = model(tokens.view(shape), positions, None, packed_seq_params=params)
        return gather_from_tensor_model_parallel_region(logits).view(batch, length, -1).clone()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {}),
        pytest.param("qwen3_moe", {"tie_word_embeddings": True}, marks=pytest.mark.exhaustive),
        ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
        ("qwen2_moe", {}),
        ("mixtral", {}),
        ("deepseek_v3", {}),
        pytest.param("deepseek_v3", {"rope_parameters": YARN}, marks=pytest.mark.exhaustive),
        pytest.param(
            "deepseek_v3",
            {"q_lora_rank": None, "norm_topk_prob": True, "routed_scaling_factor": 1.5},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_logits_of_transformers(family: str, changes: dict[str, Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / family, tiny_config(family, **changes))
    expected = reference_logits(path, tokens)
    for processes, layout, packed in ((1, {}, False), (2, EP2, True), (2, TP2_EP2, False)):
        for logits in pool(processes).run(_logits, path, layout, tokens, packed):
            assert_near(logits, expected, 64, msg=f"{layout}, packed={packed}")


def test_rope_theta_of_the_config_counts(tokens: torch.Tensor, tmp_path: Path) -> None:
    rope = {"rope_theta": 300.0, "rope_type": "default"}
    path = make_checkpoint(tmp_path / "theta", tiny_config("qwen3_moe", rope_parameters=rope))
    assert_near(pool(1).run(_logits, path, {}, tokens)[0], reference_logits(path, tokens), 64)


# --- export and round trip -----------------------------------------------------------------------------------------


def _export(path: Path, layout: dict[str, Any], dtype: torch.dtype, wrap_with_ddp: bool) -> Tensors:
    host.init(**layout)
    with mock.patch.object(files, "tensor_files", wraps=files.tensor_files) as headers:
        bridge, chunks = load_model(path, dtype=dtype, wrap_with_ddp=wrap_with_ddp)
    assert headers.call_count == 1, "each rank reads the headers of a checkpoint of hundreds of files"
    names: list[str] = []
    tensors: Tensors = {}
    for name, tensor in export_weights(bridge, chunks):
        names.append(name)
        tensors[name] = tensor.clone()
    assert len(names) == len(set(names))
    return tensors


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, {}),
        (2, EP2),
        (2, TP2_EP2),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        pytest.param(
            4, {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}, marks=pytest.mark.exhaustive
        ),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_export_is_exact_on_every_rank(processes: int, layout: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tiny_config("qwen3_moe", tie_word_embeddings=tied))
    expected = _tensors(path)
    for exported in pool(processes).run(_export, path, layout, torch.float32, not tied):
        _equal(exported, expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3"])
def test_export_of_other_families(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / family, tiny_config(family))
    for exported in pool(2).run(_export, path, TP2_EP2, torch.float32, False):
        _equal(exported, _tensors(path))


def _save(path: Path, target: Path, layout: dict[str, Any], dtype: torch.dtype, **options: Any) -> str:
    host.init(**layout)
    bridge, chunks = load_model(path, dtype=dtype)
    try:
        save_hf(bridge, chunks, target, tokenizer_from=path, **options)
    except CheckpointError as error:
        return str(error)
    return ""


def test_saved_directory_is_complete_and_loads_in_transformers(checkpoint: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    assert pool(2).run(_save, checkpoint, target, EP2, torch.float32) == ["", ""]
    _equal(_tensors(target), _tensors(checkpoint))
    assert sorted(file.name for file in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (target / "config.json").stat().st_mode & 0o777 == (target / "model.safetensors").stat().st_mode & 0o777
    saved, original = (json.loads((path / "config.json").read_text()) for path in (target, checkpoint))
    assert saved == original
    assert torch.equal(reference_logits(target, tokens), reference_logits(checkpoint, tokens))
    # A second time, over the first: the same, and nothing left beside it.
    assert pool(2).run(_save, checkpoint, target, TP2_EP2, torch.float32) == ["", ""]
    _equal(_tensors(target), _tensors(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_shards_have_an_index_and_bf16_says_so(checkpoint: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    pool(2).run(_save, checkpoint, target, EP2, torch.bfloat16, max_shard_bytes=100_000)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in _tensors(checkpoint).items()}
    _equal(_tensors(target), expected)
    files = sorted(target.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 120_000 for file in files)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {name: load_file(target / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert reference_logits(target, tokens).shape == (2, 16, SIZES["vocab_size"])
    # And back into Megatron: an index is read, too.
    _equal(pool(1).run(_export, target, {}, torch.bfloat16, False)[0], expected)


# --- faults --------------------------------------------------------------------------------------------------------


def _save_with_full_disk(path: Path, target: Path, limit: int) -> str:
    """No file may grow beyond ``limit`` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    host.init(**EP2)
    bridge, chunks = load_model(path, dtype=torch.float32)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save_hf(bridge, chunks, target)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    return ""


def _save_with_failing_rename(path: Path, target: Path) -> str:
    real = Path.rename

    def rename(self: Path, other: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(errno.EIO, "on purpose")
        return real(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        return _save(path, target, EP2, torch.float32)


def test_a_failed_save_leaves_the_previous_checkpoint_whole(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "saved"
    assert pool(2).run(_save, checkpoint, target, EP2, torch.float32) == ["", ""]
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    other = make_checkpoint(tmp_path / "other", tiny_config("qwen3_moe"), seed=1)
    for errors in (
        pool(2).run(_save_with_full_disk, other, target, 100_000),
        pool(2).run(_save_with_failing_rename, other, target),
    ):
        # Every rank hears of it.
        assert all("what was there is unchanged" in error for error in errors), errors
        assert {file.name: file.read_bytes() for file in target.iterdir()} == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "saved"]


def _load_error(path: Path, layout: dict[str, Any], **options: Any) -> str:
    host.init(**layout)
    with pytest.raises(ConfigError) as caught:
        load_model(path, dtype=torch.float32, **options)
    return str(caught.value)


def test_what_cannot_be_loaded_is_named(checkpoint: Path, tmp_path: Path) -> None:
    run = pool(1).run
    assert "no config.json" in run(_load_error, tmp_path / "nowhere", {})[0]
    dense = make_checkpoint(tmp_path / "dense", tiny_config("qwen3"))
    assert "is not a mixture-of-experts model" in run(_load_error, dense, {})[0]
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    config = tiny_config("qwen3_moe").to_dict() | {"model_type": "flex_olmo", "num_experts": 16}
    (unknown / "config.json").write_text(json.dumps(config))
    assert "model_type='flex_olmo' cannot be trained here" in run(_load_error, unknown, {})[0]
    scaled = tmp_path / "scaled"
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    tiny_config("qwen3_moe", rope_parameters=rope).save_pretrained(scaled)
    assert "rope_type='linear'" in run(_load_error, scaled, {})[0]
    assert "no fields ['no_such_field']" in run(_load_error, checkpoint, {}, extra_config={"no_such_field": 1})[0]
    assert "check extra_config" in run(_load_error, checkpoint, {}, extra_config={"moe_grouped_gemm": False})[0]


def test_a_layout_that_loses_expert_gradients_is_refused(checkpoint: Path) -> None:
    errors = pool(2).run(_load_error, checkpoint, {"tensor": 2, "expert_tensor": 1})
    assert all("would lose expert gradients" in error for error in errors)


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_tensors_that_do_not_match_the_model_are_refused(checkpoint: Path, tmp_path: Path, fault: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / fault
    path.mkdir()
    (path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = _tensors(checkpoint)
    if fault == "missing":
        del tensors["model.layers.1.mlp.gate.weight"]
    else:
        tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(64)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (error,) = set(pool(2).run(_load_error, path, EP2))
    assert ("lacks" if fault == "missing" else "unknown to the model") in error
    assert "model.layers.1." in error


def test_parts_that_are_not_built_are_skipped(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = make_checkpoint(tmp_path / "model", tiny_config("deepseek_v3"))
    expected = _tensors(path)
    # The multi-token prediction layer follows the last decoder layer.
    extra = {"model.layers.4.enorm.weight": torch.ones(64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(expected | extra, path / "model.safetensors", metadata={"format": "pt"})
    _equal(pool(1).run(_export, path, {}, torch.float32, False)[0], expected)


@pytest.mark.parametrize("bridge", ["auto", "mbridge"])
def test_dense_models_load_on_request(bridge: str, tokens: torch.Tensor, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "dense", tiny_config("qwen3"))
    logits = pool(1).run(_dense_logits, path, tokens, bridge)[0]
    assert_near(logits, reference_logits(path, tokens), 64)


def _dense_logits(path: Path, tokens: torch.Tensor, bridge: str) -> torch.Tensor:
    host.init()
    _, (model,) = load_model(path, dtype=torch.float32, wrap_with_ddp=False, require_moe=False, bridge=bridge)
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None).clone()
