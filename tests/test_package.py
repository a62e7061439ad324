"""The package's front door: attach() under both of its names, in either order of imports, and what needs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import megatron_pr2

pytestmark = pytest.mark.slow


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALLS = {
    "package first": "import megatron_pr2; megatron_pr2.PR2; import megatron_pr2.attach; megatron_pr2.attach([], None)",
    "module first": "from megatron_pr2.attach import attach; import megatron_pr2; megatron_pr2.attach([], config=None)",
    "by name": "import megatron_pr2.attach; from megatron_pr2 import attach; attach(model_chunks=[], config=None)",
}


@pytest.mark.parametrize("code", CALLS.values(), ids=CALLS)
def test_attach_is_a_function_in_any_order_of_imports(code: str) -> None:
    imports, call = code.rsplit("; ", 1)
    said = run(f"{imports}\ntry:\n    {call}\nexcept Exception as error:\n    print(type(error).__name__, error)")
    assert said == "AttachError attach() got no model chunk"


def test_the_callable_module_pickles() -> None:
    """For Ray, which is not imported here: it reads its settings when it is."""
    imports = "from ray import cloudpickle\nimport megatron_pr2.attach as module\n"
    assert run(f"{imports}print(cloudpickle.loads(cloudpickle.dumps(module)) is module)") == "True"


def test_every_name_of_the_package_is_there() -> None:
    for name in megatron_pr2.__all__:
        assert callable(getattr(megatron_pr2, name)), name
    with pytest.raises(AttributeError, match="no attribute 'detach'"):
        megatron_pr2.detach  # noqa: B018


def test_settings_and_errors_need_no_torch() -> None:
    names = [name for name in megatron_pr2.__all__ if name.endswith(("Error", "Failed"))] + ["PR2Config"]
    code = f"import sys, megatron_pr2\n[getattr(megatron_pr2, name) for name in {names}]\nprint('torch' in sys.modules)"
    assert run(code) == "False"
