"""The command line on a tiny demo corpus."""

import contextlib
import csv
import fcntl
import functools
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import yaml
from faults import tries
from hydra.core.global_hydra import GlobalHydra
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from some import some

import audiot.cli
from audiot.attention import names
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.base import slurm
from audiot.commands import launch, probing
from audiot.downstream.module import DownstreamModule

DATA = [
    "data.hours=0.01",
    "data.num_speakers=2",
    "data.corpus.num_valid_speakers=1",
    "data.corpus.num_test_speakers=1",
    "data.corpus.heldout_utterances=4",
    "data.corpus.speaker_utterances=2",
    "data.prepare.num_jobs=1",
    "data.num_workers=0",
    "data.batch_s=10",
]
MODEL = ["model.embed_dim=24", "model.num_heads=2", "model.ffn_dim=48", "model.num_layers=2"]
TRAINER = ["trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2"]
TINY = [*DATA, *MODEL, *TRAINER]
REPOSITORY = Path(__file__).parent.parent
DRAW = Figure.savefig
blank = pytest.mark.usefixtures("blank_pictures")


def run(*arguments, **environment):
    """Run `audiot ARGUMENTS` in this process. Returns exit ``code``, ``out`` and ``err`` without progress bars."""
    out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
    kept = root.handlers[:], root.level
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["audiot"]),
        warnings.catch_warnings(),
    ):
        try:
            audiot.cli.main(list(arguments))
            code = 0
        except SystemExit as stop:  # as the interpreter does it
            code = stop.code if isinstance(stop.code, int) else 1
            err.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
    GlobalHydra.instance().clear()
    for handler in root.handlers:
        handler.close()
    root.handlers, root.level = kept
    # A bar rewrites its line from the start: what counts is what stands there last.
    out, err = ("\n".join(line.rpartition("\r")[2] for line in text.getvalue().split("\n")) for text in (out, err))
    return SimpleNamespace(code=code, out=out, err=err)


def succeed(*arguments, **environment):
    """The output of a command that must succeed."""
    result = run(*arguments, **environment)
    assert result.code == 0, result.err
    return result.out


@functools.cache
def prepared(base):
    """A folder for ``AUDIOT_DATA`` and a pre-training run with every probe of the demo, two steps each.

    Made once, in a folder that all of pytest's processes share: the second one waits.
    """
    pytest.importorskip("espeakng_loader")
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = SimpleNamespace(data=base / "audiot-data", run=base / "pretrained", encoder=base / "pretrained" / "encoder")
    with (base / "pretrained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "pretrained.out").exists():
            out = pretrain_with_probes(base, made)
            (base / "pretrained.out").write_text(out)
    made.out = (base / "pretrained.out").read_text()
    return made


def pretrain_with_probes(base, made):
    """Output of the command."""
    demo = yaml.safe_load((REPOSITORY / "conf" / "probes" / "demo.yaml").read_text())
    short = ["trainer.max_steps=2", "trainer.val_check_interval=1"]
    probes = {
        name: [o for o in overrides if not o.startswith(("trainer.", "data.label"))] + short for name, overrides in demo.items()
    }
    (base / "searched" / "probes").mkdir(parents=True)
    (base / "searched" / "probes" / "tiny.yaml").write_text(yaml.safe_dump(probes))
    where = [f"hydra.run.dir={made.run}", f"hydra.searchpath=[file://{base / 'searched'}]"]
    with mock.patch.object(Figure, "savefig", DRAW):  # whatever the test that comes first wants
        return succeed("pretrain", *TINY, "probes=tiny", *where, AUDIOT_DATA=str(made.data))


@pytest.fixture
def made(tmp_path_factory, tmp_path, monkeypatch):
    """The prepared corpus and run, in ``AUDIOT_DATA``; the current folder is an empty one."""
    made = prepared(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("AUDIOT_DATA", str(made.data))
    monkeypatch.chdir(tmp_path)
    return made


def copy_run(made, folder):
    """A copy of the pre-training run, for a test that changes it."""
    shutil.copytree(made.run, folder)
    return folder


def read(path):
    return json.loads(path.read_text())


def last_line(text):
    return text.strip().splitlines()[-1]


# Without running anything


def test_help_names_every_command():
    out = succeed("--help")
    assert out == succeed()
    for command in ("pretrain", "tune", "finetune", "superb", "evaluate", "analyze", "abx", "prepare", "benchmark", "list"):
        assert command in out


def test_version_is_the_packages():
    assert succeed("--version") == f"audiot {audiot.__version__}\n"


def test_list_names_the_groups_and_their_options():
    groups = succeed("list").split()
    folders = [
        folder.relative_to(REPOSITORY / "conf").as_posix() for folder in (REPOSITORY / "conf").rglob("*") if folder.is_dir()
    ]
    assert groups == sorted(folder for folder in folders if "__pycache__" not in folder)
    for group in ("attention", "attention/search"):
        listed = dict(line.split(maxsplit=1) for line in succeed("list", group).splitlines())
        files = sorted((REPOSITORY / "conf" / group).glob("*.yaml"))
        assert listed == {path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for path in files}


def test_help_of_a_command_shows_groups_and_keys():
    out = succeed("pretrain", "attention=local", "--help")
    assert f"attention   {', '.join(names())}" in " ".join(out.split()).replace("attention ", "attention   ", 1)
    assert "seed: 0" in out
    assert "_target_: audiot.attention.local.Local" in out
    assert "attention/search" not in out  # what the chosen mechanism has no part for
    assert "attention/search  chunked, topk" in succeed("pretrain", "attention=lsh_simple", "--help")


# Pre-training


@blank
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["trainer.fast_dev_run=true"], "1 steps"),
        pytest.param(["trainer.overfit_batches=2", "trainer.detect_anomaly=true"], "4 steps", marks=pytest.mark.slow),
        pytest.param(["trainer.limit_train_batches=2", "trainer.profiler=simple"], "run_training_epoch", marks=pytest.mark.slow),
    ],
)
def test_arguments_of_lightnings_trainer_work(made, tmp_path, options, said):
    out = succeed("pretrain", *TINY, "probe=false", *options, f"hydra.run.dir={tmp_path / 'run'}")
    assert said in out
    assert (tmp_path / "run" / "encoder").is_dir()
    downstream = ["downstream=phone_linear", f"upstream.path={made.encoder}", *DATA, *TRAINER]
    out = succeed("finetune", *downstream, *options, f"hydra.run.dir={tmp_path / 'tuned'}")
    assert said in out or "steps" in said
    assert ("audiot predict" in out) == ("fast_dev_run" not in options[0])
    assert "test/accuracy" in read(tmp_path / "tuned" / "metrics.json")


