"""Cached hidden states give the same results as waveforms."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from learning import losses_of

from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import IGNORED, FrameLabels, PhoneSequence, SlotLabels, UtteranceLabel
from audiot.downstream.cache import CachedStates, State, compute_states
from audiot.downstream.heads import LayerSelection
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import FeaturesUpstream, random_encoder

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
CPU = torch.device("cpu")
FIELDS = ["accent", "keyword", "speaker"]
HEADS = {
    "phone": "FrameClassifier",
    "speaker": "UtteranceClassifier",
    "intent": "UtteranceClassifier",
    "phone_recognition": "FrameClassifier",
}
OBJECTIVES = {
    "phone": {"_target_": "audiot.downstream.objectives.Classification"},
    "speaker": {"_target_": "audiot.downstream.objectives.Classification"},
    "intent": {"_target_": "audiot.downstream.objectives.Slots", "fields": FIELDS},
    "phone_recognition": {"_target_": "audiot.downstream.ctc.CTC"},
}
PER_FRAME = ("phone", "phone_recognition")


@pytest.fixture(scope="module")
def upstream(tiny):
    return random_encoder(0, features=tiny["features"], model=tiny["model"])


def data(corpus, upstream, task="phone", **options):
    labels = {
        "phone": FrameLabels("phone", upstream.features),
        "speaker": UtteranceLabel("speaker"),
        "intent": SlotLabels(FIELDS),
        "phone_recognition": PhoneSequence(upstream.features),
    }[task]
    return SpeechDataModule(corpus, task, batch_s=8.0, num_buckets=2, num_workers=0, labels=labels, **options)


def module(tiny, upstream, classes, task, layers):
    torch.manual_seed(1)
    head = {"_target_": f"audiot.downstream.heads.{HEADS[task]}"}
    made = DownstreamModule(upstream.config, head, OBJECTIVES[task], classes, layers, False, tiny["optimizer"], tiny["scheduler"])
    made.upstream.load_state_dict(upstream.state_dict())
    if made.layers.logits is not None:
        torch.nn.init.normal_(made.layers.logits)
    return made.eval()


def label_rows(batch, row):
    return batch["labels"][row] if batch["labels"].ndim == 2 else batch["labels"][row : row + 1]


def known(labels):
    return labels[labels != IGNORED]


@pytest.mark.parametrize("layers", ["last", "weighted_sum", [0, -1]])
@pytest.mark.parametrize("task", HEADS)
def test_cached_states_give_the_scores_of_the_waveforms(tiny, demo_corpus, upstream, task, layers):
    source = data(demo_corpus, upstream, task)
    probe = module(tiny, upstream, source.classes, task, layers)
    cache = CachedStates(source, probe.upstream, CPU, layers=probe.layers, batch_size=5)
    for role, loader in [("valid", cache.val_dataloader), ("test", cache.test_dataloader)]:
        expected, found = [], []
        for batches, rows in [(source.ordered_loader(role), expected), (loader(), found)]:
            for batch in batches:
                scores, lengths = probe(batch)
                for row, length in enumerate(lengths.tolist()):  # in frames
                    own = slice(0, length) if task in PER_FRAME else slice(None)
                    told = batch["ids"][row], batch["speakers"][row]
                    rows.append((scores[row][own], label_rows(batch, row)[slice(None) if task != "phone" else own], told))
        assert len(found) == len(expected) == len(source.cuts(role))
        for (scores, labels, told), (cached_scores, cached_labels, cached_told) in zip(expected, found, strict=True):
            torch.testing.assert_close(cached_scores, scores, rtol=1e-5, atol=1e-5)
            assert known(cached_labels).equal(known(labels))
            assert task == "phone_recognition" or cached_labels.equal(labels)  # else the padding may differ
            assert cached_told == told


@pytest.mark.parametrize("task", HEADS)
def test_cached_states_give_the_metrics_of_the_waveforms(tiny, demo_corpus, upstream, task):
    source = data(demo_corpus, upstream, task)
    probe = module(tiny, upstream, source.classes, task, "weighted_sum")
    torch.nn.init.normal_(probe.head.linear.weight)  # spread the guesses
    cache = CachedStates(source, probe.upstream, CPU, layers=probe.layers, batch_size=4)
    figures, confusions, rows = [], [], []
    for batches in (source.ordered_loader("test"), cache.test_dataloader()):
        probe.on_test_epoch_start()
        for batch in batches:
            probe.test_step(batch, 0)
        figures.append(probe.objective.compute())
        rows.append([row["utterance"] for row in probe.objective.all_rows()])
        parts = getattr(probe.objective, "slots", [probe.objective])
        confusions.append([part.counts() for part in parts if task != "phone_recognition"])
    assert figures[1] == pytest.approx(figures[0], abs=1e-3)
    assert rows[0] == rows[1] == sorted(source.cuts("test").ids)
    for one, other in zip(*confusions, strict=True):
        assert (one - other).abs().sum() <= 2e-3 * one.sum()  # a tie may fall otherwise


def test_training_goes_through_all_utterances_every_epoch_in_another_order(demo_corpus, upstream):
    source = data(demo_corpus, upstream, "speaker")
    cache = CachedStates(source, upstream, CPU, layers=LayerSelection("last", 3), batch_size=5)
    first = sorted(state.hidden[0, 0, 0].item() for state in cache.states["train"])  # tells the utterances apart
    per_epoch = -(-len(first) // 5)
    batches = list(islice(cache.train_dataloader(), 3 * per_epoch))
    assert [tuple(batch["position"]) for batch in batches] == [(epoch, n) for epoch in range(3) for n in range(per_epoch)]
    orders = []
    for epoch in range(3):
        rows = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch["hidden"].unbind(1)]
        orders.append([row[0, 0, 0].item() for row in rows])
        assert sorted(orders[-1]) == first
    assert orders[0] != orders[1] != orders[2]
    again = CachedStates(source, upstream, CPU, layers=LayerSelection("last", 3), batch_size=5)
    for one, other in zip(batches[:4], again.train_dataloader(), strict=False):
        assert one["hidden"].equal(other["hidden"])
        assert one["labels"].equal(other["labels"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_a_cache(demo_corpus, upstream, world_size):
    source = data(demo_corpus, upstream, "speaker")
    cache = CachedStates(source, upstream, CPU, layers=LayerSelection("last", 3), batch_size=2)
    whole = list(cache.test_dataloader()), list(islice(cache.train_dataloader(), 30))
    shares = []
    for rank in range(world_size):
        cache.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, overfit_batches=0)
        shares.append((list(cache.test_dataloader()), list(islice(cache.train_dataloader(), 30 // world_size))))
    for place in (0, 1):
        together = [batch for share in shares for batch in share[place]]
        assert sorted(batch["position"] for batch in together) == sorted(batch["position"] for batch in whole[place])
        for batch in together:
            (same,) = (other for other in whole[place] if other["position"] == batch["position"])
            assert same["ids"] == batch["ids"]
            assert same["hidden"].equal(batch["hidden"])
    assert [batch["position"] for turn in zip(*(share[1] for share in shares), strict=True) for batch in turn] == [
        batch["position"] for batch in whole[1]
    ]


def test_states_keep_their_own_length_and_the_labels_of_their_frames(demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    states = compute_states(source, "valid", upstream, CPU, LayerSelection("weighted_sum", 3))
    cuts = {cut.id: cut for cut in source.cuts("valid")}
    order = [name for batch in source.ordered_loader("valid") for name in batch["ids"]]
    assert len(states) == len(order) == len(cuts)
    for state, name in zip(states, order, strict=True):
        assert isinstance(state, State)
        count = ((cuts[name].num_samples - 400) // 160 + 1) // 3
        assert state.hidden.shape == (3, count, 24)
        own = source.labels.encode(cuts[name], source.index)
        assert state.labels[: len(own)].equal(own)
        assert (state.labels[len(own) :] == IGNORED).all()
        assert (state.id, state.speaker) == (name, cuts[name].supervisions[0].speaker)


@pytest.mark.parametrize(("layers", "kept"), [("last", [2]), ([0, 2], [0, 2]), ("weighted_sum", [0, 1, 2]), (-3, [0])])
def test_only_the_chosen_states_are_kept(demo_corpus, upstream, layers, kept):
    source = data(demo_corpus, upstream, "speaker")
    states = compute_states(source, "valid", upstream, CPU, LayerSelection(layers, 3))
    for batch in source.ordered_loader("valid"):
        with torch.no_grad():
            hidden, lengths = upstream(batch["waveforms"], batch["lengths"])
        for row, (name, length) in enumerate(zip(batch["ids"], lengths.tolist(), strict=True)):
            (state,) = (state for state in states if state.id == name)
            assert state.hidden.equal(hidden[kept, row, :length])


def test_more_states_than_memory_holds_are_refused(monkeypatch, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    seconds = sum(cut.duration for role in ("train", "valid", "test") for cut in source.cuts(role))
    gib = seconds * 100 / 3 * 3 * 24 * 4 / 2**30  # three states of 24 numbers every 30 ms
    every = LayerSelection("weighted_sum", 3)
    monkeypatch.setattr("audiot.downstream.cache.MAX_GIB", 0.9 * gib)
    with pytest.raises(ValueError, match=r"would take .* GiB of memory, more than .*: set downstream.cache=false, or use fewer"):
        CachedStates(source, upstream, CPU, layers=every)
    CachedStates(source, upstream, CPU, layers=LayerSelection([0, 2], 3))
    monkeypatch.setattr("audiot.downstream.cache.MAX_GIB", 1.1 * gib)
    CachedStates(source, upstream, CPU, layers=every)


def test_batches_are_padded_with_zeros_and_ignored_labels(demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    cache = CachedStates(source, upstream, CPU, layers=LayerSelection("last", 3), batch_size=6)
    batch = next(iter(cache.val_dataloader()))
    assert batch["hidden"].shape[:2] == (1, 6)
    assert len(set(batch["lengths"].tolist())) > 1
    cuts = {cut.id: cut for cut in source.cuts("valid")}
    for row, length in enumerate(batch["lengths"].tolist()):
        assert not batch["hidden"][:, row, length:].any()
        frames = (cuts[batch["ids"][row]].num_samples - 400) // 160 + 1
        assert length == frames // 3
        assert (batch["labels"][row, frames:] == IGNORED).all()
        assert (batch["labels"][row, : 3 * length] != IGNORED).any()


def test_a_probe_learns_from_cached_states(tiny, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes, "phone", "weighted_sum").train()
    cache = CachedStates(source, probe.upstream, CPU, layers=probe.layers)
    assert not probe.upstream.training
    (batch,) = islice(cache.train_dataloader(), 1)
    optimizer = torch.optim.Adam([*probe.head.parameters(), *probe.layers.parameters()], lr=0.05)
    losses = losses_of(probe, batch, optimizer, 15)
    assert losses[-1] < losses[0] - 0.3
    assert probe.layers.logits.grad.abs().sum() > 0


def test_a_features_upstream_can_be_cached(tiny, demo_corpus):
    upstream = FeaturesUpstream(tiny["features"], context=3)
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes, "phone", "last")
    cached = next(iter(CachedStates(source, upstream, CPU, layers=probe.layers, batch_size=100).test_dataloader()))
    scores, lengths = probe(cached)
    row = 0
    for batch in source.ordered_loader("test"):
        expected, counts = probe(batch)
        for number, count in enumerate(counts.tolist()):
            assert lengths[row] == count
            torch.testing.assert_close(scores[row, :count], expected[number, :count], rtol=1e-4, atol=1e-5)
            row += 1
    assert row == len(scores)


def test_kept_states_count_the_frames_that_were_spoken(tiny, upstream, demo_corpus):
    source = data(demo_corpus, upstream)
    model = module(tiny, upstream, source.classes, "phone", "last")
    waveforms = next(iter(source.ordered_loader("valid")))
    states = CachedStates(source, model.upstream, CPU, layers=model.layers, batch_size=len(waveforms["lengths"]))
    kept = next(iter(states.val_dataloader()))
    spoken = sum(((length - 400) // 160 + 1) // 3 * 3 for length in waveforms["lengths"].tolist())  # 25 ms every 10 ms, by threes
    assert model.frames(waveforms) == spoken
    assert set(kept["ids"]) == set(waveforms["ids"])
    assert model.frames(kept) == spoken
