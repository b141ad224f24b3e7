"""What a server does with an uploaded file: one model, one file at a time, within limits."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from audiot.data.audio import AudioFile, BadAudioError, resample_checked
from audiot.downstream.answers import shortened
from audiot.downstream.classifier import Classifier
from audiot.downstream.objectives import Row
from audiot.serving.picture import Painter

KINDS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF")  # libsndfile's names of what is taken
TAKEN = "WAV, FLAC, MP3, Ogg, Opus, AIFF, AU, CAF"
HIGHEST_RATE = 192_000  # Hz


class Limits(NamedTuple):
    """Limits of a request, and of all together.

    Args:
        max_bytes: Size of a file.
        max_s: Length of its audio in seconds.
        timeout_s: Seconds from the beginning of a request to its answer.
        queue: Requests that are received, wait or are worked on at a time.
    """

    max_bytes: int = 20 * 10**6
    max_s: float = 60.0
    timeout_s: float = 30.0
    queue: int = 8


class Late(Exception):  # noqa: N818 - it is no error of the server
    """The time of a request is over."""


class Question(NamedTuple):
    """An uploaded file and what is asked of it.

    Args:
        path: Where it lies. It is deleted when its work has ended.
        name: What its sender calls it.
        top: Number of labels.
        width: Width in CSS pixels of a picture; None: no picture.
        until: Time at which the answer is late, as `time.monotonic` counts.
    """

    path: Path
    name: str
    top: int
    width: int | None
    until: float


class Answering:
    """Answers questions one after the other, in a thread of its own. A `Limits.queue` of places bounds what waits.

    Args:
        classifier: The fine-tuned model.
        limits: The limits.
        silence_dbfs: RMS below which audio is silent and refused; ``-inf`` accepts all.

    Attributes:
        kind: What the model gives: ``label``, ``slots``, ``segments``, ``text`` or ``embedding``.
    """

    def __init__(self, classifier: Classifier, limits: Limits, silence_dbfs: float) -> None:
        self.classifier = classifier
        self.limits = limits
        self.silence_dbfs = silence_dbfs
        self.painter = Painter(classifier.sample_rate)
        self._folder = tempfile.TemporaryDirectory(prefix="audiot-serve-")
        self._names = count()
        self._free = threading.BoundedSemaphore(limits.queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audiot-serve")
        noise = 0.1 * torch.randn(classifier.sample_rate, generator=torch.Generator().manual_seed(0))
        (row,) = classifier.predict([(noise, classifier.sample_rate)])  # the first one takes longest, and its picture too
        self.painter.svg(noise, row.get("segments", ()), 720)
        self.kind = next(kind for kind in ("slots", "segments", "text", "embedding", "label") if kind in row)

    def take_place(self) -> bool:
        """Take a place of the queue, if one is free. `leave_place` or the end of a question's work gives it back."""
        return self._free.acquire(blocking=False)

    def leave_place(self) -> None:
        """Give a place back."""
        self._free.release()

    def new_path(self) -> Path:
        """A path for an upload, at which there is nothing yet."""
        return Path(self._folder.name, str(next(self._names)))

    def submit(self, question: Question) -> Future[Row]:
        """Queue a question for which a place was taken."""

        def finish(_: object) -> None:
            question.path.unlink(missing_ok=True)
            self.leave_place()

        future = self._thread.submit(self.answer, question)
        future.add_done_callback(finish)
        return future

    def close(self) -> None:
        """Drop what waits, let what is worked on end, and delete all uploads."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._folder.cleanup()

    def answer(self, question: Question) -> Row:
        """What ``audiot predict --json`` says of the file, its ``seconds``, and ``spectrogram`` if there is to be a picture.

        Raises:
            BadAudioError: the file can't be used, or its audio is too long.
            Late: it takes too long.
        """

        def check() -> None:
            if time.monotonic() > question.until:
                raise Late

        check()
        mono, sample_rate = read_bounded(question.path, self.limits.max_s, check)
        samples = resample_checked(mono, sample_rate, self.classifier.sample_rate, self.silence_dbfs)
        check()
        item = (samples, self.classifier.sample_rate)
        (row,) = self.classifier.predict([item], keep_going=True, silence_dbfs=self.silence_dbfs)
        if "error" in row:
            raise BadAudioError(row["error"])
        found = shortened(row, question.top) | {"file": question.name, "seconds": round(len(mono) / sample_rate, 4)}
        if question.width is not None:
            check()
            found["spectrogram"] = self.painter.svg(torch.from_numpy(samples), row.get("segments", ()), question.width)
        return found


def read_bounded(path: Path, max_s: float, check: Callable[[], None]) -> tuple[np.ndarray, int]:
    """Samples (N,) of an untrusted audio file, averaged over its channels, and its sample rate.

    What is too long by its header is refused before anything is decoded, and other files as soon as they get too long.

    Args:
        path: The file.
        max_s: Longest audio in seconds.
        check: A function that raises an error when it is time to stop. It is called between blocks.

    Raises:
        BadAudioError: it is no audio of a usual kind, is broken, or too long.
    """
    with AudioFile(path) as file:
        if file.format[0] not in KINDS:
            raise BadAudioError(f"unreadable: {file.format[0]} is not taken here, but {TAKEN}")
        if file.sample_rate > HIGHEST_RATE:
            raise BadAudioError(f"absurd sample rate: {file.sample_rate} Hz, at most {HIGHEST_RATE} are taken here")
        most = int(max_s * file.sample_rate)
        if file.declared is not None and file.declared > most:
            raise BadAudioError(f"too long: {file.declared / file.sample_rate:,.1f} s, at most {max_s:g} s are taken here")
        parts: list[np.ndarray] = []
        length = 0
        for block in file.blocks():
            check()
            length += len(block)
            if length > most:
                raise BadAudioError(f"too long: at most {max_s:g} s are taken here")
            with np.errstate(invalid="ignore"):  # not-a-number is refused later
                parts.append(block.mean(axis=1))
        return np.concatenate(parts), file.sample_rate
