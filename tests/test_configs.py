"""Every file of every config group, alone and in typical combinations."""

import inspect
from functools import cache
from itertools import zip_longest
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from learning import losses_of
from omegaconf import OmegaConf
from some import some

import audiot.cli
import audiot.commands.launch
from audiot.base.config import plain
from audiot.pretraining import build

CONF = Path(__file__).parent.parent / "conf"
CHOICES = sorted(
    path.relative_to(CONF).with_suffix("").as_posix()
    for path in CONF.glob("*/**/*.yaml")
    if path.name[0] != "_"  # _… is a part of others
)
ATTENTION = sorted(path.stem for path in (CONF / "attention").glob("*.yaml"))
FEW = ["query_key", "synthesizer_random", "local", "routing"]  # of two kinds of positions; the others are slow
POSITIONS = sorted(path.stem for path in (CONF / "positions").glob("*.yaml"))
GIVEN = ["run_dir=run", "data_dir=data"]  # else they come from Hydra's own run and the environment
TINY = ["model.embed_dim=24", "model.num_heads=2", "model.ffn_dim=48", "model.num_layers=2", "data.crop_s=0.5"]


@pytest.fixture(autouse=True)
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield


def command_of(group, option):
    """A command that has the group."""
    if group in ("benchmark", "study"):
        return group
    if group == "size":
        return "study"
    if group in ("downstream", "upstream"):
        return "finetune"
    if group == "experiment" and option.startswith(("s3prl_", "superb_")):
        return "finetune"
    return "pretrain"


NEEDED = {  # by options of data
    "folder": ["data.root=audio"],
    "manifest": ["data.train=train.jsonl"],
    "shar": ["data.root=shards"],
    "webdataset": ["data.root=shards"],
}


def together():
    """Choices that one config can hold, each once: one of every group of a command."""
    groups = {}
    for choice in CHOICES:
        group, option = choice.rsplit("/", 1)
        if group in ("experiment", "study", "size", "benchmark", "attention/search"):  # these change others
            yield [choice]
        else:
            groups.setdefault(command_of(group, option), {}).setdefault(group, []).append(choice)
    for of_command in groups.values():
        for row in zip_longest(*of_command.values()):
            yield [choice for choice in row if choice]


@pytest.mark.parametrize("choices", together(), ids=" ".join)
def test_every_option_of_every_group_composes_and_resolves(choices):
    (command,) = {command_of(*choice.rsplit("/", 1)) for choice in choices}
    given = []
    for group, option in (choice.rsplit("/", 1) for choice in choices):
        given += NEEDED.get(option, []) if group == "data" else []
        given += ["attention=lsh_simple"] if group == "attention/search" else []
        given.append(f"{group}={option}")
    upstream = next((choice for choice in choices if choice.startswith("upstream/")), "upstream/checkpoint")
    if command == "finetune" and "path: ???" in (CONF / f"{upstream}.yaml").read_text():
        given.append("upstream.path=encoder")
    cfg = compose(command, [*given, *GIVEN])
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for group in (choice.rsplit("/", 1)[0] for choice in choices):
        assert OmegaConf.select(cfg, group.replace("/", ".")) is not None or group in ("experiment", "size")


BUILT = ("callbacks", "data", "logger", "optimizer", "scheduler")  # the others are built by tests of their rooms
# One starts a process, one needs a package that tests do without, the others read their files.
NOT_BUILT = ("logger/wandb", "logger/mlflow", "data/festvox", "data/manifest")


