"""What a run was made with stands in its folder."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from test_cli import TINY, blank, made, read, run, succeed

from audiot.commands.environment import differences, environment, git_state, input_digests, note_environment, read_environment

__all__ = ["made"]
QUICK = [*TINY, "probe=false", "logger=csv", "trainer.enable_progress_bar=false"]


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "checkout"
    (folder / "audiot").mkdir(parents=True)
    (folder / "audiot" / "code.py").write_text("one = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_checkout_has_its_commit_and_what_is_not_committed(checkout):
    commit = git(checkout, "rev-parse", "HEAD").strip()
    assert git_state(checkout) == ({"commit": commit, "changed": False}, "")
    (checkout / "notes.txt").write_text("of no matter to the code\n")
    assert git_state(checkout) == ({"commit": commit, "changed": False}, "")
    (checkout / "audiot" / "code.py").write_text("one = 2\n")
    (checkout / "audiot" / "new.py").write_text("abc")
    state, patch = git_state(checkout)
    assert state["changed"]
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert state["untracked"] == {"audiot/new.py": sha256_of_abc}
    git(checkout, "checkout", "-q", "audiot/code.py")
    subprocess.run(["git", "-C", str(checkout), "apply"], input=patch, text=True, check=True)  # the patch brings the change back
    assert (checkout / "audiot" / "code.py").read_text() == "one = 2\n"


def test_without_a_checkout_or_git_the_run_goes_on(tmp_path, checkout, monkeypatch):
    assert git_state(tmp_path / "installed") == (None, "")
    monkeypatch.setenv("PATH", str(tmp_path))
    state, patch = git_state(checkout)
    assert "git" in state["unknown"]
    assert patch == ""


def test_the_encoder_that_a_training_starts_from_is_known_by_its_content(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "inner").mkdir(parents=True)
    for name in ("inner/b", "a"):
        (tmp_path / "one" / name).write_text(name)
    for name in ("a", "inner/b"):  # in another order
        (tmp_path / "two" / name).write_text(name)
    one, two = (input_digests(OmegaConf.create({"init": str(tmp_path / folder)})) for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a").write_text("b")
    assert input_digests(OmegaConf.create({"init": str(tmp_path / "two")})) != one
    assert input_digests(OmegaConf.create({"init": None, "upstream": {"path": "name/of-a-hub"}})) == {}


def test_a_run_that_goes_on_keeps_the_digest_of_what_it_began_with(tmp_path):
    (tmp_path / "encoder").write_text("abc")
    cfg = OmegaConf.create({"seed": 0, "trainer": {"accelerator": "cpu"}, "upstream": {"path": str(tmp_path / "encoder")}})
    note_environment(cfg, tmp_path)
    (tmp_path / "encoder").unlink()
    note_environment(cfg, tmp_path, step=4)
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert read_environment(tmp_path)["inputs"] == {"upstream.path": sha256_of_abc}
    assert [start["step"] for start in read(tmp_path / "environment.json")["starts"]] == [0, 4]


def test_differences_are_named():
    before = {"seed": 0, "packages": {"torch": "2.14.0", "lhotse": "1.33"}, "git": {"commit": "a" * 40, "changed": False}}
    after = {"seed": 0, "packages": {"torch": "2.15.0"}, "git": {"commit": "b" * 40, "changed": False}}
    assert differences(before, after) == {
        "torch": ("2.14.0", "2.15.0"),
        "lhotse": ("1.33", "-"),
        "git commit": ("a" * 12, "b" * 12),
    }
    assert differences(before, before) == {}


@pytest.mark.slow
@blank
def test_a_run_says_what_it_was_made_with_and_a_resumed_one_what_is_different(made, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("SOME_TOKEN", "only-for-me")
    succeed("pretrain", *QUICK, "seed=3", f"hydra.run.dir={folder}")
    (start,) = read(folder / "environment.json")["starts"]
    assert (start["step"], start["seed"]) == (0, 3)
    assert start["packages"]["torch"] == torch.__version__.split("+")[0]
    assert start["packages"]["numpy"]
    assert start["machine"]["python"] == platform.python_version()
    assert start["command"].startswith("audiot pretrain ")
    assert "seed=3" in start["command"]
    assert len(read(folder / "data.json")["content"]) == 64
    for path in folder.rglob("*"):
        assert not path.is_file() or b"only-for-me" not in path.read_bytes()

    assert "changed" not in succeed("pretrain", f"resume={folder}", "trainer.max_steps=5")
    _, second = read(folder / "environment.json")["starts"]
    assert (second.keys(), second["step"]) == ({"time", "step", "command"}, 4)

    start["packages"]["torch"] = "2.0.1"
    (folder / "environment.json").write_text(json.dumps({"starts": [start, second]}))
    said = succeed("pretrain", f"resume={folder}", "trainer.max_steps=6")
    assert f"changed torch {torch.__version__.split('+')[0]} (was 2.0.1): the run goes on, but" in said
    third = read(folder / "environment.json")["starts"][2]
    assert third.keys() == {"time", "step", "command", "packages"}

    for damaged in ('{"starts": 5}', '{"starts": [5]}', '{"starts": [{"packages": 5}]}'):
        (folder / "environment.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"environment.json is not a readable environment of a run: expected a list"):
            read_environment(folder)
    refused = run("pretrain", f"resume={folder}", "trainer.max_steps=7")
    assert (refused.code, refused.err.count("\n")) == (1, 1)


def test_a_start_that_fails_leaves_no_record_behind(made, tmp_path):
    assert run("pretrain", *QUICK, f"init={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}").code == 1
    result = run("pretrain", *QUICK, "data.prepare.sample_rate=8000", f"hydra.run.dir={tmp_path / 'run'}")
    assert "the corpus is at 8000 Hz" in result.err
    assert not (tmp_path / "run").exists()


def test_versions_are_those_that_audiot_requires(tmp_path):
    with (tmp_path / "config.yaml").open("w") as stream:
        yaml.safe_dump({"seed": 0, "trainer": {"accelerator": "cpu"}}, stream)
    found, _ = environment(OmegaConf.load(tmp_path / "config.yaml"))
    assert {"torch", "torchaudio", "pytorch-lightning", "lhotse", "numpy", "librosa", "soundfile"} <= found["packages"].keys()
    assert not {"pytest", "mypy", "mkdocs-material"} & found["packages"].keys()
