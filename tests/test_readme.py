"""Every command and every piece of Python in README.md and docs/ runs, with overrides that make each last seconds.

The gate runs the README's and composes those of other pages, which `pytest -m slow` runs. Commands that need a published corpus
or say how a figure was measured are composed, not run, the latter by `pytest -m slow` too.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import soundfile
from omegaconf import OmegaConf

from audiot.base.groups import options
from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.cli import COMMANDS, TOOLS, main
from audiot.commands.arguments import parse
from audiot.commands.launch import OF_A_RUN, check_overrides
from audiot.interop.s3prl import export_s3prl

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
PAGES = [README, *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', flags=re.DOTALL | re.MULTILINE)
BLOCKS = [(page, *block) for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
PROGRAMS = [text for _, kind, title, text in BLOCKS if kind == "python" and not title]
FILES = {title: text for _, _, title, text in BLOCKS if title}
# The gate runs or installs these, or they need more than audiot.
OTHER_PROGRAMS = ("curl ", "pip install ", "pytest", "git clone ", "hf upload ", "eval ", "python -m audiot.s3prl_upstream ")
PICTURES = ("adapt", "pretrain", "tune", "finetune", "abx", "analyze")  # commands that can leave them out
MEASUREMENTS = ("results.md", "performance.md")
PUBLISHED = {*options("data")} - {"demo", "folder", "manifest"}


def lines() -> Iterator[tuple[Path, str]]:
    """Commands of audiot as the pages have them, without what may stand around them."""
    for page, kind, _, text in BLOCKS:
        if kind == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].split(" && ")[-1].strip().removeprefix("srun ")
                if line and not line.startswith("#") and not line.startswith(OTHER_PROGRAMS):
                    yield page, line


LINES = list(lines())


class Command(NamedTuple):
    """A line of a page."""

    page: Path
    line: str

    @property
    def words(self) -> list[str]:
        """The command's name and its arguments, however it is started."""
        words = [word for word in shlex.split(self.line) if not re.match("[A-Z]+=", word)]  # PYTHONPATH=.
        return words[1:] if words[0] == "audiot" else [Path(words[1]).stem, *words[2:]]

    @property
    def waits(self) -> bool:
        """Whether it goes on until Ctrl-C, or takes long and another page's command is like it; tests of its own run it."""
        is_like_another = "--int8" in self.words or self.words == ["export-torch", "RUN"]
        return self.words[0] == "serve" or "--microphone" in self.words or is_like_another

    @property
    def is_run(self) -> bool:
        """Whether it needs nothing that is not here."""
        chosen = dict(word.split("=", 1) for word in self.words if "=" in word)
        needs = chosen.get("data") in PUBLISHED or chosen.get("experiment", "demo_gpu") != "demo_gpu"
        is_elsewhere = self.waits or self.words[0] in ("study", "superb")  # tests of their own run tiny ones
        return self.page.name not in MEASUREMENTS and not is_elsewhere and not needs

    @property
    def is_run_in_the_gate(self) -> bool:
        """Whether it is one of the README's, or without a config and arguments."""
        return self.is_run and (self.page == README or self.words[0] not in {**COMMANDS, **TOOLS})

    @property
    def needs_files(self) -> bool:
        """Whether it is nothing without the run or the package that it names."""
        is_of_a_run = self.words[0] in OF_A_RUN or any(word.startswith("resume=") for word in self.words)
        return is_of_a_run or self.line.startswith("PYTHONPATH=")


def commands() -> list[Command]:
    """Commands of all pages, each once, however it is started."""
    found: dict[tuple[str, ...], Command] = {}
    for page, line in sorted(LINES, key=lambda line: line[0].name in MEASUREMENTS):  # one that is run stands for all
        command = Command(page, line)
        found.setdefault(tuple(command.words), command)
    return list(found.values())


DEMO = shlex.split(
    "data.hours=0.01 data.num_speakers=2 data.corpus.num_valid_speakers=1 data.corpus.num_test_speakers=1 "
    "data.corpus.heldout_utterances=4 data.corpus.speaker_utterances=2"
)
MODEL = shlex.split("model.embed_dim=24 model.num_heads=2 model.ffn_dim=48")
TRAINING = shlex.split(
    "data.batch_s=10 data.num_workers=0 trainer.accelerator=cpu trainer.devices=1 trainer.strategy=auto "
    "trainer.precision=32-true trainer.max_steps=2 trainer.val_check_interval=1"
)
SMALL_HEAD = shlex.split("downstream.head.hidden_dim=16 downstream.head.projector_dim=16")  # of the task asr
BENCHMARK = shlex.split(
    "benchmark.lengths=[8] benchmark.frames=16 benchmark.embed_dim=16 benchmark.num_heads=2 benchmark.rounds=1 "
    "benchmark.seconds=0"
)

