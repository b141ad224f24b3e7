"""The report of a study in a browser: Chromium, driven by chromedriver over plain HTTP (WebDriver)."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request

import pytest
from example_findings import example

from audiot.study.report import write_report

DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(DRIVER is None, reason="did not run: no chromedriver")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ENTER = "\ue007"
TABLE = "const table = document.querySelector('#results table');"


class Browser:
    """A session of chromedriver."""

    def __init__(self, port, profile):
        self.address = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{session['sessionId']}"

    def ask(self, method, path, content=None):
        """The value that a command of WebDriver answers."""
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        open_without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        with open_without_proxy(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command, **parameters):
        return self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind):
        return self.ask("POST", "/se/log", {"type": kind})

    def show(self, path, width=1280, scheme="light"):
        """Open a file in a window of a width, for readers who prefer a scheme of colours."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("POST", "/url", {"url": path.as_uri()})


def port_of(driver):
    """The port that chromedriver chose; it says so in its first lines."""
    for line in driver.stdout:
        if "was started successfully on port" in line:
            return int(line.rstrip(".\n").split()[-1])
    pytest.fail("chromedriver ended without a port")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        browser = Browser(port_of(driver), tmp_path_factory.mktemp("profile"))
        yield browser
        browser.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    names = ("query_key", "<script>alert(1)</script>", "a" * 200, "linear_elu", "{'\"&", "fourier")
    return write_report(example(names, rehearsal="It is an example."), tmp_path_factory.mktemp("report"))[0]


def column(browser, place):
    return browser.run(f"{TABLE} return [...table.tBodies[0].rows].map(row => row.cells[{place}].dataset.value)")


def sorts(browser):
    return browser.run(f"{TABLE} return [...table.tHead.rows[0].cells].map(head => head.getAttribute('aria-sort'))")


def test_the_page_opens_without_errors_and_without_the_network(browser, report):
    for kind in ("browser", "performance"):
        browser.log(kind)
    browser.show(report)
    time.sleep(0.5)
    assert browser.log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    assert asked == [report.as_uri()]
    assert browser.run("return document.querySelectorAll('script').length") == 1


def test_a_click_sorts_and_a_second_one_turns_the_order(browser, report):
    browser.show(report)
    before = column(browser, 2)
    for order, reverse in (("descending", True), ("ascending", False)):
        browser.run(f"{TABLE} table.tHead.rows[0].cells[2].querySelector('button').click()")
        assert sorts(browser) == ["none", "none", order, "none", "none", "none", "none"]
        assert column(browser, 2) == sorted(before, key=float, reverse=reverse)
    assert before != sorted(before, key=float)


def test_enter_on_a_header_sorts(browser, report):
    browser.show(report)
    before = column(browser, 5)
    browser.run(f"{TABLE} table.tHead.rows[0].cells[5].querySelector('button').focus()")
    keys = [{"type": "keyDown", "value": ENTER}, {"type": "keyUp", "value": ENTER}]
    browser.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})
    assert sorts(browser)[5] == "ascending"  # an error rate: the best comes first
    assert column(browser, 5) == sorted(before, key=float) != before
    assert browser.run("return document.activeElement.tagName") == "BUTTON"


def test_names_sort_as_text(browser, report):
    browser.show(report)
    browser.run(f"{TABLE} table.tHead.rows[0].cells[1].querySelector('button').click()")
    names = browser.run(f"{TABLE} return [...table.tBodies[0].rows].map(row => row.cells[1].textContent)")
    assert names == ["clusters_visible"] * 6 + ["mockingjay"] * 6


@pytest.mark.parametrize("width", [380, 800, 1280])
def test_the_page_is_never_wider_than_the_window(browser, report, width):
    browser.show(report, width=width)
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return window.innerWidth") == width


CONTRAST = """
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [red, green, blue] = numbers(colour).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll("main *:not(svg *), svg text, nav a")].map((element) => {
  const style = getComputedStyle(element);
  const ink = light(element.tagName === "text" ? style.fill : style.color);
  return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
}).reduce((one, other) => Math.min(one, other));
"""


def test_light_and_dark_differ_and_both_are_readable(browser, report):
    colours = {}
    for scheme in ("light", "dark"):
        browser.show(report, scheme=scheme)
        colours[scheme] = browser.run(
            "return [document.body, document.querySelector('svg text'), document.querySelector('.verdict')].map(each => "
            "{ const style = getComputedStyle(each); return [style.backgroundColor, style.color, style.fill].join(); })"
        )
        assert browser.run(CONTRAST) >= 4.5
    assert all(one != other for one, other in zip(colours["light"], colours["dark"], strict=True))


def test_the_skip_link_is_the_first_stop_of_the_keyboard(browser, report):
    browser.show(report)
    keys = [{"type": "keyDown", "value": "\ue004"}, {"type": "keyUp", "value": "\ue004"}]
    browser.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.run("return document.activeElement.getBoundingClientRect().top") >= 0
