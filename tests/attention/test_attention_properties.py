"""Every mechanism of the group conf/attention in layers of any shape; `test_contract` has the rules at some shapes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_contract import VARIANTS, subject

from audiot.attention import names
from audiot.attention.testing import agree, close, frames, valid_of

CASES = [*((name, {}) for name in names()), *VARIANTS]


@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**31),
    num_heads=st.integers(7, 10),
    head_dim=st.sampled_from([2, 4, 6, 8]),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    spare=st.integers(0, 5),
    data=st.data(),
)
def test_a_layer_of_any_shape_keeps_the_rules(case, seed, num_heads, head_dim, lengths, spare, data):
    num_frames = max(lengths) + spare
    attention = subject(*case).layer(seed, num_heads, head_dim, max_frames=num_frames).eval()
    hidden, valid = frames(len(lengths), num_frames, num_heads * head_dim, seed=seed % 1000), valid_of(lengths, num_frames)
    agree(attention, hidden.requires_grad_(), valid)
    with torch.no_grad():
        whole = attention(hidden, valid)
        order = data.draw(st.permutations(range(len(lengths))))
        close(attention(hidden[order], valid[order]), whole[order])
        assert not whole[~valid].any()
        for row, length in enumerate(lengths):
            if length and case[1].get("anchor") != "length":
                close(attention(hidden[row : row + 1, :length])[0], whole[row, :length])
        if attention.has_weights:
            weights, chosen = attention.weights(hidden, valid), attention.chosen_keys(hidden, valid)
            assert (weights >= 0).all()
            assert not weights.masked_select(~valid[:, None, None, :]).any()
            sums, some = weights.sum(-1), valid[:, None].expand(-1, num_heads, -1)
            close(sums, (some if chosen is None else some & chosen.any(-1)).double())
