"""Random numbers against the published SplitMix64 and plain statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from audiot.base import streams

MASK = (1 << 64) - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
KEYS = torch.tensor([0, 1, -1, 123456789, -(1 << 63), (1 << 63) - 1])


def mix(z):
    """SplitMix64's output function on Python integers."""
    z = (z ^ (z >> 30)) * FIRST & MASK
    z = (z ^ (z >> 27)) * SECOND & MASK
    return z ^ (z >> 31)


def unmix(z):
    """The inverse of mix."""

    def unshift(z, shift):
        x = z
        for _ in range(64 // shift + 1):
            x = z ^ (x >> shift)
        return x

    z = unshift(z, 31) * pow(SECOND, -1, 1 << 64) & MASK
    z = unshift(z, 27) * pow(FIRST, -1, 1 << 64) & MASK
    return unshift(z, 30)


def signed(z):
    return z - (1 << 64) if z >> 63 else z


def test_bits_are_the_published_splitmix64_sequence():
    # The first five numbers of SplitMix64 seeded with 1234567, without their top bit.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    key = signed((unmix(1234567) - SECOND) & MASK)  # the key whose first stream has this seed
    assert streams.bits(torch.tensor([key]), 5)[0].tolist() == [number & (MASK >> 1) for number in published]


@pytest.mark.parametrize("stream", [0, 1, 5])
def test_bits_equal_big_integer_arithmetic(stream):
    drawn = streams.bits(KEYS, 20, stream)
    for key, row in zip(KEYS.tolist(), drawn.tolist(), strict=True):
        seed = mix((key + (stream + 1) * SECOND) & MASK)
        assert row == [mix((seed + n * GOLDEN) & MASK) & (MASK >> 1) for n in range(1, 21)]


@pytest.mark.parametrize("draw", [streams.bits, streams.uniform, streams.normal])
def test_numbers_depend_on_neither_the_batch_nor_how_many_are_drawn(draw):
    together = draw(KEYS, 30, 2)
    for number, key in enumerate(KEYS):
        assert draw(key[None], 30, 2).equal(together[number : number + 1])
    assert draw(KEYS.flip(0), 30, 2).equal(together.flip(0))
    assert draw(KEYS, 7, 2).equal(together[:, :7])


def test_uniform_numbers_are_flat_and_lie_in_the_half_open_interval():
    drawn = streams.uniform(torch.arange(50), 4000).double().numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.all(drawn * 2**24 == np.round(drawn * 2**24))
    counts = np.histogram(drawn, 100, (0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: 99 ± 14


def test_streams_keys_and_successive_numbers_are_uncorrelated():
    count = 100_000
    first, neighbour = streams.uniform(torch.tensor([5, 6]), count).double().numpy()
    other_stream = streams.uniform(torch.tensor([5]), count, stream=1).double().numpy()[0]
    pairs = [(first, neighbour), (first, other_stream), (first[:-1], first[1:]), (first[:-2], first[2:])]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.015  # 1 / √count is 0.003
    across_keys = streams.uniform(torch.arange(count), 1).double().numpy()[:, 0]  # one number from each of many keys
    assert across_keys.mean() == pytest.approx(0.5, abs=0.005)
    assert abs(np.corrcoef(across_keys[:-1], across_keys[1:])[0, 1]) < 0.015


def test_normal_numbers_have_the_moments_of_a_standard_normal():
    drawn = streams.normal(torch.arange(20), 10_000, 4).double().numpy().ravel()
    assert np.isfinite(drawn).all()
    for power, moment, tolerance in [(1, 0, 0.01), (2, 1, 0.02), (3, 0, 0.05), (4, 3, 0.15)]:
        assert (drawn**power).mean() == pytest.approx(moment, abs=tolerance)
    assert (np.abs(drawn) < 1).mean() == pytest.approx(0.6827, abs=0.005)
    assert (np.abs(drawn) > 3).mean() == pytest.approx(0.0027, abs=0.0006)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.01


def test_keys_never_change():
    # printf 'mask\x1f0\x1f3\x1fcut-7' | b2sum -l 64
    digest = bytes.fromhex("504c254c2e53f518")
    assert streams.key("mask", 0, 3, "cut-7") == int.from_bytes(digest, "little", signed=True)


def test_keys_tell_their_parts_apart():
    keys = {streams.key(*about) for about in [("a", "bc"), ("ab", "c"), ("abc",), ("a", 1), ("a", 11), ("a", 1, 1)]}
    assert len(keys) == 6
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_draw_the_same_numbers():
    assert streams.bits(KEYS.cuda(), 1000, 3).cpu().equal(streams.bits(KEYS, 1000, 3))
    assert streams.uniform(KEYS.cuda(), 1000, 3).cpu().equal(streams.uniform(KEYS, 1000, 3))
    torch.testing.assert_close(streams.normal(KEYS.cuda(), 1000, 3).cpu(), streams.normal(KEYS, 1000, 3), rtol=1e-5, atol=1e-5)
