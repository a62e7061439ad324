"""The CPU adapters: import shims, plugin registration, hooks and seeded sampling, without a server."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_pr2.rollout.sglang.cpu import plugin, seeds, shims
from megatron_pr2.rollout.sglang.python import package_environment


def run_python(code: str, *path: Path, python: str = sys.executable, **env: str) -> str:
    """Output of a fresh interpreter; fails the test if it fails."""
    done = subprocess.run(
        [python, "-c", code],
        env=package_environment(os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | env),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(("version", "needed"), [("0.28.0+cu130", True), ("0.28.0+cpu", False), ("0.28.0", False), (None, False)])
def test_torchvision_schemas_are_needed_for_cuda_builds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, needed: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)  # of a CPU build
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    if version is not None:
        (package / "version.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    importlib.invalidate_caches()
    assert shims.operators_needed() is needed


@pytest.mark.sglang
def test_torchvision_imports_with_the_schemas(sglang_python: str) -> None:
    code = """
import torch
from megatron_pr2.rollout.sglang.cpu import shims
if not shims.operators_needed():
    print("not needed")
else:
    assert shims.declare_operators() and not shims.declare_operators()
    import torchvision
    assert hasattr(torch.ops.torchvision, "nms")
    print("imported")
"""
    assert run_python(code, python=sglang_python) in ("imported", "not needed")


def test_kernel_stub_imports_and_raises_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("sgl_kernel") is not None:
        pytest.skip("compiled SGLang kernels are installed")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    assert shims.install_kernel_stub()
    assert not shims.install_kernel_stub()
    try:
        module = importlib.import_module("sgl_kernel.flash_attn")
        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.flash_attn\.flash_attn_varlen_func was called.*torch_native"):
            module.flash_attn_varlen_func(1, causal=True)
        with pytest.raises(NotImplementedError, match=r"sgl_kernel\.scalar_type\.uint4b8"):
            importlib.import_module("sgl_kernel").scalar_type.uint4b8()
        with pytest.raises(AttributeError):
            _ = module.__wrapped__
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]


def test_nothing_is_touched_where_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finders = list(sys.meta_path)
    shims.install()
    assert sys.meta_path == finders
    monkeypatch.setattr(plugin, "_registered", False)
    plugin.register()
    assert not plugin._registered


@pytest.mark.sglang
@pytest.mark.parametrize("cpu_engine", ["1", "0"])
def test_hooks_are_applied_once_by_launcher_and_entry_point_together(sglang_python: str, tmp_path: Path, cpu_engine: str) -> None:
    """Where the package is installed, both register; and only for SGLang's CPU engine."""
    if torch.cuda.is_available():
        pytest.skip("the adapters refuse to work where there is CUDA")
    info = tmp_path / "megatron_pr2_probe-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-pr2-probe\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nmegatron_pr2_cpu = megatron_pr2.rollout.sglang.cpu.plugin:register\n"
    )
    code = """
from megatron_pr2.rollout.sglang.cpu import plugin, shims
shims.install()
plugin.register()
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
assert set(HookRegistry._patched) == set(HookRegistry._hooks), set(HookRegistry._hooks) - HookRegistry._patched
print(sorted({len(each) for each in HookRegistry._hooks.values()}), len(HookRegistry._patched))
"""
    expected = "[1] 7" if cpu_engine == "1" else "[] 0"
    # The other plugin of the package, where it is installed, is none of this test's business.
    env = {"SGLANG_USE_CPU_ENGINE": cpu_engine, "SGLANG_PLUGINS": "megatron_pr2_cpu"}
    assert run_python(code, tmp_path, python=sglang_python, **env) == expected


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None


def test_experts_of_other_ranks_are_left_out() -> None:
    """Two ranks of four experts each add up to the whole; rows with no, some and only own experts."""
    expert = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def native(layer: int, x: torch.Tensor, topk: TopK, config: str) -> torch.Tensor:
        """Elementwise experts; `layer` is the first expert of the rank. Negative ids would wrap round, as in SGLang's."""
        assert config == "config"
        return (topk.topk_weights.unsqueeze(-1) * expert[layer : layer + 4][topk.topk_ids.long()] * x.unsqueeze(1)).sum(1)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 5], [6, 7], [2, 1], [7, 3]], dtype=torch.int32)
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(2))
    want = (weights.unsqueeze(-1) * expert[ids.long()] * x.unsqueeze(1)).sum(1)
    total = torch.zeros(4, 3)
    for first in (0, 4):
        local = torch.where((ids >= first) & (ids < first + 4), ids - first, -1)
        total += plugin.skip_foreign_experts(native, first, x, TopK(weights, local, None), "config")  # type: ignore[arg-type]
    torch.testing.assert_close(total, want)
    nothing = TopK(weights, torch.full_like(ids, -1), None)
    assert not plugin.skip_foreign_experts(native, 0, x, nothing, "config").any()  # type: ignore[arg-type]


