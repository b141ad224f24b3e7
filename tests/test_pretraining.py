"""Pre-training against slow loops, and resuming to the byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from learning import losses_of
from pytorch_lightning.callbacks import ModelCheckpoint

from audiot.base.streams import key
from audiot.checkpoint import save_encoder, save_objective
from audiot.data.batches import to_device
from audiot.objectives.corruption import Corruption
from audiot.objectives.reconstruction import masked_l1
from audiot.pretraining import MaskedAcousticModel

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
TERA = {"band_width": 8, "noise_probability": 0.5}


def first_batch(pretraining, **options):
    return to_device(next(iter(pretraining.data(**options).train_dataloader())), torch.device("cpu"))


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def exported(folder, module):
    save_encoder(folder, module.model)
    save_objective(folder, module.hparams["objective"], module.objective)
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("model", "objective")]


def test_training_lowers_the_loss_on_one_batch(pretraining):
    model, batch = pretraining.module(), first_batch(pretraining)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = losses_of(model, batch, optimizer, 80)
    assert losses[0] == pytest.approx(0.8, abs=0.1)  # about what zeros get, of features with deviation 1
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def shaped(model, num_utterances, num_tokens, device="cpu"):
    """A batch of noise without padding."""
    generator = torch.Generator().manual_seed(num_utterances + num_tokens)
    waveforms = 0.1 * torch.randn(num_utterances, model.model.features.num_samples(num_tokens), generator=generator)
    keys = torch.arange(num_utterances) + 1
    batch = {"waveforms": waveforms, "lengths": torch.full((num_utterances,), waveforms.shape[1]), "keys": keys}
    return to_device(batch, torch.device(device))


@pytest.mark.parametrize("objective", [{}, pytest.param(TERA, marks=pytest.mark.slow)], ids=["mockingjay", "tera"])
def test_the_compiled_step_is_the_eager_one_in_few_graphs_without_breaks(pretraining, objective):
    torch._dynamo.reset()
    model, graphs = pretraining.module(**objective).eval(), []  # dropout off

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.loss, backend=backend, fullgraph=True)
    for num_utterances, num_tokens in ((3, 24), (2, 40), (2, 56), (4, 24), (5, 64), (3, 88)):
        tokens, lengths, _, valid, _ = model.inputs(shaped(model, num_utterances, num_tokens))
        assert valid is None  # no mask where nothing is padded
        eager = model.loss(tokens, lengths, keys := torch.arange(num_utterances), valid)
        torch.testing.assert_close(compiled(tokens, lengths, keys, valid), eager)
    assert len(graphs) == 2  # the first shape's, and one for all others


def test_layers_that_are_alike_share_what_is_compiled(pretraining, tiny, monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def compiled(function, graphs_of_cuda):
        return torch.compile(function, backend=lambda graph, inputs: graphs.append(graph) or graph)

    monkeypatch.setattr("audiot.training.compilation.compiled", compiled)
    torch.manual_seed(0)
    more = tiny["model"] | {"num_layers": 10, "dropout": 0.0}  # PyTorch compiles a function 8 times at most
    model = MaskedAcousticModel(**tiny | {"model": more}, seed=5)
    features = torch.randn(2, 24, model.model.features.embed_dim)
    expected = model.model.encoder(features)[-1]
    model.compile_layers()
    torch.testing.assert_close(model.model.encoder(features)[-1], expected)
    assert len(graphs) == 1


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("graphs", [False, True])
def test_a_compiled_step_on_the_gpu_waits_for_nothing_and_learns_what_the_eager_one_learns(pretraining, graphs):
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        model = pretraining.module().cuda().eval()  # dropout off
        if compiled:
            model.compile_step(graphs=graphs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        taken = []
        for step in range(12):
            batch = shaped(model, 3, (24, 40, 56)[step % 3], "cuda")
            torch.cuda.set_sync_debug_mode("error" if step >= 9 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                tokens, lengths, _, valid, _ = model.inputs(batch)
                loss = model.step_loss(tokens, lengths, batch["keys"], valid).value
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            taken.append(loss.detach())
        losses.append(torch.stack(taken).tolist())
    assert losses[1] == pytest.approx(losses[0], abs=0.02)


@pytest.mark.parametrize("objective", [{}, TERA, {"mask_proportion": 0.9}], ids=["mockingjay", "tera", "dense"])
def test_training_loss_equals_a_loop_over_all_frames(pretraining, objective):
    model, batch = pretraining.module(**objective).eval(), first_batch(pretraining, crop_s=None)  # dropout off
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # attention and biases matter from now on
    loss = model.training_step(batch, 0)
    tokens, lengths = model.model.features(batch["waveforms"], batch["lengths"])
    assert len(set(lengths.tolist())) > 1  # padded
    corrupted = model.objective.corruption(tokens, lengths, batch["keys"], model.objective.stack)
    valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    prediction = model.objective.head(model.model.encoder(corrupted.features, valid)[-1])
    errors = []
    for row in range(len(tokens)):
        for t in range(int(lengths[row])):
            if corrupted.frames[row, t]:
                wanted = slice(None) if corrupted.elements is None else corrupted.elements[row, t]
                errors += (prediction[row, t] - tokens[row, t]).abs()[wanted].tolist()
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_masked_l1_counts_the_scored_elements_alone():
    prediction, target = torch.tensor([[1.0, 5.0], [2.0, -7.0]]), torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    assert masked_l1(prediction, target, torch.tensor([[1], [0]])).value == (1 + 3) / 2
    assert masked_l1(prediction, target, torch.tensor([[0, 1], [0, 1]])).value == (3 + 7) / 2
    assert masked_l1(prediction, target, torch.zeros(2, 1)).value == 0


def test_head_is_run_on_masked_frames_alone(pretraining):
    model, batch = pretraining.module().eval(), first_batch(pretraining)
    seen = []
    model.objective.head.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].shape))
    model.training_step(batch, 0)
    tokens, _ = model.model.features(batch["waveforms"], batch["lengths"])
    assert seen == [(len(tokens), model.objective.corruption.max_masked(tokens.shape[1]), 24)]


def test_validation_metrics_equal_a_plain_recomputation(pretraining, tmp_path):
    model = pretraining.module()
    source = pretraining.data()
    (metrics,) = pretraining.trainer(tmp_path).validate(model, source, verbose=False)
    model.eval()
    errors = {"val_l1": [], "zero_l1": [], "interpolation_l1": []}
    for cut in source.cuts("valid"):  # one utterance at a time
        waveform = torch.from_numpy(cut.load_audio())[:, : round(source.crop_s * 16000)]
        tokens, lengths = model.model.features(waveform)
        masked = Corruption(span=3).mask(torch.tensor([key("validation", cut.id)]), lengths, tokens.shape[1])
        with torch.no_grad():
            prediction = model.objective.head(model.model.encoder(tokens.masked_fill(masked[..., None], 0))[-1])
        target = tokens[0].reshape(-1, 20).numpy()  # three frames a token
        prediction = prediction[0].reshape(-1, 20).numpy()
        hidden = np.repeat(masked[0].numpy(), 3)
        at, visible = np.flatnonzero(hidden), np.flatnonzero(~hidden)
        for t in at:
            errors["val_l1"] += np.abs(prediction[t] - target[t]).tolist()
            errors["zero_l1"] += np.abs(target[t]).tolist()
        for channel in target.T:
            errors["interpolation_l1"] += np.abs(np.interp(at, visible, channel[visible]) - channel[at]).tolist()
    for name, values in errors.items():
        assert metrics[f"pretrain/{name}"] == pytest.approx(np.mean(values), rel=1e-5)


def test_validation_masks_are_the_same_for_every_seed_and_epoch(pretraining):
    model = pretraining.module().eval()
    views = []
    for seed, position in [(0, (0, 0)), (7, (0, 0)), (0, (3, 1))]:
        source = pretraining.data(seed=seed)
        source.load_state_dict({"next_batch": position})
        views.append([(batch["ids"], model.view(batch)["masked"]) for batch in source.ordered_loader("valid")])
    assert len(views[0]) > 1
    for other in views[1:]:
        for (ids, masked), (other_ids, other_masked) in zip(views[0], other, strict=True):
            assert ids == other_ids
            assert masked.equal(other_masked)


def test_training_masks_change_with_epoch_and_seed(pretraining):
    def keys(seed, epoch):
        source = pretraining.data(seed=seed, crop_s=None)
        source.load_state_dict({"next_batch": (epoch, 0)})
        found = {}
        for batch in source.train_dataloader():
            if batch["position"][0] != epoch:
                return found
            found |= dict(zip(batch["ids"], batch["keys"].tolist(), strict=True))
        raise AssertionError("training has no end")

    one = keys(0, 0)
    for other in (keys(0, 1), keys(1, 0)):
        assert other.keys() == one.keys()
        assert not set(other.values()) & set(one.values())


@pytest.fixture(scope="module")
def unbroken(pretraining, tmp_path_factory):
    """Folder with the checkpoints of every step, and the bytes of the encoder after the last."""
    folder = tmp_path_factory.mktemp("unbroken")
    model, source = pretraining.module(), pretraining.data()
    pretraining.trainer(folder, [every_step(folder)]).fit(model, source)
    assert source.next_batch[0] > 0  # more than an epoch
    return folder, exported(folder / "encoder", model)


# Validation follows steps 3, 6 and 9.
@pytest.mark.parametrize(("step", "num_workers"), [(2, 0), (3, 0), (4, 0), (4, 1), (6, 0), (8, 0)])
def test_a_resumed_run_ends_with_the_same_bytes(pretraining, unbroken, tmp_path, step, num_workers):
    folder, expected = unbroken
    model, source = pretraining.module(seed=step), pretraining.data(num_workers=num_workers)  # other weights to begin with
    pretraining.trainer(tmp_path).fit(model, source, ckpt_path=folder / f"step={step}.ckpt", weights_only=False)
    assert model.trained_steps == step
    assert exported(tmp_path / "encoder", model) == expected


def test_a_run_resumed_twice_ends_with_the_same_bytes(pretraining, unbroken, tmp_path):
    folder, expected = unbroken
    second = pretraining.trainer(tmp_path, [every_step(tmp_path)])
    second.fit(pretraining.module(seed=1), pretraining.data(), ckpt_path=folder / "step=3.ckpt", weights_only=False)
    model = pretraining.module(seed=2)
    pretraining.trainer(tmp_path).fit(model, pretraining.data(), ckpt_path=tmp_path / "step=7.ckpt", weights_only=False)
    assert exported(tmp_path / "encoder", model) == expected


def test_resuming_is_exact_with_accumulated_gradients(pretraining, tmp_path):
    results = []
    for folder, checkpoint in [("unbroken", None), ("resumed", tmp_path / "unbroken" / "step=2.ckpt")]:
        model = pretraining.module()
        trainer = pretraining.trainer(tmp_path, [every_step(tmp_path / folder)], accumulate_grad_batches=2, max_steps=4)
        trainer.fit(model, pretraining.data(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        results.append(exported(tmp_path / "encoder", model))
    assert results[0] == results[1]


def test_validation_does_not_change_training(pretraining, unbroken, tmp_path):
    model = pretraining.module()
    pretraining.trainer(tmp_path, val_check_interval=5).fit(model, pretraining.data())
    assert exported(tmp_path / "encoder", model) == unbroken[1]


def test_seed_changes_the_training(pretraining, unbroken, tmp_path):
    model = pretraining.module()
    pretraining.trainer(tmp_path).fit(model, pretraining.data(seed=1))
    assert exported(tmp_path / "encoder", model) != unbroken[1]


def test_a_checkpoint_gives_the_module_without_its_configs(pretraining, unbroken):
    model = MaskedAcousticModel.from_checkpoint(unbroken[0] / "step=9.ckpt")
    assert model.trained_steps == 9
    batch = first_batch(pretraining)
    trained = pretraining.module()
    trained.load_state_dict(torch.load(unbroken[0] / "step=9.ckpt", weights_only=False)["state_dict"])
    assert model.eval()(batch["waveforms"], batch["lengths"])[0].equal(trained.eval()(batch["waveforms"], batch["lengths"])[0])


def test_an_exported_encoder_gives_the_module_with_its_objective(pretraining, tmp_path):
    model = pretraining.module().eval()
    exported(tmp_path / "encoder", model)
    again = MaskedAcousticModel.from_encoder(tmp_path / "encoder")
    assert not again.training
    batch = first_batch(pretraining)
    view, expected = again.view(batch), model.view(batch)
    assert view.keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in view.items())
    for name in ("objective.json", "objective.safetensors"):
        (tmp_path / "encoder" / name).unlink()
    with pytest.raises(ValueError, match=r"encoder has no objective\.json"):
        MaskedAcousticModel.from_encoder(tmp_path / "encoder")
