"""Mistakes of a user end in one clear line and a non-zero exit code, without a traceback."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from some import some
from test_cli import DATA, MODEL, TINY, TRAINER, prepared, read, run, succeed

from audiot.commands.launch import describe
from audiot.runs import checkpoints

RATE = 16000


@pytest.fixture
def made(tmp_path_factory, tmp_path, monkeypatch):
    """The prepared corpus and run, in ``AUDIOT_DATA``; the current folder is an empty one."""
    made = prepared(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("AUDIOT_DATA", str(made.data))
    monkeypatch.chdir(tmp_path)
    return made


def refusal(*arguments, **environment):
    """The error line of a command that must fail, without its beginning."""
    result = run(*arguments, **environment)
    assert result.code == 1
    assert "Traceback" not in result.out + result.err
    lines = [line for line in result.err.splitlines() if line and not line.startswith(("read headers:", "prepare:", "wandb:"))]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("audiot: error: ")
    return lines[0].removeprefix("audiot: error: ")


def test_an_unknown_command_suggests_the_nearest():
    assert refusal("pretrian").startswith("no command 'pretrian' (did you mean pretrain?); commands: ")
    assert refusal("list", "atention").startswith("no config group 'atention' (did you mean attention?)")


# Names and values, told before anything runs

PRETRAIN = {
    "option": ("attention=query_kee", "attention=query_kee: no such option (did you mean query_key?); options: alsh_sign, "),
    "option of a list": ("callbacks=[ema,swaa]", "callbacks=swaa: no such option (did you mean swa?); options: early_stopping, "),
    "option of a corpus": ("data=demmo", "data=demmo: no such option (did you mean demo?); options: demo, "),  # no _loading
    "group": ("atention=query_key", "no config key 'atention' (did you mean attention?)"),
    "key": ("model.embd_dim=3", "no config key 'model.embd_dim' (did you mean model.embed_dim?)"),
    "first part of a key": ("modle.embed_dim=3", "no config key 'modle.embed_dim' (did you mean model.embed_dim?)"),
    "deep key": ("data.corpus.heldout_uterances=3", "no config key 'data.corpus.heldout_uterances' (did you mean data.corpus."),
    "key of nothing": ("xyzzy=3", "no config key 'xyzzy'; +xyzzy=… adds it"),
    "no value": ("model.num_layers", "'model.num_layers' is not key=value, or its value needs quotes: missing EQUAL at"),
    "unquoted value": ("init=runs/step=4", "'init=runs/step=4' is not key=value, or its value needs quotes: "),
    "sweep without -m": ("seed=1,2", "seed=1,2 names several values: add -m to run them all, or [brackets] for a list"),
    "word for a whole number": ("trainer.max_steps=abc", "trainer.max_steps=abc: expected a whole number, such as "),
    "fraction for a whole number": ("model.num_layers=1.5", "model.num_layers=1.5: expected a whole number, such as 3"),
    "word for a number": ("optimizer.lr=fast", "optimizer.lr=fast: expected a number, such as 0.003"),
    "word for a seed": ("seed=x", "seed=x: expected a whole number, such as 0"),
    "number for a truth value": ("probe=3", "probe=3: expected true or false"),
    "number for a list": ("optimizer.betas=3", "optimizer.betas=3: expected a list, such as [0.9, 0.999]"),
    "word for a group": (
        "model.attention=query_key",
        "model.attention=query_key: expected its single keys, as in model.attention.key",
    ),
    "norm": ("model.norm=mid", "model.norm must be post or pre, found 'mid'"),
    "normalisation": ("features.cmvn=foo", "features.cmvn must be utterance, global, level or none, found 'foo'"),
    "heads": ("model.num_heads=5", "rotary positions need an even head size but embed_dim 24 / num_heads 5 is 4.8"),
    "no heads": ("model.num_heads=0", "model.num_heads must be at least 1, found 0"),
    "no value at all": ("model.embed_dim=null", "model/encoder: "),
    "stack": ("features.stack=0", "features.stack must be at least 1, found 0"),
    "hop": ("features.hop_length=0", "features.hop_length must be at least 1, found 0"),
    "crop": ("data.crop_s=-1", "data.crop_s must be a positive number of seconds, found -1"),
    "no crop": ("data.crop_s=null", "data.crop_s=null leaves the longest input open: set model.max_frames"),
    "batch": ("data.batch_s=0", "data.batch_s must be a positive number of seconds, found 0"),
    "mask": ("objective.mask_proportion=2", "objective.mask_proportion must be in (0, 1], found 2"),
    "no end": ("trainer.max_steps=-1", "the learning-rate schedule needs a length: set trainer.max_steps"),
    "validation": ("trainer.val_check_interval=0", "trainer.val_check_interval must be at least 1, found 0"),
    "corpus": (
        "data.prepare.sample_rate=8000",
        "the corpus is at 8000 Hz and the features at 16000 Hz: set data.prepare.sample_rate=",
    ),
    "no GPU": ("trainer.accelerator=gpu", "trainer.accelerator=gpu trainer.devices=1: No supported gpu backend found!"),
    "float8": (
        "trainer.precision=fp8",
        "trainer.precision=fp8 needs a GPU that multiplies float8 matrices (compute capability 8.9",
    ),
    "accelerator": ("trainer.accelerator=foo", "You selected an invalid accelerator name: `accelerator='foo'`."),
    "init": ("init=nowhere", "no encoder folder at nowhere: expected RUN/encoder of a pre-training run"),
    "resume": ("resume=nowhere", "resume=nowhere: no run there (nowhere/config.yaml is missing)"),
    "data folder": ("data_dir=/proc/nowhere", "[Errno 2] No such file or directory: '/proc/nowhere'"),
}


# Each is refused where another one is.
ALIKE = (
    "option of a list",
    "first part of a key",
    "deep key",
    "word for a seed",
    "number for a list",
    "no heads",
    "stack",
    "crop",
)


@pytest.mark.parametrize("case", some(PRETRAIN, [case for case in PRETRAIN if case not in ALIKE]))
def test_pretraining_refuses(made, case):
    argument, expected = PRETRAIN[case]
    if argument == "trainer.accelerator=gpu":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    kept = [given for given in TINY if given.split("=")[0] != argument.split("=")[0]]
    assert refusal("pretrain", *kept, "probe=false", argument).startswith(expected)


def test_what_sharded_parameters_exclude_is_told(made):
    sharded = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=32-true"]
    assert refusal("finetune", *TINY, *sharded, "upstream=checkpoint", f"upstream.path={made.run}/encoder") == (
        "trainer=fsdp shares out the parameters of pre-training alone: set trainer=ddp or trainer=gpu"
    )


def test_more_devices_than_there_are_are_refused(made):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    given = [*TINY, "probe=false", "trainer.devices=9"]
    assert refusal("pretrain", *given, "trainer.accelerator=auto").startswith(
        "trainer.accelerator=auto trainer.devices=9, but no GPU is here: trainer.accelerator=cpu runs 9 processes"
    )
    assert refusal("pretrain", *given, "trainer.accelerator=gpu") == (
        "trainer.accelerator=gpu trainer.devices=9: No supported gpu backend found!"
    )


def test_embed_dim_must_be_a_multiple_of_num_heads(made):
    message = refusal("pretrain", *TINY, "probe=false", "model.embed_dim=25", "positions=none")
    assert "25" in message
    assert "num_heads" in message


def test_suggestions_are_those_of_the_chosen_group(made):
    assert refusal("pretrain", *MODEL, "data=folder", "data.rot=audio").endswith("(did you mean data.root?)")
    assert refusal("pretrain", "attention=synthesizer_random", "attention.init_flor=1").endswith(
        "(did you mean attention.init_floor?)"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["attention.form=relative"], "attention.form=relative is gone: write attention=synthesizer_relative"),
        (["-m", "attention.form=full,factorized"], "attention.form=full is gone: write attention=synthesizer_random"),
        (["attention.search=chunked"], "attention.search=chunked is gone: write attention/search=chunked"),
        (
            ["attention=lsh_simple", "attention.chunk_size=8"],
            "attention.chunk_size=8 is gone: write attention/search=chunked attention.search.chunk_size=8",
        ),
        (["attention=lsh_simple", "attention/search=exact"], "attention/search=exact: no such option; options: chunked, topk"),
        (["attention=local", "attention/search=topk"], "attention/search=topk: the chosen attention has no search"),
    ],
)
def test_words_of_a_mechanism_that_are_gone_are_named_with_what_replaced_them(given, message):
    assert refusal("pretrain", *given) == message


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_refused_before_its_first_run(made, tmp_path, flag):
    where = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    assert refusal("pretrain", *TINY, where, flag, "model.embd_dim=3,4").startswith("no config key 'model.embd_dim'")
    assert refusal("pretrain", *TINY, where, flag, "seed=1,x") == "seed=x: expected a whole number, such as 0"
    message = refusal("pretrain", *TINY, where, flag, "seed=range(2)", "attention=query_key,query_kee")
    assert message.startswith("attention=query_kee: no such option (did you mean query_key?)")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["pretrain", "data=folder"], "data.root"),
        (["pretrain", "data=manifest"], "data.train"),
        (["finetune"], "upstream.path"),
        (["abx"], "upstream.path"),
        (["evaluate"], "run"),
        (["analyze"], "run"),
    ],
)
def test_a_value_that_has_to_be_given(arguments, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(*arguments) == f"{key} has no value: set {key}=…"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("environment", [{}, {"HYDRA_FULL_ERROR": "1"}])
def test_debugging_shows_the_traceback_above_the_line(made, environment):
    debug = ["debug=true"] if not environment else []
    for wrong, innermost in (("model.norm=mid", "audiot/model.py"), ("model.nrm=pre", "audiot/commands/launch.py")):
        result = run("pretrain", *TINY, *debug, wrong, **environment)
        assert result.code == 1
        assert "Traceback (most recent call last)" in result.err
        assert innermost in result.err
        assert result.err.strip().splitlines()[-1].startswith("audiot: error: ")


# Combinations


@pytest.mark.parametrize("attention", ["synthesizer_dense", "synthesizer_random"])
def test_rotary_positions_with_a_synthesizer(made, attention):
    message = refusal("pretrain", *TINY, "probe=false", f"attention={attention}", "positions=rotary")
    assert message.startswith("rotary positions turn queries and keys but Synthesizer")
    assert message.endswith("has none: set positions=sinusoid")


@pytest.mark.parametrize("choice", ["attention=synthesizer_random", "positions=learned"])
def test_a_batch_longer_than_max_frames(made, choice):
    message = refusal("pretrain", *TINY, "probe=false", choice, "data.crop_s=4", "model.max_frames=20")
    assert message.startswith("sequence has ")
    assert " frames but max_frames is 20" in message
    assert "data.crop_s" in message


def test_utterances_longer_than_a_synthesizers_max_frames(made):
    # Of a model for crops of half a second.
    given = ["upstream=random", "attention=synthesizer_random", "data.crop_s=0.5"]
    for options in (["downstream.train_encoder=true"], []):
        message = refusal("finetune", *TINY, *given, *options)
        assert " frames but max_frames is 16" in message


def test_settings_that_init_overrules_are_refused(made):
    message = refusal("pretrain", *DATA, f"init={made.encoder}", "attention=synthesizer_dense")
    assert message.startswith(f"attention=synthesizer_dense has no effect: init={made.encoder} brings its own features and model")


def test_training_that_diverges_is_no_result(made, tmp_path):
    folder = tmp_path / "run"
    result = run("pretrain", *TINY, "probe=false", "optimizer.lr=1e30", f"hydra.run.dir={folder}")
    assert result.code == 1
    assert (
        result.err.splitlines()[-1]
        == "audiot: error: training diverged, pretrain/val_cross_entropy is nan: lower optimizer.lr=1e+30"
    )
    assert not (folder / "encoder").exists()


def test_another_run_in_the_folder_of_one_is_refused_and_leaves_it_as_it_is(made):
    config = (made.run / "config.yaml").read_bytes()
    message = refusal("pretrain", *TINY, "seed=5", f"hydra.run.dir={made.run}")
    assert message.startswith(f"{made.run} holds a run already: resume={made.run} goes on with it")
    assert (made.run / "config.yaml").read_bytes() == config


# Runs and checkpoints

FINETUNE = {
    "upstream.path=nowhere": "no encoder folder at nowhere: expected RUN/encoder of a pre-training run",
    "upstream.path={run}": "{run} is a run's folder: its encoder is {run}/encoder",
    "upstream.path={run}/checkpoints": "no encoder config at {run}/checkpoints/config.json",
    "upstream.path='{run}/checkpoints/step=4.ckpt'": "{run}/checkpoints/step=4.ckpt is a file, but an encoder is a folder",
    "upstream.path={run}/train.log": "{run}/train.log is a file, but an encoder is a folder",
    "data.label_fraction=0": "data.label_fraction must be in (0, 1], found 0",
    "data.label_fraction=1.5": "data.label_fraction must be in (0, 1], found 1.5",
    "trainer.val_check_interval=10": "trainer.val_check_interval=10 comes after the last step, trainer.max_steps=4: lower it",
    "downstream.layers=first": "downstream.layers must be last, weighted_sum or a list of numbers, found 'first'",
    "downstream.layers=[0,3]": "downstream.layers=[0, 3]: the upstream has the hidden states 0 to 2",
    "downstream.top_layers=1": "downstream.top_layers=1 says what to fine-tune: set downstream.train_encoder=true",
    "downstream=intent": "utterance train000-train-0000 has no label 'action' (its labels: accent, keyword, speaker)",
    "downstream.batch_size=0": "downstream.batch_size must be at least 1, found 0",
    "downstream.labels.tier=word": "utterance train000-train-0000 has no alignment tier 'word'",
    "downstream=phone_linaer": "downstream=phone_linaer: no such option (did you mean phone_linear?)",
    "resume={run}": "resume={run}: a run of audiot pretrain: audiot pretrain resume={run} goes on with it",
}


@pytest.mark.parametrize(("argument", "expected"), FINETUNE.items())
def test_finetuning_refuses(made, argument, expected):
    given = TINY if argument.startswith("upstream.path") else [*TINY, f"upstream.path={made.encoder}"]
    message = refusal("finetune", *given, argument.format(run=made.run))
    assert expected.format(run=made.run) in message


def test_speakers_of_training_in_a_task_about_new_ones(made):
    given = [*TINY, f"upstream.path={made.encoder}", "downstream=speaker_utterance", "downstream.new_speakers=true"]
    message = refusal("finetune", *given)
    assert message.startswith("speaker train000 of utterance train000-speaker_valid-0000 (valid split) is in training too (")
    assert message.endswith("leave them out of one, or set downstream.new_speakers=false")


def test_a_lexicon_that_is_not_there(made):
    given = [*TINY, f"upstream.path={made.encoder}", "downstream=phone_recognition"]
    assert refusal("finetune", *given, "downstream.labels.lexicon=nowhere.txt").startswith("no lexicon at nowhere.txt: ")
    assert "downstream.objective.beam.lexicon: there is no file nowhere.txt" in refusal(
        "finetune", *given, "downstream.objective.beam={lexicon: nowhere.txt}"
    )


def test_features_have_no_encoder_to_train(made):
    message = refusal("finetune", *TINY, "upstream=features", "downstream.train_encoder=true")
    assert message == "upstream=features has nothing to train: drop downstream.train_encoder=true"


@pytest.mark.parametrize("command", ["pretrain init=", "finetune upstream.path="])
@pytest.mark.parametrize("damage", ["weights", "config"])
def test_a_damaged_encoder(made, tmp_path, command, damage):
    encoder = Path(shutil.copytree(made.encoder, tmp_path / "encoder"))
    path = encoder / {"weights": "model.safetensors", "config": "config.json"}[damage]
    path.write_bytes(path.read_bytes()[:-100])
    name, option = command.split()
    message = refusal(name, *DATA, *TRAINER, f"{option}{encoder}")
    assert message.startswith(f"{path} is {'truncated or' if damage == 'weights' else 'not a readable encoder config'}")


def test_damaged_and_missing_checkpoints(made, tmp_path):
    folder = Path(shutil.copytree(made.run, tmp_path / "run"))
    shutil.rmtree(folder / "encoder")  # which `analyze` would take where no checkpoint is left
    checkpoint, *others = checkpoints(folder / "checkpoints")
    for other in others:
        other.unlink()
    for content, expected in (
        (checkpoint.read_bytes()[:-100], f"{checkpoint} is damaged: it is truncated or not a checkpoint"),
        (b"hello", f"{checkpoint} is damaged: it is truncated or not a checkpoint"),
        (None, f"{folder}: no checkpoint of a run in {folder / 'checkpoints'}: expected step=N.ckpt"),
    ):
        if content is None:
            checkpoint.unlink()
        else:
            checkpoint.write_bytes(content)
        assert refusal("pretrain", f"resume={folder}", "trainer.max_steps=6") == expected
        assert refusal("evaluate", f"run={folder}") == expected
        assert refusal("analyze", f"run={folder}") == expected


def test_a_damaged_checkpoint_of_a_probe(made, tmp_path):
    folder = Path(shutil.copytree(made.run / "probes" / "probe-phone-encoder", tmp_path / "run"))
    checkpoint = folder / "checkpoints" / "best.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert refusal("evaluate", f"run={folder}") == f"{checkpoint} is damaged: it is truncated or not a checkpoint"
    assert refusal("analyze", f"run={folder}").startswith(f"run={folder} is a run of finetune, analyze draws runs of pretrain")
    other = f"resume={folder}: a run of audiot finetune: audiot finetune resume={folder} goes on with it"
    assert refusal("pretrain", f"resume={folder}") == other


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_a_folder_that_is_no_run(made, command):
    for folder in ("nowhere", made.encoder):
        assert refusal(command, f"run={folder}") == f"run={folder}: no run there ({folder}/config.yaml is missing)"


def copy_with(made, folder, name, change):
    """A copy of the run without its probes, whose YAML or JSON file was changed."""
    shutil.copytree(made.run, folder, ignore=shutil.ignore_patterns("probes"))
    content = yaml.safe_load((folder / name).read_text())
    (folder / name).write_text(json.dumps(change(content)))
    return folder


def test_a_config_that_lacks_something_is_named_with_its_run(made, tmp_path):
    run = copy_with(
        made, tmp_path / "run", "config.yaml", lambda content: {key: content[key] for key in content if key != "trainer"}
    )
    assert refusal("evaluate", f"run={run}") == f"{run}: its config can't be used: Missing key trainer"


@pytest.mark.parametrize(("name", "value"), [("files", [1]), ("files", None), ("content", 3), ("prepared", {})])
def test_a_note_of_the_data_that_was_changed_is_named(made, tmp_path, name, value):
    run = copy_with(made, tmp_path / "run", "data.json", lambda content: content | {name: value})
    assert refusal("evaluate", f"run={run}").startswith(
        f"{run}/data.json: {name} is {str(value)!r}, which no run notes of its data"
    )


def test_an_utterance_that_is_not_there(made):
    assert refusal("analyze", f"run={made.run}", "utterance=nobody").startswith("utterance=nobody: no such utterance")


def test_what_a_resumed_run_cannot_change(made):
    for argument, expected in (
        (
            "trainer.max_stps=6",
            f"resume={made.run}: 'trainer.max_stps' is not a key of the run's config (did you mean trainer.max_steps?)",
        ),
        ("trainer.max_steps=abc", "trainer.max_steps=abc: expected a whole number, such as 4"),
        (
            "attention=synthesizer_dense",
            "attention=synthesizer_dense can't change on resume: a new run can have another",
        ),
    ):
        assert refusal("pretrain", f"resume={made.run}", argument) == expected
    assert read(made.run / "summary.json")["steps"] == 4


# Audio and labels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Sixteen short recordings named by keyword, speaker and take, as `data=folder` arguments."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for keyword in ("yes", "no"):
        for speaker in ("ann", "bob"):
            for take in range(4):
                name = f"{keyword}_{speaker}_{take}.wav"
                soundfile.write(tmp_path / "audio" / name, 0.1 * noise.standard_normal(RATE // 2), RATE)
    given = [
        "data=folder",
        "data.root=audio",
        "data.num_workers=0",
        "data.batch_s=10",
        "data.prepare.num_jobs=1",
        f"data_dir={tmp_path / 'data'}",
    ]
    return [*MODEL, *TRAINER, "logger=none", *given, "data.pattern='{keyword}_{speaker}_{take}'"]


def test_no_folder_and_no_audio_in_it(folder, tmp_path):
    assert "there is no folder" in refusal("pretrain", *folder, "data.root=nowhere")
    (tmp_path / "empty").mkdir()
    assert refusal("pretrain", *folder, "data.root=empty").startswith("empty has no audio files (aac, ")


def test_a_label_that_training_never_saw(folder):
    split = ["data.test='keyword==\"no\"'", "data.valid='take==3'"]
    message = refusal("finetune", *folder, *split, "downstream=keyword", "upstream=features")
    assert message.startswith("label 'no' of utterance no_ann_0 (test split) does not occur in training")


def test_labels_that_the_data_has_not(folder):
    assert "has no alignment tier 'phone'" in refusal("finetune", *folder, "upstream=features")
    message = refusal("finetune", *folder, "upstream=features", "downstream=keyword", "data.pattern=null")
    assert message.startswith("utterance no_ann_0 has no label 'keyword' (its labels: ")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("data.train='take>=9'", "no utterance of audio is left for train (take>=9): change data.train"),
        ("data.train='tak>=2'", "unknown field tak: did you mean take?"),
        ("data.train='take>>2'", "take >> 2 is not a comparison"),
        ("data.pattern='{keyword}_{speaker'", "data.pattern '{keyword}_{speaker': expected '}' before end of string"),
    ],
)
def test_splits_that_select_nothing_or_make_no_sense(folder, argument, expected):
    assert expected in refusal("pretrain", *folder, argument)


def test_audio_shorter_than_a_frame(folder, tmp_path):
    noise = np.random.default_rng(1)
    soundfile.write(tmp_path / "audio" / "short_ann_0.wav", 0.1 * noise.standard_normal(300), RATE)
    split = ["data.train='take==0'", "data.valid='take==2'", "data.test='take==3'", "data.prepare.min_duration_s=0.001"]
    message = refusal("pretrain", *folder, *split, "probe=false")
    assert "300 samples: one token needs 720" in message
    assert "leave out recordings shorter than 0.045 s" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_audio_that_went_away_after_preparation(folder, tmp_path, num_workers):
    succeed("prepare", *[given for given in folder if given.startswith("data")])
    shutil.rmtree(tmp_path / "audio")
    options = ["probe=false", f"data.num_workers={num_workers}"]
    message = refusal("pretrain", *folder, *options)
    assert f"was prepared from files that are missing, {tmp_path / 'audio'}/" in message
    message = refusal("pretrain", *folder, *options, "data.prepare.when=keep")
    # Nothing of the worker's traceback, which comes inside the error's message.
    assert message.startswith(f"Reading audio from '{tmp_path / 'audio'}/")
    assert message.endswith(".wav' failed: was it moved? Put it back, or delete the prepared corpus")


def test_a_value_of_any_length_leaves_an_error_of_one_readable_line():
    said = describe(ValueError(f"overrides.yaml: found {'x' * 100_000}: expected a number"))
    assert len(said) < 1600
    assert said.startswith("overrides.yaml: found xxx")
    assert said.endswith("xxx: expected a number")


# W&B


@pytest.mark.slow
def test_wandb_without_a_login_does_not_ask(made, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once a process

    class Terminal:
        def isatty(self):
            return True

        def readline(self, *arguments):
            raise AssertionError("W&B asks")

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    nobody = {"HOME": str(tmp_path), "NETRC": os.devnull, "WANDB_MODE": "online"}
    message = refusal("pretrain", *TINY, "logger=wandb", **nobody)
    assert message.startswith("logger=wandb: No API key configured.")
    assert message.endswith("WANDB_MODE=offline keeps the run on this machine.")
