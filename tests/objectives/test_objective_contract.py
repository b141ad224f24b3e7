"""What every objective of pre-training must do: each file of conf/objective, against slow loops.

That unequal batches and ranks add up to one big batch is in tests/training/test_accumulation.py, for each of them too.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import TINY
from hydra.utils import get_class
from pytorch_lightning.callbacks import ModelCheckpoint
from some import some
from unequal_batches import OBJECTIVES, objective_config

import audiot.objectives
from audiot.base import streams
from audiot.base.parts import make
from audiot.checkpoint import load_encoder, load_objective, save_encoder, save_objective
from audiot.data.batches import to_device
from audiot.objectives.objective import Objective
from audiot.pretraining import MaskedAcousticModel, fit_statistics

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def fitted(pretraining):
    """Function of an objective's name: its state after `fit` on the demo corpus. Each is fitted once."""
    known = {}

    def state(name):
        if name not in known:
            module = new(name)
            fit_statistics(module, pretraining.data(), CPU)
            known[name] = module.objective.state_dict()
        return known[name]

    return state


def new(name, seed=0):
    torch.manual_seed(seed)
    return MaskedAcousticModel(**TINY | {"model": TINY["model"] | {"dropout": 0.0}, "objective": objective_config(name)})


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


CONFIGS = [objective_config(name) for name in OBJECTIVES]
DISTINCT = [name for number, name in enumerate(OBJECTIVES) if CONFIGS[number] not in CONFIGS[:number]]
distinct = pytest.mark.parametrize("name", DISTINCT)  # tests that take long
OFTEN = ("clusters_visible", "self_distillation")  # the default's, and that of the longest recipe
compiled = pytest.mark.parametrize("name", some(DISTINCT, OFTEN))


@pytest.fixture
def module(name, fitted):
    """A fitted module in float64, in which attention and biases matter."""
    module = new(name)
    module.objective.load_state_dict(fitted(name))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.double()


def batch_of(lengths, first=0, dtype=torch.float64):
    """A padded batch of noise. An utterance follows from its number, `first` and on, and its length."""
    waveforms = torch.full((len(lengths), max(lengths)), 0.7, dtype=dtype)
    for number, (row, length) in enumerate(zip(waveforms, lengths, strict=True), start=first):
        noise = torch.randn(length, generator=torch.Generator().manual_seed(number), dtype=dtype)
        row[:length] = 0.1 * noise.cumsum(0).sin()  # neighbours in time are alike
    keys = torch.tensor([streams.key("contract", number) for number in range(first, first + len(lengths))])
    return {"waveforms": waveforms, "lengths": torch.tensor(lengths), "keys": keys, "position": (0, 0)}


LENGTHS = [16000, 9000, 12345]


def alone(batch):
    """Its utterances, each as a batch without padding."""
    for number, length in enumerate(batch["lengths"].tolist()):
        one = slice(number, number + 1)
        rest = {name: batch[name][one] for name in ("lengths", "keys")}
        yield {"waveforms": batch["waveforms"][one, :length], "position": (0, 0)} | rest


def hear(module, batch):
    """Arguments of the loss. What is padded is of no use to anyone."""
    tokens, lengths, keys, valid, source = module.inputs(batch)
    assert source is None  # the tokens
    return (tokens if valid is None else torch.where(valid[..., None], tokens, 9.0)), lengths, keys, valid


# The registry


def classes():
    """Every class of an objective in audiot."""
    for each in pkgutil.iter_modules(audiot.objectives.__path__):
        for _, found in inspect.getmembers(import_module(f"audiot.objectives.{each.name}"), inspect.isclass):
            if issubclass(found, Objective) and not inspect.isabstract(found):
                yield f"{found.__module__}.{found.__qualname__}"


def test_every_class_has_an_option_and_every_option_a_class():
    assert {objective_config(name)["_target_"] for name in OBJECTIVES} == set(classes())
    assert all(issubclass(get_class(objective_config(name)["_target_"]), Objective) for name in OBJECTIVES)


def test_every_metric_has_a_name_of_its_own_and_words(module):
    objective = module.objective
    assert objective.metrics[0] == f"val_{objective.figure}"
    assert len(set(objective.metrics)) == len(objective.metrics)
    assert all({**objective.baselines, **objective.extras}.values())
    assert objective.label
    with torch.no_grad():
        assert list(objective.measures(module.eval().view(batch_of(LENGTHS)))) == objective.metrics


