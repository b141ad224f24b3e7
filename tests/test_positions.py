"""Positions against slow formulas, and what each promises."""

from __future__ import annotations

import math

import pytest
import torch

from audiot.positions import ALiBi, Learned, NoPositions, RelativeBias, Rotary, Sinusoid


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_frames", [1, 5, 12, 30])  # the stored table holds 12
def test_sinusoids_equal_the_published_formula_at_any_length(num_frames):
    added = Sinusoid(8, 2, 12, scale=0.5)(torch.zeros(2, num_frames, 8, dtype=torch.float64))
    for t in range(num_frames):
        for i in range(4):
            angle = t / 10000 ** (2 * i / 8)
            assert added[1, t, 2 * i].item() == pytest.approx(0.5 * math.sin(angle), abs=1e-6)
            assert added[1, t, 2 * i + 1].item() == pytest.approx(0.5 * math.cos(angle), abs=1e-6)


def test_sinusoids_have_no_state():
    assert not Sinusoid(8, 2, 12).state_dict()


def test_odd_width_of_sinusoids_is_refused():
    with pytest.raises(ValueError, match="need an even embed_dim but it is 9: set it to 10"):
        Sinusoid(9, 3, 12)


def test_learned_positions_add_their_rows_and_train():
    torch.manual_seed(0)
    positions = Learned(8, 2, 12).double()
    hidden = randn(3, 5, 8)
    output = positions(hidden)
    torch.testing.assert_close(output[2, 4], hidden[2, 4] + positions.table[4])
    output.sum().backward()
    torch.testing.assert_close(positions.table.grad.sum(1), torch.tensor([24.0] * 5 + [0.0] * 7, dtype=torch.float64))


def test_learned_positions_refuse_longer_sequences():
    with pytest.raises(ValueError, match=r"sequence has 13 frames but max_frames is 12 .*: raise max_frames, .*"):
        Learned(8, 2, 12)(torch.zeros(1, 13, 8))


@pytest.mark.parametrize("num_frames", [1, 17, 40])
def test_rotation_equals_multiplication_by_complex_numbers(num_frames):
    heads = randn(2, 3, num_frames, 8)
    numbers = torch.view_as_complex(heads.unflatten(-1, (4, 2)).contiguous())
    angle = torch.tensor([[t / 10000 ** (i / 4) for i in range(4)] for t in range(num_frames)], dtype=torch.float64)
    expected = torch.view_as_real(numbers * torch.exp(1j * angle)).flatten(-2)
    torch.testing.assert_close(Rotary(24, 3, 12).rotate(heads), expected)


def test_rotary_scores_depend_on_the_offset_only():
    query, key = (randn(1, 1, 1, 8, seed=seed).expand(1, 1, 30, 8) for seed in (0, 1))
    rotary = Rotary(8, 1, 30)
    scores = (rotary.rotate(query) @ rotary.rotate(key).transpose(-2, -1))[0, 0]
    for offset in range(-29, 30):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[0].std() > 0.1


def test_rotary_angles_stay_exact_in_bfloat16():
    ones = torch.ones(1, 1, 1000, 4, dtype=torch.bfloat16)
    low = Rotary(4, 1, 1000).bfloat16().rotate(ones)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), Rotary(4, 1, 1000).rotate(ones.double()), rtol=0, atol=0.01)


def test_rotary_leaves_the_input_of_the_encoder_alone():
    hidden = randn(2, 5, 8)
    assert Rotary(8, 2, 12)(hidden) is hidden


def test_odd_heads_of_rotary_positions_are_refused():
    with pytest.raises(ValueError, match="even head size but embed_dim 9 / num_heads 3 is 3: set embed_dim to a multiple of 6"):
        Rotary(9, 3, 12)


@pytest.mark.parametrize("positions", [NoPositions, Sinusoid, Learned, ALiBi, RelativeBias])
def test_only_rotary_positions_turn_queries_and_keys(positions):
    heads = randn(2, 2, 5, 4)
    assert positions(8, 2, 12).rotate(heads) is heads


def test_no_positions_do_nothing():
    hidden = randn(2, 5, 8)
    assert NoPositions(8, 2, 12)(hidden) is hidden


@pytest.mark.parametrize("positions", [NoPositions, Sinusoid, Learned, Rotary, ALiBi, RelativeBias])
def test_positions_keep_the_precision_of_their_input(positions):
    module = positions(8, 2, 12)
    assert module(torch.zeros(1, 5, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert module.rotate(torch.zeros(1, 2, 5, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# Slopes as the paper's section 3 and appendix give them: 1/2 … 1/256 for eight heads; twelve heads add every second of sixteen.
SLOPES = {
    1: [2**-8],
    4: [2**-2, 2**-4, 2**-6, 2**-8],
    8: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8],
    12: [*(2**-n for n in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
}


@pytest.mark.parametrize(("num_heads", "slopes"), SLOPES.items())
def test_alibi_falls_with_the_distance_by_the_published_slopes(num_heads, slopes):
    bias = ALiBi(num_heads, num_heads, 10).bias(torch.tensor([[0, 1, 5], [-1, 0, 4]]))
    distance = torch.tensor([[0.0, 1, 5], [1, 0, 4]])
    torch.testing.assert_close(bias, -torch.tensor(slopes)[:, None, None] * distance)


def test_relative_bias_takes_each_heads_value_and_the_end_value_beyond_the_table():
    part = RelativeBias(4, 2, 10, max_offset=2).layer_part()
    with torch.no_grad():
        part.table.copy_(torch.tensor([[-2.0, -1, 0, 1, 2], [10, 11, 12, 13, 14]]))
    offset = torch.tensor([[0, 1, 5], [-1, 0, -7]])
    expected = torch.tensor([[[0.0, 1, 2], [-1, 0, -2]], [[12, 13, 14], [11, 12, 10]]])
    torch.testing.assert_close(part.bias(offset), expected)
    by_head = torch.stack([offset, offset.flip(1)])[None]  # heads may ask for different offsets
    torch.testing.assert_close(part.bias(by_head)[0], torch.stack([expected[0], expected[1].flip(1)]))


def test_relative_bias_starts_at_zero_and_every_layer_has_its_own():
    positions = RelativeBias(8, 2, 12)
    one, other = positions.layer_part(), positions.layer_part()
    assert not list(positions.parameters())
    assert (one.table == 0).all()
    assert one.table is not other.table


def test_relative_bias_without_reach_is_refused():
    with pytest.raises(ValueError, match="max_offset is 0: set it to a whole number of 1 or more"):
        RelativeBias(8, 2, 12, max_offset=0)


@pytest.mark.parametrize(
    ("positions", "options", "message"),
    [
        (Rotary, {"base": -5}, r"positions\.base is -5: set it to a number above 0"),
        (Rotary, {"base": math.nan}, r"positions\.base is nan: set it"),
        (Sinusoid, {"scale": math.inf}, r"positions\.scale is inf: set it to a finite number"),
        (RelativeBias, {"max_offset": 2.5}, r"max_offset is 2\.5: set it to a whole number"),
    ],
)
def test_values_that_mean_nothing_are_refused(positions, options, message):
    with pytest.raises(ValueError, match=message):
        positions(8, 2, 12, **options)
    with pytest.raises(ValueError, match="num_heads is 0: set it to a whole number of 1 or more"):
        positions(8, 0, 12)
