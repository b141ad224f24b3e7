"""The random synthesizer: initial values, cropping, dropout, the cache."""

from __future__ import annotations

import copy

import pytest
import torch

from audiot.attention import build, patterns
from audiot.attention.patterns import legacy_patterns
from audiot.attention.synthesizer_random import SynthesizerRandom

RHO = 0.1


def mechanism(max_frames=24, num_heads=7, dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    return SynthesizerRandom(4 * num_heads, num_heads, max_frames, dropout, **options)


def values(num_sequences, num_frames, num_heads=7, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_sequences, num_heads, num_frames, 4, generator=generator, dtype=dtype)


def valid_of(lengths, num_frames):
    return torch.arange(num_frames)[None] < torch.tensor(lengths)[:, None]


def floored(num_frames, rho=RHO):
    return {name: (1 - rho) * pattern + rho / num_frames for name, pattern in patterns(num_frames).items()}


def attended(synthesizer, num_frames, valid=None):
    """What the fast form attends to, (B, H, T, T): values are unit vectors, four frames at a time."""
    num_sequences = 1 if valid is None else len(valid)
    blocks = []
    for first in range(0, num_frames, 4):
        unit = torch.zeros(num_frames, 4)
        for column in range(first, min(first + 4, num_frames)):
            unit[column, column - first] = 1
        blocks.append(synthesizer(value=unit.expand(num_sequences, synthesizer.num_heads, -1, -1), valid=valid))
    return torch.cat(blocks, -1)[..., :num_frames]


@pytest.mark.parametrize("max_frames", [1, 2, 3, 24, 100])
def test_handcrafted_heads_start_from_their_patterns(max_frames):
    synthesizer = mechanism(max_frames)
    expected = torch.stack(list(floored(max_frames).values())).float()
    torch.testing.assert_close(synthesizer.logits.softmax(-1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(attended(synthesizer, max_frames)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grad", [True, False])
def test_patterns_follow_each_length_with_anchor_length(grad):
    synthesizer = mechanism(24, anchor="length").train(grad)
    lengths = list(range(1, 25))
    with torch.set_grad_enabled(grad):
        found = attended(synthesizer, 24, valid_of(lengths, 24))
        for length, weights in zip(lengths, found, strict=True):
            expected = torch.zeros(7, 24, 24)
            expected[:, :length, :length] = torch.stack(list(floored(length).values())).float()
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)
            alone = attended(synthesizer, length)[0]
            torch.testing.assert_close(alone, expected[:, :length, :length], rtol=0, atol=1e-6)


def test_cropped_patterns_that_stay_exact_have_a_larger_floor():
    longest, length = 40, 12
    rho = RHO * length / ((1 - RHO) * longest + RHO * length)
    weights = attended(mechanism(longest), length)[0]
    expected = floored(length, rho)
    for head, name in ((0, "current"), (1, "previous"), (3, "left")):
        torch.testing.assert_close(weights[head], expected[name].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights[2, :-1], expected["next"][:-1].float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights[2, -1], torch.full((length,), 1 / length))


def test_legacy_logits_are_the_reference_probabilities():
    synthesizer = mechanism(24, num_heads=9, init="legacy")
    torch.testing.assert_close(synthesizer.logits[:7], legacy_patterns(24).float())
    assert 0.9 < synthesizer.logits[7:].std() < 1.1


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_heads_beyond_the_patterns_start_from_a_normal_distribution(anchor):
    table = mechanism(40, num_heads=10, anchor=anchor).table[7:]
    assert abs(table.mean()) < 0.05
    assert 0.95 < table.std() < 1.05


def test_normal_init_ignores_the_patterns():
    table = mechanism(40, init="normal").logits
    assert abs(table.mean()) < 0.05
    assert 0.95 < table.std() < 1.05


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
@pytest.mark.parametrize("padded", [False, True])
def test_dropout_leaves_the_mean_unbiased(anchor, padded):
    synthesizer = mechanism(6, num_heads=8, dropout=0.4, anchor=anchor).double()
    value = values(2, 6, 8, dtype=torch.float64)
    valid = valid_of([6, 3], 6) if padded else None
    with torch.no_grad():
        draws = torch.stack([synthesizer(value=value, valid=valid) for _ in range(3000)])
        expected = synthesizer.eval()(value=value, valid=valid)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()
    assert draws.std(0).max() > 0.1


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
@pytest.mark.parametrize("padded", [False, True])
def test_one_dropout_mask_serves_the_whole_batch(anchor, padded):
    synthesizer = mechanism(6, dropout=0.5, anchor=anchor)
    value = values(1, 6).expand(3, -1, -1, -1)
    output = synthesizer(value=value, valid=valid_of([4, 4, 4], 6) if padded else None)
    torch.testing.assert_close(output[0], output[1])
    torch.testing.assert_close(output[0], output[2])


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_real_frames_whose_logits_vanish_beside_padding_still_get_attention(anchor):
    synthesizer = mechanism(6, anchor=anchor)
    with torch.no_grad():
        synthesizer.table[:, :, 3:] = 1000.0
    value = values(1, 6)
    output = synthesizer(value=value, valid=valid_of([3], 6))
    assert output.isfinite().all()
    assert (output[:, :, :3].abs() > 0).all()
    output.sum().backward()
    assert synthesizer.table.grad.isfinite().all()


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_half_precision_values_keep_small_exponentials(anchor):
    synthesizer = mechanism(6, anchor=anchor)
    with torch.no_grad():
        synthesizer.table[:, :, 3:] += 30.0  # float16 would round the real frames' exp(-30) to 0
    value, valid = values(1, 6).half(), valid_of([3], 6)
    output = synthesizer(value=value, valid=valid)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), synthesizer(value=value.float(), valid=valid), rtol=2e-3, atol=2e-3)


CHANGES = {
    "in place": lambda synthesizer: synthesizer.table.mul_(0.5),
    "optimiser step": lambda synthesizer: step(synthesizer),
    "load_state_dict": lambda synthesizer: synthesizer.load_state_dict(mechanism_like(synthesizer).state_dict()),
    "load_state_dict assign": lambda synthesizer: synthesizer.load_state_dict(
        {key: entry.clone() for key, entry in mechanism_like(synthesizer).state_dict().items()}, assign=True
    ),
    "dtype round trip": lambda synthesizer: synthesizer.bfloat16().float(),
    "reset": lambda synthesizer: synthesizer.reset_parameters(),
    "new parameter": lambda synthesizer: replace(synthesizer),
    "new data": lambda synthesizer: setattr(synthesizer.table, "data", torch.randn_like(synthesizer.table)),
    "write through data, then eval": lambda synthesizer: (synthesizer.table.data.mul_(0.5), synthesizer.eval()),
}


def mechanism_like(synthesizer):
    return mechanism(12, num_heads=8, anchor=synthesizer.anchor, seed=5)


def step(synthesizer):
    with torch.enable_grad():
        synthesizer.table.square().sum().backward()
    torch.optim.AdamW(synthesizer.parameters(), lr=0.1).step()


def replace(synthesizer):
    name = "delta" if synthesizer.anchor == "length" else "logits"
    setattr(synthesizer, name, torch.nn.Parameter(torch.randn_like(synthesizer.table)))


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_the_cache_never_outlives_a_change_of_the_parameter(anchor, change):
    synthesizer = mechanism(12, num_heads=8, anchor=anchor).eval()
    value = values(2, 9, 8)
    before = synthesizer(value=value)
    change(synthesizer)
    after = synthesizer(value=value)
    with torch.enable_grad():  # never cached
        expected = synthesizer(value=value)
    torch.testing.assert_close(after, expected)
    assert not torch.allclose(before, after, atol=1e-4)


@torch.no_grad()
def test_the_cache_is_used_across_lengths_in_evaluation_only(monkeypatch):
    calls = []
    original = torch.Tensor.exp
    monkeypatch.setattr(torch.Tensor, "exp", lambda tensor: (calls.append(tensor.shape), original(tensor))[1])
    synthesizer = mechanism(12).eval()
    for num_frames, valid in ((12, None), (9, None), (9, valid_of([9, 4], 9))):
        synthesizer(value=values(2, num_frames), valid=valid)
    assert len(calls) == 1
    synthesizer.train()
    for _ in range(2):
        synthesizer(value=values(2, 9), valid=valid_of([9, 4], 9))
    assert len(calls) == 3


def test_a_cache_made_in_inference_mode_does_not_disturb_training():
    synthesizer = mechanism(12).eval()
    with torch.inference_mode():
        expected = synthesizer(value=values(2, 9))
    value = values(2, 9).requires_grad_()
    output = synthesizer(value=value)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    with torch.no_grad():
        torch.testing.assert_close(synthesizer(value=value), expected)


@torch.no_grad()
def test_moving_the_model_frees_the_cache():
    synthesizer = mechanism(12).eval()
    synthesizer(value=values(2, 9))
    assert synthesizer.double()._cache is None


@torch.no_grad()
def test_copies_and_saved_parameters_leave_the_cache_behind():
    synthesizer = mechanism(12).eval()
    synthesizer(value=values(2, 9))
    assert synthesizer._cache is not None
    assert copy.deepcopy(synthesizer)._cache is None
    assert list(synthesizer.state_dict()) == ["logits"]


def test_parameters_made_in_inference_mode_work():
    with torch.inference_mode():
        synthesizer = mechanism(12).eval()
        assert synthesizer(value=values(2, 9)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "handmade"}, "init is 'handmade': set it to one of handcrafted, normal, legacy"),
        ({"anchor": "end"}, "anchor is 'end': set it to one of max_frames, length"),
        ({"init_floor": 0.0}, "init_floor is 0.0: set it above 0"),
        ({"anchor": "length", "init": "normal"}, "anchor=length needs init=handcrafted, but init is normal"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mechanism(**options)


def test_a_table_is_not_loaded_into_the_other_anchor():
    with pytest.raises(RuntimeError, match="delta"):
        mechanism(anchor="length").load_state_dict(mechanism().state_dict())


def test_no_query_and_key_projections_are_built():
    attention = build("synthesizer_random", 28, 7, 24)
    assert {key.split(".")[0] for key in attention.state_dict()} == {"value", "output", "mechanism"}