# Targets by loops over utterances and frames, in numpy


def rows(tensor):
    return tensor.detach().cpu().double().numpy()


def neighbours(tokens, context):
    """Tokens (T, C) side by side with those around them."""
    reach, last = context // 2, len(tokens) - 1
    return np.stack(
        [np.concatenate([tokens[min(max(t + shift, 0), last)] for shift in range(-reach, reach + 1)]) for t in range(last + 1)]
    )


def nearest_row(point, points):
    return int(np.argmin([np.sum((point - other) ** 2) for other in points]))


def best_rq_codes(module, tokens):
    objective, codes = module.objective, []
    for point in neighbours(rows(tokens), 3):
        found = []
        for projection, vectors in zip(rows(objective.projection), rows(objective.vectors), strict=True):
            projected = point @ projection
            found.append(nearest_row(projected / np.linalg.norm(projected), vectors))
        codes.append(found)
    return np.array(codes)


def cluster_codes(module, tokens):
    centres = rows(module.objective.centres)
    return np.array([[nearest_row(point, centres)] for point in neighbours(rows(tokens), 3)])


def teacher_codes(module, tokens):
    objective = module.objective
    codes = []
    with torch.no_grad():
        states = objective.teacher(tokens[None])[1:]
    assert len(states) == objective.num_codebooks == 2  # all layers of a small model
    for state, book in zip(states, rows(objective.codebook), strict=True):
        state = rows(state[0])
        normalised = (state - state.mean(0)) / np.sqrt(state.var(0) + 1e-5)
        codes.append([nearest_row(point, book) for point in normalised])
    return np.array(codes).T


CODES = {"BestRQ": best_rq_codes, "Clusters": cluster_codes, "SelfDistillation": teacher_codes}


def masked_by_hand(objective, tokens, frames, key):
    """The encoder's input, frame by frame."""
    noise = streams.normal(key, tokens.numel(), 6).view_as(tokens)
    found = []
    for t, frame in enumerate(tokens):
        if not frames[t]:
            found.append(frame)
        elif objective.mask is not None:
            found.append(objective.mask)
        else:
            found.append(0.1 * noise[t].to(frame.dtype) if objective.fill == "noise" else torch.zeros_like(frame))
    return torch.stack(found)


def nats_by_hand(scores, code):
    return -(scores[code] - scores.max() - (scores - scores.max()).exp().sum().log())


def slow_codes(module, tokens, key):
    """Cross-entropy of each frame of an utterance that counts, mean of its codebooks."""
    objective = module.objective
    assert objective.visible_weight in (0, 1)
    codes = CODES[type(objective).__name__](module, tokens)
    frames = objective.spans.mask(key, torch.tensor([len(tokens)]), len(tokens))[0]
    hidden = module.model.encoder(masked_by_hand(objective, tokens, frames, key)[None])[-1][0]
    for t in range(len(tokens)):
        if frames[t] or objective.visible_weight:
            flat = objective.head.linear.weight @ hidden[t] + objective.head.linear.bias
            books = flat.view(objective.num_codebooks, objective.num_codes)
            yield sum(nats_by_hand(books[book], codes[t, book]) for book in range(len(books))) / len(books)


def slow_reconstruction(module, tokens, key):
    """Error of each corrupted element of an utterance."""
    objective = module.objective
    corrupted = objective.corruption(tokens[None], torch.tensor([len(tokens)]), key, objective.stack)
    hidden = module.model.encoder(corrupted.features)[-1][0]
    for t in range(len(tokens)):
        if corrupted.frames[0, t]:
            prediction = objective.head(hidden[t])
            for channel in range(tokens.shape[1]):
                if corrupted.elements is None or corrupted.elements[0, t, channel]:
                    yield (prediction[channel] - tokens[t, channel]).abs()


SLOW = {"Reconstruction": slow_reconstruction} | dict.fromkeys(CODES, slow_codes)


# The loss


def test_padding_and_companions_change_nothing(module):
    batch = batch_of(LENGTHS)
    together = module.loss(*hear(module, batch))
    single = [module.loss(*hear(module, one)) for one in alone(batch)]
    assert together.scored == sum(each.scored for each in single) > 0
    expected = sum(each.value * each.scored for each in single) / together.scored
    torch.testing.assert_close(together.value, expected, rtol=1e-9, atol=0)


