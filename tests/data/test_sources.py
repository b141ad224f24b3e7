"""A prepared corpus after changes of its sources."""

from __future__ import annotations

import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra.utils import get_object, instantiate
from lhotse import CutSet, Recording
from omegaconf import OmegaConf

from audiot.base.config import compose_command
from audiot.data import opening
from audiot.data import prepare as module
from audiot.data.corpora.folder import FolderCorpus
from audiot.data.corpora.fsdd import FsddCorpus
from audiot.data.corpora.librispeech import LibriSpeechCorpus
from audiot.data.corpora.manifest import ManifestCorpus
from audiot.data.manifests import Manifests
from audiot.data.prepare import PreparedCorpus, prepare
from audiot.data.sources import compare, files_below, places, snapshot


def write(path: Path, seed: int = 0, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, 4000 + seed), rate)
    return path


def later(path: Path) -> None:
    """Advance a file's modification time by a second, because clocks of file systems may be coarse."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)
    later(path)


class Project:
    """A folder of FLAC and WAV files with a table of labels, and its prepared folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.table, self.prepared = folder / "wavs", folder / "labels.csv", folder / "prepared"
        self.labels = {f"{number}.{'wav' if number % 2 else 'flac'}": f"word{number % 3}" for number in range(8)}
        for number, name in enumerate(self.labels):
            write(self.root / name, number)
        self.write_table()

    def write_table(self) -> None:
        rewrite(self.table, "path,keyword\n" + "".join(f"{name},{word}\n" for name, word in self.labels.items()))

    def corpus(self) -> FolderCorpus:
        return FolderCorpus(self.root, labels=self.table, valid="path=='0.flac'", test="path=='1.wav'")

    def open(self, when: str = "update", **options) -> PreparedCorpus:
        options = {"num_jobs": 1, "progress": False, "sources": lambda: self.corpus().sources(), **options}
        return prepare(lambda: self.corpus().manifests(False), self.prepared, when=when, **options)

    def fresh(self, folder: Path, **options) -> dict[str, bytes]:
        """Files of a preparation from scratch."""
        options = {"num_jobs": 1, "progress": False, "sources": lambda: self.corpus().sources(), **options}
        prepare(lambda: self.corpus().manifests(False), folder, **options)
        return contents(folder)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def decoded(monkeypatch):
    """Ids of the utterances that were decoded."""
    ids: list[str] = []
    process = module._process
    monkeypatch.setattr(module, "_process", lambda job, options: ids.append(job.id) or process(job, options))
    return ids


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def keywords(prepared: PreparedCorpus) -> dict[str, str]:
    cuts = (cut for split in prepared.counts for cut in prepared.cuts(split))
    return {cut.id: cut.supervisions[0].custom["keyword"] for cut in cuts}


def expected(project: Project) -> dict[str, str]:
    return {name.split(".")[0]: word for name, word in project.labels.items()}


def test_an_edited_label_counts_and_nothing_is_decoded_for_it(project, decoded, tmp_path, capsys):
    before = project.open()
    assert keywords(before) == expected(project)
    decoded.clear()
    project.labels["3.wav"] = "other"
    project.write_table()
    capsys.readouterr()
    after = project.open()
    assert keywords(after) == expected(project)
    assert decoded == []
    assert f"labels.csv edited; first: {project.table}: preparing the difference" in capsys.readouterr().out
    assert after.content != before.content
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")
    project.open()
    assert capsys.readouterr().out.count("preparing") == 0


@pytest.mark.parametrize("copy", [False, True])
def test_only_audio_that_was_changed_or_added_is_decoded(project, decoded, tmp_path, capsys, copy):
    project.open(copy=copy)
    decoded.clear()
    new = np.random.default_rng(50).uniform(-0.5, 0.5, 4003)
    for name, length in (("2.flac", 4002), ("3.wav", 4003)):  # as long as before
        soundfile.write(project.root / name, new[:length], 16000)
        later(project.root / name)
    (project.root / "4.flac").unlink()
    del project.labels["4.flac"]
    write(project.root / "9.flac", seed=9)
    project.labels["9.flac"] = "new"
    project.write_table()
    capsys.readouterr()
    prepared = project.open(copy=copy)
    said = f"2 files changed, 1 added, 1 removed, labels.csv edited; first: {project.root / '2.flac'}"
    assert said in capsys.readouterr().out
    assert sorted(decoded) == ["2", "3", "9"]
    assert keywords(prepared) == expected(project)
    heard = {cut.id: cut.load_audio()[0] for cut in prepared.cuts("train")}
    for name in ("2", "3"):
        assert np.abs(heard[name] - new[: len(heard[name])]).max() < 1e-4
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh", copy=copy)  # what was removed is gone from audio/ too


