"""Every mechanism of the group conf/attention keeps the rules of `audiot.attention.testing`, and has its file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import get_class
from some import some
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import audiot.attention
from audiot.attention import AttentionMechanism, build_mechanism, names
from audiot.attention.testing import (
    EMBED_DIM,
    RULES,
    Subject,
    close,
    compiles_once_for_all_lengths,
    frames,
    holds_no_matrix_of_all_frames,
    valid_of,
)
from audiot.base.groups import read_option


def chunked(**options):
    return {"search": {"name": "chunked", "chunk_size": 2, **options}, "num_bits": 4}


# Beside every mechanism as its file in conf/attention has it, whose blocks and chunks are longer than these sequences.
VARIANTS = [
    ("query_key", {"share_query_key": True}),
    ("local", {"window": 2}),
    ("local", {"window": 3, "share_query_key": True}),
    ("sparse_strided", {"stride": 4}),
    ("sparse_strided", {"stride": 3, "share_query_key": True}),
    ("sparse_fixed", {"block_size": 4}),
    ("sparse_fixed", {"block_size": 5, "num_summary": 2, "share_query_key": True}),
    *[(name, {"search": {"attended_keys": 5}, "num_bits": 16}) for name in names() if "lsh" in name],
    *[(name, chunked()) for name in names() if "lsh" in name],
    ("lsh_simple", chunked(num_rounds=3) | {"share_query_key": True}),
    ("alsh_xbox", chunked(num_rounds=2)),
    ("routing", {"num_clusters": 4, "cluster_size": 5}),
    ("routing", {"num_clusters": 3, "cluster_size": 8, "share_query_key": True}),
    ("synthesizer_dense", {"per_head": False}),
    ("synthesizer_random", {"anchor": "length"}),
    ("synthesizer_factorized", {"rank": 3}),
    ("synthesizer_mixture", {"partner": "query_key"}),
    ("synthesizer_mixture", {"mixture_of": "weights"}),
    ("synthesizer_mixture", {"partner": "query_key", "mixture_of": "weights", "share_query_key": True}),
    ("local_dense_synthesizer", {"context_width": 5}),
]


def cases(*variants):
    """Every mechanism as its file has it, and these."""
    pairs = [(name, {}) for name in names()] + [(name, overrides) for name, overrides in variants if name in names()]
    return [pytest.param(name, overrides, id="-".join([name, *map(str, overrides.values())])) for name, overrides in pairs]


every_mechanism = pytest.mark.parametrize(("name", "overrides"), cases(*VARIANTS))


def subject(name, overrides):
    drops = name != "none"  # a frame's only weight is its own
    anywhere = overrides.get("anchor") != "length"  # patterns that follow the length count from the first frame
    return Subject(partial(build_mechanism, name), overrides, drops, anywhere)


@every_mechanism
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_contract(name, overrides, rule):
    rule(subject(name, overrides))


# One of each kind of graph. The lengths of the test lie on both sides of the blocks and windows of the files.
COMPILED = [
    ("sparse_strided", {"stride": 3, "share_query_key": True}),
    ("lsh_simple", chunked(num_rounds=3) | {"share_query_key": True}),
    ("routing", {"num_clusters": 3, "cluster_size": 8, "share_query_key": True}),
    ("synthesizer_dense", {"per_head": False}),
    ("synthesizer_random", {"anchor": "length"}),
    ("synthesizer_factorized", {"rank": 3}),
    ("synthesizer_mixture", {"partner": "query_key", "mixture_of": "weights", "share_query_key": True}),
]


# Each differs from another in how it transforms frames, or in what its weights are made of.
OF_A_KIND = [
    *[name for name in names() if name.startswith("alsh_")][1:],
    *(
        "local_dense_synthesizer",
        "none",
        "shared_query_key",
        "sparse_fixed",
        "synthesizer_factorized",
        "synthesizer_mixture",
        "synthesizer_relative",
        "uniform",
    ),
]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param(*case.values, id=case.id, marks=[pytest.mark.slow] if case.values[1] or case.values[0] in OF_A_KIND else [])
        for case in cases(*COMPILED)
    ],
)
def test_compiles_without_graph_breaks_and_a_few_times_for_all_lengths(name, overrides):
    if "lsh" in name:
        overrides = {"num_bits": 16, **overrides}  # a step of the graph for every bit
    compiles_once_for_all_lengths(subject(name, overrides))


@pytest.mark.parametrize("name", ["lsh_simple", "routing"])  # routing computes less there
def test_compiles_for_evaluation_too(name):
    compiles_once_for_all_lengths(subject(name, {"num_bits": 16} if "lsh" in name else {}), training=False)


CHEAP = [(name, {}) for name in names() if build_mechanism(name, 16, 2, 64).subquadratic]
CHEAP_SEARCHES = [  # of hashing
    ("lsh_simple", {"search": "chunked"}),
    ("lsh_simple", {"search": {"name": "chunked", "num_rounds": 2}}),
    ("alsh_xbox", {"search": "chunked"}),
]


@pytest.mark.parametrize(("name", "overrides"), [*CHEAP, *CHEAP_SEARCHES])
def test_cheap_mechanisms_hold_no_matrix_of_all_frames_by_all_frames(name, overrides):
    holds_no_matrix_of_all_frames(subject(name, overrides))


def replace(attention):
    for module in attention.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(0.9 * parameter))


def fused_step(attention):
    for parameter in attention.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(attention.parameters(), lr=0.1, fused=True).step()


def each(write):
    """Write every parameter and every buffer."""

    def change(attention):
        for tensor in (*attention.parameters(), *attention.buffers()):
            if tensor.is_floating_point():
                write(tensor)

    return change


def shrunk(attention):
    return {name: 0.9 * tensor if tensor.is_floating_point() else tensor for name, tensor in attention.state_dict().items()}


WAYS_TO_WRITE = {
    "in place": each(lambda tensor: tensor.mul_(0.9)),
    "through a view": each(lambda tensor: tensor.view(-1).copy_(0.9 * tensor.flatten())),
    "through data": each(lambda tensor: tensor.data.mul_(0.9)),
    "other data": each(lambda tensor: setattr(tensor, "data", 0.9 * tensor)),
    "through an array": each(lambda tensor: np.multiply(tensor.detach().numpy(), 0.9, out=tensor.detach().numpy())),
    "another parameter": replace,
    "state dict": lambda attention: attention.load_state_dict(shrunk(attention)),
    "assigned state dict": lambda attention: attention.load_state_dict(shrunk(attention), assign=True),
    "vector": lambda attention: vector_to_parameters(0.9 * parameters_to_vector(attention.parameters()), attention.parameters()),
    "fused optimiser": fused_step,
    "other precision": lambda attention: attention.bfloat16().double(),
    "in inference mode": torch.inference_mode()(each(lambda tensor: tensor.data.mul_(0.9))),
}


@every_mechanism
@pytest.mark.parametrize("padded", some([False, True], [True]))
@torch.no_grad()
def test_evaluation_sees_every_way_of_writing_parameters_and_buffers(name, overrides, padded):
    attention = subject(name, overrides).layer().eval()
    hidden, valid = frames(2, 9, EMBED_DIM), valid_of([9, 4], 9) if padded else None
    for way, write in WAYS_TO_WRITE.items():
        before = attention(hidden, valid)
        write(attention)
        fresh = subject(name, overrides).layer(seed=1).eval()
        fresh.load_state_dict(attention.state_dict())
        after = attention(hidden, valid)
        assert not torch.allclose(after, before, rtol=1e-4), way
        torch.testing.assert_close(after, fresh(hidden, valid), rtol=1e-10, atol=1e-12, msg=way)
    fresh.load_state_dict(shrunk(attention))
    called = torch.func.functional_call(attention, shrunk(attention), (hidden, valid))
    torch.testing.assert_close(called, fresh(hidden, valid), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("overrides", [{}, {"anchor": "length"}], ids=str)
@pytest.mark.parametrize("num_heads", [1, 2, 4, 5, 6, 7])
def test_random_synthesizer_works_with_any_number_of_heads(num_heads, overrides):
    attention = subject("synthesizer_random", overrides).layer(num_heads=num_heads).eval()
    hidden = frames(2, 9, attention.embed_dim)
    valid = valid_of([9, 4], 9)
    close(attention(hidden, valid), attention.reference(hidden, valid))


def targets():
    return {name: read_option("attention", name)["_target_"] for name in names()}


def mechanisms():
    """All concrete mechanisms defined in the package."""
    found = set()
    for module in pkgutil.iter_modules(audiot.attention.__path__, "audiot.attention."):
        if module.name != "audiot.attention.huggingface":  # adapters; needs an extra
            members = vars(importlib.import_module(module.name)).values()
            found |= {member for member in members if inspect.isclass(member) and issubclass(member, AttentionMechanism)}
    return {mechanism for mechanism in found if not inspect.isabstract(mechanism)}


def test_every_yaml_has_a_mechanism():
    for name, target in targets().items():
        assert get_class(target) in mechanisms(), f"conf/attention/{name}.yaml names {target}, which is no mechanism"


def test_every_mechanism_has_a_yaml():
    configured = {get_class(target) for target in targets().values()}
    missing = {mechanism.__name__ for mechanism in mechanisms() - configured}
    assert not missing, f"mechanisms without a file in conf/attention: {sorted(missing)}"


@pytest.mark.parametrize("name", names())
def test_yaml_lists_every_own_parameter_and_no_other(name):
    config = read_option("attention", name)
    parameters = list(inspect.signature(get_class(config["_target_"])).parameters)
    assert parameters[:3] == ["embed_dim", "num_heads", "max_frames"]
    parts = {group for default in config["defaults"] for group in default if "/" not in group}  # of groups inside this one
    assert set(config) - {"defaults", "_target_"} | parts == set(parameters[3:])
