"""Front ends at any length: how many tokens, and what they depend on."""

from __future__ import annotations

import math
from functools import cache

import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from audiot.base.groups import options, read_option
from audiot.features import KaldiFbank, LogMel, Spectrogram

NAMES = options("features")
LENGTHS = st.lists(st.integers(1600, 8000), min_size=1, max_size=3)

RAW = [  # logarithms of the power spectrum
    LogMel(n_mels=20, cmvn="none"),
    KaldiFbank(num_mel_bins=20, cmvn="none", delta_order=0),
    Spectrogram(cmvn="none"),
]


@cache
def front_end(name, **given):
    """A front end with the parameters of its file and these."""
    return instantiate(read_option("features", name) | given).eval()


def noise(lengths, spare=0):
    """Waveforms of noise with noise in the padding."""
    return 0.1 * torch.randn(len(lengths), max(lengths) + spare, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@given(name=st.sampled_from(NAMES), stack=st.integers(1, 5), num_samples=st.integers(0, 9000))
def test_the_number_of_tokens_is_that_of_windows_that_fit_into_the_samples(name, stack, num_samples):
    features = front_end(name) if name == "waveform" else front_end(name, stack=stack, cmvn="none")
    window, hop = features.win_length, features.hop_length
    before, behind = features.reflected
    frames = 0 if num_samples <= before else max(0, num_samples + before + behind - window + hop) // hop
    expected = frames // features.stack
    assert features.num_tokens(num_samples) == expected
    assert features.num_tokens(torch.tensor([num_samples])).tolist() == [expected]
    if expected:
        tokens, lengths = features(torch.zeros(1, num_samples))
        assert tokens.shape[:2] == (1, expected)
        assert lengths.tolist() == [expected]
        assert features.num_samples(expected) <= num_samples < features.num_samples(expected + 1)


@given(name=st.sampled_from(NAMES), lengths=LENGTHS, spare=st.integers(0, 700))
def test_tokens_of_an_utterance_depend_on_neither_companions_nor_padding(name, lengths, spare):
    features, waveforms = front_end(name), noise(lengths, spare)
    tokens, counts = features(waveforms, torch.tensor(lengths))
    for number, length in enumerate(lengths):
        alone, (count,) = features(waveforms[number : number + 1, :length])
        assert counts[number] == count == alone.shape[1]
        torch.testing.assert_close(tokens[number, :count], alone[0], atol=1e-8, rtol=0)
        assert not tokens[number, count:].any()


@given(gain_db=st.floats(-40, 40), num_samples=st.integers(1600, 6000))
def test_a_gain_shifts_logarithms_of_energy_and_normalisation_removes_it(gain_db, num_samples):
    waveforms, gain = noise([num_samples]), 10 ** (gain_db / 20)
    for features in RAW:
        shift = features(gain * waveforms)[0] - features(waveforms)[0]
        torch.testing.assert_close(shift, torch.full_like(shift, 2 * math.log(gain)), atol=1e-3, rtol=0)
    normalised = LogMel(n_mels=20)
    torch.testing.assert_close(normalised(gain * waveforms)[0], normalised(waveforms)[0], atol=1e-2, rtol=0)
