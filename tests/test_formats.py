"""Files: those of the first format are read, and nothing that a file holds is ever run."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import canary
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import save_file

import audiot
import audiot.runs
from audiot.base.files import read_yaml
from audiot.base.parts import make, name_of, named, registry, resolved
from audiot.checkpoint import AudioEncoder, load_encoder, save_encoder
from audiot.following import same_data
from audiot.pretraining import MaskedAcousticModel
from audiot.runs import check_config, choices, run_config, run_overrides, write_config

FIRST = Path(__file__).parent / "first_format"
ENCODERS = json.loads((FIRST / "encoders.json").read_text())


@pytest.fixture(autouse=True)
def never_fires(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OmegaConf.register_new_resolver("mark", canary.fire, replace=True)
    yield
    OmegaConf.clear_resolver("mark")
    assert not canary.MARK.exists()


def waveform():
    return 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))


# Names


def test_every_part_has_one_name_and_every_name_is_of_one_part():
    targets = [target for target, _ in registry().values()]
    assert len(targets) == len(set(targets))
    assert {name_of(target) for target in targets} == set(registry())


def test_names_are_those_of_the_config_groups():
    for name, target in {
        "attention/query_key": "audiot.attention.query_key.QueryKey",
        "attention/alsh_xbox": "audiot.attention.lsh.XBOX",
        "positions/none": "audiot.positions.NoPositions",
        "model/encoder": "audiot.model.Encoder",
        "optimizer/adamw": "torch.optim.AdamW",
        "downstream/frame_classifier": "audiot.downstream.heads.FrameClassifier",
    }.items():
        assert registry()[name] == (target, "audiot")
    assert name_of("my_package.mixing.SummaryMixing") == "my_package.mixing:SummaryMixing"


def test_what_is_named_is_found_again():
    config = {
        "_target_": "audiot.model.Encoder",
        "attention": {"_target_": "audiot.attention.query_key.QueryKey", "dropout": 0.1},
    }
    written = named(config)
    assert written == {"part": "model/encoder", "attention": {"part": "attention/query_key", "dropout": 0.1}}
    assert resolved(written, "file", place="model") == config
    assert resolved(config, "file", place="model") == config  # the first format


def test_a_part_is_refused_where_another_kind_belongs():
    with pytest.raises(ValueError, match="file: features can't be data/demo_corpus: expected features"):
        resolved({"part": "data/demo_corpus"}, "file", place="features")
    with pytest.raises(ValueError, match=r"file: model.ffn_dim can't be attention/none: expected none of the parts"):
        resolved({"part": "model/encoder", "ffn_dim": {"part": "attention/none"}}, "file", place="model")


def test_a_parameter_that_a_part_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"features/log_mel has no parameter 'n_mles'; there are add_floor, .*n_mels"):
        make({"_target_": "audiot.features.LogMel", "n_mles": 3})


def test_a_file_can_not_say_whom_to_trust():
    part = {"part": "upstream/checkpoint", "path": "x", "trusted": ["canary"]}
    with pytest.raises(ValueError, match=r"upstream.trusted is .'canary'.: whom to trust is for the one to say"):
        resolved(part, "file", place="upstream")
    with pytest.raises(ValueError, match=r"upstream.trusted is 1: whom to trust is for the one to say"):
        resolved(part | {"trusted": 1}, "file", place="upstream")
    assert resolved(part, "file", ["canary"], "upstream")["trusted"] == ["canary"]


def test_a_trusted_package_brings_its_own_classes_alone(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from audiot.base.files import write_json\nfrom os import system\n\n\nclass Mine:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("write_json", "system", "Nothing"):
        with pytest.raises(ValueError, match=f"file: attention names mine:{name}, which is "):
            resolved({"part": f"mine:{name}"}, "file", ["audiot", "mine"], "attention")
    assert resolved({"part": "mine:Mine"}, "file", ["mine"], "attention") == {"_target_": "mine.Mine"}


# The first format


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_of_the_first_format_give_the_states_that_they_gave(case, tmp_path):
    known = ENCODERS[case]
    config = {name: resolved(known["config"][name], "file", place=name) for name in ("features", "model")}
    torch.manual_seed(0)
    encoder = AudioEncoder(**config)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(known["config"]))
    save_file({name: value.contiguous() for name, value in encoder.state_dict().items()}, tmp_path / "encoder/model.safetensors")
    loaded = load_encoder(tmp_path / "encoder")
    with torch.no_grad():
        hidden, _ = loaded(waveform()[:, : known["samples"]])
    torch.testing.assert_close(hidden[-1, 0, -1], torch.tensor(known["hidden"]), rtol=1e-3, atol=1e-4)
    save_encoder(tmp_path / "again", loaded)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["format_version"] == 2
    assert "_target_" not in json.dumps(written)
    again = load_encoder(tmp_path / "again")
    assert again.config == loaded.config


def test_a_folder_of_the_first_format_loads_with_its_weights():
    hidden, _ = load_encoder(FIRST / "encoder")(waveform())
    assert hidden.isfinite().all()


def test_a_classifier_of_the_first_format_gives_what_it_gave(tmp_path):
    shutil.copytree(FIRST / "classifier", tmp_path / "run")
    outputs, _ = audiot.load_classifier(tmp_path / "run").outputs(waveform())
    wanted = json.loads((FIRST / "classifier" / "outputs.json").read_text())["outputs"]
    torch.testing.assert_close(outputs[0].flatten()[:8], torch.tensor(wanted), rtol=1e-3, atol=1e-4)


def test_a_run_of_the_first_format_is_read_with_its_parts_where_they_are_now(tmp_path, monkeypatch):
    monkeypatch.setenv("AUDIOT_DATA", "there")
    shutil.copytree(FIRST / "run" / "hydra", tmp_path / "run" / ".hydra")
    cfg = run_config(tmp_path / "run")
    assert cfg.trainer.strategy._target_ == "audiot.training.ddp.ReplicatedStrategy"
    assert cfg.callbacks.interrupt.folder == str(tmp_path / "run" / "checkpoints")
    assert (cfg.data_dir, cfg.data.corpus.root) == ("there", "audio")
    assert cfg.model.max_frames == 132  # (4 s − 25 ms) / 10 ms + 1 = 398 frames, three to a token
    assert "${" not in OmegaConf.to_yaml({name: value for name, value in cfg.items() if name != "probes"})


# Nothing runs


def fields(tree, path=()):
    """Every place of a tree, the inner nodes among them."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from fields(value, (*path, key))


