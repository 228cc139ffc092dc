"""A headless Chromium for tests, controlled by its devtools protocol over two pipes: no driver, no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Self

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_SECONDS = 30.0


class Browser:
    """One page. `errors` collects exceptions of its scripts, errors of its console, and dialogs."""

    def __init__(self, width: int = 1200, height: int = 900) -> None:
        assert PROGRAM is not None
        self.errors: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        # The browser reads from 3 and writes to 4: the shell moves the pipes there and execs it.
        moved = f'exec 3<&{theirs} 4>&{answers}; exec "$@"'
        command = [
            PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}",
            "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", *command], pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._left = b""
        self._number = 0
        self._session = ""
        try:
            self._session = self._ask("Target.attachToTarget", targetId=self._page(), flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self._ask(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise

    def _page(self) -> str:
        """Return the id of the page; on a busy machine the browser answers before it has opened one."""
        end = time.monotonic() + WAIT_SECONDS
        while True:
            for target in self._ask("Target.getTargets")["targetInfos"]:
                if target["type"] == "page":
                    return str(target["targetId"])
            assert time.monotonic() < end, "the browser opens no page"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._left:
                more = os.read(self._in, 1 << 20)
                assert more, "the browser has ended"
                self._left += more
            answer, _, self._left = self._left.partition(b"\0")
            reply = json.loads(answer)
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return dict(reply["result"])
            self._note(reply.get("method", ""), reply.get("params", {}))

    def _note(self, event: str, details: Mapping[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(details["exceptionDetails"]))
        elif event == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.errors.append(details["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.errors.append(f"dialog: {details['message']}")

    def go(self, address: str) -> None:
        """Open an address and wait until its scripts have run."""
        self._ask("Page.navigate", url=address)
        self.until("location.href != 'about:blank' && document.readyState == 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        reply = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def until(self, script: str, seconds: float = WAIT_SECONDS) -> Any:
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}\n{self.run('document.body.innerText')}\n{self.errors}"
            time.sleep(0.05)
        return value

    def hover(self, x: float, y: float) -> None:
        """Move the mouse to a position in the window."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def dark(self, dark: bool) -> None:
        """Emulate a system preference for dark or light."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])


def started(*words: str) -> tuple[subprocess.Popen[str], str]:
    """Return a process of `llmpy watch`, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llmpy", "watch", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]
