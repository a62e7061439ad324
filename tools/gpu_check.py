"""Everything that only a GPU can show, as one command: runs tests/gpu check by check and makes a table of it.

A check is a test function with all of its parameters. Each runs in a process of its own, because an error on the device spoils a
process for whatever comes after, and because some hang when they fail; several run at a time, except for what measures time. Where
there is no GPU, all of them are skipped in one process.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "gpu"
# Tests that belong to what they test, and need a GPU all the same.
ELSEWHERE = ("tests/drift/test_features.py::test_features_reach_host_memory_behind_a_busy_device",)
MEASURES_TIME = "tests/gpu/test_bench.py"
BEGIN, END = "<!-- gpu_check: begin -->", "<!-- gpu_check: end -->"
PACKAGES = {"megatron_core": "megatron-core", "transformer_engine": "transformer-engine", "deep_ep": "deep-ep"}
LONGEST_DETAIL = 400


@dataclass(frozen=True)
class Result:
    """One row of the table; seconds are the tests' own, without the start of their process."""

    check: str
    status: str
    seconds: float
    detail: str


def find_checks(folder: Path = FOLDER) -> list[str]:
    """Checks as pytest names them (file::function), in order. The files are read, not imported: a broken one has its rows too."""
    nodes = []
    for file in sorted(folder.glob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [item.name for item in tree.body if isinstance(item, ast.FunctionDef) and item.name.startswith("test_")]
        nodes += [f"{file.relative_to(ROOT).as_posix()}::{name}" for name in names]
    return nodes


def title(node: str) -> str:
    """A check's name for people: `invariants: i1 a zero predictor is r3 bit by bit`."""
    file, name = node.split("::")
    words = name.removeprefix("test_").replace("_", " ")
    return f"{Path(file).stem.removeprefix('test_').replace('_', ' ')}: {words}"


# ---- running -----------------------------------------------------------------------------------------------------------


def run(nodes: Sequence[str], timeout: float, *, root: Path = ROOT) -> list[Result]:
    """Runs checks in one process and reads what came of each."""
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as directory:
        junit, log = Path(directory) / "junit.xml", Path(directory) / "log"
        options = ["-q", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junit-xml={junit}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))}
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *nodes],
                cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                process.wait(timeout)
                ended = f"pytest ended with exit code {process.returncode}"
            except subprocess.TimeoutExpired:
                ended = f"stopped after {timeout:.0f} s without an end"
            except BaseException:
                _stop(process)
                raise
            # Also what the tests have started.
            _stop(process)
        last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"])[-1]
        return read_junit(junit, nodes, otherwise=f"{ended}: {last}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_all(nodes: Sequence[str], *, isolated: bool, jobs: int, timeout: float, budget: float, root: Path = ROOT) -> list[Result]:
    """Runs checks and says on stderr how each went.

    Args:
        isolated: each in its own process; otherwise all in one, which is for machines where none of them runs.
        timeout: seconds for one process. budget: seconds for everything; a check that would start later fails.
    """
    deadline = time.monotonic() + budget

    def timed(batch: Sequence[str]) -> list[Result]:
        left = deadline - time.monotonic()
        if left <= 0:
            found = [Result(node, "FAIL", 0.0, f"not started: the {budget:.0f} s for all checks were used up") for node in batch]
        else:
            found = run(batch, min(timeout, left), root=root)
        for result in found:
            sys.stderr.write(f"{result.status:4} {result.seconds:6.1f} s  {title(result.check)}\n")
        return found

    if not isolated:
        return timed(nodes)
    alone = [node for node in nodes if node.startswith(MEASURES_TIME)]
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(timed, [[node] for node in nodes if node not in alone]))
    parts += [timed([node]) for node in alone]
    found = {result.check: result for part in parts for result in part}
    return [found[node] for node in nodes]


# ---- reading -----------------------------------------------------------------------------------------------------------


def read_junit(junit: Path, nodes: Sequence[str], *, otherwise: str) -> list[Result]:
    """What pytest's report says of each check.

    Args:
        otherwise: why a check may be absent from it.
    """
    cases: dict[str, list[ElementTree.Element]] = {node: [] for node in nodes}
    try:
        found = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        found = []
    for case in found:
        node = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').split('[')[0]}"
        if node in cases:
            cases[node].append(case)
        elif not case.get("classname") and (error := case.find("error")) is not None:
            # A file that could not be imported; its name is the case's.
            otherwise = f"{case.get('name')}: {_last_line(error.text) or error.get('message')}"
    return [_result(node, cases[node], otherwise) for node in nodes]


def _result(node: str, cases: Sequence[ElementTree.Element], otherwise: str) -> Result:
    if not cases:
        return Result(node, "FAIL", 0.0, otherwise)
    seconds = sum(float(case.get("time", 0.0)) for case in cases)
    failed = [(case, part) for case in cases for part in (*case.findall("failure"), *case.findall("error"))]
    skipped = _unique(part.get("message", "") for case in cases for part in case.findall("skipped"))
    ran = sum(case.find("skipped") is None for case in cases)
    if failed:
        case, part = failed[0]
        reason = (part.get("message") or _last_line(part.text)).splitlines()[0]
        return Result(node, "FAIL", seconds, f"{len({id(c) for c, _ in failed})} of {len(cases)}: {case.get('name')}: {reason}")
    if not ran:
        return Result(node, "SKIP", seconds, "; ".join(skipped))
    told = _unique(p.get("value", "") for case in cases for p in case.iter("property") if p.get("name") == "detail")
    details = [f"{ran} cases"] if len(cases) > 1 else []
    details += told if len(told) < 4 else [f"{told[0]} .. {told[-1]}"]
    details += [f"{len(cases) - ran} skipped: {'; '.join(skipped)}"] if skipped else []
    return Result(node, "OK", seconds, "; ".join(details))


def _unique(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts))


