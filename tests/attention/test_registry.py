"""Choosing mechanisms and positions by name."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from audiot.attention import build, command_line, names, parameters
from audiot.attention.search import Chunked, TopK

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


def test_a_search_is_chosen_in_its_own_group(composed):
    assert composed("attention=lsh_simple").attention.search == {"_target_": "audiot.attention.search.TopK", "attended_keys": 32}
    chosen = composed("attention=alsh_sign", "attention/search=chunked", "attention.search.chunk_size=8").attention.search
    assert chosen == {"_target_": "audiot.attention.search.Chunked", "chunk_size": 8, "num_rounds": 1}


@pytest.mark.parametrize(
    ("given", "kind", "sizes"),
    [
        ({}, TopK, {"attended_keys": 32}),
        ({"search": "topk"}, TopK, {"attended_keys": 32}),
        ({"search": {"attended_keys": 5}}, TopK, {"attended_keys": 5}),
        ({"search": "chunked"}, Chunked, {"chunk_size": 64, "num_rounds": 1}),
        ({"search": {"name": "chunked", "num_rounds": 3}}, Chunked, {"chunk_size": 64, "num_rounds": 3}),
    ],
)
def test_build_takes_a_search_by_name_or_as_a_mapping(given, kind, sizes):
    search = build("lsh_simple", 8, 2, 10, **given).mechanism.search
    assert type(search) is kind
    assert {name: getattr(search, name) for name in sizes} == sizes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": "exact"}, "unknown search 'exact': choose one of chunked, topk"),
        (
            {"search": {"name": "topk", "chunk_size": 3}},
            "search 'topk' has no parameter 'chunk_size': choose one of attended_keys",
        ),
        ({"search": 5}, "search is 5: set it to one of chunked, topk, or {name: …, …}"),
        (
            {"attended_keys": 5},
            "the parameter 'attended_keys' of attention 'lsh_simple' is gone: it is now "
            "attention/search=topk attention.search.attended_keys=5",
        ),
    ],
)
def test_a_search_that_there_is_not_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build("lsh_simple", 8, 2, 10, **given)


def test_the_form_of_a_random_synthesizer_is_a_mechanism_now():
    message = "the parameter 'form' of attention 'synthesizer_random' is gone: it is now attention=synthesizer_factorized"
    with pytest.raises(ValueError, match=f"^{message}$"):
        build("synthesizer_random", 8, 2, 10, form="factorized")


def test_plain_parameters_build_the_same_mechanism_again():
    own = parameters("alsh_sign")
    assert own["search"] == {"name": "topk", "attended_keys": 32}
    assert json.loads(json.dumps(own)) == own
    assert repr(build("alsh_sign", 8, 2, 10, **own)) == repr(build("alsh_sign", 8, 2, 10))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({}, {"attention": "lsh_simple"}),
        (
            {"num_bits": 4, "search": "chunked"},
            {"attention": "lsh_simple", "attention.num_bits": 4, "attention/search": "chunked"},
        ),
        ({"search": {"attended_keys": 3}}, {"attention": "lsh_simple", "attention.search.attended_keys": 3}),
        (
            {"search": {"name": "chunked", "chunk_size": 8}},
            {"attention": "lsh_simple", "attention/search": "chunked", "attention.search.chunk_size": 8},
        ),
    ],
)
def test_parameters_have_words_on_the_command_line(composed, overrides, words):
    assert command_line("lsh_simple", overrides) == words
    config = composed(*(f"{key}={value}" for key, value in words.items())).attention
    built = instantiate(config, embed_dim=8, num_heads=2, max_frames=10)
    assert repr(built) == repr(build("lsh_simple", 8, 2, 10, **overrides).mechanism)


def test_names_are_sorted_and_complete():
    assert names() == sorted(names())
    hashing = {"lsh_simple", "alsh_simple", "alsh_xbox", "alsh_xbox_qnf", "alsh_sign", "alsh_sign_qnf"}
    sparse = {"sparse_strided", "sparse_fixed", "local"}
    synthesizers = {f"synthesizer_{kind}" for kind in ("dense", "random", "relative", "factorized", "mixture")}
    assert set(names()) >= hashing | sparse | synthesizers | {"query_key", "shared_query_key", "routing", "none", "uniform"}
    assert "search" not in names()  # a group of parts inside the group


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
        ("lsh_simple", {"search": {"attended_keys": 3.5}}, r"attended_keys is 3\.5: set it to a whole number"),
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
