"""The page of a study's report: one file that needs no network, for eyes, keyboards, screen readers and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import count
from urllib.parse import quote

from audiot.reporting.charts import short
from audiot.reporting.document import commands, document
from audiot.reporting.elements import breakable, figure, folded, head, many, table
from audiot.study.chapter import chapter
from audiot.study.figures import OBJECTIVE_MARKERS, Curve, Point, Row, curves, intervals, pareto
from audiot.study.findings import BETTER, EQUIVALENT, UNKNOWN, Comparison, Estimate, Factor, Findings, Measure, Setting
from audiot.study.front import on_front
from audiot.study.wording import (
    BUDGETS,
    DOWN,
    EQUAL,
    OPEN,
    UP,
    best,
    direction,
    interval,
    margin,
    number,
    probability,
    scale,
    sign,
    unit,
    verdict,
)

MOST_LISTED = 20  # unfinished runs that are shown at once
CLASSES = {UP: "up", DOWN: "down", EQUAL: "even", OPEN: "open"}
WORDS = {
    BETTER: "The difference in pairs of one seed is too large to be chance: its p value, corrected by Holm for many comparisons, "
    "is below the level that the methods say, and its interval excludes zero. The winner is named. "
    f"{UP} stands beside a setting that is better than the baseline, {DOWN} beside one that the baseline beats.",
    EQUIVALENT: "The difference is smaller than the margin, either way: both one-sided tests (TOST) say so, corrected by Holm, "
    f"and the interval lies within the margin. The sign is {EQUAL}.",
    UNKNOWN: f"Neither holds. The study is too small to tell, which is no sign that both are alike. The sign is {OPEN}.",
    "95% interval": "The means that agree with what was measured: those outside would make it unlikely. Brackets hold its ends.",
    "on the front": "No other setting is at least as good and at least as cheap, and better in one of both.",
}


def page(findings: Findings) -> str:
    """The report as HTML. Equal findings give equal text."""
    sections = {
        "results": ("Results", _results(findings)),
        "factor": _factor(findings),
        "controls": ("Controls", _controls(findings)),
        "differences": (f"Differences to {findings.baseline}", _differences(findings)),
        "costs": ("Costs", _costs(findings)),
        "fronts": ("Quality against cost", _fronts(findings)),
        "learned": ("What is learned", chapter(findings)),
        "unfinished": ("Unfinished runs", _unfinished(findings)),
        "methods": ("Methods", "".join(f"<p>{escape(paragraph)}</p>" for paragraph in findings.methods)),
        "repeat": ("Commands to repeat", commands(findings.commands)),
        "environment": ("Environment", _environment(findings)),
        "words": ("Words", "<dl>" + "".join(f"<dt>{escape(word)}</dt><dd>{text}</dd>" for word, text in WORDS.items()) + "</dl>"),
    }
    rehearsal = (
        f'<p class="rehearsal" role="note"><strong>Rehearsal: nothing may be concluded.</strong> {escape(findings.rehearsal)}</p>'
        if findings.rehearsal
        else ""
    )
    return document(findings.title, findings.summary, _facts(findings), sections, rehearsal)


def _facts(findings: Findings) -> str:
    settings = [setting for setting in findings.settings if not setting.is_control]
    seeds = {sample.seed for setting in settings for estimate in setting.figures.values() for sample in estimate.samples}
    facts = [
        many(len({setting.mechanism for setting in settings}), "mechanism"),
        *_objectives(settings, findings.factor),
        many(len(seeds), "seed"),
        many(len(findings.measures), "measure"),
        f"baseline {escape(findings.baseline)}",
    ]
    if findings.unfinished:
        facts.append(f'<a href="#unfinished">{many(len(findings.unfinished), "unfinished run")}</a>')
    return " · ".join(facts)


def _objectives(settings: Sequence[Setting], factor: Factor | None) -> list[str]:
    """How many objectives there are, and levels of the factor."""
    names = {setting.objective for setting in settings}
    if factor is None:
        return [many(len(names), "objective")]
    levels = [factor.levels[name] for name in names if name in factor.levels]
    values = len({level.value for level in levels})
    return [many(len({level.objective for level in levels}), "objective"), f"{many(values, 'level')} of {escape(factor.title)}"]


def _budgets(findings: Findings) -> dict[str, list[Setting]]:
    """Settings that are trained, by budget."""
    found: dict[str, list[Setting]] = {}
    for setting in findings.settings:
        if not setting.is_control:
            found.setdefault(setting.budget, []).append(setting)
    return found


def _results(findings: Findings) -> str:
    key = (
        "Means over seeds with their 95% intervals in brackets. The best mean of a column is bold. Below stands the verdict "
        f"against {escape(findings.baseline)} under the same objective: {UP} better, {DOWN} the baseline is better, "
        f"{EQUAL} equivalent, {OPEN} can't be told (<a href='#words'>what the words mean</a>). "
        "A number opens the values of its seeds, which link to their runs. A column's name sorts."
    )
    tables = "".join(
        f"<h3>{BUDGETS[budget]}</h3>"
        + _figure_table(f"Quality of each setting, {BUDGETS[budget].lower()}", settings, findings.measures, findings)
        for budget, settings in _budgets(findings).items()
    )
    return f'<p class="key">{key}</p>{tables}' if tables else ""


def _factor(findings: Findings) -> tuple[str, str]:
    """Heading and content of the section on the factor: every measure over its levels, and the differences there."""
    factor = findings.factor
    if factor is None:
        return "", ""
    key = (
        f"Every measure at each level, and the difference to {escape(findings.baseline)} there: where the differences change "
        "with the level, what the factor does depends on the mechanism. Upright lines are 95% intervals, the shaded band is the "
        "margin of equivalence. Curves stand a little apart, so that none covers another."
    )
    ids = count(1)
    parts = [f'<p class="key">{key}</p>']
    for measure in findings.measures:
        shown = []
        for budget, settings in _budgets(findings).items():
            for objective in dict.fromkeys(level.objective for level in factor.levels.values()):
                rated = [each for each in settings if each.objective in factor.levels and measure.name in each.figures]
                rated = [each for each in rated if factor.levels[each.objective].objective == objective]
                if rated:
                    shown.append(_over_levels(measure, objective, budget, rated, factor, findings, f"levels{next(ids)}"))
        if shown:
            notes = ", ".join(filter(None, (unit(measure), direction(measure))))
            parts.append(f"<h3>{escape(measure.title)} <small>{escape(notes)}</small></h3>{''.join(shown)}")
    return factor.title, "".join(parts) if parts[1:] else ""


def _over_levels(
    measure: Measure,
    objective: str,
    budget: str,
    settings: Sequence[Setting],
    factor: Factor,
    findings: Findings,
    prefix: str,
) -> str:
    """A measure under an objective over the levels of a factor: values, differences to the baseline, and a table of these."""
    where = f"{objective}, {BUDGETS[budget].lower()}"
    levels = {setting.objective: factor.levels[setting.objective].value for setting in settings}
    own: dict[str, dict[float, Setting]] = {}
    for setting in settings:
        own.setdefault(setting.mechanism, {})[levels[setting.objective]] = setting
    values, differences = [], []
    for look, (name, rows) in enumerate(own.items()):
        values.append(Curve(name, look, tuple((level, at.figures[measure.name]) for level, at in rows.items())))
        compared = {level: at.comparisons[measure.name] for level, at in rows.items() if measure.name in at.comparisons}
        if compared:
            differences.append(Curve(name, look, tuple((level, each.difference) for level, each in compared.items())))

    def words(lines: Sequence[Curve], signed: bool) -> str:
        told = (
            ", ".join(f"{number(each.mean, measure, signed)} at {level:g} {factor.unit}" for level, each in line.points)
            for line in lines
        )
        return "; ".join(f"{line.name} {each}" for line, each in zip(lines, told, strict=True)) + "."

    axis = short(f"{factor.title}, {factor.unit}", 44)
    title = f"{measure.title} over {factor.title}, {where}"
    label = f"{short(measure.title, 30)}, {unit(measure)}".rstrip(", ")
    svg = curves(values, (axis, label), scale(measure), f"{prefix}-values", (title, words(values, False)))
    figures, below = figure(svg, "Values."), ""
    if differences:
        title = f"{measure.title}: differences to {findings.baseline} over {factor.title}, {where}"
        label = f"difference, {unit(measure, difference=True)}".rstrip(", ")
        texts = title, words(differences, True)
        drawn = curves(differences, (axis, label), scale(measure), f"{prefix}-differences", texts, measure.margin, zero=True)
        figures += figure(drawn, "Paired differences.")
        heads = [*_names_heads(), *(head(f"{level:g} {factor.unit}") for level in levels.values())]
        cells = (
            f'<th scope="row">{breakable(line.name)}</th><th scope="row">{breakable(objective)}</th>'
            + "".join(_level_cell(own[line.name].get(level), measure) for level in levels.values())
            for line in differences
        )
        below = folded(title, table(title, heads, cells), is_open=True)
    return f"<h4>{escape(where)}</h4><div class='figures'>{figures}</div>{below}"


def _level_cell(setting: Setting | None, measure: Measure) -> str:
    """The difference to the baseline at a level."""
    if setting is None or measure.name not in setting.comparisons:
        return '<td data-value="">–</td>'
    comparison = setting.comparisons[measure.name]
    mean, between = comparison.difference.mean, interval(comparison.difference, measure, signed=True)
    value = f'<data value="{mean!r}">{number(mean, measure, signed=True)}</data>'
    return f'<td data-value="{mean!r}">{value} <small>({between or "–"})</small> {_verdict(setting, comparison)}</td>'


def _controls(findings: Findings) -> str:
    controls = [setting for setting in findings.settings if setting.is_control]
    untrained = [setting for setting in controls if not setting.objective]
    tables = [("Controls without pre-training", untrained)]
    for budget, words in BUDGETS.items():
        trained = [setting for setting in controls if setting.objective and setting.budget == budget]
        tables.append((f"Controls, {words.lower()}", trained))
    return "".join(_figure_table(caption, settings, findings.measures, findings) for caption, settings in tables)


def _costs(findings: Findings) -> str:
    return "".join(
        f"<h3>{BUDGETS[budget]}</h3>"
        + _figure_table(f"Costs of each setting, {BUDGETS[budget].lower()}", settings, findings.costs, findings, True)
        for budget, settings in _budgets(findings).items()
    )


def _figure_table(
    caption: str, settings: Sequence[Setting], measures: Sequence[Measure], findings: Findings, with_rates: bool = False
) -> str:
    """Settings in rows, measures or costs in columns. `with_rates` adds the learning rates. Empty without settings."""
    if not settings or not measures:
        return ""
    bests = {measure.name: best(measure, (_estimate(setting, measure) for setting in settings)) for measure in measures}
    heads = [*_names_heads(), *(_measure_head(measure) for measure in measures)]
    if with_rates:
        heads.append(head("Learning rate", "which validation chose"))
    rows = []
    for setting in settings:
        cells = [_cell(setting, measure, bests[measure.name]) for measure in measures]
        if with_rates:
            rate = setting.learning_rate
            cells.append('<td data-value="">–</td>' if rate is None else f'<td data-value="{rate!r}">{rate:g}</td>')
        rows.append(_names(setting, findings) + "".join(cells))
    return table(caption, heads, rows)


def _names_heads() -> list[str]:
    return [head("Mechanism"), head("Objective")]


def _measure_head(measure: Measure) -> str:
    bound = margin(measure)
    notes = (unit(measure), direction(measure), bound and f"margin {bound}")
    return head(measure.title, ", ".join(filter(None, notes)), "descending" if measure.higher_is_better else "ascending")


def _names(setting: Setting, findings: Findings) -> str:
    """The header cells of a row."""
    is_baseline = setting.mechanism == findings.baseline and not setting.is_control
    mark = " <small>baseline</small>" if is_baseline else ""
    return (
        f'<th scope="row">{breakable(setting.mechanism)}{mark}</th><th scope="row">{breakable(setting.objective) or "none"}</th>'
    )


def _estimate(setting: Setting, measure: Measure) -> Estimate | None:
    return setting.figures.get(measure.name) or setting.costs.get(measure.name)


def _cell(setting: Setting, measure: Measure, best_mean: str | None) -> str:
    if not (estimate := _estimate(setting, measure)):
        return '<td data-value="">–</td>'
    shown, between = number(estimate.mean, measure), interval(estimate, measure)
    value = f'<data value="{estimate.mean!r}">{shown}</data>'
    if shown == best_mean:
        value = f'<strong>{value}<span class="unseen"> best</span></strong>'
    parts = [_runs(value, estimate, measure), f"<small>({between})</small>" if between else ""]
    if comparison := setting.comparisons.get(measure.name):
        parts.append(_verdict(setting, comparison))
    return f'<td data-value="{estimate.mean!r}">{" ".join(filter(None, parts))}</td>'


def _runs(value: str, estimate: Estimate, measure: Measure, signed: bool = False) -> str:
    """A number that opens the values of its seeds, each with a link to its run."""
    items = "".join(
        f"<li>{_link(f'seed {sample.seed}', sample.run)} {number(sample.value, measure, signed)}</li>"
        for sample in estimate.samples
    )
    return f"<details><summary>{value}</summary><ul>{items}</ul></details>" if items else value


def _link(text: str, run: str) -> str:
    """A link to a run below the study's folder. A path that may lead elsewhere is shown as text, without a link."""
    if not run:
        return escape(text)
    if run.startswith("/") or ".." in run.split("/") or any(each in run for each in ":\\") or not run.isprintable():
        return f"{escape(text)} <code>{escape(run)}</code>"
    return f'<a href="{quote(run)}">{escape(text)}</a>'


