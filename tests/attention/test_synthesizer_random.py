"""The random synthesizers: initial values, cropping, dropout, precision."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from audiot.attention import build, patterns
from audiot.attention.patterns import legacy_patterns, offset_patterns
from audiot.attention.synthesizer_factorized import SynthesizerFactorized
from audiot.attention.synthesizer_random import SynthesizerRandom
from audiot.attention.synthesizer_relative import SynthesizerRelative
from audiot.training.optimization import parameter_groups

RHO = 0.1
FORMS = [{}, {"anchor": "length"}, {"kind": SynthesizerRelative}, {"kind": SynthesizerFactorized}]
FOLDED = FORMS[:3]  # the batch in the columns of one product
every_form = pytest.mark.parametrize("options", FORMS, ids=str)
folded_forms = pytest.mark.parametrize("options", FOLDED, ids=str)


def mechanism(max_frames=24, num_heads=7, dropout=0.0, seed=0, kind=SynthesizerRandom, **options):
    torch.manual_seed(seed)
    return kind(4 * num_heads, num_heads, max_frames, dropout, **options)


def relative(*args, **options):
    return mechanism(*args, kind=SynthesizerRelative, **options)


def factorized(*args, **options):
    return mechanism(*args, kind=SynthesizerFactorized, **options)


def table(synthesizer):
    (only,) = synthesizer.parameters()
    return only


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


@pytest.mark.parametrize("left_out", ["current", "previous", "next", "left", "right", "start", "end"])
def test_a_pattern_that_is_left_out_leaves_its_head_to_a_normal_distribution(left_out):
    synthesizer = mechanism(40, num_heads=8, init=f"without_{left_out}")
    for logits, (name, expected) in zip(synthesizer.logits, floored(40).items(), strict=False):
        if name == left_out:
            assert abs(logits.mean()) < 0.1
            assert 0.9 < logits.std() < 1.1
        else:
            torch.testing.assert_close(logits.softmax(-1), expected.float(), rtol=0, atol=1e-6)
    assert left_out not in synthesizer.head_names
    assert len(synthesizer.head_names) == 7


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
    beyond = table(mechanism(40, num_heads=10, anchor=anchor))[7:]
    assert abs(beyond.mean()) < 0.05
    assert 0.95 < beyond.std() < 1.05


def test_normal_init_ignores_the_patterns():
    logits = mechanism(40, init="normal").logits
    assert abs(logits.mean()) < 0.05
    assert 0.95 < logits.std() < 1.05


def relative_rows(by_offset, num_frames):
    """Rows of a function of the offset (2T − 1,), floored and normalised over the frames that exist."""
    rows = torch.stack([by_offset[num_frames - 1 - i : 2 * num_frames - 1 - i] for i in range(num_frames)])
    rows = (1 - RHO) * rows + RHO / num_frames
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("max_frames", [1, 2, 3, 24])
def test_relative_form_starts_from_the_patterns_by_offset(max_frames):
    found = attended(relative(max_frames), max_frames)[0]
    for head, by_offset in enumerate(offset_patterns(max_frames).values()):
        expected = relative_rows(by_offset, max_frames).float()
        torch.testing.assert_close(found[head], expected, rtol=0, atol=1e-6)
    for head, name in ((5, "start"), (6, "end")):
        torch.testing.assert_close(found[head], floored(max_frames)[name].float(), rtol=0, atol=1e-6)


def test_relative_form_is_exact_away_from_the_ends():
    num_frames = 24
    found, expected = attended(relative(num_frames), num_frames)[0], floored(num_frames)
    for head, name, rows in (
        (0, "current", slice(None)),
        (1, "previous", slice(1, None)),
        (2, "next", slice(-1)),
        (3, "left", slice(-1, None)),
        (4, "right", slice(1)),
        (5, "start", slice(None)),
        (6, "end", slice(None)),
    ):
        torch.testing.assert_close(found[head][rows], expected[name][rows].float(), rtol=0, atol=1e-6)
    for head, row in ((1, 0), (2, -1)):
        torch.testing.assert_close(found[head][row], torch.full((num_frames,), 1 / num_frames))


@pytest.mark.parametrize("num_frames", [1, 3, 8, 9, 21])
def test_relative_logits_equal_a_loop_at_any_length_with_gradients(num_frames):
    synthesizer = relative(8, num_heads=2, init="normal").double()
    with torch.no_grad():
        synthesizer.columns.normal_()
    offsets, columns = synthesizer.offsets, synthesizer.columns
    rows = [
        [offsets[:, max(-7, min(7, j - i)) + 7] + columns[:, min(j, 7)] for j in range(num_frames)] for i in range(num_frames)
    ]
    expected = torch.stack([torch.stack(row, -1) for row in rows], -2).softmax(-1)  # H, T, T
    value = values(3, num_frames, 2, dtype=torch.float64)
    output = synthesizer(value=value)
    torch.testing.assert_close(output, expected @ value)
    torch.testing.assert_close(synthesizer.weights(hidden=torch.zeros(1, num_frames, 8))[0], expected)
    direction = torch.randn_like(output)
    found = torch.autograd.grad(output, [offsets, columns], direction)
    for one, other in zip(found, torch.autograd.grad(expected @ value, [offsets, columns], direction), strict=True):
        torch.testing.assert_close(one, other)


def test_relative_heads_beyond_the_patterns_and_normal_init_draw_the_offsets():
    for offsets, columns in (
        (relative(200, num_heads=12).offsets[7:], relative(200, num_heads=12).columns[7:]),
        (relative(200, init="normal").offsets, relative(200, init="normal").columns),
    ):
        assert abs(offsets.mean()) < 0.1
        assert 0.95 < offsets.std() < 1.05
        assert (columns == 0).all()


@pytest.mark.parametrize(("rank", "num_frames"), [(1, 5), (8, 12), (11, 9)])  # below, at and beyond a multiple of 8
@pytest.mark.parametrize("padded", [False, True])
def test_factorized_form_equals_the_explicit_product(rank, num_frames, padded):
    synthesizer = factorized(24, rank=rank).double()
    value = values(2, num_frames, dtype=torch.float64)
    lengths = [num_frames, num_frames // 2] if padded else [num_frames] * 2
    output = synthesizer(value=value, valid=valid_of(lengths, num_frames) if padded else None)
    for sequence, length in enumerate(lengths):
        for head in range(7):
            for frame in range(length):
                left, right = synthesizer.left[head, frame], synthesizer.right[head, :length]
                row = torch.stack([sum(left[r] * other[r] for r in range(rank)) for other in right]).softmax(0)
                torch.testing.assert_close(output[sequence, head, frame], row @ value[sequence, head, :length])


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_factorized_logits_start_with_variance_one(rank):
    synthesizer = factorized(60, num_heads=40, rank=rank)
    logits = synthesizer.left @ synthesizer.right.transpose(1, 2)
    assert abs(logits.mean()) < 0.05
    assert 0.9 < logits.var() < 1.1
    assert synthesizer.left.shape == synthesizer.right.shape == (40, 60, rank)


@every_form
def test_no_parameter_decays(options):
    (group,) = parameter_groups(mechanism(**options), weight_decay=0.1)
    assert group["weight_decay"] == 0


@every_form
@pytest.mark.parametrize("padded", [False, True])
def test_dropout_leaves_the_mean_unbiased(options, padded):
    synthesizer = mechanism(6, num_heads=8, dropout=0.4, **options).double()
    value = values(2, 6, 8, dtype=torch.float64)
    valid = valid_of([6, 3], 6) if padded else None
    with torch.no_grad():
        draws = torch.stack([synthesizer(value=value, valid=valid) for _ in range(400)])
        expected = synthesizer.eval()(value=value, valid=valid)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()
    assert draws.std(0).max() > 0.1


@folded_forms
@pytest.mark.parametrize("padded", [False, True])
def test_one_dropout_mask_serves_the_whole_batch(options, padded):
    synthesizer = mechanism(6, dropout=0.5, **options)
    value = values(1, 6).expand(3, -1, -1, -1)
    output = synthesizer(value=value, valid=valid_of([4, 4, 4], 6) if padded else None)
    torch.testing.assert_close(output[0], output[1])
    torch.testing.assert_close(output[0], output[2])


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_real_frames_whose_logits_vanish_beside_padding_still_get_attention(anchor):
    synthesizer = mechanism(6, anchor=anchor)
    with torch.no_grad():
        table(synthesizer)[:, :, 3:] = 1000.0
    value = values(1, 6)
    output = synthesizer(value=value, valid=valid_of([3], 6))
    assert output.isfinite().all()
    assert (output[:, :, :3].abs() > 0).all()
    output.sum().backward()
    assert table(synthesizer).grad.isfinite().all()


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_real_frames_far_below_padding_keep_their_proportions(anchor):
    synthesizer = mechanism(6, anchor=anchor)
    with torch.no_grad():
        table(synthesizer)[:, :, 3:] += 15.0
    value, valid = values(1, 6), valid_of([3], 6)
    expected = synthesizer.weights(hidden=torch.zeros(1, 6, 28), valid=valid) @ value
    torch.testing.assert_close(synthesizer(value=value, valid=valid)[:, :, :3], expected[:, :, :3])


@pytest.mark.parametrize("anchor", ["max_frames", "length"])
def test_half_precision_values_keep_small_exponentials(anchor):
    synthesizer = mechanism(6, anchor=anchor)
    with torch.no_grad():
        table(synthesizer)[:, :, 3:] += 30.0  # float16 would round the real frames' exp(-30) to 0
    value, valid = values(1, 6).half(), valid_of([3], 6)
    output = synthesizer(value=value, valid=valid)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), synthesizer(value=value.float(), valid=valid), rtol=2e-3, atol=2e-3)


class Shapes(TorchDispatchMode):
    """Notes the sizes of the float32 tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.float32 = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.float32.append(tensor.numel())
        return result


