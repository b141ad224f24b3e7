"""Elements of a page: tables, figures with captions, what opens and closes; numbers as they stand in them."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def many(amount: int, what: str) -> str:
    """An amount with its noun."""
    return f"{amount} {what}{'' if amount == 1 else 's'}"


def table(caption: str, heads: Iterable[str], rows: Iterable[str], kind: str = "sortable") -> str:
    """A table with its heads and rows; `kind` is ``sortable`` or ``plain``. A screen reader knows it by its caption."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>\n"
    )


def head(name: str, note: str = "", first: str = "ascending", is_text: bool = False) -> str:
    """The head of a column, with a note below it; `first` is the order that the first click sorts in."""
    small = f" <small>{escape(note)}</small>" if note else ""
    kind = ' class="text"' if is_text else ""
    return f'<th scope="col"{kind} data-first="{first}"><span>{escape(name)}</span>{small}</th>'


def breakable(name: str) -> str:
    """A name that may break after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def folded(heading: str, content: str, is_open: bool = False) -> str:
    """What opens below its heading."""
    return f'<details class="folded"{" open" if is_open else ""}><summary>{escape(heading)}</summary>{content}</details>\n'


def figure(svg: str, caption: str) -> str:
    """A figure with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def compact(value: float, form: str) -> str:
    """A number with thousands apart; millions and more end in ``M``, ``G``, ``T`` or ``P``. `form` is that of small ones."""
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:{form}} {letter}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:{form}}".rstrip(".")
