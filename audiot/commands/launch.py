"""Running a command: its config composed and checked, its errors told in one line."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from textwrap import fill
from threading import current_thread, main_thread
from typing import Any

import hydra
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from audiot.base import quoting
from audiot.base.config import check_type, flat, launch_name, parse
from audiot.base.former import instead
from audiot.base.groups import groups, key_of, nearest, options
from audiot.base.lock import LOCK, is_first_process, owned
from audiot.base.slurm import has_restarted, job, requeue
from audiot.commands.arguments import parse as parse_arguments
from audiot.commands.sweep import failure_noted
from audiot.runs import (
    ENVIRONMENT,
    PATCH,
    ROUNDS,
    Interrupted,
    check_fresh,
    checkpoints,
    has_checkpoints,
    has_rounds,
    resume,
    resume_command,
    step_of,
    whole_run,
)

TRAINING = ("pretrain", "finetune")  # commands whose runs can be resumed
OF_A_RUN = ("evaluate", "analyze", "superb")  # commands that are about a run, whose folder needs no run=
SWEEP_FLAGS = ("-m", "--multirun")
PLACES = ("hydra.run.dir", "hydra.sweep.dir")
CONFIG_DIR = ("--config-dir", "-cd")  # a folder of config groups beside those of audiot
LONGEST_ERROR = 1500  # characters of an error's line
VALUED = ("--cfg", "-c", "--package", "-p")  # flags of Hydra that a value follows
# Flags of Hydra with which the config comes from elsewhere, and one that has no overrides.
ELSEWHERE = ("--config-path", "-cp", "--config-name", "-cn", "-sc", "--shell-completion", "--hydra-help")


def run(command: str, arguments: list[str], program: str | None = None) -> None:
    """Compose a command's config and run it; ``resume=RUN`` takes the run's own config instead.

    Args:
        command: One of `audiot.cli.COMMANDS`.
        arguments: What follows it on the command line; a run's folder stands for ``run=FOLDER`` where the command is about one.
        program: What a shell that is to complete words knows the program by; None: the command's own module.
    """
    if command in OF_A_RUN:
        arguments = _run_named(arguments)
    module = f"audiot.commands.{command}"  # imported when nothing is wrong with the config: it takes seconds
    debug = "debug=true" in [argument.lower() for argument in arguments] or os.environ.get("HYDRA_FULL_ERROR") == "1"
    sweep = [argument for argument in arguments if argument in SWEEP_FLAGS]
    overrides = [argument for argument in arguments if argument not in SWEEP_FLAGS]
    # Lightning starts the other processes of a node by running sys.argv again; Hydra wants its flags first.
    program = program or str(Path(__file__).parent / f"{command}.py")
    sys.argv = [program, *sweep, *overrides]
    with one_line_errors(debug):
        folder = next((override.split("=", 1)[1] for override in reversed(overrides) if override.startswith("resume=")), "null")
        lasting = lasting_folder(command, overrides) if command in TRAINING and not sweep else None
        restarts = lasting is not None and has_restarted() and (has_checkpoints(lasting) or has_rounds(lasting))
        if folder.lower() == "null" and restarts:  # by this job of SLURM, which was put back into the queue
            folder = str(lasting)
            overrides = [override for override in overrides if not override.startswith("hydra.")]
        if folder.lower() != "null":
            if command not in TRAINING:
                raise ValueError(f"resume={folder}: {' and '.join(TRAINING)} resume a run; {command} starts anew")
            _go_on(command, folder, [*sweep, *(each for each in overrides if not each.startswith("resume="))], debug)
            return
        if "--help" in overrides or "-h" in overrides:
            _, overrides, mine = _parted(overrides)
            print(help_text(command, overrides, bool(sweep), mine))
            return
        places = {name: quoting.parsed(override) for override in overrides for name in PLACES if override.startswith(f"{name}=")}
        given = places.get("hydra.run.dir")
        is_new = given is None or not Path(str(given)).exists()
        if not any(override.split("=")[0] in ELSEWHERE for override in overrides):
            flags, overrides, mine = _parted(overrides)
            overrides = check_overrides(command, overrides, bool(sweep), folder=mine)
            sys.argv[1:] = [*sweep, *flags, *overrides]

    def guarded(cfg: DictConfig) -> object:
        in_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        folder = Path(HydraConfig.get().runtime.output_dir)
        noted = failure_noted() if in_sweep else nullcontext()
        begun = no_failed_start(folder, command) if is_new and not in_sweep else nullcontext()
        of_run = config_named(str(cfg.run)) if command in ("evaluate", "analyze") else nullcontext()
        with (
            noted,
            one_line_errors(debug),
            _owned(command, folder),
            begun,
            finished_wandb(),
            stopped(command, folder, lasting is not None),
            of_run,
        ):
            return _main(module)(cfg)  # imported here, since a sweep may run it in a process of its own
        return None  # the failure was noted

    place = places.get("hydra.sweep.dir" if sweep else "hydra.run.dir")
    known = None if place is None or "${" in str(place) else Path(str(place))  # an interpolation is for Hydra to resolve
    with one_line_errors(debug), nullcontext() if known is None else _owned(command, known):
        if command in TRAINING and known is not None:  # here, before Hydra writes its config there
            for one in known.glob("*") if sweep else [known]:
                check_fresh(one)
        hydra.main(version_base="1.3", config_path="pkg://audiot.conf", config_name=command)(guarded)()


def _run_named(arguments: list[str]) -> list[str]:
    """Arguments with ``run=`` before the first that is neither a flag, nor a flag's value, nor an override."""
    flag = ""
    for place, given in enumerate(arguments):
        if flag not in (*VALUED, *CONFIG_DIR) and re.match(r"[^-+~=][^=]*$", given):
            return [*arguments[:place], quoting.override("run", given), *arguments[place + 1 :]]
        flag = given
    return arguments


