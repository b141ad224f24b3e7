"""A command's config: composing it, checking overrides against it, and turning it into plain dicts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf

from audiot.base.framing import num_frames, receptive_field, samples_in
from audiot.base.groups import packages
from audiot.base.quoting import argument

# Keys that take several types: a number, a list or auto; a truth value or a number; a number or a share.
OF_SEVERAL_TYPES = ("trainer.devices", "trainer.fast_dev_run", "trainer.limit_val_batches", "trainer.overfit_batches")


def frames(duration_s: float | None, features: DictConfig) -> int:
    """Encoder frames of so many seconds, at least one; what is wrong with the features is for them to say."""
    if duration_s is None:
        raise ValueError("data.crop_s=null leaves the longest input open: set model.max_frames")
    if "hop_length" in features:
        window, hop = features.win_length, features.hop_length
    elif "strides" in features:  # of convolutions on samples
        window, hop = receptive_field(features.kernels, features.strides)
    else:  # Kaldi's
        window, hop = (samples_in(ms, features.sample_rate) for ms in (features.frame_length_ms, features.frame_shift_ms))
    reflected = window if features.get("center") else 0  # at both ends together
    count = num_frames(round(duration_s * features.sample_rate), window, max(1, hop), reflected)
    return max(1, count // max(1, features.stack, features.get("subsample") or 1))


def launch_name() -> str:
    """Name of the folder of what starts now: date and time to the microsecond.

    The tasks that ``srun`` starts together begin at different times. They get the name of their job's step instead.
    """
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_STEP_ID']}"
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")


def run_name(run: str | None) -> str:
    """What a folder is called that is about a run, given by its folder or its encoder's; ``features`` without a run."""
    if run is None:
        return "features"
    path = Path(os.path.realpath(run)) if os.path.exists(run) else Path(run)
    return path.parent.name if path.name == "encoder" else path.name


def folder_name(place: str) -> str:
    """The last part of a path, however it is written, without what a name of a folder should not have."""
    return re.sub(r"[^\w.-]+", "_", os.path.basename(os.path.abspath(str(place)))) or "folder"


class _ConfigPackages(SearchPathPlugin):
    """Adds the config files of installed packages to those where Hydra looks for options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package in packages()[1:]:
            search_path.append(provider=package, path=f"pkg://{package}")


if packages()[1:]:
    Plugins.instance().register(_ConfigPackages)
OmegaConf.register_new_resolver("float", float, replace=True)  # 25 and 25.0 are one number, and so one name
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("frames", frames, replace=True)
OmegaConf.register_new_resolver("launch_name", launch_name, use_cache=True, replace=True)  # one name per launch
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def parse(overrides: list[str]) -> list[Override]:
    """Overrides, parsed by Hydra.

    Raises:
        ValueError: an override is not in Hydra's grammar.
    """
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ValueError(f"{error.override!r} is not key=value, or its value needs quotes: {_remedy(error)}") from error


def _remedy(error: OverrideParseException) -> str:
    """How to write an override that Hydra refuses: with the quotes that the shell has removed, or else in Hydra's own words."""
    key, equals, value = error.override.partition("=")
    value = value.strip("'\"")  # a quote that is not closed
    if equals and value and not value.startswith("["):
        if key in ("data.train", "data.valid", "data.test") and "'" not in value:  # speaker=='x' lost its quotes in the shell
            value = re.sub(r"([=!]=\s*)([^\W\d]\w*)", r"\1'\2'", value)
        return f"write {argument(key, value)}"
    return [line for line in error.message.splitlines() if line.strip(" ^") and not line.startswith("See ")][-1]


def check_type(name: str, before: object, after: object) -> None:
    """Refuse a word in place of a number or a truth value. Other mistakes are found by the code that uses the value."""
    wanted: dict[type | tuple[type, ...], str] = {
        bool: "true or false",
        int: f"a whole number, such as {before}",
        (int, float): f"a number, such as {before}",
        ListConfig: f"a list, such as {before}",
        DictConfig: f"its single keys, as in {name}.key=value",
    }
    for kind, what in wanted.items():
        if isinstance(before, kind):
            fits = isinstance(after, kind) and (kind is bool or not isinstance(after, bool))
            if not fits and after is not None and name not in OF_SEVERAL_TYPES:
                raise ValueError(f"{name}={after}: expected {what}")
            return


def flat(cfg: DictConfig) -> dict[str, object]:
    """Full names of all keys with their values. Interpolations stay as they are written."""

    def walk(node: object, prefix: str) -> Iterator[tuple[str, object]]:
        for name, value in node.items() if isinstance(node, dict) else ():
            yield f"{prefix}{name}", value
            yield from walk(value, f"{prefix}{name}.")

    return dict(walk(OmegaConf.to_container(cfg), ""))


def plain(cfg: Any) -> dict[str, Any]:
    """A config as plain dicts and lists. Interpolations are resolved."""
    container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}


def compose_command(command: str, overrides: Sequence[str]) -> DictConfig:
    """The config of a command. It may be called while Hydra runs another command."""
    if GlobalHydra.instance().is_initialized():
        return compose(command, list(overrides))
    with initialize_config_module("audiot.conf", version_base="1.3"):  # a tool, or a resumed run
        return compose(command, list(overrides))
