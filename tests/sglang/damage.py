"""Answers of /generate, damaged in every way that we could think of, and what a client has to make of each.

A damaged route payload is judged here step by step with the standard library and sets of ids, as the specification says it and
unlike the code under test: refused, or these rows invalid and the others as they are. What remains valid although it was changed
cannot be seen in the content.
"""

from __future__ import annotations

import base64
import binascii
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from megatron_pr2.hf.shape import ModelShape

_PLACE = "@routes@"
_OUTSIDE_THE_ALPHABET = ["!", "-", "_", "~", "é", "\\n", "\\u0000", "\\\\", '"', "\x01", " ", "%", ".", "€"]


@dataclass(frozen=True)
class Damaged:
    """A damaged answer.

    Attributes:
        body: what is sent.
        refused: whether an error is the only right response; else `invalid` holds.
        invalid: rows that must come back invalid.
        unseen: rows that were changed and cannot be told from true ones.
    """

    kind: str
    body: bytes
    refused: bool
    invalid: frozenset[int] = frozenset()
    unseen: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Routes:
    """The routes of an honest answer and all that a damage may use.

    Attributes:
        ids: [R, layers, K] int32.
        text: their base64.
        other: base64 of another request's routes, None if there is none yet.
    """

    ids: np.ndarray
    text: str
    shape: ModelShape
    rng: Random
    other: str | None

    def row(self) -> int:
        return self.rng.randrange(len(self.ids))

    def rows(self) -> list[int]:
        return self.rng.sample(range(len(self.ids)), self.rng.randint(1, min(5, len(self.ids))))

    def at(self) -> int:
        """Somewhere in the text, not in its padding."""
        return self.rng.randrange(len(self.text.rstrip("=")))


def encoded(rows: np.ndarray | bytes) -> str:
    return base64.b64encode(rows if isinstance(rows, bytes) else rows.astype("<i4").tobytes()).decode()


def decoded(text: str, shape: ModelShape) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<i4").reshape(-1, shape.num_hidden_layers, shape.topk)


# Damage to the routes: each returns what stands in JSON in place of the string, or base64 text.

RouteDamage = Callable[[Routes], str]


def _text(make: Callable[[Routes], str]) -> RouteDamage:
    return lambda routes: f'"{make(routes)}"'


def _ids(change: Callable[[Routes, np.ndarray], np.ndarray | None]) -> RouteDamage:
    def apply(routes: Routes) -> str:
        ids = routes.ids.copy()
        changed = change(routes, ids)
        return f'"{encoded(ids if changed is None else changed)}"'

    return apply


def _in_rows(change: Callable[[Routes, np.ndarray], None]) -> RouteDamage:
    """Changes [K] ids of some layer of some rows."""

    def apply(routes: Routes, ids: np.ndarray) -> None:
        for row in routes.rows():
            change(routes, ids[row, routes.rng.choice(routes.shape.moe_layers)])

    return _ids(apply)


def _cut_in(routes: Routes, insert: str, remove: int) -> str:
    at = routes.at()
    return routes.text[:at] + insert + routes.text[at + remove :]


def _out_of_range(routes: Routes, ids_K: np.ndarray) -> None:
    at = routes.rng.randrange(len(ids_K))
    experts = routes.shape.num_experts
    ids_K[at] = routes.rng.choice([-1, experts, experts + 7, 256 + experts, 65536 + int(ids_K[at]), 2**31 - 1, -(2**31)])


def _duplicated(routes: Routes, ids_K: np.ndarray) -> None:
    first, second = routes.rng.sample(range(len(ids_K)), 2)
    ids_K[first] = ids_K[second]


def _zeros(routes: Routes, ids: np.ndarray) -> None:
    layers = routes.rng.choice([slice(None), routes.rng.choice(routes.shape.moe_layers)])
    for row in routes.rows():
        ids[row, layers] = 0


def _another_expert(routes: Routes, ids_K: np.ndarray) -> None:
    ids_K[routes.rng.randrange(len(ids_K))] = routes.rng.choice(sorted(set(range(routes.shape.num_experts)) - set(ids_K.tolist())))


def _layers_turned_round(routes: Routes, ids: np.ndarray) -> None:
    ids[:, routes.shape.moe_layers] = ids[:, routes.shape.moe_layers[::-1]]


def _flipped(routes: Routes) -> str:
    """A few characters become other ones of the alphabet."""
    text = list(routes.text)
    for _ in range(routes.rng.randint(1, 8)):
        text[routes.at()] = routes.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
    return "".join(text)


def _of_another_length(routes: Routes) -> str:
    if routes.other is not None and len(routes.other) != len(routes.text):
        return routes.other
    return encoded(np.repeat(routes.ids, 2, axis=0))


