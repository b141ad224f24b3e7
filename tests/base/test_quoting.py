"""Printed commands run as intended, whatever characters a path has."""

import random
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from some import some
from test_cli import run

from audiot.base import quoting
from audiot.data.corpora.folder import SplitExpression

NASTY = [
    "outputs/lr=1e-3",
    "my run",
    " both ends ",
    "a,b",
    "[x]",
    "(x)",
    "f(x)",
    "{x}",
    "a: b",
    "it's",
    'say "x"',
    "'quoted'",
    "back\\slash",
    "end\\",
    "\\",
    "#1",
    "~/x",
    "$HOME",
    "$(ls)",
    "`ls`",
    "${x}",
    "a\\${x}\\",
    "100%",
    "!x",
    "*?",
    "a;b&c|d<e>f",
    "-x",
    "été/中文",
    "tab\there",
    "",
    "12",
    "1.5",
    "null",
    "True",
    "nan",
    "1,2",
]
CHARACTERS = "=,[](){}'\"\\#~$%!*?:;&|<> é\ta1/-._@+`^"


def texts():
    source = random.Random(0)
    return NASTY + ["".join(source.choices(CHARACTERS, k=source.randint(1, 9))) for _ in range(200)]


def composed(text):
    (word,) = shlex.split(text)
    with initialize_config_module("audiot.conf", version_base="1.3"):
        return compose("finetune", [word]).upstream.path


def test_a_shell_and_hydra_give_back_the_value_of_an_argument():
    parser = OverridesParser.create()
    for text in texts():
        (word,) = shlex.split(quoting.argument("upstream.path", text))
        (found,) = parser.parse_overrides([word])
        assert not found.is_sweep_override()
        assert isinstance(found.value(), str)
        if "${" not in text:  # which has one more backslash, for OmegaConf to take off
            assert found.value() == text


@pytest.mark.parametrize("text", some(NASTY, NASTY[::3]))
def test_a_config_holds_the_value_of_an_argument(text):
    assert composed(quoting.argument("upstream.path", text)) == text


def test_what_needs_no_quotes_gets_none():
    assert quoting.argument("upstream.path", Path("outputs/2026-11-26_15-21-31/encoder")) == (
        "upstream.path=outputs/2026-11-26_15-21-31/encoder"
    )
    assert quoting.argument("upstream.path", "my run") == "'upstream.path=my run'"
    assert quoting.argument("data.pattern", "{keyword}_{take}") == """'data.pattern="{keyword}_{take}"'"""
    assert quoting.argument("data.test", "speaker=='x'") == r'''"data.test=\"speaker=='x'\""'''


@pytest.mark.parametrize(
    ("mistake", "right"),
    [
        ("data.pattern={keyword}_{take}", """'data.pattern="{keyword}_{take}"'"""),
        ("data.pattern={speaker}", """'data.pattern="{speaker}"'"""),
        ("data.pattern={a:b}", """as in 'data.pattern="{keyword}_{take}"'"""),
        ("data.test=take<5", """'data.test="take<5"'"""),
        ("data.test=speaker==theo", r'''"data.test=\"speaker=='theo'\""'''),
        ("data.test=take==5 and speaker!=theo", quoting.argument("data.test", "take==5 and speaker!='theo'")),
        ("data.channel=a=b", """'data.channel="a=b"'"""),
        ("data.channel=a,b", """a text with a comma: 'data.channel="a,b"'"""),
        ('data.test="take<5', """'data.test="take<5"'"""),
    ],
)
def test_a_quoting_mistake_is_answered_with_the_right_quoting(tmp_path, mistake, right):
    (tmp_path / "a.wav").touch()
    error = run("pretrain", "data=folder", f"data.root={tmp_path}", f"data_dir={tmp_path}", mistake).err
    assert error.count("\n") == 1
    assert right in error


def test_a_name_that_is_no_field_is_quoted_as_the_value_that_it_may_be():
    with pytest.raises(ValueError, match="unknown field a") as refused:
        SplitExpression("data.test", "speaker in (a, b) and take<5", ["speaker", "take"])
    command = str(refused.value).split("write ")[1].split("; The fields")[0]
    (word,) = shlex.split(command)
    assert quoting.parsed(word) == "speaker in ('a', 'b') and take < 5"


@pytest.mark.parametrize("value", [None, True, False, 3, -1.5, 1e-5, ["a", "b c", "d,e", 1, None], []])
def test_other_values_keep_their_type(value):
    (word,) = shlex.split(quoting.argument("key", value))
    (found,) = OverridesParser.create().parse_overrides([word])
    assert found.value() == value
    assert type(found.value()) is type(value)


def test_a_value_is_read_without_its_quotes():
    assert quoting.parsed('hydra.run.dir="outputs/lr=1e-3"') == "outputs/lr=1e-3"
    assert quoting.parsed("hydra.run.dir=outputs/a") == "outputs/a"
    assert quoting.parsed("key=a=b") is None
    assert quoting.parsed("key=1,2") is None


def test_a_path_is_one_word_and_no_option():
    for text in NASTY:
        (word,) = shlex.split(quoting.path(text))
        assert word == ("./-x" if text == "-x" else text)
