"""Heads removed, against output projections whose columns are zero."""

from __future__ import annotations

import copy

import pytest
import torch

from audiot.measures.pruning import kept_heads, prune
from audiot.model import Encoder


def encoder(attention="query_key.QueryKey", **changes):
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "num_layers": 2, "num_heads": 3, "ffn_dim": 12, "max_frames": 9, "init_std": 0.5}
    mechanism = {"_target_": f"audiot.attention.{attention}"}
    positions = {"_target_": "audiot.positions.NoPositions"}
    return Encoder(4, attention=mechanism, positions=positions, **(sizes | changes)).eval()


def loss_of(model):
    """Mean square of the last state."""
    frames = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    return lambda: float(model(frames)[-1].sub(0.3 * frames.repeat(1, 1, 3)).square().mean())


def without(model, *heads):
    """The loss of a copy whose output projections give nothing of these heads."""
    changed = copy.deepcopy(model)
    for layer, head in heads:
        changed.layers[layer - 1].attention.output.weight.data[:, 4 * (head - 1) : 4 * head] = 0
    return loss_of(changed)()


@torch.no_grad()
def test_each_head_is_removed_alone_and_then_in_the_order_of_its_loss():
    model = encoder()
    found = prune(model, loss_of(model))
    heads = [(layer, head) for layer in (1, 2) for head in (1, 2, 3)]
    assert found.alone == {head: pytest.approx(without(model, head), rel=1e-5) for head in heads}
    assert found.order == sorted(heads, key=lambda head: without(model, head))
    assert found.order != heads
    expected = [without(model, *found.order[:number]) for number in range(7)]
    assert found.removed == pytest.approx(expected, rel=1e-5)
    assert len(set(found.removed)) == 7


@torch.no_grad()
def test_afterwards_the_encoder_is_as_it_was():
    model = encoder()
    before, state = loss_of(model)(), copy.deepcopy(model.state_dict())
    prune(model, loss_of(model))
    assert loss_of(model)() == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_shared_layer_loses_a_head_wherever_it_is_used():
    model = encoder(share_layers=True)
    found = prune(model, loss_of(model))
    assert found.alone == {(1, head): pytest.approx(without(model, (1, head)), rel=1e-5) for head in (1, 2, 3)}
    assert len(found.removed) == 4
    with kept_heads(model) as kept:
        assert [factor.tolist() for factor in kept] == [[1, 1, 1]]
