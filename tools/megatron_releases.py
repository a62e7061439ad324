"""Runs the tests that concern Megatron-Core on several of its releases, and writes which pass into docs/megatron_releases.md.

    python tools/megatron_releases.py                  the older releases that were tried
    python tools/megatron_releases.py 0.17.1 0.19.2    these; the installed one is run as it is
    python tools/megatron_releases.py --table          only the table, of the results that are there

A release is its wheel, unpacked under --cache and put in front on PYTHONPATH; everything else is this interpreter's environment.
Results stay in the cache, so that the table can be written of runs at different times; it says of which commit each is.
Fails if a test fails, if a file on the list ran no test, or if gradients or log-probs in fp32 differ from another release's by more
than rounding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs/megatron_releases.md"
# What of the package depends on Megatron-Core: the router and its hook, attaching, replay, the invariants, momentum, checkpoints
# with damage and failures, Hugging Face, layouts, and the example that uses nothing else.
TESTS = (
    "tests/replay/test_router.py",
    "tests/replay/test_attach.py",
    "tests/replay/test_replay.py",
    "tests/test_invariants.py",
    "tests/replay/test_lift.py",
    "tests/prediction/test_optimizer_moments.py",
    "tests/prediction/test_lookahead.py",
    "tests/prediction/test_pushes.py",
    "tests/parallel/test_lookahead.py",
    "tests/checkpoint/test_checkpoint.py",
    "tests/checkpoint/test_pr2_checkpoint.py",
    "tests/hf/test_bridge.py",
    "tests/replay/test_entry_parity.py",
    "tests/replay/test_model_settings.py",
    "tests/prediction/test_predictor.py",
    "tests/drift/test_metrics.py",
    "tests/replay/test_tokens_per_sample.py",
    "tests/hf/test_latent_attention.py",
    "tests/integrations/test_megatron_lm_script.py",
    "tests/integrations/test_spec.py",
    "tests/host/test_platform.py",
    "tests/host/test_attention.py",
    "tests/host/test_layouts.py",
    "tests/parallel/test_matrix.py",
    "tests/parallel/test_shapes.py",
    "tests/test_docs.py::test_the_minimal_example_is_short_and_runs",
)
QUICK = "not exhaustive and not gpu"
OUTCOMES = ("passed", "failed", "skipped")
# Between releases, of the largest entry: as between layouts in tests/parallel/compare.py.
ROUNDING = 1e-5

Counts = dict[str, dict[str, int]]


def unpacked(release: str, cache: Path) -> Path | None:
    """The directory of a release, downloaded if it is not there; None for the installed one.

    Raises:
        SystemExit: the package index has no such release for this interpreter.
    """
    if release == importlib.metadata.version("megatron-core"):
        return None
    directory = cache / release
    if not (directory / "megatron/core").is_dir():
        # A directory of its own until it is whole.
        partial = cache / f".{release}.{os.getpid()}"
        sibling = Path(f"{sys.prefix}-uv/bin/uv")
        uv = str(sibling) if sibling.exists() else shutil.which("uv")
        install = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
        command = [*install, "--quiet", "--no-deps", "--target", str(partial), f"megatron-core=={release}"]
        if subprocess.run(command, check=False).returncode:
            shutil.rmtree(partial, ignore_errors=True)
            raise SystemExit(f"megatron-core {release} could not be downloaded for Python {platform.python_version()}")
        partial.rename(directory)
    return directory


def environment(directory: Path | None) -> dict[str, str]:
    """Of a process in which a release is imported, and its children."""
    paths = [str(directory)] if directory else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def check_imported(release: str, variables: dict[str, str]) -> None:
    """Raises SystemExit if Python imports another release."""
    code = "from megatron.core.package_info import __version__; print(__version__.partition('+')[0])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.stdout.strip() != release:
        raise SystemExit(f"wanted megatron-core {release}, imported {done.stdout.strip() or done.stderr[-500:]}")


def run(release: str, cache: Path) -> bool:
    """Runs the tests on a release and keeps their counts; whether all of them passed."""
    variables = environment(unpacked(release, cache))
    check_imported(release, variables)
    report = cache / f"{release}.xml"
    report.unlink(missing_ok=True)
    result: dict[str, Any] = conditions()
    print(f"megatron-core {release}", flush=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", QUICK,
        "-o", "junit_family=xunit1", f"--junitxml={report}", *TESTS,
    ]  # fmt: skip
    status = subprocess.run(command, env=variables, cwd=ROOT, check=False).returncode
    if not report.exists():
        print(f"megatron-core {release}: pytest ended with {status} and without a report")
        return False
    files = counts(report)
    result |= {"files": files, "pytest": status}
    (cache / f"{release}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    # Tests skip what a release does not have; a file of which nothing is reported was not run.
    idle = [name for name in map(file_of, TESTS) if not sum(files.get(name, {}).values())]
    for name in idle:
        print(f"megatron-core {release}: no test of {name} ran")
    numbers = cache / f"{release}.pt"
    numbers.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.parallel.reference", str(numbers)]
    same = subprocess.run(command, env=variables, cwd=ROOT, check=False).returncode == 0
    for kind, deviation in deviations(cache).get(release, {}).items():
        if not deviation <= ROUNDING:
            print(f"megatron-core {release}: {kind} deviate by {deviation:.1e} of the largest entry from another release's")
            same = False
    return status == 0 and not idle and same


def file_of(test: str) -> str:
    return test.partition("::")[0]


def counts(report: Path) -> Counts:
    """Outcomes per test file, from pytest's report."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[case.get("file") or "(collection)"][outcome] += 1
    return {name: dict(counter) for name, counter in sorted(found.items())}


