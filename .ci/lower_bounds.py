"""Prints the low end of every range in pyproject.toml, as a constraints file for pip."""

from __future__ import annotations

import re
import sys
from pathlib import Path

text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
for name, version in sorted(set(re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)[,"]', text))):
    if name != "setuptools":
        print(f"{name}=={version}", file=sys.stdout)
