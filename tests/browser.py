"""Chromium for tests of pages, driven by chromedriver over plain HTTP (WebDriver)."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DRIVER = shutil.which("chromedriver")
needed = pytest.mark.skipif(DRIVER is None, reason="did not run: no chromedriver")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",
]

CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [red, green, blue] = numbers(colour).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll("SELECTOR")].map((element) => {
  const style = getComputedStyle(element);
  const ink = light(element.tagName === "text" ? style.fill : style.color);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}).reduce((one, other) => Math.min(one, other));
"""


class Browser:
    """A session of chromedriver."""

    def __init__(self, port: int, profile: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{session['sessionId']}"

    def ask(self, method: str, path: str, content: Any = None) -> Any:
        """The value that a command of WebDriver answers."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        open_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        with open_without_proxy(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str) -> Any:
        """What a script of the page returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """The answer of a command of Chromium's developer tools."""
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was logged since the last time."""
        return self.ask("POST", "/se/log", {"type": kind})

    def asked(self) -> list[str]:
        """Addresses that were requested since the last time."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]

    def show(self, place: Path | str, width: int = 1280, scheme: str = "light") -> None:
        """Open a file or an address in a window of a width, for readers who prefer a scheme of colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("POST", "/url", {"url": place if isinstance(place, str) else place.as_uri()})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def contrast(self, selector: str) -> float:
        """Lowest contrast of the text of elements with the page's background (WCAG 2)."""
        return self.run(CONTRAST.replace("SELECTOR", selector))


def port_of(driver: subprocess.Popen[str]) -> int:
    """The port that chromedriver chose; it says so in its first lines."""
    assert driver.stdout is not None
    for line in driver.stdout:
        if "was started successfully on port" in line:
            return int(line.rstrip(".\n").split()[-1])
    pytest.fail("chromedriver ended without a port")


@contextmanager
def opened(profile: Path) -> Iterator[Browser]:
    """A browser, with its profile in a folder."""
    assert DRIVER is not None
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        browser = Browser(port_of(driver), profile)
        yield browser
        browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=20)
