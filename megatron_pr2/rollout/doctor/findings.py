"""What the doctor finds about one URL: one finding per check."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended; SKIP: it could not be made."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, how it ended, what was seen, and what to do about it."""

    check: str
    status: Status
    detail: str
    fix: str = ""


@dataclass
class Diagnosis:
    """All findings about one URL, in the order of the checks."""

    url: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return any(finding.status is Status.FAIL for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """For machines: {"url", "ok", "findings": [{"check", "status", "detail", "fix"}]}."""
        return {"url": self.url, "ok": not self.failed, "findings": [asdict(finding) for finding in self.findings]}
