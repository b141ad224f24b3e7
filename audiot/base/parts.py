"""The parts of a model or a run in files: named as the config groups name them, never by the place of their code.

Inside the program a part is a plain dict with ``_target_``, the class to build, as Hydra composes it. In a file it is a dict with
``part``: ``attention/query_key`` is what ``conf/attention/query_key.yaml`` builds, and a class that is named inside a file of a
group has its own name there, as ``downstream/frame_classifier``. A class from outside audiot is ``package.module:Class``, and is
built only for a caller who trusts the package. So the layout of the code can change, and a file can choose only among the parts
that fit its place.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Collection, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from hydra.utils import get_object

from audiot.base.former import translate_v1
from audiot.base.groups import packages

FORMAT_VERSION = 2
MOST_LEVELS = 32
REFERENCE = re.compile(r"(?<!\\)\$\{[A-Za-z_]\w*(\.\w[\w-]*)*\}")
HYDRA_KEYS = (("_partial_", True), ("_convert_", "all"), ("_convert_", "none"))
GROUP_OF = {  # key that holds a part → groups that it may be from
    "features": ("features",),
    "model": ("model",),
    "attention": ("attention",),
    "other_attention": ("attention",),
    "search": ("attention/search",),
    "positions": ("positions",),
    "objective": ("objective", "downstream"),
    "head": ("downstream",),
    "labels": ("downstream",),
    "upstream": ("upstream",),
    "teacher": ("upstream",),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "corpus": ("data",),
    "trainer": ("trainer",),
    "strategy": ("trainer",),
}
COLLECTIONS = ("callbacks", "logger")  # keys whose values are parts, of the group of that name
FORMER = {  # places of the first format → today's
    "audiot.masking.Corruption": "audiot.objectives.reconstruction.Reconstruction",
    "audiot.objectives.corruption.Corruption": "audiot.objectives.reconstruction.Reconstruction",
    "audiot.optimization.": "audiot.training.optimization.",
    "audiot.replication.": "audiot.training.ddp.",
    "audiot.sharding.": "audiot.training.fsdp.",
    "audiot.callbacks.GracefulInterrupt": "audiot.training.interrupt.GracefulInterrupt",
    "audiot.callbacks.RunCSVLogger": "audiot.training.csv_logger.RunCSVLogger",
    "audiot.callbacks.ReconstructionPictures": "audiot.training.callbacks.ObjectivePictures",
    "audiot.training.callbacks.ReconstructionPictures": "audiot.training.callbacks.ObjectivePictures",
    "audiot.callbacks.": "audiot.training.callbacks.",
    "audiot.s3prl.": "audiot.interop.s3prl.",
    "audiot.downstream.hf_upstream.": "audiot.interop.hf_upstream.",
}

GONE = {  # parts of earlier versions, which their runs still name
    "callbacks/model_checkpoint": ("pytorch_lightning.callbacks.ModelCheckpoint", "audiot"),
}


@cache
def registry() -> dict[str, tuple[str, str]]:
    """Name of every part in the config files → what it builds, ``package.module.name``, and the package that brings it."""
    found = dict(GONE)
    for package in packages():
        for group, name, text in _option_files(files(package)):
            for line in re.finditer(r"(?m)^( *)_target_: *([\w.]+)", text):
                own = _snake_case(line[2].rpartition(".")[2]) if line[1] else name.lstrip("_")
                found.setdefault(f"{group}/{own}", (line[2], "audiot" if package == "audiot.conf" else line[2].split(".")[0]))
    return found


@cache
def _names() -> dict[str, str]:
    return {target: name for name, (target, _) in registry().items()}


def _option_files(folder: Any, group: str = "") -> list[tuple[str, str, str]]:
    """Group, name and text of every option of every group."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("_"):
            found += _option_files(entry, f"{group}/{entry.name}" if group else entry.name)
        elif group and entry.name.endswith(".yaml"):
            found.append((group, entry.name.removesuffix(".yaml"), entry.read_text(encoding="utf-8")))
    return found


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def named(config: Any) -> Any:
    """A config as it is written to a file: the parts by their names."""
    if isinstance(config, Mapping):
        rest = {str(key): named(value) for key, value in config.items() if key != "_target_"}
        return {"part": name_of(str(config["_target_"])), **rest} if "_target_" in config else rest
    return [named(value) for value in config] if isinstance(config, (list, tuple)) else config


def name_of(target: str) -> str:
    """The name of ``package.module.Class`` in files."""
    return _names().get(target) or ":".join(target.rsplit(".", 1))


