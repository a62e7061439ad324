"""Rewards that can be verified: 1 for the exact number, else 0.

The answer of a response is, in this order: the content of its last `\\boxed{}`, the first number behind its last `####`, its last
number. Numbers are compared as fractions, so 18, 18.0, $18 and 18.00 are the same and 0.1 is exactly one tenth.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

# A longer run of digits is no answer, and big-number arithmetic on it would cost time.
MAX_NUMBER_CHARS = 256

# A sign belongs to a number if it touches it and touches nothing that it could be subtracted from: "10-3" and "10 - 3" end in 3,
# "= -3" and "10 -3" in -3.
# Digits are ASCII; groups of three may be separated by commas; "42." is 42 and a full stop.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}])[-+\u2212](?=[\d.$\\]))?(?:\\?\$(?P<inner>[-\u2212])?)?"
    r"(?P<digits>(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)
_FRAC = re.compile(r"\s*(?P<sign>[-+\u2212])?\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}\s*")
_BOXED = "\\boxed{"
_MARK = "####"


def _value(match: re.Match[str]) -> Fraction | None:
    digits = match["digits"].replace(",", "")
    if len(digits) > MAX_NUMBER_CHARS:
        return None
    value = Fraction(Decimal(digits))
    negative = (match["sign"] or "+") in "-\u2212" or match["inner"] is not None
    return -value if negative else value


def _last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{}`, braces balanced; None if there is none or it is never closed."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 1
    for position in range(start + len(_BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(_BOXED) : position]
    return None


def _boxed_value(content: str) -> Fraction | None:
    """A box holds one number or one simple fraction; with several numbers it is not clear which one is meant."""
    frac = _FRAC.fullmatch(content)
    if frac:
        top, bottom = _boxed_value(frac[2]), _boxed_value(frac[3])
        if top is None or not bottom:
            return None
        return -(top / bottom) if (frac["sign"] or "+") in "-\u2212" else top / bottom
    found = list(_NUMBER.finditer(content))
    return _value(found[0]) if len(found) == 1 else None


def extract_number(text: str) -> Fraction | None:
    """The number that a response gives as its answer, or None. Any text is allowed; nothing is raised.

    An explicit answer field (`\\boxed{}`, `####`) without a number in it counts as no answer.
    """
    boxed = _last_boxed(text)
    if boxed is not None:
        return _boxed_value(boxed)
    if _MARK in text:
        match = _NUMBER.search(text.rsplit(_MARK, 1)[1])
        return None if match is None else _value(match)
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def exact_match(response: str, answer: str) -> float:
    """1.0 if the response's number equals the gold answer's, else 0.0 (also if either has none).

    Args:
        response: what the policy wrote, without the prompt and without special tokens.
        answer: gold answer, e.g. "1,234" or "-5".
    """
    given, gold = extract_number(response), extract_number(answer)
    return float(given is not None and given == gold)
