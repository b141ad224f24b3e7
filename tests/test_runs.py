"""What a run's folder is: config, checkpoints, whether it is finished, and how it goes on."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from some import some
from test_cli import blank, copy_run, made, read, run, succeed

import audiot.runs
from audiot.commands.pretrain import announce, go_on
from audiot.runs import (
    check_fresh,
    is_finished,
    newest_checkpoint,
    resume,
    resume_command,
    run_config,
    run_overrides,
    step_of,
    write_config,
)
from audiot.training.interrupt import GracefulInterrupt

__all__ = ["made"]
GIVEN = ["data=fsdd", "attention=local", "model.num_layers=2", "optimizer.lr=1e-3", "trainer.max_steps=12", "data.num_workers=2"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of a run that was stopped after step 6 of 12, without anything that training makes but empty checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "started"
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("pretrain", [*GIVEN, "run_dir=before", "data_dir=data"])
    (folder / ".hydra").mkdir(parents=True)
    write_config(cfg, folder)
    OmegaConf.save(GIVEN, folder / ".hydra" / "overrides.yaml")
    for step in (3, 6):
        trained_to(folder, step)
    return folder


def trained_to(folder, step):
    (folder / "checkpoints").mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "checkpoints" / f"step={step}.ckpt", "w") as archive:
        archive.writestr("data.pkl", b"")


@pytest.fixture
def folder(started, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(started, tmp_path / "run")


def finish(folder, step):
    probes = dict.fromkeys(run_config(folder).probes, 0.5)
    (folder / "summary.json").write_text(json.dumps({"steps": step, **probes}))


def test_to_know_a_run_pytorch_is_not_needed():
    heavy = "{'torch', 'pytorch_lightning', 'lhotse', 'matplotlib'}"
    code = f"import sys, audiot.runs; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Overrides at resume

APPLIED = {
    "trainer.max_steps=20": 20,
    "trainer.max_steps=6": 6,
    "trainer.val_check_interval=7": 7,
    "trainer.devices=2": 2,
    "trainer.precision=bf16-mixed": "bf16-mixed",
    "trainer.gradient_clip_val=1.5": 1.5,
    "optimizer.lr=0.5": 0.5,
    "optimizer.weight_decay=0.2": 0.2,
    "optimizer.betas=[0.8,0.9]": [0.8, 0.9],
    "scheduler.warmup_proportion=0.5": 0.5,
    "checkpoint.every_n_steps=50": 50,
    "callbacks.progress.refresh_rate=3": 3,
    "logger.tensorboard.name=other": "other",
    "data.num_workers=0": 0,
    "data.prepare.num_jobs=1": 1,
    "data_dir='/with a blank/a=b'": "/with a blank/a=b",
    "data.root=elsewhere": "elsewhere",
    "compile=false": False,
    "probe=false": False,
    "debug=true": True,
}


@pytest.mark.parametrize(("text", "expected"), APPLIED.items())
def test_an_override_at_resume_is_applied_shown_and_recorded_once_the_run_goes_on(folder, text, expected):
    before = {path: path.read_bytes() for path in (folder / ".hydra").iterdir()}
    resumed = resume("pretrain", str(folder), [text])
    name = text.partition("=")[0]
    assert OmegaConf.select(resumed.config, name) == expected
    assert OmegaConf.select(resumed.before, name) != expected
    assert resumed.changes == [text]
    assert resumed.checkpoint == folder / "checkpoints" / "step=6.ckpt"
    assert run_config(folder) == OmegaConf.merge(resumed.before, {"resume": None})  # not yet
    assert {path: path.read_bytes() for path in (folder / ".hydra").iterdir()} == before
    resumed.record()
    resumed.record()
    assert OmegaConf.select(run_config(folder), name) == expected
    assert run_overrides(folder) == [*(given for given in GIVEN if not given.startswith(f"{name}=")), text]
    again = resume("pretrain", str(folder), [])
    assert again.changes == []
    assert again.config == resumed.config
    assert {path: path.read_bytes() for path in before} == before  # how it was started stays on record


def test_overrides_of_several_resumes_add_up(folder):
    for overrides in (["optimizer.lr=1", "trainer.max_steps=20"], ["optimizer.lr=2"], ["optimizer.lr=3", "optimizer.lr=4"], []):
        resume("pretrain", str(folder), overrides).record()
    cfg = run_config(folder)
    assert (cfg.optimizer.lr, cfg.trainer.max_steps) == (4, 20)
    assert run_overrides(folder)[-2:] == ["trainer.max_steps=20", "optimizer.lr=4"]
    history = OmegaConf.load(folder / ".hydra" / "resumes.yaml")
    assert [entry.overrides for entry in history] == [
        ["optimizer.lr=1", "trainer.max_steps=20"],
        ["optimizer.lr=2"],
        ["optimizer.lr=4"],
    ]
    assert {entry.step for entry in history} == {6}


def test_the_whole_command_of_a_run_may_be_repeated_to_resume_it(folder):
    resumed = resume("pretrain", str(folder), [*GIVEN, "model.num_layers=2", "optimizer.lr=0.001", "model.dropout=0.0"])
    assert resumed.changes == []
    assert resumed.config == resumed.before
    resumed.record()
    assert not (folder / ".hydra" / "resumes.yaml").exists()


def test_an_override_that_a_later_one_replaced_when_the_run_started_is_a_change(folder):
    OmegaConf.save(["optimizer.lr=1e-2", "optimizer.lr=1e-3"], folder / ".hydra" / "overrides.yaml")
    assert resume("pretrain", str(folder), ["optimizer.lr=1e-2"]).config.optimizer.lr == 1e-2


ENCODER = "init=RUN/encoder starts a new run from its encoder"
NEW = "a new run can have another"
REFUSED = {
    "model.num_layers=3": f"model.num_layers=3 can't change on resume: the run has 2; {NEW}",
    "attention.window=3": None,
    "features.n_mels=40": f"features.n_mels=40 can't change on resume: the run has 80; {NEW}",
    "data.batch_s=20": f"data.batch_s=20 can't change on resume: the run has 25.0; {ENCODER}",
    "data.crop_s=1": f"data.crop_s=1 can't change on resume: the run has 4.0; {ENCODER}",
    "objective.span=5": f"objective.span=5 can't change on resume: the run has 3; {ENCODER}",
    "seed=1": f"seed=1 can't change on resume: the run has 0; {ENCODER}",
    "init=RUN/encoder": f"init=RUN/encoder can't change on resume: the run has None; {NEW}",
    "optimizer.fused=false": f"optimizer.fused=false can't change on resume: the run has True; {NEW}",
    "optimizer._target_=torch.optim.SGD": f"can't change on resume: the run has torch.optim.AdamW; {NEW}",
    "scheduler._target_=audiot.training.optimization.constant": "the run has audiot.training.optimization.linear_warmup_decay",
    "trainer.accumulate_grad_batches=2": f"trainer.accumulate_grad_batches=2 can't change on resume: the run has 1; {NEW}",
    "trainer.max_epochs=2": f"trainer.max_epochs=2 can't change on resume: the run has -1; {NEW}",
    "attention=lsh_simple": f"attention=lsh_simple can't change on resume: {NEW}",
    "experiment=demo_gpu": f"experiment=demo_gpu can't change on resume: {NEW}",
    "data=demo": "data=demo can't change on resume: set its single keys, as in data.num_workers=2",
    "optimizer=adam": "optimizer=adam can't change on resume: set its single keys, as in optimizer.lr=0.001",
    "trainer=gpu": "trainer=gpu can't change on resume: set its single keys, as in trainer.accelerator=auto",
    "trainer={max_steps: 20}": "trainer={max_steps: 20} can't change on resume: set its single keys, as in trainer.",
    "+trainer.max_time=00:10:00:00": "+trainer.max_time=00:10:00:00 can't be on resume: the run keeps the keys that it has",
    "++optimizer.lr=1": "++optimizer.lr=1 can't be on resume",
    "~logger.tensorboard": "~logger.tensorboard can't be on resume",
    "hydra.run.dir=elsewhere": "hydra.run.dir=elsewhere has no effect on resume: the run goes on in ",
    "run_dir=elsewhere": "run_dir=elsewhere has no effect on resume: the run goes on in ",
    "optimizer.rate=1": "'optimizer.rate' is not a key of the run's config",
    "optimizer.lr=1,2": "optimizer.lr=1,2 names several values: a run goes on with one of them",
    "optimizer.lr=fast": "optimizer.lr=fast: expected a number, such as 0.001",
    "optimizer.betas=0.5": "optimizer.betas=0.5: expected a list, such as [0.9, 0.999]",
    "trainer.max_steps=5": "trainer.max_steps=5 lies before {run}/checkpoints/step=6.ckpt: set trainer.max_steps=6 or more",
    "trainer.max_steps=-1": "trainer.max_steps=-1 lies before {run}/checkpoints/step=6.ckpt",
    "-m": "resume={run}: -m has no effect on one run that goes on; drop it",
    "--cfg": "resume={run}: --cfg has no effect on one run that goes on; drop it",
    "optimizer.lr": "'optimizer.lr' is not key=value",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items())
def test_an_override_that_can_not_be_applied_is_refused_by_name(started, text, expected):
    expected = expected or f"{text} can't change on resume: the run has "
    with pytest.raises(ValueError, match=re.escape(expected.format(run=started) if "{run}" in expected else expected)):
        resume("pretrain", str(started), ["trainer.max_steps=30", text])
    assert not (started / ".hydra" / "resumes.yaml").exists()


@pytest.mark.parametrize("part", some(range(4), [0]))
def test_every_key_of_a_run_is_applied_or_refused_by_name(started, monkeypatch, part):
    cfg = run_config(started)
    written = audiot.runs.written_config(started)
    monkeypatch.setattr(audiot.runs, "written_config", lambda *_, **__: written.copy())  # read once: YAML is slow
    keys = []

    def walk(node, prefix):
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif "/" not in name and name != "trusted":  # no override can name the former; the latter is the reader's
                keys.append(f"{prefix}{name}")

    walk(OmegaConf.to_container(cfg), "")
    assert len(keys) > 100
    for name in keys[part::4]:
        value = OmegaConf.select(cfg, name, throw_on_resolution_failure=False)
        other = (
            not value
            if isinstance(value, bool)
            else 33
            if isinstance(value, (int, float))
            else "[7]"
            if OmegaConf.is_list(value)
            else "other"
        )
        try:
            resumed = resume("pretrain", str(started), [f"{name}={other}"])
        except ValueError as error:
            assert name in str(error)  # noqa: PT017
        else:
            assert [change.split("=")[0] for change in resumed.changes] == [name]
            assert OmegaConf.select(resumed.config, name) != value


# Finished or not


def test_finished_looks_at_the_newest_checkpoint(folder):
    resume("pretrain", str(folder), ["trainer.max_steps=6"]).record()
    assert not is_finished(folder, run_config(folder))  # there are no figures
    finish(folder, 6)
    assert is_finished(folder, run_config(folder))
    assert resume("pretrain", str(folder), []).changes == []
    longer = resume("pretrain", str(folder), ["trainer.max_steps=6000"])
    assert not is_finished(folder, longer.config)
    longer.record()
    trained_to(folder, 302)  # and interrupted there
    again = resume("pretrain", str(folder), [])
    assert (step_of(again.checkpoint), again.config.trainer.max_steps) == (302, 6000)
    assert not is_finished(folder, again.config)
    trained_to(folder, 6000)
    assert not is_finished(folder, again.config)  # the figures are of step 6
    finish(folder, 6000)
    assert is_finished(folder, again.config)


def test_a_checkpoint_beyond_the_last_step_is_not_taken_for_a_finished_run(folder):
    finish(folder, 12)
    trained_to(folder, 12)
    assert is_finished(folder, run_config(folder))
    trained_to(folder, 302)
    assert not is_finished(folder, run_config(folder))
    expected = f"trainer.max_steps=12 lies before {folder}/checkpoints/step=302.ckpt: set trainer.max_steps=302 or more"
    with pytest.raises(ValueError, match=re.escape(expected)):
        resume("pretrain", str(folder), [])


def test_what_would_change_nothing_in_a_finished_run_is_refused(folder):
    trained_to(folder, 12)
    finish(folder, 12)
    with pytest.raises(
        ValueError, match=r"run is finished: optimizer\.lr=0\.5 would change nothing; trainer\.max_steps beyond 12 "
    ):
        resume("pretrain", str(folder), ["optimizer.lr=0.5"])
    assert resume("pretrain", str(folder), ["optimizer.lr=0.5", "trainer.max_steps=13"]).config.optimizer.lr == 0.5


def test_a_run_that_stopped_early_is_finished_until_it_gets_more_patience(folder):
    config = OmegaConf.load(folder / "config.yaml")
    config.callbacks.early_stopping = {"part": "callbacks/early_stopping", "patience": 3}
    OmegaConf.save(config, folder / "config.yaml")
    finish(folder, 6)
    assert not is_finished(folder, run_config(folder))
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"stopped_patience": 3}))
    assert is_finished(folder, run_config(folder))
    assert resume("pretrain", str(folder), []).changes == []
    expected = "run is finished: trainer.max_steps=20 would change nothing; more callbacks.early_stopping.patience trains on"
    with pytest.raises(ValueError, match=re.escape(expected)):
        resume("pretrain", str(folder), ["trainer.max_steps=20"])
    patient = resume("pretrain", str(folder), ["callbacks.early_stopping.patience=4"])
    assert not is_finished(folder, patient.config)
    trained_to(folder, 9)  # and interrupted there
    assert not is_finished(folder, run_config(folder))


# The folder and its files

NAMES = [
    "plain",
    "a b",
    "lr=1e-3",
    "a,b",
    "[x]",
    "(y)",
    "{z}",
    "l'été",
    'say "x"',
    "'",
    '"',
    "\\",
    "\\'",
    "~",
    "#1",
    "$HOME",
    "${x}",
]
NAMES += [
    "a;b",
    "a&b",
    "*",
    "?",
    "!",
    "12",
    "1e3",
    "null",
    "true",
    ".5",
    "-x",
    "é",
    "日本",
    "a:b",
    "a@b",
    "%20",
    " ends ",
    "a\tb",
]


TRICKY = ["a b", "lr=1e-3", "{z}", "l'été", "\\'", "${x}", "null", "日本", "a\tb"]  # one of a kind; the others are slow


@pytest.mark.parametrize("name", some(NAMES, TRICKY))
def test_the_printed_command_names_the_very_folder(folder, tmp_path, monkeypatch, name):
    OmegaConf.save({"resume": None, "trainer": {"max_steps": 6}}, folder / ".hydra" / "config.yaml")
    there = folder.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (there, there.relative_to(tmp_path)):
        shell = ["sh", "-c", f"printf '%s\\n' {resume_command(path).removeprefix('audiot pretrain ')}"]
        said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.removesuffix("\n")
        assert resume("pretrain", said.removeprefix("resume="), []).run == path
        assert resume("pretrain", str(path), []).run == path  # as a user may type it
        with pytest.raises(ValueError, match=re.escape(f"holds a run already: {resume_command(path)[16:]} goes on with it")):
            check_fresh(path)


def test_no_folder(tmp_path, started):
    for text, named in (("nowhere", "nowhere"), ("'nowhere'", "nowhere"), ("a,b", "a,b"), ("[a", "[a"), ("12", "12")):
        with pytest.raises(FileNotFoundError, match=re.escape(f"resume={named}: no run there ({named}/config.yaml is missing)")):
            resume("pretrain", text, [])
    with pytest.raises(ValueError, match="resume= names no folder"):
        resume("pretrain", "", [])
    with pytest.raises(FileNotFoundError, match="run=nowhere: no run there"):
        run_config(tmp_path.relative_to(tmp_path) / "nowhere")


def test_no_checkpoint_and_a_truncated_one(folder):
    newest = folder / "checkpoints" / "step=6.ckpt"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert resume("pretrain", str(folder), []).checkpoint == folder / "checkpoints" / "step=3.ckpt"
    (folder / "checkpoints" / "step=3.ckpt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=re.escape(f"{newest} is damaged: it is truncated or not a checkpoint, and so are 1 earl")
    ):
        resume("pretrain", str(folder), [])
    shutil.rmtree(folder / "checkpoints")
    check_fresh(folder)
    for ask in (lambda: resume("pretrain", str(folder), []), lambda: newest_checkpoint(folder)):
        with pytest.raises(FileNotFoundError, match="no checkpoint of a run in "):
            ask()


@pytest.mark.parametrize("content", ["- 5\n", "- step: 5\n", "- overrides: a=b\n", "a: b\n", "- overrides: [[1]]\n", "{", "\x00"])
@pytest.mark.parametrize("name", ["resumes", "config"])
def test_a_damaged_file_of_a_run_is_named(folder, name, content):
    (folder / ".hydra" / "resumes.yaml" if name == "resumes" else folder / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"{name}.yaml (is not |has format_version None)"):
        resume("pretrain", str(folder), [])


# Training goes on


class Rates(pl.Callback):
    """Learning rates and weight decays of every step, by its number from 1."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        settings = [(group["lr"], group["weight_decay"], group["betas"]) for group in optimizer.param_groups]
        self.seen[trainer.global_step + 1] = settings


