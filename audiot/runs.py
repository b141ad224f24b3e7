"""What a run's folder is: its config, its checkpoints, whether it is finished, and how it goes on.

A run's config is what it was started with (``config.yaml``; on the command line, ``.hydra/overrides.yaml``) and every override
since: those of each resume are added to ``.hydra/resumes.yaml``. Whoever asks here gets all of them. A run's files are data,
whoever made them: they name parts by the config groups, and nothing in them is computed or run.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from audiot.base.config import check_type, flat, parse
from audiot.base.files import read_json, read_yaml, replacing_text
from audiot.base.groups import groups, key_of, nearest
from audiot.base.lock import is_first_process
from audiot.base.parts import FORMAT_VERSION, check_version, foreign, is_plain, named, resolved
from audiot.base.quoting import argument

ROUNDS = "rounds"  # folder of a run's earlier rounds
CONTROLS = ("random", "features")  # folders of the controls of a fine-tuning with compare=true
CONFIG, OVERRIDES, RESUMES = "config.yaml", ".hydra/overrides.yaml", ".hydra/resumes.yaml"
CHOICES = ".hydra/hydra.yaml"  # the option of every config group, among what Hydra notes of itself
ENVIRONMENT, PATCH = "environment.json", "uncommitted.patch"  # what a run was made with
FIRST_CONFIG = ".hydra/config.yaml"  # of runs of the first format, which Hydra wrote
HEADER = "# What this run was started with. audiot reads it again; .hydra/ holds what Hydra notes of it.\n"
DATA_DIR = "${oc.env:AUDIOT_DATA,data}"  # where corpora are, unless a config says otherwise
COMPUTED = (  # what audiot's config files compute; a run's own file has its value, but in the first format
    DATA_DIR,
    "${data_dir}/${data.name}-${data.num_speakers}x${float:${data.hours}}h",
    "${frames:${data.crop_s},${features}}",
    "${oc.select:data.trials,null}",
    "${oc.decode:${oc.env:SLURM_JOB_NUM_NODES,1}}",
)
CHANGEABLE = re.compile(
    r"trainer\.(max_steps|max_time|val_check_interval|limit_val_batches|log_every_n_steps|gradient_clip_val|gradient_clip_algorithm"
    r"|enable_(checkpointing|progress_bar|model_summary)|accelerator|devices|num_nodes|precision|strategy(\..+)?|profiler|detect_anomaly|deterministic|benchmark)"
    r"|optimizer\.(lr|weight_decay|betas|eps)|scheduler\.[^_].*"
    r"|(checkpoint|callbacks|logger)\..+|compile|plots|probe|probe_jobs|debug"
    r"|data_dir|data\.(root|num_workers|prepare\.num_jobs)"  # where the corpus is and who reads it, not what it is
)
FROM_ENCODER = ("data", "objective", "seed")  # what a new run that starts from the encoder may have otherwise


def write_config(cfg: DictConfig, run: Path) -> None:
    """Write the config of a run that begins: as it was composed, its parts by name.

    Keys that refer to others of the config still do, so that they follow what a resume changes; what is computed, such as
    ``model.max_frames``, is written as its value. Where the run is, and where corpora are by default, is not written.
    """
    tree = _literal(cfg)
    for name in ("run_dir", "trusted"):
        tree.pop(name, None)
    if OmegaConf.to_container(cfg).get("data_dir") == DATA_DIR:  # type: ignore[union-attr]
        del tree["data_dir"]
    with replacing_text(run / CONFIG) as stream:
        stream.write(HEADER)
        yaml.safe_dump({"format_version": FORMAT_VERSION, **named(tree)}, stream, sort_keys=False, allow_unicode=True, width=1000)


def _literal(node: Any) -> Any:
    """A config as plain dicts and lists, without the texts that are computed."""
    found: Any = OmegaConf.to_container(node)
    for key, value in list(enumerate(found) if isinstance(found, list) else found.items()):
        if isinstance(value, (dict, list)):
            found[key] = _literal(node[key])
        elif isinstance(value, str) and not is_plain(value):
            found[key] = OmegaConf.to_container(node[key], resolve=True) if OmegaConf.is_config(node[key]) else node[key]
    return found


def run_config(run: Path, when: str | None = None, key: str = "run", trusted: Collection[str] | None = ()) -> DictConfig:
    """The config that a run has now, in its folder as it is named here: plain values, nothing of which is computed any more.

    Args:
        run: The run's folder.
        when: ``data.prepare.when`` instead of the run's, for a command that uses its data as they were: ``check`` or ``keep``.
        key: The argument that named it, for errors.
        trusted: Packages from outside audiot whose parts it may name; None: such parts are not to be built.

    Raises:
        FileNotFoundError: no run is there.
        ValueError: a file is damaged or holds more than data, or ``when`` is another word.
    """
    if when not in (None, "check", "keep"):
        raise ValueError(f"data.prepare.when must be check or keep here, as a run's figures are of its own data, found {when!r}")
    cfg = written_config(run, key, trusted)
    if when is not None:
        OmegaConf.update(cfg, "data.prepare.when", when, force_add=True)
    return _computed(cfg, run)


def check_config(cfg: DictConfig, where: object, trusted: Collection[str]) -> None:
    """Refuse a config, composed of overrides that a file has, which is more than data.

    Raises:
        ValueError: it computes something that audiot's config files don't, or names a part that may not be built.
    """
    tree = OmegaConf.to_container(cfg)
    assert isinstance(tree, dict)
    del tree["run_dir"]
    resolved(tree, where, trusted, references=True, known=COMPUTED)


def has_config(run: Path) -> bool:
    """Whether a folder is a run's."""
    return (run / CONFIG).is_file() or (run / FIRST_CONFIG).is_file()