def _go_on(command: str, folder: str, arguments: list[str], debug: bool) -> None:
    """Go on with the run in a folder; arguments are those of `audiot.runs.resume`."""
    with _owned(command, resume(command, folder, arguments).run):
        resumed = resume(command, folder, arguments)  # again, since its owner may just have gone further
        log_to(resumed.run)
        with one_line_errors(debug or resumed.config.debug), stopped(command, resumed.run, True), config_named(str(resumed.run)):
            _main(f"audiot.commands.{command}")(resumed.config, resumed)


def lasting_folder(command: str, overrides: list[str]) -> Path | None:
    """The folder of a run, where the same command line names it again when a job of SLURM starts again; None: it would not."""
    given = [quoting.parsed(override) for override in overrides if override.startswith(("hydra.run.dir=", "resume="))]
    if given:
        return None if "${" in str(given[-1]) else Path(str(given[-1]))
    name = launch_name()
    return Path("outputs") / command / name if name.startswith("slurm-") else None


@contextmanager
def stopped(command: str, folder: Path, lasts: bool) -> Iterator[None]:
    """Let SIGTERM stop a command as Ctrl-C does, and note how a run that is stopped can go on.

    Without it Lightning takes SIGTERM for the end of a training: a command that trains for a while, as `audiot tune` does, would
    end without a word and as if all were well, or go on.

    Args:
        command: The command.
        folder: Folder of the run.
        lasts: Whether the same command line would name it again.
    """
    if current_thread() is not main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except Interrupted as stop:
        stop.lasts = lasts
        raise
    except KeyboardInterrupt:
        found = checkpoints(folder / "checkpoints") if command in TRAINING else []
        if not found:
            raise
        raise Interrupted(step_of(found[0]), found[0]) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _owned(command: str, folder: Path) -> AbstractContextManager[None]:
    """A run's folder, with all its rounds, as this process's own where the command writes a run."""
    return owned(whole_run(Path(os.path.realpath(folder)))) if command in TRAINING else nullcontext()


def _parted(arguments: list[str]) -> tuple[list[str], list[str], Path | None]:
    """The flags of a command line, which ask Hydra for something itself, its overrides, and the folder of ``--config-dir``."""
    flags: list[str] = []
    overrides: list[str] = []
    folder = None
    left = iter(arguments)
    for given in left:
        name, equals, value = given.partition("=")
        if name in CONFIG_DIR:
            value = value if equals else next(left, "")
            folder = Path(value)
            if not value or not folder.is_dir():
                raise ValueError(f"{name} {value}: there is no such folder; give one that holds attention/NAME.yaml or the like")
            flags += [f"--config-dir={value}"]
        elif given in VALUED:
            flags += [given, next(left, "")]
        else:
            (flags if given.startswith("-") else overrides).append(given)
    return flags, overrides, folder


