"""Prints the low end of the range of every dependency in pyproject.toml, as a constraints file for pip."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [requirements for name, requirements in project["optional-dependencies"].items() if name not in ("docs", "test")]
for requirement in chain(project["dependencies"], *extras):
    found = re.match(r"([\w.-]+)(\[[\w,-]+\])?>=([\w.]+)", requirement)  # a constraint has no extras
    if found is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} has no low end: expected NAME>=VERSION,…")
    print(f"{found[1]}=={found[3]}")
