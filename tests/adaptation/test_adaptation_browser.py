"""The report of an adaptation in a browser."""

from __future__ import annotations

import time

import browser as chromium
import numpy as np
import pytest
import soundfile
from test_adaptation_report import outcome_of

from audiot.adaptation.report import write_report

pytestmark = chromium.needed
TAB = "\ue004"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    outcome = outcome_of(folder, names=("<img src=x onerror=document.title=1>", "b" * 120))
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", 0.1 * np.sin(np.arange(8000)), 8000)
    return write_report(outcome, folder, 20, 0.5)[0]


def test_the_page_opens_without_errors_and_without_the_network(browser, report):
    for kind in ("browser", "performance"):
        browser.log(kind)
    browser.show(report)
    time.sleep(0.5)
    assert browser.log("browser") == []
    assert [address for address in browser.asked() if not address.startswith("data:")] == [report.as_uri()]
    assert browser.run("return [document.querySelectorAll('script').length, document.querySelectorAll('img').length]") == [1, 0]


def test_the_sounds_can_be_played(browser, report):
    browser.show(report)
    browser.run("window.sound = document.querySelector('audio'); sound.load();")
    until = time.monotonic() + 10
    while (length := browser.run("return sound.duration")) is None and time.monotonic() < until:
        time.sleep(0.1)
    assert length == pytest.approx(0.5, abs=0.01)
    assert browser.run("return sound.error") is None


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_never_wider_than_the_window(browser, report, width):
    browser.show(report, width=width)
    browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.run("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(browser, report, scheme):
    browser.show(report, scheme=scheme)
    assert browser.contrast("main *:not(svg *), svg text, nav a") >= 4.5


def test_players_and_tables_are_stops_of_the_keyboard(browser, report):
    browser.show(report)
    stops, wanted = set(), {"skip", "scroll", "BUTTON", "AUDIO"}
    for _ in range(60):
        browser.press(TAB)
        stops.add(browser.run("const at = document.activeElement; return at.className || at.tagName;"))
        if wanted <= stops:
            return
    pytest.fail(f"never stopped at {wanted - stops}")
