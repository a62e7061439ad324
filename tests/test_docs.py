"""What a newcomer reads is true: commands, settings, links, messages and the attach snippet of README.md and docs/."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from omegaconf import OmegaConf

from megatron_pr2.cli import app
from megatron_pr2.config import PRESETS, PR2Config
from megatron_pr2.rl.config import TrainConfig, load_config
from tests.helpers.distributed import pool

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIG = (ROOT / "docs/config.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
DOCUMENTS = (
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/calculator/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")),
)  # fmt: skip


PAGES_WITH_COMMANDS = ("docs/install.md", "docs/quickstart.md", "docs/config.md", "docs/cli.md", "CONTRIBUTING.md")


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows; `\\|` is a bar within a cell."""
    lines = [line.strip() for line in prose(text).splitlines() if line.startswith("|") and not set(line) <= set("|- ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def commands(program: str) -> list[list[str]]:
    """Words of every command line in README and docs that starts with `program`."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *PAGES_WITH_COMMANDS)]
    lines = [line for text in texts for block in blocks(text, "bash") for line in block.splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == program]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- commands ------------------------------------------------------------------------------------------------------------


def test_make_targets_and_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = commands("make")
    assert ["quickstart"] in found
    assert ["quickstart", "ENGINE=sglang"] in found
    assert ["test"] in found
    inline = [shlex.split(line)[1:] for line in re.findall(r"`(make [^`]+)`", README)]
    for words in found + inline:
        for word in words:
            name, assigned, _ = word.partition("=")
            pattern = rf"^{name} \?=" if assigned else rf"^{name}:"
            assert re.search(pattern, makefile, flags=re.MULTILINE), f"make {word}: not in the Makefile"


def test_commands_are_accepted() -> None:
    subcommands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = commands("megatron-pr2")
    assert {words[0] for words in found} == set(subcommands) == {"train", "report", "doctor", "plan"}
    for subcommand, *arguments in found:
        parsed = subcommands[subcommand].make_context(subcommand, list(arguments)).params
        if subcommand != "train":
            given = {"report": ("runs", "routes"), "doctor": ("engine",), "plan": ("model", "config")}[subcommand]
            assert any(parsed[name] for name in given)
            continue
        if parsed["config"] is not None:
            assert (ROOT / parsed["config"]).is_file(), parsed["config"]
        load_config(parsed["config"] and ROOT / parsed["config"], parsed["overrides"] or [])


# ---- settings ------------------------------------------------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    """Every setting with its default, dotted."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    settings = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
    settings["pr2"] = OmegaConf.to_container(OmegaConf.structured(PR2Config))
    return dict(walk(settings, ""))


def test_every_setting_is_documented_with_its_default() -> None:
    generated = CONFIG.partition("## `rollout.sglang`: servers")[0]
    documented = {
        cells[0].strip("`"): OmegaConf.from_dotlist([f"value={cells[1].strip('`')}"]).value
        for cells in rows(generated)
        if len(cells) == 3 and cells[0].startswith("`") and cells[0].strip("`") not in PRESETS
    }
    assert documented == defaults()
    assert all(cells[2] for cells in rows(CONFIG))


def test_the_reference_pages_are_those_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/reference.py", "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_documented_presets_are_the_presets() -> None:
    table = [[cell.strip("`") for cell in cells] for cells in rows(CONFIG)]
    documented = {name: {"routes": rest[0], "predictor": rest[1]} for name, *rest in table if name in PRESETS}
    assert documented == PRESETS
    methods = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert {cells[0].strip("`") for cells in rows(methods) if cells[0].strip("`") in PRESETS} == set(PRESETS)


def test_yaml_examples_load(tmp_path: Path) -> None:
    examples = blocks(CONFIG, "yaml")
    assert examples
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(example, encoding="utf-8")
        assert OmegaConf.structured(load_config(file)).steps == yaml.safe_load(example)["steps"]


# ---- links, files, messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_and_images_exist(document: str) -> None:
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{document}: {target} does not exist"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{document}: no heading for {target}"


def test_files_named_in_the_documents_exist() -> None:
    texts = [(ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS]
    named = {name for text in texts for name in re.findall(r"`((?:megatron_pr2|tests|tools|docs|examples)/[\w./-]*)`", text)}
    assert {"megatron_pr2/attach.py"} <= named
    for name in named:
        assert (ROOT / name).exists(), f"{name} does not exist"


def test_dotted_names_in_the_documents_exist() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"\b(megatron_pr2(?:\.\w+)+)", (ROOT / document).read_text(encoding="utf-8")):
            module, rest = ROOT / "megatron_pr2", name.split(".")[1:]
            while rest and ((module / rest[0]).is_dir() or (module / f"{rest[0]}.py").is_file()):
                module /= rest.pop(0)
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            assert not rest or re.search(rf"\b{rest[0]}\b", source.read_text(encoding="utf-8")), f"{document}: no {name}"


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    sources = [re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8")) for path in (ROOT / "megatron_pr2").rglob("*.py")]
    found = [cells for cells in rows(text) if cells[0].startswith("`")]
    assert len(found) > 50
    for cells in found:
        assert cells[1]
        assert cells[2]
        for message in re.findall(r"`([^`]+)`", cells[0]):
            pattern = re.compile(".{1,300}?".join(map(re.escape, message.split("…"))))
            assert any(pattern.search(source) for source in sources), f"no such message in the code: {message}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = [page for section in navigation for entry in next(iter(section.values())) for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_room_says_what_it_is_for() -> None:
    for init in (ROOT / "megatron_pr2").rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{init} has no docstring"


def test_every_invariant_names_tests_that_exist() -> None:
    table = {cells[0]: cells[2] for cells in rows(DESIGN) if re.fullmatch(r"I\d", cells[0])}
    assert sorted(table) == [f"I{n}" for n in range(1, 10)]
    for name, cell in table.items():
        references = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", cell)
        assert references, f"{name} names no test"
        for file, function in references:
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {function or 'test_'}" in text, f"{name}: {file} has no {function or 'test'}"


def test_decisions_that_the_code_refers_to_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "megatron_pr2").rglob("*.py")]
    referred = {number for source in sources for number in re.findall(r"design decision (\d+)", source)}
    assert referred
    for number in referred:
        assert re.search(rf"^\*\*{number}\. ", DESIGN, flags=re.MULTILINE), f"docs/design.md has no decision {number}"


# ---- the attach snippet --------------------------------------------------------------------------------------------------


class RecordingEngine:
    """The embedded engine, which in addition keeps the gates that it is sent."""

    def __init__(self, model: Any, names: dict[str, Any]) -> None:
        self._model, self._names = model, names
        self.gates: list[dict[str, Any]] = []

    def update_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self.gates.append({name: tensor.clone() for name, tensor in weights if name.endswith("gate.weight")})

    def generate(self, requests: Sequence[Any], sampling: Any, *, return_routes: bool) -> Any:
        from megatron_pr2.rollout.embedded import MegatronEngine

        engine = MegatronEngine(self._model, self._names["pr2"], pad_id=0)
        return engine.generate(requests, sampling, return_routes=return_routes)


def run_snippet(snippet: str, checkpoint: Path, directory: Path) -> dict[str, Any]:
    """Runs the snippet for one rollout batch on a real model; what is `yours` in it is supplied here."""
    import torch
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_pr2 import host
    from megatron_pr2.hf.bridge import export_weights, load_model
    from megatron_pr2.rollout.base import RolloutRequest, SamplingParams

    host.init()
    bridge, chunks = load_model(checkpoint, dtype=torch.float32, wrap_with_ddp=False)

    def make_mini_batches(responses: Sequence[Any]) -> list[list[dict[str, Any]]]:
        items = []
        for start in range(0, len(responses), 2):
            pair = [response.token_ids for response in responses[start : start + 2]]
            width = max(map(len, pair))
            tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in pair])
            items.append({"ids": [start, start + 1], "lengths": [len(ids) for ids in pair], "tokens": tokens})
        return [items[:2], items[2:]]

    def forward_step(data_iterator: Iterator[dict[str, Any]], model: Any) -> Any:
        tokens = next(data_iterator)["tokens"]
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        logits = model(tokens, positions, None)

        def loss(output: Any) -> Any:
            value = -torch.log_softmax(output[:, :-1].float(), -1).gather(2, tokens[:, 1:, None]).mean()
            return value, {"loss": value.detach()}

        return logits, loss

    def run_schedule(items: list[dict[str, Any]], *, forward_only: bool) -> None:
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(items),
            model=chunks,
            num_microbatches=len(items),
            seq_length=items[0]["tokens"].shape[1],
            micro_batch_size=2,
            forward_only=forward_only,
        )

    optimizer = torch.optim.SGD(chunks[0].parameters(), lr=0.1)
    names: dict[str, Any] = {}
    logged: list[dict[str, float]] = []
    engine = RecordingEngine(chunks[0], names)
    names |= {
        "model_chunks": chunks,
        "engine": engine,
        "version": 1,
        "hf_names_and_tensors": lambda: export_weights(bridge, chunks),
        "requests": [RolloutRequest((10 + i, 20, 30), seed=i) for i in range(8)],
        "sampling": SamplingParams(max_new_tokens=6),
        "make_mini_batches": make_mini_batches,
        "run_schedule": run_schedule,
        "optimizer": optimizer,
        "lr": 1e-3,
        "log": logged.append,
        "directory": directory,
    }
    exec(snippet, names)
    pr2 = names["pr2"]
    learned = pr2.predictor.weight_LEH.clone()
    pr2.predictor.weight_LEH.zero_()
    pr2.load(directory)
    saved = torch.equal(pr2.predictor.weight_LEH, learned)
    engine.update_weights(pr2.engine_weights(export_weights(bridge, chunks)), 2)
    held_back, pr2.measurement.hold_back.beta = pr2.measurement.hold_back.beta, [1.0] * len(pr2.sites)
    engine.update_weights(pr2.engine_weights(export_weights(bridge, chunks)), 3)
    own = {name: tensor for name, tensor in export_weights(bridge, chunks) if name.endswith("gate.weight")}
    predicted = {f"model.layers.{site.layer}.mlp.gate.weight": pr2.predictor.weight_LEH[site.local] for site in pr2.sites}
    return {
        "metrics": logged[0],
        "saved": saved,
        "gates": len(engine.gates[0]),
        "held back": held_back,
        "as they are": all(torch.equal(engine.gates[1][name], own[name]) for name in own),
        "merged": all(torch.equal(engine.gates[2][name], own[name] + predicted[name]) for name in own),
        "moved": min(float(w.abs().max()) for w in predicted.values()),
    }


