"""The picture of served audio."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from audiot.serving import picture
from audiot.serving.picture import Painter


def tone(rate, seconds=2.0):
    """1,000 Hz from 0.5 to 1 s, in noise."""
    times = np.arange(round(seconds * rate)) / rate
    noise = 0.001 * np.random.default_rng(0).standard_normal(len(times))
    samples = noise + np.where((times > 0.5) & (times < 1), np.sin(2 * np.pi * 1000 * times), 0)
    return torch.from_numpy(samples.astype(np.float32))


@pytest.mark.parametrize(("rate", "most"), [(16000, 3000), (16000, 30), (8000, 3000), (44100, 3000)])
def test_a_tone_is_drawn_at_its_time_and_frequency(monkeypatch, rate, most):
    shown = []
    draw = picture.draw_spectrogram
    monkeypatch.setattr(picture, "draw_spectrogram", lambda *given: shown.append(given) or draw(*given))
    monkeypatch.setattr(picture, "MOST_COLUMNS", most)
    Painter(rate).svg(tone(rate), (), 500)
    axis, frames, scale = shown[0]
    assert len(frames) <= most
    edges = scale.edges(len(frames) + 1)
    loud = np.flatnonzero(frames.max(1) > frames.max() - 3)
    assert [edges[loud[0]], edges[loud[-1] + 1]] == pytest.approx([0.5, 1.0], abs=max(0.03, scale.step_s))
    channel = frames[loud].mean(0).argmax()
    assert scale.hertz[channel] == pytest.approx(1000, rel=0.03)
    weight = frames[:, channel] - np.median(frames[:, channel])
    middle = (weight * (edges[1:] + edges[:-1]) / 2)[loud].sum() / weight[loud].sum()
    assert middle == pytest.approx(0.75, abs=0.01)
    assert axis.get_xlim() == (0, 2)


def test_names_of_segments_stand_where_they_lie_if_there_is_room():
    names = ["<one>", "b", "three"]
    edges = [0.0, 1.0, 1.02, 2.0]
    segments = [
        {"label": name, "start": start, "end": end, "score": 1.0}
        for name, start, end in zip(names, edges, edges[1:], strict=False)
    ]
    svg = ElementTree.fromstring(Painter(16000).svg(tone(16000), segments, 500))
    words = {"".join(each.itertext()): each for each in svg.iter("text")}
    assert {"<one>", "three"} <= words.keys()
    assert "b" not in words
    width = float(svg.get("viewBox").split()[2])
    assert width == pytest.approx(2 * picture.PX_PER_S * 72 / 96)  # more than was asked for
    places = [float(words[name].get("x")) for name in ("<one>", "three")]
    assert (places[1] - places[0]) / width == pytest.approx(0.5, abs=0.06)
