"""What a run's folder is: its config, its checkpoints, whether it is finished, and how it goes on.

A run's config is what it was started with (``.hydra/config.yaml``, ``.hydra/overrides.yaml``) and every override since: those
of each resume are added to ``.hydra/resumes.yaml``. Whoever asks here gets all of them.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from audiot.base.config import check_type, flat, parse
from audiot.base.files import read_json, replacing_text
from audiot.base.groups import groups, key_of, nearest
from audiot.base.quoting import argument

CONFIG, OVERRIDES, RESUMES = ".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/resumes.yaml"
CHANGEABLE = re.compile(
    r"trainer\.(max_steps|max_time|val_check_interval|limit_val_batches|log_every_n_steps|gradient_clip_val|gradient_clip_algorithm"
    r"|enable_(checkpointing|progress_bar|model_summary)|accelerator|devices|num_nodes|precision|strategy(\..+)?|profiler|detect_anomaly|deterministic|benchmark)"
    r"|optimizer\.(lr|weight_decay|betas|eps)|scheduler\.[^_].*"
    r"|(checkpoint|callbacks|logger)\..+|compile|probe|probe_jobs|debug"
    r"|data_dir|data\.(root|num_workers|prepare\.num_jobs)"  # where the corpus is and who reads it, not what it is
)
FROM_ENCODER = ("data", "objective", "seed")  # what a new run that starts from the encoder may have otherwise


def run_config(run: Path, when: str | None = None, key: str = "run") -> DictConfig:
    """The config that a run has now, in its folder as it is named here.

    Args:
        run: The run's folder.
        when: ``data.prepare.when`` instead of the run's, for a command that uses its data as they were: ``check`` or ``keep``.
        key: The argument that named it, for errors.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: a file is damaged, or ``when`` is another word.
    """
    if when not in (None, "check", "keep"):
        raise ValueError(f"data.prepare.when must be check or keep here, as a run's figures are of its own data, found {when!r}")
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(f"{key}={run}: no run there ({run / CONFIG} is missing)")
    cfg = _read(run / CONFIG, DictConfig)
    for override in parse(_added(_resumes(run))):
        OmegaConf.update(cfg, override.get_key_element(), override.value(), merge=True)
    cfg.run_dir = str(run)
    if when is not None:
        OmegaConf.update(cfg, "data.prepare.when", when, force_add=True)
    return cfg


def run_overrides(run: Path) -> list[str]:
    """The command line that would start a run as it is now; nothing where that is not known."""
    started: Any = OmegaConf.to_container(_read(run / OVERRIDES, ListConfig)) if (run / OVERRIDES).is_file() else []
    overrides = [str(override) for override in started]
    for added in _added(_resumes(run)):
        overrides = [*(override for override in overrides if _name(override) != _name(added)), added]
    return overrides


def _name(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")


def _read(path: Path, kind: type[DictConfig] | type[ListConfig]) -> Any:
    """A YAML file of a run, which holds keys or a list."""
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeError) as error:
        raise ValueError(f"{path} is not readable: {error}") from error
    if not content:  # an empty file
        empty: Any = {} if kind is DictConfig else []
        return OmegaConf.create(empty)
    if not isinstance(content, kind):
        raise ValueError(f"{path} is not a run's: expected {'keys' if kind is DictConfig else 'a list'}")
    return content


def _resumes(run: Path) -> list[dict[str, Any]]:
    """Every resume that changed something: the ``step`` from which, and the ``overrides`` of its command line."""
    path = run / RESUMES
    resumes: Any = OmegaConf.to_container(_read(path, ListConfig)) if path.is_file() else []
    for resume in resumes:
        overrides = resume.get("overrides") if isinstance(resume, dict) else None
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise ValueError(f"{path} is not a run's: expected a step and overrides in every entry, found {resume}")
    return resumes


def _added(resumes: list[dict[str, Any]]) -> list[str]:
    return [override for resume in resumes for override in resume["overrides"]]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.split("=")[1])


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of a pre-training run's latest step.

    Raises:
        FileNotFoundError: it has none.
        ValueError: it is truncated.
    """
    found = list((run / "checkpoints").glob("step=*.ckpt"))
    if not found:
        raise FileNotFoundError(f"{run}: no checkpoint of a pre-training run in {run / 'checkpoints'}")
    return check_archive(max(found, key=step_of))