def resolved(
    config: Any,
    where: object,
    trusted: Collection[str] | None = (),
    place: str = "",
    references: bool = False,
    known: Collection[str] = (),
) -> Any:
    """A config from a file, checked: its parts have a ``_target_`` that may be built. Only trusted packages are imported.

    Args:
        config: Dicts, lists and plain values; parts by ``part`` or, in the first format, by ``_target_``.
        where: The file, for errors.
        trusted: Packages from outside audiot whose parts it may name, or, to trust less, ``package.module.Class``;
            None: such parts stay as they are in the file, and nothing builds them.
        place: Key of a part that the config is.
        references: Texts may refer to other keys of the config, as in ``${data.name}``.
        known: Texts that may be computed.

    Raises:
        ValueError: it names a part that is unknown, not trusted, or of another kind than its place; or holds more than data.
    """
    others = None if trusted is None else tuple(package for package in trusted if package != "audiot")
    return _Reader(where, others, references, tuple(known)).read(config, [place] if place else [])


class _Reader:
    def __init__(self, where: object, trusted: tuple[str, ...] | None, references: bool, known: tuple[str, ...]) -> None:
        self.where, self.trusted, self.references, self.known = where, trusted, references, known

    def read(self, config: Any, path: list[str]) -> Any:
        if len(path) > MOST_LEVELS:
            raise self._error(path[:3], f"holds more than {MOST_LEVELS} levels: no config is so deep")
        if isinstance(config, dict):
            return self._read_keys(config, path)
        if isinstance(config, list):
            return [self.read(value, [*path, str(number)]) for number, value in enumerate(config)]
        if (
            isinstance(config, str)
            and config not in self.known
            and not (is_plain(config) if self.references else "${" not in config)
        ):
            raise self._error(path, f"is {config[:60]!r}: what a file holds is not computed; write the value itself")
        if config is not None and not isinstance(config, (str, bool, int, float)):
            raise self._error(path, f"is a {type(config).__name__}: expected a number, a text, a list or keys")
        return config

    def _read_keys(self, config: dict[Any, Any], path: list[str]) -> dict[Any, Any]:
        config = self._translated(config, path)
        target = self._target(config, path)
        found: dict[Any, Any] = {} if target is None else {"_target_": target}
        for key, value in config.items():
            if not isinstance(key, (str, int)):
                raise self._error(path, f"has the key {key!r}: expected a text")
            if target is not None and key in ("part", "_target_"):
                continue
            if key == "_target_":  # of a part that is not trusted
                key, value = "part", name_of(str(value))
            if str(key).startswith("_") and (key, value) not in HYDRA_KEYS:
                raise self._error([*path, key], "is no key of a config that audiot wrote")
            named = value if isinstance(value, list) else [] if value is None else [value]
            if key == "trusted" and self.trusted is not None and not set(map(str, named)) <= {"audiot", *self.trusted}:
                raise self._error([*path, key], f"is {value}: whom to trust is for the one to say who reads the file")
            if key == "sources" and isinstance(value, list) and "command" in value and "command" not in (self.trusted or ()):
                raise self._error([*path, key], "lets a manifest run commands: trusted=[command] says that you want it")
            found[key] = self.read(value, [*path, str(key)])
        return found

    def _translated(self, config: dict[Any, Any], path: list[str]) -> dict[Any, Any]:
        """A part of the first format in today's words."""
        if not isinstance(config.get("_target_"), str) or not all(isinstance(key, str) for key in config):
            return config
        target = config["_target_"]
        target = next((new + target.removeprefix(old) for old, new in FORMER.items() if target.startswith(old)), target)
        try:
            target, parameters = translate_v1(target, {key: value for key, value in config.items() if key != "_target_"})
        except (ValueError, TypeError) as error:
            raise self._error(path, f"is not read: {error}") from error
        return {"_target_": target, **parameters}

    def _target(self, config: dict[Any, Any], path: list[str]) -> str | None:
        """What the config of a part builds; None where it is no part."""
        name = config.get("_target_", config.get("part"))
        if name is None:
            return None
        if not isinstance(name, str):
            raise self._error(path, f"names a part {name!r}: expected a text")
        if "_target_" in config:
            target, known = name, _names().get(name)
        else:
            known = name if name in registry() else None
            target = registry()[name][0] if known else name.replace(":", ".", 1)
        owner = registry()[known][1] if known else target.split(".")[0]
        if owner != "audiot" or known is None:
            if self.trusted is None:
                return None
            self._check_trusted(target, name, owner, path)
        if known is not None and known.rpartition("/")[0] not in _groups_of(path):
            wanted = " or ".join(_groups_of(path)) or "none of the parts"
            raise self._error(path, f"can't be {name}: expected {wanted}")
        return target

    def _check_trusted(self, target: str, name: str, owner: str, path: list[str]) -> None:
        assert self.trusted is not None
        if not any(target == each or target.startswith(f"{each}.") for each in self.trusted):
            if owner == "audiot":
                raise self._error(path, f"names {name}, which this audiot does not have: use the version that wrote it")
            raise self._error(
                path, f"names {name}, which is not audiot's: add {owner} to `trusted` (--trust {owner}) if you trust that package"
            )
        try:
            found = get_object(target)
        except ImportError as error:
            raise self._error(path, f"names {name}, which is not there ({error}): install its package") from error
        # The name alone says little: a trusted module may have imported anything, `os` say.
        home = getattr(found, "__module__", "")
        own = target in self.trusted or any(home == each or home.startswith(f"{each}.") for each in self.trusted)
        if not own or not (inspect.isclass(found) or inspect.isfunction(found)):
            raise self._error(path, f"names {name}, which is no class of {owner}")

    def _error(self, path: list[str], what: str) -> ValueError:
        return ValueError(f"{self.where}: {'.'.join(path) or 'the whole'} {what}")


