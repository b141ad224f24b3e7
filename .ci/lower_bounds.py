"""Prints the low end of the range of every dependency in pyproject.toml, as a constraints file for pip."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for requirement in chain(project["dependencies"], extras["demo"], extras["hf"], extras["study"], extras["beam"], extras["fp8"]):
    name, _, versions = requirement.partition(">=")
    print(f"{name}=={versions.split(',')[0]}")
