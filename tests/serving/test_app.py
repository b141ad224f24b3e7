"""The API of `audiot serve`: what it answers, and what it refuses."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
from untrained import CLASSES, write_runs

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from audiot.commands import predict as command
from audiot.commands.arguments import parse
from audiot.data.audio import AudioFile
from audiot.downstream.classifier import Classifier, load_classifier
from audiot.serving.answering import Answering, Limits
from audiot.serving.app import serving_app

HERE = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    return write_runs(tiny, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A file whose sound changes, in stereo and at another rate than the models'."""
    times = np.arange(round(1.5 * 22050)) / 22050
    tones = [0.3 * np.sin(2 * np.pi * 300 * times**2), np.random.default_rng(0).uniform(-0.1, 0.1, len(times))]
    path = tmp_path_factory.mktemp("audio") / "a recording.flac"
    soundfile.write(path, np.stack(tones, 1), 22050)
    return path


@pytest.fixture(scope="module")
def answering(runs):
    """A function of a task and limits that makes what answers, once each."""
    made = {}

    def make(task="keyword", **limits):
        key = task, *limits.items()
        if key not in made:
            made[key] = Answering(load_classifier(runs / task), Limits(**limits), -70.0)
        return made[key]

    yield make
    for each in made.values():
        each.close()


class Client(TestClient):
    """A client of the server, with what the server printed in ``lines``."""

    def __init__(self, answering, hosts=()):
        self.lines = []
        super().__init__(serving_app(answering, "words", hosts, self.lines.append), HERE, raise_server_exceptions=False)

    def upload(self, content, name="a.wav", query="", **options):
        return self.post(f"/predict{query}", files={"file": (name, content)}, **options)


@pytest.fixture
def client(answering):
    return lambda task="keyword", **limits: Client(answering(task, **limits))


