"""The layer around the mechanisms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from audiot.attention import SelfAttention, build
from audiot.attention.query_key import QueryKey
from audiot.positions import Learned, Rotary


def test_query_key_layer_equals_pytorchs_own_multi_head_attention():
    torch.manual_seed(0)
    ours = build("query_key", 12, 3, 10, dropout=0.0).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    hidden = torch.randn(2, 7, 12, dtype=torch.float64)
    valid = torch.arange(7)[None] < torch.tensor([7, 4])[:, None]
    expected, weights = theirs(hidden, hidden, hidden, key_padding_mask=~valid, average_attn_weights=False)
    torch.testing.assert_close(ours(hidden, valid), expected * valid[..., None])
    torch.testing.assert_close(ours.weights(hidden, valid), weights * valid[:, None, :, None])


def test_rotary_positions_turn_queries_and_keys_but_not_values():
    torch.manual_seed(0)
    rotary = Rotary(8, 2, 10)
    attention = build("query_key", 8, 2, 10, positions=rotary).double().eval()
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    query, key, value = (
        getattr(attention, name)(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for name in ("query", "key", "value")
    )
    scores = rotary.rotate(query) @ rotary.rotate(key).transpose(-2, -1) / 2
    weights = scores.softmax(-1)
    torch.testing.assert_close(attention.weights(hidden), weights)
    torch.testing.assert_close(attention(hidden), attention.output((weights @ value).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("name", ["synthesizer_random", "synthesizer_dense"])
def test_rotary_positions_without_queries_are_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match="has none: set positions=sinusoid"):
        build(name, 8, 2, 10, positions=Rotary(8, 2, 10))


def test_position_tables_stay_out_of_the_layer():
    attention = build("query_key", 8, 2, 10, positions=Learned(8, 2, 10))
    assert not any("table" in key for key in attention.state_dict())


def test_a_mechanism_of_other_sizes_is_refused():
    with pytest.raises(ValueError, match="built for embed_dim 8 and num_heads 4, but the layer has embed_dim 8 and num_h"):
        SelfAttention(8, 2, QueryKey(8, 4, 10))


def test_output_dropout_acts_in_training_only():
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, QueryKey(8, 2, 10), dropout=0.5)
    output = attention(torch.randn(4, 9, 8))
    assert 0.3 < (output == 0).float().mean() < 0.7
    assert (attention.eval()(torch.randn(4, 9, 8)) != 0).all()


def test_shared_query_key_scores_are_symmetric():
    torch.manual_seed(0)
    attention = build("query_key", 8, 2, 10, share_query_key=True).double()
    log_weights = attention.weights(torch.randn(1, 5, 8, dtype=torch.float64)).log()
    # Scores are symmetric, so the logs of the weights are, up to a constant a row: double-centred, they are symmetric.
    centred = log_weights - log_weights.diagonal(dim1=-2, dim2=-1)[..., None]
    gap = centred - centred.transpose(-2, -1)  # s_jj - s_ii
    torch.testing.assert_close(gap[..., 0, 1] + gap[..., 1, 2], gap[..., 0, 2])
