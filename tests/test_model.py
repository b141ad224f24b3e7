"""The encoder against a plain computation in NumPy, and its padding, sharing and initialisation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from audiot.attention import names
from audiot.model import Encoder, length_mask
from audiot.objectives.reconstruction import ReconstructionHead

QUERY_KEY = {"_target_": "audiot.attention.query_key.QueryKey"}
NO_POSITIONS = {"_target_": "audiot.positions.NoPositions"}


def encoder(seed=0, **options):
    shape = {"input_dim": 10, "embed_dim": 24, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "max_frames": 16}
    torch.manual_seed(seed)
    return Encoder(**shape | {"attention": QUERY_KEY, "positions": NO_POSITIONS} | options).double().eval()


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stir(module):
    """Move all parameters away from their initial values, norms and biases among them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", names())
def test_padding_does_not_change_valid_frames(name, norm, published_attention):
    model = stir(encoder(**published_attention(name), norm=norm))
    lengths = torch.tensor([12, 7, 1])
    features = randn(3, 12, 10)
    features[torch.arange(12) >= lengths[:, None]] = 100.0
    together = model(features, length_mask(lengths, 12))
    for number, length in enumerate(lengths.tolist()):
        alone = model(features[number : number + 1, :length])
        for one, batch in zip(alone, together, strict=True):
            torch.testing.assert_close(batch[number, :length], one[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("name", names())
def test_activation_checkpointing_changes_the_memory_of_a_step_alone(name, norm, published_attention):
    options = published_attention(name) | {"norm": norm, "num_layers": 3}
    if name == "routing":
        with pytest.raises(ValueError, match="Routing would learn from both"):
            encoder(**options, activation_checkpointing=True)
        return
    found = []
    for checkpointing in (False, True):
        model = stir(encoder(**options, dropout=0.1, activation_checkpointing=checkpointing)).train()
        kept = []
        torch.manual_seed(3)  # of dropout and hashes
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda x: x
        ):
            loss = model(randn(3, 12, 10))[-1].square().sum()
        loss.backward()
        found.append((loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.requires_grad], sum(kept)))
    (loss, gradients, size), (same_loss, same_gradients, small_size) = found
    torch.testing.assert_close(same_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-9, atol=1e-11)
    assert small_size < size / 3


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def normalised(x, layer):
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return (x - x.mean(-1, keepdims=True)) / deviation * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attend(x, attention):
    heads = []
    query, key, value = (linear(x, getattr(attention, name)) for name in ("query", "key", "value"))
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        scores = np.exp(query[:, part] @ key[:, part].T / math.sqrt(12))
        heads.append(scores / scores.sum(1, keepdims=True) @ value[:, part])
    return linear(np.concatenate(heads, 1), attention.output)


def feed_forward(x, layer):
    return linear(gelu(linear(x, layer.ffn[0])), layer.ffn[2])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_encoder_equals_a_plain_computation(norm):
    model = stir(encoder(norm=norm))
    features = randn(2, 9, 10)
    hidden = model(features)
    for number in range(2):
        x = normalised(linear(features[number].numpy(), model.input), model.input_norm)
        expected = [x]
        for layer in model.layers:
            if norm == "post":
                x = normalised(x + attend(x, layer.attention), layer.attention_norm)
                x = normalised(x + feed_forward(x, layer), layer.ffn_norm)
            else:
                x = x + attend(normalised(x, layer.attention_norm), layer.attention)
                x = x + feed_forward(normalised(x, layer.ffn_norm), layer)
            expected.append(x)
        if norm == "pre":
            expected[-1] = normalised(expected[-1], model.output_norm)
        assert len(hidden) == 3
        for state, values in zip(hidden, expected, strict=True):
            np.testing.assert_allclose(state[number].detach().numpy(), values, rtol=1e-9, atol=1e-10)


def test_norm_states_normalise_what_is_given_and_not_what_layers_hear():
    model, plain = stir(encoder(norm="pre", norm_states=True)), encoder(norm="pre")
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("state_norms.")})
    features = randn(2, 9, 10)
    given, heard = model(features), plain(features)
    for norm, one, other in zip(model.state_norms, given, heard, strict=False):
        assert not one.equal(other)
        np.testing.assert_allclose(one.detach().numpy(), normalised(other.detach().numpy(), norm), rtol=1e-9, atol=1e-10)
    assert given[-1].equal(heard[-1])
    for one, other in zip(model.attention_weights(features), plain.attention_weights(features), strict=True):
        assert one.equal(other)