def help_text(command: str, overrides: list[str], sweep: bool, folder: Path | None = None) -> str:
    """What ``audiot COMMAND --help`` says: the config groups with their options, and every key with its value."""
    overrides = check_overrides(command, overrides, sweep, complete=False, folder=folder)
    overrides = [*_searched(folder), *(values[0] for values in map(_choices, parse(overrides)) if values)]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose(command, overrides)
    chosen = [group for group in groups() if group == "experiment" or _has(cfg, group)]
    width = max(map(len, chosen))
    lists = [fill(f"{group:{width}}  {', '.join(options(group))}", 120, subsequent_indent=" " * (width + 2)) for group in chosen]
    return "\n".join(
        [
            f"usage: audiot {command} [group=option …] [key=value …]",
            f"\nGroups (group=option chooses one; audiot list GROUP says what each is):\n\n{chr(10).join(lists)}",
            f"\nKeys (key=value sets one, +key=value adds one):\n\n{OmegaConf.to_yaml(cfg)}",
            f"audiot {command} -m key=value,value … runs them all; --cfg job, --resolve, --info and more: --hydra-help",
        ]
    )


def _has(cfg: DictConfig, group: str) -> bool:
    return OmegaConf.select(cfg, key_of(group), throw_on_resolution_failure=False) is not None


@contextmanager
def no_failed_start(folder: Path, command: str) -> Iterator[None]:
    """Take a run's folder away again where its command ends before it has made anything.

    Args:
        folder: What the command's start has made, with the folders above it where Hydra chose the place.
        command: Its name, that of the folder above.
    """
    try:
        yield
    except BaseException:
        begun = {".hydra", "train.log", "data.json", "config.yaml", "targets.json", ENVIRONMENT, PATCH, LOCK}
        if not has_rounds(folder):
            shutil.rmtree(folder / ROUNDS, ignore_errors=True)
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= begun:
            _end_log(folder)
            shutil.rmtree(folder / ".hydra", ignore_errors=True)
            for name in begun - {".hydra"}:
                (folder / name).unlink(missing_ok=True)
            above = [folder.parent, folder.parent.parent]  # outputs/pretrain/DATE
            for empty in (folder, *(above if [path.name for path in above] == [command, "outputs"] else [])):
                with suppress(OSError):  # something else is in it
                    empty.rmdir()
        raise


def run_tool(tool: str, arguments: list[str]) -> None:
    """Run a command that takes plain arguments; its errors are told in one line too."""
    with one_line_errors(os.environ.get("HYDRA_FULL_ERROR") == "1"):
        given = parse_arguments(tool, arguments)
        _main(f"audiot.commands.{tool.replace('-', '_')}")(given)


def _main(module: str) -> Callable[..., Any]:
    """A command's function; its libraries, which set their loggers when they are imported, are quietened then."""
    main: Callable[..., Any] = importlib.import_module(module).main
    quieten_libraries()
    return main


def log_to(run: Path) -> None:
    """Go on with the log of a run, as Hydra began it."""
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(sys.stdout), logging.FileHandler(run / "train.log", encoding="utf-8")],
        force=True,
    )


