"""The page of `audiot serve` in a browser."""

from __future__ import annotations

import contextlib
import threading
import time

import browser as chromium
import numpy as np
import pytest
import soundfile
from untrained import CLASSES, write_runs

pytest.importorskip("uvicorn")
import uvicorn

from audiot.downstream.classifier import load_classifier
from audiot.serving.answering import Answering, Limits
from audiot.serving.app import serving_app

pytestmark = [chromium.needed, pytest.mark.slow]  # starting a browser and servers takes longest
TAB = "\ue004"
TASKS = ("keyword", "intent", "phone", "asr", "verification")


@contextlib.contextmanager
def served(run):
    """The address of a server of a run."""
    answering = Answering(load_classifier(run), Limits(max_bytes=500_000), -70.0)
    app = serving_app(answering, run.name, (), lambda line: None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        answering.close()


@pytest.fixture(scope="module")
def servers(tiny, tmp_path_factory):
    runs = write_runs(tiny, tmp_path_factory.mktemp("runs"))
    with contextlib.ExitStack() as stack:
        yield {task: stack.enter_context(served(runs / task)) for task in TASKS}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two sounds, and a text in their name."""
    folder = tmp_path_factory.mktemp("audio")
    noise = np.random.default_rng(0)
    for number, name in enumerate(("one.wav", "two <b>.wav")):
        envelope = np.interp(np.arange(24000), np.arange(0, 24001, 3000), noise.uniform(0.02, 0.3, 9))
        soundfile.write(folder / name, envelope * noise.standard_normal(24000) * (number + 1) / 4, 16000)
    (folder / "words.wav").write_text("no audio")
    (folder / "large.wav").write_bytes(bytes(600_000))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.opened(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def choose(browser, path):
    """Choose a file, and wait for what the page says of it."""
    (element,) = browser.ask("POST", "/element", {"using": "css selector", "value": "#file"}).values()
    browser.ask("POST", f"/element/{element}/value", {"text": str(path)})
    return waited(browser)


def waited(browser):
    for _ in range(300):
        texts = browser.run("return ['error', 'result', 'status'].map((id) => document.getElementById(id).textContent)")
        if texts[0] or not texts[2].startswith(("Listening", "Recording")):
            return texts
        time.sleep(0.1)
    pytest.fail(f"no answer: {texts}")


def table(browser):
    return browser.run(
        "return [...document.querySelectorAll('#details tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )


def test_a_file_gets_label_scores_and_spectrogram_from_this_server_alone(browser, servers, recordings, tmp_path):
    for kind in ("browser", "performance"):
        browser.log(kind)
    browser.show(servers["keyword"])
    error, result, status = choose(browser, recordings / "two <b>.wav")
    assert error == ""
    assert result.split()[0] in CLASSES
    assert status.startswith("two <b>.wav: ")  # said to who can't see it
    rows = table(browser)
    scores = [float(row[1]) for row in rows]
    assert sorted(row[0] for row in rows) == CLASSES
    assert rows[0][0] == result.split()[0]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=0.005)
    shares = browser.run(
        "return [...document.querySelectorAll('.bar i')].map(bar => bar.offsetWidth / bar.parentElement.offsetWidth)"
    )
    assert shares == pytest.approx(scores, abs=0.02)
    words = browser.run("return [...document.querySelectorAll('#picture svg text')].map(each => each.textContent)")
    assert {"seconds", "Hz"} <= {*words}
    image = browser.run(
        "const { width, height } = document.querySelector('#picture image').getBoundingClientRect(); return [width, height]"
    )
    assert min(image) > 100
    assert browser.log("browser") == []
    assert all(url.startswith((servers["keyword"], "data:", f"blob:{servers['keyword']}")) for url in browser.asked())


@pytest.mark.parametrize("task", [task for task in TASKS if task != "keyword"])
def test_every_kind_of_answer_is_shown(browser, servers, recordings, task):
    browser.show(servers[task])
    error, result, _ = choose(browser, recordings / "one.wav")
    assert error == ""
    if task == "intent":
        captions = browser.run("return [...document.querySelectorAll('caption')].map(each => each.textContent)")
        assert captions == ["what", "where"]
        assert result.split()[0] in ("lamp", "music")
    if task == "phone":
        assert [row[2] for row in table(browser)][:60] == result.removesuffix(" …").split()
        assert float(table(browser)[-1][1]) == pytest.approx(1.5, abs=0.001)
    if task == "asr":
        assert {*result.split(" score ")[0].split()} <= {*CLASSES}
    if task == "verification":
        assert "first voice" in result
        error, result, _ = choose(browser, recordings / "two <b>.wav")
        assert result.startswith("Most like one.wav, cosine ")
        assert table(browser)[0][0] == "one.wav"
        browser.show(servers[task])
        choose(browser, recordings / "one.wav")
        browser.run("document.getElementById('file').value = ''")
        assert choose(browser, recordings / "one.wav")[1].endswith("cosine 1.000")


def test_what_cannot_be_used_is_told_and_the_answer_before_it_goes(browser, servers, recordings):
    browser.show(servers["keyword"])
    choose(browser, recordings / "one.wav")
    error, _, status = choose(browser, recordings / "words.wav")
    assert error.startswith("words.wav: unreadable: ")
    assert status == ""
    assert browser.run("return document.getElementById('answer').hidden")
    assert choose(browser, recordings / "large.wav")[0] == "large.wav is larger than the 0.5 MB that are taken here."


def test_a_recording_is_made_with_the_keyboard(browser, servers):
    browser.show(servers["keyword"])
    browser.press(TAB, TAB)
    assert browser.run("return document.activeElement.id") == "record"
    browser.press(" ")
    for _ in range(100):
        if browser.run("return document.getElementById('record').textContent") == "Stop":
            break
        time.sleep(0.05)
    time.sleep(2)  # the browser's own beeps are recorded
    browser.press(" ")
    error, result, status = waited(browser)
    assert error == ""
    assert result.split()[0] in CLASSES
    assert status.startswith("recording ")
    seconds = float(browser.run("return document.getElementById('heading').textContent").split(", ")[1].split()[0])
    assert 1 < seconds < 10


def test_a_dropped_file_is_asked_about(browser, servers):
    browser.show(servers["keyword"])
    browser.run(
        """
        const carried = new DataTransfer();
        carried.items.add(new File(["no audio"], "dropped.txt"));
        const drop = (kind) => document.getElementById("drop")
          .dispatchEvent(new DragEvent(kind, { bubbles: true, cancelable: true, dataTransfer: carried }));
        return [drop("dragover"), drop("drop")];
        """
    )
    assert waited(browser)[0].startswith("dropped.txt: unreadable")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_can_be_read(browser, servers, recordings, scheme):
    for task in ("keyword", "phone"):
        browser.show(servers[task], 360, scheme)
        choose(browser, recordings / "one.wav")
        browser.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        assert browser.run("return [document.documentElement.scrollWidth <= innerWidth, innerWidth]") == [True, 360]
        assert browser.contrast("main h1, main h2, main p, main small, main label, main th, main td, main summary") >= 4.5
        axes = "#picture svg > g > g:first-of-type text, #limits"
        assert browser.contrast(axes) >= 4.5
    scrolls = browser.run(
        "const each = document.getElementById('picture'); return [each.scrollWidth > each.clientWidth, each.tabIndex]"
    )
    assert scrolls == [True, 0]  # it can be scrolled with the keyboard
    unnamed = browser.run(
        "return [...document.querySelectorAll('input, button, audio, svg, [role=region]')].filter(each => !(each.labels?.length "
        "|| each.textContent.trim() || each.getAttribute('aria-label'))).map(each => each.outerHTML)"
    )
    assert unnamed == []