TUNING = shlex.split(
    "tune.batch.largest_s=4 tune.batch.warmup=1 tune.batch.steps=1 tune.lr.steps=20 tune.lr.repeats=1 tune.lr.lowest=1e-4"
)


def quick(arguments: list[str], number: int, run: Path, folder: Path) -> list[str]:
    """A command's arguments with everything small, in a folder of its own, ``RUN`` being the first run."""
    command, *rest = [argument.replace("RUN", str(run)) for argument in arguments]
    if command == "benchmark":
        return [command, *rest, *BENCHMARK]
    if command == "adapt":
        place = len(list(folder.glob("adapt*")))
        own = [each for each in rest if not each.startswith("hydra.run.dir=")]
        short = ["adapt.timed_steps=1", "adapt.pretrain_steps=2", f"hydra.run.dir={folder / 'adapt'}{place}"]
        model = [] if any(each.startswith("init=") for each in own) else MODEL
        return [command, *own, *model, *TRAINING, *short]
    if command == "tune":
        return [command, *rest, *DEMO, *MODEL, *TRAINING[:-2], *TUNING, f"hydra.run.dir={folder / 'tune'}{number}"]
    if command == "align":
        return [command, *rest, *DEMO]
    if command == "abx":
        place = len(list(folder.glob("abx*")))
        two = [*DEMO, "data.corpus.num_test_speakers=2", f"data_dir={folder / 'two-speakers'}"]  # across speakers
        demo = [] if any(argument.startswith("item=") for argument in rest) else two
        return [command, *rest, *demo, "codes=10", "bootstrap.samples=100", f"hydra.run.dir={folder / 'abx'}{place}"]
    if command not in ("pretrain", "finetune", "prepare") or any(argument.startswith("resume=") for argument in rest):
        return [command, *rest]
    rest = [argument for argument in rest if not argument.startswith("trainer.max_steps")]
    if not any(argument in rest for argument in ("data=folder", "data=manifest")):
        rest += DEMO
    if command != "prepare":
        several = {"trainer=ddp", "trainer=fsdp", "trainer=slurm"} & {
            *rest
        }  # have a strategy of their own, which one process can do
        training = [each for each in TRAINING if not several or each != "trainer.strategy=auto"]
        rest += training if any(argument.startswith("init=") for argument in rest) else [*MODEL, *training]
    if "features=waveform" in rest:  # its convolutions have 512 channels
        rest += ["data.batch_s=2", "data.crop_s=0.5"]
    if command == "pretrain":
        rest += ["probes=smoke"] if number == 0 else [] if "probe=false" in rest else ["probe=false"]
    if "model=hubert_large" in rest:  # which is compiled layer by layer
        rest += ["model.num_layers=2"]
    if "downstream=asr" in rest:
        rest += SMALL_HEAD
    if "-m" in rest:
        rest = first_of_sweep(rest)
        return [command, *rest, f"hydra.sweep.dir={folder / f'sweep{number}'}"]
    if any(argument.startswith("hydra.run.dir=") for argument in rest):
        return [command, *rest]
    return [command, *rest, f"hydra.run.dir={run if number == 0 else folder / str(number)}"]