@pytest.mark.parametrize("choice", [each for each in CHOICES if each.startswith(BUILT) and each not in NOT_BUILT])
def test_the_parts_of_an_option_are_built(choice, tmp_path):
    group, option = choice.split("/")
    given = [f"data.root={tmp_path}"] if choice in ("data/folder", "data/shar", "data/webdataset") else []
    given += ["upstream.path=encoder"] if command_of(group, option) == "finetune" else []
    cfg = compose(command_of(group, option), [f"{group}={option}", *given, f"run_dir={tmp_path}", f"data_dir={tmp_path}"])
    chosen = {"part": cfg.data.corpus} if group == "data" else cfg[group]
    parts = [chosen] if "_target_" in chosen else chosen.values()
    for part in parts:
        made = instantiate(part)
        assert isinstance(made, type) or callable(made) or type(made).__name__ == part._target_.rpartition(".")[2]


@pytest.mark.parametrize("command", [path.stem for path in CONF.glob("*.yaml") if path.stem != "settings"])
def test_every_command_has_a_config_and_a_description(command):
    assert command in audiot.cli.COMMANDS
    assert "seed" in compose(command, GIVEN)


@pytest.mark.parametrize("features", sorted(path.stem for path in (CONF / "features").glob("*.yaml")))
@pytest.mark.parametrize("given", some(["stack=1", "stack=3", "subsample=4"], ["stack=3", "subsample=4"]))
@pytest.mark.parametrize("center", [False, True])
def test_max_frames_is_what_the_longest_crop_gives(features, given, center):
    if features == "waveform" and given != "stack=1":
        pytest.skip("its strides say how long a token is")
    joined = ["features.stack=1", f"features.{given}"]
    cfg = compose("pretrain", [f"features={features}", *joined, "data.crop_s=1.7", *GIVEN])
    if center:
        if "center" not in cfg.features:
            pytest.skip("Kaldi's frames are never centred")
        cfg.features.center = True
    front_end = instantiate(plain(cfg.features))
    assert cfg.model.max_frames == front_end.num_tokens(round(1.7 * cfg.features.sample_rate))


@pytest.mark.parametrize("features", ["kaldi_fbank", "mfcc"])
def test_max_frames_counts_kaldis_frames_of_broken_lengths(features):
    """At 11,025 Hz Kaldi's 25 ms and 10 ms are 275.6 and 110.25 samples."""
    given = ["features.stack=1", "features.sample_rate=11025", f"data.crop_s={605 / 11025}"]
    cfg = compose("pretrain", [f"features={features}", *given, *GIVEN])
    assert cfg.model.max_frames == 1 + (605 - 275) // 110 == instantiate(plain(cfg.features)).num_tokens(605)


