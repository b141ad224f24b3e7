"""Cached hidden states give what the waveforms give."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import IGNORED, FrameLabels, UtteranceLabel
from audiot.downstream.cache import CachedStates, compute_states
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import FeaturesUpstream, random_encoder

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
CPU = torch.device("cpu")
HEADS = {"phone": "FrameClassifier", "speaker": "UtteranceClassifier"}


@pytest.fixture(scope="module")
def upstream(tiny):
    return random_encoder(0, features=tiny["features"], model=tiny["model"])


def data(corpus, upstream, task="phone", **options):
    labels = FrameLabels("phone", upstream.features) if task == "phone" else UtteranceLabel("speaker")
    return SpeechDataModule(corpus, task, batch_s=8.0, num_buckets=2, num_workers=0, labels=labels, **options)


def module(tiny, upstream, classes, task, layers):
    torch.manual_seed(1)
    head = {"_target_": f"audiot.downstream.heads.{HEADS[task]}"}
    made = DownstreamModule(upstream.config, head, classes, layers, False, tiny["optimizer"], tiny["scheduler"])
    made.upstream.load_state_dict(upstream.state_dict())
    if layers == "weighted_sum":
        torch.nn.init.normal_(made.layers.logits)
    return made.eval()


def label_rows(batch, row):
    return batch["labels"][row] if batch["labels"].ndim == 2 else batch["labels"][row : row + 1]


@pytest.mark.parametrize("layers", ["last", "weighted_sum"])
@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_cached_states_give_the_scores_of_the_waveforms(tiny, demo_corpus, upstream, task, layers):
    source = data(demo_corpus, upstream, task)
    probe = module(tiny, upstream, source.classes, task, layers)
    cache = CachedStates(source, probe.upstream, CPU, last_only=layers == "last", batch_size=5)
    for role, loader in [("valid", cache.val_dataloader), ("test", cache.test_dataloader)]:
        expected, found = [], []
        for batches, rows in [(source.ordered_loader(role), expected), (loader(), found)]:
            for batch in batches:
                scores, lengths = probe(batch)
                for row, length in enumerate(lengths.tolist()):
                    own = slice(0, 3 * length) if task == "phone" else slice(None)
                    rows.append((scores[row][own], label_rows(batch, row)[own]))
        assert len(found) == len(expected) == len(source.cuts(role))
        for (scores, labels), (cached_scores, cached_labels) in zip(expected, found, strict=True):
            torch.testing.assert_close(cached_scores, scores, rtol=1e-5, atol=1e-5)
            assert cached_labels.equal(labels)


@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_cached_states_give_the_metrics_of_the_waveforms(tiny, demo_corpus, upstream, task):
    source = data(demo_corpus, upstream, task)
    probe = module(tiny, upstream, source.classes, task, "weighted_sum")
    cache = CachedStates(source, probe.upstream, CPU, last_only=False, batch_size=4)
    figures, confusions = [], []
    for batches in (source.test_dataloader(), cache.test_dataloader()):
        for batch in batches:
            probe.test_step(batch, 0)
        figures.append({name: value.item() for name, value in probe.test_metrics.compute().items()})
        confusions.append(probe.confusion.compute())
        probe.test_metrics.reset()
        probe.confusion.reset()
    assert figures[1] == pytest.approx(figures[0], abs=1e-3)
    assert (confusions[1] - confusions[0]).abs().sum() <= 2e-3 * confusions[0].sum()  # a tie may fall otherwise


def test_training_goes_through_all_utterances_every_epoch_in_another_order(demo_corpus, upstream):
    source = data(demo_corpus, upstream, "speaker")
    cache = CachedStates(source, upstream, CPU, last_only=True, batch_size=5)
    first = sorted(states[0, 0, 0].item() for states, _ in cache.states["train"])  # tells the utterances apart
    per_epoch = -(-len(first) // 5)
    batches = list(islice(cache.train_dataloader(), 3 * per_epoch))
    assert [tuple(batch["position"]) for batch in batches] == [(epoch, n) for epoch in range(3) for n in range(per_epoch)]
    orders = []
    for epoch in range(3):
        rows = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch["hidden"].unbind(1)]
        orders.append([row[0, 0, 0].item() for row in rows])
        assert sorted(orders[-1]) == first
    assert orders[0] != orders[1] != orders[2]
    again = CachedStates(source, upstream, CPU, last_only=True, batch_size=5)
    for one, other in zip(batches[:4], again.train_dataloader(), strict=False):
        assert one["hidden"].equal(other["hidden"])
        assert one["labels"].equal(other["labels"])


def test_states_keep_their_own_length_and_the_labels_of_their_frames(demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    states = compute_states(source, "valid", upstream, CPU, last_only=False)
    cuts = {cut.id: cut for cut in source.cuts("valid")}
    order = [name for batch in source.ordered_loader("valid") for name in batch["ids"]]
    assert len(states) == len(order) == len(cuts)
    for (hidden, labels), name in zip(states, order, strict=True):
        count = ((cuts[name].num_samples - 400) // 160 + 1) // 3
        assert hidden.shape == (3, count, 24)
        assert labels.equal(source.labels.encode(cuts[name], source.index)[: 3 * count])


def test_batches_are_padded_with_zeros_and_ignored_labels(demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    batch = next(iter(CachedStates(source, upstream, CPU, last_only=True, batch_size=6).val_dataloader()))
    assert batch["hidden"].shape[:2] == (1, 6)
    assert len(set(batch["lengths"].tolist())) > 1
    for row, length in enumerate(batch["lengths"].tolist()):
        assert not batch["hidden"][:, row, length:].any()
        assert (batch["labels"][row, 3 * length :] == IGNORED).all()
        assert (batch["labels"][row, : 3 * length] != IGNORED).any()


def test_a_probe_learns_from_cached_states(tiny, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes, "phone", "weighted_sum").train()
    cache = CachedStates(source, probe.upstream, CPU, last_only=False)
    assert not probe.upstream.training
    (batch,) = islice(cache.train_dataloader(), 1)
    optimizer = torch.optim.Adam([*probe.head.parameters(), *probe.layers.parameters()], lr=0.05)
    losses = []
    for _ in range(15):
        loss = probe.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert probe.layers.logits.grad.abs().sum() > 0


def test_a_features_upstream_can_be_cached(tiny, demo_corpus):
    upstream = FeaturesUpstream(tiny["features"], context=3)
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes, "phone", "last")
    cached = next(iter(CachedStates(source, upstream, CPU, last_only=True, batch_size=100).test_dataloader()))
    scores, lengths = probe(cached)
    row = 0
    for batch in source.test_dataloader():
        expected, counts = probe(batch)
        for number, count in enumerate(counts.tolist()):
            assert lengths[row] == count
            torch.testing.assert_close(scores[row, :count], expected[number, :count], rtol=1e-4, atol=1e-5)
            row += 1
    assert row == len(scores)
