"""Tables of a study for other programs: CSV with every number, LaTeX with the main ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from audiot.study.findings import BETTER, EQUIVALENT, Estimate, Findings, Measure, Setting
from audiot.study.wording import best, direction, interval, number, unit


def result_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """One row for each setting, budget and measure or cost. Rates are shares, not per cent."""
    for setting, measure, estimate in _figures(findings):
        comparison = setting.comparisons.get(measure.name)
        difference = comparison.difference if comparison else None
        yield {
            **_names(setting),
            "is_control": setting.is_control,
            "learning_rate": setting.learning_rate,
            "measure": measure.name,
            "mean": estimate.mean,
            "low": estimate.low,
            "high": estimate.high,
            "difference": difference and difference.mean,
            "difference_low": difference and difference.low,
            "difference_high": difference and difference.high,
            "p_different": comparison and comparison.p_different,
            "p_equivalent": comparison and comparison.p_equivalent,
            "verdict": comparison and comparison.verdict,
            "winner": comparison and _cell(comparison.winner),
            "seed_values": ";".join(f"{sample.seed}={sample.value!r}" for sample in estimate.samples),
            **_level(setting, findings),
        }


def run_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """One row for each figure of each run. Rates are shares, not per cent."""
    for setting, measure, estimate in _figures(findings):
        for sample in estimate.samples:
            yield {
                **_names(setting),
                "seed": sample.seed,
                "measure": measure.name,
                "value": sample.value,
                "run": _cell(sample.run),
                **_level(setting, findings),
            }


def _figures(findings: Findings) -> Iterator[tuple[Setting, Measure, Estimate]]:
    for setting in findings.settings:
        for measure in (*findings.measures, *findings.costs):
            if estimate := setting.figures.get(measure.name) or setting.costs.get(measure.name):
                yield setting, measure, estimate


def _names(setting: Setting) -> dict[str, str]:
    return {
        "objective": _cell(setting.objective),
        "mechanism": _cell(setting.mechanism),
        "budget": setting.budget,
    }


def _level(setting: Setting, findings: Findings) -> dict[str, float | None]:
    """The level of the factor, where there is one."""
    if findings.factor is None:
        return {}
    level = findings.factor.levels.get(setting.objective)
    return {"level": None if level is None else level.value}


def _cell(text: str) -> str:
    """Text for a cell. A spreadsheet would run what begins like a formula; an apostrophe makes it text."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") and text else text


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "−": "$-$",
    "–": "--",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    **{character: f"\\{character}" for character in "_%&#${}"},
    **{character: f"{{{character}}}" for character in "[]*-`"},  # options of the line before, and ligatures
}


def latex(text: str) -> str:
    """Text that LaTeX prints as it stands, in one line."""
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()) if character.isprintable())


def latex_table(findings: Findings) -> str:
    """The main figures as LaTeX tables with rules of the package booktabs, one table for each budget."""
    budgets = dict.fromkeys(setting.budget for setting in findings.settings if not setting.is_control)
    return "% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n" + "\n".join(
        _latex_table(findings, budget) for budget in budgets
    )


def _latex_table(findings: Findings, budget: str) -> str:
    settings = [setting for setting in findings.settings if setting.budget == budget and not setting.is_control]
    bests = {measure.name: best(measure, (row.figures.get(measure.name) for row in settings)) for measure in findings.measures}
    heads = [f"{measure.title} ({unit(measure)}) {direction(measure)[0]}".replace(" ()", "") for measure in findings.measures]
    signs = (
        f"Mean of seeds with its 95% interval, trained with equal {budget}. Bold: best mean of the column. "
        f"Against {findings.baseline} in pairs of one seed: "
    )
    caption = f"{latex(findings.title)}. {latex(signs)} $^+$ better, $^-$ the baseline is better, $^\\approx$ equivalent."
    if findings.rehearsal:
        caption = rf"\textbf{{Rehearsal: {latex(findings.rehearsal)}}} {caption}"
    lines = [
        r"\begin{table*}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{caption}}}",
        rf"\label{{tab:study-{budget}}}",
        rf"\begin{{tabular}}{{ll{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(map(latex, ("Objective", "Mechanism", *heads))) + r" \\",
        r"\midrule",
    ]
    for setting in settings:
        cells = [_latex_cell(setting, measure, bests[measure.name]) for measure in findings.measures]
        lines.append(" & ".join((latex(setting.objective), latex(setting.mechanism), *cells)) + r" \\")
    return "\n".join((*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""))


def _latex_cell(setting: Setting, measure: Measure, best_mean: str | None) -> str:
    if not (estimate := setting.figures.get(measure.name)):
        return "--"
    shown, between = number(estimate.mean, measure), interval(estimate, measure)
    text = rf"\textbf{{{latex(shown)}}}" if shown == best_mean else latex(shown)
    if comparison := setting.comparisons.get(measure.name):
        above = {EQUIVALENT: r"\approx", BETTER: "+" if comparison.winner == setting.mechanism else "-"}
        text += f"$^{{{above[comparison.verdict]}}}$" if comparison.verdict in above else ""
    return text + (rf" {{\scriptsize({latex(between)})}}" if between else "")
