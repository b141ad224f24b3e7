"""A small set of units with hidden states, the same everywhere, for measures of other tools."""

import numpy as np
import torch

from audiot.measures.abx import Unit

FRAMES = 75  # of each file, at 50 Hz
PHONES = "abcd"


def fixed_set():
    """Units of nine files of three speakers, and the hidden states (75, 6) of each file.

    Times are multiples of 10 ms, so that many bounds lie on the middle of a frame.
    """
    draw = np.random.RandomState(7)  # the stream of this generator never changes
    places = draw.normal(size=(len(PHONES), 6))
    units, states = [], {}
    for number in range(9):
        name, speaker = f"file{number}", f"speaker{number % 3}"
        centres = (np.arange(FRAMES) + 0.5) / 50
        frames = 0.9 * draw.normal(size=(FRAMES, 6)) + 0.4 * (number % 3)
        phones = draw.randint(len(PHONES), size=20)
        times = np.round(np.cumsum(np.r_[0.02, draw.randint(3, 9, size=20) / 100]), 2)
        for place in range(1, 19):
            frames[(centres >= times[place]) & (centres < times[place + 1])] += places[phones[place]]
            before, phone, after = (PHONES[phones[place + step]] for step in (-1, 0, 1))
            units.append(Unit(name, times[place], times[place + 1], phone, before, after, speaker))
        states[name] = torch.from_numpy(frames).float()
    return units, states


def item_file(units):
    """Text of an item file."""
    rows = [
        f"{unit.utterance} {unit.onset:.2f} {unit.offset:.2f} {unit.phone} {unit.before} {unit.after} {unit.speaker}"
        for unit in units
    ]
    return "\n".join(["#file onset offset #phone prev-phone next-phone speaker", *rows]) + "\n"