def _verdict(setting: Setting, comparison: Comparison) -> str:
    mark = sign(setting, comparison)
    return f'<span class="verdict {CLASSES[mark]}"><span aria-hidden="true">{mark}</span> {escape(verdict(comparison))}</span>'


def _difference_words(setting: Setting, comparison: Comparison, measure: Measure) -> str:
    difference = comparison.difference
    between = interval(difference, measure, signed=True)
    shown = f"{number(difference.mean, measure, signed=True)} {unit(measure, difference=True)}".strip()
    return f"{setting.mechanism} {shown}{f' ({between})' if between else ''}, {verdict(comparison)}"


def _differences(findings: Findings) -> str:
    """For each measure the values and the differences to the baseline, as figures and as tables."""
    key = (
        "First the values, then the paired differences to the baseline under the same objective. A filled mark is a mean, a line "
        "its 95% interval, a ring one seed. The shaded band is the margin of equivalence; right of zero the value is higher. "
        "Marks of differences: ▲ better than the baseline, ▼ the baseline is better, ■ equivalent, ● can't be told."
    )
    ids = count(1)
    parts = [f'<p class="key">{key}</p>']
    for measure in findings.measures:
        bound = margin(measure)
        notes = ", ".join(filter(None, (unit(measure), direction(measure), bound and f"margin {bound}")))
        parts.append(f"<h3>{escape(measure.title)} <small>{escape(notes)}</small></h3>")
        for budget, settings in _budgets(findings).items():
            figures = _value_figure(measure, budget, settings, f"values{next(ids)}")
            compared = [
                (setting, setting.comparisons[measure.name]) for setting in settings if measure.name in setting.comparisons
            ]
            if compared:
                figures += _forest(measure, budget, compared, findings, f"forest{next(ids)}")
            parts.append(f"<h4>{BUDGETS[budget]}</h4><div class='figures'>{figures}</div>")
            if compared:
                caption = f"{measure.title}, {BUDGETS[budget].lower()}: differences to {findings.baseline}"
                parts.append(folded(caption, _difference_table(caption, measure, compared, findings)))
    return "".join(parts) if findings.measures else ""


