"""Batches as a function of seed, epoch and cut, whatever the number of processes."""

from __future__ import annotations

import math
from itertools import islice

import numpy as np
import pytest
import torch
from lhotse import AudioSource, CutSet, MonoCut, Recording

from audiot.data.batches import BatchStream, Crop, SpeechDataset, make_loader, to_device
from audiot.data.datamodule import SpeechDataModule, open_cuts, warn_of_many
from audiot.data.labels import IGNORED, FrameLabels, UtteranceLabel
from audiot.features import LogMel


@pytest.fixture(scope="module")
def cuts(demo_corpus):
    return open_cuts(demo_corpus.directory, "train")


def made_up(count, seed=0):
    """Cuts of 1 to 4 s without audio."""
    return of_lengths(np.random.default_rng(seed).integers(16000, 64000, count).tolist())


def of_lengths(samples):
    """Cuts with these numbers of samples, without audio."""
    return CutSet.from_cuts(
        MonoCut(
            f"cut{number:03d}",
            0.0,
            size / 16000,
            0,
            recording=Recording(f"cut{number:03d}", [AudioSource("file", [0], "none.wav")], 16000, size, size / 16000),
        )
        for number, size in enumerate(samples)
    )


def stream(cuts, **options):
    return BatchStream(cuts, **{"batch_s": 12.0, "training": True, "num_buckets": 4, "crop_s": 3.0} | options)


def described(items):
    """Position, and id, begin and length of every cut."""
    return [(position, [(cut.id, cut.start, cut.num_samples) for cut in cuts]) for position, cuts in items]


def epoch_of(cuts, epoch, **options):
    batches = []
    for position, batch in stream(cuts, start=(epoch, 0), **options):
        if position[0] != epoch:
            return batches
        batches.append((position, batch))
    raise AssertionError("training has no end")


def test_every_cut_comes_once_an_epoch_in_another_order_every_time():
    cuts, orders = made_up(50), []
    for epoch in range(3):
        batches = epoch_of(cuts, epoch)
        assert [number for (_, number), _ in batches] == list(range(len(batches)))
        orders.append([cut.id for _, batch in batches for cut in batch])
        assert sorted(orders[-1]) == sorted(cuts.ids)
    assert orders[0] != orders[1] != orders[2]
    assert [cut.id for _, batch in epoch_of(cuts, 0, seed=1) for cut in batch] != orders[0]


def test_epochs_follow_each_other_without_end():
    cuts = made_up(50)
    expected = [batch for epoch in range(3) for batch in described(epoch_of(cuts, epoch))]
    assert described(islice(stream(cuts), len(expected))) == expected


def test_batches_keep_to_their_seconds_and_hold_similar_durations():
    for _, batch in islice(stream(made_up(200)), 60):
        assert sum(cut.duration for cut in batch) <= 12.0
    spans = [max(cut.duration for cut in batch) - min(cut.duration for cut in batch) for _, batch in epoch_of(made_up(200), 0)]
    assert np.median(spans) < 1.0  # 3 s if they were mixed


def test_a_last_cut_longer_than_the_others_does_not_take_a_batch_beyond_its_seconds():
    cuts = of_lengths([8000] * 8 + [32000])  # eight of 0.5 s and one of 2 s, in one bucket
    for training in (False, True):
        items = islice(stream(cuts, training=training, batch_s=5.0, num_buckets=1), 12)
        batches = [batch for (epoch, _), batch in items if epoch == 0]
        assert sorted(cut.id for batch in batches for cut in batch) == sorted(cuts.ids)
        assert all(sum(cut.duration for cut in batch) <= 5.0 for batch in batches)


@pytest.mark.slow
def test_a_manifest_read_from_disk_gives_every_cut_once_an_epoch_too(demo_corpus):
    lazy = demo_corpus.cuts("train")
    assert lazy.is_lazy
    options = {"batch_s": 8.0, "num_buckets": 2}
    for epoch in range(2):
        batches = epoch_of(lazy, epoch, **options)
        assert sorted(cut.id for _, batch in batches for cut in batch) == sorted(lazy.ids)
        ranks = [described(islice(stream(lazy, rank=rank, world_size=2, start=(epoch, 0), **options), 2)) for rank in (0, 1)]
        assert [batch for turn in zip(*ranks, strict=True) for batch in turn] == described(batches)[:4]


