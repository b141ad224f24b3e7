"""`torch.compile` of a training step, with an optimisation that Inductor lacks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from audiot.base.private import graph_pass

FRESH = "audiot.residual_norm_backward.default"  # operation whose results share no memory with other tensors


GraphPass: Any
digest_of_files: Any
GraphPass, digest_of_files = graph_pass() or (None, None)


def compiled(function: Any, graphs: bool) -> Any:
    """`torch.compile` of a training step. With ``graphs``, each shape is replayed as a CUDA graph."""
    options: dict[str, Any] = {"triton.cudagraphs": graphs}
    if GraphPass is not None:
        options["post_grad_custom_post_pass"] = SumsInPlace()
    return torch.compile(function, options=options)


@torch.library.custom_op("audiot::add_product", mutates_args=("total",))
def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add the product of two matrices to a third one in place."""
    total.addmm_(first, second)


class SumsInPlace(GraphPass or object):  # type: ignore[misc]
    """Graph pass that adds matrix products to the residual's gradient in place.

    Inductor uses ``addmm`` with a new result. It first copies the gradient there, which costs as much memory traffic as a
    separate addition.
    """

    def __call__(self, graph: Graph) -> None:
        """Change the graph. It runs after Inductor's own passes."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            total, first, second = node.args
            if node.kwargs or not self._is_fresh(total):
                continue
            with graph.inserting_before(node):
                added = graph.call_function(torch.ops.audiot.add_product.default, (total, first, second))
            added.meta["val"] = None
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def _is_fresh(self, total: Node) -> bool:
        """Whether the tensor may be overwritten because nothing else uses it."""
        if total.target is not operator.getitem or len(total.users) != 1:
            return False
        source = total.args[0]
        return isinstance(source, Node) and str(source.target) == FRESH

    def uuid(self) -> Any:
        """Identifier of the pass in the cache of compiled code."""
        return digest_of_files((__file__,))
