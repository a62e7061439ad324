"""Which releases of Megatron-Core are taken, refused, or taken with a warning."""

from __future__ import annotations

import logging

import pytest
from megatron.core.package_info import __version__
from megatron.core.transformer.moe import moe_utils

from megatron_pr2 import seam
from megatron_pr2.errors import AttachError
from megatron_pr2.releases import TRIED, is_tried


def test_the_release_of_this_environment_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    assert __version__ in TRIED
    seam.check_release()
    assert not caplog.records


def test_a_release_that_nobody_tried_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(seam, "megatron_version", "0.20.0")
    with caplog.at_level(logging.WARNING):
        seam.check_release()
    assert "megatron-core 0.20.0 has what replay needs, but was not tried; tried were 0.16.1, " in caplog.text


def test_a_release_without_the_seam_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def topk_routing_with_score_function(logits: object, topk: int) -> None:
        """As in releases before 0.16."""

    monkeypatch.setattr(moe_utils, "topk_routing_with_score_function", topk_routing_with_score_function)
    with pytest.raises(AttachError) as refused:
        seam.check_release()
    message = str(refused.value)
    assert f"megatron-core {__version__} has no " in message
    assert "topk_routing_with_score_function(router_replay=)" in message
    assert message.endswith(f"use one of the releases that it was tried on: {', '.join(TRIED)}")


def test_patches_of_a_release_are_taken_to_be_patches() -> None:
    assert is_tried("0.19.0")
    assert is_tried("0.16.0rc1")
    assert not is_tried("0.15.3")
    assert not is_tried("0.1.2")
    assert not is_tried("1.19.2")
