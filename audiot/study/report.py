"""The report of a study: one page for readers, tables for other programs, and the findings to make it again."""

from __future__ import annotations

from pathlib import Path

from audiot.base.files import write_csv, write_text
from audiot.study.findings import Findings
from audiot.study.page import page
from audiot.study.saved import checked, write_findings
from audiot.study.tables import latex_table, result_rows, run_rows


def write_report(findings: Findings, folder: Path) -> list[Path]:
    """Write the report beside the study's runs. A reader finds each file whole: the old one or the new one.

    Args:
        findings: What the study found.
        folder: Folder of the study, to which the runs' paths are relative.

    Returns:
        Paths of ``report.html``, ``results.csv``, ``runs.csv``, ``table.tex`` and ``findings.json``, which
        `audiot.study.saved.read_findings` reads.

    Raises:
        ValueError: the findings contradict themselves or hold numbers that are not finite.
    """
    findings = checked(findings)
    paths = [folder / name for name in ("report.html", "results.csv", "runs.csv", "table.tex", "findings.json")]
    write_text(paths[0], page(findings))
    write_csv(paths[1], result_rows(findings))
    write_csv(paths[2], run_rows(findings))
    write_text(paths[3], latex_table(findings))
    write_findings(findings, paths[4])
    return paths
