"""Draws docs/replay.svg from docs/results/mismatch.csv and docs/results/mini_steps.csv: what replay does, and what it leaves."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
GAPS = {"gap_mean": "mean", "gap_largest": "largest", "kl_k3": "KL (k3)"}
REPLAYED, PLAIN = "#2b6cb0", "#a0aec0"


def read(name: str) -> list[dict[str, str]]:
    with open(DOCS / "results" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pr2", "font.size": 10, "font.family": "sans-serif"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    rows = {row["preset"]: row for row in read("mismatch.csv")}
    for place, key in enumerate(GAPS):
        plain, replayed = float(rows["grpo"][key]), float(rows["r3"][key])
        left.bar(place - 0.2, 100, 0.38, color=PLAIN, label="without replay" if place == 0 else None)
        left.bar(place + 0.2, 100 * replayed / plain, 0.38, color=REPLAYED, label="routes replayed (R3)" if place == 0 else None)
        left.text(place - 0.2, 101, rows["grpo"][key], ha="center", va="bottom")
        left.text(place + 0.2, 100 * replayed / plain + 1, rows["r3"][key], ha="center", va="bottom")
    left.set(xticks=range(len(GAPS)), xticklabels=GAPS.values(), ylim=(0, 135), ylabel="% of the gap without replay")
    left.set_title("Log-prob gap, rollout engine to trainer")
    left.legend(frameon=False, ncols=2, loc="upper center")
    steps = [
        row
        for row in read("mini_steps.csv")
        if (row["method"], row["measure"], row["setting"]) == ("r3", "agreement", "off-8, lr 1e-4")
    ]
    x = [int(row["mini_step"]) for row in steps]
    low, mean, high = ([100 * float(row[key]) for row in steps] for key in ("low", "mean", "high"))
    right.fill_between(x, low, [min(100.0, value) for value in high], color=REPLAYED, alpha=0.2, lw=0)
    right.plot(x, mean, "o-", color=REPLAYED)
    right.set(xlabel="update on one rollout batch", ylabel="replayed experts still chosen, %", xticks=x)
    right.set_title("Replayed routes go stale: what PR2 predicts")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    (DOCS / "replay.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
