"""The chapter of a study's report on what the encoders have learned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import count
from typing import Any

from audiot.reporting.charts import matrix
from audiot.reporting.elements import breakable, figure, folded, head, many, table
from audiot.study.drawings import Layers, by_layer, curves, small_tables
from audiot.study.figures import Row, intervals
from audiot.study.findings import Estimate, Findings, Learned, Measure, Similarity
from audiot.study.wording import interval, number, unit

HEADS = {
    "distance_s": Measure("distance_s", "Attention distance", False, is_rate=False, unit="s"),
    "diagonality": Measure("diagonality", "Diagonality", True, is_rate=False, unit=""),
    "entropy_share": Measure("entropy_share", "Entropy", False),
}
LOSS = Measure("loss", "Validation loss", False, is_rate=False, unit="")
MOVED = Measure("moved", "Moved", False)
CODES = {
    "targets/pnmi": Measure("targets/pnmi", "PNMI of the targets", True),
    "predicted/pnmi": Measure("predicted/pnmi", "PNMI of what is predicted", True),
    "targets/phone_purity": Measure("targets/phone_purity", "Phone purity of the targets", True),
    "predicted/phone_purity": Measure("predicted/phone_purity", "Phone purity of what is predicted", True),
}
QUARTERS = (0, 0.25, 0.5, 0.75, 1)


def chapter(findings: Findings) -> str:
    """The chapter as HTML; empty where nothing was measured."""
    if not findings.learned:
        return ""
    groups: dict[str, list[Learned]] = {}
    for learned in findings.learned:
        groups.setdefault(learned.objective, []).append(learned)
    ids = count(1)
    intro = (
        "Measured of the encoders of equal steps on a few validation utterances, the same for all: means over heads, then over "
        "seeds, with 95% intervals of a bootstrap over seeds. Nothing here was tested for significance."
    )
    return f'<p class="key">{intro}</p>' + "".join(
        f"<h3>{heading}</h3><p class='key'>{key}</p>{content}"
        for heading, key, content in (
            ("Attention by layer", _HEADS_KEY, _heads(groups, ids)),
            ("Similarity of layers", _CKA_KEY, _similar(findings.similarities, findings.baseline, ids)),
            ("Heads removed", _PRUNING_KEY, _pruned(groups, findings.baseline, ids)),
            ("How far tables moved", _MOVED_KEY, _moved(groups, ids)),
            ("Learned tables", _TABLES_KEY, _tables(groups, ids)),
            ("Codes and phones", _CODES_KEY, _codes(groups, ids)),
        )
        if content
    )


_HEADS_KEY = (
    "Numbers are layers, at the mean over their heads. Rings are the same layers untrained. Distance: how far away is what a "
    "frame attends to. Diagonality is −Σ|q − k|·A[q, k] / T² (Yang, Liu and Lee 2020): 0 on the diagonal, about −0.33 where "
    "attention is spread evenly. Entropy is that of a row, as a share of an even spread. Mechanisms without weights are left out."
)
_CKA_KEY = (
    "Linear CKA (Kornblith et al. 2019) of the states of the same frames: 1 where they differ by a rotation and a factor. The "
    "diagonal has runs of two seeds of one mechanism, the rest runs of one seed of two mechanisms, in the mean. Two mechanisms "
    "that are as similar as the diagonal differ no more than seeds do."
)
_PRUNING_KEY = (
    "Validation loss of the objective without more and more heads, in the order of the loss without each alone (Michel et al. "
    "2019). Nothing is trained again. Grey: the baseline. Bands: 95% intervals."
)
_MOVED_KEY = (
    "Numbers are layers. Moved is the total variation between the rows of a table now and when it began: 0% where nothing moved, "
    "100% where no weight is left where it was. A head survives if half of its mass is still there, that is, at 50% or less."
)
_TABLES_KEY = (
    "Tables of the first seed for a sequence of the median length, the same for every utterance. A row attends, a column is "
    "attended to. Darkness is the square root of a weight, by each table's own scale."
)
_CODES_KEY = (
    "How much the objective's codes say of the phone that is spoken: PNMI, the share of the phones' entropy, and phone purity "
    "(Hsu et al. 2021). Targets are the codes of all frames, predictions those of the hidden ones. With many codes and few "
    "frames both are too high, for all settings alike."
)


def _names(learned: Learned) -> str:
    return f'<th scope="row">{breakable(learned.mechanism)}</th><th scope="row">{breakable(learned.objective)}</th>'


def _name_heads() -> list[str]:
    return [head("Mechanism"), head("Objective")]


def _shown(estimate: Estimate | None, measure: Measure) -> str:
    """The cell of an estimate."""
    if estimate is None:
        return '<td data-value="">–</td>'
    between = interval(estimate, measure)
    value = f'<data value="{estimate.mean!r}">{number(estimate.mean, measure)}</data>'
    return f'<td data-value="{estimate.mean!r}">{value}{f" <small>({between})</small>" if between else ""}</td>'


def _plain(value: float, form: str) -> str:
    return f'<td data-value="{value!r}">{value:{form}}</td>'


def _measured(measure: Measure) -> str:
    return f"{measure.title}, {unit(measure)}".rstrip(", ")


def _by_objective(parts: Iterable[tuple[str, str]]) -> str:
    return "".join(f"<h4>{escape(objective)}</h4>{content}" for objective, content in parts if content)


def _heads(groups: dict[str, list[Learned]], ids: Any) -> str:
    parts = []
    for objective, group in groups.items():
        shown = [learned for learned in group if learned.heads]
        figures = ""
        for name, measure in HEADS.items():
            lines = [
                Layers(each.mechanism, _scaled(each.heads[name], measure), _scaled(each.untrained.get(name, ()), measure))
                for each in shown
                if name in each.heads
            ]
            if lines:
                words = "; ".join(
                    f"{each.mechanism} {', '.join(number(layer.mean, measure) for layer in each.heads[name])}"
                    for each in shown
                    if name in each.heads
                )
                texts = f"{measure.title} by layer, {objective}", f"{_measured(measure)}, from the first layer on: {words}."
                figures += figure(by_layer(lines, _measured(measure), f"layers{next(ids)}", texts), f"{measure.title}.")
        parts.append((objective, f"<div class='figures'>{figures}</div>" if figures else ""))
    rows = [
        f'{_names(each)}<td data-value="{layer + 1}">{layer + 1}</td>'
        + "".join(_shown(_at(found.get(name), layer), HEADS[name]) for name in HEADS for found in (each.heads, each.untrained))
        for group in groups.values()
        for each in group
        for layer in range(max((len(layers) for layers in each.heads.values()), default=0))
    ]
    if not rows:
        return ""
    heads = [head(measure.title, note) for measure in HEADS.values() for note in (unit(measure), "untrained")]
    caption = "Attention of every layer"
    return _by_objective(parts) + folded(caption, table(caption, [*_name_heads(), head("Layer"), *heads], rows))


def _at(layers: Sequence[Estimate] | None, layer: int) -> Estimate | None:
    return layers[layer] if layers is not None and layer < len(layers) else None


def _scaled(estimates: Sequence[Estimate], measure: Measure) -> list[Estimate]:
    """Estimates in the unit that is shown."""
    factor = 100 if measure.is_rate else 1

    def times(value: float | None) -> float | None:
        return None if value is None else factor * value

    return [Estimate(factor * each.mean, times(each.low), times(each.high), ()) for each in estimates]


def _similar(similarities: Sequence[Similarity], baseline: str, ids: Any) -> str:
    by_objective: dict[str, list[Similarity]] = {}
    for similarity in similarities:
        if any(value is not None for row in similarity.means for value in row):
            by_objective.setdefault(similarity.objective, []).append(similarity)
    parts = []
    for objective, layers in by_objective.items():
        figures = tables = ""
        for each in layers:
            heading = f"CKA of layer {each.layer}, {objective}"
            reference = each.means[each.mechanisms.index(baseline)] if baseline in each.mechanisms else ()
            beside = "; ".join(
                f"{name} {value:.2f}" for name, value in zip(each.mechanisms, reference, strict=False) if value is not None
            )
            texts = heading, f"With {baseline}: {beside or 'none of 0 pairs'}. The table has all values."
            figures += figure(matrix(each.mechanisms, each.means, f"cka{next(ids)}", texts), f"Layer {each.layer}.")
            rows = [
                f'<th scope="row">{breakable(name)}</th>'
                + "".join('<td data-value="">–</td>' if value is None else _plain(value, ".3f") for value in line)
                for name, line in zip(each.mechanisms, each.means, strict=True)
            ]
            tables += table(heading, [head("Mechanism"), *map(head, each.mechanisms)], rows)
        parts.append((objective, f"<div class='figures'>{figures}</div>{folded(f'CKA of every layer, {objective}', tables)}"))
    return _by_objective(parts)


def _pruned(groups: dict[str, list[Learned]], baseline: str, ids: Any) -> str:
    parts, rows = [], []
    for objective, group in groups.items():
        shown = [each for each in group if len(each.removed) > 1]
        if not shown:
            continue
        names = [each.mechanism for each in shown]
        words = "; ".join(
            f"{each.mechanism} {', '.join(number(_share(each.removed, share).mean, LOSS) for share in QUARTERS)}"
            for each in shown
        )
        texts = (
            f"Loss without heads, {objective}",
            f"Loss with all heads and without a quarter, half, three quarters and all of them: {words}.",
        )
        reference = names.index(baseline) if baseline in names else None
        panels = [(each.mechanism, each.removed) for each in shown]
        svg = curves(panels, reference, "validation loss", f"pruned{next(ids)}", texts)
        parts.append((objective, f"<div class='figures'>{figure(svg, 'Loss without heads.')}</div>"))
        for each in shown:
            rows.append(
                f'{_names(each)}<td data-value="{len(each.removed) - 1}">{len(each.removed) - 1}</td>'
                + "".join(_shown(_share(each.removed, share), LOSS) for share in QUARTERS)
            )
    if not rows:
        return ""
    caption = "Loss without heads"
    heads = [head("Heads"), *(head("Loss", f"without {share:.0%}" if share else "with all") for share in QUARTERS)]
    return _by_objective(parts) + folded(caption, table(caption, [*_name_heads(), *heads], rows))


def _share(removed: Sequence[Estimate], share: float) -> Estimate:
    """The loss without a share of the heads, rounded down to a whole number of them."""
    return removed[int(share * (len(removed) - 1))]


def _moved(groups: dict[str, list[Learned]], ids: Any) -> str:
    parts, rows = [], []
    for objective, group in groups.items():
        figures = ""
        for each in (each for each in group if each.moved):
            patterns: dict[str, list[Estimate]] = {}
            for one in sorted(each.moved, key=lambda one: one.layer):
                patterns.setdefault(one.pattern or "no pattern", []).append(one.moved)
            lines = [Layers(pattern, _scaled(layers, MOVED), ()) for pattern, layers in patterns.items()]
            alive, of = sum(one.survivors for one in each.moved), sum(one.heads for one in each.moved)
            far = max(each.moved, key=lambda one: one.moved.mean)
            text = (
                f"{alive} of {of} heads survive. Farthest moved {far.pattern or 'heads without a pattern'} in layer "
                f"{far.layer}: {number(far.moved.mean, MOVED)}%. The table has all values."
            )
            title = f"How far the tables of {each.mechanism} moved, {objective}"
            svg = by_layer(lines, _measured(MOVED), f"moved{next(ids)}", (title, text))
            figures += figure(svg, f"{each.mechanism}: {alive} of {many(of, 'head')} survive.")
            for one in each.moved:
                rows.append(
                    f'{_names(each)}<td class="text">{escape(one.pattern) or "none"}</td>'
                    f'<td data-value="{one.layer}">{one.layer}</td>'
                    f"{_shown(one.moved, MOVED)}{_plain(one.entropy_before, '.2f')}{_plain(one.entropy_after, '.2f')}"
                    f'<td data-value="{one.survivors / one.heads!r}">{one.survivors} of {one.heads}</td>'
                )
        parts.append((objective, f"<div class='figures'>{figures}</div>" if figures else ""))
    if not rows:
        return ""
    caption = "Heads of tables and what became of them"
    heads = [head("Pattern"), head("Layer"), head("Moved", "%"), head("Entropy before", "nats"), head("Entropy after", "nats")]
    return _by_objective(parts) + folded(caption, table(caption, [*_name_heads(), *heads, head("Survive")], rows))


def _tables(groups: dict[str, list[Learned]], ids: Any) -> str:
    parts = []
    for objective, group in groups.items():
        figures = ""
        for each in (each for each in group if each.pictures):
            layers = len({picture.layer for picture in each.pictures}) - 1
            size = len(each.pictures[0].rows)
            title = f"Tables of {each.mechanism}, {objective}"
            text = f"An untrained table and those of {many(layers, 'layer')}, each drawn in {size} by {size} cells."
            svg = small_tables(each.pictures, f"tables{next(ids)}", (title, text))
            figures += folded(title, figure(svg, f"{title}, first seed."))
        parts.append((objective, figures))
    return _by_objective(parts)


def _codes(groups: dict[str, list[Learned]], ids: Any) -> str:
    shown = [each for group in groups.values() for each in group if each.codes]
    if not shown:
        return ""
    figures = ""
    for name in ("targets/pnmi", "predicted/pnmi"):
        measure = CODES[name]
        lines = [Row(each.mechanism, each.objective, each.codes[name]) for each in shown if name in each.codes]
        words = "; ".join(f"{line.name} {line.group} {number(line.estimate.mean, measure)}%" for line in lines)
        texts = f"{measure.title}", f"By setting: {words or 'none of 0'}."
        if lines:
            figures += figure(intervals(lines, _measured(measure), 100, f"codes{next(ids)}", texts), f"{measure.title}.")
    rows = [_names(each) + "".join(_shown(each.codes.get(name), measure) for name, measure in CODES.items()) for each in shown]
    caption = "Codes and phones"
    heads = [head(measure.title, unit(measure), "descending") for measure in CODES.values()]
    return f"<div class='figures'>{figures}</div>" + folded(caption, table(caption, [*_name_heads(), *heads], rows))
