"""Pictures of attention: weights, chosen keys, tables untrained and trained."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import audiot.attention
import audiot.commands.launch  # registers the config's resolvers
from audiot.base.framing import SpectrogramScale
from audiot.checkpoint import AudioEncoder
from audiot.commands.analyze import begins_from_seed, draw_attention, draw_tables
from audiot.model import Encoder
from audiot.pretraining import build
from audiot.training.trainer import make_trainer

SCALE = SpectrogramScale(0.0, 0.01)


@pytest.fixture
def drawn(monkeypatch):
    """Figures by the name of their file."""
    figures = {}
    monkeypatch.setattr("audiot.analysis.plots._save", lambda figure, path: figures.update({path.name: figure}))
    return figures


def encoder(name, *overrides, seed=0):
    torch.manual_seed(seed)
    with initialize_config_module("audiot.conf", version_base="1.3"):
        options = OmegaConf.to_container(compose("pretrain", [f"attention={name}", *overrides]).attention)
    positions = {"_target_": "audiot.positions.NoPositions"}
    sizes = {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 24, "max_frames": 12}
    return Encoder(6, attention=options, positions=positions, **sizes).eval()


def draw(trained, untrained, folder):
    """Draw ten frames of noise."""
    draw_attention(untrained, trained, torch.randn(1, 10, 6), torch.randn(10, 6), SCALE, "UTT", folder)


def images(figure: Figure, columns: int):
    """Maps by row and column, without the row of spectrograms."""
    rows = np.reshape(figure.axes, (-1, columns))
    return [[axis.images[0].get_array() for axis in row] for row in rows if row[0].images]


@torch.no_grad()
@pytest.mark.parametrize("name", ["lsh_simple", "routing"])
def test_chosen_keys_are_drawn_beside_the_weights(tmp_path, drawn, name):
    small = {
        "lsh_simple": ["attention.search.attended_keys=3"],
        "routing": ["attention.num_clusters=3", "attention.cluster_size=4"],
    }
    draw(encoder(name, *small[name]), encoder(name, *small[name], seed=1), tmp_path)
    weights, keys = images(drawn["attention.png"], 4), images(drawn["attention-keys.png"], 4)
    assert len(keys) == len(weights) == 4  # two layers, trained and untrained
    for shown, chosen in zip(weights, keys, strict=True):
        for matrix, mask in zip(shown, chosen, strict=True):
            assert 0 < mask.mean() < 1
            assert (matrix[mask == 0] == 0).all()
            if name == "lsh_simple":
                assert (mask.sum(1) == 3).all()


@torch.no_grad()
def test_mechanisms_that_choose_nothing_have_no_picture_of_keys(tmp_path, drawn):
    draw(encoder("query_key"), encoder("query_key", seed=1), tmp_path)
    assert set(drawn) == {"attention.png"}


@torch.no_grad()
def test_tables_are_drawn_untrained_and_trained_under_the_names_of_their_patterns(tmp_path, drawn):
    before, after = encoder("synthesizer_random"), encoder("synthesizer_random")
    after.layer(1).attention.mechanism.logits[2, 5, 7] += 3
    draw_tables(before, after, SCALE, tmp_path / "patterns.png")
    start, first, second = images(drawn["patterns.png"], 4)
    pattern = audiot.attention.patterns(12)
    for image, name in zip(start, ("current", "previous", "next", "left"), strict=True):
        np.testing.assert_allclose(image**2, 0.9 * pattern[name] + 0.1 / 12, rtol=1e-5)
    np.testing.assert_allclose(first, start)
    assert second[2][5, 7] > start[2][5, 7]
    titles = [axis.get_title() for axis in drawn["patterns.png"].axes[:4]]
    assert titles == ["head 1: current", "head 2: previous", "head 3: next", "head 4: left"]
    rows = [axis.get_ylabel() for axis in drawn["patterns.png"].axes[::4]]
    assert rows == ["untrained", "layer 1", "layer 2"]


@torch.no_grad()
def test_names_of_rows_tell_the_trained_model_from_the_untrained_one(tmp_path, drawn):
    untrained, trained = (encoder("lsh_simple", "attention.search.attended_keys=3", seed=seed) for seed in (0, 1))
    tokens, frames = torch.randn(1, 10, 6), torch.randn(10, 6)
    draw_attention(untrained, trained, tokens, frames, SCALE, "UTT", tmp_path)
    rows = [axis.get_ylabel() for axis in drawn["attention.png"].axes[::4]]
    assert rows == ["channel", "layer 1\ntrained", "layer 1\nuntrained", "layer 2\ntrained", "layer 2\nuntrained"]
    shown = images(drawn["attention.png"], 4)
    for row, (model, layer) in zip(shown, ((trained, 0), (untrained, 0), (trained, 1), (untrained, 1)), strict=True):
        np.testing.assert_allclose(np.stack(row) ** 2, model.attention_weights(tokens)[layer][0], rtol=1e-5, atol=1e-7)
    assert "30% trained, 30% untrained" in drawn["attention-keys.png"].get_suptitle()


def test_the_seed_makes_the_encoder_that_a_run_began_with(tmp_path):
    """Tables without a pattern are compared with it."""
    given = ["attention=synthesizer_random", "model.embed_dim=48", "model.num_heads=12", "trainer.accelerator=cpu", "seed=3"]
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose("pretrain", [*given, f"run_dir={tmp_path}"])
        pl.seed_everything(cfg.seed, verbose=False)  # as `audiot pretrain` does it
        make_trainer(cfg)
        module = build(cfg)
    torch.manual_seed(3)
    fresh = AudioEncoder(**module.model.config)
    began = module.model.state_dict()
    assert all(torch.equal(value, began[name]) for name, value in fresh.state_dict().items())
    assert begins_from_seed(cfg)
    assert not begins_from_seed(OmegaConf.merge(cfg, {"init": "RUN/encoder"}))
    assert not begins_from_seed(OmegaConf.merge(cfg, {"objective": {"rounds": 2}}))
