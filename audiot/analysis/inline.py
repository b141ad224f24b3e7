"""Figures as SVG inside a page: their text is text, and their colours are the page's."""

from __future__ import annotations

import re
import warnings
from html import escape
from io import StringIO
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

INK, MUTED, RULE, BAND, GOOD, BAD, EVEN = (f"#00000{place}" for place in range(1, 8))  # stand for colours of the page
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BAND: "band", GOOD: "good", BAD: "bad", EVEN: "even"}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "audiot",
    "text.parse_math": False,  # names come from config files
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def inline(figure: Figure, prefix: str, texts: tuple[str, str]) -> str:
    """The figure as an element of a page: ids begin with the prefix, colours are variables of the page's style."""
    stream = StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser brings the fonts
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(stream.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        attributes = {name.partition("}")[2] or name: value for name, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({name: _attribute(name, value, prefix) for name, value in attributes.items()})
        if element.tag == "g":
            element.attrib.pop("id", None)
    view = root.get("viewBox", "")
    inner = "".join(ElementTree.tostring(child, encoding="unicode", short_empty_elements=False) for child in root)
    title, text = (escape(each) for each in texts)
    return (
        f'<svg role="img" viewBox="{view}" aria-labelledby="{prefix}-title {prefix}-text">'
        f'<title id="{prefix}-title">{title}</title><desc id="{prefix}-text">{text}</desc>{inner}</svg>'
    )


def _attribute(name: str, value: str, prefix: str) -> str:
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}-")
    return re.sub(r"#00000\d", lambda found: f"var(--{VARIABLES[found[0]]})", value)
