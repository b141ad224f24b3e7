"""Probing and fine-tuning: trained parameters and metrics."""

from __future__ import annotations

import logging
import math
from collections import Counter
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from learning import losses_of
from torch import nn

from audiot.data.batches import to_device
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import IGNORED, CharacterLabels, FrameLabels, UtteranceLabel
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import FeaturesUpstream, random_encoder

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
FRAMES = {"_target_": "audiot.downstream.heads.FrameClassifier"}
UTTERANCES = {"_target_": "audiot.downstream.heads.UtteranceClassifier"}
CLASSIFICATION = {"_target_": "audiot.downstream.objectives.Classification"}


@pytest.fixture(scope="module")
def upstream(tiny):
    return random_encoder(0, features=tiny["features"], model=tiny["model"])


def data(corpus, upstream, task="phone", **options):
    if task == "asr":
        labels = CharacterLabels(upstream.features, remove=".,;?!", alphabet=" 'ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    else:
        labels = FrameLabels("phone", upstream.features) if task == "phone" else UtteranceLabel("speaker")
    return SpeechDataModule(corpus, task, batch_s=8.0, num_buckets=2, num_workers=0, labels=labels, **options)


def module(
    tiny, upstream, classes, head=FRAMES, layers="weighted_sum", train_encoder=False, top_layers=None, objective=CLASSIFICATION
):
    torch.manual_seed(1)
    made = DownstreamModule(
        upstream=upstream.config,
        head=head,
        objective=objective,
        classes=classes,
        layers=layers,
        train_encoder=train_encoder,
        top_layers=top_layers,
        optimizer=tiny["optimizer"],
        scheduler=tiny["scheduler"],
    )
    made.upstream.load_state_dict(upstream.state_dict())
    return made


def trainer(folder, **options):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    settings = {
        "accelerator": "cpu",
        "max_steps": 4,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(**settings | options)


def weights(part):
    return {name: tensor.clone() for name, tensor in part.state_dict().items()}


def changed(before, part):
    return [name for name, tensor in part.state_dict().items() if not tensor.equal(before[name])]


def test_a_frozen_upstream_stays_in_evaluation_mode_and_unchanged(tiny, demo_corpus, upstream, tmp_path):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes)
    modes = []
    probe.upstream.register_forward_hook(partial(lambda part, inputs, output: modes.append(part.training)))
    before, head, layers = weights(probe.upstream), weights(probe.head), weights(probe.layers)
    trainer(tmp_path).fit(probe, source)
    assert modes
    assert not any(modes)
    assert not changed(before, probe.upstream)
    assert changed(head, probe.head) == ["linear.weight", "linear.bias"]
    assert changed(layers, probe.layers) == ["logits"]
    assert not any(tensor.requires_grad for tensor in probe.upstream.parameters())
    assert probe.train().upstream.training is False
    assert probe.head.training


def test_fine_tuning_changes_the_whole_encoder(tiny, demo_corpus, upstream, tmp_path):
    source = data(demo_corpus, upstream)
    tuned = module(tiny, upstream, source.classes, train_encoder=True)
    modes = []
    tuned.upstream.register_forward_hook(partial(lambda part, inputs, output: modes.append(part.training)))
    before = weights(tuned.upstream)
    trainer(tmp_path).fit(tuned, source)
    assert any(modes)  # dropout acts in training
    assert not all(modes)  # and not in validation
    changes = set(changed(before, tuned.upstream))
    assert {name for name, _ in tuned.upstream.named_parameters()} <= changes


def test_probing_is_reproducible_whatever_was_drawn_before(tiny, demo_corpus, upstream, tmp_path):
    results = []
    for draws in (0, 7):
        source = data(demo_corpus, upstream)
        tuned = module(tiny, upstream, source.classes, train_encoder=True)
        torch.randn(draws)
        trainer(tmp_path).fit(tuned, source)
        results.append(weights(tuned))
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


def test_training_lowers_the_loss(tiny, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes)
    batch = to_device(next(iter(source.train_dataloader())), torch.device("cpu"))
    optimizer = torch.optim.Adam([tensor for tensor in probe.parameters() if tensor.requires_grad], lr=0.05)
    losses = losses_of(probe, batch, optimizer, 15)
    assert losses[0] == pytest.approx(torch.tensor(float(len(source.classes))).log().item(), abs=0.5)
    assert losses[-1] < losses[0] - 0.3


def plain_figures(probe, source, role, per_frame):
    """True and guessed classes of every labelled item, one utterance at a time."""
    pairs = []
    for cut in source.cuts(role):
        waveform = torch.from_numpy(cut.load_audio())
        with torch.no_grad():
            hidden, lengths = probe.upstream(waveform, torch.tensor([waveform.shape[1]]))
            scores = probe.head(probe.layers(probe.layers.pick(hidden)), lengths)[0]
        label = source.labels.encode(cut, source.index)
        if per_frame:
            pairs += [(int(label[t]), int(scores[t].argmax())) for t in range(len(scores)) if label[t] != IGNORED]
        else:
            pairs.append((int(label), int(scores.argmax())))
    return pairs


@pytest.mark.parametrize("kind", ["encoder", "features"])
@pytest.mark.parametrize("task", ["phone", "speaker"])
def test_metrics_equal_a_plain_count(tiny, demo_corpus, upstream, tmp_path, task, kind):
    listened = upstream if kind == "encoder" else FeaturesUpstream(tiny["features"], context=3)
    source = data(demo_corpus, listened, task)
    probe = module(tiny, listened, source.classes, FRAMES if task == "phone" else UTTERANCES)
    with torch.no_grad():
        nn.init.normal_(probe.head.linear.weight)  # spread the guesses
    (valid,) = trainer(tmp_path).validate(probe, source, verbose=False)
    (metrics,) = trainer(tmp_path).test(probe, source, verbose=False)
    for prefix, values in [("valid", valid), ("test", metrics)]:
        pairs = plain_figures(probe, source, prefix, task == "phone")
        hits = sum(true == guess for true, guess in pairs)
        assert values[f"{prefix}/accuracy"] == pytest.approx(hits / len(pairs), abs=2e-4 if task == "phone" else 1e-6)
    counts = Counter(pairs)
    confusion = probe.objective.counts()
    difference = sum(
        abs(int(confusion[true, guess]) - counts[true, guess])
        for true in range(len(source.classes))
        for guess in range(len(source.classes))
    )
    assert confusion.sum() == len(pairs)
    assert difference <= 2e-3 * len(pairs)  # a tie of two scores may fall otherwise in a batch
    scores = []
    for name in range(len(source.classes)):
        true = sum(count for (label, _), count in counts.items() if label == name)
        guessed = sum(count for (_, guess), count in counts.items() if guess == name)
        if true or guessed:  # a class that occurs in neither is left out of the mean
            scores.append(2 * counts[name, name] / (true + guessed))
    assert metrics["test/macro_f1"] == pytest.approx(sum(scores) / len(scores), abs=5e-3)


def test_loss_is_the_mean_cross_entropy_of_labelled_frames(tiny, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes).eval()
    batch = to_device(next(iter(source.train_dataloader())), torch.device("cpu"))
    batch["labels"][:, 5:9] = IGNORED
    loss = probe.training_step(batch, 0).item()
    scores, lengths = probe(batch)
    total = []
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):  # frames, three a state
            if batch["labels"][row, t] != IGNORED:
                total.append(-scores[row, t].log_softmax(0)[batch["labels"][row, t]].item())
    assert loss == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_last_layer_is_the_default_probe_of_the_output(tiny, demo_corpus, upstream):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes, layers="last").eval()
    batch = next(source.ordered_loader("valid"))
    hidden, lengths = probe.upstream(batch["waveforms"], batch["lengths"])
    assert probe(batch)[0].equal(probe.head(hidden[-1], lengths))


