"""Upstreams: one interface over an encoder, an untrained encoder and plain features."""

from __future__ import annotations

import pytest
import torch

from audiot.checkpoint import AudioEncoder, save_encoder
from audiot.downstream.upstream import (
    EncoderUpstream,
    FeaturesUpstream,
    checkpoint,
    random_encoder,
    rebuild,
    untrained,
)
from audiot.features import LogMel

LENGTHS = torch.tensor([8000, 5000])


def speech():
    return torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1


def same(one, other):
    return one.state_dict().keys() == other.state_dict().keys() and all(
        a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.fixture
def exported(tiny, tmp_path):
    """An encoder with global normalisation, and its folder."""
    torch.manual_seed(5)
    encoder = AudioEncoder(tiny["features"] | {"cmvn": "global"}, tiny["model"]).eval()
    encoder.features.fit([(speech(), LENGTHS)])
    save_encoder(tmp_path / "encoder", encoder)
    return encoder, str(tmp_path / "encoder")


def test_every_upstream_gives_states_of_the_shape_it_announces(tiny, exported):
    upstreams = [
        checkpoint(exported[1]),
        random_encoder(0, exported[1]),
        random_encoder(0, features=tiny["features"], model=tiny["model"]),
        FeaturesUpstream(tiny["features"]),
    ]
    for upstream in upstreams:
        states, lengths = upstream.eval()(speech(), LENGTHS)
        frames = [((length - 400) // 160 + 1) // upstream.stack for length in LENGTHS.tolist()]
        assert lengths.tolist() == frames
        assert states.shape == (upstream.num_states, 2, frames[0], upstream.state_dim)
    assert [(upstream.stack, upstream.num_states, upstream.state_dim) for upstream in upstreams] == [(3, 3, 24)] * 3 + [
        (1, 1, 180)
    ]


def test_checkpoint_gives_the_states_of_the_exported_encoder(exported):
    encoder, folder = exported
    states, lengths = checkpoint(folder)(speech(), LENGTHS)
    expected, expected_lengths = encoder(speech(), LENGTHS)
    assert states.equal(expected)
    assert lengths.equal(expected_lengths)


@pytest.mark.parametrize("context", [1, 3, 9])
def test_features_in_context_equal_a_loop(tiny, context):
    upstream = FeaturesUpstream(tiny["features"], context)
    states, lengths = upstream(speech(), LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        frames, (count,) = LogMel(n_mels=20)(speech()[row : row + 1, :length])  # one utterance, not stacked
        assert lengths[row] == count
        for t in range(int(count)):
            around = torch.zeros(20, context)
            for k in range(context):
                neighbour = t + k - context // 2
                if 0 <= neighbour < count:
                    around[:, k] = frames[0, neighbour]
            torch.testing.assert_close(states[0, row, t].reshape(20, context), around, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [0, 4, -1])
def test_context_must_be_odd(tiny, context):
    with pytest.raises(ValueError, match=f"upstream.context must be an odd number of frames, found {context}"):
        FeaturesUpstream(tiny["features"], context)


def test_global_normalisation_of_features_is_measured(tiny):
    upstream = FeaturesUpstream(tiny["features"], context=1, cmvn="global")
    upstream.fit([(speech(), LENGTHS)])
    states, lengths = upstream(speech(), LENGTHS)
    frames = torch.cat([states[0, row, :length] for row, length in enumerate(lengths.tolist())])
    torch.testing.assert_close(frames.mean(0), torch.zeros(20), rtol=0, atol=1e-4)
    torch.testing.assert_close(frames.std(0), torch.ones(20), rtol=0, atol=1e-4)
    plain = FeaturesUpstream(tiny["features"])
    plain.fit(iter(()))  # nothing to measure


def test_random_encoder_follows_its_seed_alone(tiny, exported):
    def make(seed, path=None):
        return random_encoder(seed, path) if path else random_encoder(seed, features=tiny["features"], model=tiny["model"])

    for path in (None, exported[1]):
        first = make(0, path)
        torch.randn(10)
        assert same(make(0, path), first)
        assert not same(make(1, path), first)
    assert not same(random_encoder(0, exported[1]), checkpoint(exported[1]))  # it has not learned anything


def test_random_encoder_leaves_the_global_generator_alone(tiny):
    torch.manual_seed(3)
    expected = torch.randn(5)
    torch.manual_seed(3)
    random_encoder(0, features=tiny["features"], model=tiny["model"])
    assert torch.randn(5).equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_random_encoder_leaves_the_gpus_generator_alone(tiny):
    torch.manual_seed(3)
    expected = torch.randn(5, device="cuda")
    torch.manual_seed(3)
    random_encoder(0, features=tiny["features"], model=tiny["model"])
    assert torch.randn(5, device="cuda").equal(expected)


def test_random_encoder_takes_global_statistics_from_the_trained_one(tiny, exported):
    encoder, folder = exported
    fresh = random_encoder(0, folder)
    assert fresh.features.cmvn_mean.equal(encoder.features.cmvn_mean)
    assert fresh.features.cmvn_std.equal(encoder.features.cmvn_std)
    with pytest.raises(ValueError, match=r"features.cmvn=global needs upstream.path"):
        random_encoder(0, features=tiny["features"] | {"cmvn": "global"}, model=tiny["model"])


def test_an_untrained_upstream_has_the_shape_and_the_normalisation_and_other_weights(tiny, exported):
    trained = checkpoint(exported[1])
    fresh = untrained(trained, 3)
    assert fresh.config == trained.config
    assert same(fresh, random_encoder(3, exported[1]))
    for (name, one), other in zip(fresh.state_dict().items(), trained.state_dict().values(), strict=True):
        assert one.shape == other.shape
        if ".cmvn_" in name:
            assert one.equal(other)
        elif name.endswith("weight") and one.ndim == 2:  # biases and norms begin alike
            assert not one.equal(other)
    features = FeaturesUpstream(tiny["features"], cmvn="global")
    features.fit([(speech(), LENGTHS)])
    assert same(untrained(features, 0), features)  # there is nothing to train


@pytest.mark.parametrize(("count", "layers"), [(1, [1]), (2, [0, 1])])
def test_the_top_layers_are_the_last_ones(tiny, count, layers):
    upstream = random_encoder(0, features=tiny["features"], model=tiny["model"])
    encoder = upstream.encoder.encoder
    parts = upstream.top(count)
    assert [id(part) for part in parts] == [*(id(encoder.layers[number]) for number in layers), id(encoder.output_norm)]


def test_rebuild_makes_the_same_shape_for_the_weights_to_be_loaded(tiny, exported):
    features = FeaturesUpstream(tiny["features"], context=5, cmvn="global")
    features.fit([(speech(), LENGTHS)])
    for upstream in (checkpoint(exported[1]), features):
        again = rebuild(upstream.config)
        assert type(again) is type(upstream)
        assert again.config == upstream.config
        again.load_state_dict(upstream.state_dict())
        assert again.eval()(speech(), LENGTHS)[0].equal(upstream.eval()(speech(), LENGTHS)[0])


def test_encoder_upstream_is_the_encoder(tiny):
    torch.manual_seed(0)
    encoder = AudioEncoder(tiny["features"], tiny["model"])
    upstream = EncoderUpstream(encoder)
    assert upstream.features is encoder.features
    assert {id(tensor) for tensor in upstream.parameters()} == {id(tensor) for tensor in encoder.parameters()}
