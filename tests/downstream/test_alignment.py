"""Forced alignment against all paths, intervals that cover the utterance, agreement by hand, and the command on tiny speech."""

from __future__ import annotations

import csv
from itertools import groupby, pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from lhotse import CutSet, MonoCut, SupervisionSegment
from lhotse.supervision import AlignmentItem
from omegaconf import OmegaConf

from audiot.commands.align import main as align_command
from audiot.data.corpora.manifest import ManifestCorpus
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import FrameLabels, PhoneSequence, tier_of
from audiot.downstream.alignment import (
    Agreement,
    Aligner,
    Span,
    align,
    frame_edges,
    intervals,
    token_tier,
    with_tiers,
    word_tiers,
)
from audiot.downstream.classifier import load_classifier
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import random_encoder
from audiot.features import LogMel

# Forced alignment


def peaked(path, num_outputs, sharpness, seed):
    """Log-probabilities (T, C) that peak at a path's outputs, with noise."""
    noise = torch.randn(len(path), num_outputs, generator=torch.Generator().manual_seed(seed))
    return (noise + sharpness * torch.nn.functional.one_hot(torch.tensor(path), num_outputs)).log_softmax(-1)


def best_path(log_probabilities, outputs):
    """The best of all paths that spell the outputs, by trying every one."""
    frames = len(log_probabilities)
    paths = product(sorted({0, *outputs}), repeat=frames)
    spelling = (path for path in paths if [output for output, _ in groupby(path) if output] == outputs)
    return max(spelling, key=lambda path: sum(log_probabilities[frame, output].item() for frame, output in enumerate(path)))


CASES = [
    ([0, 1, 0, 2, 2, 0, 3], 4.0),
    ([1, 0, 1, 1, 0, 0, 2], 4.0),  # equal tokens, a blank between them
    ([1, 2, 3, 1, 2, 0, 0], 1.0),
    ([0, 2, 0, 0, 0, 0, 0], 0.0),  # nothing but noise
    ([1, 0, 1, 0, 1, 0, 1], 0.5),  # not a frame to spare
]


