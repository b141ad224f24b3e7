"""The whole of a study, tiny: it runs, goes on, travels, and tells of what failed."""

from __future__ import annotations

import json
import shutil

import pytest

from audiot.base.config import compose_command, plain
from audiot.base.parts import make
from audiot.cli import main
from audiot.commands.study import too_long
from audiot.data.prepare import PreparedCorpus

TINY = [
    "study.mechanisms=[query_key,none]",
    "study.control_mechanisms=[]",
    "study.objectives=[mockingjay]",
    "study.learning_rates=[1e-3]",
    "study.seeds=[0]",
    "study.budgets=[steps]",
    "study.controls=[]",
    'study.shared=["data.hours=0.01","data.num_speakers=2","data.corpus.num_valid_speakers=1","data.corpus.num_test_speakers=2",'
    '"data.corpus.heldout_utterances=4","data.corpus.speaker_utterances=2"]',
    'study.pretrain=["model.embed_dim=24","model.num_heads=2","model.ffn_dim=48","data.num_workers=0","data.batch_s=10",'
    '"trainer.max_steps=2","trainer.val_check_interval=2"]',
    'study.finetune=["data.num_workers=0","trainer.max_steps=2","trainer.val_check_interval=2"]',
    "~study.tasks.speaker_utterance",
    "~study.tasks.abx",
    "study.resamples=200",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished study in it."""
    pytest.importorskip("espeakng_loader")
    home = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("AUDIOT_DATA", str(home / "data"))
        patch.setattr("sys.argv", ["audiot"])
        main(["study", "folder=tiny", *TINY])
        yield home


# 1 s are 33 tokens of 30 ms, of which crops have a multiple of 8.
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["synthesizer_random takes 32 frames, and the longest utterance has ", "synthesizer_dense takes 32 frames"]),
        (["study.chunked=true"], []),
        (['study.pretrain=["data.crop_s=60"]'], []),
    ],
)
def test_mechanisms_that_take_no_utterance_of_the_tasks_are_told_before_anything_runs(home, given, expected):
    settings = ["study.mechanisms=[query_key,synthesizer_random,synthesizer_dense]", 'study.pretrain=["data.crop_s=1"]', *given]
    study = make(plain(compose_command("study", [*TINY, *settings, "run_dir=run", "data_dir=data"]).study))
    (prepared,) = (home / "data" / "prepared").iterdir()
    told = list(too_long(study, PreparedCorpus.load(prepared), ["run_dir=run", "data_dir=data"]))
    assert len(told) == len(expected)
    assert all(line.startswith(f"warning: {words}") for line, words in zip(told, expected, strict=True))
    assert all(line.endswith("tasks that hear it will fail, but with study.chunked=true") for line in told)


def records(study):
    return {path.name: path.stat().st_mtime_ns for path in (study / "results").glob("*.json")}


def test_every_run_leaves_a_record_and_the_report_has_their_figures(home):
    assert not list((home / "tiny").glob(".corpus-*"))
    found = [json.loads((home / "tiny" / "results" / name).read_text()) for name in records(home / "tiny")]
    assert sorted(each["name"] for each in found) == sorted(
        f"mockingjay/{mechanism}/{run}/seed=0{task}"
        for mechanism in ("query_key", "none")
        for run, task in (("cost", ""), ("lr=0.001", ""), ("lr=0.001", "/phone_linear"), ("lr=0.001", "/learned"))
    )
    alone = [each["figures"] for each in found if "/cost/" in each["name"]]
    assert all(figures["s_per_mframe"] > 0 and figures["gflops"] > 0 for figures in alone)
    assert all((home / "tiny" / each["run"] / "output.txt").is_file() for each in found)
    trained = [home / "tiny" / each["run"] for each in found if each["arguments"][0] == "pretrain"]
    assert all((run / "encoder" / "model.safetensors").is_file() and not (run / "checkpoints").exists() for run in trained)
    learned = [each for each in found if each["name"].endswith("/learned")]
    assert all(each["figures"]["pruning/removed/0"] > 0 for each in learned)
    assert len(list((home / "tiny" / "results").glob("*.safetensors"))) == len(learned)
    assert not list((home / "tiny" / "runs").rglob("*.png"))
    page = (home / "tiny" / "report.html").read_text(encoding="utf-8")
    assert "CKA of layer 3, mockingjay" in page
    assert "Rehearsal: nothing may be concluded" in page
    probes = [each for each in found if "phone_linear" in each["name"]]
    rows = (home / "tiny" / "runs.csv").read_text().splitlines()[1:]
    assert sorted(f"{each['figures']['value']:.6f}" for each in probes) == sorted(
        f"{float(row.split(',')[5]):.6f}" for row in rows if ",phone_linear," in row
    )
    assert all(len(each["draws"]["value"]) == 1000 for each in probes)


def test_what_is_finished_never_runs_again(home, capsys):
    before = records(home / "tiny")
    main(["study", "folder=tiny", *TINY])
    assert records(home / "tiny") == before
    assert capsys.readouterr().out.splitlines()[-1] == "next:   open tiny/report.html"


def test_records_travel_without_their_runs(home):
    shutil.copytree(home / "tiny" / "results", home / "elsewhere" / "results")
    main(["study", "folder=elsewhere", *TINY])
    assert records(home / "elsewhere").keys() == records(home / "tiny").keys()
    assert not (home / "elsewhere" / "runs").exists()
    assert (home / "elsewhere" / "runs.csv").read_text() == (home / "tiny" / "runs.csv").read_text()
    learned = [json.loads((home / place / "findings.json").read_text())["learned"] for place in ("elsewhere", "tiny")]
    assert learned[0] == learned[1]


def test_the_report_of_what_has_run_by_now_needs_no_run(home, capsys):
    shutil.copytree(home / "tiny" / "results", home / "part" / "results")
    path = next(path for path in (home / "part" / "results").glob("*.json") if "phone_linear" in path.read_text())
    path.unlink()
    main(["study", "folder=part", *TINY, "jobs=0"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" goes on, 1 runs are left that are known by now")
    assert not (home / "part" / "runs").exists()
    assert "it has not run" in (home / "part" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_whose_record_is_lost_runs_again_alone_and_gives_the_same(home):
    path = next(path for path in (home / "tiny" / "results").glob("*.json") if "phone_linear" in path.read_text())
    before, content = records(home / "tiny"), json.loads(path.read_text())
    path.unlink()
    main(["study", "folder=tiny", *TINY])
    after = records(home / "tiny")
    assert {name for name in after if after[name] != before[name]} == {path.name}
    again = json.loads(path.read_text())
    assert again["figures"].pop("wall_s") > 0
    del content["figures"]["wall_s"]
    assert (again["figures"], again["draws"]) == (content["figures"], content["draws"])


def test_without_statsmodels_nothing_is_begun(home, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^audiot: error: the study needs statsmodels: pip install 'audiot\[study\]'$"):
        main(["study", "folder=never", *TINY])
    assert not (home / "never").exists()


def test_what_fails_is_told_with_its_reason_and_the_rest_is_done(home, capsys):
    broken = '+study.tasks.broken={title:Broken,overrides:["downstream=phone_linear","downstream.layers=[9]"]}'
    with pytest.raises(SystemExit) as stop:
        main(["study", "folder=tiny", *TINY, broken])
    assert "2 runs failed, the same command tries them again; the first, mockingjay/query_key/lr=0.001/seed=0/broken: " in str(
        stop.value
    )
    assert "\n" not in str(stop.value)
    assert "Broken" in (home / "tiny" / "report.html").read_text(encoding="utf-8")