class TwoRanks:
    """A group of two ranks that hold the same tensor."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank_in_group = rank

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@pytest.mark.parametrize(("rank", "sizes", "rows"), [(0, [1, 3], [0]), (1, [1, 3], [1, 2, 3]), (1, None, [2, 3])])
def test_reduce_scatterv(rank: int, sizes: list[int] | None, rows: list[int]) -> None:
    x = torch.arange(8.0).reshape(4, 2)
    out = torch.empty(len(rows), 2)
    assert torch.equal(plugin.reduce_scatterv(TwoRanks(rank), x, None, sizes), 2 * x[rows])
    assert plugin.reduce_scatterv(TwoRanks(rank), x, out, sizes) is out
    assert torch.equal(out, 2 * x[rows])


def test_host_cache_is_unpinned_int32() -> None:
    class Cache:
        logged = False

        def _log_allocation(self) -> None:
            self.logged = True

    cache = Cache()
    plugin.init_host_cache(cache, 5, 4, 2, "routed_experts", "cpu")
    assert (cache.buffer.shape, cache.buffer.dtype, cache.buffer.is_pinned()) == ((5, 4, 2), torch.int32, False)  # type: ignore[attr-defined]
    assert not cache.buffer.any()  # type: ignore[attr-defined]
    assert cache.logged


def test_uniform_numbers_are_uniform_over_seeds_and_positions() -> None:
    for draws in (
        [seeds.uniform(s, 17) for s in range(20_000)],
        [seeds.uniform(3, p) for p in range(20_000)],
        [seeds.uniform(s, s) for s in range(20_000)],
        [seeds.uniform(s << 32, 5) for s in range(20_000)],
    ):
        values = np.array(draws)
        assert values.min() >= 0
        assert values.max() < 1
        counts = np.histogram(values, bins=100, range=(0, 1))[0]
        assert ((counts - 200) ** 2 / 200).sum() < 99 + 5 * np.sqrt(2 * 99)
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03
    assert seeds.uniform(1, 2) != seeds.uniform(2, 1)


def test_seeded_draws_follow_the_probabilities_and_only_their_own_seed() -> None:
    p = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    rows = 20_000
    logprobs = (3.0 * p).log().expand(rows, -1)  # unnormalised
    seed, positions = torch.arange(rows), torch.full((rows,), 9)
    drawn = seeds.sample_with_seeds(logprobs, seed, positions)
    assert drawn.shape == (rows, 1)
    share = torch.bincount(drawn.squeeze(1), minlength=6) / rows
    torch.testing.assert_close(share, p, atol=0.015, rtol=0)
    assert not share[p == 0].any()
    few = seeds.sample_with_seeds(logprobs[:5], seed[100:105], positions[:5])
    assert torch.equal(few, drawn[100:105])


@pytest.mark.parametrize(("draw", "index"), [(0.0, 1), (1.0 - 2.0**-53, 4)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(monkeypatch: pytest.MonkeyPatch, draw: float, index: int) -> None:
    monkeypatch.setattr(seeds, "uniform", lambda seed, position: draw)
    logprobs = torch.tensor([[0.0, 0.5, 0.2, 0.0, 0.3, 0.0]]).log()
    assert seeds.sample_with_seeds(logprobs, torch.tensor([1]), torch.tensor([1])).tolist() == [[index]]


def _filtered(rows: int, top_k: int = 1 << 30, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, torch.Tensor]:
    return {"top_ks": torch.full((rows,), top_k), "top_ps": torch.full((rows,), top_p), "min_ps": torch.full((rows,), min_p)}


def test_a_greedy_neighbour_does_not_change_what_a_seed_draws() -> None:
    """A health check is such a neighbour. Rows of fp32 probabilities whose sum may round above 1."""
    probs = torch.randn(400, 260, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    seed, positions = torch.arange(400), torch.arange(400) % 7
    alone = seeds.sample_with_seeds(probs.log(), seed, positions).view(-1)
    filters = _filtered(400)
    filters["top_ks"][17] = 1
    together = seeds.sample_filtered(probs, **filters, need_min_p_sampling=False, sampling_seed=seed, positions=positions)
    assert isinstance(together, torch.Tensor)
    assert together.dtype == torch.int32
    assert together[17] == probs[17].argmax()
    others = torch.arange(400) != 17
    assert torch.equal(together[others], alone[others].int())


@pytest.mark.parametrize(
    ("filters", "possible"),
    [
        ({"top_k": 2}, {1, 4}),
        ({"top_p": 0.6}, {1, 4}),
        ({"top_p": 0.4}, {1}),
        ({"min_p": 0.5}, {1, 4}),
        ({"min_p": 0.3}, {1, 2, 4}),
    ],
)
def test_filters_leave_the_likeliest_tokens_in_proportion(filters: dict[str, Any], possible: set[int]) -> None:
    rows, p = 4000, torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    drawn, kept, order, chosen = seeds.sample_filtered(
        p.expand(rows, -1),
        **_filtered(rows, **filters),
        need_min_p_sampling="min_p" in filters,
        sampling_seed=torch.arange(rows),
        positions=torch.full((rows,), 3),
        return_filtered_probs=True,
        max_top_k=filters.get("top_k"),
    )
    assert set(drawn.tolist()) == possible
    left = torch.where(torch.tensor([i in possible for i in range(6)]), p, 0.0)
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / rows, left / left.sum(), atol=0.03, rtol=0)
    assert torch.equal(kept[0], left[order[0].long()])
    assert torch.equal(chosen, p[drawn.long()])


class _Bag:
    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


def test_requests_without_a_seed_get_one_of_their_own() -> None:
    requests = [_Bag(sampling_params=_Bag(sampling_seed=seed)) for seed in (5, None, None)]
    info = _Bag(sampling_seed=None)
    seeds.fill_sampling_seeds(info, object, _Bag(reqs=requests), 260)
    first = info.sampling_seed.tolist()  # type: ignore[attr-defined]
    assert first[0] == 5
    assert first[1] != first[2]
    again = _Bag(sampling_seed=None)
    seeds.fill_sampling_seeds(again, object, _Bag(reqs=requests), 260)
    assert again.sampling_seed.tolist() == first  # type: ignore[attr-defined]
    given = torch.tensor([1, 2, 3])
    deterministic = _Bag(sampling_seed=given)
    seeds.fill_sampling_seeds(deterministic, object, _Bag(reqs=requests), 260)
    assert deterministic.sampling_seed is given  # type: ignore[attr-defined]
