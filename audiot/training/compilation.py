"""What `torch.compile` can't see of a training step by itself."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from audiot.base.private import graph_pass

FRESH = "audiot.residual_norm_backward.default"  # its results are memory that nothing else refers to


GraphPass: Any
digest_of_files: Any
GraphPass, digest_of_files = graph_pass() or (None, None)


def compiled(function: Any, graphs: bool) -> Any:
    """`torch.compile` of a training step; with ``graphs``, each shape is replayed as a CUDA graph."""
    options: dict[str, Any] = {"triton.cudagraphs": graphs}
    if GraphPass is not None:
        options["post_grad_custom_post_pass"] = SumsInPlace()
    return torch.compile(function, options=options)


@torch.library.custom_op("audiot::add_product", mutates_args=("total",))
def add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add the product of two matrices to a third, in place."""
    total.addmm_(first, second)


class SumsInPlace(GraphPass or object):  # type: ignore[misc]
    """Adds products to the residual's gradient where it lies.

    Inductor makes such a sum an ``addmm`` with a result of its own, to which the gradient is copied first: as long a way as the
    sum by itself.
    """

    def __call__(self, graph: Graph) -> None:
        """Change the graph, after Inductor's own passes."""
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
        """Whether nothing else needs this tensor as it is."""
        if total.target is not operator.getitem or len(total.users) != 1:
            return False
        source = total.args[0]
        return isinstance(source, Node) and str(source.target) == FRESH

    def uuid(self) -> Any:
        """What the cache of compiled code knows the pass by."""
        return digest_of_files((__file__,))
