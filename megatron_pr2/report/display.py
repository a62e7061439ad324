"""LiveDisplay: the progress of a run on the terminal, or one plain line per step where there is no terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from megatron_pr2.report import formats
from megatron_pr2.report.metrics_log import Record, flat, listed

NOTICE = (
    "agreement: share of the replayed experts that the current router would choose too; "
    "lift = agreement predicted - frozen, in percentage points: above 0 prediction helps; "
    "beta: mean share of the prediction that is used, 0 is R3; "
    "gap: mean |engine - actor| of the log-probs; missing: tokens that fell back to the current router."
)
RECENT_ROWS = 6
ETA_STEPS = 10
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = "_.-:=+*#"


def whole(value: float) -> str:
    """A rounded number without groups, so that the lines stay easy to split."""
    return f"{value:.0f}" if math.isfinite(value) else formats.ABSENT


# Heading of the table, word in the plain line, name in the record, format.
COLUMNS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("step", "step", "step", whole),
    ("reward", "reward", "reward", formats.fixed),
    ("response\nlength", "length", "response_length", lambda v: formats.fixed(v, 1)),
    ("policy\nloss", "loss", "policy_loss", lambda v: formats.fixed(v, 4)),
    ("clip\nfrac.", "clip", "clip_fraction", lambda v: formats.percent(v, 1).replace(" ", "")),
    ("route\nagreem.", "agreement", "agreement", lambda v: formats.percent(v).replace(" ", "")),
    ("pred.\nlift", "lift", "lift", lambda v: formats.points(v).removesuffix(" pp")),
    ("tokens\n/s", "tok/s", "tokens_per_second", whole),
    ("log-prob\ngap", "gap", "logprob_gap.mean", formats.scientific),
    ("missing\nroutes", "missing", "routes.missing", whole),
    ("mean\nbeta", "beta", "hold_back.beta", lambda v: formats.fixed(v, 2)),
)
# Shown only where a run has it: runs without hold-back need the room.
OPTIONAL = "beta"


class LiveDisplay:
    """Progress bar with the time left, the current phase, the last steps' numbers and a sparkline of the reward.

    Where the console is no capable terminal every step is one plain line instead. A context manager: on leaving, also by an
    exception or Ctrl-C, the last state stays on the screen and the cursor is back. Logging that should appear above the table goes
    through `console` (for example rich.logging.RichHandler(console=...)).

    Args:
        start_step: steps already done by the run that this one resumes.
        console: where to draw; standard output by default.
    """

    def __init__(self, total_steps: int, title: str, *, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total_steps = total_steps
        self.title = title
        self._done = start_step
        # Tuples, replaced and never changed in place: the refresh thread reads them at any moment.
        self._rows: tuple[dict[str, str], ...] = ()
        self._rewards: tuple[float, ...] = ()
        self._durations: tuple[float, ...] = ()
        self._phase = "starting"
        self._detail = ""
        self._phase_since = self._step_since = time.monotonic()
        self._spinner: Spinner | None = Spinner("dots")
        capable = self.console.is_terminal and not self.console.is_dumb_terminal
        live = Live(console=self.console, get_renderable=self._render, refresh_per_second=4)
        self._live = live if capable else None

    def __enter__(self) -> LiveDisplay:
        self._phase_since = self._step_since = time.monotonic()
        if self._live is not None:
            self.console.print(Text(NOTICE, style="dim"))
            self._live.start(refresh=True)
        else:
            self._line(f"{self.title}: {self.total_steps} steps")
            self._line(NOTICE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._phase = f"stopped during {self._phase}: {kind.__name__}"
        elif self._done >= self.total_steps:
            self._phase = "finished"
        self._spinner = None
        if self._live is not None:
            self._live.stop()
        else:
            self._line(f"{self._phase} after {self._done} of {self.total_steps} steps")

    def phase(self, name: str) -> None:
        """Names what is going on now."""
        self._phase, self._detail = name, ""
        self._phase_since = time.monotonic()

    def detail(self, text: str) -> None:
        """How far the current phase is; safe from other threads."""
        self._detail = text

    def update(self, record: Record) -> None:
        """Shows a finished step; absent values read as a dash."""
        now = time.monotonic()
        self._durations = (*self._durations[1 - ETA_STEPS :], now - self._step_since)
        self._step_since = now
        self._done = min(self.total_steps, self._done + 1)
        numbers = flat(record)
        if betas := listed(numbers, "hold_back.beta"):
            numbers["hold_back.beta"] = fmean(betas)
        self._rewards = (*self._rewards, numbers.get("reward", math.nan))
        row = {word: form(numbers.get(name, math.nan)) for _, word, name, form in COLUMNS}
        self._rows = (*self._rows[1 - RECENT_ROWS :], row)
        if self._live is not None:
            self._live.refresh()
            return
        shown = [f"{word} {value}" for word, value in row.items() if word != OPTIONAL or value != formats.ABSENT]
        shown[0] += f" ({self._done}/{self.total_steps})"
        self._line(" | ".join([*shown, f"{self._durations[-1]:.1f} s", self._eta()]))

    def _line(self, text: str) -> None:
        """One line whatever its length: no wrapping, no colours, at once."""
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self.console.file.flush()

    def _eta(self) -> str:
        if not (left := self.total_steps - self._done):
            return "done"
        return f"{formats.duration(left * fmean(self._durations))} left" if self._durations else "time left: -"

    def _render(self) -> RenderableType:
        bar = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True, justify="right"), expand=True, padding=(0, 1))
        progress = ProgressBar(total=max(1, self.total_steps), completed=self._done)
        bar.add_row(f"{self._done}/{self.total_steps}", progress, self._eta())
        phase = Table.grid(padding=(0, 1))
        name = f"{self._phase}, {self._detail}" if self._detail else self._phase
        waited = "" if self._spinner is None else f"  {formats.duration(time.monotonic() - self._phase_since)}"
        phase.add_row(self._spinner or Text("■"), Text(f"{name}{waited}", style="bold"))
        parts: list[RenderableType] = [Text(self.title, style="bold", no_wrap=True, overflow="ellipsis"), bar, phase]
        if self._rows:
            parts += [self._table(), self._reward_line()]
        return Group(*parts)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        has_optional = any(row[OPTIONAL] != formats.ABSENT for row in self._rows)
        shown = [(heading, word) for heading, word, *_ in COLUMNS if word != OPTIONAL or has_optional]
        for heading, _ in shown:
            table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
        for row in self._rows:
            table.add_row(*(Text(row[word], style=_tone(word, row[word])) for _, word in shown))
        return table

    def _reward_line(self) -> Text:
        bars = BARS if self.console.encoding.lower().startswith("utf") else ASCII_BARS
        line = sparkline(self._rewards, max(10, min(60, self.console.width - 30)), bars)
        known = [r for r in self._rewards if math.isfinite(r)]
        span = f"  {formats.fixed(min(known))} .. {formats.fixed(max(known))}" if known else ""
        return Text.assemble(("reward ", "dim"), (line, "cyan"), (span, "dim"), no_wrap=True)


def _tone(word: str, value: str) -> str:
    """A colour where the sign matters: lift, and routes that are missing."""
    if word == "lift" and value != formats.ABSENT:
        return {"+": "green", "-": "red"}.get(value[0], "")
    return "yellow" if word == "missing" and value not in ("0", formats.ABSENT) else ""


def sparkline(values: Sequence[float], width: int, bars: str = BARS) -> str:
    """The values as at most `width` bars between their minimum and maximum, means of neighbours where there are more values."""
    chunks = np.array_split(np.array(values), min(width, len(values))) if len(values) else []
    means = [fmean(known) if (known := [v for v in chunk if math.isfinite(v)]) else math.nan for chunk in chunks]
    existing = [mean for mean in means if math.isfinite(mean)]
    low, high = min(existing, default=0.0), max(existing, default=0.0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(m) else bars[round((m - low) * scale)] for m in means)
