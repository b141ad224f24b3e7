"""Every command and every piece of Python in README.md runs, with overrides that make each last seconds."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
from matplotlib.figure import Figure

from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.cli import main
from audiot.interop.s3prl import export_s3prl

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [line.split("  #")[0].split(" && ")[-1] for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]
# What the gate itself runs before this test.
OF_THE_GATE = ["pytest"]

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


def quick(arguments: list[str], number: int, run: Path, folder: Path) -> list[str]:
    """A command's arguments with everything small, in a folder of its own, ``RUN`` being the first run."""
    command, *rest = [argument.replace("RUN", str(run)) for argument in arguments]
    if command == "benchmark":
        return [command, *rest, *BENCHMARK]
    if command == "align":
        return [command, *rest, *DEMO]
    if command not in ("pretrain", "finetune", "prepare") or any(argument.startswith("resume=") for argument in rest):
        return [command, *rest]
    rest = [argument for argument in rest if not argument.startswith("trainer.max_steps")]
    if not any(argument in rest for argument in ("data=folder", "data=manifest")):
        rest += DEMO
    if command != "prepare":
        several = {"trainer=ddp", "trainer=fsdp"} & {*rest}  # have a strategy of their own, which one process can do
        training = [each for each in TRAINING if not several or each != "trainer.strategy=auto"]
        rest += training if any(argument.startswith("init=") for argument in rest) else [*MODEL, *training]
    if command == "pretrain":
        rest += ["probes=smoke"] if number == 0 else [] if "probe=false" in rest else ["probe=false"]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a tree of little recordings, named as the README's example has them."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "fsdd").mkdir()
    generator = np.random.default_rng(0)
    for digit in range(2):
        for speaker in ("ann", "bob"):
            for take in range(8):
                noise = 0.1 * generator.standard_normal(4000)
                soundfile.write(folder / "fsdd" / f"{digit}_{speaker}_{take}.wav", noise, 8000)
    soundfile.write(folder / "recording.wav", 0.1 * generator.standard_normal(20000), 16000)
    write_s3prl_checkpoint(folder / "mockingjay.ckpt")
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


def blank(figure: Figure, path: Path, **options: object) -> None:
    """A picture that nobody looks at."""
    Path(path).touch()


def test_commands_of_the_readme_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AUDIOT_DATA", str(folder / "data"))
    run, number = folder / "first", 0
    draw, drawn = Figure.savefig, set()
    for line in COMMANDS:
        if line in OF_THE_GATE or not line.strip():
            continue
        words = shlex.split(line)
        arguments = words[1:] if words[0] == "audiot" else [Path(words[1]).stem, *words[2:]]
        assert words[0] == "audiot" or (words[0] == "python" and (README.parent / words[1]).is_file()), line
        monkeypatch.setattr("sys.argv", ["audiot"])
        # Pictures take longest: a command draws those of its first run, then leaves blank files.
        monkeypatch.setattr(Figure, "savefig", blank if arguments[0] in drawn else draw)
        drawn.add(arguments[0])
        try:
            with mock.patch.dict(os.environ):  # several processes leave their meeting place there
                main(quick(arguments, number, run, folder))
        except SystemExit as stop:
            pytest.fail(f"{line}: {stop}")
        number += arguments[0] in ("pretrain", "finetune", "prepare")
    assert number > 15
    assert len(list(folder.glob("sweep*/sweep.csv"))) == sum("pretrain.py -m " in line for line in COMMANDS)


def test_python_of_the_readme_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert (folder / "first" / "encoder").is_dir(), "needs the encoder that the commands have made"
    for program in PROGRAMS:
        names: dict[str, object] = {}
        exec(program.replace("RUN", str(folder / "first")), names)
        states, weights = names.get("hidden_states"), names.get("weights")
        assert states is None or (states.ndim == 4 and states.isfinite().all())
        assert weights is None or weights.shape == (2, 6, 100, 100)
