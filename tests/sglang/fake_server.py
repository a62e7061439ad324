"""A scriptable stand-in for an SGLang server: answers as SGLang 0.5.23 does, except where a test says otherwise."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from megatron_pr2.hf.shape import ModelShape

SHAPE = ModelShape(num_hidden_layers=4, moe_layers=(0, 1, 2, 3), num_experts=16, topk=4, vocab_size=260)

Answer = tuple[int, Any]  # HTTP status; a dict, or raw bytes


class FakeServer:
    """State of the fake: what it says of itself, and an optional override per path."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {
            "version": "0.5.23",
            "device": "cpu",
            "enable_return_routed_experts": True,
            "disable_overlap_schedule": False,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "moe_runner_backend": "auto",
        }
        self.version = "4"
        self.overrides: dict[str, Callable[[dict[str, Any], int], Answer | None]] = {}
        self.calls: dict[str, int] = {}
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()
        self.url = ""

    def routes(self, rows: int) -> np.ndarray:
        """[rows, hidden layers, top-k] valid ids that differ from row to row."""
        ids = np.arange(rows * SHAPE.num_hidden_layers)[:, None] + np.arange(SHAPE.topk) * 3
        return (ids % SHAPE.num_experts).astype("<i4").reshape(rows, SHAPE.num_hidden_layers, SHAPE.topk)

    def generation(self, body: dict[str, Any]) -> dict[str, Any]:
        """An honest answer to /generate; tests damage it."""
        prompt = body["input_ids"]
        output = [7 + i for i in range(body["sampling_params"]["max_new_tokens"])]
        rows = self.routes(len(prompt) + len(output) - 1)[body.get("routed_experts_start_len", 0) :]
        return {
            "output_ids": output,
            "meta_info": {
                "id": body.get("rid", "fake"),
                "finish_reason": {"type": "length", "length": len(output)},
                "weight_version": self.version,
                "weight_versions": [{"version": self.version, "start": 0, "end": len(output)}],
                "cached_tokens": 0,
                "num_retractions": 0,
                "input_token_logprobs": [[None if i == 0 else -1.0, t, None] for i, t in enumerate(prompt)],
                "output_token_logprobs": [[-1.5, token, None] for token in output],
                "routed_experts": base64.b64encode(rows.tobytes()).decode(),
            },
        }

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        with self.lock:
            call = self.calls[path] = self.calls.get(path, 0) + 1
            override = self.overrides.get(path)
        answer = override(body, call) if override is not None else None
        if answer is not None:
            return answer
        if path == "/server_info":
            return 200, self.info
        if path == "/model_info":
            return 200, {"weight_version": self.version}
        if path == "/generate":
            self.bodies.append(body)
            return 200, self.generation(body)
        if path in ("/health", "/flush_cache"):
            return 200, b"ok"
        return 404, {"error": "no such endpoint"}


@contextmanager
def serve(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves on a free port of 127.0.0.1 until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"))

        def reply(self, body: dict[str, Any]) -> None:
            with fake.lock:
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                status, content = fake.answer(self.path.partition("?")[0], body)
            finally:
                with fake.lock:
                    fake.in_flight -= 1
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: Any) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # a client that stops reading is what some tests are about
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the default of 5 resets connections of concurrent clients

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
