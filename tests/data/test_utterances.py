"""Cutting a stream at its pauses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from audiot.data.utterances import Utterances

RATE = 8000


def sound(seconds, *bursts, room_dbfs=-65.0, seed=0):
    """Noise of a room with louder bursts ``(start, end, dBFS)`` in it."""
    noise = np.random.default_rng(seed)
    samples = 10 ** (room_dbfs / 20) * noise.standard_normal(round(seconds * RATE))
    for start, end, level in bursts:
        place = slice(round(start * RATE), round(end * RATE))
        samples[place] += 10 ** (level / 20) * noise.standard_normal(place.stop - place.start)
    return samples.astype(np.float32)


def cut(samples, size=None, **options):
    cutter = Utterances(RATE, **options)
    found = []
    for start in range(0, len(samples), size or len(samples)):
        found += cutter.add(samples[start : start + (size or len(samples))])
    assert cutter.heard == len(samples)
    return [*found, *cutter.end()]


def seconds(utterances):
    return [(each.start / RATE, (each.start + len(each.samples)) / RATE) for each in utterances]


def test_utterances_lie_around_what_is_loud_and_end_at_pauses():
    samples = sound(8, (1, 1.6, -20), (1.9, 2.4, -30), (4, 5, -25))  # the gap of 0.3 s is no pause
    found = cut(samples)
    assert seconds(found) == [pytest.approx((0.8, 2.6), abs=0.021), pytest.approx((3.8, 5.2), abs=0.021)]
    for utterance in found:
        assert (utterance.samples == samples[utterance.start :][: len(utterance.samples)]).all()
        assert not utterance.lost


def test_an_utterance_soon_after_a_pause_has_its_beginning_too():
    found = cut(sound(4, (1, 2, -20), (2.62, 3, -20)))
    assert seconds(found) == [pytest.approx((0.8, 2.2), abs=0.021), pytest.approx((2.42, 3.2), abs=0.021)]


@pytest.mark.parametrize("size", [1, 7, 159, 160, 161, 1024, 8000, 30011])
def test_blocks_of_any_size_give_the_same_utterances(size):
    samples = sound(6, (0.05, 0.5, -20), (2, 3, -30), (3.2, 4.9, -20), (5.7, 6, -20))
    whole, pieces = cut(samples), cut(samples, size)
    assert len(whole) == 3
    assert seconds(pieces) == seconds(whole)
    assert all((one.samples == other.samples).all() for one, other in zip(whole, pieces, strict=True))


def test_silence_clicks_and_the_noise_of_a_room_are_no_utterances():
    assert cut(np.zeros(5 * RATE, np.float32)) == []
    assert cut(sound(5, room_dbfs=-55)) == []
    assert cut(sound(5, (2, 2.06, -10))) == []
    assert cut(np.full(RATE, np.nan, np.float32)) == []


def test_a_loud_room_is_known_after_five_seconds():
    found = seconds(cut(sound(20, (12, 13, -15), room_dbfs=-35)))
    assert found[0][0] == 0  # it was taken for speech at first
    assert found[0][1] < 6
    assert found[1:] == [pytest.approx((11.8, 13.2), abs=0.041)]


def test_what_is_longer_than_the_longest_is_cut_without_a_loss():
    samples = sound(5, (1, 4.5, -20))
    found = cut(samples, longest_s=1.0)
    assert seconds(found)[0] == pytest.approx((0.8, 1.8), abs=0.021)
    assert [round(end - start, 2) for start, end in seconds(found)[:-1]] == [1.0] * (len(found) - 1)
    assert all(one[1] == other[0] for one, other in zip(seconds(found)[:-1], seconds(found)[1:], strict=True))
    assert seconds(found)[-1][1] == pytest.approx(4.7, abs=0.021)


def test_the_end_of_the_stream_ends_an_utterance():
    assert seconds(cut(sound(3, (2, 3, -20)))) == [pytest.approx((1.8, 3.0), abs=0.021)]
    assert seconds(cut(sound(3, (2, 2.7, -20)))) == [pytest.approx((1.8, 2.9), abs=0.021)]


def test_speech_is_louder_than_it_is_told_to_be():
    samples = sound(4, (1, 2, -45), room_dbfs=-90)
    assert len(cut(samples)) == 1
    assert cut(samples, loud_dbfs=-40.0) == []
    assert len(cut(sound(7, (6, 7, -85), room_dbfs=-110), loud_dbfs=-math.inf)) == 2  # the room, then what is above it


def test_what_goes_on_is_known_and_an_utterance_with_a_gap_says_so():
    cutter = Utterances(RATE)
    samples = sound(8, (1, 2, -20), (4, 5, -20), (6.5, 7, -20))
    cutter.add(samples[:RATE])
    assert cutter.so_far() is None
    assert cutter.level_db == pytest.approx(-65, abs=2)
    cutter.add(samples[RATE : int(1.5 * RATE)])
    assert seconds([cutter.so_far()]) == [pytest.approx((0.8, 1.5), abs=0.021)]
    assert cutter.level_db == pytest.approx(-20, abs=2)
    found = cutter.add(samples[int(1.5 * RATE) : 3 * RATE], lost=True)
    found += cutter.add(samples[3 * RATE : int(4.5 * RATE)]) + cutter.add(samples[int(4.5 * RATE) :], lost=True) + cutter.end()
    assert [each.lost for each in found] == [True, True, False]