def check_archive(path: Path) -> Path:
    """A checkpoint's path, if it is whole: its index stands at the end of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated or not a checkpoint")
    return path


def check_fresh(run: Path) -> None:
    """Refuse to pre-train in the folder of another run, whose checkpoints and probes would mix with the new ones.

    Raises:
        ValueError: there are checkpoints.
    """
    if any((run / "checkpoints").glob("step=*.ckpt")):
        how = argument("resume", run)
        raise ValueError(f"{run} holds a run already: {how} goes on with it, another hydra.run.dir starts anew")


def is_finished(run: Path, cfg: DictConfig) -> bool:
    """Whether a run has trained to ``trainer.max_steps``, and has the figures of its newest checkpoint and of every probe."""
    if not (run / "summary.json").is_file():
        return False
    summary, step = read_json(run / "summary.json", "summary"), step_of(newest_checkpoint(run))
    probed = not cfg.probe or set(cfg.probes) <= set(summary)
    return summary.get("steps") == step >= cfg.trainer.max_steps and probed


def resume_command(run: Path) -> str:
    """What to paste into a shell to go on with a run; its folder holds the rest."""
    return f"audiot pretrain {argument('resume', run)}"


class Interrupted(BaseException):
    """Training was stopped by Ctrl-C after finishing its step.

    Args:
        checkpoint: Where it can go on from, if one was saved.
        where: What was going on, if it was not training itself.
    """

    def __init__(self, step: int, checkpoint: Path | None, where: str = "") -> None:
        super().__init__(f"interrupted {where}after step {step}")
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Args:
        run: Its folder.
        checkpoint: Where it goes on from.
        before: Its config so far.
        config: Its config from here on.
        changes: The overrides that make the difference.
        earlier: What `record` adds them to.
    """

    run: Path
    checkpoint: Path
    before: DictConfig
    config: DictConfig
    changes: list[str]
    earlier: list[dict[str, Any]]

    def record(self) -> None:
        """Make the changes the run's own; to do it twice is to do it once."""
        if self.changes:
            resumes = [*self.earlier, {"step": step_of(self.checkpoint), "overrides": self.changes}]
            with replacing_text(self.run / RESUMES) as stream:
                stream.write(OmegaConf.to_yaml(OmegaConf.create(resumes)))


def resume(folder: str, arguments: list[str]) -> Resumed:
    """How a run goes on.

    Args:
        folder: What follows ``resume=`` on the command line.
        arguments: The rest of the command line.

    Raises:
        FileNotFoundError: no run is there, or it has no checkpoint.
        ValueError: an override can't be applied, or the run is finished or further than it is to go.
    """
    run = _folder(folder)
    before = run_config(run, key="resume")
    if "resume" not in before:
        raise ValueError(f"resume={run}: not a pre-training run; only those can be resumed")
    before.resume = str(run)
    config, known, given, changes = before.copy(), flat(before), run_overrides(run), []
    for flag in arguments:
        if flag.startswith("-"):
            raise ValueError(f"resume={run}: {flag} has no effect on one run that goes on; drop it")
    for override in {override.key_or_group: override for override in parse(arguments)}.values():  # the last one of a key counts
        text = str(override.input_line)
        if text in given and not _is_single(override, known):  # a group's option as it was
            continue
        name = _checked(run, override, known)
        OmegaConf.update(config, name, override.value(), merge=True)
        was, is_now = (OmegaConf.select(cfg, name, throw_on_resolution_failure=False) for cfg in (before, config))
        if was == is_now:
            continue
        if not CHANGEABLE.fullmatch(name):
            from_encoder = name.split(".")[0] in FROM_ENCODER
            remedy = "init=RUN/encoder starts a new run from its encoder" if from_encoder else "a new run can have another"
            raise ValueError(f"{text} can't change on resume: the run has {was}; {remedy}")
        check_type(name, was, is_now)
        changes.append(text)
    checkpoint = newest_checkpoint(run)
    step, last = step_of(checkpoint), config.trainer.max_steps
    if not isinstance(last, int) or last < step:
        raise ValueError(f"trainer.max_steps={last} lies before {checkpoint}: set trainer.max_steps={step} or more")
    if changes and is_finished(run, config):
        raise ValueError(
            f"{run} is finished: {' '.join(changes)} would change nothing; trainer.max_steps beyond {step} trains on"
        )
    return Resumed(run, checkpoint, before, config, changes, _resumes(run))


def _folder(text: str) -> Path:
    """The folder that ``resume=`` names, as it stands there or in Hydra's quotes."""
    if not text:
        raise ValueError("resume= names no folder: resume=RUN")
    try:
        (override,) = parse([f"resume={text}"])
    except ValueError:  # a plain path may hold what is no value for Hydra
        return Path(text)
    if Path(text).is_dir() or override.is_sweep_override() or not isinstance(override.value(), str):
        return Path(text)
    return Path(OmegaConf.create([override.value()])[0])  # without the backslashes that keep ${ from being an interpolation


def _is_single(override: Override, known: dict[str, object]) -> bool:
    """Whether an override sets a single key that the run has."""
    name = override.key_or_group
    return override.type == OverrideType.CHANGE and name in known and not isinstance(known[name], dict)


def _checked(run: Path, override: Override, known: dict[str, object]) -> str:
    """The config key that an override is about.

    Raises:
        ValueError: it is none of the run's single keys.
    """
    text, name = str(override.input_line), override.key_or_group
    if override.is_sweep_override():
        raise ValueError(f"{text} names several values: a run goes on with one of them")
    if override.type != OverrideType.CHANGE:
        raise ValueError(f"{text} can't be on resume: the run keeps the keys that it has; a new run can have others")
    if name.startswith(("hydra.", "hydra/")) or name == "run_dir":
        raise ValueError(f"{text} has no effect on resume: the run goes on in {run}; drop it")
    if name in groups() or isinstance(known.get(name), dict):
        keys = [key for key in known if key.startswith(f"{key_of(name)}.") and CHANGEABLE.fullmatch(key)]
        keys = [key for key in keys if not isinstance(known[key], dict) and not key.endswith("_target_")]
        single = f"set its single keys, as in {keys[0]}={known[keys[0]]}" if keys else "a new run can have another"
        raise ValueError(f"{text} can't change on resume: {single}")
    if name not in known and not (name.startswith("trainer.") and CHANGEABLE.fullmatch(name)):  # of a run of an earlier version
        raise ValueError(f"resume={run}: {name!r} is not a key of the run's config{nearest(name, [*known])}")
    return name