def _value_figure(measure: Measure, budget: str, settings: Sequence[Setting], prefix: str) -> str:
    shown = [(setting, setting.figures[measure.name]) for setting in settings if measure.name in setting.figures]
    if not shown:
        return ""
    ordered = sorted(shown, key=lambda each: each[1].mean, reverse=measure.higher_is_better)

    def words(each: tuple[Setting, Estimate]) -> str:
        setting, estimate = each
        return (
            f"{setting.mechanism} {setting.objective}".strip()
            + f" with {number(estimate.mean, measure)} {unit(measure)}".rstrip()
        )

    title = f"{measure.title} of every setting, {BUDGETS[budget].lower()}"
    text = f"Best is {words(ordered[0])}, last is {words(ordered[-1])}. The table of results has all values."
    rows = [Row(setting.mechanism, setting.objective, estimate) for setting, estimate in shown]
    label = f"{short(measure.title, 44)}, {unit(measure)}".rstrip(", ")
    svg = intervals(rows, label, scale(measure), prefix, (title, text))
    return figure(svg, f"Values by seed. Best: {words(ordered[0])}.")


def _forest(
    measure: Measure, budget: str, compared: Sequence[tuple[Setting, Comparison]], findings: Findings, prefix: str
) -> str:
    verdicts = [comparison.verdict for _, comparison in compared]
    tally = ", ".join(f"{verdicts.count(word)} {word}" for word in (BETTER, EQUIVALENT, UNKNOWN))
    groups = dict.fromkeys(setting.objective for setting, _ in compared)
    text = " ".join(
        f"{group}: {'; '.join(_difference_words(*each, measure) for each in compared if each[0].objective == group)}."
        for group in groups
    )
    title = f"{measure.title}: differences to {findings.baseline}, {BUDGETS[budget].lower()}"
    label = f"difference to the baseline, {unit(measure, difference=True)}".rstrip(", ")
    rows = [Row(setting.mechanism, setting.objective, each.difference, sign(setting, each)) for setting, each in compared]
    svg = intervals(rows, label, scale(measure), prefix, (title, text), measure.margin, zero=True)
    return figure(svg, f"Paired differences: {tally}.")


