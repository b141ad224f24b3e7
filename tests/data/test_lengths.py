"""Pre-training crops to few lengths, and a batch has one length. Also what workers read and send."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording
from lhotse.audio.utils import AudioLoadingError
from lhotse.cut import MonoCut

import audiot.data.batches
from audiot.data.batches import BatchStream, Piece, SpeechDataset, crop_lengths, to_device
from audiot.data.datamodule import PreparedPieces, SpeechDataModule, open_cuts, useful_workers
from audiot.data.labels import UtteranceLabel
from audiot.features import KaldiFbank, LogMel

LENGTHS = [8000, 16000, 24000]


class ReadAsItGoes:
    """Pieces that are not in memory."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.read = 0

    def __iter__(self):
        for piece in self.pieces:
            self.read += 1
            yield piece


def made_up(count, seed=0):
    """Pieces of 0.2 to 2.2 s without audio."""
    samples = np.random.default_rng(seed).integers(3200, 35200, count).tolist()
    return [Piece(f"cut{number:03d}", "none.wav", 0, size, 16000) for number, size in enumerate(samples)]


def stream(pieces, **options):
    return BatchStream(pieces, **{"batch_s": 4.0, "training": True, "lengths": LENGTHS} | options)


def epoch_of(pieces, epoch, **options):
    batches = []
    for position, batch in stream(pieces, start=(epoch, 0), **options):
        if position[0] != epoch:
            return batches
        batches.append((position, batch))
    raise AssertionError("training has no end")


# Which lengths


@pytest.mark.parametrize(
    ("crop_s", "num_lengths", "tokens"),
    [
        (15.015, 8, [184, 368, 512, 704, 896, 1088, 1280, 1472]),  # of 1,500 frames: 187.5, 375, 562.5, …
        (3.84, 8, [40, 88, 136, 184, 232, 280, 328, 376]),  # of 382
        (0.12, 8, [1, 2, 3, 5, 6, 7, 8]),  # of 10: 1.25, 2.5, 3.75, 5, …; 8.75 and 10 both become 8
        (0.045, 8, [1, 2, 3]),
        (15.015, 1, [1472]),
    ],
)
def test_lengths_are_the_rounded_shares_of_a_crop(crop_s, num_lengths, tokens):
    assert crop_lengths(LogMel(), crop_s, num_lengths) == [(count - 1) * 160 + 400 for count in tokens]


@pytest.mark.parametrize("features", [LogMel(stack=3), LogMel(center=True), KaldiFbank(stack=2), LogMel(sample_rate=8000)])
def test_lengths_give_whole_numbers_of_tokens_with_no_sample_to_spare(features):
    lengths = crop_lengths(features, 6.0, 8)
    tokens = [features.num_tokens(length) for length in lengths]
    assert all(count % (64 if count >= 512 else 8) == 0 for count in tokens)
    assert all(features.num_tokens(length - 1) == count - 1 for length, count in zip(lengths, tokens, strict=True))
    assert features.num_tokens(6 * features.sample_rate) - tokens[-1] < (64 if tokens[-1] >= 512 else 8)
    assert all(one < other for one, other in pairwise(lengths))


def test_no_crop_or_no_number_means_no_lengths():
    assert crop_lengths(LogMel(), None, 8) is crop_lengths(LogMel(), 4.0, None) is None


@pytest.mark.parametrize(
    ("crop_s", "num_lengths", "message"),
    [
        (4.0, 0, "data.num_lengths must be at least 1 or null, found 0"),
        (0.02, 8, "data.crop_s=0.02 is too short: one token needs 0.025 s"),
    ],
)
def test_impossible_lengths_are_refused(crop_s, num_lengths, message):
    with pytest.raises(ValueError, match=message):
        crop_lengths(LogMel(), crop_s, num_lengths)


# Which batches