def rate(step, lr, last, warmup):
    """The published schedule: up in a line over the first share of the steps, then down, to 0 after the last."""
    rising = round(last * warmup)
    return lr * step / rising if step <= rising else lr * (last + 1 - step) / (last - rising)


def changed(pretraining, seed=0, **optimizer):
    module = pretraining.module(seed=seed)
    module.hparams["optimizer"] = module.hparams["optimizer"] | optimizer
    return module


def keep(folder):
    return pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_a_longer_run_has_the_rates_and_settings_of_its_own_config_at_every_step(pretraining, tmp_path):
    rates = Rates()
    pretraining.trainer(tmp_path, [rates, keep(tmp_path)], max_steps=4).fit(pretraining.module(), pretraining.data())
    settings = {"lr": 0.01, "weight_decay": 0.5, "betas": (0.8, 0.9)}

    def longer(checkpoint, callbacks=(), seed=0):
        module = changed(pretraining, seed, **settings)
        trainer = pretraining.trainer(tmp_path, [rates, keep(tmp_path / "longer"), *callbacks], max_steps=10)
        trainer.fit(module, pretraining.data(), ckpt_path=checkpoint, weights_only=False)
        return weights(module)

    unbroken = longer(tmp_path / "step=4.ckpt")
    assert list(rates.seen) == list(range(1, 11))
    for step, (decayed, plain) in rates.seen.items():
        lr, last, decay, betas = (2e-3, 4, 0.01, (0.9, 0.999)) if step <= 4 else (0.01, 10, 0.5, (0.8, 0.9))
        for group, expected_decay in ((decayed, decay), (plain, 0.0)):
            assert group[0] == pytest.approx(rate(step, lr, last, 0.07), rel=1e-12)
            assert group[0] > 0
            assert group[1:] == (expected_decay, betas)
    saved = torch.load(tmp_path / "longer" / "step=7.ckpt", weights_only=False)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate(8, 0.01, 10, 0.07))
    rates.seen.clear()
    assert longer(tmp_path / "longer" / "step=7.ckpt", seed=3).equal(unbroken)  # as if it had not been interrupted
    assert list(rates.seen) == [8, 9, 10]


