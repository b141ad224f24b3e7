"""Batches of any corpus by any number of processes."""

from __future__ import annotations

import warnings
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st
from test_batches import of_lengths, stream

SAMPLES = st.lists(st.integers(8000, 80000), min_size=1, max_size=40)
OPTIONS = {
    "batch_s": st.floats(5.0, 30.0),
    "num_buckets": st.integers(1, 6),
    "max_utterances": st.none() | st.integers(1, 8),
    "lengths": st.none() | st.lists(st.integers(8000, 48000), min_size=1, max_size=4, unique=True).map(sorted),
}


def first_epochs(cuts, epochs, **options):
    """Batches of the first epochs of one process, or of its only pass."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position, batch in stream(cuts, **options):
            if position[0] == epochs:
                break
            found.append((position, list(batch)))
    return found


def ids(batches):
    return [cut.id for _, batch in batches for cut in batch]


def what(items):
    """Position, and id and length of every cut or piece."""
    return [(position, [(cut.id, cut.num_samples) for cut in batch]) for position, batch in items]


@given(samples=SAMPLES, seed=st.integers(0, 2**31), **OPTIONS)
def test_an_epoch_has_every_cut_once_within_its_seconds_and_utterances(samples, seed, **options):
    cuts = of_lengths(samples)
    batches = first_epochs(cuts, 2, seed=seed, **options)
    assert what(batches) == what(first_epochs(cuts, 2, seed=seed, **options))
    for epoch in range(2):
        own = [batch for batch in batches if batch[0][0] == epoch]
        assert sorted(ids(own)) == sorted(cuts.ids)
        assert [number for (_, number), _ in own] == list(range(len(own)))
    whole = dict(zip(cuts.ids, samples, strict=True))
    for _, batch in batches:
        assert sum(cut.num_samples for cut in batch) / 16000 <= options["batch_s"] + 1e-9
        assert len(batch) <= (options["max_utterances"] or len(batch))
        for cut in batch:
            if options["lengths"] is None:
                assert cut.num_samples == min(whole[cut.id], 48000)  # crop_s of `stream`
            else:
                fitting = [length for length in options["lengths"] if length <= whole[cut.id]]
                assert cut.num_samples == (fitting[-1] if fitting else whole[cut.id])


@given(samples=SAMPLES, world_size=st.integers(1, 5), consumed=st.integers(0, 12), data=st.data(), **OPTIONS)
def test_ranks_share_the_sequence_of_one_process_and_go_on_at_any_batch(samples, world_size, consumed, data, **options):
    cuts, turns = of_lengths(samples), 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = what(islice(stream(cuts, **options), consumed + turns * world_size))
        ranks = [
            what(islice(stream(cuts, rank=rank, world_size=world_size, start=(0, consumed), **options), turns))
            for rank in range(world_size)
        ]
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == whole[consumed:]
        epoch, number = whole[consumed][0]
        assert what(islice(stream(cuts, start=(epoch, number), **options), turns)) == whole[consumed : consumed + turns]


@given(samples=SAMPLES, world_size=st.integers(1, 5), batch_s=OPTIONS["batch_s"], num_buckets=OPTIONS["num_buckets"])
def test_validation_has_every_cut_once_and_a_batch_for_every_rank(samples, world_size, batch_s, num_buckets):
    cuts = of_lengths(samples)
    world_size = min(world_size, len(samples))
    options = {"training": False, "batch_s": batch_s, "num_buckets": num_buckets, "world_size": world_size}
    ranks = [first_epochs(cuts, 1, rank=rank, **options) for rank in range(world_size)]
    assert all(ranks)
    assert sorted(name for rank in ranks for name in ids(rank)) == sorted(cuts.ids)
    whole = dict(zip(cuts.ids, samples, strict=True))
    assert all(cut.num_samples == min(48000, whole[cut.id]) for rank in ranks for _, batch in rank for cut in batch)
