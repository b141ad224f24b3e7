"""Masks of any batch: how many frames they hide, where, and what decides on them."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from audiot.objectives.corruption import Corruption, Spans

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=4)
SPANS = {"mask_proportion": st.floats(0.01, 1.0), "span": st.integers(1, 25)}
KEYS = st.integers(0, 2**62)


def keys_of(first, count):
    return torch.tensor([first + 7919 * number for number in range(count)])


def runs(frames):
    """Lengths of the runs of masked frames."""
    text = "".join("x" if frame else " " for frame in frames)
    return [len(run) for run in text.split()]


@given(lengths=LENGTHS, spare=st.integers(0, 9), key=KEYS, **SPANS)
def test_masks_hide_their_share_in_whole_spans_and_no_padding(lengths, spare, key, mask_proportion, span):
    frames = Spans(mask_proportion, span).mask(keys_of(key, len(lengths)), torch.tensor(lengths), max(lengths) + spare)
    for row, length in zip(frames.tolist(), lengths, strict=True):
        places = max(1, length - span + 1)  # of a span
        wanted = mask_proportion * length / span
        fewest, most = (min(max(1, count), places) for count in (math.floor(wanted), math.ceil(wanted)))
        whole = min(span, length)
        assert not any(row[length:])
        assert all(run >= whole for run in runs(row))
        assert whole + fewest - 1 <= sum(row) <= min(most * span, length)  # spans may overlap in all but one frame


@given(lengths=LENGTHS, spare=st.integers(0, 9), key=KEYS, data=st.data(), **SPANS)
def test_a_mask_follows_from_its_key_alone(lengths, spare, key, data, mask_proportion, span):
    spans, keys = Spans(mask_proportion, span), keys_of(key, len(lengths))
    together = spans.mask(keys, torch.tensor(lengths), max(lengths) + spare)
    order = data.draw(st.permutations(range(len(lengths))))
    assert spans.mask(keys[order], torch.tensor(lengths)[order], max(lengths) + spare).equal(together[order])
    for number, length in enumerate(lengths):
        one = slice(number, number + 1)
        assert spans.mask(keys[one], torch.tensor([length]), length)[0].equal(together[number, :length])


@given(
    lengths=LENGTHS,
    spare=st.integers(0, 9),
    key=KEYS,
    stack=st.integers(1, 3),
    band_width=st.integers(0, 4),
    noise_probability=st.sampled_from([0.0, 0.5, 1.0]),
    zero_probability=st.sampled_from([0.0, 0.5, 1.0]),
    **SPANS,
)
def test_what_is_not_scored_is_not_altered(lengths, spare, key, stack, band_width, noise_probability, zero_probability, **spans):
    corruption = Corruption(
        **spans,
        band_width=band_width,
        noise_probability=noise_probability,
        zero_probability=zero_probability,
        replace_probability=1 - zero_probability,
    )
    features = torch.randn(len(lengths), max(lengths) + spare, 4 * stack, generator=torch.Generator().manual_seed(0))
    keys = keys_of(key, len(lengths))
    found = corruption(features, torch.tensor(lengths), keys, stack)
    scored = found.frames[..., None].expand_as(features) if found.elements is None else found.elements
    real = torch.arange(features.shape[1]) < torch.tensor(lengths)[:, None]
    assert not (found.frames & ~real).any()
    assert not (scored & ~real[..., None]).any()
    if not noise_probability:
        kept = ~scored & real[..., None]
        assert found.features[kept].equal(features[kept])
    for number, length in enumerate(lengths):
        one = slice(number, number + 1)
        alone = corruption(features[one, :length], torch.tensor([length]), keys[one], stack)
        torch.testing.assert_close(alone.features[0], found.features[number, :length], rtol=0, atol=1e-6)