def test_a_checkpoint_of_another_model_is_refused_in_one_line(pretraining, tiny, tmp_path):
    from audiot.pretraining import MaskedAcousticModel

    pretraining.trainer(tmp_path, [keep(tmp_path)], max_steps=1).fit(pretraining.module(), pretraining.data())
    module = MaskedAcousticModel(**tiny | {"model": tiny["model"] | {"num_layers": 3}})
    expected = r"the checkpoint is of another model: model.num_layers=3 \(the checkpoint has 2\)$"
    with pytest.raises(ValueError, match=expected):
        pretraining.trainer(tmp_path, max_steps=2).fit(
            module, pretraining.data(), ckpt_path=tmp_path / "step=1.ckpt", weights_only=False
        )


def own(optimizer, total_steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))


def test_rates_that_a_foreign_scheduler_keeps_in_the_checkpoint_are_not_changed_silently(folder):
    config = OmegaConf.load(folder / "config.yaml")
    config.scheduler = {"part": "test_runs:own", "_partial_": True}
    OmegaConf.save(config, folder / "config.yaml")
    announce(resume("pretrain", str(folder), ["data.num_workers=0", "trusted=[test_runs]"]))
    for change in ("optimizer.lr=0.5", "trainer.max_steps=20"):
        with pytest.raises(ValueError, match=re.escape(f"{change} can't change on resume: test_runs.own keeps its rates in ")):
            announce(resume("pretrain", str(folder), [change, "trusted=[test_runs]"]))