def written_config(run: Path, key: str = "run", trusted: Collection[str] | None = ()) -> DictConfig:
    """The config of a run as its files say it, with the changes of its resumes; keys may refer to other keys.

    Arguments and errors are those of `run_config`.
    """
    if not has_config(run):
        raise FileNotFoundError(f"{key}={run}: no run there ({run / CONFIG} is missing)")
    first = not (run / CONFIG).is_file()
    path = run / (FIRST_CONFIG if first else CONFIG)
    tree = _read(path, dict)
    if first:  # as Hydra wrote it, with what audiot's config files computed
        tree.pop("run_dir", None)
        tree.pop("trusted", None)
    else:
        check_version(tree.pop("format_version", None), path)
    cfg = OmegaConf.create(
        {"data_dir": DATA_DIR} | resolved(tree, path, trusted, references=True, known=COMPUTED if first else ())
    )
    for override in parse(_added(_resumes(run))):
        name = override.get_key_element()
        if not CHANGEABLE.fullmatch(name):
            raise ValueError(f"{run / RESUMES} changes {name}, which no resume can")
        value = override.value()
        OmegaConf.update(cfg, name, resolved(value, run / RESUMES, trusted, name.split(".")[-1], references=True), merge=True)
    cfg.trusted = list(trusted or ())
    cfg.run_dir = _literal_path(run)
    return cfg


def repeated_config(run: Path, folder: Path, trusted: Collection[str] = ()) -> DictConfig:
    """The config with which another folder repeats a run; keys may refer to other keys.

    Arguments and errors are those of `run_config`.
    """
    cfg = written_config(run, trusted=trusted)
    cfg.run_dir = _literal_path(folder)
    return cfg


def record_repeat(run: Path, folder: Path) -> None:
    """Note in a repeat's folder how the run was composed, for those who ask `run_overrides` and `choices`."""
    record_start(folder, [each for each in run_overrides(run) if not each.startswith("hydra.run.dir=")], choices(run))


def record_start(folder: Path, overrides: list[str], options: Mapping[str, str]) -> None:
    """Note in the folder of a run that Hydra does not start how it is composed: its overrides, and options of config groups."""
    with replacing_text(folder / OVERRIDES) as stream:
        yaml.safe_dump(overrides, stream, sort_keys=False, allow_unicode=True, width=1000)
    with replacing_text(folder / CHOICES) as stream:
        yaml.safe_dump({"hydra": {"runtime": {"choices": dict(options)}}}, stream, sort_keys=False, allow_unicode=True)


def changes_on_the_way(run: Path) -> list[str]:
    """What resumes changed in a run, in words: the step and the overrides of each."""
    return [f"from step {resume.get('step')} on: {' '.join(resume['overrides'])}" for resume in _resumes(run)]


