"""The report of a study: what it shows is what was found, and names from strangers stay text."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import re
import warnings
from collections import Counter
from itertools import pairwise

import pytest
from example_findings import MECHANISMS, example
from pages import HOSTILE, Page, table_of

from audiot.study.findings import Estimate, Factor, Findings, Level, Measure, Setting
from audiot.study.front import on_front
from audiot.study.page import _link
from audiot.study.report import write_report
from audiot.study.saved import read_findings
from audiot.study.tables import latex
from audiot.study.wording import best, interval, number, verdict


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Findings and the folder of their report."""
    folder = tmp_path_factory.mktemp("report")
    findings = example()
    assert {path.name for path in write_report(findings, folder)} == {path.name for path in folder.iterdir()}
    return findings, folder


@pytest.fixture(scope="module")
def page(written):
    return Page((written[1] / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report whose mechanisms have names of strangers, and its folder."""
    folder = tmp_path_factory.mktemp("hostile")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        findings = example(HOSTILE, rehearsal="<b>Only</b> a try.")
        steps = tuple(setting for setting in findings.settings if setting.budget == "steps")
        write_report(dataclasses.replace(findings, settings=steps), folder)
    return folder


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_page_has_one_title_landmarks_and_headings_in_order(page):
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("nav")) == 1
    levels = [int(each["tag"][1]) for each in page.elements if re.fullmatch(r"h[1-6]", each["tag"])]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert page.all("html")[0]["attributes"]["lang"] == "en"


def test_ids_are_unique_and_references_within_the_page_lead_somewhere(page):
    ids = Counter(each["attributes"]["id"] for each in page.elements if "id" in each["attributes"])
    assert set(ids.values()) == {1}
    text = [value for each in page.elements for value in each["attributes"].values() if value]
    inner = {value[1:] for value in text if value.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", " ".join(text)))
    inner |= {name for each in page.elements for name in each["attributes"].get("aria-labelledby", "").split()}
    assert inner <= ids.keys()


def test_every_table_has_a_caption_and_scoped_headers(page):
    assert len(page.all("table")) > 10
    for table in page.all("table"):
        assert page.all("caption", table)[0]["text"]
        columns = [each for each in page.all("th", table) if "thead" in each["inside"]]
        assert {each["attributes"]["scope"] for each in columns} == {"col"}
        rows = [each for each in page.all("tr", table) if "tbody" in each["inside"]]
        assert rows
        for row in rows:
            assert page.all("th", row)[0]["attributes"]["scope"] == "row"
            assert len(page.all("th", row)) + len(page.all("td", row)) == len(columns)


def test_every_figure_says_its_numbers_in_words(written, page):
    findings, _ = written
    figures = page.all("svg")
    compared = 2 * (2 * 5 + 5 * 4)  # budgets × (values and differences by measure, and measures by costs)
    assert len(figures) == compared + 3 + 2 + 1 + 2 + 2  # heads, layers, pruning, tables moved and drawn, codes
    for svg in figures:
        assert svg["attributes"]["role"] == "img"
        assert page.all("title", svg)[0]["text"]
        assert re.search(r"\d", page.all("desc", svg)[0]["text"])
    setting, measure = findings.settings[1], findings.measures[0]
    comparison = setting.comparisons[measure.name]
    mean, between = 100 * comparison.difference.mean, interval(comparison.difference, measure, signed=True)
    words = f"{setting.mechanism} {mean:+.1f} points ({between}), {verdict(comparison)}"
    found = [svg for svg in figures if words in svg["text"]]
    assert len(found) == 1


@pytest.fixture(scope="module")
def with_factor(tmp_path_factory):
    """Findings of one objective at two levels of depth, those of the example's two objectives, and their report."""
    findings, folder = example(), tmp_path_factory.mktemp("factor")
    name = findings.measures[0].name
    settings = tuple(
        dataclasses.replace(
            each,
            figures={name: each.figures[name]},
            comparisons={key: each.comparisons[key] for key in [name] if each.comparisons},
            costs={},
        )
        for each in findings.settings
        if each.budget == "steps"
    )
    levels = {"mockingjay": Level("codes", 3.0), "clusters_visible": Level("codes", 12.0)}
    factor = Factor("Depth", "layers", ("model.num_layers={level}",), levels)
    findings = dataclasses.replace(findings, measures=findings.measures[:1], costs=(), settings=settings, factor=factor)
    write_report(findings, folder)
    return findings, folder, Page((folder / "report.html").read_text(encoding="utf-8"))


def test_a_factor_has_a_section_with_a_curve_for_each_mechanism_and_its_differences_at_each_level(with_factor):
    findings, _, page = with_factor
    assert "1 objective · 2 levels of Depth" in page.all("header")[0]["text"]
    section = next(each for each in page.all("section") if each["attributes"]["id"] == "factor")
    assert page.all("h2", section)[0]["text"] == "Depth"
    figures = page.all("svg", section)
    assert len(figures) == 2  # values and differences
    for svg in figures:
        drawn = {each["text"].strip() for each in page.all("text", svg)}
        assert {"3", "12", "Depth, layers", *MECHANISMS[1:]} <= drawn
        assert re.search(r"\d", page.all("desc", svg)[0]["text"])
    measure, rival = findings.measures[0], MECHANISMS[2]
    at = {each.objective: each for each in findings.settings if (each.budget, each.mechanism) == ("steps", rival)}
    means = [at[name].comparisons[measure.name].difference.mean for name in findings.factor.levels]
    low, high = (f"{100 * mean:+.1f}".replace("-", "−") for mean in means)
    title = f"{measure.title}: differences to query_key over Depth, codes, equal steps"
    (svg,) = (each for each in figures if page.all("title", each)[0]["text"] == title)
    assert f"{rival} {low} at 3 layers, {high} at 12 layers" in page.all("desc", svg)[0]["text"]
    table = next(each for each in page.all("table", section) if each["text"].startswith(title))
    row = next(each for each in page.all("tr", table) if each["text"].startswith(rival))
    assert [float(each["attributes"]["data-value"]) for each in page.all("td", row)] == means


def test_tables_have_the_level_where_there_is_a_factor(with_factor, written):
    _, folder, _ = with_factor
    for name in ("results.csv", "runs.csv"):
        rows = rows_of(folder / name)
        expected = {"mockingjay": "3.0", "clusters_visible": "12.0", "": ""}
        assert all(row["level"] == expected[row["objective"]] for row in rows)
        assert "level" not in rows_of(written[1] / name)[0]


def test_a_factor_is_read_as_written_and_its_levels_are_positive(with_factor, tmp_path):
    findings, folder, _ = with_factor
    again = read_findings(folder / "findings.json")
    assert again.factor == findings.factor
    content = json.loads((folder / "findings.json").read_text())
    content["factor"]["levels"]["mockingjay"]["value"] = 0
    (tmp_path / "findings.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"factor.levels\['mockingjay'\].value must be positive, found 0.0"):
        read_findings(tmp_path / "findings.json")


def test_nothing_is_loaded_from_elsewhere(page):
    for element in page.elements:
        assert "src" not in element["attributes"]
        assert element["tag"] not in ("link", "img", "iframe", "object")
        href = element["attributes"].get("href", "#")
        assert href.startswith(("#", "runs/", "controls/")), href
    styles = " ".join(each["text"] for each in page.all("style"))
    assert "@import" not in styles
    assert "url(" not in styles


def test_the_page_tells_summary_methods_commands_environment_and_unfinished_runs(written, page):
    findings, _ = written
    text = page.all("body")[0]["text"]
    said = (findings.title, *findings.summary, *findings.methods, *findings.commands)
    for each in (*said, *findings.environment.values(), *findings.unfinished, *findings.unfinished.values()):
        assert each in text
    assert "Rehearsal" not in text


def test_a_rehearsal_is_marked(hostile):
    page = Page((hostile / "report.html").read_text(encoding="utf-8"))
    note = next(each for each in page.elements if each["attributes"].get("role") == "note")
    assert note["text"] == "Rehearsal: nothing may be concluded. <b>Only</b> a try."
    assert "Rehearsal: " in (hostile / "table.tex").read_text(encoding="utf-8")


def test_numbers_of_the_page_are_those_of_the_findings(written, page):
    findings, _ = written
    for budget in ("steps", "time"):
        table = table_of(page, f"Quality of each setting, equal {budget}")
        rows = [each for each in page.all("tr", table) if "tbody" in each["inside"]]
        settings = [each for each in findings.settings if each.budget == budget and not each.is_control]
        for row, setting in zip(rows, settings, strict=True):
            assert [each["text"].split()[0] for each in page.all("th", row)] == [setting.mechanism, setting.objective]
            for cell, measure in zip(page.all("td", row), findings.measures, strict=True):
                estimate = setting.figures[measure.name]
                assert float(page.all("data", cell)[0]["attributes"]["value"]) == estimate.mean
                assert page.all("data", cell)[0]["text"].removesuffix(" best") == f"{100 * estimate.mean:.1f}"
                assert f"({100 * estimate.low:.1f}–{100 * estimate.high:.1f})" in cell["text"]
                links = [each["attributes"]["href"].replace("%20", " ") for each in page.all("a", cell)]
                assert links == [sample.run for sample in estimate.samples]
                if setting.mechanism != findings.baseline:
                    assert verdict(setting.comparisons[measure.name]) in cell["text"]


def test_the_best_of_each_column_is_marked(written, page):
    findings, _ = written
    table = table_of(page, "Quality of each setting, equal steps")
    marked = {each["text"] for each in page.all("strong", table)}
    settings = [each for each in findings.settings if each.budget == "steps" and not each.is_control]
    for measure in findings.measures:
        choose = max if measure.higher_is_better else min
        assert f"{100 * choose(each.figures[measure.name].mean for each in settings):.1f} best" in marked


def rows_under(page, caption):
    """Texts of the cells of a table's rows."""
    rows = [each for each in page.all("tr", table_of(page, caption)) if "tbody" in each["inside"]]
    return [
        [" ".join(each["text"].split()) for each in page.elements if id(row) in each["parents"] and each["tag"] in ("th", "td")]
        for row in rows
    ]


@pytest.mark.parametrize(
    ("means", "higher", "expected"),
    [
        ((0.61, 0.58, None), True, "61.0"),
        ((0.61, 0.58), False, "58.0"),
        ((0.6101, 0.6099), True, None),
        ((0.6,), True, None),
        ((), True, None),
    ],
)
def test_a_column_whose_numbers_are_alike_has_no_best(means, higher, expected):
    estimates = [mean and Estimate(mean, None, None, ()) for mean in means]
    assert best(Measure("accuracy", "Accuracy", higher), estimates) == expected


def test_what_was_learned_is_told_in_tables_too(page):
    rows = rows_under(page, "Attention of every layer")
    assert len(rows) == 5 * 2  # mechanisms with weights, layers
    assert rows[0] == [
        *("query_key", "clusters_visible", "1"),
        *("0.100 (0.0900–0.110)", "0.300 (0.270–0.330)") * 2,
        *("10.0 (9.0–11.0)", "30.0 (27.0–33.0)"),
    ]
    assert rows_under(page, "CKA of layer 2, clusters_visible")[0] == [
        "query_key",
        "0.900",
        "0.800",
        "0.700",
        "0.600",
        "0.500",
        "0.400",
    ]
    assert rows_under(page, "CKA of layer 2, clusters_visible")[-1][-1] == "–"
    assert rows_under(page, "Loss without heads")[0][2:5] == ["4", "2.00 (1.80–2.20)", "2.10 (1.89–2.31)"]
    moved = rows_under(page, "Heads of tables")
    assert len(moved) == 4
    assert moved[1] == ["synthesizer_random", "clusters_visible", "none", "1", "20.0 (18.0–22.0)", "0.50", "0.75", "5 of 5"]
    assert moved[2] == ["synthesizer_random", "clusters_visible", "current", "2", "50.0 (45.0–55.0)", "0.50", "0.75", "4 of 5"]
    codes = rows_under(page, "Codes and phones")
    assert [row[0] for row in codes] == [MECHANISMS[0], *MECHANISMS[2:]]  # those that have codes
    assert codes[1][2:] == ["42.0 (37.8–46.2)"] * 4


def test_small_tables_are_drawn_cell_by_cell(page):
    """Row ``f0`` and row ``1a``: a dark cell above one a fifteenth as dark, beside one of ten fifteenths."""
    svg = next(each for each in page.all("svg") if each["text"].startswith("Tables of synthesizer_random, clusters_visible"))
    assert len(page.all("rect", svg)) == 3 * 2
    first = next(each for each in page.all("g", svg) if each["attributes"]["transform"].endswith("scale(2)"))
    lines = {each["attributes"]["d"]: each["attributes"]["style"] for each in page.all("path", first)}
    assert lines == {
        "M1 1.5h1": "stroke:var(--ink);stroke-opacity:0.67",
        "M0 0.5h1": "stroke:var(--ink);stroke-opacity:1.00",
    }
    second = [each for each in page.all("g", svg) if "transform" in each["attributes"]][2]
    assert page.all("path", second)[0]["attributes"] == {"d": "M0 1.5h1", "style": "stroke:var(--ink);stroke-opacity:0.07"}
    words = [each["text"] for each in page.all("text", svg)]
    assert words == ["1 current", "2", "untrained", "layer 1", "layer 2"]


def test_csv_files_hold_every_number(written):
    findings, folder = written
    results = {
        (row["budget"], row["objective"], row["mechanism"], row["measure"]): row for row in rows_of(folder / "results.csv")
    }
    runs = rows_of(folder / "runs.csv")
    expected = 0
    for setting in findings.settings:
        for name, estimate in (setting.figures | setting.costs).items():
            row = results.pop((setting.budget, setting.objective, setting.mechanism, name))
            assert [float(row[key]) for key in ("mean", "low", "high")] == [estimate.mean, estimate.low, estimate.high]
            seeds = [(int(seed), float(value)) for seed, value in (pair.split("=") for pair in row["seed_values"].split(";"))]
            assert seeds == [(sample.seed, sample.value) for sample in estimate.samples]
            if comparison := setting.comparisons.get(name):
                difference = comparison.difference
                keys = ("difference", "difference_low", "difference_high", "p_different")
                assert [float(row[key]) for key in keys] == [
                    *(difference.mean, difference.low, difference.high),
                    comparison.p_different,
                ]
                assert row["p_equivalent"] == ("" if comparison.p_equivalent is None else repr(comparison.p_equivalent))
                assert (row["verdict"], row["winner"]) == (comparison.verdict, comparison.winner)
            for sample in estimate.samples:
                row = runs[expected]
                expected += 1
                found = (row["objective"], row["mechanism"], row["budget"], int(row["seed"]), row["measure"], row["run"])
                assert found == (setting.objective, setting.mechanism, setting.budget, sample.seed, name, sample.run)
                assert float(row["value"]) == sample.value
    assert not results
    assert expected == len(runs)


def test_latex_holds_the_main_figures(written):
    findings, folder = written
    text = (folder / "table.tex").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if " & " in line and not line.startswith("Objective")]
    settings = [each for each in findings.settings if not each.is_control]
    assert text.count(r"\textbf{") >= 2 * len(findings.measures)
    for line, setting in zip(lines, settings, strict=True):
        objective, mechanism, *cells = line.removesuffix(r" \\").split(" & ")
        assert (objective, mechanism) == (setting.objective.replace("_", r"\_"), setting.mechanism.replace("_", r"\_"))
        for cell, measure in zip(cells, findings.measures, strict=True):
            estimate = setting.figures[measure.name]
            shown = [f"{100 * value:.1f}" for value in (estimate.mean, estimate.low, estimate.high)]
            assert re.findall(r"\d+\.\d", cell) == shown
            comparison = setting.comparisons.get(measure.name)
            assert (r"\approx" in cell) == (comparison is not None and comparison.verdict == "equivalent")


def test_latex_specials_are_escaped():
    assert latex(r"_%&#${}") == r"\_\%\&\#\$\{\}"
    assert latex("~^\\") == r"\textasciitilde{}\textasciicircum{}\textbackslash{}"
    assert latex("a\n\n[b]*\x00") == "a {[}b{]}{*}"


def test_names_of_strangers_stay_text(hostile):
    text = (hostile / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in text
    table = table_of(page, "Quality of each setting, equal steps")
    names = [page.all("th", row)[0]["text"] for row in page.all("tr", table) if "tbody" in row["inside"]]
    assert names == [HOSTILE[0] + " baseline", *HOSTILE[1:], HOSTILE[0] + " baseline", *HOSTILE[1:]]
    rows = rows_of(hostile / "results.csv")
    assert {row["mechanism"] for row in rows if row["objective"]} == {*HOSTILE, "'=cmd()"} - {"=cmd()"}
    body = (hostile / "table.tex").read_text(encoding="utf-8")
    assert r"\_ \% \& \# \$ \textasciitilde{} \textasciicircum{} \textbackslash{} {[}x{]}" in body
    assert r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}" in body
    assert read_findings(hostile / "findings.json").baseline == HOSTILE[0]


@pytest.mark.parametrize(
    "run",
    [
        "javascript:alert(1)",
        "/etc/passwd",
        "runs/../../x",
        "..",
        "//host/x",
        "http://host",
        "C:\\x",
        "a\\..\\b",
        "a\nb",
        "\tjavascript:x",
    ],
)
def test_a_run_elsewhere_is_no_link(run):
    page = Page(_link("seed 1", run))
    assert not page.all("a")
    assert page.all("code")[0]["text"] == run


def test_a_link_to_a_run_is_quoted():
    assert _link("seed 1", 'runs/a "b"&<c>?#%.0') == '<a href="runs/a%20%22b%22%26%3Cc%3E%3F%23%25.0">seed 1</a>'


def test_findings_are_read_as_written(written):
    findings, folder = written
    assert read_findings(folder / "findings.json") == without_draws(findings)


@pytest.mark.slow
def test_findings_that_are_read_give_the_same_report(written, tmp_path):
    folder = written[1]
    for path in write_report(read_findings(folder / "findings.json"), tmp_path):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def without_draws(value):
    """A copy whose samples have no resampled tests."""
    if dataclasses.is_dataclass(value):
        parts = {each.name: without_draws(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return type(value)(**{name: None if name == "draws" else part for name, part in parts.items()})
    if isinstance(value, tuple):
        return tuple(map(without_draws, value))
    if isinstance(value, dict):
        return {name: without_draws(each) for name, each in value.items()}
    return value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format_version",), 99, "has format_version 99, this audiot reads 1"),
        (("title",), None, "title must be text, found None"),
        (("title",), "\ud800", r"title is no text that UTF-8 can hold: '\\ud800'"),
        (("summary",), "one", "summary must be a list, found 'one'"),
        (("settings", 1, "is_control"), 0, r"settings\[1\].is_control must be true or false, found 0"),
        (("settings", 1, "budget"), "money", r"settings\[1\].budget must be one of 'steps', 'time', found 'money'"),
        (("settings", 1, "figures", "abx", "mean"), float("nan"), r"settings\[1\].figures\['abx'\].mean must be a finite number"),
        (("settings", 1, "figures", "abx", "mean"), 10**400, r"settings\[1\].figures\['abx'\].mean must be a finite number"),
        (("settings", 1, "figures", "abx", "mean"), True, "mean must be a number, found True"),
        (("settings", 1, "figures", "else"), [], r"settings\[1\].figures\['else'\] must be an object, found \[\]"),
        (("settings", 1, "comparisons", "abx", "verdict"), "best", "verdict must be one of 'better', 'equivalent', "),
        (("settings", 1, "comparisons", "abx", "winner"), "nobody", "winner must be one of .*, found 'nobody'"),
        (("settings", 1, "mechanism"), MECHANISMS[0], "settings hold .* twice"),
        (("settings", 1, "__class__"), "os.system", r"settings\[1\] has the unknown key '__class__'"),
        (("learned", 0, "heads", "width"), [], r"a name in learned\[0\].heads must be one of 'distance_s'"),
        (("learned", 1, "mechanism"), MECHANISMS[0], "learned hold .* twice"),
        (("learned", 2, "pictures", 0, "rows"), ["f0", "<b>"], r"learned\[2\].pictures must be squares of hexadecimal digits"),
        (("similarities", 0, "means"), [[0.5]], r"similarities\[0\].means must be a row and a column for each of 6 mechanisms"),
        (("measures", 0), {}, r"measures\[0\] lacks name"),
        (("measures", 0, "name"), "abx", "measures and costs hold 'abx' twice"),
        (("measures", 0, "name"), "other", "must be one of 'other', .*, found 'phone_linear'"),
    ],
)
def test_damaged_findings_give_one_clear_line(written, tmp_path, place, value, message):
    content = copy.deepcopy(json.loads((written[1] / "findings.json").read_text(encoding="utf-8")))
    at = content
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    path = tmp_path / "findings.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        read_findings(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_half_a_file_of_findings_gives_one_clear_line(written, tmp_path):
    path = tmp_path / "findings.json"
    path.write_bytes((written[1] / "findings.json").read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a readable file of findings") as error:
        read_findings(path)
    assert "\n" not in str(error.value)


def test_findings_that_contradict_themselves_write_nothing(tmp_path):
    findings = example()
    settings = (dataclasses.replace(findings.settings[0], budget="money"), *findings.settings[1:])
    with pytest.raises(ValueError, match="budget must be one of"):
        write_report(dataclasses.replace(findings, settings=settings), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_study_without_runs_has_a_report(tmp_path):
    write_report(Findings("Empty", "", (), "query_key", (), (), ()), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.all("table")
    assert [each["text"] for each in page.all("h2")] == ["Words"]
    assert rows_of(tmp_path / "results.csv") == []


def test_one_seed_has_no_interval(tmp_path):
    findings = example()

    def alone(estimate):
        return dataclasses.replace(estimate, low=None, high=None, samples=estimate.samples[:1])

    settings = tuple(
        dataclasses.replace(
            setting,
            figures={name: alone(each) for name, each in setting.figures.items()},
            comparisons={
                name: dataclasses.replace(
                    each,
                    difference=alone(each.difference),
                    p_different=None,
                    p_equivalent=None,
                    verdict="can't be told",
                    winner="",
                )
                for name, each in setting.comparisons.items()
            },
        )
        for setting in findings.settings[:6]
    )
    write_report(dataclasses.replace(findings, settings=settings, learned=(), similarities=()), tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    cells = page.all("td", table_of(page, "Quality of each setting, equal steps"))
    assert not any("(" in cell["text"] for cell in cells)
    assert rows_of(tmp_path / "results.csv")[0]["low"] == ""


@pytest.mark.parametrize(
    ("value", "is_rate", "signed", "shown"),
    [
        (0.7236, True, False, "72.4"),
        (-0.0004, True, True, "0.0"),
        (0.0004, True, True, "0.0"),
        (-0.012, True, True, "−1.2"),
        (0.012, True, True, "+1.2"),
        (3, False, False, "3.00"),
        (123.4, False, False, "123"),
        (999.6, False, False, "1,000"),
        (21_345_678, False, False, "21.3 M"),
        (-4.1e9, False, False, "−4.10 G"),
        (0, False, False, "0.00"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_count(value, is_rate, signed, shown):
    assert number(value, Measure("m", "M", True, is_rate=is_rate), signed) == shown


@pytest.mark.parametrize(("higher", "expected"), [(True, {0, 1}), (False, {0, 3})])
def test_the_front_holds_what_nothing_beats(higher, expected):
    """Quality and cost: cheap and poor, good and dear, in between and dearer than both, and worst."""
    estimate = example().settings[0].figures["abx"]
    measure, cost = Measure("q", "Q", higher), Measure("c", "C", False)
    settings = [
        Setting(
            "",
            str(place),
            figures={"q": dataclasses.replace(estimate, mean=q)},
            costs={"c": dataclasses.replace(estimate, mean=c)},
        )
        for place, (q, c) in enumerate([(0.5, 1.0), (0.9, 2.0), (0.7, 3.0), (0.4, 3.0)])
    ]
    assert on_front(settings, measure, cost) == expected
    assert on_front([dataclasses.replace(settings[0], costs={})], measure, cost) == set()


def test_a_study_of_few_runs_shows_no_figure_without_content(tmp_path):
    """One mechanism under an objective has no other to be like, and the same cost for all is no front."""
    found = example()
    alike = [
        dataclasses.replace(
            each,
            figures={"phone_linear": each.figures["phone_linear"]},
            costs=each.costs | {"hours": found.settings[0].costs["hours"]},
            comparisons={},
        )
        for each in found.settings[:6]
    ]
    one = found.similarities[0]
    lonely = dataclasses.replace(one, mechanisms=one.mechanisms[:1], means=((None,),))
    unfinished = {f"run {number}": "it has not run" for number in range(21)}
    few = {"measures": found.measures[:1], "settings": tuple(alike), "learned": (), "similarities": (lonely,)}
    path = write_report(dataclasses.replace(found, unfinished=unfinished, **few), tmp_path)[0]
    page = Page(path.read_text(encoding="utf-8"))
    text = page.all("body")[0]["text"]
    assert "CKA of layer" not in text
    assert "Training time: " not in text
    assert "Peak memory: " in text
    assert "Runs that failed or are missing: 21" in [each["text"] for each in page.all("summary")]
