"""Numbers as people read them; a value that does not exist reads as a dash."""

from __future__ import annotations

import math

ABSENT = "-"


def fixed(value: float, digits: int = 3, sign: str = "") -> str:
    """Plain decimal number, or scientific notation where the digits would show nothing but zeros; `sign` "+" signs it always."""
    if not math.isfinite(value):
        return ABSENT
    small = value != 0 and abs(value) < 0.5 * 10**-digits
    return f"{value:{sign}.1e}" if small else f"{value:{sign}.{digits}f}"


def scientific(value: float, sign: str = "") -> str:
    """Two significant digits, for quantities of many magnitudes; an exact zero stays "0"."""
    if not math.isfinite(value):
        return ABSENT
    return "0" if value == 0 else f"{value:{sign}.1e}"


def percent(share: float, digits: int = 2) -> str:
    """A share in [0, 1] as percent."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else ABSENT


def share(value: float) -> str:
    """A share that is not all stays below "100 %" in print."""
    return "> 99.99 %" if 0.99995 <= value < 1 else percent(value)


def points(difference: float, digits: int = 2) -> str:
    """A difference of two shares as signed percentage points; what rounds to zero carries no sign."""
    if not math.isfinite(difference):
        return ABSENT
    rounded = round(100 * difference, digits)
    return f"{rounded:+.{digits}f} pp" if rounded else f"{0:.{digits}f} pp"


def count(value: float, noun: str = "") -> str:
    """An integer with thin groups of three digits, "1 rollout" or "12 rollouts" with a noun."""
    text = f"{round(value):,}".replace(",", " ") if math.isfinite(value) else ABSENT
    return f"{text} {noun}{'' if text == '1' else 's'}" if noun else text


def duration(seconds: float) -> str:
    """Seconds as "4.2 s", "3 min 05 s" or "2 h 07 min"."""
    if not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: float) -> str:
    """Bytes with a binary prefix."""
    if not math.isfinite(num_bytes):
        return ABSENT
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
