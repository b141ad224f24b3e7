"""Any tree of audio files, with labels from a path pattern or a table."""

from __future__ import annotations

import ast
import difflib
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Formatter
from typing import Any

from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut, MonoCut, MultiCut
from tqdm import tqdm

from audiot.base.files import name_bytes, name_text
from audiot.base.quoting import argument
from audiot.data.audio import READABLE, UNREADABLE, AudioFile, BadAudioError, find_audio
from audiot.data.corpora.held_out import divide
from audiot.data.manifests import Manifests
from audiot.data.sources import Sources
from audiot.data.text import rows

ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class PathPattern:
    """Pattern of labels in a path: ``{keyword}_{speaker}_{take}`` or ``{speaker}/{chapter}/{utterance}``.

    A field matches one or more characters except ``/``. A pattern without ``/`` is matched against the file name, a pattern with
    ``/`` against the whole path below the root. The suffix is left out in both cases.

    Raises:
        ValueError: the pattern has no fields, a repeated field, or two fields with nothing between them.
    """

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            right = argument("data.pattern", "{keyword}_{take}")
            raise ValueError(f"data.pattern must be quoted text, as in {right}; found {pattern}")
        self.pattern = pattern
        self.fields: list[str] = []
        try:
            parts = list(Formatter().parse(pattern))
        except ValueError as error:
            raise ValueError(f"data.pattern {pattern!r}: {error}") from None
        expression = ""
        for literal, field, spec, conversion in parts:
            expression += re.escape(literal)
            if field is None:
                continue
            if not field.isidentifier() or spec or conversion or field in (*self.fields, "path"):
                raise ValueError(f"data.pattern {pattern!r}: {{{field}}} must be a plain name, used once, other than path")
            if expression.endswith("[^/]+?)"):
                raise ValueError(f"data.pattern {pattern!r}: nothing separates {{{self.fields[-1]}}} and {{{field}}}")
            self.fields.append(field)
            expression += f"(?P<{field}>[^/]+?)"
        if not self.fields:
            raise ValueError(f"data.pattern {pattern!r} has no field such as {{speaker}}")
        self._shortest = re.compile(expression)
        self._longest = re.compile(expression.replace("[^/]+?)", "[^/]+)"))

    def match(self, utterance: str) -> dict[str, str]:
        """Values of the fields in a path.

        Raises:
            BadAudioError: the path does not match, or matches in more than one way.
        """
        text = utterance if "/" in self.pattern else utterance.rsplit("/", 1)[-1]
        shortest, longest = self._shortest.fullmatch(text), self._longest.fullmatch(text)
        if shortest is None or longest is None:
            raise BadAudioError(f"does not match data.pattern: {self.pattern}")
        if shortest.groupdict() != longest.groupdict():
            raise BadAudioError(f"matches data.pattern in more than one way: {self.pattern}")
        return shortest.groupdict()