def _last_line(text: str | None) -> str:
    return ([line.strip() for line in (text or "").splitlines() if line.strip()] or [""])[-1]


# ---- reporting ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The GPU (None where there is none), its driver, and the versions that numbers depend on."""
    facts: dict[str, Any] = {"gpu": None, "driver": None, "torch": torch.__version__, "cuda": torch.version.cuda}
    for name, distribution in PACKAGES.items():
        try:
            facts[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = None
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        facts["gpu"] = f"{torch.cuda.device_count()} x {found.name}, {found.total_memory / 2**30:.0f} GiB"
        facts["driver"] = _driver()
    return {**facts, "date": datetime.now(UTC).date().isoformat()}


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def table(results: Sequence[Result]) -> str:
    """Markdown, readable on a terminal as well."""
    lines = ["| Check | Status | Seconds | Detail |", "| --- | --- | --- | --- |"]
    for result in results:
        detail = " ".join(result.detail.split()).replace("|", "\\|")
        if len(detail) > LONGEST_DETAIL:
            detail = detail[:LONGEST_DETAIL].rstrip("\\") + " ..."
        lines.append(f"| {title(result.check)} | {result.status} | {result.seconds:.1f} | {detail} |")
    return "\n".join(lines)


def heading(facts: dict[str, Any]) -> str:
    """One line that says where and when."""
    versions = [f"{name.replace('_', ' ')} {facts[name] or 'not installed'}" for name in ("torch", "cuda", *PACKAGES)]
    return f"{facts['gpu']}; driver {facts['driver'] or 'unknown'}; {', '.join(versions)}; {facts['date']}"


def write_markdown(file: Path, text: str) -> None:
    """Puts text between the markers of a file, or makes a file of it.

    Raises:
        typer.BadParameter: the file exists and has no markers.
    """
    block = f"{BEGIN}\n{text}\n{END}"
    if file.exists():
        before, begin, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise typer.BadParameter(f"{file} exists and has no {BEGIN} .. {END}; add both lines where the table belongs")
        block = before + block + after
    else:
        block += "\n"
    file.write_text(block, encoding="utf-8")


def report(results: Sequence[Result], facts: dict[str, Any], seconds: float, markdown: Path | None) -> int:
    """Prints the table and, as the last line, JSON; writes the table into `markdown`. Returns the exit code."""
    counts = {status: sum(result.status == status for result in results) for status in ("OK", "FAIL", "SKIP")}
    summary = f"{counts['OK']} OK, {counts['FAIL']} failed, {counts['SKIP']} skipped in {seconds:.0f} s"
    if markdown is not None and facts["gpu"] is None:
        sys.stderr.write(f"no GPU here: {markdown} stays as it is\n")
    elif markdown is not None:
        write_markdown(markdown, f"{heading(facts)}\n\n{table(results)}\n\n{summary}.")
    rows = [asdict(result) | {"check": title(result.check), "node": result.check} for result in results]
    outcome = {"ok": counts["OK"], "failed": counts["FAIL"], "skipped": counts["SKIP"]}
    data = {**facts, "seconds": round(seconds, 1), **outcome, "checks": rows}
    sys.stdout.write(f"{table(results)}\n{summary}\n{json.dumps(data)}\n")
    return 1 if counts["FAIL"] else 0


def main(
    only: Annotated[str, typer.Option(help="Checks whose name has this text, as in the table or as file::function.")] = "",
    markdown: Annotated[
        Path | None, typer.Option(help="Write the table into this file, between its gpu_check markers, or make the file.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one check; then it is stopped and has failed.")] = 150,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for all checks; one that would start later has failed.")] = 460,
    jobs: Annotated[int, typer.Option(min=1, help="Checks at a time; what measures time always runs alone.")] = 4,
) -> None:
    """Checks on this machine's GPU what no CPU can show; on one H200 in less than eight minutes.

    Checks that need more than is here (Transformer Engine, DeepEP, a second GPU) are skipped and say what they need. The table is
    the last thing on stdout but for one line of JSON. Exit code 1: a check failed. Without a GPU all are skipped, exit code 0.

    \b
    Everything:             python tools/gpu_check.py
    Into the documentation: python tools/gpu_check.py --markdown docs/gpu.md
    Only FP8:               python tools/gpu_check.py --only fp8
    One check in full:      python -m pytest tests/gpu/test_cuda_graphs.py
    """
    nodes = [node for node in (*find_checks(), *ELSEWHERE) if only.lower() in title(node).lower() or only in node]
    if not nodes:
        raise typer.BadParameter(f"no check has {only!r} in its name", param_hint="--only")
    if markdown is not None and only:
        raise typer.BadParameter("a table of some checks would replace that of all; leave out --only", param_hint="--markdown")
    facts, start = machine(), time.monotonic()
    results = run_all(nodes, isolated=facts["gpu"] is not None, jobs=jobs, timeout=timeout, budget=budget)
    raise typer.Exit(report(results, facts, time.monotonic() - start, markdown))


if __name__ == "__main__":
    typer.run(main)
