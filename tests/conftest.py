"""Fixtures of many tests: a tiny prepared corpus, and plain configs of a tiny model."""

from __future__ import annotations

import functools
import logging
import os
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest

from audiot.base.groups import read_option

if "PYTEST_XDIST_WORKER" in os.environ:  # more processes than cores: threads would only wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    import torch

    torch.set_num_threads(1)

# Apart from each other are those that wait for one and the same run (`test_cli.prepared`).
LONGEST = ("test_bad_input.py", "test_contract.py", "test_readme.py", "test_study_command.py", "test_presets.py", "test_cli.py")


def pytest_configure(config):
    """Draw few examples of properties, and always the same; ``--hypothesis-profile=many`` draws many more."""
    steady = {"derandomize": True, "deadline": None, "database": None}
    hypothesis.settings.register_profile("few", max_examples=20, **steady)
    hypothesis.settings.register_profile("many", max_examples=1000, **steady)
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile") or "few")


def pytest_xdist_auto_num_workers(config):
    """One process more than cores, as many tests wait for the processes that they start."""
    from audiot.data.prepare import usable_cores

    return usable_cores() + 1


def pytest_collection_modifyitems(items):
    """Run the slowest tests first, so that no process waits for them at the end. Those of ``-m slow`` may take an hour each."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="module")
def composed_once():
    """Compose the config of a command and its overrides once in a module: what checks a command line only reads it."""
    from audiot import following
    from audiot.commands import launch

    def once(compose):
        known = functools.cache(lambda command, overrides: compose(command, list(overrides)))
        return lambda command, overrides: known(command, tuple(overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "compose", once(launch.compose))
        patch.setattr(following, "compose_command", once(following.compose_command))
        yield


TINY = {
    "features": {"_target_": "audiot.features.LogMel", "n_mels": 20, "stack": 3},
    "model": {
        "_target_": "audiot.model.Encoder",
        "embed_dim": 24,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 48,
        "max_frames": 140,
        "attention": {"_target_": "audiot.attention.query_key.QueryKey"},
        "positions": {"_target_": "audiot.positions.Rotary"},
        "dropout": 0.1,
    },
    "objective": {"_target_": "audiot.objectives.reconstruction.Reconstruction", "span": 3},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 2e-3, "weight_decay": 0.01},
    "scheduler": {"_target_": "audiot.training.optimization.linear_warmup_decay", "_partial_": True},
}


@pytest.fixture(scope="session")
def tiny():
    """Configs as plain dicts, not to be changed: features, model, objective, optimizer, scheduler."""
    return TINY


@pytest.fixture(autouse=True)
def the_same_numbers_in_any_order():
    """Seed PyTorch, so that what a test draws does not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def configs_are_composed_quickly():
    """Compose the defaults of a command once, and a config once where Hydra does twice; read YAML with libyaml.

    Composing takes longest in most tests. What is composed is the same.
    """
    import yaml
    from hydra._internal.hydra import Hydra
    from omegaconf import _utils

    from audiot.commands import launch

    compose, mode_of, loader = launch.compose, Hydra.get_mode, _utils.get_yaml_loader
    known = functools.lru_cache(maxsize=32)(lambda command, overrides: compose(command, list(overrides)))

    def get_mode(hydra, config_name, overrides):
        """What Hydra composes a config for. No file in conf says it."""
        return mode_of(hydra, config_name, overrides) if "hydra.mode=" in " ".join(overrides) else None

    @functools.cache
    def quick_loader():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return loader()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "compose", lambda command, overrides: known(command, tuple(overrides)))
        patch.setattr(Hydra, "get_mode", get_mode)
        patch.setattr(_utils, "get_yaml_loader", quick_loader)
        yield


@pytest.fixture
def drawn(monkeypatch):
    """Saved figures."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def remember(figure, *args, **options):
        figures.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


@pytest.fixture
def blank_pictures(monkeypatch):
    """Write a white pixel instead of pictures, which take the longest time in a tiny run."""
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: imsave(path, np.ones((1, 1, 3)), format="png"))


@pytest.fixture(scope="session")
def published_attention():
    """Function of a mechanism's name: the plain configs of conf/attention/NAME.yaml and of the positions that it chooses."""

    def read(group, name):
        plain = read_option(group, name)
        return plain, {group: choice for default in plain.pop("defaults", []) for group, choice in default.items()}

    def configs(name):
        attention, chosen = read("attention", name)
        positions, _ = read("positions", chosen.pop("override /positions@_global_.positions"))
        parts = {part: read(f"attention/{part}", choice)[0] for part, choice in chosen.items()}
        return {"attention": attention | parts, "positions": positions}

    return configs


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory):
    """A prepared demo corpus: two training speakers, some 40 s of speech."""
    pytest.importorskip("espeakng_loader")
    from audiot.data.corpora.demo import DemoCorpus
    from audiot.data.prepare import prepare

    folder = tmp_path_factory.mktemp("demo")
    demo = DemoCorpus(
        folder / "demo",
        hours=0.01,
        num_speakers=2,
        num_valid_speakers=1,
        num_test_speakers=1,
        heldout_utterances=6,
        speaker_utterances=2,
        num_jobs=1,
    )
    return prepare(lambda: demo.manifests(progress=False), folder / "prepared", num_jobs=1, progress=False)


@pytest.fixture(scope="session")
def pretraining(demo_corpus):
    """Makers of the parts of a tiny pre-training: ``module``, ``data`` and ``trainer``, which stops after nine steps."""
    import pytorch_lightning as pl
    import torch

    from audiot.data.datamodule import SpeechDataModule
    from audiot.pretraining import MaskedAcousticModel
    from audiot.training.callbacks import ConsumedBatches

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    def module(seed=0, **objective):
        torch.manual_seed(seed)
        configs = TINY | {"objective": TINY["objective"] | objective}
        return MaskedAcousticModel(**configs, seed=5)

    def data(**options):
        loading = {"batch_s": 8.0, "crop_s": 2.0, "num_buckets": 2, "num_workers": 0}
        return SpeechDataModule(demo_corpus, "pretrain", **loading | options)

    def trainer(folder, callbacks=(), **options):
        settings = {  # as in conf/trainer/default.yaml
            "accelerator": "cpu",
            "max_steps": 9,
            "max_epochs": -1,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 5.0,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": folder,
        }
        return pl.Trainer(**settings | options, callbacks=[ConsumedBatches(), *callbacks])

    return SimpleNamespace(module=module, data=data, trainer=trainer)
