"""A headless Chromium, driven through ChromeDriver's HTTP interface: what a page logs, how wide it is, what it looks like."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def chromium_is_installed() -> bool:
    return all(shutil.which(program) for program in ("chromium", "chromedriver"))


class Browser:
    """A context manager. Everything that the page writes to its console as an error is collected in `errors()`."""

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory()
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._driver.stdout is not None
        line = next(line for line in self._driver.stdout if "started successfully on port" in line)
        self._url = f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip().rstrip('.')}"
        options = {"args": [*_FLAGS.split(), f"--user-data-dir={self._profile.name}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = ""
        self._session = "/session/" + self._call("/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._session:
                self._call("", method="DELETE")
        finally:
            self._driver.terminate()
            self._driver.wait()
            self._profile.cleanup()

    def _call(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            self._url + self._session + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as failure:
            raise AssertionError(failure.read().decode()) from None

    def _devtools(self, command: str, **params: Any) -> Any:
        return self._call("/goog/cdp/execute", {"cmd": command, "params": params})

    def open(self, page: Path, *, width: int, scheme: str = "light", media: str = "screen", height: int = 900) -> None:
        """Load a file in a window of that width, with prefers-color-scheme as `scheme`, offline; returns when its charts are drawn."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", media=media, features=features)
        self._call("/url", {"url": page.resolve().as_uri()})
        end = time.monotonic() + 120
        while self.evaluate("return document.querySelector('.plot') && !document.documentElement.dataset.drawn"):
            assert time.monotonic() < end, f"the charts of {page} are not drawn: {self.errors()}"
            time.sleep(0.1)

    def evaluate(self, script: str) -> Any:
        return self._call("/execute/sync", {"script": script, "args": []})

    def errors(self) -> list[str]:
        """What the console has got since the last call, except what is only informative."""
        return [e["message"] for e in self._call("/se/log", {"type": "browser"}) if e["level"] in ("SEVERE", "WARNING")]

    def screenshot(self, path: Path) -> None:
        """The entire page."""
        image = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(image["data"]))

    def print(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._devtools("Page.printToPDF", printBackground=True)["data"]))
