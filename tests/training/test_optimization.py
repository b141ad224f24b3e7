"""Schedule and weight-decay groups against the published ones."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn

from audiot.attention import build, names
from audiot.model import Encoder
from audiot.objectives.reconstruction import ReconstructionHead
from audiot.positions import Learned
from audiot.training.optimization import (
    configure,
    configure_from,
    constant,
    inverse_square_root,
    linear_warmup_cosine,
    linear_warmup_decay,
    parameter_groups,
    wsd,
)


def rates(schedule, total_steps, **options):
    """The learning rate of every step, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = schedule(optimizer, total_steps, **options)
    found = []
    for _ in range(total_steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_rate_rises_linearly_then_falls_linearly_to_zero():
    found = rates(linear_warmup_decay, 100, warmup_proportion=0.1)
    assert found[0] == pytest.approx(0.05)  # the first step is not wasted
    assert found[4] == pytest.approx(0.25)
    assert found[9] == found[10] == pytest.approx(0.5)  # the end of the warm-up
    assert found[55] == pytest.approx(0.25)
    assert found[99] == pytest.approx(0.5 / 90)
    assert found[100] == 0
    assert max(found) == pytest.approx(0.5)


def test_published_warmup_is_7_percent():
    found = rates(linear_warmup_decay, 1000)
    assert found[:70] == pytest.approx([0.5 * (step + 1) / 70 for step in range(70)])
    assert found[70:] == pytest.approx([0.5 * (1000 - step) / 930 for step in range(70, 1001)])


def test_no_warmup_starts_at_the_full_rate():
    assert rates(linear_warmup_decay, 10, warmup_proportion=0.0) == pytest.approx([0.05 * (10 - step) for step in range(11)])


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", [linear_warmup_decay, linear_warmup_cosine, wsd])
def test_shortest_trainings_have_positive_rates(schedule, total_steps):
    assert all(rate > 0 for rate in rates(schedule, total_steps)[:-1])


def test_rate_stays_zero_beyond_the_end():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = linear_warmup_decay(optimizer, 3)
    for _ in range(6):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0


def test_constant_rate_is_constant():
    assert rates(constant, 20) == [0.5] * 21


@pytest.mark.parametrize("proportion", [-0.1, 1.0])
def test_impossible_warmup_is_refused(proportion):
    with pytest.raises(ValueError, match=r"scheduler.warmup_proportion must be in \[0, 1\), found"):
        rates(linear_warmup_decay, 10, warmup_proportion=proportion)


def published(name, total_steps, warmup_steps, **options):
    """Rates of Hugging Face's schedule. Its warm-up begins with a step of rate 0, which ours leaves out."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = getattr(pytest.importorskip("transformers"), name)(optimizer, warmup_steps, **options)
    found = [0.5 * scheduler.lr_lambdas[0](step) for step in range(total_steps + 1)]
    return found[1 : warmup_steps + 1] + found[warmup_steps:]


def test_cosine_is_the_published_one():
    expected = published("get_cosine_schedule_with_warmup", 100, 7, num_training_steps=100)
    assert rates(linear_warmup_cosine, 100) == pytest.approx(expected)
    assert expected[6:8] == [0.5, 0.5]


@pytest.mark.parametrize(("decay", "theirs"), {"linear": "linear", "cosine": "cosine", "sqrt": "1-sqrt"}.items())
def test_wsd_is_the_published_one(decay, theirs):
    options = {"num_training_steps": 100, "num_decay_steps": 20, "decay_type": theirs}
    expected = published("get_wsd_schedule", 100, 7, **options)
    found = rates(wsd, 100, decay_proportion=0.2, decay=decay)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[6:81] == [0.5] * 75
    assert 0 < found[99] < found[81] < 0.5


def test_inverse_square_root_is_the_published_one():
    """Equation 3 of Vaswani et al., with the full rate after the warm-up."""
    found = rates(inverse_square_root, 50, warmup_steps=7)
    assert found == pytest.approx([0.5 * 7**0.5 * min(step**-0.5, step * 7**-1.5) for step in range(1, 52)])
    assert found[:20] == rates(inverse_square_root, 20, warmup_steps=7)[:20], "whatever the number of steps is"
    theirs = published("get_inverse_sqrt_schedule", 51, 7)
    assert found == pytest.approx([*theirs[:7], *theirs[8:]])  # its steps have the same numbers throughout


@pytest.mark.parametrize("schedule", [linear_warmup_cosine, wsd, partial(inverse_square_root, warmup_steps=3)])
@pytest.mark.parametrize("total_steps", [40, 60, 30])
def test_a_resumed_training_has_the_rates_of_its_own_length(schedule, total_steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    first = schedule(optimizer, 40)
    for _ in range(25):
        optimizer.step()
        first.step()
    checkpoint = first.state_dict()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    second = schedule(optimizer, total_steps)
    second.load_state_dict(checkpoint)
    found = []
    for _ in range(25, total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        second.step()
    assert found == rates(schedule, total_steps)[25:-1]


def test_a_wsd_training_that_gets_longer_before_its_decay_goes_on_at_the_full_rate():
    assert rates(wsd, 100)[60] == rates(wsd, 200)[60] == 0.5


def test_schedules_say_how_rates_go():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    said = [
        linear_warmup_cosine(optimizer, 2000, 0.5).description,
        wsd(optimizer, 2000, 0.1, 0.5, "sqrt").description,
        wsd(optimizer, 2000, 0.0, 0.1).description,
        wsd(optimizer, 2000, 0.5, 0.5).description,
        inverse_square_root(optimizer, 2000, 1000).description,
    ]
    assert said == [
        "linearly up to step 1,000, then along a cosine to 0 after step 2,000",
        "linearly up to step 200, then on as it is to step 1,000, then as 1 minus a square root to 0 after step 2,000",
        "on as it is to step 1,800, then linearly to 0 after step 2,000",
        "linearly up to step 1,000, then linearly to 0 after step 2,000",
        "linearly up to step 1,000, then with the inverse square root of the step",
    ]


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        (linear_warmup_cosine, {"warmup_proportion": 1.0}, "scheduler.warmup_proportion must be in [0, 1), found 1.0"),
        (wsd, {"decay_proportion": -0.1}, "scheduler.decay_proportion must be in [0, 1 − scheduler.warmup_proportion=0.07]"),
        (wsd, {"decay_proportion": 0.95}, "found 0.95"),
        (wsd, {"decay": "exponential"}, "scheduler.decay must be one of linear, cosine, sqrt, found exponential"),
        (inverse_square_root, {"warmup_steps": 0}, "between 1 and the number of steps, trainer.max_steps=10, found 0"),
        (inverse_square_root, {"warmup_steps": 11}, "between 1 and the number of steps, trainer.max_steps=10, found 11"),
    ],
)
def test_impossible_schedules_are_refused(schedule, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        rates(schedule, 10, **options)


class Exempting(nn.Module):
    no_weight_decay = frozenset({"table"})

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 3))
        self.matrix = nn.Parameter(torch.zeros(3, 3))
        self.scale = nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_only_matrices_decay():
    module = Exempting()
    decayed, plain = parameter_groups(module, 0.01)
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0.0
    assert {id(tensor) for tensor in decayed["params"]} == {id(module.matrix), id(module.inner.weight)}
    expected = {id(tensor) for tensor in (module.table, module.scale, module.inner.bias, module.norm.weight, module.norm.bias)}
    assert {id(tensor) for tensor in plain["params"]} == expected


@pytest.mark.parametrize("share_layers", [False, True])
@pytest.mark.parametrize("name", names())
def test_every_parameter_of_a_model_is_in_one_group_once(name, share_layers, published_attention):
    shape = {"input_dim": 10, "embed_dim": 24, "num_layers": 2, "num_heads": 2, "ffn_dim": 32, "max_frames": 16}
    encoder = Encoder(**shape, **published_attention(name), share_layers=share_layers)
    module = nn.ModuleList([encoder, ReconstructionHead(24, 10)])
    groups = parameter_groups(module, 0.01)
    grouped = [id(tensor) for group in groups for tensor in group["params"]]
    assert sorted(grouped) == sorted(id(tensor) for tensor in module.parameters())
    plain = {id(tensor) for tensor in groups[1]["params"]}
    for name, tensor in module.named_parameters():
        if name.endswith("bias") or "norm" in name:
            assert id(tensor) in plain


def test_mechanisms_and_positions_keep_what_they_name_from_decay():
    for exempting in (Learned(8, 2, 5), build("synthesizer_random", 8, 2, 5).mechanism):
        assert exempting.no_weight_decay
        (plain,) = parameter_groups(exempting, 0.01)
        assert plain["weight_decay"] == 0.0


def test_configure_schedules_by_the_step_over_the_whole_training():
    module = nn.Linear(3, 2)
    built = configure(module, partial(torch.optim.AdamW, lr=0.5), linear_warmup_decay, 0.01, 100.0)
    assert built["lr_scheduler"]["interval"] == "step"
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    for _ in range(100):
        assert optimizer.param_groups[0]["lr"] > 0
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_settings_name_the_optimiser_its_decay_and_the_schedule():
    adamw = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5, "weight_decay": 0.03}
    sgd = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.5}
    flat = {"_target_": "audiot.training.optimization.constant", "_partial_": True}
    decays = {}
    for optimizer in (adamw, sgd):
        built = configure_from(nn.Linear(3, 2), {"optimizer": optimizer, "scheduler": flat}, 10)
        assert built["lr_scheduler"]["scheduler"].description == "on as it is to step 10"
        decays[type(built["optimizer"]).__name__] = [group["weight_decay"] for group in built["optimizer"].param_groups]
    assert decays == {"AdamW": [0.03, 0.0], "SGD": [0.0, 0.0]}


@pytest.mark.parametrize("total_steps", [-1, float("inf")])
def test_a_training_without_end_is_refused(total_steps):
    with pytest.raises(ValueError, match=r"the learning-rate schedule needs a length: set trainer.max_steps"):
        configure(nn.Linear(3, 2), partial(torch.optim.AdamW, lr=0.5), constant, 0.01, total_steps)


def test_a_parameter_that_modules_share_is_listed_once_and_kept_from_decay_by_either():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    (group,) = parameter_groups(nn.ModuleList([embedding, head]), 0.1)
    assert len(group["params"]) == 1
    positions = Learned(4, 2, 5)
    head.weight = positions.table
    (group,) = parameter_groups(nn.ModuleList([head, positions]), 0.1)
    assert group["weight_decay"] == 0
