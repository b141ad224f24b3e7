"""The mixture of synthesizers against loops over heads and frames."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from audiot.attention import SelfAttention, build, patterns
from audiot.attention.synthesizer_mixture import SynthesizerMixture
from audiot.positions import ALiBi, Rotary
from audiot.training.optimization import parameter_groups

HEADS, HEAD_DIM, FRAMES = 3, 6, 11
DIM = HEADS * HEAD_DIM
ALIBI_SLOPES = [2**-4, 2**-8, 2**-2]  # of three heads: those of two, and the first of four (Press et al. 2022)


def mechanism(partner="dense", mixture_of="logits", seed=0, **options):
    """A float64 mixture whose parameters have left their initial values."""
    torch.manual_seed(seed)
    made = SynthesizerMixture(DIM, HEADS, FRAMES, partner=partner, mixture_of=mixture_of, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def tensors(made, num_frames=9, seed=1):
    torch.manual_seed(seed)
    shapes = {"hidden": (2, num_frames, DIM)} | dict.fromkeys(("query", "key", "value"), (2, HEADS, num_frames, HEAD_DIM))
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items() if name in made.inputs}


def partner_score(made, inputs, sequence, head, i, j):
    if "hidden" in inputs:
        dense = made.partner
        middle = torch.relu(dense.w1[head].T @ inputs["hidden"][sequence, i] + dense.b1[head])
        return dense.w2[head, :, j] @ middle + dense.b2[head, j]
    query, key = inputs["query"], inputs.get("key", inputs["query"])
    return query[sequence, head, i] @ key[sequence, head, j] / HEAD_DIM**0.5


def expected_context(made, mixture_of, inputs, valid, bias=lambda head, i, j: 0.0):
    """The published formula, one row at a time; zeros on padded frames."""
    num_frames = inputs["value"].shape[2]
    context = torch.zeros_like(inputs["value"])
    for sequence in range(2):
        real = [frame for frame in range(num_frames) if valid[sequence, frame]]
        for head in range(HEADS):
            odds = made.balance[:, head].exp()
            first, second = odds / odds.sum()
            for i in real:
                table = torch.stack([made.random.logits[head, i, j] for j in real])
                scores = torch.stack([partner_score(made, inputs, sequence, head, i, j) for j in real])
                added = torch.tensor([bias(head, i, j) for j in real], dtype=torch.float64)
                if mixture_of == "logits":
                    row = (first * table + second * scores + added).softmax(0)
                else:
                    row = first * table.softmax(0) + second * (scores + added).softmax(0)
                context[sequence, head, i] = row @ inputs["value"][sequence, head, real]
    return context


every_mixture = pytest.mark.parametrize("mixture_of", ["logits", "weights"])
every_partner = pytest.mark.parametrize(
    ("partner", "options"),
    [
        ("dense", {"bottleneck_dim": 3}),
        ("dense", {"bottleneck_dim": 7}),  # with its bias a multiple of 8, with the padding no longer
        ("dense", {}),
        ("query_key", {}),
        ("query_key", {"share_query_key": True}),
    ],
)
VALIDS = {
    "nothing padded": torch.ones(2, 9, dtype=torch.bool),
    "padded at the end": torch.arange(9)[None] < torch.tensor([[9], [4]]),
    "padded anywhere": torch.tensor([[1, 0, 0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool),
    "one sequence padded": torch.tensor([[1] * 9, [0] * 9], dtype=torch.bool),
}


@every_mixture
@every_partner
@pytest.mark.parametrize("valid", VALIDS.values(), ids=VALIDS)
def test_rows_equal_the_published_formula_with_gradients(mixture_of, partner, options, valid):
    made = mechanism(partner, mixture_of, **options)
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors(made).items()}
    real = valid[:, None, :, None]
    output = made(**inputs, valid=None if valid.all() else valid)
    expected = expected_context(made, mixture_of, inputs, valid)
    torch.testing.assert_close(output * real, expected)
    assert (output[~valid.any(1)] == 0).all()
    leaves = [*inputs.values(), *made.parameters()]
    direction = torch.randn_like(output)
    found = torch.autograd.grad(output * real, leaves, direction)
    for one, other in zip(found, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(one, other)


@every_mixture
def test_a_position_bias_is_added_to_the_mixed_logits_or_to_the_partners_scores(mixture_of):
    made = mechanism("query_key", mixture_of)
    inputs, valid = tensors(made), VALIDS["padded at the end"]
    output = made(**inputs, valid=valid, positions=ALiBi(DIM, HEADS, FRAMES).double())
    expected = expected_context(made, mixture_of, inputs, valid, bias=lambda head, i, j: -ALIBI_SLOPES[head] * abs(i - j))
    torch.testing.assert_close(output * valid[:, None, :, None], expected)


@every_mixture
def test_rotary_positions_turn_queries_and_keys(mixture_of):
    made, rotary = mechanism("query_key", mixture_of), Rotary(DIM, HEADS, FRAMES)
    inputs, valid = tensors(made), VALIDS["nothing padded"]
    turned = inputs | {name: rotary.rotate(inputs[name]) for name in ("query", "key")}
    torch.testing.assert_close(made(**inputs, positions=rotary), expected_context(made, mixture_of, turned, valid))


@every_mixture
@pytest.mark.parametrize("positions", [Rotary, ALiBi])
def test_positions_inside_the_layer_are_refused_with_the_dense_partner(mixture_of, positions):
    with pytest.raises(ValueError, match=r"SynthesizerMixture has no.*: set positions=sinusoid"):
        SelfAttention(DIM, HEADS, mechanism("dense", mixture_of), positions(DIM, HEADS, FRAMES))


@every_mixture
@pytest.mark.parametrize("partner", ["dense", "query_key"])
def test_padded_frames_weigh_nothing_however_large_their_scores(mixture_of, partner):
    made = mechanism(partner, mixture_of)
    valid = VALIDS["padded at the end"]
    inputs = tensors(made)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    for tensor in changed.values():
        tensor[1, ..., 4:, :] *= 1000
    with torch.no_grad():
        made.random.logits[:, :, 4:] += 100  # of frames that are real in the first sequence
    real = valid[:, None, :, None]
    torch.testing.assert_close(made(**changed, valid=valid) * real, made(**inputs, valid=valid) * real, rtol=0, atol=1e-12)


@every_mixture
@pytest.mark.parametrize("partner", ["dense", "query_key"])
def test_the_mixture_starts_equal_and_learns_which_part_is_of_use(mixture_of, partner):
    torch.manual_seed(0)
    made = SynthesizerMixture(DIM, HEADS, FRAMES, partner=partner, mixture_of=mixture_of).double()
    assert (made.balance.softmax(0) == 0.5).all()
    inputs = tensors(made)
    target = made.random(value=inputs["value"]).detach()
    optimizer = torch.optim.Adam([made.balance], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        mse_loss(made(**inputs), target).backward()
        assert (made.balance.grad != 0).all()
        optimizer.step()
    assert (made.balance.softmax(0)[0] > 0.6).all()


@pytest.mark.parametrize("partner", ["dense", "query_key"])
def test_handcrafted_patterns_survive_the_mixture_of_logits(partner):
    made = SynthesizerMixture(28, 7, FRAMES, partner=partner).double()
    nothing = {name: torch.zeros(1, FRAMES, 28) if name == "hidden" else torch.zeros(1, 7, FRAMES, 4) for name in made.inputs}
    if partner == "dense":
        with torch.no_grad():
            made.partner.w2.zero_()
            made.partner.b2.zero_()
    nothing = {name: tensor.double() for name, tensor in nothing.items() if name != "value"}
    expected = torch.stack([0.9 * pattern + 0.1 / FRAMES for pattern in patterns(FRAMES).values()])
    torch.testing.assert_close(made.weights(**nothing)[0], expected, rtol=0, atol=1e-6)


@every_mixture
@pytest.mark.parametrize("partner", ["dense", "query_key"])
def test_dropout_leaves_the_mean_unbiased(mixture_of, partner):
    made = mechanism(partner, mixture_of, dropout=0.4)
    inputs = tensors(made, num_frames=5)
    valid = torch.arange(5)[None] < torch.tensor([[5], [3]])
    with torch.no_grad():
        draws = torch.stack([made(**inputs, valid=valid) for _ in range(600)])
        expected = made.eval()(**inputs, valid=valid)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-12).all()
    assert draws.std(0).max() > 0.1


@pytest.mark.parametrize("partner", ["dense", "query_key"])
def test_only_matrices_of_the_dense_partner_decay(partner):
    made = mechanism(partner)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = {group["weight_decay"]: {names[id(one)] for one in group["params"]} for group in parameter_groups(made, 0.1)}
    assert groups.get(0.1, set()) == ({"partner.w1", "partner.w2"} if partner == "dense" else set())
    assert {"balance", "random.logits"} <= groups[0.0]


def test_only_what_the_partner_needs_is_projected():
    def projections(**options):
        return {key.split(".")[0] for key in build("synthesizer_mixture", DIM, HEADS, FRAMES, **options).state_dict()}

    assert projections() == {"value", "output", "mechanism"}
    assert projections(partner="query_key") == {"query", "key", "value", "output", "mechanism"}
    assert projections(partner="query_key", share_query_key=True) == {"query", "value", "output", "mechanism"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partner": "lsh"}, "partner is 'lsh': set it to one of dense, query_key"),
        ({"mixture_of": "heads"}, "mixture_of is 'heads': set it to one of logits, weights"),
        ({"share_query_key": True}, "share_query_key needs partner=query_key, but partner is dense: set share_query_key=false"),
        ({"init": "handmade"}, "init is 'handmade': set it to one of handcrafted, normal, legacy"),
        ({"init_floor": 0.0}, "init_floor is 0.0: set it above 0"),
        ({"partner": "query_key", "bottleneck_dim": 0}, "bottleneck_dim is 0: set it to 1 or more"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SynthesizerMixture(DIM, HEADS, FRAMES, **options)
