"""Every ``key=value`` that the pages name is an override of a command. `test_readme` runs or composes those in blocks."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from test_readme import commands

from audiot.base.groups import groups, key_of, options

REPOSITORY = Path(__file__).parent.parent
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")), *(REPOSITORY / "docs").glob("*.md")]
COMMANDS = [path.stem for path in (REPOSITORY / "conf").glob("*.yaml") if path.stem != "settings"]
GIVEN = ["run_dir=run", "data_dir=data"]
OVERRIDE = re.compile(r"[+~]{0,2}[a-z_][\w./@]*=")
PLACEHOLDER = re.compile("NAME|[A-Z]+|k|")  # a value that stands for others
PLUGINS = ("hydra/launcher", "hydra/sweeper")  # come with audiot[sweep]
OTHERS = {"search=topk", "attention=decay", "objective=loudness"}  # a column of a table, and examples of parts of your own


def shell_words(code):
    """The words of a command as a shell sees them."""
    try:
        return shlex.split(code)
    except ValueError:  # an apostrophe
        return code.split()


def words():
    """Overrides in the pages, each with the first page that has it."""
    found = {word: command.page.name for command in commands() if command.words[0] in COMMANDS for word in command.words[1:]}
    found = {word: page for word, page in found.items() if OVERRIDE.match(word) and word not in OTHERS}
    for page in sorted(PAGES):
        sentences = re.sub("^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", sentences):
            for word in shell_words(code) if "(" not in code else ():
                if OVERRIDE.match(word) and word not in OTHERS:
                    found.setdefault(word, page.name)
    return found


WORDS = words()


@pytest.fixture(autouse=True)
def hydra_started():
    with initialize_config_module("audiot.conf", version_base="1.3"):
        yield
    assert not GlobalHydra.instance().is_initialized()


def keys_in(cfg, above=""):
    """All keys of a config, without resolving any."""
    for name in cfg:
        yield f"{above}{name}"
        if (
            not OmegaConf.is_missing(cfg, name)
            and not OmegaConf.is_interpolation(cfg, name)
            and isinstance(cfg[name], DictConfig)
        ):
            yield from keys_in(cfg[name], f"{above}{name}.")


@cache
def keys_of_command(command):
    return frozenset(keys_in(compose(command, GIVEN)))


@cache
def keys_of_group(group):
    """Keys of the files of a group, those that others are made of among them."""
    files = (REPOSITORY / "conf" / group).glob("*.yaml")
    return frozenset(key for file in files for key in keys_in(OmegaConf.load(file), f"{key_of(group)}."))


def command_with(key):
    """A command that has a key by default."""
    return next((command for command in COMMANDS if key in keys_of_command(command)), None)


def exists(key):
    """Whether a command has the key, by default or with a choice of a group."""
    return bool(command_with(key)) or any(key.startswith(key_of(group)) and key in keys_of_group(group) for group in groups())


@pytest.mark.parametrize("word", WORDS)
def test_an_override_that_a_page_names_exists(word):
    page, (key, value) = WORDS[word], word.split("=", 1)
    if "…" not in value:
        OverridesParser.create().parse_override(word)
    if key.startswith((*PLUGINS, "hydra.")):
        return
    added, key = key.startswith("+"), key.lstrip("+~")
    group, _, package = key.partition("@")
    if group in groups():
        several = value.strip("[]").split(",")
        assert PLACEHOLDER.fullmatch(value) or {*several} <= {*options(group)}, f"{page}: {word}"
        assert not package or exists(package.rpartition(".")[0]), f"{page}: {word}"
        return
    assert added or exists(key), f"{page} names {word}, and no command has the key {key}"


def test_a_key_that_no_command_has_is_noticed():
    assert exists("optimizer.lr")
    assert exists("downstream.objective.margin"), "of one task alone"
    assert not exists("optimizer.learning_rate")
    assert not exists("downstream.margin")
    assert len(WORDS) > 80
