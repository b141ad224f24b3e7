"""Functions that launch kernels, as operators of a compiled graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def operator(name: str) -> Callable[[Function], Function]:
    """Decorator: in a graph of `torch.compile` the function is an operator, which is not traced; else it is called as it is.

    An operator's way through PyTorch's dispatcher takes some 0.2 ms of the host's time, which is longer than a kernel of a
    small model. The decorated function has ``register_fake``, which an operator needs: it gives results of the same shapes,
    without values.
    """

    def decorate(function: Function) -> Function:
        registered = torch.library.custom_op(f"audiot::{name}", function, mutates_args=())

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return registered(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate
