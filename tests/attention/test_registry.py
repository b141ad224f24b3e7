"""Choosing mechanisms and positions by name."""

from __future__ import annotations

import pytest
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
