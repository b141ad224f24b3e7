"""Printed commands run as printed, whatever characters a path has, and fit the corpus."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from test_cli import last_line, run, succeed

from audiot.base.quoting import argument, override
from audiot.data.opening import open_corpus
from audiot.following import finetune_command
from audiot.runs import write_config

RATE = 16000
MODEL = ["model.num_layers=1", "model.embed_dim=16", "model.num_heads=2", "model.ffn_dim=32"]
LOADING = ["data.num_workers=0", "data.batch_s=8", "data.prepare.num_jobs=1"]
TRAINER = ["trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1"]
FOLDERS = ["it's, [a=b] {é} #1", 'say "(x)" $HOME', "-x", "12", "a\\b: ~c;d&e|f", "`ls` $(ls) *?<>!%"]


def tones(root, names):
    """A short tone for each name, with its own pitch."""
    root.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        times = np.arange(int(RATE * (0.5 + 0.02 * number))) / RATE
        soundfile.write(root / f"{name}.wav", 0.1 * np.sin(2 * np.pi * (200 + 20 * number) * times), RATE)
    return root


def words(speakers="abcde"):
    return [f"{word}_{speaker}_{take}" for speaker in speakers for word in ("yes", "no") for take in range(2)]


def recorded(folder, overrides):
    """A folder as Hydra leaves it of a pre-training run with these overrides, its corpus prepared."""
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("pretrain", overrides, return_hydra_config=True)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)
        cfg.pop("hydra")
        cfg.run_dir = "set by evaluate"
    (folder / ".hydra").mkdir(parents=True)
    write_config(cfg, folder)
    OmegaConf.save(OmegaConf.create(list(overrides)), folder / ".hydra" / "overrides.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": {"choices": choices}}}), folder / ".hydra" / "hydra.yaml")
    return cfg


def composed(command):
    """The config that a printed `audiot finetune …` makes."""
    program, name, *overrides = shlex.split(command)
    assert (program, name) == ("audiot", "finetune")
    with initialize_config_module("audiot.conf", version_base="1.3"):
        return compose("finetune", overrides)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, empty, with the prepared corpora in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AUDIOT_DATA", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", FOLDERS)
def test_a_command_finds_run_and_corpus_by_any_name(here, name):
    root = tones(Path("audio") / name, words())
    given = [override("data.root", root), override("data.pattern", "{keyword}_{speaker}_{take}")]
    cfg = recorded(Path("runs") / name, ["data=folder", *given])
    open_corpus(cfg)
    following = composed(finetune_command(Path("runs") / name))
    assert following.upstream.path == str(Path("runs") / name / "encoder")
    assert following.data.root == str(root)
    assert following.data.pattern == "{keyword}_{speaker}_{take}"
    assert following.downstream.task == "keyword"


CORPORA = {
    "keyword": ("{keyword}_{speaker}_{take}", words(), "downstream=keyword"),
    "another label": ("{word}_{speaker}_{take}", words(), "downstream=keyword downstream.labels.field=word"),
    "speaker": ("{text}_{speaker}_{take}", words(), "downstream=speaker_utterance"),
    "a label of each utterance": ("{number}", [f"{n:02}" for n in range(24)], None),
    "none": (None, words(), None),
    # A chapter has one speaker, who is heard in training or is not.
    "a label of speakers": ("{chapter}_{speaker}_{take}", [f"{s}{s}_{s}_{n}" for s in "abcdef" for n in range(40)], "…"),
}


@pytest.mark.parametrize(("pattern", "names", "task"), CORPORA.values(), ids=CORPORA)
def test_the_task_that_follows_is_one_for_labels_that_are_there(here, pattern, names, task):
    tones(here / "audio", names[:60] if task != "…" else names[::4])
    cfg = recorded(
        here / "run", ["data=folder", "data.root=audio", *([] if pattern is None else [override("data.pattern", pattern)])]
    )
    corpus = open_corpus(cfg)
    command = finetune_command(Path("run"))
    if task is None:
        assert command == f"audiot extract {corpus.directory} run/states --encoder run/encoder"
    elif task == "…":
        assert composed(command).downstream.task == "speaker"
        assert composed(command).downstream.labels.field == "chapter"
    else:
        assert command.startswith(f"audiot finetune {task} upstream.path=run/encoder data=folder data.root=audio ")


def test_the_extraction_of_an_encoder_from_outside_audiot_says_whom_to_trust(here):
    tones(here / "audio", words())
    cfg = recorded(here / "run", ["data=folder", "data.root=audio", "attention._target_=mine.Own"])
    folder = open_corpus(cfg).directory
    assert finetune_command(Path("run")) == f"audiot extract {folder} run/states --encoder run/encoder --trust mine"


def test_transcripts_without_labels_are_recognised(here):
    tones(here / "audio", [f"{n:02}" for n in range(24)])
    for alphabet, text in ((True, "AB"), (False, "ÄB")):
        lines = [json.dumps({"audio_filepath": f"audio/{n:02}.wav", "text": text}) for n in range(24)]
        (here / f"{text}.json").write_text("\n".join(lines))
        cfg = recorded(here / text, ["data=manifest", override("data.train", f"{text}.json")])
        open_corpus(cfg)
        following = composed(finetune_command(here / text))
        assert following.downstream.task == "asr"
        assert (following.downstream.labels.alphabet is not None) == alphabet


def test_what_an_experiment_changed_of_the_data_is_carried_on(here):
    recorded(here / "demo", ["experiment=demo_gpu"])
    following = composed(finetune_command(here / "demo"))
    assert (following.data.name, following.data.hours) == ("demo", 25)
    recorded(here / "rate", ["features.sample_rate=8000"])
    assert composed(finetune_command(here / "rate")).data.prepare.sample_rate == 8000
    recorded(here / "libri", ["experiment=mockingjay_librispeech960", "data.root=there"])
    program, command, *overrides = shlex.split(finetune_command(here / "libri"))
    assert (program, command) == ("audiot", "prepare")  # nothing is known of its labels yet
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("prepare", overrides)
    assert (cfg.data.name, cfg.data.root) == ("librispeech", "there")
    assert cfg.data.pretrain == ["train-clean-100", "train-clean-360", "train-other-500"]


@pytest.mark.filterwarnings("error")  # a stray one, on data as small as this
@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("labelled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_command_that_a_first_run_prints_runs(here, labelled):
    name = "it's, [a=b] {é} #1"
    tones(here / name, words())
    data = ["data=folder", override("data.root", name), *LOADING]
    data += [override("data.pattern", "{word}_{speaker}_{take}")] if labelled else []

    def follow(out, *more):
        begin, command = last_line(out).split("   ", 1)
        program, *arguments = shlex.split(command)
        assert (begin, program) == ("next:", "audiot")
        return arguments[0], succeed(*arguments, *more)

    command, out = follow(succeed("prepare", *data), *MODEL, *TRAINER, override("hydra.run.dir", f"runs/{name}"))
    assert command == "pretrain"
    command, measured = follow(succeed("analyze", override("run", f"runs/{name}")))
    assert command == "evaluate"
    assert last_line(measured) == last_line(out).replace(f"{here}/", "")
    if not labelled:
        command, _ = follow(out)
        assert command == "extract"
        assert (here / "runs" / name / "states" / "index.csv").is_file()
        return
    command, out = follow(out, *TRAINER, override("hydra.run.dir", f"tuned/{name}"))
    assert command == "finetune"
    assert json.loads((here / "tuned" / name / "metrics.json").read_text())["classes"] == 2
    command, out = follow(out)
    assert command == "predict"
    refused = run("predict", f"runs/{name}", "x.wav").err
    assert "fine-tune it with audiot finetune downstream=keyword downstream.labels.field=word " in refused
    again = run("pretrain", *data, *MODEL, *TRAINER, override("hydra.run.dir", f"runs/{name}")).err
    assert argument("resume", f"runs/{name}") in again
