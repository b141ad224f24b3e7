"""The command line: ``audiot pretrain …`` is ``python scripts/pretrain.py …``, from any folder."""

from __future__ import annotations

import os

# Threads that wait for each other must not burn the cores that data workers or other programs need: with the default, two
# busy threads on two cores that are shared slow training down tenfold. Read when torch loads its OpenMP, so before that.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import difflib
import importlib
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

import audiot
from audiot.callbacks import Interrupted

COMMANDS = {
    "pretrain": "pre-train a masked acoustic model, probe it, draw it",
    "finetune": "probe or fine-tune an encoder on a speech task",
    "evaluate": "measure a finished run again",
    "analyze": "draw a run: curves, reconstructions, attention",
    "prepare": "make a corpus ready for training",
}
USAGE = """usage: audiot COMMAND [group=option …] [key=value …]
       audiot list [GROUP]      options of a config group: attention, data, features, model, …
       audiot --version

commands:
{commands}

`audiot COMMAND --help` shows a command's groups and every key; -m runs a sweep: audiot pretrain -m seed=0,1,2"""

OmegaConf.register_new_resolver(
    "frames",
    lambda duration_s, sample_rate, win_length, hop_length, stack: max(
        1, (1 + (round(duration_s * sample_rate) - win_length) // hop_length) // stack
    ),
    replace=True,
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; the exit code is 0 only if it did what was asked."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    if command in ("--help", "-h"):
        print(USAGE.format(commands="\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())))
    elif command == "--version":
        print(f"audiot {audiot.__version__}")
    elif command == "list":
        with one_line_errors(debug=False):
            print("\n".join(options(rest[0]) if rest else groups()))
    elif command in COMMANDS:
        run(command, rest)
    else:
        near = _nearest(command, [*COMMANDS, "list"])
        sys.exit(f"audiot: error: no command {command!r}{near}; commands: {', '.join([*COMMANDS, 'list'])}")


def groups() -> list[str]:
    """Names of the config groups."""
    return sorted(folder.name for folder in files("audiot.conf").iterdir() if folder.is_dir() and folder.name[0] != "_")


def options(group: str) -> list[str]:
    """Options of a config group."""
    if group not in groups():
        raise ValueError(f"no config group {group!r}{_nearest(group, groups())}; groups: {', '.join(groups())}")
    return sorted(entry.name[:-5] for entry in (files("audiot.conf") / group).iterdir() if entry.name.endswith(".yaml"))


def run(command: str, overrides: list[str]) -> None:
    """Compose a command's config and run it; ``resume=RUN`` takes the run's own config instead."""
    module = importlib.import_module(f"audiot.commands.{command}")
    task: Callable[[DictConfig], object] = module.main
    debug = "debug=true" in [override.lower() for override in overrides] or os.environ.get("HYDRA_FULL_ERROR") == "1"
    _quieten_libraries()
    # Lightning starts the other processes of a node by running sys.argv again.
    sys.argv = [str(Path(module.__file__ or command)), *overrides]
    with one_line_errors(debug):
        resumed = next((override.split("=", 1)[1] for override in overrides if override.startswith("resume=")), None)
        if resumed not in (None, "null"):
            task(_resumed_config(Path(str(resumed)), [o for o in overrides if not o.startswith("resume=")]))
            return
        if not any(override.startswith("--") for override in overrides):
            _check_overrides(command, [override for override in overrides if not override.startswith("-")])

    def guarded(cfg: DictConfig) -> object:
        with one_line_errors(debug):
            return task(cfg)

    hydra.main(version_base="1.3", config_path="pkg://audiot.conf", config_name=command)(guarded)()


def _resumed_config(folder: Path, overrides: list[str]) -> DictConfig:
    """The config that a run was started with, on its own folder, and its log to go on with."""
    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"resume={folder}: no run there ({path} is missing)")
    cfg = OmegaConf.load(path)
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    cfg.merge_with({"resume": str(folder), "run_dir": str(folder)})
    for override in overrides:
        name = override.split("=", 1)[0]
        if OmegaConf.select(cfg, name, default=None) is None and name not in _keys(cfg):
            raise ValueError(f"resume={folder}: {override} is not a key of the run's config{_nearest(name, _keys(cfg))}")
    cfg.merge_with_dotlist(overrides)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "train.log")],
        force=True,
    )
    return cfg


def _check_overrides(command: str, overrides: list[str]) -> None:
    """Compose once for every value of a sweep, so that a wrong name is told in one line before anything starts."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [_choices(override) for override in parsed]
    first = [values[0] for values in choices]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        for place, values in enumerate(choices or [[]]):
            for value in values or [None]:
                trial = [*first[:place], value, *first[place + 1 :]] if value is not None else []
                _compose(command, trial)


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override() or not override.is_choice_sweep():
        return [override.input_line or ""]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _compose(command: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(command, overrides)
    except MissingConfigException as error:
        group, found = (error.missing_cfg_file or "?").rsplit("/", 1) if "/" in (error.missing_cfg_file or "") else ("", "?")
        known = [option for option in (error.options or [])]
        raise ValueError(f"{group}={found}: no such option{_nearest(found, known)}; options: {', '.join(known)}") from error
    except HydraException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigKeyError) and cause.full_key:
            key = str(cause.full_key)
            raise ValueError(f"no config key {key!r}{_nearest(key, _keys(compose(command)))}; +{key}=… adds it") from error
        words = str(error).split("\n")[0]
        group = words.split("'")[1].split("@")[0] if "Could not override '" in words else ""
        near = _nearest(group, [*groups(), *_keys(compose(command))]) if group else ""
        raise ValueError(f"{words.rstrip('.')}{near}") from error


def _keys(cfg: DictConfig | ListConfig, prefix: str = "") -> list[str]:
    """Full names of all keys."""
    names: list[str] = []
    for name in cfg if isinstance(cfg, DictConfig) else ():
        names.append(f"{prefix}{name}")
        node = cfg._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation() and not node._is_missing():
            names += _keys(node, f"{prefix}{name}.")
    return names


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 1; ``debug`` shows the traceback."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    try:
        yield
    except Interrupted as stop:
        GlobalHydra.instance().clear()
        if stop.checkpoint is None:
            sys.exit(f"audiot: {stop}")
        sys.stderr.write(
            f"\naudiot: {stop}; saved {stop.checkpoint}\nresume:  audiot pretrain resume={stop.checkpoint.parent.parent}\n"
        )
        sys.exit(130)
    except KeyboardInterrupt:
        sys.stderr.write("\naudiot: interrupted\n")
        sys.exit(130)
    except (ValueError, OSError, ImportError, MisconfigurationException, HydraException, OmegaConfBaseException) as error:
        if debug:
            traceback.print_exc()
        sys.exit(f"audiot: error: {describe(error)}")


def describe(error: BaseException) -> str:
    """One line about an error: the first cause's own words."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=…"
    return " ".join(str(error).split()) or type(error).__name__


def _quieten_libraries() -> None:
    """Keep notices that call for nothing out of a user's sight; errors and unknown warnings stay."""
    for message in (
        ".*does not have many workers.*",
        ".*Experiment logs directory.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Consider setting `persistent_workers=True`.*",
        ".*GPU available but not used.*",
        ".*Your `IterableDataset` has `__len__` defined.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
