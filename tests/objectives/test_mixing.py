"""Mixing against a loop over utterances, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from audiot.base import streams
from audiot.objectives.mixing import Mixing, read_noise

LENGTHS = [4000, 2500, 3100, 1200]
KEYS = torch.arange(4) * 7919 + 13


def utterances():
    generator = np.random.default_rng(0)
    waveforms = torch.zeros(4, 4000, dtype=torch.float64)
    for row, length in zip(waveforms, LENGTHS, strict=True):
        row[:length] = torch.from_numpy(generator.normal(0, 0.01 + generator.random(), length))
    return waveforms


@pytest.fixture
def noise(tmp_path):
    for name, seed in (("b.wav", 1), ("a.wav", 2)):
        soundfile.write(tmp_path / name, np.random.default_rng(seed).normal(0, 0.1, 4800), 16000, subtype="FLOAT")
    return tmp_path


def by_hand(mixing, waveforms, noisy_share, pool):
    """Each utterance by itself, from the same draws."""
    draws = streams.uniform(KEYS, 7, 7).double().numpy()
    result = waveforms.numpy().copy()
    for row, (length, draw) in enumerate(zip(LENGTHS, draws, strict=True)):
        if draw[0] >= mixing.probability:
            continue
        piece = max(1, int(draw[2] * mixing.longest * length))
        begin = int(draw[3] * (length - piece + 1))
        own = waveforms[row, :length].numpy()
        if draw[1] < noisy_share:
            source = pool[(int(draw[5] * len(pool)) + np.arange(piece)) % len(pool)]
            power, (low, high) = np.mean(source**2), mixing.noise_ratio_db
        else:
            other = (row + 1 + min(int(draw[4] * 3), 2)) % 4
            whole = waveforms[other, : LENGTHS[other]].numpy()
            source = whole[(int(draw[5] * len(whole)) + np.arange(piece)) % len(whole)]
            power, (low, high) = np.mean(whole**2), mixing.ratio_db
        ratio = 10 ** ((low + draw[6] * (high - low)) / 10)
        result[row, begin : begin + piece] += source * np.sqrt(np.mean(own**2) / power / ratio)
    return result


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mixing_is_that_of_a_loop_over_utterances(noise, share):
    mixing = Mixing(0.9, noise=str(noise), noise_probability=share)
    waveforms = utterances()
    mixed = mixing(waveforms, torch.tensor(LENGTHS), KEYS)
    expected = by_hand(mixing, waveforms, share, read_noise(str(noise), 16000).astype(float))
    assert not np.allclose(expected, waveforms)
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-6)


def test_the_padding_stays_as_it_is_and_the_main_speaker_keeps_the_greater_part():
    waveforms = utterances()
    mixed = Mixing(1.0)(waveforms, torch.tensor(LENGTHS), KEYS)
    for before, after, length in zip(waveforms, mixed, LENGTHS, strict=True):
        assert after[length:].equal(before[length:])
        assert 0 < (after != before).sum() <= length / 2


def test_a_single_utterance_has_nobody_to_be_mixed_with():
    waveforms = utterances()[:1]
    assert Mixing(1.0)(waveforms, torch.tensor(LENGTHS[:1]), KEYS[:1]).equal(waveforms)


def test_noise_is_read_in_the_order_of_names_and_a_bad_file_is_passed_by(noise):
    (noise / "aa.wav").write_bytes(b"RIFF")
    samples = read_noise(str(noise), 16000)
    expected = [soundfile.read(noise / name, dtype="float32")[0] for name in ("a.wav", "b.wav")]
    np.testing.assert_allclose(samples, np.concatenate(expected), atol=1e-6)


def test_bad_settings_are_named(tmp_path, noise):
    for options, words in (
        ({"probability": 1.5}, r"objective.mix.probability must be in \[0, 1\], found 1.5"),
        ({"probability": 0.5, "longest": 0.0}, r"objective.mix.longest must be in \(0, 1\], found 0.0"),
        ({"probability": 0.5, "ratio_db": [5.0, -5.0]}, "objective.mix.ratio_db must be a low and a high number of dB"),
    ):
        with pytest.raises(ValueError, match=words):
            Mixing(**options)
    for name in ("a.wav", "b.wav"):
        (noise / name).write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"objective.mix.noise=.* has no audio of 0.1 s or more that can be read: .*a.wav"):
        Mixing(0.5, noise=str(noise)).open()


def test_training_hears_the_mixture_and_targets_are_of_the_clean_utterance(pretraining):
    model = pretraining.module(mix={"probability": 1.0})
    waveforms, lengths = utterances().float(), torch.tensor(LENGTHS)
    batch = {"waveforms": waveforms, "lengths": lengths, "keys": KEYS}
    tokens, *_, source = model.train().inputs(batch)
    clean = model.model.features(waveforms, lengths)[0]
    assert source.equal(clean)
    assert not tokens.equal(clean)
    tokens, *_, source = model.eval().inputs(batch)
    assert source is None
    assert tokens.equal(clean)
