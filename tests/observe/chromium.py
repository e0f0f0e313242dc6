"""One headless Chromium that a test speaks to through a pipe (DevTools protocol), so that one start renders many pages."""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

WAIT_S = 120
PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    def __enter__(self) -> "Chromium":
        assert PATH is not None
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 20) for one in (theirs_in, theirs_out)]  # 3 and 4 may be among those of the pipes
        words = [PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
        words += ["--remote-debugging-pipe", f"--user-data-dir={self.folder}", "about:blank"]
        places = [(os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4)]
        quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
        self.pid = os.posix_spawn(PATH, words, dict(os.environ), file_actions=[*places, *quiet], setpgroup=0)
        for one in (theirs_in, theirs_out, *high):
            os.close(one)
        self.out, self.into, self.rest, self.count, self.session = ours_out, ours_in, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime"):
            self(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.session = ""
        with contextlib.suppress(AssertionError, OSError):
            self("Browser.close")
        os.close(self.out)
        for _tries in range(100):
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                break
            time.sleep(0.1)
        else:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.into)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, method: str, **given: Any) -> dict[str, Any]:
        self.count += 1
        said = {"id": self.count, "method": method, "params": given} | ({"sessionId": self.session} if self.session else {})
        data = json.dumps(said).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while True:
            told = self._next()
            if told.get("id") == self.count:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            assert select.select([self.into], [], [], WAIT_S)[0], f"chromium said nothing for {WAIT_S} s"
            data = os.read(self.into, 1 << 20)
            assert data, "chromium is gone"
            self.rest += data
        told, _, self.rest = self.rest.partition(b"\0")
        return json.loads(told)

    def open(self, path: Path, *, width: int, dark: bool = False, media: str = "screen") -> list[str]:
        """Shows a file; returns what the browser complained of."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        return [json.dumps(event) for event in self.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]

    def value(self, expression: str) -> Any:
        told = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self) -> bytes:
        """PNG of the whole page."""
        size = self.value("[innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"])