def _twice(routes: Routes) -> str:
    second = routes.other or encoded(routes.ids[::-1])
    return f'"{routes.text}", "routed_experts": "{second}"'


ROUTES_REFUSED: dict[str, RouteDamage] = {
    "foreign characters": _text(lambda r: _cut_in(r, r.rng.choice(_OUTSIDE_THE_ALPHABET), 1)),
    "many foreign characters": _text(lambda r: "".join(c if r.rng.random() < 0.9 else "*" for c in r.text[:-4]) + "****"),
    "characters lost": _text(lambda r: _cut_in(r, "", r.rng.randint(1, 3))),
    "characters added": _text(lambda r: _cut_in(r, "AbC"[: r.rng.randint(1, 3)], 0)),
    "end cut off": _text(lambda r: r.text[: r.rng.randrange(len(r.text) - 4)]),
    "four characters lost": _text(lambda r: r.text[4:] if r.rng.random() < 0.5 else r.text[:-4]),
    "bytes lost": _text(lambda r: encoded(r.ids.tobytes()[: -r.rng.randint(1, 15)])),
    "bytes added": _text(lambda r: encoded(r.ids.tobytes() + bytes(r.rng.randint(1, 15)))),
    "rows lost": _ids(lambda r, ids: ids[r.rng.randint(1, len(ids)) :]),
    "rows added": _ids(lambda r, ids: np.concatenate([ids, ids[: r.rng.randint(1, len(ids))]])),
    "a layer lost": _ids(lambda r, ids: ids[:, 1:]),
    "an expert per token lost": _ids(lambda r, ids: ids[:, :, 1:]),
    "padding in the middle": _text(lambda r: r.text[: (at := min(r.at() // 4 * 4, len(r.text) - 8))] + "AA==" + r.text[at + 4 :]),
    "padding in place of the end": _text(lambda r: r.text[:-1].rstrip("=") + "=" * 4),
    "line break": _text(lambda r: _cut_in(r, "\\n\\n\\n\\n", 4)),
    "spaces": _text(lambda r: _cut_in(r, " " * 4, 4)),
    "prefix": _text(lambda r: "data:application/octet-stream;base64," + r.text),
    "eight bytes per id": _text(lambda r: encoded(r.ids.astype("<i8").tobytes())),
    "one byte per id": _text(lambda r: encoded(r.ids.astype("u1").tobytes())),
    "hexadecimal": _text(lambda r: r.ids.astype("<i4").tobytes().hex()),
    "of another length": _text(_of_another_length),
    "huge": _text(lambda r: r.text * 400),
    "empty": lambda r: '""',
    "null": lambda r: "null",
    "number": lambda r: "17",
    "true": lambda r: "true",
    "list of ids": lambda r: json.dumps(r.ids.tolist()),
    "object": lambda r: f'{{"data": "{r.text}"}}',
    "twice": _twice,
    "missing": lambda r: "",
}
ROUTES_WITH_BAD_ROWS: dict[str, RouteDamage] = {
    "ids out of range": _in_rows(_out_of_range),
    "ids twice in a row": _in_rows(_duplicated),
    "rows of zeros": _ids(_zeros),
    "all zeros": _ids(lambda r, ids: np.zeros_like(ids)),
    "all ones": _ids(lambda r, ids: np.full_like(ids, -1)),
    "other byte order": _text(lambda r: encoded(r.ids.astype(">i4").tobytes())),
    "shifted by a byte": _text(lambda r: encoded(r.ids.tobytes()[1:] + r.ids.tobytes()[:1])),
    "floats": _text(lambda r: encoded((r.ids + 1).astype("<f4").tobytes())),
    "noise": _text(lambda r: encoded(r.rng.randbytes(r.ids.nbytes))),
}
# One character holds six bits of an id: most changes leave the range of ids, the others make it another expert.
ROUTES_WITH_LUCK: dict[str, RouteDamage] = {"characters changed": _text(_flipped)}
ROUTES_UNSEEN: dict[str, RouteDamage] = {
    "another expert": _in_rows(_another_expert),
    "rows in another order": _ids(lambda r, ids: np.roll(ids, 1, axis=0)),
    "layers in another order": _ids(_layers_turned_round),
    "of another request": _ids(lambda r, ids: (ids + 1) % r.shape.num_experts),
}
ROUTE_KINDS = {**ROUTES_REFUSED, **ROUTES_WITH_BAD_ROWS, **ROUTES_WITH_LUCK, **ROUTES_UNSEEN}


def damage_routes(kind: str, answer: dict[str, Any], shape: ModelShape, rng: Random, other: str | None = None) -> Damaged:
    """An honest answer with another value for its routes.

    Args:
        other: base64 of the routes of an earlier answer.
    """
    text = answer["meta_info"]["routed_experts"]
    routes = Routes(decoded(text, shape), text, shape, rng, other)
    value = ROUTE_KINDS[kind](routes)
    changed = copy.deepcopy(answer)
    changed["meta_info"]["routed_experts"] = _PLACE
    if kind == "missing":
        del changed["meta_info"]["routed_experts"]
    body = json.dumps(changed).replace(f'"{_PLACE}"', value).encode()
    must_show = kind in ROUTES_REFUSED or kind in ROUTES_WITH_BAD_ROWS
    assert not must_show or body != json.dumps(answer).encode(), f"{kind} changed nothing"
    refused, invalid, unseen = _judged(body, routes)
    return Damaged(kind, body, refused, invalid, unseen)


def _judged(body: bytes, honest: Routes) -> tuple[bool, frozenset[int], frozenset[int]]:
    nothing: frozenset[int] = frozenset()
    if body.count(b'"routed_experts"') > 1:
        return True, nothing, nothing
    try:
        text = json.loads(body)["meta_info"].get("routed_experts")
        if not isinstance(text, str):
            return True, nothing, nothing
        raw = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        return True, nothing, nothing
    if len(raw) != honest.ids.nbytes or text.find("=") not in (-1, len(honest.text.rstrip("="))):
        return True, nothing, nothing
    found = np.frombuffer(raw, "<i4").reshape(honest.ids.shape)[:, honest.shape.moe_layers]
    wanted = honest.ids[:, honest.shape.moe_layers]
    usable = [
        all(len(set(layer)) == len(layer) and all(0 <= e < honest.shape.num_experts for e in layer) for layer in row)
        for row in found.tolist()
    ]
    invalid = frozenset(i for i, good in enumerate(usable) if not good)
    unseen = frozenset(i for i, good in enumerate(usable) if good and not np.array_equal(found[i], wanted[i]))
    return False, invalid, unseen


# Damage to other fields, in place or by a new body; a client has to refuse every one.

FieldDamage = Callable[[dict[str, Any], Random], Any]


def _meta(**fields: Any) -> FieldDamage:
    return lambda answer, rng: answer["meta_info"].update(fields)


def _without(name: str) -> FieldDamage:
    def apply(answer: dict[str, Any], rng: Random) -> None:
        answer["meta_info"].pop(name, None)

    return apply


def _logprob(value: Any) -> FieldDamage:
    """Another log-prob in some entry."""

    def apply(answer: dict[str, Any], rng: Random) -> None:
        rng.choice(answer["meta_info"]["output_token_logprobs"])[0] = value

    return apply


def _logprob_of_another_token(answer: dict[str, Any], rng: Random) -> None:
    rng.choice(answer["meta_info"]["output_token_logprobs"])[1] ^= 1


def _token(change: Callable[[int], Any]) -> FieldDamage:
    """Another token, in both places that name it."""

    def apply(answer: dict[str, Any], rng: Random) -> None:
        at = rng.randrange(len(answer["output_ids"]))
        answer["output_ids"][at] = answer["meta_info"]["output_token_logprobs"][at][1] = change(answer["output_ids"][at])

    return apply


def _replaced_token(answer: dict[str, Any], rng: Random) -> None:
    at = rng.randrange(len(answer["output_ids"]))
    answer["output_ids"][at] = (answer["output_ids"][at] + 1) % 200


def _tokens_lost(answer: dict[str, Any], rng: Random) -> None:
    answer["output_ids"].pop()


def _logprobs_lost(answer: dict[str, Any], rng: Random) -> None:
    answer["meta_info"]["output_token_logprobs"].pop()


def _tokens_and_logprobs_lost(answer: dict[str, Any], rng: Random) -> None:
    """The routes are too long for what is left."""
    _logprobs_lost(answer, rng)
    _tokens_lost(answer, rng)
    spans = answer["meta_info"].get("weight_versions")
    if spans:
        spans[-1]["end"] -= 1


def _more_than_asked(answer: dict[str, Any], rng: Random) -> None:
    answer["output_ids"] *= 2
    answer["meta_info"]["output_token_logprobs"] *= 2


def _raw(make: Callable[[bytes, Random], bytes]) -> FieldDamage:
    return lambda answer, rng: make(json.dumps(answer).encode(), rng)


FIELD_KINDS: dict[str, FieldDamage] = {
    "another token": _replaced_token,
    "token outside the vocabulary": _token(lambda token: 1 << 30),
    "negative token": _token(lambda token: -1),
    "token as text": _token(str),
    "token as fraction": _token(lambda token: token + 0.5),
    "token null": _token(lambda token: None),
    "tokens lost": _tokens_lost,
    "tokens and log-probs lost": _tokens_and_logprobs_lost,
    "more tokens than asked for": _more_than_asked,
    "no tokens": lambda answer, rng: answer.update(output_ids=[]),
    "tokens null": lambda answer, rng: answer.update(output_ids=None),
    "log-prob not a number": _logprob(float("nan")),
    "log-prob infinite": _logprob(float("-inf")),
    "log-prob above 0": _logprob(0.5),
    "log-prob null": _logprob(None),
    "log-prob as text": _logprob("minus one"),
    "log-prob as list": _logprob([-1.0]),
    "log-prob of another token": _logprob_of_another_token,
    "log-probs lost": _logprobs_lost,
    "log-probs null": _meta(output_token_logprobs=None),
    "log-probs flat": _meta(output_token_logprobs=[-1.0] * 8),
    "log-probs missing": _without("output_token_logprobs"),
    "finish reason unknown": _meta(finish_reason={"type": "error"}),
    "finish reason a list": _meta(finish_reason=["stop"]),
    "finish reason null": _meta(finish_reason=None),
    "finish reason missing": _without("finish_reason"),
    "meta_info null": lambda answer, rng: answer.update(meta_info=None),
    "meta_info a list": lambda answer, rng: answer.update(meta_info=[]),
    "meta_info missing": lambda answer, rng: answer.pop("meta_info") and None,
    "answer in a list": lambda answer, rng: [answer],
    "answer null": lambda answer, rng: b"null",
    "html": lambda answer, rng: b"<html><body>Bad gateway</body></html>",
    "empty body": lambda answer, rng: b"",
    "noise": lambda answer, rng: rng.randbytes(300),
    "JSON cut off": _raw(lambda body, rng: body[: rng.randrange(1, len(body))]),
    "JSON twice": _raw(lambda body, rng: body + body),
    "not UTF-8": _raw(lambda body, rng: body.replace(b"finish", b"fini\xff\xfe", 1)),
}
# Answers whose damage an attempt's id, its log-prob entries or types reveal only to a client that looks at them.
ID_KINDS: dict[str, FieldDamage] = {
    "id of another request": _meta(id="somebody-else"),
    "id missing": _without("id"),
    "id null": _meta(id=None),
    "id a list": _meta(id=["x"]),
}
STRICT_KINDS: dict[str, FieldDamage] = {
    "token as float": _token(float),
    "log-prob a large integer": _logprob(-(10**400)),
    "log-probs as objects": lambda answer, rng: answer["meta_info"].update(
        output_token_logprobs=[{"logprob": p, "token": t} for p, t, _ in answer["meta_info"]["output_token_logprobs"]]
    ),
    "version spans of numbers": _meta(weight_versions=[1, 2]),
    "version span from 0.0 on": lambda answer, rng: answer["meta_info"]["weight_versions"][0].update(start=0.0),
    "cached tokens as text": _meta(cached_tokens="many"),
    "retractions as list": _meta(num_retractions=[1]),
    "nested a hundred thousand deep": lambda answer, rng: b"[" * 100_000,
}
VERSION_KINDS: dict[str, FieldDamage] = {
    "another version": lambda answer, rng: answer["meta_info"].update(
        weight_version="777", weight_versions=[{"version": "777", "start": 0, "end": len(answer["output_ids"])}]
    ),
    "versions missing": _meta(weight_version=None, weight_versions=None),
    "half another version": lambda answer, rng: answer["meta_info"].update(
        weight_versions=[
            {"version": answer["meta_info"]["weight_version"], "start": 0, "end": 1},
            {"version": "777", "start": 1, "end": len(answer["output_ids"])},
        ]
    ),
}
# True to form, but nobody asked for it: an attempt brought nothing.
ABORT_KINDS: dict[str, FieldDamage] = {
    "finish reason abort": _meta(finish_reason={"type": "abort", "message": "no"}),
}
ALL_FIELD_KINDS = {**FIELD_KINDS, **ID_KINDS, **STRICT_KINDS, **VERSION_KINDS, **ABORT_KINDS}


def damage_field(kind: str, answer: dict[str, Any], rng: Random) -> Damaged:
    """An honest answer of which something else than the routes is wrong; all of these must be refused."""
    changed = copy.deepcopy(answer)
    result = ALL_FIELD_KINDS[kind](changed, rng)
    body = result if isinstance(result, bytes) else json.dumps(changed if result is None else result).encode()
    assert body != json.dumps(answer).encode(), f"{kind} changed nothing"
    return Damaged(kind, body, refused=True)
