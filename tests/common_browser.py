"""A page in a real headless Chromium, spoken to in the DevTools protocol over pipes.

    python tests/common_browser.py out/demo-look.html docs/look.png

makes the README's picture of a page of tools.look (`make demo` writes this one).
"""

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
INSTALL = "no Chromium here: apt-get install chromium"
# no sandbox: root has none, and the page is our own
FLAGS = ("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--mute-audio",
         "--hide-scrollbars")


class Page:
    """with Page(file, profile) as page: page.run("1 + 1") == 2"""

    def __init__(self, file: Path, profile: Path, width: int = 1000, dark: bool = False):
        self.file, self.profile, self.width, self.dark = file, profile, width, dark
        self.count, self.buffer, self.events, self.session = 0, b"", [], None

    def __enter__(self):
        ends = [end for _ in range(2) for end in os.pipe()]
        inherited = [fcntl.fcntl(ends[i], fcntl.F_DUPFD, 20) for i in (0, 3)]     # away from 3 and 4
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in zip(inherited, (3, 4))]
        words = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        quiet = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        self.process = os.posix_spawn(CHROMIUM, words, os.environ, file_actions=[*actions, quiet])
        for fd in (ends[0], ends[3], *inherited):
            os.close(fd)
        self.reader, self.writer = ends[2], ends[1]
        try:
            self.open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Ask it to go, so that nothing of it writes on; if it does not, end it."""
        self.session = None
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        for fd in (self.reader, self.writer):
            os.close(fd)
        end = time.monotonic() + 10
        while not os.waitpid(self.process, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.05)

    def open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.resize(self.width, self.dark)
        self.call("Page.navigate", url=self.file.resolve().as_uri())
        self.wait("document.body && document.body.dataset.ready === 'yes'")

    def resize(self, width: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def call(self, method: str, **params) -> dict:
        """What the browser answers; events of meanwhile go to `events`."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds: float = 60.0) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.reader], [], [], seconds)[0], "Chromium says nothing"
            data = os.read(self.reader, 2**16)
            assert data, "Chromium is gone"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def run(self, script: str):
        """The value of an expression of JavaScript in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"never true: {condition}; {self.complaints()}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over an element, to these shares of its width and height."""
        box = self.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = "
                       f"e.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; }})"
                       f"(document.querySelector({json.dumps(selector)}))")
        place = {"x": box[0] + x * box[2], "y": box[1] + y * box[3]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **place)

    def picture(self, file: Path, first: str = "body", last: str = "body") -> None:
        """The page from one element to another, and some pixels around them."""
        x, y, right, bottom = self.run(
            f"(([a, b]) => [a.left + scrollX, a.top + scrollY, b.right + scrollX, b.bottom + scrollY])"
            f"([{json.dumps(first)}, {json.dumps(last)}].map(e => document.querySelector(e)."
            f"getBoundingClientRect()))")
        clip = {"x": x - 5, "y": y - 5, "width": right - x + 10, "height": bottom - y + 10, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Exceptions and errors in the page, and what it asked the network for."""
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"].get("text", "") + str(params)[:300])
            if method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:", "about:", "blob:")):
                    found.append(url)
        return found


def photograph(page: str, file: str) -> None:
    """Both maps and the memory of a page of tools.look: second layer, second head."""
    with tempfile.TemporaryDirectory() as profile, Page(Path(page), Path(profile)) as shown:
        shown.run("set({layer: 1, head: 1, t: 70, i: 66})")
        shown.picture(Path(file), "[aria-labelledby=maps-title]", "#memory")


if __name__ == "__main__":
    photograph(*sys.argv[1:])