def test_check_refuses_what_changed_and_keep_does_not_look(project, decoded):
    before = project.open()
    files = contents(project.prepared)
    decoded.clear()
    later(project.root / "2.flac")
    with pytest.raises(ValueError, match=r"1 file changed; first: .*2\.flac: .*when=update.*when=keep uses it as it was"):
        project.open("check")
    assert project.open("keep") == before
    assert (decoded, contents(project.prepared)) == ([], files)
    with pytest.raises(ValueError, match=r"prepare\.when must be update, check or keep, found 'never'"):
        project.open("never")


def test_audio_used_where_it_lies_is_refused_when_it_was_changed_or_is_gone(project):
    prepared = project.open()
    prepared.check_audio()
    later(project.root / "2.flac")  # a copy of it is used
    prepared.check_audio()
    later(project.root / "3.wav")
    with pytest.raises(ValueError, match=r"3\.wav was changed since preparation \(1 of 4 files"):
        prepared.check_audio()
    (project.root / "3.wav").unlink()
    with pytest.raises(ValueError, match=r"3\.wav is gone since"):
        PreparedCorpus.load(project.prepared).check_audio()
    with pytest.raises(ValueError, match=r"1 file changed, 1 removed; first: "):
        project.open("check")


def test_a_text_that_was_touched_is_the_same(project, decoded):
    project.open()
    decoded.clear()
    files = contents(project.prepared)
    later(project.table)
    project.open("check")
    project.open()
    assert (decoded, contents(project.prepared)) == ([], files)


def test_missing_sources_are_no_edit(project, tmp_path):
    settings = {"root": str(project.root), "labels": str(project.table)}
    before = project.open(settings=settings)
    os.rename(project.root, tmp_path / "away")
    for when in ("update", "check"):
        with pytest.raises(FileNotFoundError, match=r"wavs/0\.flac first \(8 in all\): is a disk not mounted\? .*when=keep"):
            project.open(when, settings=settings)
    project.root.mkdir()  # as of a disk that is not mounted
    with pytest.raises(FileNotFoundError, match="is a disk not mounted"):
        project.open(settings=settings)
    assert project.open("keep", settings=settings) == before
    project.root.rmdir()
    os.rename(tmp_path / "away", project.root)
    project.table.unlink()
    with pytest.raises(FileNotFoundError, match=r"labels\.csv first \(1 in all\)"):
        project.open(settings=settings)


def test_a_rejected_file_that_was_mended_or_has_come_is_taken(project, decoded):
    good = (project.root / "2.flac").read_bytes()
    (project.root / "2.flac").write_bytes(b"")
    (project.root / "4.flac").unlink()
    assert project.open().rejected == 2
    decoded.clear()
    (project.root / "2.flac").write_bytes(good)
    later(project.root / "2.flac")
    write(project.root / "4.flac", 4)
    assert project.open().rejected == 0
    assert sorted(decoded) == ["2", "4"]


def test_a_file_that_changes_while_it_is_prepared_is_prepared_again(project, decoded, monkeypatch):
    process = module._process

    def and_change(job, options):
        result = process(job, options)
        if job.id == "2":
            later(project.root / "2.flac")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(module, "_process", and_change)
        project.open()
    decoded.clear()
    project.open()
    assert decoded == ["2"]


def test_a_table_that_changes_while_it_is_read_is_read_again(project):
    def edited_too_late():
        manifests = project.corpus().manifests(False)
        project.labels["3.wav"] = "other"
        project.write_table()
        return manifests

    first = prepare(edited_too_late, project.prepared, sources=lambda: project.corpus().sources(), num_jobs=1, progress=False)
    assert keywords(first)["3"] == "word0"
    assert keywords(project.open())["3"] == "other"


