"""A microphone through a stand-in for PortAudio, whose callback the tests call."""

from __future__ import annotations

import builtins
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from audiot.data import microphone
from audiot.data.microphone import Microphone


class PortAudioError(Exception):
    pass


DEVICES = [
    {"name": "Speakers", "max_input_channels": 0, "default_samplerate": 48000.0},
    {"name": "Built-in", "max_input_channels": 1, "default_samplerate": 44100.0},
    {"name": "USB array", "max_input_channels": 8, "default_samplerate": 16000.0},
]


class InputStream:
    """The last one that was opened is ``InputStream.last``."""

    fails_at = None

    def __init__(self, **given):
        if self.fails_at == "open":
            raise PortAudioError("Error opening InputStream: Invalid sample rate [PaErrorCode -9997]")
        self.given, self.state = given, "opened"
        InputStream.last = self

    def start(self):
        if self.fails_at == "start":
            raise PortAudioError("Device\nunavailable")
        self.state = "started"

    def close(self):
        self.state = "closed"

    def give(self, samples, overflow=False):
        buffer = np.asarray(samples, np.float32)
        self.given["callback"](buffer, len(buffer), None, SimpleNamespace(input_overflow=overflow))
        buffer[:] = 9  # PortAudio uses its memory again


@pytest.fixture
def portaudio(monkeypatch):
    """The stand-in, with `DEVICES`; the second one is the default."""

    def query_devices(device=None, kind=None):
        if kind is None:
            return library.devices
        if not library.devices:
            raise PortAudioError("Error querying device -1")
        if isinstance(device, str):
            device = next((place for place, each in enumerate(library.devices) if device in each["name"]), 99)
        if device == 99:
            raise ValueError("No input device matching 'nothing'")
        return library.devices[1 if device is None else device]

    library = SimpleNamespace(
        devices=list(DEVICES), query_devices=query_devices, PortAudioError=PortAudioError, InputStream=InputStream
    )
    monkeypatch.setitem(sys.modules, "sounddevice", library)
    monkeypatch.setattr(InputStream, "fails_at", None)
    return library


def test_blocks_are_mono_and_all_that_waits_comes_at_once(portaudio):
    with Microphone("USB") as opened:
        stream = InputStream.last
        assert (opened.name, opened.sample_rate, stream.state) == ("USB array", 16000, "started")
        assert (stream.given["channels"], stream.given["dtype"], stream.given["samplerate"]) == (2, "float32", 16000)
        stream.give([[0.5, 0.1], [0.25, 0.25]])
        stream.give([[-1.0, 0.0]])
        blocks = iter(opened)
        first = next(blocks)
        assert first.samples.tolist() == pytest.approx([0.3, 0.25, -0.5])
        assert not first.lost
        stream.give([[1, 1]], overflow=True)
        assert next(blocks).lost
    assert stream.state == "closed"


def test_the_default_one_and_one_by_its_number(portaudio):
    assert Microphone().name == "Built-in"
    assert InputStream.last.given["device"] is None
    assert Microphone("2").name == "USB array"
    assert InputStream.last.given["device"] == 2


def test_a_reader_that_is_too_slow_is_told_that_sound_was_lost(portaudio, monkeypatch):
    monkeypatch.setattr(microphone, "MOST_S", 0.1)  # two blocks
    with Microphone() as opened:
        for value in (1, 2, 3):
            InputStream.last.give([[value]])
        blocks = iter(opened)
        assert [*next(blocks).samples] == [1, 2]
        InputStream.last.give([[4]])
        after = next(blocks)
        assert ([*after.samples], after.lost) == ([4], True)
        InputStream.last.give([[5]])
        assert not next(blocks).lost


def test_a_microphone_that_is_unplugged_gives_what_it_heard_and_is_named(portaudio, monkeypatch):
    for ends in ("finish", "silence"):
        with Microphone() as opened:
            InputStream.last.give([[1.0]])
            if ends == "finish":
                InputStream.last.given["finished_callback"]()
            else:
                monkeypatch.setattr(microphone, "SILENT_S", 0.01)
            blocks = iter(opened)
            assert [*next(blocks).samples] == [1]
            with pytest.raises(ValueError, match="the microphone Built-in gives no sound any more: plug it in again"):
                next(blocks)


def test_what_is_missing_is_said_with_what_to_do(portaudio, monkeypatch):
    with pytest.raises(ValueError, match=r"--input nothing can't be used: No .*; inputs: 1 \(Built-in\), 2 \(USB array\)$"):
        Microphone("nothing")
    monkeypatch.setattr(InputStream, "fails_at", "open")
    with pytest.raises(ValueError, match="no microphone can be used: Error opening InputStream: Invalid sample rate"):
        Microphone()
    monkeypatch.setattr(InputStream, "fails_at", "start")
    with pytest.raises(ValueError, match="the microphone Built-in can't be started: Device unavailable"), Microphone():
        pass
    assert InputStream.last.state == "closed"
    portaudio.devices.clear()
    with pytest.raises(ValueError, match=r"Error querying device -1; this machine has no input$"):
        Microphone()


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ModuleNotFoundError("No module named 'sounddevice'"), ModuleNotFoundError, r"pip install 'audiot\[microphone\]'$"),
        (OSError("PortAudio library not found"), ValueError, r"PortAudio \(PortAudio library not found\): install it"),
    ],
)
def test_a_missing_library_is_named_with_its_installation(monkeypatch, error, kind, said):
    load = builtins.__import__

    def refuse(name, *arguments):
        if name == "sounddevice":
            raise error
        return load(name, *arguments)

    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(kind, match=said):
        Microphone()
