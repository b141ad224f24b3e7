"""Commands on a corpus in shards."""

import re

import pytest
from test_cli import DATA, MODEL, TRAINER, last_line, made, read, run, succeed

__all__ = ["made"]

pytestmark = pytest.mark.usefixtures("blank_pictures")
LOADING = [argument for argument in DATA if argument.startswith(("data.batch_s", "data.num_workers"))]


def shards_of_demo():
    """Write the demo corpus as shards; the arguments with which they are read."""
    out = succeed("prepare", *DATA, "data.prepare.format=shar", "data.prepare.shard_hours=0.002")
    assert re.search(r"^shards  .*/prepared/demo-[0-9a-f]{8}/shar: \d+ shards, [\d.]+ GB of FLAC$", out, re.MULTILINE)
    assert last_line(out).startswith("next:   audiot pretrain data=shar data.root=")
    return [*last_line(out).split()[3:], *LOADING]


@pytest.mark.slow
def test_pretraining_from_shards_tells_what_it_read(made, tmp_path):
    data = shards_of_demo()
    out = succeed("pretrain", *data, *MODEL, *TRAINER, "plots=false", "probe=false", f"hydra.run.dir={tmp_path / 'run'}")
    assert "GB read from shards, in all" in out
    assert read(tmp_path / "run" / "summary.json")["read_gb"] > 0
    assert "downstream=phone_linear" in last_line(out)


@pytest.mark.slow
def test_tasks_evaluation_and_extraction_work_from_shards(made, tmp_path):
    data = shards_of_demo()
    upstream = ["downstream=phone_linear", f"upstream.path={made.encoder}"]
    out = succeed("finetune", *upstream, *data, *TRAINER, "plots=false", f"hydra.run.dir={tmp_path / 'task'}")
    assert last_line(out) == f"next:   audiot evaluate run={tmp_path / 'task'}"
    assert f"wrote   {tmp_path / 'task' / 'evaluation.json'}" in succeed("evaluate", f"run={tmp_path / 'task'}")
    (opened,) = made.data.glob("prepared/shar-*")
    out = succeed("extract", str(opened), str(tmp_path / "states"), "--encoder", str(made.encoder))
    assert f"wrote   {tmp_path / 'states'}: " in out
    shards = data[1].removeprefix("data.root=")
    result = run("extract", shards, str(tmp_path / "more"), "--encoder", str(made.encoder))
    assert f"{shards} holds shards: audiot prepare data=shar data.root={shards} prints the folder to name here" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=shar"], "data.root has no value: set data.root=…"),
        (["data=shar", "data.root=nowhere"], "nowhere/index.json is missing: copy it there, or check data.root (data=webdataset"),
        (
            ["data=shar", "data.root=ftp://host/x"],
            "data.root=ftp://host/x: no scheme 'ftp'; give a folder or http, https, s3://…",
        ),
        (["data=webdataset", "data.root=nowhere"], "nowhere is missing: copy it there, or check data.root"),
        (["data.prepare.format=tar"], "data.prepare.format must be wav or shar, found 'tar'"),
        ([*DATA, "data.prepare.format=shar", "data.prepare.shard_hours=0"], "data.prepare.shard_hours must be a positive number"),
    ],
)
def test_mistakes_are_told_in_a_line(made, arguments, words):
    result = run("prepare", *arguments)
    assert result.code == 1
    assert result.err.splitlines()[-1].removeprefix("audiot: error: ").startswith(words)
    assert "Traceback" not in result.err + result.out
    assert not list(made.data.glob("prepared/webdataset-*"))