@pytest.mark.parametrize("attention", some(ATTENTION, FEW))
def test_every_attention_with_its_own_positions_learns_a_step(attention):
    torch.manual_seed(0)
    cfg = compose("pretrain", [f"attention={attention}", "optimizer.lr=0.01", *TINY, *GIVEN])
    module = build(cfg).train()
    module.log = lambda *arguments, **options: None  # there is no trainer
    batch = {
        "waveforms": torch.randn(2, 8000),
        "lengths": torch.tensor([8000, 6000]),
        "keys": torch.tensor([1, 2]),
        "position": (0, 0),
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    losses = losses_of(module, batch, optimizer, 5)
    assert losses[-1] < losses[0]
    unused = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert not unused


def chosen(attention):
    """The positions that a file of conf/attention names."""
    defaults = OmegaConf.load(CONF / "attention" / f"{attention}.yaml").defaults
    return defaults[-1]["override /positions@_global_.positions"]


@pytest.mark.parametrize("attention", some(ATTENTION, FEW))
def test_an_attention_chooses_positions_and_the_command_line_overrides_them(attention):
    own = OmegaConf.load(CONF / "positions" / f"{chosen(attention)}.yaml")
    assert compose("pretrain", [f"attention={attention}", *GIVEN]).positions == own
    assert compose("finetune", [f"attention={attention}", *GIVEN]).positions == own
    positions = POSITIONS[ATTENTION.index(attention) % len(POSITIONS)]  # each with several attentions
    expected = OmegaConf.load(CONF / "positions" / f"{positions}.yaml")
    given = [f"attention={attention}", f"positions={positions}"]
    for order in (given, given[::-1]):
        cfg = compose("pretrain", [*order, *GIVEN])
        assert cfg.positions == expected
        assert cfg.model.positions == expected


@pytest.mark.parametrize("attention", {chosen(attention): attention for attention in ATTENTION}.values())
def test_an_experiment_overrides_the_positions_of_an_attention(attention, tmp_path):
    other = next(name for name in POSITIONS if name != chosen(attention))
    (tmp_path / "experiment").mkdir()
    lines = ["# @package _global_", "defaults:", f"  - override /attention: {attention}", f"  - override /positions: {other}"]
    (tmp_path / "experiment" / "mine.yaml").write_text("\n".join(lines) + "\n")
    given = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", *GIVEN]
    assert compose("pretrain", given).positions == OmegaConf.load(CONF / "positions" / f"{other}.yaml")
    # The command line has the last word.
    assert compose("pretrain", [*given, "positions=none"]).positions == OmegaConf.load(CONF / "positions" / "none.yaml")


PROBES = sorted(path.stem for path in (CONF / "probes").glob("*.yaml"))


@cache
def finetuning(*overrides):
    """Its config, not to be changed: corpora share many probes."""
    return compose("finetune", [*overrides, *GIVEN])


@pytest.mark.parametrize("probes", some(PROBES, ["demo", "librispeech"]))
def test_every_probe_is_a_run_of_finetune(probes):
    for name, overrides in compose("pretrain", [f"probes={probes}", *GIVEN]).probes.items():
        kind, task, upstream = name.split("/")  # features_global: with other normalisation
        cfg = finetuning(*overrides)
        (option,) = [override.split("=")[1] for override in overrides if override.startswith("downstream=")]
        assert task in (cfg.downstream.task, option)  # two of one task are told apart by their options
        assert cfg.downstream.train_encoder == (kind == "finetune")
        names = {"encoder": "checkpoint", "random": "random_encoder", "features": "FeaturesUpstream"}
        assert cfg.upstream._target_.rpartition(".")[2] == names[upstream.split("_")[0]]
        assert cfg.trainer.val_check_interval <= cfg.trainer.max_steps


@pytest.mark.parametrize("hours", ["25", "25.0", "2.5e1"])
def test_as_many_hours_are_one_demo_corpus_however_they_are_written(hours):
    assert compose("pretrain", [*GIVEN, f"data.hours={hours}"]).data.corpus.root == "data/demo-64x25.0h"


def test_every_argument_of_lightnings_trainer_is_a_key():
    arguments = {*inspect.signature(pl.Trainer.__init__).parameters} - {"self", "logger", "callbacks"}  # groups of their own
    for trainer in ("default", "fast", "gpu", "ddp", "slurm"):
        assert set(compose("pretrain", [f"trainer={trainer}"]).trainer) - {"_target_"} == arguments


def test_keys_that_a_logger_or_callback_takes_need_no_plus(hydra_started):
    given = ["logger.tensorboard.log_graph=true", "callbacks.learning_rate.log_momentum=true", "trainer.max_steps=3"]
    GlobalHydra.instance().clear()
    checked = audiot.commands.launch.check_overrides("pretrain", given, sweep=False)
    assert checked == ["+logger.tensorboard.log_graph=true", "+callbacks.learning_rate.log_momentum=true", "trainer.max_steps=3"]
    with pytest.raises(ValueError, match=r"no argument 'log_momentun' of callbacks.* \(did you mean log_momentum\?\)"):
        audiot.commands.launch.check_overrides("pretrain", ["callbacks.learning_rate.log_momentun=true"], sweep=False)


def test_what_goes_on_to_another_function_is_taken_too(hydra_started):
    GlobalHydra.instance().clear()
    given = ["logger=wandb", "logger.wandb.tags=[a]"]
    assert audiot.commands.launch.check_overrides("pretrain", given, sweep=False) == ["logger=wandb", "+logger.wandb.tags=[a]"]