@pytest.mark.parametrize(("path", "sharpness"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_alignment_is_the_best_of_all_paths(path, sharpness, seed):
    log_probabilities = peaked(path, 4, sharpness, seed)
    outputs = [output for output, _ in groupby(path) if output]
    spans, confidence = align(log_probabilities, [output - 1 for output in outputs])
    expected = best_path(log_probabilities, outputs)
    probabilities = [log_probabilities[frame, output].exp().item() for frame, output in enumerate(expected)]
    assert confidence == pytest.approx(sum(probabilities) / len(path), rel=1e-5)
    at, found = 0, iter(spans)
    for output, stretch in groupby(expected):
        end = at + len(list(stretch))
        if output:
            span = next(found)
            assert (span.start, span.end) == (at, end)
            assert span.score == pytest.approx(sum(probabilities[at:end]) / (end - at), rel=1e-5)
        at = end
    assert next(found, None) is None


def test_a_target_that_does_not_fit_its_frames_is_refused():
    log_probabilities = peaked([1, 0, 1], 3, 2.0, 0)
    assert len(align(log_probabilities, [0, 0])[0]) == 2
    with pytest.raises(ValueError, match="3 tokens and 1 blanks between equal ones do not fit 3 frames"):
        align(log_probabilities, [0, 0, 1])
    with pytest.raises(ValueError, match="0 tokens"):
        align(log_probabilities, [])


# Intervals


def test_tokens_meet_in_the_middle_and_long_blanks_hold_a_silence():
    spans = [Span(1, 2, 0.9), Span(5, 7, 0.8), Span(8, 9, 0.7), Span(20, 21, 0.6)]
    assert intervals(spans, 30, min_silence=6) == [
        (0, 3, 0),  # one blank before it: its own; three behind it, of which it gets one
        (3, 7, 1),
        (7, 12, 2),  # eleven blanks follow: three its own,
        (12, 17, None),  # three the next one's
        (17, 24, 3),
        (24, 30, None),
    ]
    assert intervals(spans, 21, min_silence=100) == [(0, 3, 0), (3, 7, 1), (7, 14, 2), (14, 21, 3)]
    assert intervals(spans[:2], 9, min_silence=3) == [(0, 3, 0), (3, 8, 1), (8, 9, None)]
    assert intervals(spans[:1], 4, min_silence=0) == [(0, 1, None), (1, 2, 0), (2, 4, None)]


@pytest.mark.parametrize("seed", range(20))
def test_intervals_partition_the_frames(seed):
    generator = torch.Generator().manual_seed(seed)
    num_frames = int(torch.randint(20, 60, (), generator=generator))
    edges = sorted(torch.randperm(num_frames, generator=generator)[:12].tolist())
    spans = [Span(start, end, 0.5) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    for min_silence in range(12):
        found = intervals(spans, num_frames, min_silence)
        assert (found[0][0], found[-1][1]) == (0, num_frames)
        assert all(start < end for start, end, _ in found)
        assert all(one[1] == other[0] for one, other in pairwise(found))
        assert [number for _, _, number in found if number is not None] == list(range(len(spans)))
        assert not any(one[2] is None and other[2] is None for one, other in pairwise(found))
        for start, end, number in found:
            if number is None:  # as long as the blanks around it less what the tokens on its sides take
                sides = (start > 0) + (end < num_frames)
                before = max((span.end for span in spans if span.end <= start), default=0)
                behind = min((span.start for span in spans if span.start >= end), default=num_frames)
                assert end - start == behind - before - sides * (min_silence // 2)
            else:
                assert start <= spans[number].start < spans[number].end <= end


def test_edges_lie_between_the_centres_of_frames_and_at_the_ends_of_the_audio():
    edges = frame_edges(LogMel(), 3, 1000)
    # Frames of 400 samples, one each 160: their centres are samples 200, 360, 520.
    assert edges == pytest.approx([0.0, 280 / 16000, 440 / 16000, 1000 / 16000])


def test_a_tier_covers_the_cut_without_gaps_or_overlaps():
    features, num_samples = LogMel(), 12345
    frames = features.num_frames(num_samples)
    spans = [Span(3, 5, 0.9), Span(8, 9, 0.5), Span(40, 41, 0.25)]
    edges = frame_edges(features, frames, num_samples)
    items = token_tier(["A", "B", "A"], spans, edges, min_silence=10, offset_s=1.7)
    assert [item.symbol for item in items] == ["A", "B", "SIL", "A", "SIL"]
    assert [item.score for item in items] == [0.9, 0.5, None, 0.25, None]
    assert items[0].start == 1.7
    assert items[-1].end == pytest.approx(1.7 + num_samples / 16000, abs=1e-8)
    assert all(one.end == other.start for one, other in pairwise(items))
    assert items[1].start == pytest.approx(1.7 + (6 * 160 + 120) / 16000, abs=1e-7)  # halfway between centres 5 and 6


def test_words_last_from_their_first_to_their_last_character():
    edges = [frame / 100 for frame in range(61)]
    spans = [Span(start, start + 1, score) for start, score in ((10, 0.5), (12, 0.7), (14, 0.1), (30, 0.9), (33, 0.4), (36, 0.8))]
    tiers = word_tiers("AB C D", spans, edges, min_silence=8)  # spans of a space at 14 and 33
    assert [(item.symbol, item.start, item.end) for item in tiers["character"]] == [
        ("SIL", 0.0, 0.06),
        ("A", 0.06, 0.11),
        ("B", 0.11, 0.17),
        ("SIL", 0.17, 0.26),
        ("C", 0.26, 0.33),  # the space between C and D counts as a blank
        ("D", 0.33, 0.41),
        ("SIL", 0.41, 0.6),
    ]
    assert [(item.symbol, item.start, item.end, item.score) for item in tiers["word"]] == [
        ("SIL", 0.0, 0.06, None),
        ("AB", 0.06, 0.17, 0.6),
        ("SIL", 0.17, 0.26, None),
        ("C", 0.26, 0.33, 0.9),
        ("D", 0.33, 0.41, 0.8),
        ("SIL", 0.41, 0.6, None),
    ]


def test_a_pause_within_a_word_belongs_to_the_word():
    edges = [frame / 100 for frame in range(41)]
    tiers = word_tiers("AB", [Span(2, 3, 0.5), Span(30, 31, 0.7)], edges, min_silence=8)
    assert [item.symbol for item in tiers["character"]] == ["A", "SIL", "B", "SIL"]
    assert [(item.symbol, item.start, item.end) for item in tiers["word"]] == [("AB", 0.0, 0.35), ("SIL", 0.35, 0.4)]


def test_new_tiers_replace_those_of_their_names_and_keep_the_others():
    def segment(name, alignment):
        return SupervisionSegment(name, "rec", 0.0, 1.0, text=name, alignment=alignment)

    old, kept, new = ([AlignmentItem(symbol, 0.0, 1.0)] for symbol in ("old", "kept", "new"))
    cut = MonoCut("cut", 0.0, 1.0, 0, [segment("one", {"phone": old, "word": kept}), segment("two", {"phone": old})])
    changed = with_tiers(cut, {"phone": new})
    assert tier_of(changed, "phone") == [(0.0, 1.0, "new")]
    assert tier_of(changed, "word") == [(0.0, 1.0, "kept")]
    assert tier_of(cut, "phone") == [(0.0, 1.0, "old")] * 2


# Agreement


def items(*parts):
    return [AlignmentItem(symbol, start, round(end - start, 6)) for symbol, start, end in parts]


def test_agreement_by_hand():
    found = items(("SIL", 0.0, 0.1), ("A", 0.1, 0.2), ("B", 0.2, 0.35), ("C", 0.35, 0.5))
    reference = items(("sp", 0.0, 0.12), ("A0", 0.12, 0.2), ("X", 0.2, 0.3), ("C0", 0.3, 0.45))
    agreement = Agreement()
    names = {"sp": "SIL", "A0": "A", "C0": "C", "X": "X"}
    centers = [0.005 + 0.01 * frame for frame in range(50)]
    agreement.add(found, reference, centers, names.__getitem__)
    # Frames 10 to 11 are A against silence, 20 to 34 are B against X and C; the last five are not in the reference.
    assert (agreement.same, agreement.frames) == (10 + 8 + 10, 45)
    errors = [0.02, 0.0, 0.05, 0.05]  # A's start and end, C's
    assert agreement.boundaries == len(errors)
    assert agreement.error_s == pytest.approx(sum(errors))
    assert str(agreement) == "62.2% of frames, boundaries 30 ms off on average, 50% within 20 ms"
    strangers = Agreement()
    strangers.add(found, items(("Q", 0.0, 0.5)), centers)
    assert str(strangers) == "0.0% of frames, no token in common"


# A whole corpus


HEAD = {"_target_": "audiot.downstream.heads.FrameClassifier"}
PHONES = {"_target_": "audiot.data.labels.PhoneSequence", "tier": "phone"}
CHARACTERS = {"_target_": "audiot.data.labels.CharacterLabels", "remove": ".,?", "alphabet": " 'ABCDEFGHIJKLMNOPQRSTUVWXYZ"}


@pytest.fixture(scope="module")
def trained(tiny, demo_corpus, tmp_path_factory):
    """Function of labels: a run of a barely trained CTC model."""

    def make(labels, unit):
        run = tmp_path_factory.mktemp(unit)
        torch.manual_seed(0)
        upstream = random_encoder(0, features=tiny["features"], model=tiny["model"])
        reader = instantiate(labels, features=upstream.features)
        data = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_buckets=2, num_workers=0, labels=reader)
        objective = {"_target_": "audiot.downstream.ctc.CTC", "unit": unit}
        settings = tiny["optimizer"], tiny["scheduler"]
        module = DownstreamModule(upstream.config, HEAD, objective, data.classes, "last", True, *settings)
        off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
        trainer = pl.Trainer(accelerator="cpu", max_steps=3, limit_val_batches=0, **dict.fromkeys(off, False))
        trainer.fit(module, data)
        trainer.save_checkpoint(run / "checkpoints" / "best.ckpt")
        (run / ".hydra").mkdir()
        OmegaConf.save({"downstream": {"task": f"{unit}s", "labels": labels}}, run / ".hydra" / "config.yaml")
        return run

    return make


@pytest.fixture(scope="module")
def phone_run(trained):
    return trained(PHONES, "phone")


def command(run, corpus, output, monkeypatch, **changes):
    """Run `audiot align` on a prepared corpus. Returns its output."""
    said = []
    monkeypatch.setattr("audiot.commands.align.open_corpus", lambda cfg: corpus)
    monkeypatch.setattr("audiot.commands.align.say", said.append)
    settings = {"run": str(run), "output": str(output), "min_silence_s": 0.1, "lexicon": None, "device": "cpu"}
    align_command(OmegaConf.create(settings | {"trusted": ["audiot"], "data": {"batch_s": 8.0}} | changes))
    return "\n".join(said)


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_utterance_of_every_split_is_aligned_and_can_be_trained_on(phone_run, demo_corpus, tmp_path, monkeypatch):
    said = command(phone_run, demo_corpus, tmp_path, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{split}.jsonl.gz" for split in demo_corpus.counts),
        "alignments.csv",
        "rejected.csv",
    }
    assert rows(tmp_path / "rejected.csv") == []
    table = {(row["split"], row["utterance"]): row for row in rows(tmp_path / "alignments.csv")}
    assert len(table) == sum(demo_corpus.counts.values())
    classifier = load_classifier(phone_run)
    labels, frames = PhoneSequence(classifier.features), FrameLabels("phone", classifier.features, tolerance_s=0.0)
    same = total = 0
    for split in demo_corpus.counts:
        before, after = list(demo_corpus.cuts(split)), list(CutSet.from_jsonl(tmp_path / f"{split}.jsonl.gz"))
        assert [cut.id for cut in after] == [cut.id for cut in before]
        for old, new in zip(before, after, strict=True):
            assert Path(new.recording.sources[0].source).is_absolute()
            tier = tier_of(new, "phone")
            assert [symbol for _, _, symbol in tier if symbol != "SIL"] == labels.names(old)
            assert (tier[0][0], tier[-1][1]) == (0.0, pytest.approx(old.duration, abs=1e-8))
            assert all(one[1] == other[0] for one, other in pairwise(tier))
            frames.check(new)
            index = {symbol: number for number, symbol in enumerate(sorted({item[2] for item in tier + tier_of(old, "phone")}))}
            ours, theirs = frames.encode(new, index), frames.encode(old, index)
            same, total = same + int(((ours == theirs) & (theirs >= 0)).sum()), total + int((theirs >= 0).sum())
            row = table[split, old.id]
            scores = [item.score for item in new.supervisions[0].alignment["phone"] if item.score is not None]
            assert int(row["tokens"]) == len(scores)
            assert float(row["score"]) == pytest.approx(sum(scores) / len(scores), abs=2e-4)
            assert float(row["worst_score"]) == pytest.approx(min(scores), abs=2e-4)
    # Frames left over by stacking have labels, and no output of the model.
    share = float(said.split("phone tier  ")[1].split("%")[0])
    assert share == pytest.approx(100 * same / total, abs=1.5)
    last = said.splitlines()[-1]
    assert last.startswith(f"next:   audiot finetune data=manifest data.train={tmp_path / 'train.jsonl.gz'} data.valid=")
    assert last.endswith("downstream=phone_linear upstream=features")
    splits = (
        ManifestCorpus(*(tmp_path / f"{role}.jsonl.gz" for role in ("train", "valid", "test"))).manifests(progress=False).splits
    )
    assert {role: len(cuts) for role, cuts in splits.items()} == {role: demo_corpus.counts[role] for role in splits}


def test_a_batch_aligns_as_its_utterances_alone(phone_run, demo_corpus):
    classifier = load_classifier(phone_run)
    cuts = list(demo_corpus.cuts("train"))[:5]
    labels = PhoneSequence(classifier.features)
    together = Aligner(classifier, labels, 0.1, 30.0)(cuts)
    for cut, found in zip(cuts, together, strict=True):
        outputs, lengths = classifier.outputs(torch.from_numpy(cut.load_audio()))
        index = [classifier.classes.index(name) for name in labels.names(cut)]
        spans, confidence = align(outputs[0].log_softmax(-1), index)
        assert [span[:2] for span in found.spans] == [span[:2] for span in spans]
        assert found.confidence == pytest.approx(confidence, abs=1e-5)
        assert found.frames == int(lengths[0])


class Corpus(SimpleNamespace):
    """A prepared corpus of cuts in memory."""

    def cuts(self, split):
        return self.splits[split]

    def check_files(self, what):
        """Its audio is in files."""


def test_what_cannot_be_aligned_is_left_out_with_its_reason(phone_run, demo_corpus, tmp_path, monkeypatch):
    good, silent, long, strange = list(demo_corpus.cuts("train"))[:4]
    silent.supervisions = []
    long.supervisions[0].alignment["phone"] = [AlignmentItem("AH", 0.001 * number, 0.001) for number in range(900)]
    strange.supervisions[0].alignment["phone"][1] = AlignmentItem("QQ", 0.1, 0.1)
    cuts = [silent, long, good, strange]
    corpus = Corpus(counts={"train": 4}, task_splits={}, sample_rate=16000, splits={"train": cuts})
    said = command(phone_run, corpus, tmp_path / "out", monkeypatch)
    assert "1 utterances" in said
    assert f"3 left out: see {tmp_path / 'out' / 'rejected.csv'}" in said
    reasons = {row["utterance"]: row["reason"] for row in rows(tmp_path / "out" / "rejected.csv")}
    assert "no alignment tier 'phone'" in reasons[silent.id]
    assert "longer than its input: 900 tokens and 899 blanks" in reasons[long.id]
    assert "'QQ'" in reasons[strange.id]
    assert "not one of the" in reasons[strange.id]
    assert [cut.id for cut in CutSet.from_jsonl(tmp_path / "out" / "train.jsonl.gz")] == [good.id]


def test_nothing_is_written_but_the_reasons_when_nothing_can_be_aligned(phone_run, demo_corpus, tmp_path, monkeypatch):
    (cut,) = list(demo_corpus.cuts("train"))[:1]
    cut.supervisions = []
    corpus = Corpus(counts={"train": 1}, task_splits={}, sample_rate=16000, splits={"train": [cut]})
    with pytest.raises(ValueError, match=r"no utterance could be aligned, see .*rejected\.csv; the first: .*no alignment tier"):
        command(phone_run, corpus, tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["rejected.csv"]


def test_phones_come_from_a_lexicon_where_one_is_given(phone_run, demo_corpus, tmp_path, monkeypatch):
    cuts = list(demo_corpus.cuts("test"))[:2]
    words = sorted({word for cut in cuts for word in cut.supervisions[0].text.split()})
    (tmp_path / "lexicon.txt").write_text("".join(f"{word} AH T\n" for word in words))
    for cut in cuts:
        cut.supervisions[0].alignment = None
    corpus = Corpus(counts={"test": 2}, task_splits={}, sample_rate=16000, splits={"test": cuts})
    said = command(phone_run, corpus, tmp_path, monkeypatch, lexicon=str(tmp_path / "lexicon.txt"))
    assert "phone tier" not in said  # there is none to compare with
    for old, new in zip(cuts, CutSet.from_jsonl(tmp_path / "test.jsonl.gz"), strict=True):
        phones = [symbol for _, _, symbol in tier_of(new, "phone") if symbol != "SIL"]
        assert phones == ["AH", "T"] * len(old.supervisions[0].text.split())


def test_characters_get_a_tier_and_words_another(trained, demo_corpus, tmp_path, monkeypatch):
    run = trained(CHARACTERS, "character")
    said = command(run, demo_corpus, tmp_path, monkeypatch)
    assert "downstream.labels.tier=character" in said
    for old, new in zip(demo_corpus.cuts("valid"), CutSet.from_jsonl(tmp_path / "valid.jsonl.gz"), strict=True):
        words = old.supervisions[0].text.upper().translate(str.maketrans("", "", ".,?")).split()
        assert [symbol for _, _, symbol in tier_of(new, "word") if symbol != "SIL"] == words
        assert [symbol for _, _, symbol in tier_of(new, "character") if symbol != "SIL"] == list("".join(words))
        assert tier_of(new, "phone") == tier_of(old, "phone")
        for name in ("word", "character"):
            tier = tier_of(new, name)
            assert (tier[0][0], tier[-1][1]) == (0.0, pytest.approx(old.duration, abs=1e-8))
            assert all(one[1] == other[0] for one, other in pairwise(tier))
    with pytest.raises(ValueError, match="knows characters, not phones"):
        command(run, demo_corpus, tmp_path, monkeypatch, lexicon="lexicon.txt")


def test_settings_that_cannot_work_are_refused(phone_run, demo_corpus, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="min_silence_s must be at least 0"):
        command(phone_run, demo_corpus, tmp_path, monkeypatch, min_silence_s=-1)
    corpus = Corpus(counts={}, task_splits={}, sample_rate=8000, splits={})
    with pytest.raises(ValueError, match=r"the corpus is at 8000 Hz.*set data\.prepare\.sample_rate=16000"):
        command(phone_run, corpus, tmp_path, monkeypatch)
    content = torch.load(phone_run / "checkpoints" / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["objective"] = {"_target_": "audiot.downstream.objectives.Classification"}
    content["hyper_parameters"]["classes"].append("one more, in place of the blank")
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".hydra").mkdir()
    OmegaConf.save({"downstream": {"task": "keyword", "labels": PHONES}}, run / ".hydra" / "config.yaml")
    torch.save(content, run / "checkpoints" / "best.ckpt")
    with pytest.raises(ValueError, match="downstream=keyword: alignment needs one with CTC"):
        command(run, demo_corpus, tmp_path, monkeypatch)