def test_a_checkpoint_that_can_not_be_loaded_is_named_and_nothing_is_recorded(pretraining, folder, tmp_path):
    resumed = resume("pretrain", str(folder), ["optimizer.lr=0.5"])
    (folder / "probes").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{folder} can't go on from {resumed.checkpoint}: ")):
        go_on(pretraining.trainer(tmp_path), pretraining.module(), pretraining.data(), resumed)
    assert (folder / "probes").is_dir()
    assert not (folder / ".hydra" / "resumes.yaml").exists()


def test_float16_begins_with_a_scale_of_its_own_where_bfloat16_had_none(pretraining):
    module = pretraining.module()
    for kept, state in ((False, {}), (True, {"scale": 2.0})):
        checkpoint = {"global_step": 3, "MixedPrecision": state, "state_dict": module.state_dict()}
        module.on_load_checkpoint(checkpoint)
        assert ("MixedPrecision" in checkpoint) == kept


# Whole commands


def test_a_run_is_resumed_from_the_command_line_alone(tmp_path):
    result = run("pretrain", "++resume=nowhere", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.err == "audiot: error: a config can't resume a run: put resume=RUN on the command line, without a + before it\n"


def logged_rates(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {int(row["step"]) + 1: float(row["lr-AdamW/pg1"]) for row in rows if row["lr-AdamW/pg1"]}


@blank
def test_a_longer_run_that_is_interrupted_goes_on_to_its_new_end_by_the_printed_command(made, tmp_path, monkeypatch):
    folder = copy_run(made, tmp_path / "longer, lr=0.5")
    probes = sorted(path.name for path in (folder / "probes").iterdir())
    assert probes
    quick = ["probe=false", "trainer.log_every_n_steps=1", "trainer.val_check_interval=100"]

    refused = run("pretrain", f"resume={folder}", "trainer.max_steps=9", "trainer.precision=fast", *quick)
    assert refused.code == 1
    assert sorted(path.name for path in (folder / "probes").iterdir()) == probes  # nothing is lost by what is refused
    assert not (folder / ".hydra" / "resumes.yaml").exists()

    with monkeypatch.context() as patch:
        interrupt = lambda self, *_: setattr(self, "requested", True)  # noqa: E731
        patch.setattr(GracefulInterrupt, "on_train_batch_start", interrupt)
        stopped = run("pretrain", f"resume={folder}", "trainer.max_steps=9", "optimizer.lr=0.5", *quick)
    assert stopped.code == 130
    assert f"resume  {folder}/checkpoints/step=4.ckpt, with trainer.max_steps=9 optimizer.lr=0.5 " in stopped.out
    goes = "linearly up to step 1, then linearly to 0 after step 9"
    assert f"rates   the learning rate goes {goes}: step 4 had 0.00075, step 5 has 0.312\n" in stopped.out
    command = stopped.err.splitlines()[-1].removeprefix("resume:  audiot ")
    succeed(*shlex.split(command))
    assert read(folder / "summary.json")["steps"] == 9
    logged = logged_rates(folder)
    assert {step: logged[step] for step in range(5, 10)} == pytest.approx(
        {step: rate(step, 0.5, 9, 0.07) for step in range(5, 10)}
    )
    assert "nothing to resume" in succeed(*shlex.split(command))
    assert not (folder / "probes").exists()  # they were the shorter run's
