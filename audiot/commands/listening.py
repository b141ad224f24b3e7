"""``audiot predict RUN --microphone``: predictions of utterances while they are spoken."""

from __future__ import annotations

import json
import math
import shutil
import sys
from argparse import Namespace

import numpy as np
import torch

from audiot.data.audio import SILENCE_DBFS
from audiot.data.microphone import Block, Microphone
from audiot.data.utterances import Utterance, Utterances
from audiot.downstream.answers import best, in_words, shortened
from audiot.downstream.classifier import Classifier
from audiot.downstream.objectives import Row
from audiot.downstream.verification import Verification

AGAIN_S = 0.3  # of new sound, after which an utterance that goes on is classified again
METER, QUIETEST_DB = 20, -60  # characters of the meter, and the level at its left end


def listen(classifier: Classifier, microphone: Microphone, options: Namespace) -> None:
    """Print a prediction for each utterance, and a summary at the end.

    On a terminal, a line on standard error shows the level and what is predicted so far. It ends after ``options.seconds``, or
    with Ctrl-C, which is raised again like an error of the microphone.

    Args:
        classifier: The fine-tuned model.
        microphone: What gives the sound.
        options: Arguments of ``audiot predict``.
    """
    listener = Listener(classifier, microphone.sample_rate, options)
    left = math.inf if options.seconds is None else round(options.seconds * microphone.sample_rate)
    with microphone:
        print(f"audiot: listening to {microphone.name}; Ctrl-C ends", file=sys.stderr)
        try:
            for block in microphone:
                count = int(min(left, len(block.samples)))
                listener.hear(block._replace(samples=block.samples[:count]))
                left -= count
                if left <= 0:
                    break
        finally:
            listener.end()


class Listener:
    """Tells what a classifier says of a stream.

    Args:
        classifier: The fine-tuned model.
        sample_rate: Sample rate of the stream in Hz.
        options: Arguments of ``audiot predict``.

    Raises:
        ValueError: the longest utterance is too long for the model, or a task that compares speakers got no files.
    """

    def __init__(self, classifier: Classifier, sample_rate: int, options: Namespace) -> None:
        self.classifier = classifier
        self.options = options
        self.utterances = Utterances(sample_rate, options.window, options.silence_dbfs)
        self.said = self.refused = self.gaps = 0
        self.again = 0  # the sample from which a prediction so far is due
        self.partial = ""
        noise = 0.1 * np.random.default_rng(0).standard_normal(round(options.window * sample_rate))
        reason = self._row(noise.astype(np.float32)).get("error")  # the first prediction takes longest, too
        if reason is not None:
            raise ValueError(f"the model can't use utterances of --window {options.window:g} s: {reason}")
        self.voices: list[Row] = []
        if isinstance(classifier.objective, Verification):
            if not options.files and not options.json:
                raise ValueError(
                    f"{options.run} compares speakers: name a file of each voice that is known, audiot predict RUN FILE … "
                    "--microphone, or --json for embeddings"
                )
            self.voices = classifier.predict(options.files, silence_dbfs=min(options.silence_dbfs, SILENCE_DBFS))
        elif options.files:
            raise ValueError(f"{options.run} takes files or --microphone, found both")

    def hear(self, block: Block) -> None:
        """Go on with a block."""
        self.gaps += block.lost
        for utterance in self.utterances.add(block.samples, block.lost):
            self._tell(utterance)
        if sys.stderr.isatty():
            self._show_level()

    def end(self) -> None:
        """Tell the last utterance, and the summary."""
        for utterance in self.utterances.end():
            self._tell(utterance)
        self._clear()
        parts = [
            f"heard {self.utterances.heard / self.utterances.sample_rate:.1f} s",
            f"{self.said} utterance{'s' * (self.said != 1)}",
        ]
        if self.refused:
            parts.append(f"{self.refused} can't be used")
        if self.gaps:
            times = f"{self.gaps} time{'s' * (self.gaps != 1)}"
            parts.append(f"sound was lost {times}: the model is slower than speech, or the machine is busy")
        print(f"audiot: {', '.join(parts)}", file=sys.stderr)

    def _row(self, samples: np.ndarray) -> Row:
        item = (samples, self.utterances.sample_rate)
        (row,) = self.classifier.predict([item], keep_going=True, silence_dbfs=-math.inf)
        return row

    def _tell(self, utterance: Utterance) -> None:
        """Print the prediction of a whole utterance."""
        row = self._row(utterance.samples)
        edges = utterance.start, utterance.start + len(utterance.samples)
        start, end = (edge / self.utterances.sample_rate for edge in edges)
        self.partial = ""
        self._clear()
        self.said += 1
        name = f"{start:9.3f} {end:9.3f}"
        if "error" in row:
            self.refused += 1
            print(f"{name}  can't be used: {row['error']}", file=sys.stderr)
            return
        for segment in row.get("segments", ()):
            segment |= {"start": round(start + segment["start"], 4), "end": round(start + segment["end"], 4)}
        if self.voices:
            alike = torch.tensor([voice["embedding"] for voice in self.voices]) @ torch.tensor(row["embedding"])
            row["scores"] = {voice["file"]: score for voice, score in zip(self.voices, alike.tolist(), strict=True)}
        if self.options.json:
            answer = shortened(row, self.options.top)
            del answer["file"]
            gap = {"lost": True} if utterance.lost else {}
            print(json.dumps({"start": round(start, 4), "end": round(end, 4), **gap, **answer}, ensure_ascii=False), flush=True)
        else:
            words = f"{name}  sound was lost" if utterance.lost else name
            print(in_words({**row, "file": words}, self.options.top, 0), flush=True)

    def _show_level(self) -> None:
        """Rewrite the terminal's line: seconds, level, and what is predicted so far."""
        now = self.utterances.so_far()
        if now is None:
            self.partial, self.again = "", 0
        elif now.start + len(now.samples) >= self.again:
            self.again = now.start + len(now.samples) + round(AGAIN_S * self.utterances.sample_rate)
            self.partial = so_far(self._row(now.samples), self.options.top)
        level = self.utterances.level_db
        bars = round(METER * min(1.0, max(0.0, 1 - level / QUIETEST_DB)))
        seconds = self.utterances.heard / self.utterances.sample_rate
        shown = f"{level:4.0f}" if math.isfinite(level) else "   –"
        head = f"{seconds:7.1f} s {shown} dBFS [{'#' * bars}{' ' * (METER - bars)}] "
        room = max(0, shutil.get_terminal_size().columns - len(head) - 1)
        gone = len(self.partial) - room + 1  # its end is the newest
        tail = self.partial if gone <= 1 else f"…{self.partial[gone:]}"
        print(f"\r\033[K{head}{tail[:room]}", end="", file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def so_far(row: Row, top: int) -> str:
    """What is predicted of an utterance that goes on, in a line: the text or the labels so far, or the best label."""
    if "segments" in row:
        return " ".join(segment["label"] for segment in row["segments"])
    if "text" in row:
        return str(row["text"])
    if "scores" in row:
        return "  ".join(f"{choice['label']} {choice['score']:.2f}" for choice in best(row["scores"], top))
    return f"{row['label']} {row['score']:.2f}" if "label" in row else ""
