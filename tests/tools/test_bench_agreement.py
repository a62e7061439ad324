"""tools/bench_agreement.py in a minimal size: engines that work are accepted, and a gate in 8 bits is refused in fp32."""

from __future__ import annotations

import pytest

from tests.tools.test_tools import run_tool


@pytest.mark.slow
def test_working_engines_are_within_the_bounds() -> None:
    report = run_tool("bench_agreement.py", "--gates", "toy", "--tokens", "2048", "--layers", "2")
    refused = {case["case"]: case["refused"] for case in report["cases"]}
    assert len(refused) == 5
    assert refused["fp32, gate in 8 bits"]
    assert not any(refused[case] for case in ("fp32, other kernel", "bf16, other kernel", "bf16 and fp32"))
    assert all(case["least_layer"] <= case["mean"] <= 1.0 for case in report["cases"])