def refused(response, status, said):
    """Check that an answer is one line for people, without anything of the server's inside."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    line = response.json()["error"]
    assert said in line
    assert not {"\n", "Traceback", "/tmp", "audiot/", "site-packages"} & {*line.splitlines()[1:], *line.split("'")}
    assert "/tmp" not in line


def wav(samples, rate=16000, **options):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=options.pop("format", "WAV"), **options)
    return stream.getvalue()


SOUND = wav(np.random.default_rng(0).uniform(-0.3, 0.3, 16000))


# Answers


@pytest.mark.parametrize("task", ["keyword", "intent", "phone", "asr", "verification"])
def test_an_answer_is_what_predict_prints(runs, recording, client, capsys, task):
    command.main(parse("predict", [str(runs / task), str(recording), "--json", "--top", "2", "--device", "cpu"]))
    expected = json.loads(capsys.readouterr().out)
    response = client(task).upload(recording.read_bytes(), recording.name, "?top=2")
    assert response.status_code == 200
    found = response.json()
    assert found.pop("seconds") == 1.5
    assert found.pop("file") == "a recording.flac"
    del expected["file"]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value) or name == "embedding"
    if task == "verification":
        assert found["embedding"] == pytest.approx(expected["embedding"], abs=1e-5)


def test_the_picture_has_axes_in_seconds_and_hz_and_the_labels_that_fit(recording, client):
    for task in ("keyword", "phone"):
        found = client(task).upload(recording.read_bytes(), query="?spectrogram=600").json()
        svg = ElementTree.fromstring(found["spectrogram"])
        words = ["".join(each.itertext()) for each in svg.iter("text")]
        assert {"seconds", "Hz", "512", "4096"} <= {*words}
        times = [float(word) for word in words if word.replace(".", "").isdecimal() and float(word) < 2]
        assert min(times) == 0
        assert 1 < max(times) <= 1.5
        assert svg.find("desc").text.startswith("Log mel spectrogram of 1.50 seconds, 0 to 8,000 Hz.")
        assert len([*svg.iter("image")]) == 1
        assert not [*svg.iter("script")]
        assert float(svg.get("viewBox").split()[2]) == pytest.approx(600 * 72 / 96)  # points
        assert bool({*words} & {*CLASSES}) == (task == "phone")
    assert "spectrogram" not in client().upload(recording.read_bytes()).json()


def test_the_health_and_the_page_say_what_is_served(client):
    health = client("phone", max_s=7.0).get("/health").json()
    assert (health["status"], health["model"], health["gives"], health["classes"]) == ("ok", "words", "segments", 4)
    assert (health["sample_rate"], health["max_mb"], health["max_s"]) == (16000, 20, 7)
    page = client("phone", max_s=7.0).get("/")
    assert "At most 20 MB and 7 seconds" in page.text
    for name, kind in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert name in page.text
        assert client().get(f"/{name}").headers["content-type"].startswith(kind)
    for text in (page.text, client().get("/page.css").text, client().get("/page.js").text):
        assert "//" not in text.replace("// ", "").replace("(() =>", ""), "nothing is fetched from elsewhere"


def test_names_are_text_wherever_they_are_shown(answering):
    nasty = '<script>alert(1)</script>&"'
    client = TestClient(serving_app(answering(), nasty, (), print), HERE)
    assert "<script>alert" not in client.get("/").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in client.get("/").text
    found = Client(answering()).upload(SOUND, "..\\../x/\N{ESC}[31m" + "é" * 300 + ".wav").json()["file"]
    assert found == ("·[31m" + "é" * 300)[:200]


def test_every_answer_has_headers_that_keep_the_page_to_itself(client):
    elsewhere = client().get("/", headers={"host": "x.com"})
    for response in (client().get("/"), client().upload(b""), client().get("/nothing"), elsewhere):
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in response.headers if name.startswith("access-control")]
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client().get(path).status_code == 404


# What is no audio


def flac(seconds, rate=8000, is_open=False):
    """A silent FLAC, a few kilobytes for minutes; ``is_open``: its header does not tell its length."""
    content = bytearray(wav(np.zeros(round(seconds * rate), np.int16), rate, format="FLAC"))
    if is_open:
        content[21] &= 0xF0
        content[22:26] = bytes(4)
    return bytes(content)


def archive():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        zipped.writestr("a.wav", SOUND)
    return stream.getvalue()


NOT_AUDIO = {
    "zip": (archive, "unreadable"),
    "text": (lambda: b"import os; os.system('true')\n" * 1000, "unreadable"),
    "page": (lambda: b"<html><script>1</script></html>", "unreadable"),
    "empty": (lambda: b"", "empty: 0 bytes"),
    "pickle": (lambda: b"\x80\x04\x95" + bytes(100), "unreadable"),
    "cut": (lambda: SOUND[: len(SOUND) // 2], "truncated"),
    "silent": (lambda: wav(np.zeros(16000)), "silent: all zeros"),
    "short": (lambda: wav(np.full(100, 0.1)), "too short: 0.006 s"),
    "infinite": (lambda: wav(np.array([0.1, np.inf] * 8000), subtype="FLOAT"), "non-finite samples"),
    "matlab": (lambda: wav(np.full(16000, 0.1), format="MAT5"), "unreadable: MAT5 is not taken here, but WAV, FLAC"),
    "fast": (lambda: wav(np.full(300000, 0.1), 300_000), "absurd sample rate: 300000 Hz"),
}


@pytest.mark.parametrize("kind", NOT_AUDIO)
def test_what_is_no_audio_gets_its_reason(client, kind):
    make, reason = NOT_AUDIO[kind]
    asked = client()
    refused(asked.upload(make(), "a.wav"), 422, reason)
    assert asked.lines[0].startswith(f"422  {reason}")


def test_what_is_too_long_by_its_header_is_not_decoded(client, monkeypatch):
    bombs = {"flac": flac(3600), "wav": wav(np.full(61 * 16000, 0.1)), "ogg": wav(np.zeros(70 * 8000), 8000, format="OGG")}
    assert len(bombs["flac"]) < 200_000
    monkeypatch.setattr(AudioFile, "blocks", lambda *arguments: pytest.fail("decoded"))
    asked = client()
    refused(asked.upload(bombs["flac"]), 422, "too long: 3,600.0 s, at most 60 s are taken here")
    refused(asked.upload(bombs["wav"]), 422, "too long: 61.0 s")
    refused(asked.upload(bombs["ogg"]), 422, "too long: 70.0 s")


def test_decoding_ends_where_a_file_without_a_length_gets_too_long(client, monkeypatch):
    decoded = []
    blocks = AudioFile.blocks

    def counted(file, *arguments):
        for block in blocks(file, *arguments):
            decoded.append(len(block))
            yield block

    monkeypatch.setattr(AudioFile, "blocks", counted)
    asked = client()
    refused(asked.upload(flac(3600, is_open=True)), 422, "too long: at most 60 s are taken here")
    assert sum(decoded) < 2 * 480_000  # of 28,800,000
    refused(asked.upload(flac(2, is_open=True)), 422, "silent")


# What is no request


FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'


def part(content):
    return {"type": "http.request", "body": content, "more_body": True}


def streamed(app, messages):
    """Status and answer of an upload without a length that comes in messages; what is no message is waited for without end."""
    sent = []

    async def receive():
        return next(messages, None) or await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers, "root_path": ""}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_an_upload_that_stands_still_or_breaks_off_keeps_no_place(answering):
    own = answering(queue=1, timeout_s=0.4)
    app = Client(own).app
    assert streamed(app, iter([part(FORM)])) == (504, {"error": "no answer within 0.4 s: send a shorter file, or try again"})
    assert streamed(app, iter([part(FORM), {"type": "http.disconnect"}])) == (400, {"error": "the upload broke off"})
    assert own.take_place()
    own.leave_place()


def test_what_is_too_large_is_refused_before_it_is_read(client):
    asked, read = client(max_bytes=100_000), []

    def body():
        yield part(FORM)
        while True:
            read.append(1)
            yield part(bytes(1000))

    status, answer = streamed(asked.app, body())
    assert (status, answer["error"]) == (413, "the file is larger than the 0.1 MB that are taken here")
    assert 100 <= len(read) < 120
    refused(asked.upload(bytes(150_000)), 413, "larger than the 0.1 MB")
    refused(asked.upload(bytes(100_001)), 413, "larger than the 0.1 MB")  # the form around it makes the difference
    assert asked.upload(SOUND).status_code == 200


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        ({"content": SOUND, "headers": {"content-type": "audio/wav"}}, 415, "send the file as a form: curl -F file=@"),
        ({"data": {"file": "a.wav"}}, 415, "send the file as a form"),
        ({"files": {"other": ("a.wav", SOUND)}}, 422, "no file in its field 'file'"),
        ({"files": {"file": (None, b"text")}}, 422, "no file in its field 'file'"),
        ({"files": [("file", ("a.wav", SOUND)), ("file", ("b.wav", SOUND))]}, 400, "Too many files"),
        ({"content": b"nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "Invalid multipart"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "Missing boundary"),
        ({"files": {"file": ("a.wav", SOUND)}, "params": {"top": "0"}}, 422, "top: "),
        ({"files": {"file": ("a.wav", SOUND)}, "params": {"spectrogram": "99999"}}, 422, "spectrogram: "),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(client, request_, status, said):
    refused(client().post("/predict", **request_), status, said)
    assert client().get("/predict").status_code == 405


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000", "192.168.7.9", "my.lan:80"])
def test_the_servers_own_names_are_taken(answering, host):
    assert Client(answering(), ["my.lan"]).get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "[::1", "my.lan"])
def test_other_names_are_refused_as_those_of_a_rebound_page(client, host):
    refused(client().get("/health", headers={"host": host}), 421, "this server is not called")
    refused(client().upload(SOUND, headers={"host": host}), 421, "--allow-host NAME")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": HERE, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "https://127.0.0.1:8000"}, 200),  # TLS ends in front of the server
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_can_ask_nothing(client, headers, status):
    asked = client()
    assert asked.upload(SOUND, headers=headers).status_code == status
    assert asked.lines[0:1] == asked.lines[: status == 200]
    preflight = asked.options("/predict", headers={"access-control-request-method": "POST", **headers})
    assert preflight.status_code in (403, 405)
    assert not [name for name in preflight.headers if name.startswith("access-control")]


# Load


class Gate:
    """Holds the model until it is opened."""

    def __init__(self, monkeypatch):
        self.open, self.count = threading.Event(), 0
        predict = Classifier.predict

        def held(classifier, *arguments, **options):
            self.count += 1
            assert self.open.wait(30)
            return predict(classifier, *arguments, **options)

        monkeypatch.setattr(Classifier, "predict", held)


def at_once(asked, count, found):
    threads = [threading.Thread(target=lambda: found.append(asked.upload(SOUND))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_a_full_queue_says_so_and_is_free_again_later(answering, monkeypatch):
    own = answering(queue=2)
    gate, asked, found, taken = Gate(monkeypatch), Client(own), [], threading.Semaphore(0)
    take = own.take_place

    def noted():
        is_free = take()
        if is_free:
            taken.release()
        return is_free

    with monkeypatch.context() as patch:  # a place taken here would be one too few for a request that is on its way
        patch.setattr(own, "take_place", noted)
        threads = at_once(asked, 2, found)
        assert all(taken.acquire(timeout=30) for _ in threads)
    full = asked.upload(SOUND)
    refused(full, 503, "2 requests are at work or wait already")
    assert full.headers["retry-after"]
    gate.open.set()
    for thread in threads:
        thread.join()
    assert [each.status_code for each in found] == [200, 200]
    assert asked.upload(SOUND).status_code == 200


def test_what_takes_too_long_is_told_and_what_waited_too_long_is_never_begun(answering, monkeypatch):
    own = answering(queue=2, timeout_s=1.0)
    gate, asked, found = Gate(monkeypatch), Client(own), []
    for thread in at_once(asked, 2, found):
        thread.join()
    for each in found:
        refused(each, 504, "no answer within 1 s")
    assert gate.count == 1
    assert own.take_place()  # of the one that waited
    assert not own.take_place()  # the other is still at work
    own.leave_place()
    gate.open.set()
    while not own.take_place():
        pass
    own.leave_place()
    assert asked.upload(SOUND).status_code == 200


def test_a_step_that_ends_too_late_ends_the_work(client, monkeypatch):
    asked = client(timeout_s=0.6)
    monkeypatch.setattr("audiot.serving.answering.time", SimpleNamespace(monotonic=lambda: 1e12))
    refused(asked.upload(SOUND), 504, "no answer within 0.6 s")


def test_uploads_are_gone_when_they_are_answered(answering):
    own = answering()
    asked = Client(own)
    for content in (SOUND, b"text", bytes(3_000_000)):
        asked.upload(content)
    assert [*Path(own.new_path()).parent.iterdir()] == []


def test_a_server_that_fails_keeps_the_reason_to_itself(answering, monkeypatch, capsys):
    own = answering()
    monkeypatch.setattr(own, "answer", lambda question: 1 / 0)
    refused(Client(own).upload(SOUND), 500, "the server failed; what it printed says why")
    assert Client(own).get("/health").status_code == 200
    monkeypatch.undo()

    def full(upload, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("audiot.serving.app._copy", full)
    refused(Client(own).upload(SOUND), 507, "the server can't keep the file: No space left on device")
    assert sum(own.take_place() for _ in range(20)) == 8  # no place was lost
    for _ in range(8):
        own.leave_place()