def first_of_sweep(arguments: list[str]) -> list[str]:
    """Two of the first list of values, one of every other."""
    several = [place for place, argument in enumerate(arguments) if "," in argument and "[" not in argument]
    for place in several:
        name, values = arguments[place].split("=", 1)
        arguments[place] = f"{name}={','.join(values.split(',')[: 2 if place == several[0] else 1])}"
    return arguments


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with the files that pages show, and a tree of little recordings, named as the example has them."""
    folder = tmp_path
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "my_attention" / "conf" / "__init__.py").touch()
    (folder / "fsdd").mkdir()
    generator = np.random.default_rng(0)
    for digit in range(2):
        for speaker in ("ann", "bob"):
            for take in range(8):
                noise = 0.1 * generator.standard_normal(4000)
                soundfile.write(folder / "fsdd" / f"{digit}_{speaker}_{take}.wav", noise, 8000)
    soundfile.write(folder / "recording.wav", 0.1 * generator.standard_normal(20000), 16000)
    write_s3prl_checkpoint(folder / "mockingjay.ckpt")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)  # PYTHONPATH=.
    monkeypatch.setenv("AUDIOT_DATA", str(folder / "data"))
    return folder


def write_s3prl_checkpoint(path: Path) -> None:
    """A tiny one."""
    shape = {"embed_dim": 24, "num_layers": 1, "num_heads": 2, "ffn_dim": 48, "max_frames": 1500}
    parts = {
        "attention": {"_target_": "audiot.attention.query_key.QueryKey"},
        "positions": {"_target_": "audiot.positions.Sinusoid"},
    }
    features = {"_target_": "audiot.features.KaldiFbank", "num_mel_bins": 20}
    encoder = AudioEncoder(features, {"_target_": "audiot.model.Encoder", **shape, **parts})
    save_encoder(path.parent / "for-s3prl", encoder)
    export_s3prl(path.parent / "for-s3prl", path)


def test_commands_of_the_readme_run(folder, monkeypatch, composed_once):
    run_all([command for command in commands() if command.is_run_in_the_gate], folder, monkeypatch)


@pytest.mark.slow
def test_commands_and_python_of_all_pages_run(folder, monkeypatch, composed_once):
    assert run_all([command for command in commands() if command.is_run], folder, monkeypatch) > 15
    for program in PROGRAMS:
        names: dict[str, object] = {}
        exec(program.replace("RUN", str(folder / "first")), names)
        states, weights = names.get("hidden_states"), names.get("weights")
        assert states is None or (states.ndim == 4 and states.isfinite().all())
        assert weights is None or weights.shape == (2, 6, 100, 100)


def run_all(running: list[Command], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run commands one after the other, ``RUN`` being the first one's run. Returns how many trained or prepared."""
    run, number = folder / "first", 0
    drawn = set()
    for command in running:
        name = command.words[0]
        monkeypatch.setattr("sys.argv", ["audiot"])
        # Pictures take longest: a command draws those of its first run alone.
        arguments = quick(command.words, number, run, folder)
        if name in drawn and name in PICTURES and not any(word.startswith("resume=") for word in arguments):
            arguments.append("plots=false")
        drawn.add(name)
        try:
            with mock.patch.dict(os.environ):  # several processes leave their meeting place there
                main(arguments)
        except SystemExit as stop:
            pytest.fail(f"{command.page.name}: {command.line}: {stop}")
        number += name in ("pretrain", "finetune", "prepare")
    sweeps = [command for command in running if command.words[:2] == ["pretrain", "-m"]]
    assert len(list(folder.glob("sweep*/sweep.csv"))) == len(sweeps) > 0
    return number


@pytest.mark.parametrize("command", [each for each in commands() if each.words[0] in TOOLS], ids=lambda command: command.line)
def test_arguments_of_tools_are_known(command):
    name, *rest = command.words
    found = parse(name, rest)
    assert not command.waits or found.run == rest[0]


@pytest.mark.parametrize(
    "command",
    [
        each if each.page == README else pytest.param(each, marks=pytest.mark.slow)  # the gate knows their keys and options
        for each in commands()
        if each.words[0] in COMMANDS and not (each.is_run_in_the_gate or each.needs_files)
    ],
    ids=lambda command: command.line,
)
def test_other_commands_are_composed(command, composed_once):
    name, *rest = command.words
    overrides = [word for word in rest if word != "-m"]
    assert len(check_overrides(name, overrides, "-m" in rest)) == len(overrides)


@pytest.mark.parametrize(
    "command",
    [each for each in commands() if each.words[0] in OF_A_RUN and not each.is_run],
    ids=lambda command: command.line,
)
def test_commands_about_a_run_that_need_more_are_composed(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["audiot"])
    name, *rest = command.words
    main([name, "--cfg=job", *rest])
    assert OmegaConf.create(capsys.readouterr().out)


def test_every_command_is_of_audiot_or_known():
    for page, line in LINES:
        words = shlex.split(line)
        is_script = words[0] == "python" and (REPOSITORY / words[1]).is_file()
        assert is_script or re.match("(PYTHONPATH=. )?audiot ", line), f"{page.name}: {line}"


def test_the_readme_is_short():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", [README, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "data" / "README.md"], ids=str)
def test_links_beside_the_site_lead_somewhere(page):
    """The site's own links are checked where it is built."""
    for place, anchor in re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / place
        assert target.is_file(), place
        headings = re.findall("^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not anchor or anchor in [re.sub(r"[^\w ]", "", heading).lower().replace(" ", "-") for heading in headings], anchor
