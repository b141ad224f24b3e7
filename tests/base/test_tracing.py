"""What differs while a model is recorded as a graph."""

from __future__ import annotations

import torch
from torch import nn
from torch.export import Dim

from audiot.base.tracing import can_be_read, first, is_recording, recording

TABLE = torch.arange(24.0).view(8, 3)


class Added(nn.Module):
    """Adds the first rows of a table, and half of them where numbers can't be looked at."""

    def forward(self, rows, lengths):
        if can_be_read(lengths):
            rows = 2 * rows
        return rows + first(TABLE, 0, rows.shape[0])


def test_a_graph_takes_the_first_rows_of_any_number_and_reads_no_values():
    with recording():
        program = torch.export.export(Added(), (torch.ones(5, 3), torch.tensor([5])), dynamic_shapes=({0: Dim.AUTO}, None))
    for count in (2, 7, 8):
        rows = torch.full((count, 3), 0.5)
        assert torch.equal(program.module()(rows, torch.tensor([count])), rows + TABLE[:count])


def test_outside_of_a_graph_the_first_rows_are_a_view_and_values_can_be_read():
    found = first(TABLE, 0, 4)
    assert torch.equal(found, TABLE[:4])
    assert found.untyped_storage().data_ptr() == TABLE.untyped_storage().data_ptr()
    assert torch.equal(Added()(torch.ones(2, 3), torch.tensor([2])), 2 + TABLE[:2])


def test_a_compiled_function_is_no_graph_for_others():
    compiled = torch.compile(lambda given: given + 1 if is_recording() else given + 2, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == 2
    with recording():
        assert compiled(torch.zeros(1)).item() == 1
    assert compiled(torch.zeros(1)).item() == 2