def test_a_saved_probe_loads_without_its_configs(tiny, demo_corpus, upstream, tmp_path):
    source = data(demo_corpus, upstream)
    probe = module(tiny, upstream, source.classes)
    fit = trainer(tmp_path)
    fit.fit(probe, source)
    fit.save_checkpoint(tmp_path / "probe.ckpt")
    loaded = DownstreamModule.from_checkpoint(tmp_path / "probe.ckpt")
    assert loaded.hparams["classes"] == loaded.objective.classes == source.classes
    batch = next(source.ordered_loader("test"))
    assert loaded.eval()(batch)[0].equal(probe.eval()(batch)[0])


def grouped(names):
    """Parts of an encoder to which parameter names belong."""
    return {".".join(name.removeprefix("encoder.encoder.").split(".")[: 2 if ".layers." in name else 1]) for name in names}


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("top_layers", [1, 2])
def test_top_layers_are_trained_alone(tiny, demo_corpus, tmp_path, top_layers, norm):
    upstream = random_encoder(0, features=tiny["features"], model=tiny["model"] | {"norm": norm})
    source = data(demo_corpus, upstream)
    tuned = module(tiny, upstream, source.classes, train_encoder=True, top_layers=top_layers)
    encoder = tuned.upstream.encoder.encoder
    modes = []
    for part in (encoder, encoder.dropout, *encoder.layers):
        part.register_forward_hook(partial(lambda name, part, *_: modes.append((name, part.training)), id(part)))
    before = weights(tuned.upstream)
    trainer(tmp_path).fit(tuned, source)
    expected = {f"layers.{number}" for number in range(2 - top_layers, 2)} | ({"output_norm"} if norm == "pre" else set())
    assert grouped(changed(before, tuned.upstream)) == expected
    assert grouped(name for name, tensor in tuned.upstream.named_parameters() if tensor.requires_grad) == expected
    trained = {name for name, training in modes if training}
    assert trained == {id(layer) for layer in encoder.layers[2 - top_layers :]}  # the others have no dropout
    assert any(not training for name, training in modes if name in trained)  # nor these in validation


