"""Findings as a file: all but the resampled tests, so that the report can be made again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from audiot.base.files import read_json, write_json
from audiot.study.findings import BETTER, BUDGETS, CODE_FIGURES, EQUIVALENT, HEAD_FIGURES, UNKNOWN, Factor, Findings

FORMAT_VERSION = 1


def write_findings(findings: Findings, path: str | Path) -> None:
    """Write findings as JSON, without their resampled tests."""
    write_json(path, {"format_version": FORMAT_VERSION, **_plain(findings)})


def read_findings(path: str | Path) -> Findings:
    """Read what `write_findings` wrote. It is data, whoever made it: nothing in it is computed or run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no findings. One line says where.
    """
    found = read_json(path, "file of findings")
    version = found.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version!r:.60}, this audiot reads {FORMAT_VERSION}")
    try:
        return _built(Findings, found, "")
    except ValueError as error:
        raise ValueError(f"{path} is not a readable file of findings: {error}") from error


def checked(findings: Findings) -> Findings:
    """The findings as they will be read again: checked, and without their resampled tests.

    Raises:
        ValueError: a value has another type than its field, or a name, verdict or budget is unknown.
    """
    return _built(Findings, _plain(findings), "")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value) if each.name != "draws"}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.item() if isinstance(value, np.generic) else value


_types = cache(get_type_hints)


def _built(kind: Any, value: Any, where: str) -> Any:
    """A value of a type, out of plain data. `where` is its place for errors, such as ``settings[3].budget``."""
    if is_dataclass(kind):
        return _object(kind, value, where)
    inner = get_args(kind)
    if isinstance(kind, UnionType):  # of a type and None
        return None if value is None else _built(inner[0], value, where)
    base: Any = get_origin(kind) or kind
    expected: Any = {tuple: list, float: (int, float)}.get(base, base)
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} must be {_NAMES[base]}, found {value!r:.60}")
    if expected is list:
        return tuple(_built(inner[0], each, f"{where}[{place}]") for place, each in enumerate(value))
    if expected is dict:
        return {_built(str, name, where): _built(inner[1], each, f"{where}[{name!r:.60}]") for name, each in value.items()}
    if kind is float:
        return _finite(value, where)
    if kind is str and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where} is no text that UTF-8 can hold: {value!r:.60}")
    return value


_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number", tuple: "a list", dict: "an object"}


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, found {number}")
    return number


def _object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'all'} must be an object, found {value!r:.60}")
    known = {each.name: each for each in fields(kind) if each.name != "draws"}
    if unknown := value.keys() - known.keys():
        raise ValueError(f"{where or 'all'} has the unknown key {min(unknown)!r:.60}")
    for name, each in known.items():
        if name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{where or 'all'} lacks {name}")
    place = f"{where}." if where else ""
    made = kind(**{name: _built(_types(kind)[name], each, place + name) for name, each in value.items()})
    if kind is Findings:
        _check_names(made)
    return made


def _check_names(findings: Findings) -> None:
    measures = [measure.name for measure in findings.measures]
    costs = [cost.name for cost in findings.costs]
    _differ(measures + costs, "measures and costs")
    _differ([(setting.budget, setting.objective, setting.mechanism) for setting in findings.settings], "settings")
    if findings.factor is not None:
        _check_factor(findings.factor)
    for place, setting in enumerate(findings.settings):
        where = f"settings[{place}]"
        _one_of(setting.budget, BUDGETS, f"{where}.budget")
        for key, allowed in (("figures", measures), ("costs", costs), ("comparisons", measures)):
            for name in getattr(setting, key):
                _one_of(name, allowed, f"a name in {where}.{key}")
        for name, comparison in setting.comparisons.items():
            at = f"{where}.comparisons[{name!r}]"
            _one_of(comparison.verdict, (BETTER, EQUIVALENT, UNKNOWN), f"{at}.verdict")
            winners = (setting.mechanism, findings.baseline) if comparison.verdict == BETTER else ("",)
            _one_of(comparison.winner, winners, f"{at}.winner")
    _differ([(each.objective, each.mechanism) for each in findings.learned], "learned")
    for place, learned in enumerate(findings.learned):
        for part, known in (("heads", HEAD_FIGURES), ("untrained", HEAD_FIGURES), ("codes", CODE_FIGURES)):
            for name in getattr(learned, part):
                _one_of(name, known, f"a name in learned[{place}].{part}")
        for picture in learned.pictures:
            if not all(re.fullmatch("[0-9a-f]+", row) and len(row) == len(picture.rows) for row in picture.rows):
                raise ValueError(f"learned[{place}].pictures must be squares of hexadecimal digits")
    for place, similarity in enumerate(findings.similarities):
        size = len(similarity.mechanisms)
        if [len(row) for row in similarity.means] != [size] * size:
            raise ValueError(f"similarities[{place}].means must be a row and a column for each of {size} mechanisms")


def _check_factor(factor: Factor) -> None:
    for name, level in factor.levels.items():
        if level.value <= 0:
            raise ValueError(f"factor.levels[{name!r:.60}].value must be positive, found {level.value}")


def _one_of(value: str, allowed: Iterable[str], where: str) -> None:
    if value not in allowed:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, allowed))}, found {value!r:.60}")


def _differ(names: list[Any], what: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{what} hold {twice!r} twice")
