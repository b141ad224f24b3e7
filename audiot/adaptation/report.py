"""The report of an adaptation: one page for readers, and its tables as CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import count
from pathlib import Path
from typing import Any

from audiot.adaptation.labelled import SPEAKERS, TRANSCRIPTION
from audiot.adaptation.outcome import LABEL, PREDICTION, Curves, Figure, Outcome
from audiot.adaptation.sounds import clip
from audiot.base.files import write_csv, write_text
from audiot.data.prepare import ROLES
from audiot.reporting.charts import matrix, over_steps
from audiot.reporting.document import commands, document
from audiot.reporting.elements import breakable, figure, folded, head, many, table
from audiot.runs import ERRORS
from audiot.study.figures import Row, intervals
from audiot.study.findings import Estimate

PAGE, RESULTS, WRONG = "report.html", "results.csv", "errors.csv"
TITLES = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "wer": "Word error rate",
    "cer": "Character error rate",
}
NAMES = {"train": "training", "valid": "validation", "test": "test"}
MOST_IN_MATRIX = 30  # labels
MOST_LISTED = 500  # rows of a table of files
SHOWN = 40  # labels in a table that is open
CONFUSED = 20  # pairs of labels


def write_report(outcome: Outcome, folder: Path, clips: int, clip_s: float) -> list[Path]:
    """Write ``report.html``, ``results.csv`` and ``errors.csv``; their paths.

    Args:
        outcome: What came of it.
        folder: Folder of the run.
        clips: Number of sounds in the page, at most.
        clip_s: Seconds of each of them.
    """
    paths = [folder / name for name in (PAGE, RESULTS, WRONG)]
    write_text(paths[0], page(outcome, clips, clip_s))
    write_csv(paths[1], result_rows(outcome))
    names = ("utterance", LABEL, PREDICTION, "errors" if outcome.survey.found.task == TRANSCRIPTION else "score")
    wrong = [
        dict(zip(names, (row["utterance"], row[LABEL], row[PREDICTION], row["score"]), strict=True)) for row in outcome.wrong
    ]
    write_csv(paths[2], wrong)
    return paths


def result_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """A row for each figure of each model."""
    return [
        {"model": tested.title, "figure": name, "value": each.value, "low": each.low, "high": each.high}
        for tested in outcome.tested
        for name, each in tested.figures.items()
    ]


def page(outcome: Outcome, clips: int, clip_s: float) -> str:
    """The report as HTML. Arguments are those of `write_report`."""
    sections = {
        "results": ("Results", _results(outcome)),
        "data": ("Data", _data(outcome)),
        "left-out": ("Files left out", _left_out(outcome)),
        "choices": ("Choices", _choices(outcome)),
        "training": ("Training", _training(outcome)),
        "confusions": ("Confusions", _confusions(outcome)),
        "errors": ("Errors to listen to", _errors(outcome, clips, clip_s)),
        "use": ("How to use the model", _use(outcome)),
        "made": ("How it was made", _made(outcome)),
    }
    seen = outcome.survey
    facts = [many(sum(seen.counts.values()), "file"), f"{sum(seen.hours.values()):.2f} h of audio"]
    if seen.found.task != TRANSCRIPTION:
        facts.append(many(len(seen.all_labels), "label"))
    facts.append(f'<a href="#left-out">{many(len(seen.reasons), "file")} left out</a>' if seen.reasons else "no file left out")
    return document(outcome.title, sentences(outcome), " · ".join(facts), sections, has_sound=True)


def percent(value: float) -> str:
    """A share in per cent, with one digit."""
    return f"{100 * value:.1f}"


def bracket(each: Figure, signed: bool = False) -> str:
    """The interval of a figure in brackets; empty where there is none."""
    if each.low is None or each.high is None:
        return ""
    if signed:
        return f"({100 * each.low:+.1f} to {100 * each.high:+.1f})".replace("-", "−")
    return f"({percent(each.low)}–{percent(each.high)})"


def title_of(name: str) -> str:
    """What a figure is called."""
    return TITLES.get(name, name.replace("_", " "))


def sentences(outcome: Outcome) -> list[str]:
    """What a reader should know first."""
    model, *others = outcome.tested
    monitor, seen = outcome.monitor, outcome.survey
    each = model.figures[monitor]
    ends = f" (95% interval {bracket(each)[1:-1]})" if bracket(each) else ""
    files = many(seen.counts["test"], "test file")
    found = [f"{title_of(monitor)} {percent(each.value)}%{ends} on {files} that training never heard."]
    if others:
        told = "; ".join(f"{other.title}: {percent(other.figures[monitor].value)}%" for other in others)
        found.append(f"To compare with, {told}.")
    if outcome.difference is not None and outcome.difference.low is not None and outcome.difference.high is not None:
        low, high = sorted((outcome.difference.low, outcome.difference.high))
        far = f"the difference is {100 * outcome.difference.value:+.1f} points".replace("-", "−")
        worse = outcome.difference.value < 0 if monitor not in ERRORS else outcome.difference.value > 0
        word = "worse" if worse else "better"
        tells = f"it is {word} than features" if low > 0 or high < 0 else "it can't be told apart from features"
        found.append(f"On resampled tests {tells}: {far} {bracket(outcome.difference, True)}.")
    if seen.found.task == SPEAKERS:
        found.append("The speakers of the test are those of training: it says nothing of others.")
    elif seen.new_speakers:
        found.append(f"No speaker of the test is in training ({many(len(seen.speakers['test']), 'test speaker')}).")
    elif seen.speakers["test"]:
        found.append("Speakers of the test are in training too: other speakers may be harder.")
    else:
        found.append("Speakers are not known: those of the test may be in training too, and others may be harder.")
    return found


def _results(outcome: Outcome) -> str:
    names = list(dict.fromkeys(name for tested in outcome.tested for name in tested.figures))
    heads = [
        head("Model"),
        *(head(title_of(name), _unit(name), "ascending" if name in ERRORS else "descending") for name in names),
    ]
    rows = [
        f'<th scope="row">{escape(tested.title)}</th>' + "".join(_cell(tested.figures.get(name)) for name in names)
        for tested in outcome.tested
    ]
    why = outcome.tested[0].why
    how = f" of the bootstrap: {escape(why)}" if why else ""
    key = f'<p class="key">On the {many(outcome.survey.counts["test"], "test file")}. In brackets are 95% intervals{how}.</p>'
    monitor = outcome.monitor
    drawn = [(tested, tested.figures[monitor]) for tested in outcome.tested if monitor in tested.figures]
    lines = [
        Row(tested.title, "", Estimate(each.value, each.low, each.high, ()), "=" if place == 0 else "")
        for place, (tested, each) in enumerate(drawn)
    ]
    told = "; ".join(f"{tested.title} {percent(each.value)}% {bracket(each)}".rstrip() for tested, each in drawn)
    label = f"{title_of(monitor)}, %"
    svg = intervals(lines, label, 100, "scores", (f"{title_of(monitor)} of the model and of baselines", f"{told}."))
    shown = figure(svg, "A mark is the figure of the test, a line its 95% interval.")
    return f"{key}{table('Figures of the test', heads, rows)}<div class='figures'>{shown}</div>"


def _unit(name: str) -> str:
    return "%, ↓ lower is better" if name in ERRORS else "%, ↑ higher is better"


def _cell(each: Figure | None) -> str:
    if each is None:
        return '<td data-value="">–</td>'
    between = bracket(each)
    small = f" <small>{between}</small>" if between else ""
    return f'<td data-value="{each.value!r}"><data value="{each.value!r}">{percent(each.value)}</data>{small}</td>'


def _number(value: float, shown: str = "") -> str:
    return f'<td data-value="{value!r}">{shown or f"{value:,}"}</td>'


def _data(outcome: Outcome) -> str:
    seen = outcome.survey
    heads = [head("Split"), head("Files"), head("Hours")]
    if known := any(seen.speakers.values()):
        heads.append(head("Speakers"))
    if of_labels := seen.found.task != TRANSCRIPTION:
        heads.append(head("Labels"))
    rows = []
    for role in ROLES:
        cells = [_number(seen.counts[role]), _number(round(seen.hours[role], 4), f"{seen.hours[role]:.3g}")]
        if known:
            cells.append(_number(len(seen.speakers[role])))
        if of_labels:
            cells.append(_number(len(seen.labels[role])))
        rows.append(f'<th scope="row">{NAMES[role]}</th>{"".join(cells)}')
    parts = [table("Splits", heads, rows)]
    if of_labels:
        label = seen.found.label
        heads = [head(label), *(head(NAMES[role], "files") for role in ROLES)]
        listed = [
            f'<th scope="row">{breakable(value)}</th>' + "".join(_number(seen.labels[role][value]) for role in ROLES)
            for value in seen.all_labels
        ]
        caption = f"Files of each {label}"
        parts.append(folded(f"{caption}: {many(len(listed), 'label')}", table(caption, heads, listed), len(listed) <= SHOWN))
    return "".join(parts)


def _left_out(outcome: Outcome) -> str:
    seen = outcome.survey
    if not seen.reasons:
        return ""
    kinds = [f'<th scope="row">{escape(kind)}</th>{_number(amount)}' for kind, amount in seen.rejected.items()]
    files = [f'<th scope="row">{breakable(path)}</th><td class="text">{escape(why)}</td>' for path, why in seen.reasons]
    shown = f"{many(len(files), 'file')}" + (f", the first {MOST_LISTED}" if len(files) > MOST_LISTED else "")
    listed = table("Files that are left out", [head("File"), head("Reason")], files[:MOST_LISTED])
    all_of_them = f'<p class="key">All of them: <code>{escape(seen.report)}</code></p>'
    return table("Reasons", [head("Reason"), head("Files")], kinds) + folded(shown, listed + all_of_them)


def _choices(outcome: Outcome) -> str:
    rows = []
    for line in outcome.chosen:
        setting, _, why = line.partition(": ")
        if setting == "pre-training":
            setting, _, why = why.partition(": ")
            setting = f"pre-training: {setting}"
        name = breakable(setting).replace(".", ".<wbr>").replace("=", "=<wbr>")
        rows.append(f'<th scope="row"><code>{name}</code></th><td class="text">{escape(why)}</td>')
    key = '<p class="key">What the size of the data has chosen. Each can be given on the command line instead.</p>'
    return key + table("Settings that were chosen", [head("Setting"), head("Reason")], rows, "plain") if rows else ""


def _training(outcome: Outcome) -> str:
    ids = count(1)
    parts = []
    for curves in outcome.curves:
        figures = "".join(_curve(curves, name, lines, f"curve{next(ids)}") for name, lines in _lines(curves).items())
        if figures:
            parts.append(f"<h3>{escape(curves.title)}</h3><div class='figures'>{figures}</div>")
    return "".join(parts)


def _lines(curves: Curves) -> dict[str, Mapping[str, Sequence[tuple[float, float]]]]:
    """The figures of a training: what each shows → its lines."""
    found: dict[str, Mapping[str, Sequence[tuple[float, float]]]] = {}
    if curves.losses:
        found["loss"] = curves.losses
    if any(curves.scores.values()):
        name = f"{title_of(curves.score)}, %"
        found[name] = {line: [(step, 100 * value) for step, value in points] for line, points in curves.scores.items()}
    return found


def _curve(curves: Curves, name: str, lines: Mapping[str, Sequence[tuple[float, float]]], prefix: str) -> str:
    is_score = name != "loss"
    ends = "; ".join(f"{line} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for line, points in lines.items())
    steps = max(step for points in lines.values() for step, _ in points)
    title = f"{curves.title}: {name} over steps"
    svg = over_steps(lines, name, prefix, (title, f"{ends}, at step {steps:.0f}."), curves.chosen if is_score else None)
    kept = f" The dotted line is the best, at step {curves.chosen:.0f}: this model is kept." if is_score and curves.chosen else ""
    return figure(svg, f"{name[0].upper()}{name[1:]}: {ends}.{kept}")


def _confusions(outcome: Outcome) -> str:
    if outcome.survey.found.task == TRANSCRIPTION:
        return ""
    pairs = outcome.confusions()
    true: Counter[str] = Counter()
    said: Counter[str] = Counter()
    for (label, prediction), amount in pairs.items():
        true[label] += amount
        said[prediction] += amount
    names = sorted({*true, *said})
    parts = []
    if len(names) <= MOST_IN_MATRIX:
        values = [[pairs[row, column] / true[row] if pairs[row, column] else None for column in names] for row in names]
        most = ", ".join(f"{label} taken for {other} {amount}×" for (label, other), amount in _confused(pairs)[:3])
        text = f"Each row is a label, and says how its test files are divided among predictions. {most or 'None is confused'}."
        svg = matrix(names, values, "confusions", ("Confusions of labels", text), least=0.0)
        shown = figure(svg, "Rows are true, columns predicted: shares of the files of a row.")
        parts.append(f"<div class='figures'>{shown}</div>")
    heads = [head("Label"), head("Files"), head("Right"), head("Recall", "%", "descending"), head("Precision", "%", "descending")]
    rows = [
        f'<th scope="row">{breakable(name)}</th>{_number(true[name])}{_number(pairs[name, name])}'
        + _share(pairs[name, name], true[name])
        + _share(pairs[name, name], said[name])
        for name in names
    ]
    caption = "Test files of each label"
    parts.append(folded(caption, table(caption, heads, rows), len(rows) <= SHOWN))
    if confused := _confused(pairs):
        listed = [
            f'<th scope="row">{breakable(label)}</th><th scope="row">{breakable(other)}</th>{_number(amount)}'
            for (label, other), amount in confused[:CONFUSED]
        ]
        parts.append(table("Labels that are confused most", [head("True"), head("Predicted"), head("Files")], listed))
    return "".join(parts)


def _confused(pairs: Counter[tuple[str, str]]) -> list[tuple[tuple[str, str], int]]:
    """Different labels that were confused, the most frequent first."""
    return sorted(((pair, amount) for pair, amount in pairs.items() if pair[0] != pair[1]), key=lambda each: (-each[1], each[0]))


def _share(part: int, whole: int) -> str:
    return '<td data-value="">–</td>' if whole == 0 else _number(part / whole, percent(part / whole))


def _errors(outcome: Outcome, clips: int, clip_s: float) -> str:
    wrong = outcome.wrong
    if not wrong:
        return "<p>No test file is wrong.</p>"
    if not clips:
        return ""
    transcribes = outcome.survey.found.task == TRANSCRIPTION
    words = (head(name, is_text=True) for name in ("Sound", "True", "Predicted"))
    heads = [head("File"), *words, head("Errors" if transcribes else "Score")]
    rows = []
    for row in wrong[:clips]:
        name = row["utterance"]
        score = _number(row["score"], f"{row['score']:.0f}" if transcribes else f"{row['score']:.2f}")
        rows.append(
            f'<th scope="row">{breakable(name)}</th><td>{_sound(outcome.survey.audio.get(name), name, clip_s)}</td>'
            f'<td class="text">{breakable(row[LABEL])}</td><td class="text">{breakable(row[PREDICTION])}</td>{score}'
        )
    order = "those with most errors first" if transcribes else "the surest first; a score is the probability that the model gave"
    cut = f"Sounds end after {clip_s:g} s. "
    of_all = f"{len(rows)} of {len(wrong)}" if len(rows) < len(wrong) else f"All {len(wrong)}"
    key = f'<p class="key">{of_all} test files that are wrong, {order}. {cut}All are in <code>{WRONG}</code>.</p>'
    return key + table("Wrong test files", heads, rows, "plain")


def _sound(path: str | None, name: str, seconds: float) -> str:
    """A player, or why there is none."""
    if path is None:
        return "not in the corpus"
    try:
        uri = clip(Path(path), seconds)
    except OSError:
        return "can't be read"
    return f'<audio controls preload="none" src="{uri}" aria-label="{escape(name)}"></audio>'


def _use(outcome: Outcome) -> str:
    return "".join(f"<h3>{escape(what)}</h3>{commands(lines, what)}" for what, lines in outcome.commands.items())


def _made(outcome: Outcome) -> str:
    rows = [f'<th scope="row">{escape(name)}</th><td class="text">{escape(value)}</td>' for name, value in outcome.facts.items()]
    return table("Command, time, versions", [head("What"), head("Value")], rows, "plain")