def test_top_layers_that_cannot_be_trained_alone_are_refused(tiny):
    upstream = random_encoder(0, features=tiny["features"], model=tiny["model"])
    with pytest.raises(ValueError, match=r"downstream.top_layers=1 says what to fine-tune: set downstream.train_encoder=true"):
        module(tiny, upstream, ["a"], top_layers=1)
    for count in (0, 3):
        with pytest.raises(
            ValueError, match=rf"downstream.top_layers must be between 1 and the upstream's 2 layers, found {count}"
        ):
            module(tiny, upstream, ["a"], train_encoder=True, top_layers=count)
    shared = random_encoder(0, features=tiny["features"], model=tiny["model"] | {"share_layers": True})
    with pytest.raises(ValueError, match=r"downstream.top_layers: the layers of this encoder share their parameters"):
        module(tiny, shared, ["a"], train_encoder=True, top_layers=1)
    with pytest.raises(ValueError, match=r"upstream=features has no layers to train"):
        module(tiny, FeaturesUpstream(tiny["features"]), ["a"], train_encoder=True, top_layers=1)


RECOGNISER = {
    "_target_": "audiot.downstream.heads.RecurrentClassifier",
    "hidden_dim": 8,
    "num_layers": 1,
    "projector_dim": None,
}
CTC = {"_target_": "audiot.downstream.ctc.CTC", "unit": "character"}


@pytest.mark.parametrize("task", ["phone", "asr"])
def test_a_step_in_bfloat16_is_near_one_in_full_precision(tiny, demo_corpus, upstream, task):
    source = data(demo_corpus, upstream, task)
    parts = {"head": RECOGNISER, "objective": CTC} if task == "asr" else {}
    tuned = module(tiny, upstream, source.classes, train_encoder=True, **parts).eval()
    batch = to_device(next(iter(source.train_dataloader())), torch.device("cpu"))
    expected = tuned.training_step(batch, 0).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = tuned.training_step(batch, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.02)
    gradients = [tensor.grad for tensor in tuned.parameters() if tensor.requires_grad and tensor.grad is not None]
    assert len(gradients) > 20
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_new_module_begins_with_the_blank_prior_of_its_objective(tiny, upstream):
    torch.manual_seed(0)
    plain = module(tiny, upstream, list("ABC"), head=RECOGNISER, objective=CTC)
    torch.manual_seed(0)
    blank = module(tiny, upstream, list("ABC"), head=RECOGNISER, objective=CTC | {"blank_prior": 0.75})
    higher = (blank.head.linear.bias - plain.head.linear.bias).view(-1, 4)
    assert higher[:, 0].tolist() == pytest.approx([math.log(9)] * 3)  # 0.75 against three of 0.25 / 3
    assert not higher[:, 1:].any()


def test_a_recogniser_learns_and_is_loaded_again(tiny, demo_corpus, upstream, tmp_path):
    source = data(demo_corpus, upstream, "asr")
    parts = {"head": RECOGNISER, "objective": CTC}
    probe = module(tiny, upstream, source.classes, **parts)
    batch = to_device(next(iter(source.train_dataloader())), torch.device("cpu"))
    optimizer = torch.optim.Adam([tensor for tensor in probe.parameters() if tensor.requires_grad], lr=0.02)
    losses = losses_of(probe, batch, optimizer, 12)
    assert losses[-1] < 0.6 * losses[0]
    fit = trainer(tmp_path)
    fit.fit(probe, source)
    fit.save_checkpoint(tmp_path / "asr.ckpt")
    loaded = DownstreamModule.from_checkpoint(tmp_path / "asr.ckpt")
    (one,) = trainer(tmp_path).test(probe, source, verbose=False)
    (other,) = trainer(tmp_path).test(loaded, source, verbose=False)
    assert one == other
    assert set(one) == {"test/wer", "test/cer"}
    assert [row["utterance"] for row in loaded.objective.all_rows()] == sorted(source.cuts("test").ids)
