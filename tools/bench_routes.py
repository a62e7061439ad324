"""Decoding SGLang's routes: from the bytes of a response to a compact table, against json, base64 and numpy as usually combined.

Both start from the same body of one response. MB/s are of base64, on one core; peak memory is counted from before the body exists
until the routes are there, as a multiple of the base64. Prints a table, then one line of JSON.
"""

from __future__ import annotations

import base64
import json
import statistics
import time
import tracemalloc
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_pr2.hf.shape import ModelShape
from megatron_pr2.rollout.sglang.routes import decode_table, parse_body


def body_of(tokens: int, shape: ModelShape) -> bytes:
    """A response of /generate with random valid routes."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, shape.num_experts, size=(tokens - 1, shape.num_hidden_layers, 1))
    ids = ((start + np.arange(shape.topk)) % shape.num_experts).astype("<i4")
    meta = {"finish_reason": {"type": "stop"}, "routed_experts": base64.b64encode(ids.tobytes()).decode()}
    return json.dumps({"text": "", "output_ids": [1] * 64, "meta_info": meta}).encode()


def ours(body: bytes, tokens: int, shape: ModelShape) -> Any:
    """A checked, compact RouteTable."""
    answer = parse_body(bytearray(body), "bench")
    return decode_table(answer["meta_info"]["routed_experts"], num_tokens=tokens, shape=shape, where="bench").experts[:-1]


def usual(body: bytes, tokens: int, shape: ModelShape) -> Any:
    """int32 ids [T - 1, L, K], unchecked."""
    answer = json.loads(bytes(body).decode())
    raw = base64.b64decode(answer["meta_info"]["routed_experts"])
    return np.frombuffer(raw, dtype="<i4").reshape(tokens - 1, shape.num_hidden_layers, shape.topk).copy()


def measure(way: Callable[..., Any], body: bytes, tokens: int, shape: ModelShape, repeats: int) -> tuple[float, int, Any]:
    """Median seconds, peak bytes and the result."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        result = way(body, tokens, shape)
        seconds.append(time.perf_counter() - started)
    tracemalloc.start()
    way(body, tokens, shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(seconds[1:]), peak, result


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the longest response; halves and quarters are measured as well.")] = 32768,
    layers: Annotated[int, typer.Option(help="Hidden layers, all of them MoE (Qwen3-30B: 48).")] = 48,
    topk: Annotated[int, typer.Option(help="Experts per token (Qwen3-30B: 8).")] = 8,
    experts: Annotated[int, typer.Option(help="Routed experts (Qwen3-30B: 128).")] = 128,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians are reported.")] = 7,
) -> None:
    """Measures how fast routes are decoded, and what memory that takes."""
    shape = ModelShape(layers, tuple(range(layers)), experts, topk, 1 << 17)
    results = []
    for length in track([tokens // 4, tokens // 2, tokens], description="measuring", console=Console(stderr=True)):
        body = body_of(length, shape)
        payload = -(-(length - 1) * layers * topk * 4 // 3) * 4
        measured = {way.__name__: measure(way, body, length, shape, repeats) for way in (ours, usual)}
        same = bool(np.array_equal(measured["ours"][2], measured["usual"][2]))
        for name, (seconds, peak, result) in measured.items():
            results.append(
                {
                    "way": name,
                    "tokens": length,
                    "base64_bytes": payload,
                    "identical": same,
                    "mb_per_s": payload / seconds / 1e6,
                    "peak_over_payload": peak / payload,
                    "result_bytes": int(result.nbytes),
                }
            )
    table = Table("tokens", "way", "base64 MB", "MB/s", "peak / payload", "result MB")
    for row in results:
        table.add_row(
            str(row["tokens"]), row["way"], f"{row['base64_bytes'] / 1e6:.1f}", f"{row['mb_per_s']:.0f}",
            f"{row['peak_over_payload']:.2f}", f"{row['result_bytes'] / 1e6:.1f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps({"bench": "routes", "layers": layers, "topk": topk, "experts": experts, "cases": results}))


if __name__ == "__main__":
    typer.run(main)