def _difference_table(caption: str, measure: Measure, compared: Sequence[tuple[Setting, Comparison]], findings: Findings) -> str:
    heads = [
        *_names_heads(),
        head("Difference", unit(measure, difference=True)),
        head("95% interval"),
        head("p different", "Holm"),
        head("p equivalent", "TOST, Holm"),
        head("Verdict"),
    ]
    rows = []
    for setting, comparison in compared:
        mean, low = comparison.difference.mean, comparison.difference.low
        between = interval(comparison.difference, measure, signed=True)
        value = f'<data value="{mean!r}">{number(mean, measure, signed=True)}</data>'
        chances = (
            f'<td data-value="{"" if p is None else repr(p)}">{escape(probability(p))}</td>'
            for p in (comparison.p_different, comparison.p_equivalent)
        )
        runs = _runs(value, comparison.difference, measure, signed=True)
        rows.append(
            f'{_names(setting, findings)}<td data-value="{mean!r}">{runs}</td>'
            f'<td data-value="{"" if low is None else repr(low)}">{between or "–"}</td>{"".join(chances)}'
            f"<td>{_verdict(setting, comparison)}</td>"
        )
    return table(caption, heads, rows)


def _fronts(findings: Findings) -> str:
    """For each budget and measure: quality against every cost, as figures and as a table."""
    groups = list(dict.fromkeys(setting.objective for settings in _budgets(findings).values() for setting in settings))
    names = list(OBJECTIVE_MARKERS)
    markers = {group: names[place % len(names)] for place, group in enumerate(groups)}
    shapes = ", ".join(f"{OBJECTIVE_MARKERS[marker]}s {escape(group)}" for group, marker in markers.items())
    key = (
        "Filled and named settings are on the front: no other is at least as good and at least as cheap. "
        f"Numbers are those of the table below each group. Shapes are objectives: {shapes}. ↑ and ↓ say which way is better."
    )
    ids = count(1)
    parts = []
    for budget, settings in _budgets(findings).items():
        groups_of_figures = []
        for place, measure in enumerate(findings.measures):
            rated = [setting for setting in settings if measure.name in setting.figures]
            fronts = {cost: on_front(rated, measure, cost) for cost in findings.costs if _differs(cost, rated)}
            figures = "".join(
                _front_figure(measure, cost, rated, front, budget, markers, f"front{next(ids)}")
                for cost, front in fronts.items()
                if front
            )
            if figures:
                caption = f"{measure.title} against costs, {BUDGETS[budget].lower()}"
                table = _front_table(caption, measure, rated, fronts, findings)
                groups_of_figures.append(folded(measure.title, f"<div class='figures'>{figures}</div>{table}", place == 0))
        if groups_of_figures:
            parts.append(f"<h3>{BUDGETS[budget]}</h3>{''.join(groups_of_figures)}")
    return f'<p class="key">{key}</p>{"".join(parts)}' if parts else ""


