"""Which releases of Megatron-Core are taken, or taken with a warning."""

from __future__ import annotations

import logging

import pytest
from megatron.core.package_info import __version__

from megatron_pr2.releases import TRIED, is_tried
from megatron_pr2.replay import hook


def test_the_release_of_this_environment_was_tried(caplog: pytest.LogCaptureFixture) -> None:
    # In a checkout Megatron-Core adds the commit of whatever repository it lies in.
    assert __version__.partition("+")[0] in TRIED
    hook.check_release()
    assert not caplog.records


def test_an_untested_release_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(hook, "megatron_version", "0.20.0")
    with caplog.at_level(logging.WARNING):
        hook.check_release()
    assert "megatron-core 0.20.0 has what replay needs, but was not tried; tried were 0.16.1, " in caplog.text


def test_patches_of_a_release_are_taken_to_be_patches() -> None:
    assert is_tried("0.19.0")
    assert is_tried("0.16.0rc1")
    assert not is_tried("0.15.3")
    assert not is_tried("0.1.2")
    assert not is_tried("1.19.2")