def test_loss_and_gradients_are_those_of_a_loop_over_utterances_and_frames(module):
    batch = batch_of([6000, 4000])
    loss = module.loss(*hear(module, batch))
    errors = []
    for one in alone(batch):
        tokens, _, key, _ = hear(module, one)
        errors += SLOW[type(module.objective).__name__](module, tokens[0], key)
    assert len(errors) == loss.scored
    slow = torch.stack(errors).mean()
    torch.testing.assert_close(loss.value, slow, rtol=1e-9, atol=0)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss.value, trained.values(), allow_unused=True)
    expected = torch.autograd.grad(slow, trained.values(), allow_unused=True)
    for name, one, other in zip(trained, found, expected, strict=True):
        assert (one is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10, msg=name)


@compiled
def test_the_compiled_loss_is_the_eager_one_in_two_graphs(module):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module.loss, backend=backend, fullgraph=True)
    for count, num_tokens in ((3, 24), (2, 40), (4, 32), (5, 64)):
        samples = module.model.features.num_samples(num_tokens)
        tokens, lengths, keys, valid = hear(module, batch_of([samples] * count))
        assert valid is None
        torch.testing.assert_close(compiled(tokens, lengths, keys, valid), module.loss(tokens, lengths, keys, valid))
    assert len(graphs) == 2  # the first shape's, and one for all others


def test_masks_depend_on_the_key_alone(module, name):
    def masked(module, batch):
        view = module.eval().view(batch)
        return [row[:length] for row, length in zip(view["masked"], view["lengths"], strict=True)]

    batch = batch_of(LENGTHS)
    with torch.no_grad():
        expected = masked(module, batch)
        others = [masked(module, one)[0] for one in alone(batch)]
        other_model = masked(new(name, seed=1).double(), batch)
        other_key = masked(module, batch | {"keys": batch["keys"] + 1})
    for one, two, three, four in zip(expected, others, other_model, other_key, strict=True):
        assert one.any()
        assert one.equal(two)
        assert one.equal(three)
        assert not one.equal(four)


# Validation


def nearest_visible_by_hand(frames, t):
    visible = [other for other in range(len(frames)) if not frames[other]]
    return min(visible, key=lambda other: (abs(other - t), other), default=t)


def code_figures(module, batch):
    """The figures of objectives that predict codes."""
    objective, found = module.objective, {}
    prior = rows(objective.prior)

    def note(name, values):
        found.setdefault(name, []).append(np.mean(values))

    for one in alone(batch):
        tokens, length, key, _ = hear(module, one)
        codes = CODES[type(objective).__name__](module, tokens[0])
        frames = objective.spans.mask(key, length, len(codes))[0]
        hidden = module.model.encoder(masked_by_hand(objective, tokens[0], frames, key)[None])[-1]
        scores = objective.head(hidden)[0]
        books = range(objective.num_codebooks)
        for t in np.flatnonzero(frames):
            near = nearest_visible_by_hand(frames, t)
            note("val_cross_entropy", [float(nats_by_hand(scores[t, book], codes[t, book])) for book in books])
            note("unigram_cross_entropy", [-np.log(max(prior[book, codes[t, book]], 1e-6)) for book in books])
            note("chance_cross_entropy", [np.log(objective.num_codes)])
            note("val_accuracy", [int(scores[t, book].argmax()) == codes[t, book] for book in books])
            note("neighbour_accuracy", [codes[near, book] == codes[t, book] for book in books])
            note("unigram_accuracy", [codes[t, book] == np.argmax(prior[book]) for book in books])
    return {name: np.mean(values) for name, values in found.items()}


def teacher_figures(module, batch):
    objective, shares = module.objective, []
    for one in alone(batch):
        for state in objective.teacher(hear(module, one)[0])[1:]:
            state = rows(state[0])
            shares.append(state.var(0).sum() / np.square(state).mean(0).sum())
    perplexities = [np.exp(-sum(p * np.log(p) for p in book if p)) for book in rows(objective.prior)]
    return code_figures(module, batch) | {
        "teacher_perplexity": np.mean(perplexities),
        "used_codes": np.mean([sum(p >= 0.01 / len(book) for p in book) for book in rows(objective.prior)]),
        "teacher_variance": np.mean(shares),
    }


