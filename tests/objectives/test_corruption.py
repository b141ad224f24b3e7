"""Corruption against slow loops and the published statistics."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from audiot.base import streams
from audiot.objectives.corruption import (
    Corruption,
    band,
    cover,
    frames_from_elsewhere,
    num_spans,
    span_starts,
)
from audiot.objectives.reconstruction import interpolate_masked

EVERYTHING = {
    "mask_proportion": 0.3,
    "span": 4,
    "zero_probability": 0.4,
    "replace_probability": 0.4,
    "band_width": 5,
    "noise_std": 0.2,
    "noise_probability": 0.7,
}


def keys(count, first=0):
    return torch.arange(first, first + count) * 7919 + 13


def spans(frames):
    """Begin and end of every run of True."""
    edges = np.flatnonzero(np.diff(np.asarray(frames, int), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def numbered(count, num_frames, num_channels=3):
    """Features that say where they are from: 1000 · (utterance + 1) + frame."""
    value = 1000.0 * torch.arange(1, count + 1)[:, None] + torch.arange(num_frames)
    return value[..., None].expand(-1, -1, num_channels).clone()


def test_15_percent_in_spans_of_7_mask_14_percent_of_1500_frames():
    masked = Corruption().mask(keys(2000), torch.full((2000,), 1500), 1500)
    assert 100 * masked.float().mean().item() == pytest.approx(14.0, abs=0.3)


def test_number_of_spans_is_the_share_of_the_length():
    lengths = [1, 6, 7, 8, 20, 75, 100, 1500]
    for proportion, span in [(0.15, 7), (0.15, 3), (0.8, 2), (1.0, 1)]:
        found = num_spans(torch.tensor(lengths), proportion, span).tolist()
        for length, count in zip(lengths, found, strict=True):
            assert count == min(max(1, round(length * proportion / span)), max(1, length - span + 1))


def test_masks_are_those_of_a_plain_sort():
    """The spans with the smallest random numbers, by a sort in NumPy; the digest is of the masks of version 0.1.0."""
    digest = hashlib.sha256()
    for proportion, span in [(0.15, 7), (0.15, 3), (0.5, 1), (0.33, 10), (1.0, 2)]:
        for num_frames in (1, 2, 5, 40, 128, 200, 256, 257, 400, 1536):
            lengths = torch.arange(num_frames, 0, -max(1, num_frames // 9))
            row_keys = keys(len(lengths))
            masked = Corruption(proportion, span).mask(row_keys, lengths, num_frames)
            scores, counts = streams.bits(row_keys, num_frames, 0), num_spans(lengths, proportion, span)
            for row, score, length, count in zip(masked.numpy(), scores, lengths.tolist(), counts.tolist(), strict=True):
                expected = np.zeros(num_frames, bool)
                for start in np.argsort(score[: max(0, length - span) + 1].numpy())[:count]:
                    expected[start : min(start + span, length)] = True
                assert (row == expected).all()
            digest.update(masked.numpy().tobytes())
    assert digest.hexdigest()[:16] == "fc3d6601a7d7bf2a"


def test_starts_are_drawn_without_replacement_and_evenly():
    starts = span_starts(keys(3000), torch.full((3000,), 50), 50, 0.3, 5)
    assert starts.sum(1).eq(3).all()  # 0.3 · 50 / 5
    counts = starts.sum(0).numpy()
    assert (counts[46:] == 0).all()  # a span of 5 fits 46 times
    assert ((counts[:46] - 3000 * 3 / 46) ** 2 / (3000 * 3 / 46)).sum() < 90  # 45 degrees of freedom: 45 ± 10


def test_spans_never_leave_the_valid_part():
    lengths = torch.arange(1, 61)
    for number in range(20):
        starts = span_starts(keys(60, 100 * number), lengths, 64, 0.5, 7)
        frames = cover(starts, lengths, 7)
        for row, begun, length in zip(frames.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            assert not any(row[length:])
            assert all(t <= max(0, length - 7) for t in range(64) if begun[t])
            assert any(row)
            assert all(end - begin >= min(7, length) for begin, end in spans(row))


def test_cover_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(40, 30, generator=generator) < 0.1
    lengths = torch.randint(1, 31, (40,), generator=generator)
    for span in (1, 2, 7, 40):
        expected = torch.zeros(40, 30, dtype=torch.bool)
        for number in range(40):
            for t in range(30):
                if starts[number, t]:
                    expected[number, t : min(t + span, int(lengths[number]))] = True
        assert cover(starts, lengths, span).equal(expected)


def test_80_percent_of_the_utterances_are_zeroed_10_replaced_10_unchanged():
    count = 4000
    features = numbered(count, 100)
    corrupted = Corruption()(features, torch.full((count,), 100), keys(count))
    assert corrupted.elements is None
    assert corrupted.features[~corrupted.frames].equal(features[~corrupted.frames])
    seen = {"zeroed": 0, "unchanged": 0, "replaced": 0}
    for before, after, masked in zip(features, corrupted.features, corrupted.frames, strict=True):
        if not after[masked].any():
            seen["zeroed"] += 1
        elif after.equal(before):
            seen["unchanged"] += 1
        else:
            seen["replaced"] += 1
            assert after[masked].all()  # the whole utterance is treated alike
    for policy, share in [("zeroed", 0.8), ("replaced", 0.1), ("unchanged", 0.1)]:
        assert seen[policy] / count == pytest.approx(share, abs=0.02)  # 3 standard deviations


def test_replaced_frames_are_runs_of_the_same_utterance():
    lengths = torch.tensor([60, 41, 9, 5, 3])
    for number in range(50):
        row_keys = keys(5, 100 * number)
        features = numbered(5, 60)
        starts = span_starts(row_keys, lengths, 60, 0.3, 6)
        source = frames_from_elsewhere(features, starts, row_keys, lengths, 6)[..., 0]
        frames = cover(starts, lengths, 6)
        for row in range(5):
            for t in range(60):
                if frames[row, t]:
                    utterance, frame = divmod(int(source[row, t]), 1000)
                    assert utterance == row + 1
                    assert frame < lengths[row]
                    if not starts[row, t]:
                        assert source[row, t] == source[row, t - 1] + 1


def test_replacement_comes_from_all_over_the_utterance():
    count = 3000
    starts = span_starts(keys(count), torch.full((count,), 40), 40, 0.1, 4)
    source = frames_from_elsewhere(numbered(count, 40), starts, keys(count), torch.full((count,), 40), 4)[..., 0]
    begins = source[starts].long() % 1000
    counts = torch.bincount(begins, minlength=40).numpy()
    assert (counts[37:] == 0).all()
    assert ((counts[:37] - len(begins) / 37) ** 2 / (len(begins) / 37)).sum() < 80  # 36 degrees of freedom


def test_band_is_0_to_16_channels_wide_anywhere():
    drawn = band(keys(8500), 80, 16)
    widths = drawn.sum(1)
    counts = torch.bincount(widths, minlength=17).numpy()
    assert len(counts) == 17
    assert ((counts - 500) ** 2 / 500).sum() < 45  # 16 degrees of freedom: 16 ± 6
    assert all(len(spans(row)) <= 1 for row in drawn)  # contiguous
    assert drawn.any(0).all()


def test_a_band_wider_than_the_frame_is_refused():
    corruption = Corruption(band_width=16)
    with pytest.raises(ValueError, match=r"objective.band_width must be at most the 13 channels of a frame, found 16: lower it"):
        corruption(torch.ones(1, 9, 26), torch.tensor([9]), keys(1), stack=2)


def test_band_is_zero_and_scored_in_every_valid_frame_and_masked_frames_are_scored_whole():
    lengths = torch.tensor([30, 22, 9])
    corruption = Corruption(band_width=6, zero_probability=1.0, replace_probability=0.0)
    features = torch.rand(3, 30, 20) + 1
    for number in range(8):
        row_keys = keys(3, 10 * number)
        corrupted = corruption(features, lengths, row_keys, stack=2)
        masked = corruption.mask(row_keys, lengths, 30)
        channels = band(row_keys, 10, 6)
        for row in range(3):
            for t in range(30):
                assert corrupted.frames[row, t] == (t < lengths[row])
                for c in range(20):  # two spectrogram frames of ten channels
                    altered = bool(masked[row, t] or channels[row, c % 10])
                    assert corrupted.elements[row, t, c] == (altered and t < lengths[row])
                    if t < lengths[row]:
                        assert corrupted.features[row, t, c] == (0 if altered else features[row, t, c])


def test_noise_has_its_deviation_and_its_share_of_utterances():
    count = 2000
    features = torch.zeros(count, 40, 10)
    corrupted = Corruption(noise_std=0.2, noise_probability=0.15)(features, torch.full((count,), 40), keys(count)).features
    noisy = corrupted.flatten(1).any(1)
    assert noisy.float().mean().item() == pytest.approx(0.15, abs=0.025)
    assert corrupted[noisy].std().item() == pytest.approx(0.2, rel=0.02)
    assert corrupted[noisy].mean().item() == pytest.approx(0, abs=0.005)


def test_validation_corruption_zeroes_spans_and_alters_nothing_else():
    features = torch.rand(50, 40, 6) + 1
    lengths = torch.arange(50).clamp(max=40).clamp(min=3)
    corruption = Corruption(**EVERYTHING)
    corrupted = corruption.zero_out(features, lengths, keys(50))
    assert corrupted.elements is None
    assert corrupted.frames.equal(corruption.mask(keys(50), lengths, 40))
    assert not corrupted.features[corrupted.frames].any()
    assert corrupted.features[~corrupted.frames].equal(features[~corrupted.frames])


def test_corruption_of_an_utterance_depends_on_neither_companions_nor_padding():
    lengths = torch.tensor([45, 31, 12, 3] * 8)
    features = torch.randn(32, 45, 20, generator=torch.Generator().manual_seed(0))
    for options in ({}, EVERYTHING):
        corruption = Corruption(**options)
        together = corruption(features, lengths, keys(32))
        for number, length in enumerate(lengths.tolist()):
            one = slice(number, number + 1)
            alone = corruption(features[one, :length], lengths[one], keys(32)[one])
            torch.testing.assert_close(alone.features[0], together.features[number, :length], rtol=0, atol=1e-6)
            assert alone.frames[0].equal(together.frames[number, :length])
            if options:
                assert alone.elements[0].equal(together.elements[number, :length])


@pytest.mark.parametrize(("proportion", "span"), [(0.15, 7), (0.15, 3), (0.5, 1), (0.33, 10), (1.0, 2)])
def test_max_masked_bounds_every_draw(proportion, span):
    corruption = Corruption(mask_proportion=proportion, span=span)
    reached = 0
    for num_frames in [*range(1, 80), 150, 400]:
        lengths = torch.arange(1, num_frames + 1)
        masked = corruption.mask(keys(num_frames), lengths, num_frames).sum(1)
        assert masked.max() <= corruption.max_masked(num_frames)
        reached += int(masked.max()) == corruption.max_masked(num_frames)
    assert reached  # no looser than needed
    assert corruption.max_masked(1500) <= math.ceil(1500 * proportion / span) * span


def test_interpolation_equals_numpy_in_every_channel():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(30, 25, 4)))
    lengths = torch.from_numpy(rng.integers(1, 26, 30))
    masked = torch.from_numpy(rng.random((30, 25)) < 0.6) & (torch.arange(25) < lengths[:, None])
    masked[0, : lengths[0]] = True  # nothing to see
    masked[1, : lengths[1]] = False  # nothing to do
    filled = interpolate_masked(features, masked, lengths)
    for number, length in enumerate(lengths.tolist()):
        hidden = masked[number, :length].numpy()
        visible = np.flatnonzero(~hidden)
        assert filled[number, length:].equal(features[number, length:])
        for channel in range(4):
            values = features[number, :length, channel].numpy()
            expected = values.copy()
            expected[hidden] = np.interp(np.flatnonzero(hidden), visible, values[visible]) if len(visible) else 0
            np.testing.assert_allclose(filled[number, :length, channel].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_an_utterance_masked_throughout_interpolates_to_zeros():
    filled = interpolate_masked(torch.ones(1, 5, 2), torch.ones(1, 5, dtype=torch.bool), torch.tensor([5]))
    assert filled.equal(torch.zeros(1, 5, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_proportion": 0.0}, r"objective.mask_proportion must be in \(0, 1\], found 0.0"),
        ({"span": 0}, "objective.span must be at least 1 frame, found 0"),
        ({"zero_probability": 0.8, "replace_probability": 0.3}, "add to at most 1, found 0.8 and 0.3"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Corruption(**options)


def test_masks_of_any_length_have_sizes_that_inductor_can_compare():
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.nodes if "example_value" in node.meta]
        sizes.extend(str(size) for value in values if isinstance(value, torch.Tensor) for size in value.shape)
        return graph

    compiled = torch.compile(cover, backend=backend, fullgraph=True, dynamic=True)
    for num_frames in (6, 24):
        starts = torch.rand(3, num_frames) < 0.1
        compiled(starts, torch.tensor([num_frames] * 3), 10)
    assert any(size.isidentifier() for size in sizes)
    assert not [size for size in sizes if "Min" in size or "Max" in size]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("num_frames", [frames for power in range(1, 12) for frames in (2**power, 2**power + 1)])
def test_masks_compile_at_every_length_and_stay_the_same(num_frames):
    torch._dynamo.reset()
    lengths = torch.tensor([num_frames, num_frames, max(1, num_frames // 2)])
    corruption, features = Corruption(**EVERYTHING), torch.randn(3, num_frames, 8)
    compiled = torch.compile(corruption, fullgraph=True, dynamic=False)
    there = compiled(features.cuda(), lengths.cuda(), keys(3).cuda())
    here = corruption(features, lengths, keys(3))
    assert there.frames.cpu().equal(here.frames)
    assert there.elements.cpu().equal(here.elements)
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=1e-5, atol=1e-5)


@needs_cuda
def test_gpu_and_cpu_corrupt_alike():
    features = torch.randn(16, 50, 20, generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(35, 51)
    corruption = Corruption(**EVERYTHING)
    here = corruption(features, lengths, keys(16))
    there = corruption(features.cuda(), lengths.cuda(), keys(16).cuda())
    torch.testing.assert_close(there.features.cpu(), here.features, rtol=1e-5, atol=1e-5)
    assert there.frames.cpu().equal(here.frames)
    assert there.elements.cpu().equal(here.elements)