@pytest.mark.parametrize("training", [True, False])
def test_batches_keep_to_their_utterances_too(training):
    cuts = made_up(50)
    options = {"max_utterances": 3, "training": training, "batch_s": 9.0}
    batches = epoch_of(cuts, 0, **options) if training else list(stream(cuts, **options))
    assert sorted(cut.id for _, batch in batches for cut in batch) == sorted(cuts.ids)
    sizes = [len(batch) for _, batch in batches]
    assert max(sizes) == 3
    assert sum(size == 3 for size in sizes) > 10
    assert all(sum(cut.duration for cut in batch) <= 9.0 for _, batch in batches)


@pytest.mark.filterwarnings("ignore:We have exceeded the max_duration constraint")
def test_a_cut_longer_than_the_budget_is_a_batch_by_itself():
    cuts = made_up(20)
    batches = epoch_of(cuts, 0, batch_s=2.0, crop_s=None)
    assert sorted(cut.id for _, batch in batches for cut in batch) == sorted(cuts.ids)
    assert all(len(batch) == 1 or sum(cut.duration for cut in batch) <= 2.0 for _, batch in batches)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_together_see_the_batches_of_one_process_in_order(world_size):
    cuts = made_up(70)
    whole = [batch for epoch in range(3) for batch in described(epoch_of(cuts, epoch))]
    assert len(epoch_of(cuts, 0)) % world_size, "a turn of batches of two epochs"
    turns = len(whole) // world_size
    ranks = [described(islice(stream(cuts, rank=rank, world_size=world_size), turns)) for rank in range(world_size)]
    together = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    assert together == whole[: len(together)]


@pytest.mark.parametrize(("count", "world_size"), [(5, 2), (4, 4), (30, 7)])
def test_every_rank_validates_something_however_few_batches_one_process_would_have(count, world_size):
    cuts = made_up(count)
    options = {"training": False, "batch_s": 1000.0, "crop_s": None}
    assert len(list(stream(cuts, num_buckets=1, **options))) == 1
    for buckets in (1, 4):
        options |= {"num_buckets": buckets, "world_size": world_size}
        ranks = [list(stream(cuts, rank=rank, **options)) for rank in range(world_size)]
        assert all(ranks)
        assert sorted(cut.id for rank in ranks for _, batch in rank for cut in batch) == sorted(cuts.ids)


def test_fewer_utterances_to_validate_on_than_ranks_are_refused():
    with pytest.raises(ValueError, match="there are 2 utterances to validate or test on and 3 processes"):
        next(iter(stream(made_up(2), training=False, world_size=3)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_restart_goes_on_with_the_batch_that_comes_next(world_size):
    cuts = made_up(60)
    for rank in range(world_size):
        unbroken = list(islice(stream(cuts, rank=rank, world_size=world_size), 40))
        for consumed in (1, 2, 5, 17, 31):
            epoch, number = unbroken[consumed - 1][0]
            start = (epoch, number - rank + world_size)  # what SpeechDataModule.consumed makes of it
            again = stream(cuts, rank=rank, world_size=world_size, start=start)
            assert described(islice(again, 40 - consumed)) == described(unbroken[consumed:])


def test_data_module_restarts_after_the_batches_consumed(demo_corpus):
    def module():
        return SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, crop_s=2.0, num_buckets=2, num_workers=0)

    unbroken = list(islice(module().train_dataloader(), 20))
    assert unbroken[-1]["position"][0] >= 2
    for consumed in (1, 4, 5, 9, 13):
        first = module()
        for batch in unbroken[:consumed]:
            first.consumed(batch)
        second = module()
        second.load_state_dict(first.state_dict())
        for batch, expected in zip(second.train_dataloader(), unbroken[consumed:], strict=False):
            assert batch["position"] == expected["position"]
            assert batch["ids"] == expected["ids"]
            assert batch["waveforms"].equal(expected["waveforms"])
            assert batch["keys"].equal(expected["keys"])
            if batch["position"] == unbroken[-1]["position"]:
                break


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_notes_the_batch_that_follows_the_turn(demo_corpus, world_size):
    def module(rank):
        source = SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, crop_s=2.0, num_buckets=2, num_workers=0)
        trainer = {"world_size": world_size, "global_rank": rank, "num_devices": world_size, "overfit_batches": 0}
        source.trainer = type("Trainer", (), trainer)()
        return source

    alone = SpeechDataModule(demo_corpus, "pretrain", batch_s=8.0, crop_s=2.0, num_buckets=2, num_workers=0)
    positions = [batch["position"] for batch in islice(alone.train_dataloader(), 40)]
    for turns in range(1, 8):
        for rank in range(world_size):
            source = module(rank)
            for batch in islice(source.train_dataloader(), turns):
                source.consumed(batch)
            assert batch["position"] == positions[(turns - 1) * world_size + rank]
            later = module(0)
            later.load_state_dict(source.state_dict())
            assert next(iter(later.train_dataloader()))["position"] == positions[turns * world_size]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_every_cut_once_in_the_same_order_from_its_start(world_size):
    cuts = made_up(31)
    ranks = [
        described(stream(cuts, training=False, rank=rank, world_size=world_size, crop_s=2.0, seed=rank))
        for rank in range(world_size)
    ]
    together = sorted(batch for rank in ranks for batch in rank)
    assert together == described(stream(cuts, training=False, crop_s=2.0))
    found = {cut[0]: cut[1:] for _, batch in together for cut in batch}
    assert found == {cut.id: (0.0, min(cut.num_samples, 32000)) for cut in cuts}
    assert any(cut.num_samples > 32000 for cut in cuts)
    assert sum(len(batch) for _, batch in together) == 31


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("count", "num_buckets"), [(1, 10), (3, 10), (5, 1)])
def test_fewer_cuts_than_buckets_and_a_single_bucket_work(training, count, num_buckets):
    cuts = made_up(count)
    whole = epoch_of(cuts, 0, num_buckets=num_buckets) if training else stream(cuts, training=False, num_buckets=num_buckets)
    assert sorted(cut.id for _, batch in whole for cut in batch) == sorted(cuts.ids)