def deviations(cache: Path) -> dict[str, dict[str, float]]:
    """By release and kind, the largest deviation from the oldest release that is there, as a share of the largest entry."""
    import torch

    releases = ordered(path.stem for path in cache.glob("*.pt"))
    every = {release: torch.load(cache / f"{release}.pt", weights_only=True) for release in releases}
    found: dict[str, dict[str, float]] = {}
    for release in releases:
        found[release] = {}
        for kind, expected in every[releases[0]].items():
            given = every[release][kind]
            if given.keys() != expected.keys():
                found[release][kind] = float("inf")
                continue
            sizes = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
            errors = {name: float((given[name] - expected[name]).abs().max()) for name in expected}
            # Experts without a token have no gradient in any release.
            found[release][kind] = max(errors[name] / sizes[name] if sizes[name] else errors[name] for name in expected)
    return found


def ordered(releases: Iterable[str]) -> list[str]:
    return sorted(releases, key=lambda release: [int(part) for part in release.split(".")])


def conditions() -> dict[str, Any]:
    """Commit and versions of a run."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs") else ""
    return {
        "commit": (git("rev-parse", "--short=10", "HEAD") or "unknown") + changed,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch").partition("+")[0],
    }


def table(cache: Path) -> str:
    """The document, of all results in the cache."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in cache.glob("*.json")}
    numbers = deviations(cache)
    for release in numbers.keys() - results.keys():
        results[release] = {"files": {}, "commit": "not run", "python": "", "torch": ""}
    releases = ordered(results)

    def cell(found: dict[str, int] | None) -> str:
        return ", ".join(f"{found[kind]} {kind}" for kind in OUTCOMES if found.get(kind)) if found else "not run"

    files = list(dict.fromkeys([*map(file_of, TESTS), *(name for result in results.values() for name in result["files"])]))
    lines = [
        "# Releases of Megatron-Core",
        "",
        "Which tests pass on which release, on a CPU. `make test-megatron` writes this file (tools/megatron_releases.py); no line",
        "is written by hand. `make test` and `make test-all` run more than these on the newest release.",
        "",
        f"| | {' | '.join(releases)} |",
        f"| --- |{' --- |' * len(releases)}",
    ]
    lines += [f"| `{name}` | {' | '.join(cell(results[each]['files'].get(name)) for each in releases)} |" for name in files]
    total: dict[str, Counter[str]] = {each: Counter() for each in releases}
    for each in releases:
        for found in results[each]["files"].values():
            total[each].update(found)
    lines.append(f"| all | {' | '.join(cell(total[each]) for each in releases)} |")
    for kind, words in (("policy", "policy's gradients"), ("predictor", "predictor's gradients"), ("logprobs", "log-probs")):
        cells = [f"{numbers[each][kind]:.1e}" if each in numbers else "not run" for each in releases]
        lines.append(f"| {words}, one process, fp32: largest deviation from the oldest release here | {' | '.join(cells)} |")
    lines += [f"| {key} | {' | '.join(results[each][key] for each in releases)} |" for key in ("commit", "python", "torch")]
    return "\n".join(lines) + "\n"


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from megatron_pr2.releases import TRIED

    installed = importlib.metadata.version("megatron-core")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("releases", nargs="*", help=f"of {', '.join(TRIED)}; default: all but the installed one, {installed}")
    parser.add_argument("--cache", type=Path, default=ROOT / ".venv-megatron", help="where releases and results are kept")
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    given.cache.mkdir(parents=True, exist_ok=True)
    releases = given.releases or [each for each in TRIED if each != installed]
    if not releases and not given.table:
        parser.error(f"no release to run besides the installed one, {installed}")
    failed = [] if given.table else [each for each in releases if not run(each, given.cache.resolve())]
    TABLE.write_text(table(given.cache), encoding="utf-8")
    if failed:
        print(f"failed on megatron-core {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
