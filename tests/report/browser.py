"""A headless Chromium, driven over a pipe by its DevTools protocol: what a page looks like to a person, and what it complains of.

https://chromedevtools.github.io/devtools-protocol/ describes the commands; over --remote-debugging-pipe each message is JSON ended
by a NUL, read by the browser from file descriptor 3 and written by it to 4. No other program and no open port is involved.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120.0  # a busy machine is slow, a dead browser closes its pipe
# Puts the pipes where the browser expects them; exec keeps the process id.
LAUNCHER = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """The first Chromium on PATH, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser for many pages; a context manager that ends it and removes its profile."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="megatron-pr2-browser-", ignore_cleanup_errors=True)
        (its_input, to_browser), (from_browser, its_output) = os.pipe(), os.pipe()
        self._to, self._from = to_browser, from_browser
        arguments = [
            executable,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-default-apps",
            "--disable-extensions",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # a page that needs the network must fail here too
            f"--user-data-dir={self._profile.name}",
            "--remote-debugging-pipe",
        ]
        self._log = open(Path(self._profile.name) / "stderr.log", "wb")  # noqa: SIM115 (lives as long as the browser)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, str(its_input), str(its_output), *arguments],
            pass_fds=(its_input, its_output),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
        )
        os.close(its_input)
        os.close(its_output)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []
        try:
            self.call("Browser.getVersion")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser and its helpers, kindly first."""
        with contextlib.suppress(OSError, RuntimeError):
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the session that was started for it
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._log.close()
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer; events that arrive meanwhile are kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def wait_for(self, method: str, session: str) -> None:
        """Waits for an event of a session."""
        while not any(event.get("method") == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._receive())

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A page in a tab of its own, loaded and laid out."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            self.call(f"{domain}.enable", session)
        self.call(
            "Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme)
        self.events.clear()
        result = self.call("Page.navigate", session, url=path.resolve().as_uri())
        if result.get("errorText"):
            raise RuntimeError(f"{path}: {result['errorText']}")
        self.wait_for("Page.loadEventFired", session)
        page = Page(self, target, session, path)
        # Two frames: what a layout or a late script does is done.
        page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(true))))")
        return page

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._from, 1 << 20) if ready else b""
            if not chunk:
                log = Path(self._log.name).read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the browser {'closed its pipe' if ready else 'does not answer'}; its last words:\n{log}")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))


class Page:
    """A loaded page and what was heard of it."""

    def __init__(self, browser: Browser, target: str, session: str, path: Path) -> None:
        self._browser, self._target, self._session, self.path = browser, target, session, path

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Console errors and warnings, exceptions and the browser's own log, so far."""
        out = []
        for event in self._heard():
            method, parameters = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                out.append(f"exception: {parameters['exceptionDetails'].get('text')}")
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                out.append(f"console.{parameters['type']}: {[a.get('value') for a in parameters['args']]}")
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                out.append(f"{parameters['entry']['source']}: {parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        return out

    def requests(self) -> list[str]:
        """What the page asked for besides itself, data: URLs left out."""
        asked = [e["params"]["request"]["url"] for e in self._heard() if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:") and url.split("#")[0] != self.path.resolve().as_uri()]

    def _heard(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]
