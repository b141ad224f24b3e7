"""Words of version 1: what the command line says in their place, and mechanisms of saved files in today's words."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate

from audiot.attention import translate_v1
from audiot.base.former import instead, translate_record

RANDOM = "audiot.attention.synthesizer_random.SynthesizerRandom"
LSH = "audiot.attention.lsh"
# As version 1 wrote them: every parameter of its file in conf/attention.
OF_RANDOM = {"dropout": 0.1, "form": "full", "rank": 8, "init": "handcrafted", "init_floor": 0.2, "anchor": "max_frames"}
OF_LSH = {
    "dropout": 0.1,
    "share_query_key": False,
    "search": "topk",
    "attended_keys": 5,
    "num_bits": 16,
    "chunk_size": 8,
    "num_rounds": 1,
}
SIZES = {"embed_dim": 12, "num_heads": 2, "max_frames": 7}  # 2 heads of 6
# Target and parameters of version 1 → the same today, and the shapes of what version 1 saved.
SAVED = [
    (
        RANDOM,
        OF_RANDOM,
        RANDOM,
        {"dropout": 0.1, "init": "handcrafted", "init_floor": 0.2, "anchor": "max_frames"},
        {"logits": (2, 7, 7)},
    ),
    (
        RANDOM,
        OF_RANDOM | {"anchor": "length"},
        RANDOM,
        {"dropout": 0.1, "init": "handcrafted", "init_floor": 0.2, "anchor": "length"},
        {"delta": (2, 7, 7)},
    ),
    (
        RANDOM,
        OF_RANDOM | {"form": "relative", "init": "normal"},
        "audiot.attention.synthesizer_relative.SynthesizerRelative",
        {"dropout": 0.1, "init": "normal", "init_floor": 0.2},
        {"offsets": (2, 13), "columns": (2, 7)},
    ),
    (
        RANDOM,
        OF_RANDOM | {"form": "factorized", "init": "normal", "rank": 3},
        "audiot.attention.synthesizer_factorized.SynthesizerFactorized",
        {"dropout": 0.1, "rank": 3},
        {"left": (2, 7, 3), "right": (2, 7, 3)},
    ),
    (RANDOM, {}, RANDOM, {}, {"logits": (2, 7, 7)}),
    (
        f"{LSH}.SimpleLSH",
        OF_LSH,
        f"{LSH}.SimpleLSH",
        {
            "dropout": 0.1,
            "share_query_key": False,
            "num_bits": 16,
            "search": {"_target_": "audiot.attention.search.TopK", "attended_keys": 5},
        },
        {"projections": (2, 7, 16)},
    ),
    (
        f"{LSH}.SignALSH",
        OF_LSH | {"search": "chunked", "num_rounds": 3, "num_terms": 4, "max_norm": 0.5},
        f"{LSH}.SignALSH",
        {
            "dropout": 0.1,
            "share_query_key": False,
            "num_bits": 16,
            "search": {"_target_": "audiot.attention.search.Chunked", "chunk_size": 8, "num_rounds": 3},
            "num_terms": 4,
            "max_norm": 0.5,
        },
        {"projections": (2, 10, 24)},
    ),
    (f"{LSH}.XBOX", {"dropout": 0.1}, f"{LSH}.XBOX", {"dropout": 0.1}, {"projections": (2, 7, 64)}),
    (
        f"{LSH}.XBOX",
        {"chunk_size": 8},
        f"{LSH}.XBOX",
        {"search": {"_target_": "audiot.attention.search.TopK"}},
        {"projections": (2, 7, 64)},
    ),
    (
        "audiot.attention.local.Local",
        {"dropout": 0.1, "window": 3, "share_query_key": True},
        "audiot.attention.local.Local",
        {"dropout": 0.1, "window": 3, "share_query_key": True},
        {},
    ),
    (
        "audiot.attention.synthesizer_mixture.SynthesizerMixture",
        {"partner": "query_key", "mixture_of": "weights"},
        "audiot.attention.synthesizer_mixture.SynthesizerMixture",
        {"partner": "query_key", "mixture_of": "weights"},
        {"balance": (2, 2), "random.logits": (2, 7, 7)},
    ),
]


@pytest.mark.parametrize(("target", "old", "new_target", "new", "shapes"), SAVED)
def test_a_mechanism_of_version_1_is_todays_with_the_tensors_of_version_1(target, old, new_target, new, shapes):
    before = dict(old)
    assert translate_v1(target, old) == (new_target, new)
    assert old == before
    mechanism = instantiate({"_target_": new_target, **new}, **SIZES)
    mechanism.load_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(("target", "old", "new_target", "new", "shapes"), SAVED)
def test_todays_words_stay_as_they_are(target, old, new_target, new, shapes):
    assert translate_v1(new_target, new) == (new_target, new)


@pytest.mark.parametrize(
    ("name", "old", "new_name", "new"),
    [
        (
            "synthesizer_random",
            OF_RANDOM | {"form": "relative"},
            "synthesizer_relative",
            {"dropout": 0.1, "init": "handcrafted", "init_floor": 0.2},
        ),
        (
            "lsh_simple",
            OF_LSH,
            "lsh_simple",
            {"dropout": 0.1, "share_query_key": False, "num_bits": 16, "search": {"name": "topk", "attended_keys": 5}},
        ),
        ("lsh_simple", {"search": {"name": "chunked"}}, "lsh_simple", {"search": {"name": "chunked"}}),
        ("query_key", {"dropout": 0.1}, "query_key", {"dropout": 0.1}),
    ],
)
def test_a_mechanism_that_is_recorded_by_name_is_todays(name, old, new_name, new):
    assert translate_record(name, old) == (new_name, new)


@pytest.mark.parametrize(
    ("target", "old", "message"),
    [
        (RANDOM, {"form": "sparse"}, "form is 'sparse': expected one of full, relative, factorized"),
        (f"{LSH}.XBOX", {"search": "exact"}, "search is 'exact': expected one of topk, chunked"),
    ],
)
def test_words_that_version_1_did_not_have_are_refused(target, old, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        translate_v1(target, old)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.form", "full", "attention=synthesizer_random"),
        ("+attention.form", "relative", "attention=synthesizer_relative"),
        ("attention.form", "dense", "attention=synthesizer_random|synthesizer_relative|synthesizer_factorized"),
        ("attention.search", "topk", "attention/search=topk"),
        ("attention.attended_keys", "8", "attention/search=topk attention.search.attended_keys=8"),
        ("attention.num_rounds", "2", "attention/search=chunked attention.search.num_rounds=2"),
        ("attention.window", "2", None),
        ("attention.search.attended_keys", "2", None),
        ("model.form", "full", None),
        ("form", "full", None),
    ],
)
def test_the_command_line_has_new_words_for_old_ones(key, value, words):
    assert instead(key, value) == words