def test_a_share_of_endless_batches_is_refused(made, tmp_path):
    failed = run("pretrain", *TINY, "probe=false", "trainer.overfit_batches=0.5", f"hydra.run.dir={tmp_path / 'run'}")
    assert "trainer.overfit_batches must be a number of batches, found 0.5" in failed.err
    assert not (tmp_path / "run").exists()  # a start that fails leaves nothing


def test_a_shell_completes_commands_groups_and_keys():
    script = succeed("-sc", "install=bash")
    assert "-F hydra_bash_completion audiot" in script
    for line, words in {
        "audiot pre": "prepare pretrain predict",
        "audiot pretrain attention=synthesizer_d": "attention=synthesizer_dense",
        "audiot finetune downstream=phone_l": "downstream=phone_linear",
        "audiot predict x": "",
    }.items():
        out = succeed("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
        assert sorted(out.split()) == sorted(words.split())


def test_pretraining_leaves_a_whole_run_behind(made):
    for name in (
        "config.yaml",
        "train.log",
        "metrics.csv",
        "summary.json",
        "checkpoints/step=4.ckpt",
        "encoder/model.safetensors",
        "encoder/config.json",
        "plots/training.png",
        "plots/attention.png",
        "plots/codes.png",
        "plots/probes.png",
    ):
        assert (made.run / name).stat().st_size > 0
    summary = read(made.run / "summary.json")
    assert set(summary) == {
        *(f"pretrain/{name}_cross_entropy" for name in ("val", "unigram", "chance")),
        *(f"pretrain/{name}_accuracy" for name in ("val", "neighbour", "unigram")),
        *("targets/codes", "targets/used", "targets/perplexity", "targets/stability", "monitor"),
        *(f"probe/{task}/{upstream}" for task in ("phone", "speaker") for upstream in ("encoder", "random", "features")),
        *(f"finetune/phone/{upstream}" for upstream in ("encoder", "random")),
        *(
            "frames_per_s",
            "data_wait",
            "first_step_s",
            "train_s",
            "precision",
            "parameters",
            "steps",
            "wall_s",
            "resumed_step",
            "intervals",
        ),
    }
    assert summary["steps"] == 4
    for name, value in summary.items():
        if name.startswith(("probe/", "finetune/")):
            probe = made.run / "probes" / name.replace("/", "-")
            metrics = read(probe / "metrics.json")
            assert metrics["test/accuracy"] == value
            assert metrics["intervals"].get("test/accuracy") == summary["intervals"].get(name)


@blank
def test_pretraining_says_what_to_run_next_and_that_runs(made, tmp_path):
    line = last_line(made.out)
    assert line == last_line((made.run / "train.log").read_text())
    assert line.startswith("next:   audiot finetune ")
    command = shlex.split(line.removeprefix("next:   audiot "))
    # The data of the run, not the default's.
    assert [argument for argument in command if argument.startswith("data.")] == DATA
    succeed(*command, *TRAINER, f"hydra.run.dir={tmp_path / 'next'}")
    assert read(tmp_path / "next" / "metrics.json")["upstream"] == "checkpoint"


@blank
def test_init_starts_from_an_exported_encoder_and_probe_false_leaves_probes_out(made, tmp_path):
    folder = tmp_path / "run"
    where = [f"hydra.run.dir={folder}", "logger=none", "trainer.max_steps=1", "trainer.accelerator=cpu"]
    out = succeed("pretrain", *DATA, f"init={made.encoder}", "probe=false", "optimizer.lr=0", *where)
    assert "init " in out
    # A learning rate of zero leaves the encoder's weights as they came.
    assert (folder / "encoder" / "model.safetensors").read_bytes() == (made.encoder / "model.safetensors").read_bytes()
    assert not (folder / "probes").exists()
    assert not [name for name in read(folder / "summary.json") if name.startswith(("probe/", "finetune/"))]


@blank
def test_a_finished_run_is_not_resumed_and_a_longer_one_is(made, tmp_path):
    folder = copy_run(made, tmp_path / "run")
    assert "nothing to resume" in succeed("pretrain", f"resume={folder}")
    before = read(folder / "summary.json")
    out = succeed("pretrain", f"resume={folder}", "trainer.max_steps=6", "probe=false")
    assert " s since step 4\n" in out
    after = read(folder / "summary.json")
    assert after["steps"] == 6
    assert after["pretrain/val_cross_entropy"] != before["pretrain/val_cross_entropy"]
    assert not (folder / "probes").exists()  # they were the shorter run's
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert int(rows[0]["step"]) == 1  # the earlier part's are kept
    assert "nothing to resume" in succeed("pretrain", f"resume={folder}", "trainer.max_steps=6", "probe=false")


def without_probes(made, folder, kept, missing):
    """A copy of the pre-training run with only these probes, the latter not done yet."""
    copy_run(made, folder)
    config = OmegaConf.load(folder / "config.yaml")
    config.probes = {name: config.probes[name] for name in (*kept, *missing)}
    OmegaConf.save(config, folder / "config.yaml")
    summary = {name: value for name, value in read(folder / "summary.json").items() if not name.startswith("probe/")}
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in missing:
        shutil.rmtree(folder / "probes" / name.replace("/", "-"))


@blank
@pytest.mark.parametrize(
    ("missing", "jobs"), [(["features"], 1), pytest.param(["features", "random"], 2, marks=pytest.mark.slow)]
)
def test_probes_that_are_missing_are_made_up_for_on_resuming(made, tmp_path, missing, jobs):
    folder, kept, missing = tmp_path / "run", "probe/phone/encoder", [f"probe/phone/{name}" for name in missing]
    without_probes(made, folder, [kept], missing)
    untouched = (folder / "probes" / "probe-phone-encoder" / "metrics.json").stat().st_mtime_ns
    out = succeed("pretrain", f"resume={folder}", f"probe_jobs={jobs}")
    expected = read(made.run / "summary.json")
    assert {name: expected[name] for name in (kept, *missing)}.items() <= read(folder / "summary.json").items()
    assert (folder / "probes" / "probe-phone-encoder" / "metrics.json").stat().st_mtime_ns == untouched
    assert f"probes  1 of {1 + len(missing)} are there already\n" in out
    if jobs > 1:  # what each says stands together
        for name in missing:
            folder_name = name.replace("/", "-")
            said = rf"\n{name}:  audiot finetune .*\ncorpus .*\n(few .*\n)*test .*\nci .*\nrun .*{folder_name}: metrics.json"
            assert re.search(said, out)


def broken(*arguments, **options):
    raise RuntimeError("no ink")


@blank
def test_pictures_that_fail_are_told_at_the_end_and_end_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr("audiot.commands.pretrain.plot_attention", broken)
    monkeypatch.setattr("audiot.objectives.codes.plot_codes", broken)
    folder = tmp_path / "run"
    out = succeed("pretrain", *TINY, "probe=false", f"hydra.run.dir={folder}")
    assert out.splitlines()[-2:] == [
        "failed  codes.png: RuntimeError: no ink",
        "failed  attention.png: RuntimeError: no ink",
    ]
    assert (folder / "encoder").is_dir()
    assert read(folder / "summary.json")["steps"] == 4
    assert {path.name for path in (folder / "plots").iterdir()} == {"training.png"}
    assert "nothing to resume" in succeed("pretrain", f"resume={folder}")
    monkeypatch.setattr("audiot.commands.analyze.plot_attention", broken)
    result = run("analyze", f"run={folder}")
    pictures = "codes.png, attention.png"
    assert (result.code, result.err) == (1, f"audiot: error: not drawn in {folder / 'plots'}: {pictures}\n")
    assert {path.name for path in (folder / "plots").iterdir()} == {"training.png", "heads.png", "pruning.png"}


@blank
def test_pictures_and_tables_of_a_task_that_fail_are_told_at_the_end(made, tmp_path, monkeypatch):
    monkeypatch.setattr("audiot.downstream.objectives.plot_confusion", broken)
    monkeypatch.setattr("audiot.commands.finetune.plot_layer_weights", broken)
    folder = tmp_path / "run"
    given = ["downstream=phone_linear", "downstream.layers=weighted_sum", f"upstream.path={made.encoder}"]
    out = succeed("finetune", *DATA, *TRAINER, *given, f"hydra.run.dir={folder}")
    *_, first, second, following = out.splitlines()
    assert first == "failed  tables and pictures of the test: RuntimeError: no ink"
    assert second == "failed  layer_weights.png: RuntimeError: no ink"
    assert following.startswith("next:   audiot predict")
    assert "test/accuracy" in read(folder / "metrics.json")
    assert (folder / "per_utterance.csv").is_file()


@pytest.mark.slow
@blank
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_probe_that_fails_lets_the_others_finish_and_is_told_at_the_end(made, tmp_path, jobs):
    folder, missing = tmp_path / "run", ["probe/phone/random", "probe/phone/features"]
    without_probes(made, folder, ["probe/phone/encoder"], missing)
    path = folder / "config.yaml"
    config = OmegaConf.load(path)
    whole = OmegaConf.to_container(config.probes)["probe/phone/random"]
    config.probes["probe/phone/random"] = [each for each in whole if not each.startswith("upstream.path")] + [
        "upstream.path=gone"
    ]
    OmegaConf.save(config, path)
    result = run("pretrain", f"resume={folder}", f"probe_jobs={jobs}")
    assert result.code == 1
    assert last_line(result.err) == (
        f"audiot: error: 1 of 3 probes failed, and all else is done; audiot pretrain resume={folder} does them again; "
        "the first, probe/phone/random: no encoder folder at gone: expected RUN/encoder of a pre-training run"
    )
    assert "\nfailed  no encoder folder at gone: " in result.out
    assert last_line(result.out).startswith("next:   audiot finetune ")
    figures = {name for name in read(folder / "summary.json") if name.startswith("probe/")}
    assert figures == {"probe/phone/encoder", "probe/phone/features"}
    config.probes["probe/phone/random"] = whole
    OmegaConf.save(config, path)
    out = succeed("pretrain", f"resume={folder}", f"probe_jobs={jobs}")
    assert "probes  2 of 3 are there already\n" in out
    expected = read(made.run / "summary.json")
    assert read(folder / "summary.json")["probe/phone/random"] == expected["probe/phone/random"]


def test_a_probe_that_is_killed_fails_and_says_how_to_do_without(monkeypatch):
    class Killed:
        def __init__(self, *arguments):
            self.asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, probe):
            future = Future()
            self.asked += 1
            future.set_result(("test 1.0", None)) if self.asked == 1 else future.set_exception(BrokenProcessPool("killed"))
            return future

    monkeypatch.setattr(probing, "ProcessPoolExecutor", Killed)
    titles = {"one": "one:", "two": "two:"}
    failed = probing._run_together({name: OmegaConf.create({}) for name in titles}, titles, 2)
    assert failed == {"two": "a probe was killed, for want of memory perhaps: resume the run with probe_jobs=1"}


