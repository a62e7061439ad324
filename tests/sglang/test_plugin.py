"""A wish for routes in a request id: read back as written, never mistaken, and no id the beginning of another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_pr2.rollout.sglang.plugin import decode_rid, encode_rid, request_routes
from tests.sglang.preload import Preloaded

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_-"
UNIQUE = st.text(CHARACTERS, min_size=1, max_size=40)
START = st.none() | st.integers(0, 10**10 - 1)


def write_distribution(folder: Path) -> Path:
    """Metadata of an installed distribution that names our plugin; on PYTHONPATH it stands for `pip install megatron-pr2`."""
    info = folder / "megatron_pr2_plugin-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-pr2-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.plugins]\nmegatron_pr2_routes = megatron_pr2.rollout.sglang.plugin:register\n"
    )
    return folder


@given(UNIQUE, START)
def test_round_trip(unique: str, start: int | None) -> None:
    assert decode_rid(encode_rid(unique, start)) == start


@given(UNIQUE, START, st.text(CHARACTERS, max_size=3), START)
def test_no_id_is_the_beginning_of_another(unique: str, start_a: int | None, more: str, start_b: int | None) -> None:
    a, b = encode_rid(unique, start_a), encode_rid(unique + more, start_b)
    assert a == b or not (a.startswith(b) or b.startswith(a))


@given(UNIQUE, st.integers(0, 10**6), st.text(max_size=5), st.integers(0, 60))
def test_a_similar_id_is_left_alone(unique: str, start: int, extra: str, position: int) -> None:
    rid = encode_rid(unique, start)
    position = min(position, len(rid))
    changed = rid[:position] + extra + rid[position:]
    decoded = decode_rid(changed)
    # Whatever is read must be exactly what writes this very id.
    assert decoded is None or encode_rid(changed.split(".")[1], decoded) == changed


@pytest.mark.parametrize(
    "rid",
    [
        "0123456789abcdef0123456789abcdef", "HEALTH_CHECK_1", "", None, 7, ["pr2.a.r1."], "pr2.a.r1", "pr2.a.r1._0", "pr2.a.r01.",
        "pr2.a.r-1.", "pr2.a.r1.\n", " pr2.a.r1.", "pr2..r1.", "pr2.a.r.", "pr2.a.b.r1.", "pr2.a.r1.r2.", "PR2.a.r1.",
        "pr2.a.r٣.", "pr2.a.r12345678901.", "pr2.a.x.", f"pr2.{'a' * 201}.r1.",
    ],
)  # fmt: skip
def test_no_wish(rid: object) -> None:
    assert decode_rid(rid) is None
    request = SimpleNamespace(rid=rid, return_routed_experts=False, routed_experts_start_len=0)
    request_routes(request)
    assert (request.rid, request.return_routed_experts, request.routed_experts_start_len) == (rid, False, 0)


def test_hook_sets_the_two_fields_and_nothing_else() -> None:
    request = SimpleNamespace(rid=encode_rid("a", 12), return_routed_experts=False, routed_experts_start_len=0, input_ids=[1])
    assert request_routes(request) is None
    assert vars(request) == {"rid": "pr2.a.r12.", "return_routed_experts": True, "routed_experts_start_len": 12, "input_ids": [1]}


def test_routes_asked_for_in_the_usual_way_are_not_taken_away() -> None:
    request = SimpleNamespace(rid=encode_rid("a", None), return_routed_experts=True, routed_experts_start_len=3)
    request_routes(request)
    assert (request.return_routed_experts, request.routed_experts_start_len) == (True, 3)


@pytest.mark.parametrize(
    ("unique", "start"),
    [
        ("", 0), ("a.b", 0), ("a b", 0), ("é", 0), ("a" * 201, 0), ("a\n", 0), (5, 0),
        ("a", -1), ("a", 10**10), ("a", True), ("a", 1.0),
    ],
)  # fmt: skip
def test_what_cannot_be_encoded_is_refused(unique: str, start: int) -> None:
    with pytest.raises(ValueError, match="request id"):
        encode_rid(unique, start)


def test_importing_the_plugin_imports_nothing_else() -> None:
    """It is loaded by every SGLang process of an environment, with or without this package's own requirements."""
    code = (
        "import sys; before = set(sys.modules); import megatron_pr2.rollout.sglang.plugin; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['megatron_pr2']"


@pytest.mark.sglang
@pytest.mark.parametrize(("allowed", "loaded"), [("", True), ("megatron_pr2_routes", True), ("another", False)])
def test_sglang_finds_and_applies_it(
    preloaded: Preloaded, sglang_python: str, tmp_path: Path, allowed: str, loaded: bool
) -> None:
    """Through the entry point group and SGLang's own loader, on SGLang's own request class."""
    code = textwrap.dedent("""
        import json
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.managers.io_struct import GenerateReqInput
        found = []
        for rid in ("pr2.a.r2.", "pr2.a.x.", "other"):
            request = GenerateReqInput(rid=rid, input_ids=[1, 2, 3], sampling_params={})
            request.normalize_batch_and_arguments()
            found.append([request.rid, request.return_routed_experts, request.routed_experts_start_len])
        print(json.dumps(found))
    """)
    env = os.environ | {"SGLANG_PLUGINS": allowed, "PYTHONPATH": str(write_distribution(tmp_path))}
    returned, output = preloaded.run(sglang_python, code, env)
    assert returned == 0, output[-2000:]
    wish = ["pr2.a.r2.", True, 2] if loaded else ["pr2.a.r2.", False, 0]
    assert json.loads(output.splitlines()[-1]) == [wish, ["pr2.a.x.", False, 0], ["other", False, 0]]
