"""Headless Chromium over its own DevTools protocol, through a pipe.

Debian's `chromium` is all it takes: no driver, no package, no port; it ends when the pipe closes.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEADLINE_S = 60.0


def find() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Navigated(Exception):
    """The page that was asked went away while it was asked."""


class Page:
    """One tab, and everything that went wrong in it."""

    def __init__(self, browser: Browser, width: int, height: int) -> None:
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        browser.tabs.append(self)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        """End the tab; what went wrong in it is forgotten."""
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.forget(self, self._session)

    def open(self, place: Path | str) -> None:
        """A file, or an address."""
        self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        self.wait("document.readyState === 'complete'")

    def reload(self) -> None:
        """Returns when the page is there again, not the one that goes."""
        self.js("window.gone = true; location.reload()")
        self.wait("!window.gone && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression; one that throws raises AssertionError."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not self._holds(expression):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.05)

    def _holds(self, expression: str) -> bool:
        """Whether it is true; False while one page goes and the next is not there yet."""
        try:
            return bool(self.js(expression))
        except Navigated:
            return False

    def choose(self, select_id: str, value: str) -> None:
        """As a reader does: set the select, and let the page know."""
        self.js(
            f"(e => {{ e.value = {value!r}; if (e.value !== {value!r}) throw 'no such option';"
            f" e.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
            f"(document.getElementById({select_id!r}))"
        )

    def press(self, key: str) -> None:
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Enter": 13, "Tab": 9, " ": 32}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, text=text,
                      windowsVirtualKeyCode=code)  # fmt: skip

    def size(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)  # fmt: skip

    def prefer(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> None:
        """All of the page, however long."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    @property
    def errors(self) -> list[str]:
        """Exceptions, and whatever the browser logged as an error: refused loads among it."""
        found = []
        for event in self._mine():
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
        return found

    @property
    def requested(self) -> list[str]:
        """The address of everything that was asked for over any wire or from any disk."""
        return [
            event["params"]["request"]["url"]
            for event in self._mine()
            if event["method"] == "Network.requestWillBeSent"
        ]

    def _mine(self) -> list[dict[str, Any]]:
        self._browser.call("Browser.getVersion")  # what happened before this has been told then
        return [e for e in self._browser.events if e.get("sessionId") == self._session]


class Browser:
    def __init__(self, to_chromium: int, from_chromium: int) -> None:
        self._to, self._from = to_chromium, from_chromium
        self._rest = b""
        self._calls = 0
        self.events: list[dict[str, Any]] = []
        self.tabs: list[Page] = []  # open ones

    def close_tabs(self) -> None:
        """Close every tab: each keeps a process and the memory of its page."""
        for tab in [*self.tabs]:
            tab.close()

    def forget(self, tab: Page, session: str) -> None:
        """Drop a tab that is closed, and the events that it has told."""
        self.tabs.remove(tab)
        self.events = [e for e in self.events if e.get("sessionId") != session]

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._calls:
            self.events.append(answer)
        if "navigated or closed" in str(answer.get("error")):
            raise Navigated(method)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], DEADLINE_S)
            chunk = os.read(self._from, 1 << 16) if ready else b""
            assert chunk, "chromium does not answer"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile; it ends with the block."""
    program = find()
    assert program
    (chromium_reads, to_chromium), (from_chromium, chromium_writes) = os.pipe(), os.pipe()
    # the protocol speaks on descriptors 3 and 4: make room, then place them in the child
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (chromium_reads, chromium_writes)]

    def place() -> None:
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    process = subprocess.Popen(
        [program, "--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}",
         "--no-first-run", "--disable-gpu", "--disable-background-networking", "--disable-sync",
         "--disable-component-update", "--hide-scrollbars",
         # containers often have neither user namespaces nor room in /dev/shm; the pages are ours
         "--no-sandbox", "--disable-dev-shm-usage"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        pass_fds=(3, 4), preexec_fn=place,
    )  # fmt: skip
    for fd in (chromium_reads, chromium_writes, *theirs):
        os.close(fd)
    try:
        yield Browser(to_chromium, from_chromium)
    finally:
        os.close(to_chromium)
        os.close(from_chromium)
        process.terminate()
        process.wait(10)
