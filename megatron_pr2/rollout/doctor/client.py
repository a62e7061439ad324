"""EngineClient: one request at a time to a server of which nothing is known yet; bounded responses, no keys in messages."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_pr2.errors import RolloutError
from megatron_pr2.rollout.sglang.config import check_url, is_loopback
from megatron_pr2.rollout.sglang.http import auth_headers
from megatron_pr2.rollout.sglang.plugin import encode_rid

_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Reply:
    """One response; as text, its status and the beginning of its body."""

    status: int
    body: bytes
    seconds: float

    def __str__(self) -> str:
        return f"{self.status} {self.body[:200].decode('utf-8', errors='replace')!r}"

    def parsed(self) -> dict[str, Any]:
        """The JSON object of a response with status 200, else {}."""
        try:
            value = json.loads(self.body) if self.status == 200 else None
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {}


class EngineClient:
    """A context manager.

    Args:
        url: base URL; other hosts than this one are allowed, because the doctor sends nothing but probes.

    Attributes:
        private: whether nobody on a network can read along.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout_s: float) -> None:
        check_url(url, allow_remote=True, has_key=True)
        self.url = url.rstrip("/")
        self.has_key = api_key is not None
        parts = urlsplit(url)
        self.private = parts.scheme == "https" or is_loopback(str(parts.hostname))
        # trust_env=False: a proxy of the environment must see neither the requests nor the key.
        self._client = httpx.Client(headers=auth_headers(api_key), timeout=timeout_s, trust_env=False)

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.close()

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Reply:
        """Sends one request; raises RolloutError without a complete response, or for one longer than 64 MiB."""
        began = time.monotonic()
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                received = bytearray()
                for chunk in response.iter_bytes():
                    received += chunk
                    if len(received) > _MAX_BYTES:
                        raise RolloutError(f"{path} answered with more than {_MAX_BYTES >> 20} MiB")
        except httpx.TimeoutException as error:
            raise RolloutError(f"{path} gave no answer within {time.monotonic() - began:.0f} s") from error
        except httpx.HTTPError as error:
            raise RolloutError(f"{path}: {type(error).__name__}: {error}") from error
        return Reply(response.status_code, bytes(received), time.monotonic() - began)

    def generate(
        self, token_ids: Sequence[int], new_tokens: int, *, routes: bool = True, score: bool = False, through_rid: bool = False
    ) -> Reply:
        """One /generate; raises as :meth:`request`.

        Args:
            score: ask for the prompt's log-probs too, for which the engine recomputes all of it.
            through_rid: additionally ask for routes through the request id, which passes a router.
        """
        body: dict[str, Any] = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": score,
            "logprob_start_len": 0 if score else -1,
            "return_routed_experts": routes,
        }
        if through_rid:
            body["rid"] = encode_rid(f"doctor-{time.time_ns()}", 0 if routes else None)
        return self.request("POST", "/generate", body)