@pytest.mark.slow
@blank
@pytest.mark.parametrize("attempt", tries())
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_to_all_processes_saves_a_checkpoint_and_prints_the_command_that_goes_on(made, tmp_path, number, attempt):
    folder = tmp_path / "run"
    endless = ["trainer.max_steps=100000", "trainer.val_check_interval=100000", "checkpoint.every_n_steps=2"]
    program = [sys.executable, "-m", "audiot.cli", "pretrain", *TINY, "probe=false", "data.num_workers=1"]
    process = subprocess.Popen(
        [*program, f"hydra.run.dir={folder}", *endless],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while not list(folder.glob("checkpoints/*.ckpt")):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.013 * attempt)
        os.killpg(process.pid, number)  # as a terminal, SLURM and systemd do: to the loader's workers as well
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    (saved,) = (line for line in err.splitlines() if line.startswith("audiot: interrupted"))
    checkpoint = Path(saved.rpartition("saved ")[2])
    assert checkpoint.is_file()
    (resume,) = (line for line in err.splitlines() if line.startswith("resume:"))
    step = int(checkpoint.stem.removeprefix("step="))
    command = resume.removeprefix("resume:  audiot ").split()
    succeed(*command, f"trainer.max_steps={step + 2}", "trainer.val_check_interval=1", "data.num_workers=0")
    assert read(folder / "summary.json")["steps"] == step + 2