def test_states_norms_need_no_gradient_until_they_are_asked_for():
    model = encoder(norm="pre", norm_states=True)
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert idle == {f"state_norms.{index}.{part}" for index in (0, 1) for part in ("weight", "bias")}
    model(randn(2, 9, 10))[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_an_encoder_without_them_has_no_states_norms_in_its_checkpoint():
    for norm in ("post", "pre"):
        assert not [name for name in encoder(norm=norm).state_dict() if name.startswith("state_norms")]


def test_norm_eps_reaches_every_norm():
    model = encoder(norm="pre", norm_states=True, norm_eps=0.5)
    assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {0.5}


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_long_inputs_are_encoded_in_the_fewest_equal_chunks(norm):
    positions = {"_target_": "audiot.positions.Sinusoid"}
    model = stir(encoder(norm=norm, positions=positions, chunk_frames=5))
    whole = encoder(norm=norm, positions=positions)
    whole.load_state_dict(model.state_dict())
    lengths, cuts = [12, 5, 6, 1], [[4, 4, 4], [5], [3, 3], [1]]
    features = randn(4, 12, 10)
    hidden = model(features, length_mask(torch.tensor(lengths), 12))
    for number, (length, sizes) in enumerate(zip(lengths, cuts, strict=True)):
        chunks = [whole(chunk[None]) for chunk in features[number, :length].split(sizes)]
        for layer, state in enumerate(hidden):
            expected = torch.cat([chunk[layer][0] for chunk in chunks])
            torch.testing.assert_close(state[number, :length], expected, rtol=1e-9, atol=1e-10)
            assert not state[number, length:].any()
    for one, other in zip(model(features), model(features, torch.ones(4, 12, dtype=torch.bool)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for one, other in zip(model(features[:, :5]), whole(features[:, :5]), strict=True):
        assert one.equal(other)
    with pytest.raises(ValueError, match=r"attention needs at most model\.chunk_frames = 5 frames, found 12"):
        model.attention_weights(features)


def test_reconstruction_head_equals_a_plain_computation():
    torch.manual_seed(0)
    head = stir(ReconstructionHead(24, 10).double())
    hidden = randn(2, 5, 24)
    expected = linear(normalised(gelu(linear(hidden.numpy(), head.dense)), head.norm), head.output)
    np.testing.assert_allclose(head(hidden).detach().numpy(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("share_layers", [False, True])
def test_every_layer_and_the_embedding_give_a_hidden_state(num_layers, share_layers):
    hidden = encoder(num_layers=num_layers, share_layers=share_layers)(randn(2, 7, 10))
    assert [tuple(state.shape) for state in hidden] == [(2, 7, 24)] * (num_layers + 1)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_shared_layers_have_the_parameters_of_one():
    shared, single, deep = encoder(num_layers=4, share_layers=True), encoder(num_layers=1), encoder(num_layers=4)
    assert count(shared) == count(single)
    assert count(deep) == count(single) + 3 * count(single.layer(0))
    stir(shared)
    hidden = shared(randn(2, 7, 10))
    for before, after in pairwise(hidden):
        assert shared.layer(0)(before).equal(after)


@pytest.mark.parametrize("name", names())
def test_layers_share_no_parameter_and_start_differently(name, published_attention):
    model = encoder(num_layers=3, **published_attention(name))
    tensors = [{id(tensor) for tensor in layer.parameters()} for layer in model.layers]
    assert len(set.union(*tensors)) == sum(map(len, tensors))
    first, second = model.layers[0].attention.output.weight, model.layers[1].attention.output.weight
    assert not first.equal(second)


@pytest.mark.parametrize("input_init", ["xavier", "normal"])
def test_linear_layers_start_from_normal_weights_and_zero_biases_but_the_input(input_init):
    model = encoder(input_dim=60, embed_dim=120, ffn_dim=240, input_init=input_init)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name == "input":
                assert module.bias.std().item() == pytest.approx(0.02, rel=0.2)
            else:
                assert not module.bias.any()
            if name != "input" or input_init == "normal":
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
                assert module.weight.abs().max() > 0.05  # has tails
            else:
                bound = math.sqrt(6 / (60 + 120))  # Glorot and Bengio 2010, equation 16
                assert 0.99 * bound < module.weight.abs().max() <= bound
                assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("attention", ["audiot.attention.controls.PositionWise", "audiot.attention.routing.Routing"])
def test_frames_of_zeros_do_not_explode_gradients_where_attention_brings_them_nothing(attention):
    options = {"num_clusters": 1, "cluster_size": 4} if "routing" in attention else {}
    model = encoder(num_layers=4, attention={"_target_": attention, **options})
    features = randn(1, 12, 10)
    features[:, 3:9] = 0  # a masked span
    (model(features)[-1] * randn(1, 12, 24)).sum().backward()
    assert model.input.bias.grad.norm() < 1e4


def test_init_std_and_equal_seeds_rule_the_start():
    model = encoder(init_std=0.1, ffn_dim=400)
    assert model.layers[0].ffn[0].weight.std().item() == pytest.approx(0.1, rel=0.05)
    again, other = encoder(init_std=0.1, ffn_dim=400), encoder(seed=1, init_std=0.1, ffn_dim=400)
    assert all(one.equal(two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    assert not model.input.weight.equal(other.input.weight)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_attention_weights_are_those_that_each_layer_applies(norm):
    model = stir(encoder(norm=norm))
    features = randn(1, 6, 10)
    weights, hidden = model.attention_weights(features), model(features)
    assert [tuple(layer.shape) for layer in weights] == [(1, 2, 6, 6)] * 2
    for layer, matrices, state in zip(model.layers, weights, hidden, strict=False):
        seen = layer.attention_norm(state) if norm == "pre" else state
        value = linear(seen[0].detach().numpy(), layer.attention.value)
        heads = [matrices[0, head].detach().numpy() @ value[:, 12 * head : 12 * head + 12] for head in range(2)]
        expected = linear(np.concatenate(heads, 1), layer.attention.output)
        np.testing.assert_allclose(layer.attention(seen)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_dropout_acts_in_training_alone():
    model = encoder(dropout=0.5)
    features = randn(2, 7, 10)
    assert model(features)[-1].equal(model(features)[-1])
    model.train()
    assert not model(features)[-1].equal(model(features)[-1])


UNIFORM = {"_target_": "audiot.attention.controls.Uniform"}


def test_some_layers_have_another_mechanism():
    model = stir(encoder(num_layers=3, other_attention=UNIFORM, other_layers=[0, 2]))
    assert [type(mechanism).__name__ for mechanism in model.mechanisms] == ["Uniform", "QueryKey", "Uniform"]
    weights = model.attention_weights(randn(1, 5, 10))
    uniform = torch.full((1, 2, 5, 5), 0.2, dtype=torch.float64)
    assert [torch.allclose(each, uniform) for each in weights] == [True, False, True]


def test_a_mechanism_for_no_layer_changes_nothing():
    plainly, beside = encoder(), encoder(other_attention=UNIFORM)
    for one, other in zip(plainly(randn(1, 5, 10)), beside(randn(1, 5, 10)), strict=True):
        assert one.equal(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"other_layers": [1]}, "model.other_layers needs their mechanism: set model.other_attention"),
        (
            {"other_attention": UNIFORM, "other_layers": [2]},
            r"model.other_layers is \[2\]: expected numbers from 0 to 1, each once",
        ),
        ({"other_attention": UNIFORM, "other_layers": [1, 1]}, "expected numbers from 0 to 1, each once"),
        ({"other_attention": UNIFORM, "other_layers": [0], "share_layers": True}, "set model.share_layers=false"),
        ({"norm": "layer"}, "model.norm must be post or pre, found 'layer'"),
        ({"input_init": "zeros"}, "model.input_init must be xavier or normal, found 'zeros'"),
        ({"num_layers": 0}, "model.num_layers must be at least 1, found 0"),
        ({"chunk_frames": 0}, "model.chunk_frames must be at least 1, found 0"),
        ({"norm_states": True}, "model.norm_states=true needs model.norm=pre"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_length_mask_is_none_exactly_where_nothing_is_padded():
    assert length_mask(torch.tensor([4, 4]), 4) is None
    mask = length_mask(torch.tensor([4, 1, 0]), 4)
    assert mask.tolist() == [[True] * 4, [True, False, False, False], [False] * 4]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_and_cpu_encode_alike():
    model = stir(encoder())
    lengths = torch.tensor([12, 5])
    here = model(randn(2, 12, 10), length_mask(lengths, 12))
    there = model.cuda()(randn(2, 12, 10).cuda(), length_mask(lengths, 12, "cuda"))
    for one, other in zip(here, there, strict=True):
        for number, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(other[number, :length].cpu(), one[number, :length], rtol=1e-9, atol=1e-9)
