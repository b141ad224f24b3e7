"""Draws overview.svg from the tables of performance.md and results.md: python docs/overview.py."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHOWN = ("query_key", "synthesizer_random", "routing", "lsh_simple", "sparse_fixed", "local")
PHONE = "phone, frozen"


def table(page: str, first_column: str) -> list[dict[str, str]]:
    """The first table of a page whose first column is called so: a dict per row, of header → text."""
    lines = (HERE / page).read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([re.sub(r"[*`]", "", cell).strip() for cell in line.strip("|").split("|")])
    header, _, *body = rows
    return [dict(zip(header, row, strict=True)) for row in body]


def draw_costs(axes: plt.Axes) -> None:
    """Time of the operator by sequence length."""
    left = set(SHOWN)
    for row in table("performance.md", "mechanism"):
        name = row.pop("mechanism").split()[0]
        if name not in left:  # a variant of one above
            continue
        left.remove(name)
        points = [(int(re.sub(r"\D", "", length)), float(cell.split()[0])) for length, cell in row.items() if cell]
        lengths, times = zip(*points, strict=True)
        width = 3.0 if name == "query_key" else 1.6
        axes.loglog(lengths, times, "o-", label=name, linewidth=width, markersize=4)
    axes.set_title("Attention, forward and backward, ms per 65,536 frames", fontsize=10)
    axes.set_xlabel("frames per sequence")
    axes.set_xticks([384, 1536, 8192, 32768], ["384", "1,536", "8,192", "32,768"])
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def draw_worth(axes: plt.Axes) -> None:
    """Phone accuracy of frozen encoders, beside the controls."""
    rows = [row for row in table("results.md", "attention, positions") if row[PHONE]]
    names = [row["attention, positions"] for row in rows][::-1]
    values = [float(row[PHONE].split()[-1]) for row in rows][::-1]
    colours = ["C0" if name.startswith(("query_key", "synthesizer")) else "0.6" for name in names]
    bars = axes.barh(names, values, color=colours, height=0.65)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xlim(0, 78)
    axes.set_title("Phone accuracy of the frozen encoder, %", fontsize=10)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw both halves."""
    # Text stays text, and the same tables give the same bytes whatever the day.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "audiot", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.7), layout="constrained")
        draw_costs(left)
        draw_worth(right)
        figure.savefig(HERE / "overview.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
