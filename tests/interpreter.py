"""Runs code whose Triton kernels are interpreted, on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PREAMBLE = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent / "attention"), str(Path(__file__).parent)]!r}  # where tests find each other
from triton.runtime import interpreter

# NumPy 2.4 makes no number of an array of one element any more, which the interpreter asks for in loop bounds.
patch = interpreter._patch_lang_tensor
def patch_index(tensor, scope):
    patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patch_index
"""


def run_interpreted(code):
    """Run the code in a process of its own, where Triton is told to interpret before it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", PREAMBLE + code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