def planted(tree, path, payload):
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = payload
    return tree


@pytest.fixture
def saved(tiny, tmp_path):
    torch.manual_seed(0)
    save_encoder(tmp_path / "encoder", AudioEncoder(tiny["features"], tiny["model"]))
    return tmp_path / "encoder"


def test_no_field_of_an_encoder_runs_anything(saved):
    config = json.loads((saved / "config.json").read_text())
    for path in fields(config):
        for payload in canary.PAYLOADS:
            (saved / "config.json").write_text(json.dumps(planted(config, path, payload)))
            with pytest.raises((ValueError, TypeError)):
                load_encoder(saved)
            assert not canary.MARK.exists(), (path, payload)


def test_no_field_of_a_classifier_runs_anything(tmp_path):
    shutil.copytree(FIRST / "classifier", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints" / "best.ckpt"
    content = torch.load(place, weights_only=True)
    wanted = ("hyper_parameters", "state_dict")
    for path in [path for path in fields(content) if path[0] in wanted]:
        for payload in (*canary.PAYLOADS[:3], canary.Pickled()):
            torch.save(planted(content, path, payload), place)
            with contextlib.suppress(ValueError):  # some texts may be any
                audiot.load_classifier(tmp_path / "run")
            assert not canary.MARK.exists(), (path, payload)


def test_no_pickle_of_a_pretraining_checkpoint_runs(pretraining, tmp_path):
    trainer = pretraining.trainer(tmp_path, max_steps=1)
    trainer.fit(pretraining.module(), pretraining.data())
    trainer.save_checkpoint(tmp_path / "step=1.ckpt")
    content = torch.load(tmp_path / "step=1.ckpt", weights_only=True)  # nothing but tensors and plain values
    assert content["hyper_parameters"]["model"]["part"] == "model/encoder"
    for name in content:
        torch.save(content | {name: canary.Pickled()}, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=r"bad.ckpt is damaged or holds more than weights and settings"):
            MaskedAcousticModel.from_checkpoint(tmp_path / "bad.ckpt")
        with pytest.raises(Exception, match="Weights only load failed"):
            pretraining.trainer(tmp_path, max_steps=2).fit(
                pretraining.module(), pretraining.data(), ckpt_path=tmp_path / "bad.ckpt", weights_only=True
            )
    with pytest.raises(TypeError, match="from_checkpoint"):
        MaskedAcousticModel.load_from_checkpoint(tmp_path / "step=1.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats") / "run"
    with initialize_config_module("audiot.conf", version_base="1.3"):
        write_config(compose("pretrain", ["run_dir=before", "data=folder", "data.root=audio", "probes=smoke"]), folder)
    (folder / "checkpoints").mkdir()
    return folder


def test_a_run_is_written_without_what_is_computed(run):
    tree = read_yaml(run / "config.yaml")
    assert tree["format_version"] == 2
    assert tree["model"]["max_frames"] == 132
    assert tree["data"]["corpus"] == tree["data"]["corpus"] | {"part": "data/folder_corpus", "root": "${data.root}"}
    assert not {"run_dir", "data_dir", "trusted"} & tree.keys()
    assert "_target_" not in (run / "config.yaml").read_text()


def test_no_field_of_a_run_runs_anything(run, monkeypatch):
    tree = read_yaml(run / "config.yaml")
    for number, path in enumerate(fields(tree)):
        payload = canary.PAYLOADS[number % len(canary.PAYLOADS)]
        changed = planted(tree, path, payload)
        monkeypatch.setattr(audiot.runs, "read_yaml", lambda _, changed=changed: copy.deepcopy(changed))
        with pytest.raises(ValueError):
            run_config(run)
        assert not canary.MARK.exists(), (path, payload)


@pytest.mark.parametrize(
    "payload", ["+x=${mark:}", "data.root=${mark:}", "data.corpus._target_=canary.fire", "+data.x={_target_: canary.fire}"]
)
def test_no_override_of_a_run_runs_anything(run, tmp_path, payload):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / ".hydra").mkdir()
    OmegaConf.save([payload], tmp_path / "run" / ".hydra" / "overrides.yaml")
    run_overrides(tmp_path / "run")
    same_data(tmp_path / "run")
    OmegaConf.save([{"step": 1, "overrides": [payload]}], tmp_path / "run" / ".hydra" / "resumes.yaml")
    with pytest.raises(ValueError, match=r"resumes.yaml"):
        run_config(tmp_path / "run")
    (tmp_path / "run" / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {choices: {data: '${mark:}', model: small}}}\n")
    assert choices(tmp_path / "run") == {"model": "small"}


