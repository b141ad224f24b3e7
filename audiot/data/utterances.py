"""Cutting a stream of sound into utterances, at its pauses."""

from __future__ import annotations

import math
from collections import deque
from itertools import chain
from typing import NamedTuple

import numpy as np

FRAME_S = 0.02
PAUSE_S = 0.5  # of this length, a pause ends an utterance
AROUND_S = 0.2  # kept before and behind what is loud: words begin and end softly
LEAST_S = 0.1  # loud in all; less is a click
LEVEL_S = 0.2  # over which the level is averaged before its lowest value is taken
ROOM_S = 5.0  # in which the room is heard alone at least once
ABOVE_ROOM_DB = 10.0
LOUD_DBFS = -50.0


class Utterance(NamedTuple):
    """A piece of a stream.

    Args:
        start: Its first sample, counted from the stream's beginning.
        samples: Samples (n,).
        lost: Whether samples of the stream are missing in it.
    """

    start: int
    samples: np.ndarray
    lost: bool


class Utterances:
    """Cuts a stream into utterances, whatever blocks it comes in.

    A frame of 20 ms is loud if its level is above ``loud_dbfs``, and 10 dB above the room: the lowest level, averaged over 0.2 s,
    of the last 5 s (as in Martin 2001, "Noise power spectral density estimation based on optimal smoothing and minimum
    statistics"). An utterance begins 0.2 s before the first loud frame. It ends 0.2 s behind the last one, when a pause of 0.5 s
    has followed, or when it is ``longest_s`` long. With less than 0.1 s of loud frames it is a click, and left out.

    Args:
        sample_rate: Sample rate in Hz.
        longest_s: Longest utterance, in seconds.
        loud_dbfs: RMS that speech is above in any room (a full-scale square wave has 0 dBFS).

    Attributes:
        heard: Samples so far.
        level_db: Level of the last frame, in dBFS.
    """

    def __init__(self, sample_rate: int, longest_s: float = 10.0, loud_dbfs: float = LOUD_DBFS) -> None:
        self.sample_rate = sample_rate
        self.loud_dbfs = loud_dbfs
        self.heard = 0
        self.level_db = -math.inf
        self._size = round(FRAME_S * sample_rate)
        self._longest = max(1, round(longest_s / FRAME_S))
        self._rest = np.zeros(0, np.float32)  # less than a frame
        self._lost = False  # before the next frame
        self._frames: list[np.ndarray] = []  # of the utterance, or the last ones before the next
        self._gaps: list[bool] = []  # whether samples are missing before each of them
        self._first = 0  # number of the first of them
        self._loud = 0  # loud frames of the utterance; 0 between utterances
        self._quiet = 0  # frames since the last loud one
        self._powers: deque[float] = deque(maxlen=round(LEVEL_S / FRAME_S))
        room = round(ROOM_S / FRAME_S)
        self._room: deque[float] = deque([10 ** ((loud_dbfs - ABOVE_ROOM_DB) / 10)] * room, maxlen=room)

    def add(self, samples: np.ndarray, lost: bool = False) -> list[Utterance]:
        """Go on with the next samples (n,).

        Args:
            samples: Samples in [-1, 1], of any number.
            lost: Whether samples before these are missing.

        Returns:
            Utterances that have ended.
        """
        self._lost |= lost
        self.heard += len(samples)
        self._rest = np.concatenate([self._rest, samples])
        whole = len(self._rest) // self._size * self._size
        frames, self._rest = self._rest[:whole].reshape(-1, self._size), self._rest[whole:]
        return list(chain.from_iterable(self._add_frame(frame) for frame in frames))

    def end(self) -> list[Utterance]:
        """The utterance that the end of the stream ends, if there is one."""
        return self._cut() if self._loud else []

    def so_far(self) -> Utterance | None:
        """The utterance that goes on, if it is no click."""
        return self._utterance(len(self._frames)) if self._loud * FRAME_S >= LEAST_S else None

    def _add_frame(self, frame: np.ndarray) -> list[Utterance]:
        power = float(np.mean(np.square(frame, dtype=np.float64)))
        power = power if math.isfinite(power) else 0.0
        self._powers.append(power)
        self._room.append(sum(self._powers) / len(self._powers))
        self.level_db = decibels(power)
        is_loud = self.level_db > max(self.loud_dbfs, decibels(min(self._room)) + ABOVE_ROOM_DB)
        self._frames.append(frame)
        self._gaps.append(self._lost)
        self._lost = False
        self._quiet = 0 if is_loud else self._quiet + 1
        if is_loud or self._loud:
            self._loud += is_loud
            ended = self._quiet * FRAME_S >= PAUSE_S or len(self._frames) >= self._longest
            return self._cut() if ended else []
        self._keep(round(AROUND_S / FRAME_S))
        return []

    def _cut(self) -> list[Utterance]:
        """End the utterance. What is behind it may belong to the next one."""
        found = self.so_far()
        behind = max(0, self._quiet - round(AROUND_S / FRAME_S))
        self._loud = 0
        self._keep(min(behind, round(AROUND_S / FRAME_S)))
        return [] if found is None else [found._replace(samples=found.samples[: len(found.samples) - behind * self._size])]

    def _utterance(self, count: int) -> Utterance:
        return Utterance(self._first * self._size, np.concatenate(self._frames[:count]), any(self._gaps[:count]))

    def _keep(self, count: int) -> None:
        gone = max(0, len(self._frames) - count)
        self._first += gone
        del self._frames[:gone], self._gaps[:gone]


def decibels(power: float) -> float:
    """The level of a mean square in dBFS; minus infinity of zero."""
    return 10 * math.log10(power) if power > 0 else -math.inf