def test_the_ten_lines_run_and_learn(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (snippet,) = blocks(README, "python")
    assert re.findall(r"\((\d+)\)", snippet) == [str(number) for number in range(1, 11)]
    (result,) = pool(1).run(run_snippet, snippet, tiny_checkpoint, tmp_path / "pr2")
    assert result["gates"] == 2
    assert result["moved"] > 0.0
    # One rollout batch is too few to use a prediction; used, it is merged.
    assert result["held back"] == [0.0, 0.0]
    assert result["as they are"]
    assert result["merged"]
    assert result["saved"]
    metrics = result["metrics"]
    assert metrics["pr2/predictor/tokens"] > 0
    assert metrics["pr2/features_absent"] == 0
    assert metrics["pr2/missing_share"] == 0
    assert metrics["pr2/lift"] == 0
    assert 0.0 < metrics["pr2/agreement"] <= 1.0


def test_the_minimal_example_is_short_and_runs() -> None:
    example = ROOT / "examples/attach_minimal.py"
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60
    # What is on the path already may be another release of Megatron-Core.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pattern = r"^rollout batch \d: \{'agreement': 0\.\d+, 'lift': 0\.0, 'hold_back/beta': 0\.0\}$"
    lines = re.findall(pattern, done.stdout, re.MULTILINE)
    assert len(lines) == 3, done.stdout
