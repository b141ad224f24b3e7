"""Counting the matrix products of a module: what they compute, and what they read and write."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from audiot.base.private import dispatch_mode


class Work(NamedTuple):
    """What the matrix products of a forward pass compute, and the tensor elements that they read and write."""

    flops: int
    elements: int

    def __add__(self, other: tuple[int, ...]) -> Work:  # type: ignore[override]
        return Work(self.flops + other[0], self.elements + other[1])


@torch.no_grad()
def products(module: nn.Module, *shape: int) -> Work:
    """Work of a forward pass on an input of a shape. The pass runs without values, so nothing is computed.

    Raises:
        RuntimeError: the module chooses its computation by the values of its input, or refuses tensors without values.
    """
    # Without values, fused attention consists of its two products, which PyTorch's formulas know. On a CPU it does not.
    shell = copy.deepcopy(module).to("meta")
    counted = _Counted()
    with _counting(counted), _WholeAttention(counted):
        shell(torch.empty(shape, device="meta"))
    return Work(counted.flops, counted.elements)


class _Counted:
    """Sums over matrix products: floating-point operations, by PyTorch's formulas, and elements read and written."""

    def __init__(self) -> None:
        self.flops = 0
        self.elements = 0


def _counting(counted: _Counted) -> Any:
    """Context in which matrix products are added to ``counted``."""

    class Products(dispatch_mode()):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket in flop_registry:
                counted.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
                counted.elements += _elements([*args, result])
            return result

    return Products()


class _WholeAttention(TorchFunctionMode):
    """Context in which fused attention counts as one product, which moves no matrix of scores."""

    def __init__(self, counted: _Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counted.elements
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.counted.elements = before + _elements([*args, *(kwargs or {}).values(), result])
        return result


def _elements(values: Sequence[object]) -> int:
    return sum(value.numel() for value in values if isinstance(value, Tensor))
