"""eSpeak NG through ctypes, and a program that speaks the demo corpus: ``python -m audiot.data.corpora.espeak NUM_JOBS``.

eSpeak NG is licensed GPL-3.0-or-later. It comes with the package ``espeakng-loader`` (the extra ``audiot[demo]``) and is
loaded only here, in separate processes. They are needed anyway: eSpeak's samples depend on everything that its process has
spoken before, so each speaker gets a fresh process. The corpus then does not depend on the number of workers.
The processes are forks of one that has imported only this module, neither torch nor lhotse.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import wave
import zlib
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from audiot.data.corpora.demo_phones import SILENCE, phone_spans
from audiot.data.corpora.demo_texts import sentences

SAMPLE_RATE = 16000  # Hz, rate of the corpus; eSpeak itself uses 22,050 Hz
MIN_DURATION_S, MAX_DURATION_S = 1.5, 4.0

# Names and values from espeak-ng/speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_PHONEME_EVENTS, _INITIALIZE_PHONEME_IPA, _INITIALIZE_DONT_EXIT = 0x0001, 0x0002, 0x8000
_CHARS_UTF8 = 1
_POS_CHARACTER = 1
_EVENT_LIST_TERMINATED, _EVENT_PHONEME = 0, 7
_RATE, _PITCH, _RANGE = 1, 3, 4


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_ubyte * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Espeak:
    """The speech synthesiser with one voice. The library has global state, so a process can have one instance only.

    Leaving its context removes its temporary folder, which the end of a forked process does not.

    Args:
        accent: eSpeak's name of an English voice, such as ``en-us``.
        variant: Name of a voice variant, such as ``f3``.
        pitch: Pitch from 0 to 100; 50 is the variant's own.
        pitch_range: Pitch range from 0 to 100; 50 is the variant's own.
        rate: Speaking rate in words per minute.

    Raises:
        ValueError: there is no such accent or variant.
        RuntimeError: the library cannot read its data.
    """

    def __init__(self, accent: str, variant: str, pitch: int, pitch_range: int, rate: int) -> None:
        import espeakng_loader

        data = Path(espeakng_loader.get_data_path())
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = (
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        )
        # The library accepts paths up to 160 bytes, so it gets a short one. It reads some files only when it speaks.
        self._link = tempfile.TemporaryDirectory(prefix="espeak")
        os.symlink(data, Path(self._link.name, "espeak-ng-data"))
        options = _INITIALIZE_PHONEME_EVENTS | _INITIALIZE_PHONEME_IPA | _INITIALIZE_DONT_EXIT
        self.sample_rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, os.fsencode(self._link.name), options)
        if self.sample_rate <= 0:
            raise RuntimeError(f"eSpeak NG can't read its data in {data}: reinstall with pip install 'audiot[demo]'")
        # The library silently ignores an unknown variant.
        if not (data / "voices" / "!v" / variant).is_file():
            raise ValueError(f"eSpeak NG has no voice variant {variant!r} in {data}")
        if self._library.espeak_SetVoiceByName(f"{accent}+{variant}".encode()):
            raise ValueError(f"eSpeak NG has no voice {accent!r} in {data}")
        # By default, it seeds its random numbers (pitch flutter, breath) with the time of day.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._samples: list[np.ndarray] = []
        self._events: list[tuple[str, int]] = []
        self._callback = _Callback(self._collect)  # keeps it alive, which the library does not
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Espeak:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.cleanup()

    def speak(self, text: str) -> tuple[np.ndarray, list[tuple[str, int]]]:
        """Samples (N,) in int16, and phones as (IPA name with stress marks, start sample). A pause has the name ""."""
        self._samples, self._events = [], []
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, len(encoded) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        if status or not self._samples:
            raise RuntimeError(f"eSpeak NG could not speak {text!r} (status {status})")
        return np.concatenate(self._samples), self._events

    def _collect(self, samples: Any, num_samples: int, events: Any) -> int:
        if samples and num_samples:
            self._samples.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        i = 0
        while events[i].type != _EVENT_LIST_TERMINATED:
            if events[i].type == _EVENT_PHONEME:
                name = bytes(events[i].id.string).partition(b"\0")[0].decode()
                self._events.append((name, events[i].sample))
            i += 1
        return 0


def speak_speaker(job: dict[str, Any]) -> None:
    """Write the audio of one speaker, and last the list of utterances, which marks it as complete.

    Args:
        job: A dict with ``audio``, the folder of the recordings; ``utterances``, the path of the list; ``speaker``, the name;
            ``voice``, the arguments of :class:`Espeak`; ``seed``; ``parts``; and ``utterance_s``, the seconds to which sentences
            are joined, or 0 for one sentence each. Each part has a name (``split``), the split of its texts (``sentences``),
            and the ``seconds`` of speech or the ``count`` of utterances.
    """
    audio = Path(job["audio"])
    audio.mkdir(parents=True, exist_ok=True)
    with Espeak(**job["voice"]) as espeak:
        utterances = list(_utterances(job, espeak, audio))
    write_atomically(Path(job["utterances"]), json.dumps(utterances).encode())


def _utterances(job: dict[str, Any], espeak: Espeak, audio: Path) -> Iterator[dict[str, Any]]:
    """The utterances of a speaker, whose audio is written."""
    shortest = job["utterance_s"] * SAMPLE_RATE
    for part in job["parts"]:
        name = f"{job['speaker']}-{part['split']}"
        texts = sentences(part["sentences"], f"{job['seed']}/{name}")
        count, num_samples = 0, 0
        while count < part.get("count", count + 1) and num_samples < part.get("seconds", np.inf) * SAMPLE_RATE:
            text, keyword = next(texts)
            spoken = [_sentence(espeak, text)]
            while sum(len(speech) for speech, _ in spoken) < shortest:
                more, _ = next(texts)
                text = f"{text}. {more}"
                spoken.append(_sentence(espeak, more))
            utterance_id = f"{name}-{count:04d}"
            rng = np.random.default_rng([job["seed"], zlib.crc32(utterance_id.encode())])
            samples, phones = _recorded(spoken, rng)
            if not MIN_DURATION_S <= len(samples) / SAMPLE_RATE <= MAX_DURATION_S + job["utterance_s"]:
                continue  # too long or too short at this speaker's rate
            _write_wav(audio / f"{utterance_id}.wav", samples)
            utterance = {"id": utterance_id, "split": part["split"], "text": text, "keyword": keyword}
            yield {**utterance, "num_samples": len(samples), "phones": phones}
            count, num_samples = count + 1, num_samples + len(samples)


def _sentence(espeak: Espeak, text: str) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """Float32 speech at `SAMPLE_RATE`, and each phone with its start sample."""
    spoken, events = espeak.speak(text)
    spans = phone_spans(events, spoken, espeak.sample_rate)
    speech = soxr.resample(spoken.astype(np.float32) / 32768, espeak.sample_rate, SAMPLE_RATE)
    return speech, [(span.phone, round(span.start * SAMPLE_RATE / espeak.sample_rate)) for span in spans]


def _recorded(
    spoken: list[tuple[np.ndarray, list[tuple[str, int]]]], rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """16-bit samples of sentences with pauses between them, and each phone with its start sample.

    SIL is the first and last phone, and lies between sentences.
    """
    # Silence at both ends, in addition to the up to 12 ms that eSpeak adds.
    before, after = rng.integers(SAMPLE_RATE * 20 // 1000, SAMPLE_RATE * 88 // 1000, size=2).tolist()
    pauses = rng.integers(SAMPLE_RATE * 150 // 1000, SAMPLE_RATE * 400 // 1000, size=len(spoken) - 1).tolist()
    pieces: list[np.ndarray] = []
    phones = [(SILENCE, 0)]
    place = before
    for (speech, starts), pause in zip(spoken, [*pauses, 0], strict=True):
        phones += [(phone, place + start) for phone, start in (starts[1:] if starts[0][0] == SILENCE else starts)]
        if phones[-1][0] != SILENCE:
            phones.append((SILENCE, place + len(speech)))
        pieces += [speech, np.zeros(pause, np.float32)]
        place += len(speech) + pause
    speech = np.concatenate(pieces)

    level_db, noise_db = rng.uniform(-32, -20), rng.uniform(-40, -25)  # speech relative to full scale, noise relative to speech
    level = 10 ** (level_db / 20)
    speech *= min(level / np.sqrt(np.mean(speech**2)), 0.9 / np.abs(speech).max())
    waveform = level * 10 ** (noise_db / 20) * rng.standard_normal(before + len(speech) + after, dtype=np.float32)
    waveform[before : before + len(speech)] += speech
    return (waveform * 32768).round().clip(-32768, 32767).astype("<i2"), phones


def _write_wav(path: Path, samples: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())
    os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> None:
    """Make the folder, write to a temporary name in it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def speak_all(jobs: list[dict[str, Any]], num_jobs: int) -> None:
    """Run some jobs at a time, each in a separate process. Print the speaker of each finished job."""
    context = multiprocessing.get_context("fork")
    running: dict[int, tuple[Any, str]] = {}
    left = iter(jobs)
    while True:
        for job in islice(left, num_jobs - len(running)):
            process = context.Process(target=_speak, args=(job,))
            process.start()
            running[process.sentinel] = process, job["speaker"]
        if not running:
            return
        for sentinel in wait(list(running)):
            assert isinstance(sentinel, int)
            process, speaker = running.pop(sentinel)
            process.join()
            if process.exitcode:  # 1: it has reported why
                sys.exit(1 if process.exitcode > 0 else f"speaker {speaker} failed: ended by signal {-process.exitcode}")
            print(speaker, flush=True)


def _speak(job: dict[str, Any]) -> None:
    try:
        speak_speaker(job)
    except Exception as error:  # any error is reported
        sys.exit(f"speaker {job['speaker']} failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    speak_all(json.load(sys.stdin), int(sys.argv[1]))