def _differs(cost: Measure, settings: Sequence[Setting]) -> bool:
    """Whether a cost tells settings apart. One that none has is left out too."""
    return len({setting.costs[cost.name].mean for setting in settings if cost.name in setting.costs}) > 1


def _front_figure(
    measure: Measure,
    cost: Measure,
    settings: Sequence[Setting],
    front: set[int],
    budget: str,
    markers: dict[str, str],
    prefix: str,
) -> str:
    points = [
        Point(
            place + 1,
            setting.mechanism,
            setting.objective,
            scale(cost) * setting.costs[cost.name].mean,
            scale(measure) * setting.figures[measure.name].mean,
            place in front,
        )
        for place, setting in enumerate(settings)
        if cost.name in setting.costs
    ]
    named = [
        f"{settings[place].mechanism} {settings[place].objective} "
        f"({number(settings[place].figures[measure.name].mean, measure)} {unit(measure)} at "
        f"{number(settings[place].costs[cost.name].mean, cost)} {unit(cost)})".replace(" )", ")")
        for place in sorted(front, key=lambda place: settings[place].costs[cost.name].mean)
    ]
    title = f"{measure.title} against {cost.title}, {BUDGETS[budget].lower()}"
    text = f"On the front, from the cheapest: {'; '.join(named)}."
    labels = tuple(f"{short(each.title, 44)}, {unit(each)}".rstrip(", ") + f" {direction(each)[0]}" for each in (cost, measure))
    svg = pareto(points, (labels[0], labels[1]), prefix, (title, text), markers)
    return figure(svg, f"{cost.title}: {len(front)} of {len(points)} on the front.")


