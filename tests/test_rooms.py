"""The order of the rooms: a module imports from its own room and from those below it, and none waits for itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import audiot

ROOT = Path(audiot.__file__).parent
ORDER = (  # from the ground up: packages, and the modules at the top of the package
    "base",
    "kernels",
    "analysis",
    "reporting",
    "positions",
    "attention",
    "features",
    "data",
    "layers",
    "model",
    "checkpoint",
    "runs",
    "following",
    "training",
    "objectives",
    "pretraining",
    "downstream",
    "interop",
    "extraction",
    "deployment",
    "serving",
    "measures",
    "benchmark",
    "study",
    "adaptation",
    "commands",
    "cli",
    "__main__",
)
ALIASES = {  # former places of public names
    "audiot.huggingface": "audiot.interop.hf_model",
    "audiot.s3prl_upstream": "audiot.interop.s3prl_upstream",
    "audiot.attention.huggingface": "audiot.interop.hf_attention",
}
PUBLIC = "audiot"  # `audiot.load_encoder` and the like import what they need when they are called


def module_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(module):
    """Modules of the package that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & MODULES.keys() or {node.module}
    return {name for name in found if name in MODULES}


def room(module):
    return module.split(".")[1]


def test_every_module_has_a_room():
    rooms = {room(module) for module in MODULES if module not in (PUBLIC, *ALIASES)}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in (PUBLIC, *ALIASES)])
def test_a_module_imports_from_its_own_room_and_those_below(module):
    above = {
        other for other in imported(module) - {PUBLIC} if other in ALIASES or ORDER.index(room(other)) > ORDER.index(room(module))
    }
    assert not above


def test_no_modules_wait_for_each_other():
    graph = {module: imported(module) - {module, PUBLIC} for module in MODULES if module != PUBLIC}
    while free := {module for module, needs in graph.items() if not needs}:
        graph = {module: needs - free for module, needs in graph.items() if module not in free}
    assert not graph


@pytest.mark.parametrize(("alias", "place"), ALIASES.items())
def test_former_places_are_aliases_of_a_few_lines(alias, place):
    lines = MODULES[alias].read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.startswith('"""')]
    assert f"from {place} import *  # noqa: F403" in code
    assert len(code) <= 4


def test_no_module_has_the_name_of_one_of_the_standard_library_in_sight_of_scripts():
    """A script's own folder comes first on Python's path: ``python audiot/random.py`` would hide ``random``."""
    import sys

    names = {module.rsplit(".", 1)[-1] for module in MODULES}
    assert not names & (set(sys.stdlib_module_names) - {"__main__"})