def _literal_path(folder: Path) -> str:
    """A path as a config's value, which refers to nothing, whatever its characters."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(folder))


def _computed(cfg: DictConfig, run: Path) -> DictConfig:
    """A config whose references are replaced by what they refer to; those of the probes stay, whose paths are quoted later."""
    found = cfg.copy()
    probes = found.pop("probes", None)
    OmegaConf.resolve(found)
    if "${" in OmegaConf.to_yaml(found) and "${" not in str(run):
        raise ValueError(f"{run}: its config makes references of references: nothing that audiot wrote does")
    if probes is not None:
        found.probes = probes
    return found


def has_overrides(run: Path) -> bool:
    """Whether the command line that started a run is known."""
    return (run / OVERRIDES).is_file()


def run_overrides(run: Path) -> list[str]:
    """The command line that would start a run as it is now; nothing where that is not known."""
    started = _read(run / OVERRIDES, list) if (run / OVERRIDES).is_file() else []
    overrides = [str(override) for override in started]
    for added in _added(_resumes(run)):
        overrides = [*(override for override in overrides if _name(override) != _name(added)), added]
    return overrides


def choices(run: Path) -> dict[str, str]:
    """Config group → the option that a run was composed of; nothing where that is not known."""
    record = run / CHOICES
    found = _read(record, dict) if record.is_file() else {}
    for key in ("hydra", "runtime", "choices"):
        found = found.get(key) if isinstance(found, dict) else None
    options = found.items() if isinstance(found, dict) else ()
    return {str(group): option for group, option in options if isinstance(option, str) and re.fullmatch(r"[\w/-]+", option)}


def _name(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+")


def _read(path: Path, kind: type[Any]) -> Any:
    """A YAML file of a run, which holds keys or a list."""
    content = read_yaml(path)
    if content is None:  # an empty file
        return kind()
    if not isinstance(content, kind):
        raise ValueError(f"{path} is not a run's: expected {'keys' if kind is dict else 'a list'}")
    return content


def _resumes(run: Path) -> list[dict[str, Any]]:
    """Every resume that changed something: the ``step`` from which, and the ``overrides`` of its command line."""
    path = run / RESUMES
    resumes = _read(path, list) if path.is_file() else []
    for resume in resumes:
        overrides = resume.get("overrides") if isinstance(resume, dict) else None
        if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
            raise ValueError(f"{path} is not a run's: expected a step and overrides in every entry, found {str(resume)[:80]}")
    return resumes


def _added(resumes: list[dict[str, Any]]) -> list[str]:
    return [override for resume in resumes for override in resume["overrides"]]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.stem.split("=")[1])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a folder has the checkpoint of a step."""
    return folder / f"step={step}.ckpt"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run in a folder, those of later steps first."""
    return sorted(folder.glob("step=*.ckpt"), key=step_of, reverse=True)


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint of a run's latest step that is whole. Damaged ones of later steps are told of.

    Raises:
        FileNotFoundError: it has none.
        ValueError: all are damaged.
    """
    found = checkpoints(run / "checkpoints")
    if not found:
        raise FileNotFoundError(f"{run}: no checkpoint of a run in {run / 'checkpoints'}: expected step=N.ckpt")
    for number, path in enumerate(found):
        if damage(path) is None:
            for later in found[:number]:
                _tell_once(f"damaged {later}: {damage(later)}; {path.name} stands in for it")
            return path
    rest = f", and so are {len(found) - 1} earlier ones" if len(found) > 1 else ""
    raise ValueError(f"{found[0]} is damaged: {damage(found[0])}{rest}")


@cache
def _tell_once(line: str) -> None:
    from audiot.base.console import say  # imports Lightning, which few commands that ask for a run need

    say(line)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; None where nothing is. Each of its parts has a CRC-32, which is computed again."""
    status = path.stat()
    return _damage(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _damage(path: Path, size: int, changed: int) -> str | None:
    if not zipfile.is_zipfile(path):  # its index stands at the end of the file
        return "it is truncated or not a checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except Exception as error:  # a damaged index may raise anything, an error of decoding names say
        return " ".join(str(error).split()) or type(error).__name__
    return None if part is None else f"{part} has another checksum than when it was written"


def round_folder(run: Path, number: int) -> Path:
    """The folder of an earlier round of a run, counted from 1: a run of its own."""
    return run / ROUNDS / str(number)


def whole_run(run: Path) -> Path:
    """The run that a folder belongs to: the one of which it is an earlier round or a control, or itself."""
    if run.parent.name == ROUNDS:
        return whole_run(run.parent.parent)
    return run.parent if run.name in CONTROLS and has_config(run.parent) else run


def has_rounds(run: Path) -> bool:
    """Whether an earlier round of a run has a checkpoint."""
    return any((run / ROUNDS).glob("**/checkpoints/step=*.ckpt"))


def has_checkpoints(run: Path) -> bool:
    """Whether the last round of a run has a checkpoint."""
    return bool(checkpoints(run / "checkpoints"))


def is_in_earlier_round(run: Path) -> bool:
    """Whether a run was stopped before its last round had a checkpoint."""
    return has_rounds(run) and not has_checkpoints(run)


def check_archive(path: Path) -> Path:
    """A checkpoint's path, if it is whole."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if wrong := damage(path):
        raise ValueError(f"{path} is damaged: {wrong}")
    return path