def reconstruction_figures(module, batch):
    objective, found = module.objective, {}
    for one in alone(batch):
        tokens, length, key, _ = hear(module, one)
        frames = objective.corruption.mask(key, length, tokens.shape[1])[0]
        hidden = module.model.encoder(tokens.masked_fill(frames[None, :, None], 0))[-1]
        channels = module.model.features.num_channels
        target, prediction = (rows(each[0]).reshape(-1, channels) for each in (tokens, objective.head(hidden)))
        hidden_frames = np.repeat(frames.numpy(), objective.stack)
        at, visible = np.flatnonzero(hidden_frames), np.flatnonzero(~hidden_frames)
        for t in at:
            found.setdefault("val_l1", []).append(np.abs(prediction[t] - target[t]).mean())
            found.setdefault("zero_l1", []).append(np.abs(target[t]).mean())
        for channel in target.T:
            line = np.interp(at, visible, channel[visible])
            found.setdefault("interpolation_l1", []).extend(np.abs(line - channel[at]))
    return {name: np.mean(values) for name, values in found.items()}


FIGURES = {
    "Reconstruction": reconstruction_figures,
    "BestRQ": code_figures,
    "Clusters": code_figures,
    "SelfDistillation": teacher_figures,
}


@torch.no_grad()
def test_validation_metrics_equal_a_plain_recomputation(module):
    batch = batch_of([9000, 7000])
    found = {name: float(mean.value) for name, mean in module.objective.measures(module.eval().view(batch)).items()}
    expected = FIGURES[type(module.objective).__name__](module, batch)
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


@torch.no_grad()
def test_a_picture_is_drawn(module, tmp_path):
    objective = module.objective
    objective.draw(module.float().eval().view(batch_of([9000], dtype=torch.float32)), "title", tmp_path / objective.picture)
    assert (tmp_path / objective.picture).read_bytes().startswith(b"\x89PNG")


# State


@pytest.fixture(scope="module")
def trained(pretraining, fitted, tmp_path_factory):
    """Function of an objective's name: a module after four steps, and the folder of their checkpoints. Each is trained once."""
    known = {}

    def run(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            module = new(name)
            module.objective.load_state_dict(fitted(name))
            every = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            pretraining.trainer(folder, [every], max_steps=4, val_check_interval=2).fit(module, pretraining.data())
            known[name] = module.eval(), folder
        return known[name]

    return run


def content(folder, module):
    save_encoder(folder, module.model)
    save_objective(folder, module.hparams["objective"], module.objective)
    return [(folder / file).read_bytes() for file in ("model.safetensors", "objective.safetensors", "objective.json")]


@distinct
@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_ends_with_the_same_bytes(name, trained, pretraining, step, tmp_path):
    module, folder = trained(name)
    resumed = new(name, seed=step)
    trainer = pretraining.trainer(tmp_path, max_steps=4, val_check_interval=2)
    trainer.fit(resumed, pretraining.data(), ckpt_path=folder / f"step={step}.ckpt", weights_only=True)
    assert content(tmp_path / "resumed", resumed) == content(tmp_path / "unbroken", module)


def first_batch(pretraining):
    return to_device(next(iter(pretraining.data().train_dataloader())), CPU)


@torch.no_grad()
def test_all_state_is_in_the_run_and_in_what_it_exports(name, trained, pretraining, tmp_path):
    module, folder = trained(name)
    batch = first_batch(pretraining)
    expected = module.loss(*module.inputs(batch)).value
    content(tmp_path / "encoder", module)
    encoder = load_encoder(tmp_path / "encoder")
    config, state = load_objective(tmp_path / "encoder")
    objective = make(config, encoder, inside=False).eval()
    objective.load_state_dict(state)
    tokens, lengths, keys, valid, _ = module.inputs(batch)
    assert objective.loss(encoder, tokens, lengths, keys, valid, tokens).value.equal(expected)
    loaded = MaskedAcousticModel.from_checkpoint(folder / "step=4.ckpt")
    assert loaded.loss(*loaded.inputs(batch)).value.equal(expected)
    copied = new(name, seed=3).eval()
    copied.load_state_dict(module.state_dict())
    assert copied.loss(*copied.inputs(batch)).value.equal(expected)
    ours, theirs = (each.objective.measures(each.view(batch)) for each in (module, copied))
    assert all(ours[figure].value.equal(theirs[figure].value) for figure in ours)
