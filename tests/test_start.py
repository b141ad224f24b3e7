"""Help, lists and mistakes are answered without importing PyTorch."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest

from audiot.commands.launch import no_failed_start

HEAVY = ("torch", "torchaudio", "pytorch_lightning", "lhotse", "torchmetrics", "transformers", "librosa", "matplotlib", "wandb")
CODE = """
import sys
from audiot.cli import main
try:
    main()
except SystemExit as end:
    if isinstance(end.code, str):
        print(end.code)
print(*sorted(set({heavy!r}) & set(sys.modules)), sep=",")
"""


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], "usage: audiot COMMAND"),
        (["pretrain", "--help"], "data        demo, festvox, fluent_speech_commands, folder"),
        (["finetune", "downstream=asr", "--help"], "downstream  asr, intent, keyword"),
        (["pretrain", "trainer.max_stepz=3"], "no config key 'trainer.max_stepz' (did you mean trainer.max_steps?)"),
        (["pretrain", "attention=query_kee"], "attention=query_kee: no such option (did you mean query_key?)"),
        (["finetune", "data.batch_s=many"], "data.batch_s=many: expected a number, such as 50.0"),
        (["pretrain", "resume=nowhere"], "resume=nowhere: no run there"),
        (["predict", "--help"], "usage: audiot predict"),
        (["predict", "--tip", "3"], ""),
        (["extract", "a", "b", "--encoder", "e", "--workers", "-1"], "--workers must be at least 0, found -1"),
        (["export-hf", "--help"], "usage: audiot export-hf"),
        (["export-onnx", "run", "--opset", "7"], "--opset must be from 18 to 23, found 7"),
        (["list", "attention"], "synthesizer_dense"),
        (["list", "attentoin"], "no config group 'attentoin' (did you mean attention?)"),
    ],
)
def test_help_and_mistakes_are_answered_before_anything_heavy_is_imported(tmp_path, arguments, answer):
    command = [sys.executable, "-c", CODE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ, check=True)
    assert answer in done.stdout
    assert not re.search(r"(, | )_(common|loading)\b", done.stdout)  # parts of other files
    assert done.stdout.splitlines()[-1] == ""  # none of the heavy modules
    assert not any(tmp_path.iterdir())  # a start that fails leaves nothing


def failing_start(folder, *arguments):
    """Run, in a folder, a command that ends before it makes anything."""
    code = "from audiot.cli import main; main()"
    command = [sys.executable, "-c", code, "pretrain", "data=folder", "data.root=nowhere", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 1
    assert "data.root: there is no folder nowhere" in done.stderr


@pytest.mark.slow
def test_a_start_that_fails_takes_away_what_it_has_made_and_nothing_else(tmp_path):
    failing_start(tmp_path)
    assert not any(tmp_path.iterdir())
    mine = tmp_path / "mine" / "data.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    failing_start(tmp_path, "hydra.run.dir=mine")
    assert mine.read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_start_that_fails_keeps_the_folder_above_its_own(tmp_path):
    (tmp_path / "runs").mkdir()
    failing_start(tmp_path, "hydra.run.dir=runs/a")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert not any((tmp_path / "runs").iterdir())


def test_the_log_of_a_start_that_fails_ends_with_its_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    handler = logging.FileHandler(folder / "train.log", delay=True)  # as Hydra opens it
    logging.root.addHandler(handler)
    try:
        with pytest.raises(ValueError), no_failed_start(folder, "pretrain"):
            raise ValueError
        logging.getLogger("another run").error("told elsewhere")
        assert not folder.exists()
    finally:
        logging.root.removeHandler(handler)