def test_references_that_make_new_ones_are_refused(run, tmp_path):
    tree = read_yaml(run / "config.yaml") | {"one": "$", "two": "{mark:}", "three": "${one}${two}"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="references of references"):
        run_config(tmp_path / "run")


@pytest.mark.parametrize("override", ["upstream._target_=canary.fire", "upstream.trusted=[canary]", "+x=${mark:}"])
def test_a_probe_of_a_run_that_is_resumed_is_data_too(override):
    with initialize_config_module("audiot.conf", version_base="1.3"):
        probe = compose("finetune", ["upstream.path=x", "run_dir=x", override])
    with pytest.raises(ValueError, match=r"run, probes.one: (upstream|x)"):
        check_config(probe, "run, probes.one", [])


# Hostile files


def test_hostile_yaml_is_one_line(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    for name, content in {
        "bomb": bomb,
        "tag": "x: !!python/object/apply:canary.fire []\n",
        "deep": "[" * 5000 + "]" * 5000,
        "twice": "a: 1\na: 2\n",
        "large": "a: " + "x" * 2**21,
        "binary": "\x00\x01",
    }.items():
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"x.yaml is not readable: ") as caught:
            read_yaml(tmp_path / "x.yaml")
        assert "\n" not in str(caught.value), name
    (tmp_path / "x.yaml").write_text("a: 1e-3\nb: 0.5\nc: 2020-01-01\nd: null\n")
    assert read_yaml(tmp_path / "x.yaml") == {"a": 0.001, "b": 0.5, "c": "2020-01-01", "d": None}


