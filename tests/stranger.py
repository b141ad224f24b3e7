"""A mechanism from outside the package: the example of CONTRIBUTING.md, as a stranger copies it."""

from __future__ import annotations

import re
from pathlib import Path

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def copy_example(folder):
    """Write the files of the example to a folder, each as the document names it."""
    found = re.findall(r"`mine/([\w/.]+)`:\n\n```\w+\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name, text in found:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return [name for name, _ in found]