def _groups_of(path: list[str]) -> tuple[str, ...]:
    """Groups that the part at a place may be of."""
    if not path:
        return ()
    inside = next((key for key in path[-2:-1] if key in COLLECTIONS), None)
    return (inside,) if inside else GROUP_OF.get(path[-1], ())


def make(config: Mapping[str, Any], *arguments: Any, inside: bool = True, **given: Any) -> Any:
    """Build a part of a plain dict.

    Args:
        config: ``_target_`` and parameters. Values are taken as they are: nothing in them is computed.
        arguments: Positional arguments.
        inside: Build the parts inside of it too; else it gets their configs.
        given: More parameters, in place of those of the config.

    Raises:
        ValueError: there is no such parameter.
    """
    options = {name: value for name, value in config.items() if name not in ("_target_", "_convert_", "_partial_")}
    options = ({name: _made(value) for name, value in options.items()} if inside else options) | given
    target, partial = get_object(str(config["_target_"])), bool(config.get("_partial_"))
    name = name_of(str(config["_target_"]))
    try:
        signature = inspect.signature(target)
        (signature.bind_partial if partial else signature.bind)(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    known = parameters(target)
    if known is not None and (unknown := options.keys() - known.keys()):
        raise ValueError(f"{name} has no parameter {min(unknown)!r}; there are {', '.join(sorted(known))}")
    if partial:
        return functools.partial(target, *arguments, **options)
    try:
        return target(*arguments, **options)
    except TypeError as error:  # a value of another type, such as none for a size
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error


def parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """Parameters of a part by name, with those that its class hands on to its base classes; None: it takes any."""
    found: dict[str, inspect.Parameter] = {}
    for owner in inspect.getmro(target) if inspect.isclass(target) else (target,):
        function = owner.__dict__.get("__init__") if inspect.isclass(owner) else owner
        if function is None:
            continue
        own = inspect.signature(function).parameters.values()
        taken = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = {each.name: each for each in own if each.kind in taken and each.name != "self"} | found
        if all(each.kind != each.VAR_KEYWORD for each in own):
            return found
    return None


def _made(value: Any) -> Any:
    if isinstance(value, Mapping):
        return make(value) if "_target_" in value else {name: _made(each) for name, each in value.items()}
    return [_made(each) for each in value] if isinstance(value, list) else value


def foreign(config: Any) -> list[str]:
    """Packages from outside audiot whose parts a config names, in the program or in a file: whom its reader must trust."""
    found: list[str] = []
    if isinstance(config, Mapping):
        name = name_of(str(config["_target_"])) if "_target_" in config else str(config.get("part", ""))
        target, owner = registry().get(name, (name, name.split(":")[0] if ":" in name else "audiot"))
        if owner.split(".")[0] != "audiot":
            found.append(target.replace(":", ".").split(".")[0])
        config = list(config.values())
    for value in config if isinstance(config, (list, tuple)) else ():
        found += foreign(value)
    return list(dict.fromkeys(found))


def check_version(version: Any, where: object) -> None:
    """Refuse a format that this audiot does not read."""
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{where} has format_version {version!r}, this audiot reads 1 to {FORMAT_VERSION}: use the version that wrote it"
        )


def is_plain(text: str) -> bool:
    """Whether a text computes nothing, but for references to other keys."""
    return "${" not in REFERENCE.sub("", text)