@pytest.mark.parametrize("max_utterances", [None, 3])
def test_a_batch_has_one_length_and_as_many_cuts_as_fit(max_utterances):
    pieces = made_up(300)
    batches = [batch for _, batch in epoch_of(pieces, 0, max_utterances=max_utterances)]
    whole = {piece.id: piece for piece in pieces}
    sizes = Counter()
    for batch in batches:
        lengths = {piece.num_samples for piece in batch}
        if max(lengths) < LENGTHS[0]:
            assert all(piece == whole[piece.id] for piece in batch)  # too short to be cropped
            place = 0
        else:
            (length,) = lengths
            place = LENGTHS.index(length) + 1
            for piece in batch:
                assert bisect_right(LENGTHS, whole[piece.id].num_samples) == place  # the longest that it has
        sizes[place, len(batch)] += 1
    full = [8, 8, 4, 2] if max_utterances is None else [3, 3, 3, 2]  # 64,000 samples in all
    for place, size in enumerate(full):
        assert sizes[place, size] > 2
        assert sum(count for (other, _), count in sizes.items() if other == place) <= sizes[place, size] + 1  # the last of all
    assert max(size for _, size in sizes) == max(full)
    assert sorted(piece.id for batch in batches for piece in batch) == sorted(whole)


def test_crops_lie_inside_their_cut_and_move_with_the_epoch():
    pieces = made_up(100)
    whole = {piece.id: piece for piece in pieces}
    begins = []
    for epoch in range(30):
        crops = {piece.id: piece for _, batch in epoch_of(pieces, epoch) for piece in batch}
        assert all(0 <= crop.begin <= whole[name].num_samples - crop.num_samples for name, crop in crops.items())
        begins.append({name: crop.begin for name, crop in crops.items()})
    spare = {name: piece.num_samples - 24000 for name, piece in whole.items() if piece.num_samples > 30000}
    shares = np.array([[begin[name] / size for name, size in spare.items()] for begin in begins])
    assert shares.min() < 0.05
    assert shares.max() > 0.95
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    few = {piece.id: piece.begin for _, batch in epoch_of(pieces[::3], 7) for piece in batch}
    assert few.items() <= begins[7].items()  # whatever the company


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_and_restarts_see_the_batches_of_one_process(held, world_size, monkeypatch):
    monkeypatch.setattr(audiot.data.batches, "WINDOW", 40)
    pieces = made_up(100) if held else ReadAsItGoes(made_up(100))
    whole = []
    for epoch in range(3):
        batches = epoch_of(pieces, epoch)
        assert sorted(piece.id for _, batch in batches for piece in batch) == [f"cut{number:03d}" for number in range(100)]
        whole += batches
    assert [piece.id for piece in whole[0][1]] != [piece.id for piece in whole[len(whole) // 3][1]]
    turns = len(whole) // world_size
    ranks = [list(islice(stream(pieces, rank=rank, world_size=world_size), turns)) for rank in range(world_size)]
    assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == whole[: turns * world_size]
    for consumed in (1, 5, turns // 2):
        epoch, number = ranks[0][consumed - 1][0]
        start = (epoch, number + world_size)
        again = stream(pieces, rank=world_size - 1, world_size=world_size, start=start)
        assert list(islice(again, turns - consumed)) == ranks[-1][consumed:]


def test_a_manifest_read_as_it_goes_is_read_ahead_by_a_window_at_most(monkeypatch):
    monkeypatch.setattr(audiot.data.batches, "WINDOW", 40)
    pieces = ReadAsItGoes(made_up(400))
    given = 0
    for (epoch, _), batch in stream(pieces):
        if epoch:
            break
        given += len(batch)
        assert pieces.read <= min(400, given + 40 + 8 + 8 + 4 + 2)  # and what waits for batches to be full
    assert given == 400


@pytest.mark.parametrize("count", [1, 2, 7])
def test_tiny_corpora_still_train(count):
    pieces = made_up(count)
    for epoch in range(2):
        assert sorted(piece.id for _, batch in epoch_of(pieces, epoch) for piece in batch) == [piece.id for piece in pieces]


def test_fewer_batches_than_ranks_are_taken_from_several_epochs():
    (short,) = epoch_of(made_up(1), 0)
    ranks = [next(iter(stream(made_up(1), rank=rank, world_size=5))) for rank in range(5)]
    assert [position for position, _ in ranks] == [(epoch, 0) for epoch in range(5)]
    assert {piece.id for _, batch in ranks for piece in batch} == {piece.id for piece in short[1]}


# What is read


def cut_of(path, channel=0, begin_s=0.0, duration_s=None):
    recording = Recording.from_file(path)
    return MonoCut(path.name, begin_s, duration_s or recording.duration - begin_s, channel, recording=recording)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Half a second of noise in several formats; ``exact`` ones have 16 bits."""
    folder = tmp_path_factory.mktemp("files")
    noise = np.random.default_rng(0).uniform(-1, 1, (8000, 2))
    for name, subtype in [("16.wav", "PCM_16"), ("16.flac", "PCM_16"), ("24.wav", "PCM_24"), ("32.wav", "FLOAT")]:
        soundfile.write(folder / name, noise[:, 0], 16000, subtype=subtype)
    soundfile.write(folder / "2channels.wav", noise, 16000, subtype="PCM_16")
    soundfile.write(folder / "16.aiff", noise[:, 0], 16000, subtype="PCM_16")
    return folder


@pytest.mark.parametrize("name", ["16.wav", "16.flac", "24.wav", "32.wav", "16.aiff", "2channels.wav"])
@pytest.mark.parametrize(("begin_s", "duration_s"), [(0.0, None), (0.1, 0.25)])
def test_what_is_read_is_what_lhotse_reads_bit_for_bit(files, name, begin_s, duration_s):
    cut = cut_of(files / name, 1 if name == "2channels.wav" else 0, begin_s, duration_s)
    batch = SpeechDataset(0)[(0, 0), CutSet.from_cuts([cut])]
    assert batch["waveforms"].dtype == (torch.int16 if name in ("16.wav", "16.flac") else torch.float32)
    floats = to_device(batch, torch.device("cpu"))["waveforms"]
    assert floats.dtype == torch.float32
    assert floats.numpy().tobytes() == cut.load_audio().tobytes()


@pytest.mark.parametrize("name", ["16.wav", "24.wav", "2channels.wav"])
def test_a_crop_is_a_part_of_what_lhotse_reads(files, name):
    cut = cut_of(files / name, begin_s=0.05)
    expected = cut.load_audio()[0]
    for (epoch, _), batch in stream(CutSet.from_cuts([cut]), lengths=[1000]):
        (crop,) = batch
        waveforms = to_device(SpeechDataset(0)[(0, 0), batch], torch.device("cpu"))["waveforms"]
        likely = np.flatnonzero(expected[:-999] == waveforms[0, 0].item())
        begins = [begin for begin in likely if np.array_equal(expected[begin : begin + 1000], waveforms[0])]
        assert begins == [crop.begin - (0 if crop.cut else 800)]
        if epoch == 15:
            break


def test_16_bits_beside_floats_become_floats(files):
    cuts = [cut_of(files / "16.wav"), cut_of(files / "24.wav", duration_s=0.3), cut_of(files / "16.flac", duration_s=0.2)]
    waveforms = SpeechDataset(0)[(0, 0), CutSet.from_cuts(cuts)]["waveforms"]
    assert waveforms.dtype == torch.float32
    for row, cut in zip(waveforms.numpy(), cuts, strict=True):
        assert np.array_equal(row[: cut.num_samples], cut.load_audio()[0])
        assert not row[cut.num_samples :].any()


@pytest.mark.parametrize(
    ("change", "details"),
    [
        ({"path": "gone.wav"}, "System error"),
        ({"num_samples": 9000}, "found 8000 samples, expected 9000"),
        ({"begin": 9000}, "seek"),
        ({"sampling_rate": 8000}, "found 1 channels at 16000 Hz, expected one at 8000 Hz"),
    ],
)
def test_a_file_that_is_not_what_it_was_is_an_error(files, change, details):
    piece = Piece("name", str(files / "16.wav"), 0, 8000, 16000)._replace(**change)
    with pytest.raises(AudioLoadingError, match=rf"Reading audio from '.*\.wav' failed\. Details: .*{details}"):
        SpeechDataset(0)[(0, 0), [piece]]


def test_prepared_pieces_are_the_cuts_that_lhotse_reads(demo_corpus):
    cuts = demo_corpus.cuts("train")
    pieces = list(PreparedPieces(demo_corpus.directory, "train"))
    assert pieces == [Piece.of(cut) for cut in cuts]
    assert all(piece.cut is None for piece in pieces)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_training_loader_gives_unpadded_batches(demo_corpus, num_workers):
    options = {"batch_s": 8.0, "seed": 3, "lengths": [4000, 16000, 32000]}
    data = SpeechDataModule(demo_corpus, "pretrain", crop_s=2.0, num_workers=num_workers, **options)
    expected = stream(PreparedPieces(demo_corpus.directory, "train"), **options)
    cuts = {cut.id: cut for cut in demo_corpus.cuts("train")}
    for batch, (position, pieces) in islice(zip(data.train_dataloader(), expected, strict=False), 6):
        assert tuple(batch["position"]) == position
        assert batch["ids"] == [piece.id for piece in pieces]
        assert batch["waveforms"].dtype == torch.int16
        assert batch["keys"].dtype == batch["lengths"].dtype == torch.int64
        assert batch["lengths"].tolist() == [batch["waveforms"].shape[1]] * len(pieces)
        for row, piece in zip(data.transfer_batch_to_device(batch, torch.device("cpu"), 0)["waveforms"], pieces, strict=True):
            end = piece.begin + piece.num_samples
            assert np.array_equal(row.numpy(), cuts[piece.id].load_audio()[0, piece.begin : end])


def test_passes_in_order_give_floats_and_the_first_of_each_cut(demo_corpus):
    data = SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, crop_s=1.0, lengths=[8000], num_workers=0)
    found = {}
    for batch in data.ordered_loader("train"):
        assert batch["waveforms"].dtype == torch.float32
        rows = zip(batch["ids"], batch["waveforms"], batch["lengths"], strict=True)
        found |= {name: row[:length].numpy() for name, row, length in rows}
    for cut in demo_corpus.cuts("train"):
        assert np.array_equal(found[cut.id], cut.load_audio()[0, :16000])


def test_no_supervision_is_carried_along_without_labels(demo_corpus):
    data = SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, crop_s=1.0, num_workers=0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        _, cuts = next(iter(loader.sampler))
        assert not any(cut.supervisions for cut in cuts)
    assert all(cut.supervisions for cut in open_cuts(demo_corpus.directory, "train"))


def test_workers_of_validation_stay_for_the_next_one(demo_corpus):
    loader = SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, num_workers=1).val_dataloader()
    passes = [[batch["ids"] for batch in loader] for _ in range(2)]
    assert passes[0] == passes[1]
    assert loader.persistent_workers


# How many workers


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "expected"),
    [(1, 1, True, 1), (2, 1, True, 1), (4, 1, True, 3), (16, 1, True, 8), (16, 2, True, 7), (8, 8, True, 1), (16, 1, False, 1)],
)
def test_automatic_workers_leave_a_core_to_each_process(monkeypatch, cores, processes, on_gpu, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert useful_workers(processes, on_gpu) == expected


def test_the_remedy_for_waiting_names_the_workers_that_help(demo_corpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def data(num_workers):
        return SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, num_workers=num_workers)

    assert data("auto").loader_processes == 5
    assert data(0).loader_processes == 0
    assert data(2).faster_loading() == "set data.num_workers=5 (now 2)"
    assert data("auto").faster_loading().startswith("this machine has cores for 5 loader processes: audiot benchmark")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": "many"}, "data.num_workers must be auto, 0 or more, found 'many'"),
        ({"num_workers": -1}, "data.num_workers must be auto, 0 or more, found -1"),
        ({"lengths": [16000], "labels": UtteranceLabel("speaker")}, "data.num_lengths excludes labels"),
    ],
)
def test_impossible_settings_are_refused(demo_corpus, options, message):
    with pytest.raises(ValueError, match=message):
        SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, **options)
