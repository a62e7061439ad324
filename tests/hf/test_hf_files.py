"""Which files of a directory are the checkpoint, and what is refused instead of read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_pr2.errors import ConfigError
from megatron_pr2.hf.files import TensorIndex
from megatron_pr2.hf.weight_files import INDEX_NAME, SINGLE_NAME

PARTS = {"one.safetensors": {"a": torch.arange(3.0)}, "two.safetensors": {"b": torch.ones(2), "c": torch.zeros(1)}}
WHOLE = {name: tensor for part in PARTS.values() for name, tensor in part.items()}


def write(directory: Path, files: dict[str, dict[str, Tensor]], weight_map: dict[str, str] | None = None) -> TensorIndex:
    for file, tensors in files.items():
        save_file(tensors, directory / file)
    if weight_map is not None:
        (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return TensorIndex(directory)


def reads_whole(index: TensorIndex) -> None:
    assert sorted(index.names()) == sorted(WHOLE)
    # A tied weight is asked for twice.
    tensors = index.load_some_hf_weight(["a", "b", "a", "c"])
    assert tensors.keys() == WHOLE.keys()
    assert all(torch.equal(tensors[name], WHOLE[name]) for name in WHOLE)
    assert torch.equal(index.load_one_hf_weight("b"), WHOLE["b"])


def test_one_file(tmp_path: Path) -> None:
    reads_whole(write(tmp_path, {SINGLE_NAME: WHOLE}))


def test_an_index(tmp_path: Path) -> None:
    reads_whole(write(tmp_path, PARTS, {name: file for file, part in PARTS.items() for name in part}))


def test_parts_without_an_index(tmp_path: Path) -> None:
    reads_whole(write(tmp_path, PARTS))


@pytest.mark.parametrize("indexed", [False, True])
def test_files_of_another_format_beside_the_checkpoint_do_not_count(tmp_path: Path, indexed: bool) -> None:
    other = {"consolidated.safetensors": {"tok_embeddings.weight": torch.ones(1), "a": torch.zeros(3)}}
    if indexed:
        reads_whole(write(tmp_path, {**PARTS, **other}, {name: file for file, part in PARTS.items() for name in part}))
    else:
        reads_whole(write(tmp_path, {SINGLE_NAME: WHOLE, **other}))


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {**PARTS, "three.safetensors": {"a": torch.zeros(3)}})
    with pytest.raises(ConfigError, match=r"'a' is in one.safetensors and in three.safetensors"):
        index.names()


def test_one_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {SINGLE_NAME: WHOLE, **PARTS}, {name: file for file, part in PARTS.items() for name in part})
    with pytest.raises(ConfigError, match="remove what is old"):
        index.names()


def test_an_unfinished_download_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {"one.safetensors": PARTS["one.safetensors"]}, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the files that its index names, first two.safetensors"):
        index.names()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(ConfigError, match="weight_map"):
        TensorIndex(tmp_path).names()


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {SINGLE_NAME: WHOLE})
    (tmp_path / SINGLE_NAME).write_bytes((tmp_path / SINGLE_NAME).read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"model.safetensors \(\d+ bytes\) cannot be read"):
        index.names()


def test_an_index_that_names_a_tensor_of_another_file_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, PARTS, {"a": "two.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    with pytest.raises(ConfigError, match=r"names two.safetensors for 'a', which is not in it"):
        index.load_some_hf_weight(["c"])


def test_no_files_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no .*safetensors files"):
        TensorIndex(tmp_path).names()
    with pytest.raises(ConfigError, match="no tensor 'd'"):
        write(tmp_path, PARTS).load_some_hf_weight(["a", "d"])


def test_fp8_without_its_scales_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path, {SINGLE_NAME: {"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.ones(2, dtype=torch.uint8)}})
    assert index.load_one_hf_weight("b").dtype is torch.uint8
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        index.load_some_hf_weight(["a"])