def open_until(project: Project, interrupted: str, monkeypatch) -> None:
    """Open the corpus, and press Ctrl-C when an utterance is to be decoded."""
    process = module._process

    def until(job, options):
        if job.id == interrupted:
            raise KeyboardInterrupt
        return process(job, options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_process", until)
        with pytest.raises(KeyboardInterrupt):
            project.open()


def test_an_interrupted_preparation_does_not_go_on_with_audio_that_was_changed(project, tmp_path, monkeypatch):
    open_until(project, "3", monkeypatch)
    soundfile.write(project.root / "2.flac", np.zeros(4002) + 0.25, 16000)
    later(project.root / "2.flac")
    heard = {cut.id: cut.load_audio()[0] for cut in project.open().cuts("train")}
    assert np.abs(heard["2"] - 0.25).max() < 1e-4


def change(project: Project) -> None:
    for name in ("0.flac", "2.flac", "4.flac"):
        write(project.root / name, seed=60)
        later(project.root / name)
    (project.root / "6.flac").unlink()
    del project.labels["6.flac"]
    project.labels["5.wav"] = "other"
    project.write_table()


def test_an_interrupted_update_leaves_the_old_corpus_and_goes_on(project, decoded, tmp_path, monkeypatch):
    before = project.open()
    change(project)
    open_until(project, "4", monkeypatch)
    assert PreparedCorpus.load(project.prepared) == before == project.open("keep")
    assert len([cut.load_audio() for split in before.counts for cut in before.cuts(split)]) == 8
    decoded.clear()
    project.open()
    assert decoded == ["4", "0"]  # 0 is of the validation
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")


@pytest.mark.parametrize("moves", range(6))
def test_an_update_that_is_interrupted_while_it_takes_the_old_ones_place_is_finished(project, tmp_path, monkeypatch, moves):
    project.open()
    change(project)
    replace, left = os.replace, [moves]

    def some(source, target):
        if Path(source).is_relative_to(project.prepared / "update") and "update" not in Path(target).parts:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", some)
        with pytest.raises(KeyboardInterrupt):
            project.open()
    with pytest.raises(FileNotFoundError, match="not completely prepared: run the preparation again"):
        PreparedCorpus.load(project.prepared)
    assert keywords(project.open("check")) == expected(project)
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")


def test_what_an_interrupted_update_decoded_is_not_used_when_the_source_is_as_before_again(project, tmp_path, monkeypatch):
    project.open()
    flac, times = project.root / "2.flac", os.stat(project.root / "2.flac")
    good = flac.read_bytes()
    write(flac, seed=70)
    later(flac)
    write_new = module._write
    monkeypatch.setattr(module, "_write", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        project.open()
    monkeypatch.setattr(module, "_write", write_new)
    flac.write_bytes(good)
    os.utime(flac, ns=(times.st_atime_ns, times.st_mtime_ns))
    project.labels["3.wav"] = "other"
    project.write_table()
    project.open()
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")


def test_those_that_find_a_change_at_once_decode_it_once(project, decoded, tmp_path):
    project.open()
    decoded.clear()
    change(project)
    with ThreadPoolExecutor(4) as pool:  # each has a lock of its own, as processes have
        opened = list(pool.map(lambda _: keywords(project.open()), range(4)))
    assert opened == [expected(project)] * 4
    assert sorted(decoded) == ["0", "2", "4"]
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")


def test_a_journal_that_is_removed_while_one_looks_is_made_again(tmp_path, monkeypatch):
    stat, removed = os.fstat, []

    def remove(descriptor):
        status = stat(descriptor)
        if not removed:
            removed.append((tmp_path / "prepared" / "journal.jsonl").unlink())
        return status

    monkeypatch.setattr(module.os, "fstat", remove)
    journal = module._Journal(tmp_path / "prepared")
    journal.close()
    assert removed
    assert journal.path.is_file()


def test_a_folder_without_a_record_is_used_only_when_asked_to_keep_it(project, decoded, tmp_path):
    project.open()
    for path in (project.prepared / "record").iterdir():
        path.unlink()
    (project.prepared / "record").rmdir()
    path = project.prepared / "corpus.json"
    content = json.loads(path.read_text()) | {"format_version": 1}
    del content["content"]
    path.write_text(json.dumps(content))
    assert project.open("keep").content is None
    PreparedCorpus.load(project.prepared).check_audio()
    with pytest.raises(ValueError, match="an earlier audiot prepared it and recorded no sources"):
        project.open("check")
    decoded.clear()
    project.open()
    assert len(decoded) == 8
    assert contents(project.prepared) == project.fresh(tmp_path / "fresh")


def test_what_was_prepared_inside_the_tree_is_no_source_of_it(tmp_path):
    project = Project(tmp_path)
    project.prepared = project.root / "data" / "prepared"
    first = project.open()
    assert project.open("check") == first
    assert sum(first.counts.values()) == 8


def test_the_content_does_not_depend_on_the_place_the_time_or_the_order_of_files(tmp_path):
    one, other = Project(tmp_path / "one"), Project(tmp_path / "other")
    for path in sorted(other.root.iterdir(), reverse=True):  # made anew, the last one first
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    other.labels = dict(reversed(other.labels.items()))
    other.write_table()
    later(other.root / "3.wav")
    assert one.open().content == other.open().content
    soundfile.write(other.root / "3.wav", np.random.default_rng(77).uniform(-0.5, 0.5, 4003), 16000)  # as long as before
    later(other.root / "3.wav")
    assert one.open().content != other.open().content


def test_manifests_and_the_audio_that_they_name_are_compared(tmp_path, decoded):
    path = tmp_path / "train.jsonl"

    def entries(texts):
        rows = ({"audio_filepath": f"{number}.flac", "text": text} for number, text in enumerate(texts))
        rewrite(path, "".join(json.dumps(row) + "\n" for row in rows))

    def texts(when="update"):
        prepared = prepare(
            lambda: ManifestCorpus(path).manifests(False),
            tmp_path / "out",
            sources=lambda: ManifestCorpus(path).sources(),
            when=when,
            num_jobs=1,
            progress=False,
        )
        cuts = (cut for split in prepared.counts for cut in prepared.cuts(split))
        return [cut.supervisions[0].text for cut in sorted(cuts, key=lambda cut: cut.id)]

    for number in range(6):
        write(tmp_path / f"{number}.flac", number)
    entries("abcde")
    assert texts() == list("abcde")
    decoded.clear()
    entries("axcdef")
    with pytest.raises(ValueError, match=r"train\.jsonl edited"):
        texts("check")
    assert texts() == list("axcdef")
    assert decoded == ["5"]
    later(tmp_path / "2.flac")
    with pytest.raises(ValueError, match=r"1 file changed; first: .*2\.flac"):
        texts("check")


def test_a_cut_that_only_lhotse_reads_is_decoded_anew_when_it_is_put_together_otherwise(tmp_path, decoded):
    wavs = [Recording.from_file(write(tmp_path / f"{seed}.wav", seed)).to_cut() for seed in (1, 2, 3)]

    def lengths(*cuts):
        cuts = CutSet.from_cuts([wavs[2], *cuts])
        later(tmp_path / "3.wav")  # so that there is a difference
        prepared = prepare(Manifests({"train": cuts}), tmp_path / "out", num_jobs=1, progress=False)
        return [cut.num_samples for cut in prepared.cuts("train")]

    assert lengths(wavs[0].mix(wavs[1], snr=10).with_id("both")) == [4003, 4002]
    decoded.clear()
    assert lengths(wavs[0].mix(wavs[1], snr=10).with_id("both")) == [4003, 4002]
    assert decoded == ["3"]
    assert lengths(wavs[0].mix(wavs[1], snr=20).with_id("both")) == [4003, 4002]
    assert decoded == ["3", "3", "both"]


def tree(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_transcripts_phone_labels_and_lists_of_librispeech_are_its_sources(tmp_path):
    kinds = {
        "LibriSpeech/train-clean-5/1/2/1-2-0000.flac": "audio",
        "LibriSpeech/train-clean-5/1/2/1-2.trans.txt": "1-2-0000 A",
        "LibriSpeech/dev-clean-2/3/4/3-4.trans.txt": "",
        "LibriSpeech/test-clean/5/6/5-6-0000.flac": "of a subset that is not used",
        "LibriSpeech/SPEAKERS.TXT": "",
        "grids/a/1-2-0000.TextGrid": "",
        "train.txt": "1-2-0000",
        "test.txt": "",
    }
    tree(tmp_path, kinds)
    corpus = LibriSpeechCorpus(
        tmp_path,
        train="train-clean-5",
        valid="dev-clean-2",
        test=[],
        phones=tmp_path / "grids",
        phone_train=tmp_path / "train.txt",
        phone_test=tmp_path / "test.txt",
    )
    found = corpus.sources()
    assert {os.path.relpath(path, tmp_path) for path in found.audio} == {"LibriSpeech/train-clean-5/1/2/1-2-0000.flac"}
    texts = {name for name in kinds if not name.endswith(".flac")} | {"LibriSpeech/CHAPTERS.TXT"}  # not there, may come
    assert {os.path.relpath(path, tmp_path) for path in found.texts} == texts
    recorded = snapshot(found)
    assert not compare(recorded, corpus.sources)
    rewrite(tmp_path / "grids/a/1-2-0000.TextGrid", "edited")
    tree(tmp_path, {"LibriSpeech/CHAPTERS.TXT": "x", "LibriSpeech/train-clean-5/1/2/1-2-0001.flac": "y"})
    change = compare(recorded, corpus.sources)
    assert str(change).startswith("2 files added, 1-2-0000.TextGrid edited; first: ")


@pytest.mark.parametrize("name", sorted(path.stem for path in Path("conf/data").glob("[!_]*.yaml")))
def test_every_corpus_names_its_places_and_has_sources(name):
    corpus = get_object(OmegaConf.load(Path("conf/data") / f"{name}.yaml").corpus._target_)
    assert callable(corpus.sources)
    expected = {
        "demo": {"root"},
        "folder": {"root", "labels"},
        "manifest": {"train", "valid", "test", "root", "folder"},
        "librispeech": {"root", "phones", "phone_train", "phone_test"},
        "speech_commands": {"root", "test_root"},
        "voxceleb1": {"root", "iden_split", "trials"},
        "fsdd": {"root"},
        "festvox": {"root"},
        "shar": {"root"},
        "webdataset": {"root"},
        "fluent_speech_commands": {"root"},
    }
    anything = dict.fromkeys(("root", "labels", "train", "valid", "test", "phones", "phone_train", "phone_test", "trials"), "x")
    found = places(corpus, anything | {"test_root": "x", "iden_split": "x", "pattern": "x", "mirror": "x"})
    assert found == {place: os.path.abspath("" if place == "folder" else "x") for place in expected[name]}


def test_a_place_is_known_by_any_of_its_names(tmp_path, monkeypatch):
    (tmp_path / "a" / "wavs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a")
    names = ["wavs", "./wavs/", "../a/wavs", tmp_path / "a" / "wavs", tmp_path / "link" / "wavs"]
    found = {places(FolderCorpus, {"root": name})["root"] for name in names}
    assert found == {os.path.realpath(tmp_path / "a" / "wavs")}
    monkeypatch.chdir(tmp_path)
    assert places(FolderCorpus, {"root": "wavs"})["root"] not in found


def test_files_below_a_folder_are_found_once_whatever_links_lead_to_it(tmp_path):
    tree(tmp_path, {"b/c/2.wav": "", "a.wav": "", ".hidden.wav": "", "b/1.txt": ""})
    (tmp_path / "b" / "back").symlink_to(tmp_path)
    assert files_below(tmp_path, ".wav") == [str(tmp_path / "a.wav"), str(tmp_path / "b/c/2.wav")]
    assert files_below(tmp_path / "none", ".wav") == []


def config(project: Project, data_dir: Path, **prepare_options):
    """Config for `open_corpus`, with paths relative to the current folder as a user writes them."""
    loading = OmegaConf.load(Path(__file__).parents[2] / "conf" / "data" / "_loading.yaml").prepare
    corpus = {"_target_": "audiot.data.corpora.folder.FolderCorpus", "root": "wavs", "labels": "labels.csv"}
    options = OmegaConf.merge(loading, {"sample_rate": 16000, "num_jobs": 1}, prepare_options)
    return OmegaConf.create({"data_dir": str(data_dir), "data": {"name": "folder", "corpus": corpus, "prepare": options}})


def test_two_projects_with_the_same_relative_places_never_share_a_corpus(tmp_path, monkeypatch):
    opened = {}
    for name, word in (("A", "yes"), ("B", "no")):
        project = Project(tmp_path / name)
        project.labels = dict.fromkeys(project.labels, word)
        project.write_table()
        monkeypatch.chdir(tmp_path / name)
        opened[name] = opening.open_corpus(config(project, tmp_path / "data"))
        assert set(keywords(opened[name]).values()) == {word}
    assert opened["A"].directory != opened["B"].directory
    monkeypatch.chdir(tmp_path / "A")
    assert opening.open_corpus(config(project, tmp_path / "data")) == opened["A"]
    os.rename(tmp_path / "data", tmp_path / "moved")
    directory = tmp_path / "moved" / opened["A"].directory.relative_to(tmp_path / "data")
    assert len([cut.load_audio() for cut in PreparedCorpus.load(directory).cuts("train")]) == 6


def test_lhotse_manifests_with_relative_audio_belong_to_the_folder_they_are_opened_in(tmp_path, monkeypatch):
    cuts = []
    for number in range(4):
        for name in ("A", "B"):
            path = write(tmp_path / name / f"{number}.flac", number + 10 * (name == "B"))
        cut = Recording.from_file(path, recording_id=str(number)).to_cut()
        cut.recording.sources[0].source = f"{number}.flac"
        cuts.append(cut)
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as stream:
        for cut in cuts:
            cut.recording.num_samples, cut.recording.duration, cut.duration = 4000, 0.25, 0.25
            stream.write(json.dumps(cut.to_dict()) + "\n")
    prepared = {}
    for name, seed in (("A", 0), ("B", 10)):
        monkeypatch.chdir(tmp_path / name)
        cfg = config(None, tmp_path / "data")
        cfg.data.corpus = {"_target_": "audiot.data.corpora.manifest.ManifestCorpus", "train": str(tmp_path / "train.jsonl.gz")}
        prepared[name] = opening.open_corpus(cfg)
        heard = {cut.id: cut.load_audio()[0] for split in prepared[name].counts for cut in prepared[name].cuts(split)}
        wanted = np.random.default_rng(seed).uniform(-0.5, 0.5, 4000 + seed)
        assert np.abs(heard["0"] - wanted).max() < 1e-4
    assert prepared["A"].directory != prepared["B"].directory


def test_a_run_is_measured_on_the_data_that_it_was_trained_on(tmp_path, monkeypatch):
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    run, cfg = tmp_path / "run", config(project, tmp_path / "data")
    cfg.run_dir = str(run)
    opening.note_data(cfg, opening.open_corpus(cfg))
    opening.open_corpus(cfg, run)
    project.labels["3.wav"] = "other"
    project.write_table()
    with pytest.raises(ValueError, match=r"labels\.csv edited.*when=keep uses it as it was"):
        opening.open_corpus(cfg, run)
    cfg.data.prepare.when = "keep"
    assert "other" not in keywords(opening.open_corpus(cfg, run)).values()
    cfg.data.prepare.when = "update"
    updated = opening.open_corpus(cfg)  # by another run
    assert "other" in keywords(updated).values()
    for when in ("update", "keep"):
        cfg.data.prepare.when = when
        with pytest.raises(ValueError, match=r"run=.*run: .* has other utterances, labels or audio .* was updated since"):
            opening.open_corpus(cfg, run)


def test_a_run_is_measured_with_the_lexicon_that_it_was_trained_with(tmp_path, monkeypatch):
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    rewrite(tmp_path / "lexicon.txt", "yes Y EH S\n")
    cfg = config(project, tmp_path / "data")
    labels = {"_target_": "audiot.data.labels.PhoneSequence", "lexicon": "lexicon.txt"}
    objective = {"_target_": "audiot.downstream.ctc.CTC"}
    more = {"run_dir": str(tmp_path / "run"), "downstream": {"labels": labels, "objective": objective}}
    cfg = OmegaConf.merge(cfg, more)
    opening.note_data(cfg, opening.open_corpus(cfg))
    later(tmp_path / "lexicon.txt")
    opening.open_corpus(cfg, tmp_path / "run")
    rewrite(tmp_path / "lexicon.txt", "yes Y IH S\n")
    with pytest.raises(ValueError, match=r"lexicon\.txt \(downstream\.labels\.lexicon\) is not what the run was trained with"):
        opening.open_corpus(cfg, tmp_path / "run")


def test_a_folder_of_an_earlier_version_is_said_and_kept_apart(tmp_path, monkeypatch, caplog):
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    cfg = config(project, tmp_path / "data")
    caplog.set_level("INFO", "audiot")
    options = {name: value for name, value in cfg.data.prepare.items() if name not in opening.NO_RESULT}
    former = opening._prepared_folder(cfg, OmegaConf.to_container(cfg.data.corpus), options)
    prepare(lambda: project.corpus().manifests(False), former, progress=False, num_jobs=1)
    opened = opening.open_corpus(cfg)
    assert opened.directory != former
    assert f"{former} was prepared by an earlier audiot, which recorded no sources" in caplog.text
    caplog.clear()
    opening.open_corpus(cfg)
    assert "recorded no sources" not in caplog.text


def test_a_corpus_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(FolderCorpus, "sources")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="FolderCorpus has no method sources"):
        opening.open_corpus(config(Project(tmp_path), tmp_path / "data"))


def test_files_that_preparation_did_not_write_stay_where_they_are(project):
    own = [
        project.prepared / "audio" / name
        for name in (".DS_Store", "session-0123456789.wav", "2024/a.wav", "ab/take.wav", "ab/notes-0123456789.txt", "cd")
    ]
    for path in own:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    (project.prepared / "audio" / "ab" / "x-0123456789.wav").mkdir()
    (stale := project.prepared / "audio" / "ab" / ".y-0123456789.wav").write_bytes(b"half")
    project.open(copy=True)
    assert not stale.exists()
    write(project.root / "2.flac", seed=20)
    later(project.root / "2.flac")
    project.open(copy=True)
    assert [path.read_bytes() for path in own] == [b"mine"] * len(own)


def test_what_cannot_be_tidied_does_not_cost_the_corpus(project, monkeypatch):
    project.open(copy=True)
    later(project.root / "2.flac")
    keep_only = module._keep_only

    def refuse(folder, used):
        if folder == project.prepared / "audio":
            raise PermissionError("no")
        keep_only(folder, used)

    monkeypatch.setattr(module, "_keep_only", refuse)
    with pytest.raises(PermissionError):
        project.open(copy=True)
    assert sum(project.open("check", copy=True).counts.values()) == 8


def test_an_update_tries_again_what_could_not_be_read(project, decoded, monkeypatch):
    open_file = module.AudioFile

    def refuse(path):
        if str(path).endswith("2.flac"):
            raise module.BadAudioError("unreadable: Permission denied")
        return open_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "AudioFile", refuse)
        assert project.open().rejected == 1
    decoded.clear()
    later(project.root / "4.flac")
    assert project.open().rejected == 0
    assert sorted(decoded) == ["2", "4"]


def test_a_prepared_folder_is_no_source_of_a_published_corpus_around_it(tmp_path):
    takes = [write(tmp_path / f"{digit}_theo_{take}.wav", digit + take) for digit in (1, 2) for take in range(20)]

    def open_corpus(when):
        corpus = FsddCorpus(tmp_path, partial=True)
        out = tmp_path / "data" / "fsdd"
        options = {"when": when, "num_jobs": 1, "progress": False, "sample_rate": 8000}
        return prepare(lambda: corpus.manifests(False), out, sources=corpus.sources, **options)

    assert open_corpus("update").utterances == len(takes)
    assert (tmp_path / "data" / "fsdd" / "audio").is_dir()
    assert open_corpus("check").utterances == len(takes)
    assert files_below(tmp_path, ".wav") == sorted(map(str, takes))
    assert len(files_below(tmp_path / "data" / "fsdd", ".wav")) == len(takes)  # who names it, means it


@pytest.mark.parametrize("root", [None, "audio"])
def test_a_manifest_belongs_to_the_current_folder_only_where_it_has_no_root(tmp_path, monkeypatch, root):
    (tmp_path / "train.jsonl").write_text("")
    given = [] if root is None else [f"data.root={tmp_path / root}"]
    folders, roots = set(), set()
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        options = ["data=manifest", f"data.train={tmp_path / 'train.jsonl'}", f"data_dir={tmp_path}", *given]
        cfg = compose_command("prepare", options)
        folders.add(opening.corpus_folder(cfg)[0])
        roots.add(instantiate(cfg.data.corpus).root)
    assert len(folders) == (2 if root is None else 1)
    assert roots == {root and tmp_path / root}