@pytest.mark.slow
def test_ctrl_c_ends_probes_that_run_together(made, tmp_path):
    folder, names = tmp_path / "run", ["probe/phone/encoder", "probe/phone/random"]
    without_probes(made, folder, [], names)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("trainer.max_steps=2", "trainer.max_steps=1000000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "audiot.cli", "pretrain", f"resume={folder}", "probe_jobs=2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    try:
        while not all((folder / "probes" / name.replace("/", "-") / "checkpoints").is_dir() for name in names):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        with contextlib.suppress(ProcessLookupError):  # raised once nothing is left of its group
            for _ in range(600):
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            pytest.fail("processes of the probes go on")
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "audiot: interrupted in the probes after step 4; " in err
    assert f"resume:  audiot pretrain resume={folder}\n" in err


@pytest.mark.slow
@blank
def test_a_job_of_slurm_whose_time_ends_is_put_back_into_the_queue_and_goes_on(made, tmp_path, monkeypatch):
    folder, asked = tmp_path / "run", tmp_path / "asked"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, value in {"NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_ID": 71, "JOB_NAME": "days"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    given = ["pretrain", *TINY, "probe=false", f"hydra.run.dir={folder}", "trainer.val_check_interval=1000"]
    endless = ["trainer.max_steps=100000", "checkpoint.every_n_steps=2"]
    program = [sys.executable, "-m", "audiot.cli", *given, *endless]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list(folder.glob("checkpoints/*.ckpt")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "\nrequeue: job 71 is back in the queue\n" in err
    assert asked.read_text() == "requeue 71\n"
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # Lightning's own
    (step,) = (int(path.stem.removeprefix("step=")) for path in folder.glob("checkpoints/*.ckpt") if path.name in err)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    out = succeed(*given, f"trainer.max_steps={step + 2}", "trainer.val_check_interval=1")
    assert out.startswith(f"resume  {folder}/checkpoints/step={step}.ckpt")
    assert read(folder / "summary.json")["steps"] == step + 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["hydra.run.dir=days"], "days"),
        (["resume=outputs/days"], "outputs/days"),
        (["hydra.run.dir=days/${now:%H}"], None),
        ([], None),
    ],
)
def test_a_job_is_put_back_only_if_it_finds_its_run_again(given, expected):
    assert launch.lasting_folder("pretrain", given) == (expected and Path(expected))


