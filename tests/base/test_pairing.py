"""torchaudio is imported only where it is needed, and an incompatible pair is reported with the command that fixes it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from audiot.base import pairing

REFUSED = OSError("Could not load this library: libtorchaudio.so")


def message(monkeypatch, versions, error=REFUSED):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    monkeypatch.setattr(pairing, "version", lambda name: versions[name])
    with pytest.raises(ImportError) as caught:
        pairing.torchaudio("functional")
    return str(caught.value)


@pytest.mark.parametrize(
    ("torch", "torchaudio", "expected"),
    [
        ("2.11.0", "2.11.1", "torchaudio 2.11.1 does not load beside torch 2.11.0: pip install torchaudio==2.11.0"),
        ("2.14.1", "2.11.0", "torchaudio 2.11.0 does not load beside torch 2.14.1: pip install torchaudio==2.11.1"),
        (
            "2.13.0+cpu",
            "2.11.1",
            "torchaudio 2.11.1 does not load beside torch 2.13.0+cpu, a build of another kind: "
            "pip install --force-reinstall torch==2.13.0 torchaudio==2.11.1",
        ),
    ],
)
def test_a_pair_that_does_not_load_is_told_with_the_command_that_mends_it(monkeypatch, torch, torchaudio, expected):
    assert message(monkeypatch, {"torch": torch, "torchaudio": torchaudio}) == expected


def test_what_torchaudio_itself_misses_keeps_its_name(monkeypatch):
    missing = ModuleNotFoundError("No module named 'flashlight'", name="flashlight")
    assert message(monkeypatch, {}, missing) == "No module named 'flashlight'"


@pytest.mark.slow
def test_pre_training_fine_tuning_and_extraction_do_without_torchaudio():
    code = """
import sys
sys.modules["torchaudio"] = None  # any import of it fails
import audiot.commands.pretrain, audiot.commands.finetune, audiot.commands.extract, audiot.commands.predict
import audiot.commands.evaluate, audiot.commands.analyze, audiot.commands.export_s3prl, audiot.commands.export_hf
from audiot.features import LogMel
LogMel()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
