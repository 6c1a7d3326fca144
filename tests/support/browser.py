"""A headless Chromium, driven through a pipe by its DevTools protocol."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--mute-audio",
          "--disable-dev-shm-usage", "--disable-background-networking", "--remote-debugging-pipe"]  # fmt: skip


class Browser:
    """One page. `said` holds what it wrote to its console, errors included; `asked` the addresses it fetched."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.mkdtemp(prefix="hfkit-chromium-")
        read, self._write = os.pipe()
        self._read, write = os.pipe()

        def to_places():  # Chromium reads from file 3 and writes to file 4
            # By way of numbers that are free: the pipes may have any, 3 and 4 among them.
            high = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in (read, write)]
            os.dup2(high[0], 3), os.dup2(high[1], 4)

        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self._process = subprocess.Popen(
            command, preexec_fn=to_places, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read), os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        self.said: list[str] = []
        self.asked: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read), os.close(self._write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                if not (chunk := os.read(self._read, 1 << 16)):
                    raise RuntimeError("Chromium has ended")
                self._rest += chunk
            line, _, self._rest = self._rest.partition(b"\0")
            reply = json.loads(line)
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(reply["error"])
                return reply["result"]
            self._note(reply.get("method", ""), reply.get("params", {}))

    def _note(self, event: str, values: dict) -> None:
        match event:
            case "Runtime.consoleAPICalled":
                self.said.append(" ".join(str(value.get("value")) for value in values["args"]))
            case "Runtime.exceptionThrown":
                details = values["exceptionDetails"]
                self.said.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded":
                self.said.append(values["entry"]["text"])
            case "Network.requestWillBeSent":
                self.asked.append(values["request"]["url"])

    def open(self, url: str, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Open an address in a window of this size, in pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def run(self, script: str):
        """The value of an expression, awaited."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, condition: str, seconds: float = 20):
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}: {self.said}")
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        """Press the mouse in the middle of an element."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by key strokes."""
        self.run(f"(e => {{ e.focus(); e.select() }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))