def test_fewer_batches_than_ranks_are_taken_from_several_epochs():
    cuts, options = made_up(10), {"batch_s": 1000.0, "num_buckets": 1}
    positions = [[position for position, _ in islice(stream(cuts, rank=rank, world_size=3, **options), 2)] for rank in range(3)]
    assert positions == [[(rank, 0), (rank + 3, 0)] for rank in range(3)]


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="the training split has no utterance: bring more audio"):
        next(iter(stream(iter(()), lengths=[16000])))


def test_crops_depend_on_seed_epoch_and_id_alone():
    cuts = made_up(60)
    begins = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        begins[seed, epoch] = {cut.id: cut.start for _, batch in epoch_of(cuts, epoch, seed=seed, crop_s=1.5) for cut in batch}
        few = CutSet.from_cuts(list(cuts)[::4])  # other companions
        alone = {cut.id: cut.start for _, batch in epoch_of(few, epoch, seed=seed, crop_s=1.5, batch_s=5.0) for cut in batch}
        assert alone.items() <= begins[seed, epoch].items()
    assert all(begins[0, 0][name] != begins[0, 1][name] for name, cut in zip(cuts.ids, cuts, strict=True) if cut.duration > 1.6)
    assert begins[0, 0] != begins[1, 0]


def test_crops_lie_anywhere_inside_their_cut(cuts):
    (cut, *_) = [cut for cut in cuts if cut.duration > 2.0]
    samples = cut.load_audio()[0]
    begins = []
    for epoch in range(300):
        crop = Crop(1.0, 0, epoch)(cut)
        begin = round(crop.start * 16000)
        assert crop.id == cut.id
        assert crop.num_samples == 16000
        if epoch < 20:
            assert np.array_equal(crop.load_audio()[0], samples[begin : begin + 16000])
        begins.append(begin)
    spare = len(samples) - 16000
    assert 0 <= min(begins) < 0.05 * spare
    assert 0.95 * spare < max(begins) <= spare
    assert np.mean(begins) == pytest.approx(spare / 2, rel=0.1)


def test_cuts_that_are_short_enough_stay_whole():
    for cut in made_up(30):
        crop = Crop(2.0, 0, 0)(cut)
        if cut.duration <= 2.0:
            assert crop is cut
        else:
            assert crop.num_samples == 32000


def test_items_are_padded_waveforms_with_lengths_keys_and_ids(cuts):
    chosen = CutSet.from_cuts(list(cuts)[:4])
    batch = SpeechDataset(seed=3)[(2, 7), chosen]
    assert batch["position"] == (2, 7)
    assert batch["ids"] == [cut.id for cut in chosen]
    assert batch["lengths"].tolist() == [cut.num_samples for cut in chosen]
    assert batch["waveforms"].shape == (4, max(cut.num_samples for cut in chosen))
    assert batch["waveforms"].dtype == torch.int16  # until they are where the model is
    for row, cut in zip(to_device(batch, torch.device("cpu"))["waveforms"].numpy(), chosen, strict=True):
        assert np.array_equal(row[: cut.num_samples], cut.load_audio()[0])
        assert not row[cut.num_samples :].any()
    assert "labels" not in batch