class Sizes(TorchDispatchMode):
    """Notes the sizes of all tensors that operations make."""

    def __init__(self):
        super().__init__()
        self.numel = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel += [tensor.numel() for tensor in (result,) if isinstance(tensor, torch.Tensor)]
        return result


@every_form
@pytest.mark.parametrize("padded", [False, True])
def test_training_in_bfloat16_makes_no_float32_copy_of_the_values(options, padded):
    synthesizer = mechanism(12, num_heads=7, **options)
    value = values(50, 12, dtype=torch.bfloat16).requires_grad_()
    with Shapes() as made:
        synthesizer(value=value, valid=valid_of([12] * 49 + [5], 12) if padded else None).sum().backward()
    # Tables are float32; what the batch multiplies is not. On CPUs, fused attention of bfloat16 computes in float32 itself.
    assert max(made.float32) < value.numel() / 2 or options.get("kind") is SynthesizerFactorized


@pytest.mark.parametrize("spread", [1, 10, 15])
def test_sharp_tables_are_exact_cropped_and_padded(spread):
    synthesizer = mechanism(60, num_heads=1, init="normal").double().eval()
    value, junk = values(1, 20, 1).double(), 5 * values(1, 30, 1).double()
    with torch.no_grad():
        synthesizer.logits.copy_((spread * torch.randn_like(synthesizer.logits)).clamp(-39, 39))  # 78 apart at most
        plain = synthesizer.weights(hidden=torch.zeros(1, 20, 4)) @ value
        torch.testing.assert_close(synthesizer(value=value), plain, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(synthesizer(value=value), plain, rtol=1e-10, atol=1e-12)
    padded = synthesizer(value=torch.cat([value, junk], dim=2), valid=torch.arange(50)[None] < 20)
    torch.testing.assert_close(padded[:, :, :20], plain, rtol=1e-10, atol=1e-12)
    assert torch.autograd.grad(padded[:, :, :20].sum(), synthesizer.logits)[0].isfinite().all()


@torch.no_grad()
def test_logits_outside_the_crop_do_not_count_in_evaluation():
    synthesizer = mechanism(60, num_heads=1, init="normal").double().eval()
    synthesizer.logits[:, :, 20:] += 200
    value = values(1, 20, 1, dtype=torch.float64)
    expected = synthesizer.logits[:, :20, :20].softmax(-1) @ value
    torch.testing.assert_close(synthesizer(value=value), expected, rtol=1e-10, atol=1e-12)


def test_relative_form_makes_no_matrix_at_construction():
    with Sizes() as made:
        relative(100)
    assert max(made.numel) < 100 * 100


def test_left_padding_is_refused_where_patterns_follow_the_length():
    with pytest.raises(ValueError, match=r"^anchor=length needs real frames before padded ones: pad at the end, or set .*$"):
        mechanism(12, anchor="length")(value=values(1, 5), valid=torch.tensor([[False, True, True, True, True]]))


@torch.no_grad()
def test_sequences_beyond_the_table_of_offsets_are_exact():
    synthesizer = relative(12, init="normal").eval()
    for num_frames in (5, 20, 5, 15):
        value = values(2, num_frames)
        expected = synthesizer.weights(hidden=torch.zeros(2, num_frames, 28)) @ value
        torch.testing.assert_close(synthesizer(value=value), expected)


def test_a_call_in_inference_mode_does_not_disturb_training():
    synthesizer = mechanism(12).eval()
    with torch.inference_mode():
        expected = synthesizer(value=values(2, 9))
    value = values(2, 9).requires_grad_()
    output = synthesizer(value=value)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    with torch.no_grad():
        torch.testing.assert_close(synthesizer(value=value), expected)


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
        ({"anchor": "length", "init": "without_left"}, "anchor=length needs init=handcrafted, but init is without_left"),
        ({"init_floor": "low"}, "init_floor is 'low': set it to a number"),
        ({"kind": SynthesizerRelative, "init": "legacy"}, "init is 'legacy': set it to one of handcrafted, normal"),
        ({"kind": SynthesizerRelative, "init_floor": 1.5}, "init_floor is 1.5: set it above 0"),
        ({"kind": SynthesizerFactorized, "rank": 0}, "rank is 0: set it to 1 or more"),
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