def test_tasks_of_a_job_that_share_a_folder_find_it_again(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert launch.lasting_folder("finetune", []) == Path("outputs/finetune/slurm-71-0")


@pytest.mark.parametrize(("task", "name"), [({}, "71"), ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, "70_3")])
def test_what_scontrol_says_is_passed_on(monkeypatch, tmp_path, task, name):
    for key, value in ({"SLURM_JOB_ID": "71", "PATH": str(tmp_path)} | task).items():
        monkeypatch.setenv(key, value)
    assert slurm.job() == name
    assert slurm.requeue(name) == f"scontrol requeue {name} failed: No such file or directory"
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'Access denied' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    assert slurm.requeue(name) == f"scontrol requeue {name} failed: Access denied"


@blank
def test_sigterm_in_the_test_of_fine_tuning_tells_how_to_go_on(made, tmp_path, monkeypatch):
    given = ["finetune", *DATA, "trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1", "logger=none"]
    given += [f"upstream.path={made.encoder}", f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(DownstreamModule, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        stopped = run(*given)
    assert stopped.code == 130
    assert f"audiot: interrupted in the test after step 2; saved {tmp_path}/run/checkpoints/step=2.ckpt" in stopped.err
    assert stopped.err.strip().splitlines()[-1] == f"resume:  audiot finetune resume={tmp_path}/run"
    assert "next:   audiot predict" in succeed("finetune", f"resume={tmp_path}/run")


# The other commands


FROZEN = ["upstream.path={encoder}", "downstream.layers=weighted_sum"]
TUNED = ["upstream.path={encoder}", "downstream.train_encoder=true"]


@pytest.mark.parametrize(
    ("task", "upstream", "options"),
    [
        ("phone_linear", "checkpoint", FROZEN),
        ("phone_linear", "features", ["data.label_fraction=0.5"]),
        ("phone_linear", "random", TUNED),
        ("speaker_utterance", "checkpoint", FROZEN),
        ("keyword", "random", TUNED),
    ],
)
def test_finetuning_leaves_a_run_that_evaluate_reproduces(made, tmp_path, task, upstream, options):
    folder = tmp_path / "run"
    options = [option.format(encoder=made.encoder) for option in options]
    where = f"hydra.run.dir={folder}"
    out = succeed("finetune", *DATA, *TRAINER, f"downstream={task}", f"upstream={upstream}", *options, where)
    assert last_line(out).startswith(f"next:   audiot predict {folder} {made.data}")
    assert succeed(*shlex.split(last_line(out).removeprefix("next:   audiot "))).strip()
    metrics = read(folder / "metrics.json")
    assert metrics["fine_tuned"] == (upstream == "random")
    assert metrics["train_utterances"] == (8 if upstream == "features" else 16)
    assert ("layer_weights" in metrics) == (upstream == "checkpoint")
    assert (folder / "confusion.png").is_file()
    if task == "phone_linear":
        succeed("evaluate", f"run={folder}")
        now = read(folder / "evaluation.json")
        assert {name for name in metrics if name.startswith("test/")} == now.keys() - {"intervals", "bootstrap"}
        for name in now.keys() - {"intervals", "bootstrap"}:
            assert now[name] == pytest.approx(metrics[name], abs=1e-6)
        assert now["bootstrap"] == metrics["bootstrap"]
        assert now["intervals"].keys() == metrics["intervals"].keys()
        for name, ends in now["intervals"].items():
            assert ends == pytest.approx(metrics["intervals"][name], abs=1e-6)


@blank
def test_an_untrained_encoder_needs_no_path(made, tmp_path):
    succeed("finetune", *TINY, "upstream=random", "logger=none", f"hydra.run.dir={tmp_path / 'run'}")
    assert read(tmp_path / "run" / "metrics.json")["upstream"] == "random_encoder"


def test_evaluate_reproduces_a_pretraining_run_and_its_probes(made, tmp_path):
    folder = copy_run(made, tmp_path / "run")
    out = succeed("evaluate", f"run={folder}")
    then = {name: value for name, value in read(folder / "summary.json").items() if name.startswith("pretrain/")}
    assert read(folder / "evaluation.json") == pytest.approx(then, rel=1e-5)
    assert last_line(out).startswith(f"next:   audiot finetune downstream=phone_linear upstream.path={folder / 'encoder'} data.")
    for name in ("probe/phone/encoder", "finetune/phone/encoder"):  # the latter in the precision that is fast here
        probe = folder / "probes" / name.replace("/", "-")
        succeed("evaluate", f"run={probe}")
        accuracy = read(probe / "evaluation.json")["test/accuracy"]
        assert accuracy == pytest.approx(read(folder / "summary.json")[name], abs=1e-6)


def test_a_run_whose_data_have_changed_is_neither_measured_nor_drawn_nor_resumed(made, tmp_path):
    folder = copy_run(made, tmp_path / "run")
    assert ", kept as it was" in succeed("evaluate", f"run={folder}", "data.prepare.when=keep")
    (folder / "data.json").write_text(json.dumps(read(folder / "data.json") | {"content": "of other audio"}))
    probes = sorted(folder.glob("probes/*/metrics.json"))
    for command in (("evaluate", "run="), ("analyze", "run="), ("pretrain", "resume=", "trainer.max_steps=6")):
        result = run(command[0], f"{command[1]}{folder}", *command[2:])
        assert result.code == 1
        assert "has other utterances, labels or audio than the run was trained on, which was updated since" in result.err
    assert sorted(folder.glob("probes/*/metrics.json")) == probes
    result = run("evaluate", f"run={folder}", "data.prepare.when=update")
    assert "data.prepare.when must be check or keep here" in result.err


@blank
def test_analyze_draws_a_run(made, tmp_path):
    folder = copy_run(made, tmp_path / "run")
    shutil.rmtree(folder / "plots")
    out = succeed("analyze", f"run={folder}")
    drawn = {"codes", "attention", "training", "probes", "heads", "pruning"}
    assert {path.stem for path in (folder / "plots").glob("*.png")} == drawn
    assert all(str(folder / "plots" / f"{name}.png") in out for name in drawn)
    found, arrays = read(folder / "analysis.json"), (folder / "analysis.safetensors").read_bytes()
    assert len(found["heads"]) == len(found["pruning"]["alone"]) == 2 * 2
    assert found["pruning"]["removed"][0] == pytest.approx(read(folder / "summary.json")["pretrain/val_cross_entropy"], rel=1e-4)
    assert found["codes"]["targets"].keys() == {"pnmi", "phone_purity", "cluster_purity", "perplexity", "frames"}
    assert found["absent"] == {"tables": "no tables in all layers of QueryKey"}
    shutil.rmtree(folder / "checkpoints")  # as a study does
    again = tmp_path / "again"
    succeed("analyze", f"run={folder}", "plots=false", f"hydra.run.dir={again}")
    assert read(folder / "analysis.json") == read(again / "analysis.json") == found
    assert (again / "analysis.safetensors").read_bytes() == arrays


def test_prepare_says_how_to_train_on_the_corpus(made):
    out = succeed("prepare", *DATA)
    assert ["train", "16", "utterances"] in [line.split()[:3] for line in out.splitlines()]
    assert last_line(out) == f"next:   audiot pretrain {' '.join(DATA)}"


def test_scripts_are_the_commands(tmp_path):
    program = [sys.executable, str(REPOSITORY / "scripts" / "finetune.py"), "upstream.paht=x"]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr == "audiot: error: no config key 'upstream.paht' (did you mean upstream.path?)\n"


# The benchmark


BENCHMARK = [
    "benchmark.mechanisms=[synthesizer_random,{name: query_key,label: shared,overrides: {share_query_key: true},max_length: 8}]",
    "benchmark.lengths=[8,12]",
    "benchmark.frames=24",
    "benchmark.embed_dim=12",
    "benchmark.num_heads=2",
    "benchmark.rounds=1",
    "benchmark.seconds=0",
    "benchmark.device=cpu",
]


def test_benchmark_writes_a_table_a_picture_and_what_it_ran_on(tmp_path):
    out = succeed("benchmark", *BENCHMARK, f"hydra.run.dir={tmp_path / 'run'}")
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    assert len(rows) == 3 * 2 * 2 * 2  # mechanisms, lengths, scopes, directions
    assert all(bool(row["median_ms"]) != bool(row["note"]) for row in rows)
    assert {(row["mechanism"], row["length"]) for row in rows if row["note"]} == {("shared", "12")}
    assert (tmp_path / "run" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    machine = read(tmp_path / "run" / "machine.json")
    assert shlex.split(machine["command"]) == ["audiot", "benchmark", *BENCHMARK]
    assert {"device", "torch", "cpus", "threads", "wall_s"} <= set(machine)
    report = (tmp_path / "run" / "table.md").read_text()
    printed = out[out.index("layer, training, fp32: ms") :].splitlines()
    for name in ("query_key", "synthesizer_random", "shared"):
        (line,) = (line for line in printed if re.match(rf"{name}  ", line))
        assert f"| {' | '.join(re.split('  +', line))} |" in report
    assert any(re.match("synthesizer_random (passes|falls behind|is faster|never passes|and) ", line) for line in printed)
    assert "shared, T = 12: skipped: longer than max_length 8" in printed
    assert f"run     {tmp_path / 'run'}" in printed
    assert printed[-1] in [f"next:   audiot pretrain attention={name}" for name in ("query_key", "synthesizer_random")]


def test_a_wrong_mechanism_fails_the_benchmark_after_the_others_were_measured(tmp_path, monkeypatch):
    attend = SynthesizerRandom.attend
    monkeypatch.setattr(SynthesizerRandom, "attend", lambda self, value, valid: attend(self, value, valid) + 1)
    result = run("benchmark", *BENCHMARK, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 1
    (error,) = result.err.strip().splitlines()
    assert error.startswith(f"audiot: error: 8 of 24 measurements failed, see {tmp_path / 'run' / 'table.md'}; the first: ")
    assert (
        ": synthesizer_random, operator, inference, fp32, T = 8: wrong: its output in fp32 differs from weights() @ value"
        in error
    )
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    assert [row["mechanism"] for row in rows if row["note"].startswith("wrong")] == ["synthesizer_random"] * 8
    assert (tmp_path / "run" / "benchmark.png").is_file()


def test_a_benchmark_that_cannot_run_says_why_in_one_line():
    result = run("benchmark", "benchmark.mechanisms=[query_kye]")
    assert result.code == 1
    assert result.err.startswith(
        "audiot: error: benchmark.mechanisms: no attention 'query_kye' (did you mean query_key?); there are"
    )
    assert run("benchmark", "benchmark.compile=true").err == (
        "audiot: error: benchmark.compile=True: expected a list, such as [False]\n"
    )


# Sweeps


@pytest.mark.slow
@blank
def test_a_sweep_closes_with_a_table_over_seeds(made, tmp_path):
    options = ["attention=query_key,synthesizer_random", "seed=0,1", "probe=false", "logger=none", "trainer.max_steps=2"]
    out = succeed("pretrain", *TINY, "-m", *options, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    header, *rows = csv.reader((tmp_path / "sweep" / "sweep.csv").open())
    assert header == ["setting", "runs", "pretrain/val_cross_entropy", "frames_per_s"]
    assert [row[:2] for row in rows] == [["attention=query_key", "2"], ["attention=synthesizer_random", "2"]]
    for number, row in zip(("0", "2"), rows, strict=True):
        losses = [
            read(tmp_path / "sweep" / run / "summary.json")["pretrain/val_cross_entropy"]
            for run in (number, str(int(number) + 1))
        ]
        assert row[2].split(" ± ")[0] == f"{sum(losses) / 2:.3f}"
    table = out[out.index("sweep, mean ± standard deviation") :]
    assert [line.split()[0] for line in table.splitlines()[1:]] == [*header, "wrote"]


@pytest.mark.slow
@blank
def test_a_sweep_goes_on_after_a_failure_and_says_which_run_failed(made, tmp_path):
    sweep = tmp_path / "sweep"
    options = ["attention=synthesizer_dense,query_key", "positions=rotary", "seed=3", "probe=false", "logger=none"]
    result = run("pretrain", *TINY, "--multirun", *options, f"hydra.sweep.dir={sweep}")
    assert result.code == 1
    why = "rotary positions turn queries and keys but SynthesizerDense has none: set positions=sinusoid"
    assert result.err.splitlines() == [
        f"run 0 of the sweep failed: {why}",
        f"audiot: error: 1 of 2 runs failed: 0 (attention=synthesizer_dense); see {sweep}/*/error.txt",
    ]
    assert (sweep / "0" / "error.txt").read_text() == f"audiot: error: {why}\n"
    assert [row[0] for row in csv.reader((sweep / "sweep.csv").open())] == ["setting", "attention=query_key"]


@blank
def test_a_search_gets_the_validation_loss_to_minimise(made, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    options = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "hydra.sweeper.n_jobs=1", "optimizer.lr=interval(0.001,0.002)"]
    succeed("pretrain", *TINY, "-m", *options, "probe=false", "logger=none", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == read(tmp_path / "sweep" / "0" / "summary.json")["pretrain/val_cross_entropy"]


# W&B


@blank
@pytest.mark.parametrize("mode", some(["offline", "disabled"], ["offline"]))
def test_wandb_runs_without_a_login(made, tmp_path, mode):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once a process
    folder = tmp_path / "run"
    options = ["logger=wandb", "probe=false", f"hydra.run.dir={folder}"]
    succeed("pretrain", *TINY, *options, WANDB_MODE=mode, HOME=str(tmp_path))
    kept = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(kept) == (1 if mode == "offline" else 0)
    media = {path.parent.name for path in folder.glob("wandb/offline-run-*/files/media/*/*") if path.is_file()}
    assert media == ({"images", "audio"} if mode == "offline" else set())
    assert (folder / "metrics.csv").is_file()
    assert wandb.run is None  # or the next run of a sweep would go on in it


@pytest.mark.parametrize("arguments", [["--cfg=job", "a run"], ["a run", "-c", "job"], ["plots=false", "-c", "job", "a run"]])
def test_a_run_needs_no_key_where_the_command_is_about_one(arguments):
    assert "run: a run\n" in succeed("analyze", *arguments)
