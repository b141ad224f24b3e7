"""The report of a study in a browser."""

from __future__ import annotations

import time

import browser as chromium
import pytest
from example_findings import example

from audiot.study.report import write_report

pytestmark = chromium.needed
ENTER, TAB = "\ue007", "\ue004"
TABLE = "const table = document.querySelector('#results table');"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


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
    assert browser.asked() == [report.as_uri()]
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
    browser.press(ENTER)
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


def test_light_and_dark_differ_and_both_are_readable(browser, report):
    colours = {}
    for scheme in ("light", "dark"):
        browser.show(report, scheme=scheme)
        colours[scheme] = browser.run(
            "return [document.body, document.querySelector('svg text'), document.querySelector('.verdict')].map(each => "
            "{ const style = getComputedStyle(each); return [style.backgroundColor, style.color, style.fill].join(); })"
        )
        assert browser.contrast("main *:not(svg *), svg text, nav a") >= 4.5
    assert all(one != other for one, other in zip(colours["light"], colours["dark"], strict=True))


def test_the_skip_link_is_the_first_stop_of_the_keyboard(browser, report):
    browser.show(report)
    browser.press(TAB)
    assert browser.run("return document.activeElement.className") == "skip"
    assert browser.run("return document.activeElement.getBoundingClientRect().top") >= 0
