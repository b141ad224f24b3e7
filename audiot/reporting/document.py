"""The frame of a page of results: one file that needs no network, for eyes, keyboards, screen readers and paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files


def document(
    title: str,
    summary: Sequence[str],
    facts: str,
    sections: Mapping[str, tuple[str, str]],
    notice: str = "",
    has_sound: bool = False,
) -> str:
    """A page as HTML.

    Args:
        title: Its title, as text.
        summary: Sentences at its top, as text.
        facts: A line below them, as HTML.
        sections: Id of each section → its heading, as text, and its content, as HTML. Those without content are left out.
        notice: What stands below the title, as HTML.
        has_sound: Whether the page holds sound, as data URIs.
    """
    sections = {name: section for name, section in sections.items() if section[1]}
    links = "".join(f'<li><a href="#{name}">{escape(heading)}</a></li>' for name, (heading, _) in sections.items())
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-heading">\n'
        f'<h2 id="{name}-heading">{escape(heading)}</h2>{content}</section>\n'
        for name, (heading, content) in sections.items()
    )
    style, script = (files("audiot.reporting").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sound = " media-src data:;" if has_sound else ""
    policy = f"default-src 'none';{sound} style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main id="content" tabindex="-1">
<header>
<h1>{escape(title)}</h1>
{notice}
<div class="summary">{"".join(f"<p>{escape(sentence)}</p>" for sentence in summary)}</div>
<p class="facts">{facts}</p>
</header>
{body}</main>
<script>{script}</script>
</body>
</html>
"""


def commands(lines: Sequence[str], label: str = "Commands") -> str:
    """Commands to be pasted; empty without any."""
    if not lines:
        return ""
    shown = escape("\n".join(lines))
    return f'<pre class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><code>{shown}</code></pre>'
