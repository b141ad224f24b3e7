from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from audiot.data.corpora.fsdd import FsddCorpus
from audiot.data.prepare import prepare


def fill(folder: Path, speakers: tuple[str, ...] = ("lucas", "theo")) -> Path:
    """All recordings of the speakers, 50 takes of ten digits, all alike."""
    folder.mkdir(parents=True)
    soundfile.write(folder / "one.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 1600), 8000)
    content = (folder / "one.wav").read_bytes()
    (folder / "one.wav").unlink()
    for speaker in speakers:
        for digit in range(10):
            for take in range(50):
                (folder / f"{digit}_{speaker}_{take}.wav").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A clone of the repository. Not to be changed."""
    root = tmp_path_factory.mktemp("clone")
    fill(root / "recordings")
    (root / "README.md").touch()
    return root


def ids(manifests):
    return {split: {cut.id for cut in cuts} for split, cuts in manifests.splits.items()}


def test_takes_0_to_4_are_the_test_and_5_to_9_validate(whole):
    found = ids(FsddCorpus(whole).manifests(progress=False))
    assert found == {
        split: {f"{digit}_{speaker}_{take}" for digit in range(10) for speaker in ("lucas", "theo") for take in takes}
        for split, takes in {"train": range(10, 50), "valid": range(5, 10), "test": range(5)}.items()
    }


def test_digit_and_speaker_become_labels(whole, capsys):
    manifests = FsddCorpus(whole).manifests(progress=False)
    (supervision,) = next(cut for cut in manifests.splits["test"] if cut.id == "7_theo_3").supervisions
    assert (supervision.speaker, supervision.text, supervision.custom) == ("theo", "seven", {"keyword": "7"})
    assert set(manifests.task_splits) == {"keyword", "speaker"}
    assert "2 speakers, without george, jackson, nicolas, yweweler" in capsys.readouterr().out


def test_the_folder_of_recordings_alone_does_too(whole):
    assert ids(FsddCorpus(whole / "recordings").manifests(progress=False)) == ids(FsddCorpus(whole).manifests(progress=False))


def test_missing_recordings_are_counted_and_named(tmp_path):
    root = fill(tmp_path / "digits", ("theo",))
    for name in ("3_theo_7.wav", "9_theo_0.wav"):
        (root / name).unlink()
    expected = (
        r"FSDD: 2 of 500 recordings are missing in .*digits \(3_theo_7\.wav, 9_theo_0\.wav\): git clone .*data\.partial=true"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        FsddCorpus(root).manifests(progress=False)
    assert {split: len(names) for split, names in ids(FsddCorpus(root, partial=True).manifests(progress=False)).items()} == {
        "train": 400,
        "valid": 49,
        "test": 49,
    }


def test_a_part_without_a_split_has_no_such_split(tmp_path):
    root = fill(tmp_path / "digits", ("theo",))
    for path in root.glob("*_theo_[0-4].wav"):
        path.unlink()
    manifests = FsddCorpus(root, partial=True).manifests(progress=False)
    assert set(manifests.splits) == {"train", "valid"}
    assert manifests.task_splits["keyword"] == {"train": "train", "valid": "valid"}


@pytest.mark.parametrize("root", ["nowhere", "empty"])
def test_an_empty_folder_says_where_it_looked_and_how_to_get_the_corpus(tmp_path, root):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=rf"no recordings in .*{root}/recordings nor in .*{root}: git clone https://"):
        FsddCorpus(tmp_path / root).manifests(progress=False)


def test_other_names_and_bad_audio_are_rejected_and_the_rest_goes_on(tmp_path):
    root = fill(tmp_path / "digits", ("theo",))
    (root / "07_theo_1.wav").touch()
    (root / "7_theo_01.wav").touch()
    (root / "7_theo_1.wav").write_bytes(b"garbage")
    manifests = FsddCorpus(root).manifests(progress=False)
    reasons = {Path(path).name: reason.split(":")[0] for path, reason in manifests.rejected}
    odd = "not named DIGIT_SPEAKER_TAKE.wav"
    assert reasons == {"07_theo_1.wav": odd, "7_theo_01.wav": odd, "7_theo_1.wav": "unreadable"}
    assert len(ids(manifests)["test"]) == 49


def test_the_config_makes_the_corpus(whole, tmp_path):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("prepare", ["data=fsdd", f"data.root={whole}", "data.partial=true", "run_dir=run"])
    corpus = instantiate(cfg.data.corpus)
    assert (corpus.root, corpus.partial) == (whole, True)


def test_the_real_corpus_is_split_and_prepared(tmp_path):
    if "AUDIOT_TEST_DATA" not in os.environ:
        pytest.skip("AUDIOT_TEST_DATA is not set")
    root = Path(os.environ["AUDIOT_TEST_DATA"]) / "fsdd"
    manifests = FsddCorpus(root).manifests(progress=False)
    speakers = len({cut.supervisions[0].speaker for cut in manifests.splits["test"]})
    prepared = prepare(manifests, tmp_path, sample_rate=8000, num_jobs=1, progress=False)
    assert prepared.counts == {"train": 400 * speakers, "valid": 50 * speakers, "test": 50 * speakers}