def _front_table(
    caption: str, measure: Measure, settings: Sequence[Setting], fronts: dict[Measure, set[int]], findings: Findings
) -> str:
    heads = [*_names_heads(), head("No."), _measure_head(measure), *map(_measure_head, fronts)]
    rows = []
    for place, setting in enumerate(settings):
        cells = [_names(setting, findings), f'<td data-value="{place + 1}">{place + 1}</td>']
        mean = setting.figures[measure.name].mean
        cells.append(f'<td data-value="{mean!r}">{number(mean, measure)}</td>')
        for cost, front in fronts.items():
            if estimate := setting.costs.get(cost.name):
                mark = '<span class="verdict even">on the front</span>' if place in front else ""
                cells.append(f'<td data-value="{estimate.mean!r}">{number(estimate.mean, cost)} {mark}</td>')
            else:
                cells.append('<td data-value="">–</td>')
        rows.append("".join(cells))
    return table(caption, heads, rows)


def _unfinished(findings: Findings) -> str:
    rows = [
        f'<th scope="row">{escape(run)}</th><td class="text">{escape(reason)}</td>' for run, reason in findings.unfinished.items()
    ]
    caption = "Runs that failed or are missing"
    listed = table(caption, (head("Run"), head("Reason")), rows, "plain") if rows else ""
    return folded(f"{caption}: {len(rows)}", listed) if len(rows) > MOST_LISTED else listed


def _environment(findings: Findings) -> str:
    rows = [
        f'<th scope="row">{escape(name)}</th><td class="text">{escape(value)}</td>'
        for name, value in findings.environment.items()
    ]
    return table("Versions and machine", (head("Name"), head("Value")), rows, "plain") if rows else ""