def read_labels(path: str | Path) -> dict[str, dict[str, str]]:
    """The other columns by ``path``, from a table with a header. A .tsv has tabs between columns, other files have commas.

    Values are stripped. A blank value is empty text, which is not a label.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the column ``path`` or a path is missing, a path is repeated, or `rows` refuses the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data.labels: there is no file {path}")
    labels: dict[str, dict[str, str]] = {}
    for number, row in rows(path, ["path"], "\t" if path.suffix.lower() in {".tsv", ".tab"} else ","):
        if not row["path"]:
            raise ValueError(f"{path}:{number}: nothing in column path")
        name = os.path.normpath(row.pop("path")).replace(os.sep, "/")
        if name in labels:
            raise ValueError(f"{path}:{number}: the path {name} occurs a second time")
        labels[name] = row
    return labels


class SplitExpression:
    """Condition for the utterances of a split: ``take<5``, ``speaker=='jackson' or take>=40``, ``speaker in ('theo', 'lucas')``.

    Names, strings, numbers, comparisons, ``and``, ``or``, ``not`` and ``in`` are allowed, nothing else. A comparison with a
    number compares numbers. Other comparisons compare text, except that ``<`` and similar compare two numeric texts as numbers.

    Args:
        name: Name of the argument for errors, such as ``data.test``.
        text: Text of the expression.
        fields: Field names that it may use.

    Raises:
        ValueError: the expression has something else, or an unknown field.
    """

    def __init__(self, name: str, text: str, fields: Iterable[str]) -> None:
        self.name, self.text, self.fields = name, text, sorted(fields)
        if not isinstance(text, str) or len(text) > 2000:
            raise self._error("it must be text of at most 2000 characters")
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            detail = error.msg if isinstance(error, SyntaxError) else str(error) or type(error).__name__
            raise self._error(detail) from None
        self._check(self.tree)

    def __call__(self, labels: Mapping[str, str]) -> bool:
        """Whether the split takes an utterance with these labels.

        Raises:
            ValueError: a label in a numeric comparison is not a number.
        """
        return self._evaluate(self.tree, labels)

    def _error(self, detail: str) -> ValueError:
        shown = self.text if isinstance(self.text, str) and len(self.text) <= 200 else f"{str(self.text)[:200]}…"
        return ValueError(f"{self.name}: {shown!r} is not a condition on labels, such as take<5 or speaker=='theo': {detail}")

    def _with_values(self) -> str:
        """The argument with quotes around every name that is not a field, because a shell may have removed them."""
        tree = ast.parse(self.text.strip(), mode="eval")
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id not in self.fields]
        for node in names:
            node.id = repr(node.id)
        return argument(self.name, ast.unparse(tree))

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                self._check_value(left)
                for op, right in zip(ops, comparators, strict=True):
                    if isinstance(op, (ast.Is, ast.IsNot)):
                        raise self._error("write == rather than is")
                    if isinstance(op, (ast.In, ast.NotIn)):
                        if not isinstance(right, (ast.Tuple, ast.List, ast.Set)):
                            raise self._error("'in' takes a list such as ('a', 'b')")
                        for item in right.elts:
                            self._check_value(item)
                    else:
                        self._check_value(right)
            case _:
                raise self._error(f"{ast.unparse(node)} is not a comparison")

    def _check_value(self, node: ast.expr) -> None:
        match node:
            case ast.Name(id=field):
                if field not in self.fields:
                    near = difflib.get_close_matches(field, self.fields, n=1)
                    hint = f"did you mean {near[0]}?" if near else f"if it is a value, write {self._with_values()};"
                    raise self._error(f"unknown field {field}: {hint} The fields are {', '.join(self.fields)}")
            case ast.Constant(value=str() | int() | float() as value) if not isinstance(value, bool):
                pass
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(value, bool):
                pass
            case _:
                raise self._error(f"{ast.unparse(node)} is neither a field nor a text nor a number")

    def _evaluate(self, node: ast.expr, labels: Mapping[str, str]) -> bool:
        match node:
            case ast.BoolOp(op=op, values=values):
                some = any if isinstance(op, ast.Or) else all
                return some(self._evaluate(value, labels) for value in values)
            case ast.UnaryOp(operand=operand):
                return not self._evaluate(operand, labels)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                pairs = zip([left, *comparators], ops, comparators, strict=False)
                return all(self._compare(first, op, second, labels) for first, op, second in pairs)
        raise self._error(f"{ast.unparse(node)} is not a comparison")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr, labels: Mapping[str, str]) -> bool:
        if isinstance(right, (ast.Tuple, ast.List, ast.Set)):
            found = any(self._compare(left, ast.Eq(), item, labels) for item in right.elts)
            return found == isinstance(op, ast.In)
        first, second = self._value(left, labels), self._value(right, labels)
        numbers = _number(first), _number(second)
        both = None not in numbers
        if isinstance(op, (ast.Eq, ast.NotEq)):
            texts = isinstance(first, str) and isinstance(second, str)
            equal = first == second if texts else both and numbers[0] == numbers[1]
            return equal == isinstance(op, ast.Eq)
        if both:
            return ORDER[type(op)](*numbers)
        if not isinstance(first, str) or not isinstance(second, str):
            text = first if isinstance(first, str) else second
            where = f" (of {labels['path']})" if "path" in labels else ""
            raise self._error(f"{text!r}{where} is not a number")
        return ORDER[type(op)](first, second)

    def _value(self, node: ast.expr, labels: Mapping[str, str]) -> str | int | float:
        return labels[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)


def _number(value: str | int | float) -> int | float | None:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        return int(value)
    return float(value) if re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*", value) else None


def audio_cut(path: Path, utterance: str, channel: str | int = "average") -> Cut:
    """A whole file as a cut, with its real length.

    Args:
        path: Path of the file.
        utterance: Id of the cut and its recording.
        channel: Channel to keep; ``average`` keeps all, and preparation averages them.

    Raises:
        BadAudioError: the file cannot be used, or has no such channel.
    """
    with AudioFile(path) as file:
        channels, sample_rate, num_samples = list(range(file.channels)), file.sample_rate, file.num_samples
    if channel != "average" and channel not in channels:
        raise BadAudioError(f"no channel {channel}: it has {', '.join(map(str, channels))}")
    source = AudioSource("file", channels, str(path))
    duration = num_samples / sample_rate
    recording = Recording(utterance, [source], sample_rate, num_samples, duration, channel_ids=channels)
    if channel == "average" and len(channels) > 1:
        return MultiCut(utterance, 0.0, duration, channels, recording=recording)
    return MonoCut(utterance, 0.0, duration, 0 if channel == "average" else int(channel), recording=recording)


class FolderCorpus:
    """Any tree of audio files that soundfile reads, in the order of their paths.

    The id of an utterance is its path below the root without suffix. Each label becomes a custom field of the supervision;
    ``speaker`` and ``text`` also become its speaker and text. Names that begin with a dot and prepared folders are skipped. A
    folder that several links lead to is read once. ``test`` takes its utterances first, then ``valid``, then ``train``.

    Args:
        root: Top folder.
        pattern: Pattern of labels in the path, see :class:`PathPattern`.
        labels: Table of labels, see :func:`read_labels`, with paths relative to the root. Files that it lacks are rejected.
        train: Condition for training utterances, see :class:`SplitExpression`; None takes the remaining ones.
        valid: Condition for validation utterances; None takes ``valid_fraction`` of the training utterances. They have other
            speakers if there are enough, see :func:`audiot.data.corpora.held_out.divide`.
        test: Condition for test utterances; None takes as many as for validation.
        valid_fraction: Share of the training utterances to hold out, at least one utterance.
        seed: Seed of the choice of held-out utterances.
        channel: Number of the channel to use, or ``average``.
        extensions: Suffixes of audio files, in any case; None takes all that soundfile reads.
        label: Label that every utterance must have: files without it are rejected. Held-out splits take their share of the files
            of each of its values, but for ``text``, and where they have speakers of their own. None: no label is needed.
        by_speaker: Whether splits are held out by speaker, if there are enough.

    Raises:
        FileNotFoundError: root or labels are missing.
        ValueError: an argument is not as described.
    """

    def __init__(
        self,
        root: str | Path,
        pattern: str | None = None,
        labels: str | Path | None = None,
        train: str | None = None,
        valid: str | None = None,
        test: str | None = None,
        valid_fraction: float = 0.05,
        seed: int = 0,
        channel: str | int = "average",
        extensions: Sequence[str] | None = None,
        label: str | None = None,
        by_speaker: bool = True,
    ) -> None:
        self.root = Path(name_text(root))
        if not os.path.isdir(name_bytes(self.root)):
            raise FileNotFoundError(f"data.root: there is no folder {self.root}")
        if channel != "average" and (not isinstance(channel, int) or channel < 0):
            raise ValueError(f"data.channel must be 'average' or the number of a channel, found {channel!r}")
        self.pattern = PathPattern(pattern) if pattern else None
        self.texts = [Path(labels)] if labels else []
        self.named = {"test": test, "valid": valid, "train": train}  # in the order in which splits take utterances
        self._read_table()
        self.valid_fraction, self.seed, self.channel = valid_fraction, seed, channel
        self.extensions = {text.lower().lstrip(".") for text in extensions} if extensions else {*READABLE, *UNREADABLE}
        self.label, self.by_speaker = label, by_speaker
        if label is not None and label not in self.fields:
            raise ValueError(f"no label {label!r} in data.labels or data.pattern: there are {', '.join(self.fields) or 'none'}")

    def _read_table(self) -> None:
        """Read the table, and the expressions over its columns."""
        self.table = read_labels(self.texts[0]) if self.texts else None
        columns = list(next(iter(self.table.values()), {})) if self.table else []
        fields = self.pattern.fields if self.pattern else []
        if both := set(fields) & set(columns):
            raise ValueError(f"{min(both)} is a field of data.pattern and a column of data.labels: rename one of them")
        self.fields = [*fields, *columns]
        self.splits = {
            role: SplitExpression(f"data.{role}", text, ["path", *self.fields])
            for role, text in self.named.items()
            if text is not None
        }

    def manifests(self, progress: bool = True) -> Manifests:
        """Find the files, read their headers, label and split them.

        Raises:
            FileNotFoundError: there is no audio.
            ValueError: two files differ only in suffix, or a split is empty.
        """
        labels_of, path_of, rejected = self.labelled()

        cuts: dict[str, Cut] = {}
        with ThreadPoolExecutor(16) as pool:  # reading headers mostly waits for disks
            read = pool.map(self._read, path_of, path_of.values())
            bar = tqdm(read, total=len(path_of), desc="read headers", unit="utt", disable=not progress)
            for utterance, found in zip(path_of, bar, strict=True):
                if isinstance(found, BadAudioError):
                    rejected.append((str(path_of[utterance]), str(found)))
                else:
                    cuts[utterance] = _labelled(found, labels_of[utterance])
        rejected.sort()
        if not cuts:  # preparation reports the error
            return Manifests({}, rejected=rejected)
        given = self._split({utterance: labels_of[utterance] for utterance in cuts})
        shared = None if self.label == "text" else self.label
        splits, tasks = divide(given, labels_of, self.valid_fraction, self.seed, shared, self.by_speaker)
        chosen = {split: CutSet.from_cuts(cuts[name] for name in names) for split, names in splits.items()}
        return Manifests(chosen, tasks, rejected)

    def labelled(self) -> tuple[dict[str, dict[str, str]], dict[str, Path], list[tuple[str, str]]]:
        """Labels of each utterance with its ``path`` among them, its file, and the files without labels, each with the reason.

        Raises:
            FileNotFoundError: there is no audio.
            ValueError: two files differ only in suffix.
        """
        self._read_table()  # read again, because it may have been edited
        paths = find_audio(self.root, self.extensions)
        rejected: list[tuple[str, str]] = []
        labels_of: dict[str, dict[str, str]] = {}
        path_of: dict[str, Path] = {}
        suffix_of: dict[str, str] = {}
        for path in paths:
            utterance, dot, suffix = path.rpartition(".")
            if utterance in suffix_of:
                raise ValueError(
                    f"{self.root / path} and {self.root / (utterance + dot + suffix_of[utterance])} differ in their "
                    "suffix only and would be one utterance: move one away, or choose data.extensions"
                )
            suffix_of[utterance] = suffix
            try:
                labels_of[utterance] = self._labels(path, utterance)
                path_of[utterance] = self.root / path
            except BadAudioError as reason:
                rejected.append((str(self.root / path), str(reason)))
        for name in (self.table or {}).keys() - set(paths):
            rejected.append((str(self.root / name), "missing: data.labels lists it"))
        return labels_of, path_of, rejected

    def sources(self) -> Sources:
        """All audio files below the root, and the table."""
        return Sources([os.path.join(self.root, path) for path in find_audio(self.root, self.extensions)], self.texts)

    def _labels(self, path: str, utterance: str) -> dict[str, str]:
        if any("\ud800" <= character <= "\udfff" for character in utterance):  # see `name_text`
            raise BadAudioError("its name is not UTF-8: rename it")
        labels = {field: value.strip() for field, value in self.pattern.match(utterance).items()} if self.pattern else {}
        if self.table is not None:
            if path not in self.table:
                raise BadAudioError("not listed in data.labels")
            labels |= self.table[path]
        if self.label is not None and not labels.get(self.label):
            raise BadAudioError(f"without a label: nothing in {self.label}")
        return labels | {"path": path}

    def _read(self, utterance: str, path: Path) -> Cut | BadAudioError:
        try:
            return audio_cut(path, utterance, self.channel)
        except BadAudioError as error:
            return error

    def _split(self, labels_of: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
        """Utterances by role, for training and the splits that have an expression."""
        names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
        unused = 0
        for utterance, labels in labels_of.items():
            role = next((role for role, takes in self.splits.items() if takes(labels)), None)
            if role is None and "train" not in self.splits:
                role = "train"
            if role is None:
                unused += 1
            else:
                names[role].append(utterance)
        if unused:
            print(f"{unused} of {len(labels_of)} utterances are in no split of {self.root}", flush=True)
        for role in ("train", *self.splits):
            if not names[role]:
                text = f" ({self.splits[role].text})" if role in self.splits else ", the other splits take all"
                raise ValueError(f"no utterance of {self.root} is left for {role}{text}: change data.{role}")
        return {role: found for role, found in names.items() if found}


def _labelled(cut: Cut, labels: Mapping[str, str]) -> Cut:
    """The cut with its labels. A blank label is left out."""
    labels = {name: value for name, value in labels.items() if name != "path" and value}
    cut.supervisions = [
        SupervisionSegment(
            cut.id,
            cut.id,
            0.0,
            cut.duration,
            cut.channel,
            text=labels.get("text"),
            speaker=labels.get("speaker"),
            custom=labels or None,
        )
    ]
    return cut
