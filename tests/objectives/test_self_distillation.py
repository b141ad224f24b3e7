"""Self-distillation against slow loops: codes, teacher, collapse.

What it shares with all objectives is in test_objective_contract.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TINY
from unequal_batches import batch_of, objective

from audiot.base import streams
from audiot.checkpoint import AudioEncoder
from audiot.objectives import self_distillation
from audiot.objectives.self_distillation import SelfDistillation, normalised_over_time
from audiot.pretraining import MaskedAcousticModel, fit_statistics
from audiot.training.optimization import parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
NUMBERED = ([(1, 25), (2, 40)], [(3, 31)])


def made(**changes):
    """A module in float64 whose teacher and encoder differ."""
    torch.manual_seed(0)
    module = objective("self_distillation").double()
    for name, value in changes.items():
        setattr(module.objective, name, value)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def small(**options):
    """A module with dropout."""
    torch.manual_seed(0)
    config = {"_target_": "audiot.objectives.self_distillation.SelfDistillation", "num_codes": 16, "span": 3}
    return MaskedAcousticModel(**TINY | {"objective": config | options})


def batches():
    return [batch_of("pretraining self_distillation", numbered) for numbered in NUMBERED]


def assigned(module, batch):
    """Normalised state and code of every real token, by layer, one utterance at a time."""
    found = [[], []]
    for row, length in zip(batch["tokens"], batch["lengths"].tolist(), strict=True):
        with torch.no_grad():
            states = module.objective.teacher(row[None, :length])[1:]
        for layer, (state, book) in enumerate(zip(states, module.objective.codebook.numpy(), strict=True)):
            state = state[0].numpy()
            for point in (state - state.mean(0)) / np.sqrt(state.var(0) + 1e-5):
                found[layer].append((point, int(np.argmin([np.sum((point - code) ** 2) for code in book]))))
    return found


@torch.no_grad()
def test_a_step_moves_codes_and_teacher_as_a_loop_does():
    module, prior = made(), torch.rand(2, 16, dtype=torch.float64)
    inner = module.objective
    inner.prior.copy_(prior / prior.sum(1, keepdim=True))
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    tokens = [[each for batch in batches() for each in assigned(module, batch)[layer]] for layer in range(2)]
    for batch in batches():
        module.loss(*module.inputs(batch))
    inner.after_step(module.model)
    for layer in range(2):
        for code in range(16):
            points = [point for point, own in tokens[layer] if own == code]
            number = 0.9 * before["prior"][layer, code].item() + 0.1 * len(points) / len(tokens[layer])
            total = 0.9 * before["prior"][layer, code].item() * before["codebook"][layer, code].numpy()
            total = total + 0.1 * np.sum([*points, np.zeros(24)], axis=0) / len(tokens[layer])
            assert inner.prior[layer, code].item() == pytest.approx(number)
            np.testing.assert_allclose(inner.codebook[layer, code].numpy(), total / number, rtol=1e-9, atol=1e-12)
    rate = 1 - 0.999 ** (400_000 / 9)  # the first of nine steps
    for name, weight in module.model.encoder.named_parameters():
        expected = (1 - rate) * before[f"teacher.{name}"] + rate * weight
        torch.testing.assert_close(inner.teacher.get_parameter(name), expected, rtol=1e-6, atol=1e-12)
    assert inner.step == 1
    shares = []  # of each real token's utterance
    for batch in batches():
        for row, length in zip(batch["tokens"], batch["lengths"].tolist(), strict=True):
            states = [state[0].numpy() for state in made().objective.teacher(row[None, :length])[1:]]
            shares += length * [[state.var(0).sum() / np.square(state).mean(0).sum() for state in states]]
    np.testing.assert_allclose(inner.variance.numpy(), np.mean(shares, axis=0), rtol=1e-9)
    assert not inner._moments.any()  # the next step starts anew
    assert not inner._spread.any()


@pytest.mark.parametrize(
    ("steps", "step", "decay"),
    [
        (400_000, 0, 0.999),
        (400_000, 15_000, 0.99945),
        (400_000, 30_000, 0.9999),
        (400_000, 229_999, 0.9999),
        (400_000, 230_000, 1.0),
        (400_000, 399_999, 1.0),
        (400_000, 400_000, 0.999),
        (100_000, 0, 0.999**4),
        (100_000, 50_000, 0.9999**4),
    ],
)
def test_the_teachers_decay_follows_the_published_ramp(steps, step, decay):
    inner = made(steps=steps).objective
    inner.step.fill_(step)
    assert 1 - float(inner.teacher_rate()) == pytest.approx(decay, abs=1e-6)


def test_the_teacher_has_no_gradient_no_optimiser_and_no_dropout():
    module = small().train()
    teacher = module.objective.teacher
    trained = {id(parameter) for group in parameter_groups(module, 0.01) for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in teacher.parameters()}
    assert {id(parameter) for parameter in module.model.parameters()} <= trained
    assert module.model.encoder.dropout.training
    assert not any(part.training for part in teacher.modules())


def test_states_have_mean_0_and_deviation_1_over_the_time_of_an_utterance():
    states = torch.randn(3, 20, 5, dtype=torch.float64) * 3 + torch.randn(5, dtype=torch.float64)
    lengths = [20, 7, 1]
    valid = torch.arange(20) < torch.tensor(lengths)[:, None]
    found, shares = normalised_over_time(states.masked_fill(~valid[..., None], torch.nan), valid)
    for row, share, state, length in zip(found.numpy(), shares, states.numpy(), lengths, strict=True):
        own = state[:length]
        np.testing.assert_allclose(row[:length], (own - own.mean(0)) / np.sqrt(own.var(0) + 1e-5))
        assert not row[length:].any()
        assert float(share) == pytest.approx(own.var(0).sum() / np.square(own).mean(0).sum())


@pytest.mark.slow
def test_a_compiled_step_sums_up_what_the_eager_one_does():
    torch._dynamo.reset()
    sums = []
    for backend in (None, "aot_eager"):
        module = made()
        loss = module.loss if backend is None else torch.compile(module.loss, backend=backend, fullgraph=True)
        for batch in batches():
            loss(*module.inputs(batch)).value.backward()
        assert module.objective._spread[-1] == 25 + 40 + 31
        module.objective.after_step(module.model)
        sums.append([value.clone() for value in module.objective.state_dict().values()])
    torch.testing.assert_close(sums[1], sums[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_steps_on_the_gpu_wait_for_nothing_and_learn_what_the_eager_ones_learn(graphs, monkeypatch):
    monkeypatch.setattr(self_distillation, "CHECK_EVERY", 2)
    monkeypatch.setattr(self_distillation, "WARM_UP", 0)
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = objective("self_distillation").cuda().train()
        if compiled:
            module.compile_step(graphs=graphs)
        optimizer = torch.optim.AdamW(parameter_groups(module, 0.01), lr=1e-4, fused=True)
        optimizer.register_step_post_hook(lambda *_, module=module: module.objective.after_step(module.model))
        tokens, lengths, keys, valid, _ = module.inputs(batches()[0])
        inputs = tokens.float().cuda(), lengths.cuda(), keys.cuda(), valid.cuda()
        for step in range(9):
            torch.cuda.set_sync_debug_mode("error" if step >= 6 else "default")
            loss = module.step_loss(*inputs).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
        found.append((float(loss), module.objective.prior.cpu()))
    assert found[1][0] == pytest.approx(found[0][0], abs=0.02)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0.02)


def test_evaluation_counts_nothing_and_a_step_without_tokens_changes_no_code():
    module = made()
    codebook, prior = module.objective.codebook.clone(), module.objective.prior.clone()
    with torch.no_grad():
        module.eval().loss(*module.inputs(batches()[0]))
        module.train().view(batches()[0])
    module.objective.after_step(module.model)
    assert module.objective.codebook.equal(codebook)
    assert module.objective.prior.equal(prior)


def test_a_step_that_is_not_finite_changes_no_code():
    module, batch = made(), batches()[1]
    codebook = module.objective.codebook.clone()
    batch["tokens"].fill_(torch.inf)
    module.loss(*module.inputs(batch))
    module.objective.after_step(module.model)
    assert module.objective.codebook.equal(codebook)


def test_dead_codes_start_beside_the_most_frequent_ones():
    found = []
    for seed in (0, 0, 1):
        inner = made().objective
        inner.key.fill_(streams.key("dead codes", seed))
        inner.prior.fill_(1 / 16)
        inner.prior[0] = torch.tensor([0.3, 0.2, 0.0, 1e-5] + [1 / 24] * 12)
        before = inner.codebook.clone()
        inner._revive_codes()
        assert inner.codebook[1].equal(before[1])
        assert inner.codebook[0, [0, 1, *range(4, 16)]].equal(before[0, [0, 1, *range(4, 16)]])
        for dead, frequent in ((2, 0), (3, 1)):
            apart = inner.codebook[0, dead] - before[0, frequent]
            assert 0 < apart.std() < 0.03
            assert inner.prior[0, dead] == pytest.approx(0.1 / 16)
        found.append(inner.codebook.clone())
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_fitting_starts_the_teacher_as_the_encoder_and_codes_among_its_states(pretraining):
    module = small()
    with torch.no_grad():
        for parameter in module.model.parameters():  # as init=RUN/encoder loads others
            parameter.add_(0.1 * torch.randn_like(parameter))
    figures = fit_statistics(module, pretraining.data(), torch.device("cpu"))
    inner = module.objective
    for name, value in module.model.encoder.state_dict().items():
        assert inner.teacher.state_dict()[name].equal(value)
    assert figures["targets/used"] == 16
    assert 8 < figures["targets/perplexity"] <= 16
    torch.testing.assert_close(inner.prior.sum(1), torch.ones(2))
    centred = torch.einsum("gv,gvd->gd", inner.prior, inner.codebook)  # states have mean 0, and centres are their means
    torch.testing.assert_close(centred, torch.zeros_like(centred), rtol=0, atol=0.05)
    few = small(num_codes=99_999)
    with pytest.raises(ValueError, match=r"objective\.num_codes=99999 needs as many tokens, found"):
        fit_statistics(few, pretraining.data(), torch.device("cpu"))


def figures_of(step=1000, perplexity=9.0, variance=0.5):
    return torch.tensor([step, 9.0, perplexity, 0.5, variance])


def test_a_collapse_is_told_with_layer_figure_and_remedy():
    inner = made().objective
    inner.check(figures_of())
    inner.check(figures_of(step=99, perplexity=1.0, variance=0.0))  # too early to say
    inner.min_perplexity = 0.1
    with pytest.raises(ValueError, match=r"collapsed by step 1000: layer 2 .* perplexity of 1\.5 of 16.*lower optimizer\.lr"):
        inner.check(figures_of(perplexity=1.5))
    with pytest.raises(ValueError, match=r"layer 2 of the teacher has variance over time of 0\.0001 of its energy"):
        inner.check(figures_of(variance=1e-4))


@pytest.mark.parametrize("validated", [False, True])
def test_a_collapsed_teacher_ends_the_training(pretraining, monkeypatch, tmp_path, validated):
    monkeypatch.setattr(self_distillation, "WARM_UP", 2)
    monkeypatch.setattr(self_distillation, "CHECK_EVERY", 2 if not validated else 50)
    module = small()
    fit_statistics(module, pretraining.data(), torch.device("cpu"))
    with torch.no_grad():  # every token has the state of every other, since the teacher hears nothing
        for encoder in (module.model.encoder, module.objective.teacher):
            encoder.input.weight.zero_()
    module.model.encoder.input.weight.requires_grad_(False)
    trainer = pretraining.trainer(tmp_path, val_check_interval=3 if validated else 9)
    with pytest.raises(ValueError, match=r"self-distillation collapsed by step [2-6]: layer 1 of the teacher has variance"):
        trainer.fit(module, pretraining.data())
    assert trainer.global_step < 9


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_layers": 3}, r"objective.num_layers must be in 1…2, the layers of the model, found 3"),
        ({"decay": 1.0}, "objective.decay must be between 0 and 1, found 1.0"),
        ({"codebook_decay": 0.0}, "objective.codebook_decay must be between 0 and 1, found 0.0"),
        ({"ramp": 0.7}, "objective.ramp must be in 0…objective.freeze"),
        ({"steps": -1}, "objective.steps must be at least 1, found -1: set trainer.max_steps"),
        ({"min_perplexity": 1.0}, r"objective.min_perplexity must be in \[0, 1\), found 1.0"),
    ],
)
def test_impossible_parameters_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        SelfDistillation(AudioEncoder(TINY["features"], TINY["model"]), **options)


@pytest.mark.parametrize(("there", "chosen"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, 3), (12, 6)])
def test_half_of_the_layers_have_a_codebook_but_three_where_there_are(there, chosen):
    model = AudioEncoder(TINY["features"], TINY["model"] | {"num_layers": there})
    assert SelfDistillation(model, num_codes=4).num_codebooks == chosen
