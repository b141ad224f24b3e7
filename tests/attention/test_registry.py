"""Choosing mechanisms and positions by name."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir

from audiot.attention import build, names

PRIMARY = """
defaults:
  - positions: none
  - attention: query_key
  - _self_
hydra:
  searchpath: [pkg://audiot.conf]
"""


@pytest.fixture
def composed(tmp_path):
    (tmp_path / "primary.yaml").write_text(PRIMARY)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield lambda *overrides: compose("primary", overrides=list(overrides))


@pytest.mark.parametrize(
    ("name", "positions"),
    [("query_key", "Rotary"), ("lsh_simple", "Rotary"), ("synthesizer_dense", "Sinusoid"), ("synthesizer_random", "Sinusoid")],
)
def test_a_mechanism_brings_its_best_positions(composed, name, positions):
    config = composed(f"attention={name}")
    assert config.positions._target_ == f"audiot.positions.{positions}"


@pytest.mark.parametrize("name", names())
def test_positions_on_the_command_line_win(composed, name):
    assert composed(f"attention={name}", "positions=learned").positions._target_ == "audiot.positions.Learned"


def test_names_are_sorted_and_complete():
    assert names() == sorted(names())
    hashing = {"lsh_simple", "alsh_simple", "alsh_xbox", "alsh_xbox_qnf", "alsh_sign", "alsh_sign_qnf"}
    sparse = {"sparse_strided", "sparse_fixed", "local"}
    synthesizers = {"synthesizer_dense", "synthesizer_random", "synthesizer_mixture", "local_dense_synthesizer"}
    assert set(names()) >= hashing | sparse | synthesizers | {"query_key", "shared_query_key", "routing", "none", "uniform"}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown attention 'synthesiser_random': did you mean 'synthesizer_random'\?"):
        build("synthesiser_random", 8, 2, 10)


def test_unknown_name_without_a_neighbour_lists_all():
    with pytest.raises(ValueError, match=r"choose one of .*query_key"):
        build("xyz", 8, 2, 10)


def test_unknown_parameter_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"'synthesizer_dense' has no parameter 'bottleneck': did you mean 'bottleneck_dim'"):
        build("synthesizer_dense", 8, 2, 10, bottleneck=3)


def test_overrides_replace_the_yaml_values():
    attention = build("synthesizer_dense", 8, 2, 10, bottleneck_dim=3, dropout=0.25)
    assert attention.mechanism.w1.shape == (2, 8, 3)
    assert attention.mechanism.dropout == 0.25
    assert build("synthesizer_dense", 8, 2, 10).mechanism.dropout == 0.1


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("local", {"window": "8"}, "window is '8': set it to a whole number"),
        ("local", {"window": 2.5}, r"window is 2\.5: set it to a whole number"),
        ("local", {"window": True}, "window is True: set it to a whole number"),
        ("local", {"window": None}, "window is None: set it to a whole number"),
        ("sparse_strided", {"stride": float("nan")}, "stride is nan: set it to a whole number"),
        ("sparse_fixed", {"num_summary": 1.5}, r"num_summary is 1\.5: set it to a whole number"),
        ("lsh_simple", {"attended_keys": 3.5}, r"attended_keys is 3\.5: set it to a whole number"),
        ("alsh_sign", {"max_norm": "x"}, "max_norm is 'x': set it to a number"),
        ("routing", {"cluster_size": 2.5}, r"cluster_size is 2\.5: set it to a whole number"),
        ("routing", {"ema_decay": "x"}, "ema_decay is 'x': set it to a number"),
        ("query_key", {"share_query_key": "false"}, "share_query_key is 'false': set it to true or false"),
        ("synthesizer_dense", {"per_head": "no"}, "per_head is 'no': set it to true or false"),
        ("synthesizer_mixture", {"share_query_key": 1}, "share_query_key is 1: set it to true or false"),
        ("query_key", {"dropout": "0.1"}, r"dropout is '0\.1': set it to a number"),
        ("query_key", {"dropout": float("nan")}, "attention dropout is nan: set it"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_one_line(name, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}.*$"):
        build(name, 8, 2, 10, **overrides)


@pytest.mark.parametrize("name", names())
def test_masks_of_another_kind_or_shape_are_refused(name):
    attention = build(name, 8, 2, 10)
    for valid in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"^valid is torch\.\w+ of shape .*: pass bool, .* of shape \(2, 5\)$"):
            attention(torch.zeros(2, 5, 8), valid)