def check_fresh(run: Path) -> None:
    """Refuse to train in the folder of another run, whose checkpoints and results would mix with the new ones.

    Raises:
        ValueError: there are checkpoints.
    """
    if not is_first_process():
        return  # the first process of the run has looked, and may have begun
    if has_checkpoints(run) or has_rounds(run):
        how = argument("resume", run)
        raise ValueError(f"{run} holds a run already: {how} goes on with it, another hydra.run.dir starts anew")


FIGURES = ("pretrain/", "probe/", "finetune/", "valid/", "test/", "targets/")  # beginnings of the names of figures
ERRORS = ("per", "cer", "wer", "eer")  # of tasks, that are the better, the lower they are
NUMBERS = (
    *("frames_per_s", "data_wait", "first_step_s", "train_s", "wall_s", "peak_gib", "energy_wh", "read_gb"),
    *("parameters", "steps", "resumed_step", "stopped_patience", "train_utterances"),
)


def read_results(path: Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """The results of a run, its ``metrics.json`` or ``summary.json``, checked: a figure is a number, an interval two of them.

    Args:
        path: The file.
        needed: Names that it must have.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON, or holds something else.
    """
    found = read_json(path, "results")
    if lacking := [name for name in needed if name not in found]:
        raise ValueError(f"{path} has no {lacking[0]!r}, which the results of a run have: evaluate or train it again")
    for name, value in found.items():
        wanted = None
        if name.startswith(FIGURES) or name in NUMBERS:
            wanted = None if is_number(value) else "a number"
        elif name == "monitor":
            wanted = None if isinstance(value, str) else "the name of a figure"
        if name.startswith(("probe/", "finetune/")) and name.count("/") != 2:
            raise ValueError(f"{path}: no probe is called {name!r}: expected probe/TASK/UPSTREAM or finetune/TASK/UPSTREAM")
        if wanted:
            raise ValueError(f"{path}: {name} is {str(value)[:80]!r}: expected {wanted}")
    intervals = found.get("intervals", {})
    if not isinstance(intervals, dict):
        raise ValueError(f"{path}: intervals is {str(intervals)[:80]!r}: expected the two ends of each figure")
    for name, ends in intervals.items():
        if not isinstance(ends, list) or len(ends) != 2 or not all(map(is_number, ends)):
            raise ValueError(f"{path}: intervals.{name} is {str(ends)[:80]!r}: expected two numbers")
    return found


def is_number(value: Any) -> bool:
    """Whether a value of a file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finished(run: Path, cfg: DictConfig) -> bool:
    """Whether a run has trained to its end, and has the figures of its newest checkpoint and of every probe.

    Of fine-tuning: and of every control.
    """
    if command_of(cfg) == "finetune":
        compared = not cfg.compare or (run / "comparison.csv").is_file()
        return compared and all(has_metrics(folder, cfg) for folder in (run, *(run / name for name in CONTROLS if cfg.compare)))
    if not (run / "summary.json").is_file():
        return False
    summary, step = read_results(run / "summary.json"), step_of(newest_checkpoint(run))
    probed = not cfg.probe or set(cfg.probes) <= set(summary)
    return _has_ended(summary, step, cfg) and probed


def has_metrics(run: Path, cfg: DictConfig) -> bool:
    """Whether a fine-tuning has trained to its end and has been tested since."""
    if not (run / "metrics.json").is_file() or not has_checkpoints(run):
        return False
    return _has_ended(read_results(run / "metrics.json"), step_of(newest_checkpoint(run)), cfg)


def _has_ended(figures: Mapping[str, Any], step: int, cfg: DictConfig) -> bool:
    """Whether figures are of a step after which nothing is left to train: the last one, or that of early stopping."""
    patience = OmegaConf.select(cfg, "callbacks.early_stopping.patience")
    stopped = patience is not None and figures.get("stopped_patience", 0) >= patience
    return figures.get("steps") == step and (stopped or step >= cfg.trainer.max_steps)


def command_of(cfg: Mapping[Any, Any]) -> str:
    """The command whose run has a config."""
    return "finetune" if "downstream" in cfg else "pretrain"


def resume_command(run: Path) -> str:
    """What to paste into a shell to go on with a run; its folder holds the rest."""
    tree = _read(run / CONFIG, dict) if (run / CONFIG).is_file() else {}
    trusted = foreign(tree)
    trust = [argument("trusted", trusted)] if trusted else []
    return " ".join([f"audiot {command_of(tree)}", argument("resume", run), *trust])


class Interrupted(BaseException):
    """Training was stopped by a signal after finishing its step.

    Args:
        step: The step.
        checkpoint: Where it can go on from, if one was saved.
        where: What was going on, if it was not training itself.
        is_warning: Whether the signal warned of the end of a job's time, SIGUSR1.
    """

    def __init__(self, step: int, checkpoint: Path | None, where: str = "", is_warning: bool = False) -> None:
        super().__init__(f"interrupted {where}after step {step}")
        self.checkpoint, self.is_warning = checkpoint, is_warning
        self.lasts = False  # whether the same command line would name the run again
        self.command: str | None = None  # what goes on with it, if it is not the run's own command


@dataclass(frozen=True)
class Resumed:
    """A run that goes on.

    Args:
        run: Its folder.
        checkpoint: Where it goes on from; None: its last round has not begun.
        before: Its config so far.
        config: Its config from here on.
        changes: The overrides that make the difference.
        earlier: What `record` adds them to.
        written: The config from here on, whose keys still refer to others.
    """

    run: Path
    checkpoint: Path | None
    before: DictConfig
    config: DictConfig
    changes: list[str]
    earlier: list[dict[str, Any]]
    written: DictConfig

    def record(self) -> None:
        """Make the changes the run's own; to do it twice is to do it once."""
        if self.changes:
            step = 0 if self.checkpoint is None else step_of(self.checkpoint)
            resumes = [*self.earlier, {"step": step, "overrides": self.changes}]
            with replacing_text(self.run / RESUMES) as stream:
                yaml.safe_dump(resumes, stream, sort_keys=False, allow_unicode=True, width=1000)


def resume(command: str, folder: str, arguments: list[str]) -> Resumed:
    """How a run goes on.

    Args:
        command: The command that is to go on with it, ``pretrain`` or ``finetune``.
        folder: What follows ``resume=`` on the command line.
        arguments: The rest of the command line.

    Raises:
        FileNotFoundError: no run is there, or it has no checkpoint.
        ValueError: an override can't be applied, or the run is finished or further than it is to go.
    """
    run = _folder(folder)
    trusted: Any = next((override.value() for override in parse([each for each in arguments if each.startswith("trusted=")])), [])
    written = written_config(run, "resume", trusted)
    before = _computed(written, run)
    if command_of(before) != command:
        raise ValueError(f"resume={run}: a run of audiot {command_of(before)}: {resume_command(run)} goes on with it")
    if "resume" not in before:
        raise ValueError(f"resume={run}: an earlier audiot made this run, whose {command} can't be resumed: start anew")
    known, given, changes = flat(before), run_overrides(run), []
    arguments = [each for each in arguments if not each.startswith("trusted=")]
    for flag in arguments:
        if flag.startswith("-"):
            raise ValueError(f"resume={run}: {flag} has no effect on one run that goes on; drop it")
    for override in {override.key_or_group: override for override in parse(arguments)}.values():  # the last one of a key counts
        text = str(override.input_line)
        if text in given and not _is_single(override, known):  # a group's option as it was
            continue
        name = _checked(run, override, known)
        was = OmegaConf.select(before, name, throw_on_resolution_failure=False)
        OmegaConf.update(written, name, override.value(), merge=True)
        is_now = OmegaConf.select(written, name, throw_on_resolution_failure=False)
        if was == is_now:
            continue
        if not CHANGEABLE.fullmatch(name):
            from_encoder = command == "pretrain" and name.split(".")[0] in FROM_ENCODER
            remedy = "init=RUN/encoder starts a new run from its encoder" if from_encoder else "a new run can have another"
            raise ValueError(f"{text} can't change on resume: the run has {was}; {remedy}")
        check_type(name, was, is_now)
        changes.append(text)
    config = _computed(written, run)
    before.resume = config.resume = str(run)
    if is_in_earlier_round(run):
        for change in changes:
            if change.startswith(("trainer.max_steps=", "optimizer.", "scheduler.")):
                raise ValueError(f"{change} can't change before the last round of {run} has begun: its rounds train alike")
        return Resumed(run, None, before, config, changes, _resumes(run), written)
    checkpoint = newest_checkpoint(run)
    step, last = step_of(checkpoint), config.trainer.max_steps
    if not isinstance(last, int) or last < step:
        raise ValueError(f"trainer.max_steps={last} lies before {checkpoint}: set trainer.max_steps={step} or more")
    if changes and is_finished(run, config):
        further = f"trainer.max_steps beyond {step}" if step >= last else "more callbacks.early_stopping.patience"
        raise ValueError(f"{run} is finished: {' '.join(changes)} would change nothing; {further} trains on")
    return Resumed(run, checkpoint, before, config, changes, _resumes(run), written)


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