def test_keys_of_training_follow_seed_and_epoch_those_of_validation_the_cut_alone(cuts):
    chosen = CutSet.from_cuts(list(cuts)[:4])
    keys = {
        name: SpeechDataset(seed)[(epoch, 0), chosen]["keys"].tolist()
        for name, seed, epoch in [("first", 0, 0), ("epoch", 0, 1), ("seed", 1, 0), ("valid", None, 0)]
    }
    assert len({key for row in keys.values() for key in row}) == 16
    assert SpeechDataset(0)[(0, 5), chosen]["keys"].tolist() == keys["first"]
    assert SpeechDataset(None)[(4, 0), chosen]["keys"].tolist() == keys["valid"]


def test_labels_are_stacked_or_padded(cuts):
    chosen = CutSet.from_cuts(list(cuts)[:4])
    speakers = UtteranceLabel("speaker")
    index = {name: number for number, name in enumerate(sorted({cut.supervisions[0].speaker for cut in cuts}))}
    batch = SpeechDataset(None, speakers, index)[(0, 0), chosen]
    assert batch["labels"].tolist() == [index[cut.supervisions[0].speaker] for cut in chosen]
    assert batch["speakers"] == [cut.supervisions[0].speaker for cut in chosen]
    features = LogMel()
    phones = FrameLabels("phone", features)
    index = {name: number for number, name in enumerate(sorted({name for cut in cuts for name in phones.names(cut)}))}
    batch = SpeechDataset(None, phones, index)[(0, 0), chosen]
    for row, cut in zip(batch["labels"], chosen, strict=True):
        count = features.num_frames(cut.num_samples)
        assert row[:count].equal(phones.encode(cut, index))
        assert (row[count:] == IGNORED).all()


def test_workers_give_the_batches_of_the_main_process(cuts):
    loaders = [make_loader(SpeechDataset(0), stream(cuts), workers, pin_memory=False) for workers in (0, 2)]
    for one, other in islice(zip(*loaders, strict=True), 6):
        assert one["position"] == other["position"]
        assert one["ids"] == other["ids"]
        assert one["waveforms"].equal(other["waveforms"])


def test_lengths_stay_on_the_cpu():
    batch = {"waveforms": torch.zeros(2, 5), "lengths": torch.tensor([5, 4]), "keys": torch.tensor([1, 2]), "ids": ["a", "b"]}
    moved = to_device(batch, torch.device("meta"))
    assert moved["waveforms"].device.type == moved["keys"].device.type == "meta"
    assert moved["lengths"].device.type == "cpu"
    assert moved["ids"] == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_s": 0.0}, "data.batch_s must be a positive number of seconds, found 0.0"),
        ({"batch_s": 8.0, "label_fraction": 0.0}, r"data.label_fraction must be in \(0, 1\], found 0.0"),
        ({"batch_s": 8.0, "label_fraction": 1.5}, r"data.label_fraction must be in \(0, 1\], found 1.5"),
        ({"batch_s": 8.0, "max_utterances": 0}, "data.max_utterances must be at least 1 or null, found 0"),
    ],
)
def test_impossible_settings_are_refused(demo_corpus, options, message):
    with pytest.raises(ValueError, match=message):
        SpeechDataModule(demo_corpus, "pretrain", **options)


@pytest.mark.parametrize("durations", [[1.0], [1.0, 1.0], [0.1, 0.1, 10.0], [1.0] * 3])
@pytest.mark.filterwarnings("error")
def test_a_few_cuts_of_one_length_are_batched_without_a_warning(durations):
    cuts = of_lengths([round(16000 * duration) for duration in durations])
    batches = [batch for _, batch in stream(cuts, training=False, num_buckets=5)]
    assert sorted(cut.id for batch in batches for cut in batch) == sorted(cut.id for cut in cuts)


def test_validation_starts_no_more_loader_processes_than_its_batches_need(demo_corpus):
    data = SpeechDataModule(demo_corpus, "phone", batch_s=0.1, num_workers=100)  # an utterance in each batch
    assert data.val_dataloader().num_workers == math.ceil(demo_corpus.counts["valid"] / 4)  # which makes four ahead
    assert data.train_dataloader().num_workers == 100


def test_more_loader_processes_than_cores_are_told_once(demo_corpus, caplog, monkeypatch):
    monkeypatch.setattr("audiot.data.datamodule.usable_cores", lambda: 2)
    warn_of_many.cache_clear()
    for number in (2, 3, 3):
        SpeechDataModule(demo_corpus, "phone", batch_s=10, num_workers=number)
    assert caplog.messages == [
        "data.num_workers=3: more loader processes than cores (2 here); data.num_workers=auto chooses a useful number"
    ]