def test_deep_json_is_one_line(saved):
    for depth in (200, 100_000):
        (saved / "config.json").write_text(
            '{"format_version": 2, "model": {}, "features": ' + '{"a":' * depth + "1" + "}" * depth + "}"
        )
        with pytest.raises(ValueError) as caught:
            load_encoder(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"embed_dim": 2**30},
        {"ffn_dim": 2**40},
        {"max_frames": 10**12},
        {"num_heads": 2**31},
        {"positions": {"part": "positions/learned"}, "max_frames": 10**12},
        {"positions": {"part": "positions/sinusoid"}, "max_frames": 10**12},
    ],
)
def test_sizes_that_the_tensors_do_not_justify_are_refused_before_anything_is_allocated(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model": config["model"] | change}))
    with pytest.raises(ValueError) as caught:
        load_encoder(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"n_mels": 10**9},
        {"n_fft": 2**40},
        {"win_length": 2**40},
        {"stack": 10**12},
        {"delta_order": 2, "delta_window": 10**9 + 1},
    ],
)
def test_sizes_of_a_front_end_are_within_reason(saved, change):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"features": config["features"] | change}))
    with pytest.raises(ValueError) as caught:
        load_encoder(saved)
    assert "\n" not in str(caught.value)


def classifier(folder, **changes):
    """A run of a classifier whose checkpoint has other entries."""
    shutil.copytree(FIRST / "classifier", folder)
    place = folder / "checkpoints" / "best.ckpt"
    torch.save(torch.load(place, weights_only=True) | changes, place)
    return folder


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (3, "expected tensors by their names, found head.weight, a int"),
        (torch.zeros(1).expand(2**40), "head.weight has 1,099,511,627,776 numbers, of which the file holds only a part"),
        (
            torch.zeros(2, dtype=torch.complex64),
            "head.weight is a tensor of torch.complex64, torch.strided, on cpu: expected plain",
        ),
        (torch.zeros(2, 2).to_sparse(), "head.weight is a tensor of torch.float32, torch.sparse_coo, on cpu: expected plain"),
        (torch.zeros(2, device="meta"), "head.weight is a tensor of torch.float32, torch.strided, on meta: expected plain"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(tmp_path, weight, words):
    run = classifier(tmp_path / "run", state_dict={"head.weight": weight})
    with pytest.raises(ValueError, match=re.escape(f"best.ckpt: {words}")):
        audiot.load_classifier(run)


def test_an_objective_that_is_no_part_is_named_with_its_file(tmp_path):
    content = torch.load(FIRST / "classifier" / "checkpoints" / "best.ckpt", weights_only=True)
    run = classifier(tmp_path / "run", hyper_parameters=content["hyper_parameters"] | {"objective": 3})
    with pytest.raises(ValueError, match=r"best.ckpt: nothing can be built of its config"):
        audiot.load_classifier(run)


def test_what_an_encoder_can_not_be_built_of_is_named_with_its_folder(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"embed_dim": -8}}))
    with pytest.raises(ValueError, match=rf"^{saved}: model.embed_dim must be at least 1, found -8$"):
        load_encoder(saved)


def test_a_checkpoint_whose_index_is_no_text_is_damaged(tmp_path):
    run = classifier(tmp_path / "run")
    place = run / "checkpoints" / "best.ckpt"
    data = bytearray(place.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the first file in the index: its names are UTF-8, says bit 11 of the flags
    data[entry + 9] |= 8
    data[entry + 46] = 0xFF
    place.write_bytes(data)
    with pytest.raises(ValueError, match=r"best.ckpt is damaged: 'utf-8' codec can't decode byte 0xff"):
        audiot.load_classifier(run)
