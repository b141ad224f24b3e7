"""``audiot serve`` as a user starts and ends it."""

from __future__ import annotations

import builtins
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
import soundfile
from untrained import CLASSES, write_runs

from audiot.commands import serve
from audiot.commands.arguments import parse

pytest.importorskip("fastapi")


FORM = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%s\r\n--x--\r\n'


@pytest.fixture
def run(tiny, tmp_path):
    return write_runs(tiny, tmp_path / "runs") / "keyword"


def told(run, lines):
    """The address of the server, whose first lines these are."""
    assert lines[0] == f"model   {run} on cpu, one file at a time"
    assert lines[1] == "limits  20 MB, 60 s of audio, 30 s a request, 8 requests at a time"
    found = re.fullmatch(
        r"next:   open (http://127\.0\.0\.1:\d+) in a browser, or curl -F file=@recording\.wav \1/predict", lines[2]
    )
    assert found, lines[2]
    assert lines[3] == "Ctrl-C ends"
    return found[1]


def label(address):
    """The label of a sound."""
    stream = io.BytesIO()
    soundfile.write(stream, np.random.default_rng(0).uniform(-0.3, 0.3, 16000), 16000, format="WAV")
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/predict", FORM % stream.getvalue(), form)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["label"]


def ended(lines):
    """Check the lines after one request."""
    assert re.fullmatch(r"\d\d:\d\d:\d\d  200  1\.00 s of audio in \d+\.\d\d s", lines[0])
    assert lines[1:] == ["ended"]


def test_it_says_where_it_is_answers_and_ends_with_ctrl_c(run, monkeypatch):
    lines, ready, found = [], threading.Event(), []

    def ask():
        if ready.wait(60):
            try:
                found.append(label(told(run, lines)))
            finally:
                signal.raise_signal(signal.SIGINT)  # the server is there, and catches it

    def say(line, **options):
        lines.append(line)
        if line == "Ctrl-C ends":
            ready.set()

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(serve, "print", say, raising=False)
    client = threading.Thread(target=ask)
    client.start()
    before = signal.getsignal(signal.SIGTERM)
    serve.main(parse("serve", [str(run), "--port", "0", "--device", "cpu"]))
    client.join()
    assert signal.getsignal(signal.SIGTERM) == before
    assert found[0] in CLASSES
    ended(lines[4:])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_process_of_its_own_with_exit_code_0(run, number):
    command = [sys.executable, "-m", "audiot", "serve", str(run), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [process.stdout.readline().rstrip("\n") for _ in range(4)]
        assert label(told(run, lines)) in CLASSES
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in err
    ended(out.splitlines())


def test_a_place_that_is_taken_or_unknown_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"can't serve at 127\.0\.0\.1, port {port}: Address already in use; choose another"
        ):
            serve.main(parse("serve", [str(tmp_path), "--port", str(port)]))
    with pytest.raises(ValueError, match=r"can't serve at 203\.0\.113\.1, port 0: .*choose another --port"):
        serve.main(parse("serve", [str(tmp_path), "--host", "203.0.113.1", "--port", "0"]))
    with pytest.raises(ValueError, match=r"can't serve at nowhere\.invalid, port 8000: "):
        serve.main(parse("serve", [str(tmp_path), "--host", "nowhere.invalid"]))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no fine-tuned model at"):
        serve.main(parse("serve", [str(tmp_path), "--port", "0"]))


def test_a_missing_extra_is_named(monkeypatch):
    load = builtins.__import__

    def refuse(name, *arguments):
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return load(name, *arguments)

    monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'audiot\[serve\]'$"):
        serve.main(parse("serve", ["RUN"]))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--max-mb", "0"], "--max-mb must be from 0.001 to 2000, found 0"),
        (["--max-s", "nan"], "--max-s must be from 0.1 to 3600, found nan"),
        (["--timeout-s", "-1"], "--timeout-s must be from 0.1 to 3600, found -1"),
        (["--queue", "0"], "--queue must be at least 1, found 0"),
        (["--port", "70000"], "--port must be from 0 to 65535, found 70000"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(given, reason):
    with pytest.raises(ValueError, match=reason):
        parse("serve", ["RUN", *given])