def _end_log(folder: Path) -> None:
    """End the log in a folder that is taken away: it is opened when something is logged, by another run of this process too."""
    for handler in list(logging.root.handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == Path(os.path.abspath(folder)):
            logging.root.removeHandler(handler)
            handler.close()


def _searched(folder: Path | None) -> list[str]:
    """The override that stands for ``--config-dir`` where a config is composed to be checked."""
    return [] if folder is None else [quoting.override("hydra.searchpath", [f"file://{folder.absolute()}"])]


def check_overrides(
    command: str, overrides: list[str], sweep: bool, complete: bool = True, folder: Path | None = None
) -> list[str]:
    """Compose every value of a sweep once, so that what is wrong with a key or a value is told before anything starts.

    Args:
        command: Its name.
        overrides: Overrides of the command line.
        sweep: Whether it runs a sweep.
        complete: Whether all values must be given.
        folder: Folder of ``--config-dir``, where options of groups are looked for too.

    Returns:
        The overrides as Hydra wants them: with a ``+`` before keys that a logger or callback takes and its file doesn't have.
    """
    given = parse(overrides)
    for override in given:
        if override.is_sweep_override() and not sweep:
            key, value = str(override.input_line).split("=", 1)
            text = f"; a text with a comma: {quoting.argument(key, value)}" if re.search("[A-Za-z]", value) else ""
            several = "names several values: add -m to run them all, or [brackets] for a list"
            raise ValueError(f"{override.input_line} {several}{text}")
    choices = [_searched(folder), *map(_choices, given)]
    choices = [values for values in choices if values]
    first = [values[0] for values in choices]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        added = _added(command, first)
    if added:
        return check_overrides(command, [_plus(override, added) for override in overrides], sweep, complete, folder)
    with initialize_config_module("audiot.conf", version_base="1.3"):
        _check_run(command, first, complete)
        for place, values in enumerate(choices):
            for value in values[1:]:
                _check_run(command, [*first[:place], value, *first[place + 1 :]], complete)
    return overrides


def _plus(override: str, added: set[str]) -> str:
    return f"+{override}" if override.split("=", 1)[0] in added else override


def _added(command: str, overrides: list[str]) -> set[str]:
    """Keys of loggers and callbacks that their files don't have, though their classes take them.

    Only for such a key is its class imported.
    """
    names = [name for override in overrides if re.match(r"(logger|callbacks)\.\w+\.\w+$", name := override.split("=", 1)[0])]
    if not names:
        return set()
    try:
        cfg = compose(command, _chosen(overrides))
    except MissingConfigException:  # told by `_check_run`
        return set()
    added = set()
    for name in names:
        owner, _, key = name.rpartition(".")
        node = OmegaConf.select(cfg, owner)
        if not isinstance(node, DictConfig) or key in node or "_target_" not in node:
            continue
        parameters = inspect.signature(get_class(node._target_)).parameters.values()
        taken = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
        if key not in taken and all(each.kind != each.VAR_KEYWORD for each in parameters):
            raise ValueError(f"no argument {key!r} of {owner} ({node._target_}){nearest(key, taken)}")
        added.add(name)
    return added


def _chosen(overrides: list[str]) -> list[str]:
    """The overrides that choose options of groups, and where these are looked for."""
    return [each for each in overrides if each.lstrip("+").split("=", 1)[0].split("@")[0] in {*groups(), "hydra.searchpath"}]


def _choices(override: Override) -> list[str]:
    """The single overrides that a sweep over ``override`` stands for; none of an interval or a glob."""
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if override.is_interval_sweep() or override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return []
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _check_run(command: str, overrides: list[str], complete: bool) -> None:
    """Compose one run's config and check what Hydra doesn't: the types of values, and that all are given."""
    names = [override.split("=", 1)[0] for override in overrides]
    if command == "tune" and (of_tasks := [name for name in names if re.match(r"\+*(downstream|upstream)\b", name)]):
        raise ValueError(
            f"{of_tasks[0]}: audiot tune is for pre-training; for a task, a sweep finds the rate: "
            "audiot finetune -m optimizer.lr=2e-4,2e-3,2e-2 …"
        )
    if command == "adapt" and (others := [each for each in overrides if each.startswith("data=") and each != "data=folder"]):
        raise ValueError(f"{others[0]}: audiot adapt is for a folder, data=folder; audiot finetune trains on a corpus")
    for override in overrides:
        now = instead(*override.split("=", 1)) if "=" in override else None
        if now is not None:
            raise ValueError(f"{override} is gone: write {now}")
    try:
        before = compose(command, _chosen(overrides))  # what the other overrides change
        keys = flat(before)
        known = [*keys, *groups()]
        for name in names:
            if name.split("@")[0] not in known and not name.startswith(("+", "~", "hydra.", "hydra/")):
                raise ValueError(f"no config key {name!r}{nearest(name, known) or f'; +{name}=… adds it'}")
        after = compose(command, overrides)
    except MissingConfigException as error:
        group, _, found = (error.missing_cfg_file or "").rpartition("/")
        listed = error.options or (options(group) if group in groups() else [])  # Hydra gives none for one of a list
        there = [name for name in listed if name[0] != "_"]  # _… is a part of others
        raise ValueError(f"{group}={found}: no such option{nearest(found, there)}; options: {', '.join(there)}") from error
    except ConfigCompositionException as error:
        for override, name in zip(overrides, names, strict=True):
            owner, _, part = name.rpartition("/")
            if owner in groups() and f"'{name}'" in str(error):
                raise ValueError(f"{override}: the chosen {owner} has no {part}") from error
        raise
    for name in names:
        if name in keys:
            check_type(name, *(OmegaConf.select(cfg, name, throw_on_resolution_failure=False) for cfg in (before, after)))
    for name, value in flat(after).items():
        if complete and value == "???":
            raise ValueError(f"{name} has no value: set {name}=…")


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn what a user can cause into one line and exit code 1; ``debug`` shows the traceback."""
    try:
        yield
    except Interrupted as stop:
        GlobalHydra.instance().clear()
        sys.stderr.write(f"\naudiot: {stop}")
        if stop.checkpoint is not None:
            goes_on = stop.command or resume_command(whole_run(stop.checkpoint.parent.parent))
            sys.stderr.write(f"; saved {stop.checkpoint}\nresume:  {goes_on}")
        sys.stderr.write("\n")
        if stop.is_warning and (name := job()) and is_first_process():
            sys.stderr.write(f"requeue: {_requeued(name, stop)}\n")
        sys.exit(130)
    except KeyboardInterrupt:
        sys.stderr.write("\naudiot: interrupted\n")
        sys.exit(130)
    except user_errors() as error:
        if debug:
            traceback.print_exc()
        sys.exit(f"audiot: error: {describe(error)}")


def _requeued(name: str, stop: Interrupted) -> str:
    """Put a job of SLURM back into the queue, if it finds its run again; what came of it, in words."""
    if stop.checkpoint is None or not stop.lasts:
        return f"no, as job {name} would begin a new run: give hydra.run.dir=… in its script"
    return requeue(name)


@contextmanager
def config_named(run: str) -> Iterator[None]:
    """Name a run whose config, a file that anyone may have written, lacks a key or has one that can't be used."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{run}: its config can't be used: {describe(error)}") from error


@contextmanager
def finished_wandb() -> Iterator[None]:
    """End a run's W&B run with it: the next run of a sweep would go on in it."""
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish()


def user_errors() -> tuple[type[BaseException], ...]:
    """What a user can cause; of libraries that nothing has imported yet, nothing can be raised."""
    theirs = {
        "lhotse.audio.utils": "AudioLoadingError",
        "pytorch_lightning.utilities.exceptions": "MisconfigurationException",
        "torch": "OutOfMemoryError",
    }
    imported = [getattr(sys.modules[module], name) for module, name in theirs.items() if module in sys.modules]
    return (ValueError, OSError, ImportError, HydraException, OmegaConfBaseException, *imported)


def describe(error: BaseException) -> str:
    """One line about an error: the first cause's own words."""
    key = ""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        place = re.search("full_key: (.+)", str(error)) or re.search(r"target '(?:.*\.)?(\w+)'", str(error))
        key = place[1] if place else key
        error = error.__cause__
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value: set {error.full_key}=…"
    words = str(error)
    if " in DataLoader worker process " in words:  # the worker's traceback follows, its error's words at the end
        words = re.split(rf"\n[\w.]*{type(error).__name__}: ", words)[-1]
    if type(error).__name__ == "AudioLoadingError":
        words = f"{words.split(' failed. Details:')[0]} failed: was it moved? Put it back, or delete the prepared corpus"
    if isinstance(error, OmegaConfBaseException):
        words = re.sub(r"^\w+ raised while resolving interpolation: ", "", words.split("\n")[0])
    words = " ".join(words.split()) or type(error).__name__
    words = f"{key}: {words}" if key and not isinstance(error, (ValueError, OSError)) else words
    half = LONGEST_ERROR // 2  # a value from a file may be of any length
    return words if len(words) <= LONGEST_ERROR else f"{words[:half]} […] {words[-half:]}"


def quieten_libraries() -> None:
    """Keep notices that call for nothing out of a user's sight; errors and unknown warnings stay."""
    for message in (
        ".*does not have many workers.*",
        ".*This DataLoader will create .* worker processes.*",  # `audiot.data.datamodule.warn_of_many` says it once
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*Consider setting `persistent_workers=True`.*",
        ".*GPU available but not used.*",
        ".*Your `IterableDataset` has `__len__` defined.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*The dirpath has changed from.*",  # a run that was moved is resumed where it is
        ".*callbacks used to create the checkpoint need to be provided.*",  # they are, with settings changed at resume
        ".*Support for mismatched key_padding_mask and attn_mask is deprecated.*",  # inside WavLM
        ".*Found .* module\\(s\\) in eval mode at the start of training.*",  # a frozen encoder
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # the report that trainer.profiler asks for
