"""Steps that are not finite change nothing and are told, and so are batches that memory has no room for."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from pytorch_lightning.callbacks import Callback
from skipping_ranks import OPTIMIZERS, STRATEGIES, batches
from unequal_batches import objective_config

from audiot.attention import build
from audiot.base.streams import key, seed_torch
from audiot.data.batches import to_device
from audiot.data.datamodule import SpeechDataModule
from audiot.data.labels import FrameLabels
from audiot.downstream.module import DownstreamModule
from audiot.downstream.upstream import random_encoder
from audiot.pretraining import MaskedAcousticModel
from audiot.training.watch import FiniteSteps, batches_that_fit, weights_are_finite

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning", "ignore:the loss or gradient of step")
FUSED = {"optimizer": TINY["optimizer"] | {"fused": True}}
PLAIN = {"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 2e-3, "weight_decay": 0.01, "foreach": False}}
MOMENTUM = {"optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.01, "momentum": 0.9, "fused": True}}


class Spoil(Callback):
    """Make samples of some batches undefined."""

    def __init__(self, *batches):
        self.batches, self.seen = batches, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.batches:
            batch["waveforms"][0, 5000] = torch.nan
        self.seen.append(batch)


def made(**configs):
    torch.manual_seed(0)
    return MaskedAcousticModel(**TINY | configs, seed=5)


def state_of(module, optimizer):
    """Weights and buffers, moments, and learning rates."""
    moments = {
        f"{number} {name}": torch.as_tensor(value)
        for number, own in optimizer.state_dict()["state"].items()
        for name, value in own.items()
    }
    rates = {f"rate {number}": torch.tensor(group["lr"]) for number, group in enumerate(optimizer.param_groups)}
    return {name: value.clone() for name, value in module.state_dict().items()} | moments | rates


def train(pretraining, folder, module, spoiled, limit=10, **options):
    """Train, and return the batches and the callback that watched."""
    spoil, watch = Spoil(*spoiled), FiniteSteps(folder, limit)
    trainer = pretraining.trainer(folder, [spoil, watch], enable_checkpointing=False, **options)
    trainer.fit(module, pretraining.data())
    return spoil.seen, watch


def by_hand(module, batches, skipped, steps, per_step=1):
    """The training of Lightning as a loop that leaves out the steps with the numbers `skipped`."""
    module.trainer = SimpleNamespace(estimated_stepping_batches=steps)
    configured = module.configure_optimizers()
    module.trainer = None
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    module.train()
    for step in range(steps):
        own = batches[step * per_step : (step + 1) * per_step]
        if step not in skipped:
            optimizer.zero_grad()
            means = []
            for batch in own:
                seed_torch(key("dropout", 5, *batch["position"]), torch.device("cpu"))
                means.append(module.step_loss(*module.inputs(batch)))
            total = sum(mean.scored for mean in means)
            sum(mean.value * mean.scored / total for mean in means).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
        schedule.step()
    return state_of(module, optimizer)


@pytest.mark.parametrize("optimizer", [FUSED, PLAIN, MOMENTUM], ids=["fused", "plain", "momentum"])
@pytest.mark.parametrize("spoiled", [[0], [2, 3]])
def test_training_goes_on_as_if_the_step_had_been_left_out(pretraining, tmp_path, optimizer, spoiled):
    module = made(**optimizer)
    batches, watch = train(pretraining, tmp_path, module, spoiled, max_steps=5)
    found = state_of(module, module.trainer.optimizers[0])
    expected = by_hand(made(**optimizer), batches, spoiled, 5)
    assert watch.skipped == len(spoiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value), name
    assert weights_are_finite(module)


def test_an_infinite_gradient_of_a_finite_loss_is_left_out(pretraining, tmp_path):
    module = made(**FUSED)

    class Overflow(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                next(pl_module.model.parameters()).grad.view(-1)[0] = torch.inf

    watch, spoil = FiniteSteps(tmp_path), Spoil()
    trainer = pretraining.trainer(tmp_path, [Overflow(), spoil, watch], enable_checkpointing=False, max_steps=4)
    trainer.fit(module, pretraining.data())
    expected = by_hand(made(**FUSED), spoil.seen, [2], 4)
    found = state_of(module, trainer.optimizers[0])
    assert watch.skipped == 1
    for name, value in expected.items():
        assert found[name].equal(value), name


@pytest.mark.parametrize("optimizer", [FUSED, PLAIN], ids=["fused", "plain"])
def test_one_bad_batch_of_two_leaves_out_the_step_of_both(pretraining, tmp_path, optimizer):
    module = made(**optimizer)
    batches, watch = train(pretraining, tmp_path, module, [3], max_steps=4, accumulate_grad_batches=2)
    expected = by_hand(made(**optimizer), batches, [1], 4, per_step=2)
    found = state_of(module, module.trainer.optimizers[0])
    assert watch.skipped == 1
    for name, value in expected.items():
        # Adam enlarges the rounding of tiny gradients. A step moves most weights by 1e-3.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert torch.load(tmp_path / "nonfinite.pt", weights_only=True)["ids"] == batches[3]["ids"]


@pytest.mark.parametrize("spoiled", [[1, 2], [3]])
def test_codes_and_teacher_stay_as_they_are(pretraining, tmp_path, spoiled):
    states = []

    class Note(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append(copy.deepcopy(pl_module.objective.state_dict()))

    torch.manual_seed(0)
    module = made(objective=objective_config("self_distillation") | {"steps": 9}, **FUSED)
    data = pretraining.data()
    module.objective.prior.copy_(torch.rand_like(module.objective.prior).softmax(1))
    module.objective.prior[:, 0] = 1e-6  # a dead code, which a step would revive
    trainer = pretraining.trainer(
        tmp_path, [Spoil(*spoiled), FiniteSteps(tmp_path), Note()], enable_checkpointing=False, max_steps=5, val_check_interval=99
    )
    trainer.fit(module, data)
    for step in range(1, 5):
        same = {name: states[step][name].equal(states[step - 1][name]) for name in states[step]}
        if step in spoiled:
            assert all(same.values())
        else:
            assert not same["codebook"]
            assert not same["step"]
    assert all(value.isfinite().all() for value in states[-1].values())


@torch.no_grad()
def test_a_skipped_step_revives_no_dead_code():
    objective = made(objective=objective_config("self_distillation") | {"steps": 9}).objective
    objective.prior.fill_(1 / objective.num_codes)
    objective.prior[:, 0], objective.prior[:, 1] = 1e-6, 0.5
    before = copy.deepcopy(objective.state_dict())
    model = made().model
    for skipped in (True, False):
        objective.discard(torch.tensor(skipped))
        objective.after_step(model)
        same = {name: value.equal(before[name]) for name, value in objective.state_dict().items()}
        assert all(same.values()) if skipped else not (same["prior"] or same["step"])


def test_centroids_stay_as_they_are_and_forget_the_skipped_frames():
    torch.manual_seed(0)
    layer = build("routing", embed_dim=16, num_heads=2, max_frames=16, num_clusters=2)
    layer.train()
    mechanism = layer.mechanism
    before = mechanism.centroids.clone()
    layer(torch.randn(1, 16, 16))
    mechanism.discard(torch.tensor(True))
    mechanism.after_step()
    assert mechanism.centroids.equal(before)
    layer(torch.randn(1, 16, 16))
    mechanism.discard(torch.tensor(False))
    mechanism.after_step()
    assert not mechanism.centroids.equal(before)


def test_too_many_skipped_steps_in_a_row_end_the_training_with_the_first_batch(pretraining, tmp_path):
    module = made(**FUSED)
    with pytest.raises(ValueError, match="training diverged") as caught:
        train(pretraining, tmp_path, module, [1, 3, 4, 5, 6], limit=3)
    assert module.trainer.global_step == 6
    saved = torch.load(tmp_path / "nonfinite.pt", weights_only=True)
    line = str(caught.value)
    assert "\n" not in line
    number, names = len(saved["ids"]), ", ".join(saved["ids"][:3])
    assert f"in 3 steps in a row, all skipped, the first step 4 ({number} utterances: {names}" in line
    assert f"lower optimizer.lr, or look at its batch, {tmp_path / 'nonfinite.pt'}" in line
    assert (saved["step"], saved["seed"]) == (4, 5)
    assert weights_are_finite(module)
    again = to_device(saved, torch.device("cpu"))
    module.train()
    module.trainer = None
    module.on_train_batch_start(again, 0)
    assert not module.training_step(again, 0).isfinite()
    again["waveforms"].nan_to_num_()
    assert module.training_step(again, 0).isfinite()


def test_skipped_steps_are_logged_and_a_resumed_run_counts_on(pretraining, tmp_path):
    module = made(**FUSED)
    spoil, watch = Spoil(1, 3), FiniteSteps(tmp_path)
    trainer = pretraining.trainer(
        tmp_path, [spoil, watch], enable_checkpointing=False, max_steps=2, log_every_n_steps=1, val_check_interval=99
    )
    trainer.fit(module, pretraining.data())
    assert trainer.callback_metrics["skipped_steps"] == 1
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    later = FiniteSteps(tmp_path)
    trainer = pretraining.trainer(tmp_path, [spoil, later], enable_checkpointing=False, max_steps=5, val_check_interval=99)
    trainer.fit(module, pretraining.data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert later.skipped == 2


def test_finite_training_writes_and_logs_nothing(pretraining, tmp_path):
    module = made(**FUSED)
    train(pretraining, tmp_path, module, [], max_steps=2, log_every_n_steps=1)
    assert "skipped_steps" not in module.trainer.callback_metrics
    assert not (tmp_path / "nonfinite.pt").exists()


def test_a_limit_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.watch\.limit must be at least 1, found 0"):
        FiniteSteps(tmp_path, 0)


def test_weights_that_are_not_finite_are_noticed():
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(3e38)
        assert weights_are_finite(module)
        module.weight[1, 2] = torch.nan
        assert not weights_are_finite(module)
        module.weight[1, 2] = -torch.inf
        assert not weights_are_finite(module)


@pytest.fixture(scope="module")
def probe(demo_corpus):
    """Function that makes a frame classifier and its data."""

    def both():
        upstream = random_encoder(0, features=TINY["features"], model=TINY["model"])
        labels = FrameLabels("phone", upstream.features)
        data = SpeechDataModule(demo_corpus, "phone", batch_s=8.0, num_buckets=2, num_workers=0, labels=labels)
        torch.manual_seed(1)
        module = DownstreamModule(
            upstream=upstream.config,
            head={"_target_": "audiot.downstream.heads.FrameClassifier"},
            objective={"_target_": "audiot.downstream.objectives.Classification"},
            classes=data.classes,
            layers="weighted_sum",
            train_encoder=True,
            scheduler=TINY["scheduler"],
            **FUSED,
        )
        return module, data

    return both


def test_fine_tuning_skips_counts_and_ends_as_pre_training_does(probe, pretraining, tmp_path):
    import pytorch_lightning as pl

    for spoiled, limit in (([1], 10), ([1, 2], 2)):
        module, data = probe()
        before = {name: value.clone() for name, value in module.state_dict().items()}
        watch = FiniteSteps(tmp_path, limit)
        settings = {"accelerator": "cpu", "max_steps": 3, "max_epochs": -1, "logger": False, "enable_checkpointing": False}
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0}
        trainer = pl.Trainer(**settings, **silent, default_root_dir=tmp_path, callbacks=[Spoil(*spoiled), watch])
        if limit == 2:
            with pytest.raises(ValueError, match=r"training diverged: .* in 2 steps in a row, all skipped, the first step 2 \("):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data)
            assert watch.skipped == 1
        assert weights_are_finite(module)
        assert not module.head.linear.weight.equal(before["head.linear.weight"])
        assert torch.load(tmp_path / "nonfinite.pt", weights_only=True)["labels"].shape[0] > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
@pytest.mark.parametrize("place", ["training_step", "validation_step"])
def test_out_of_memory_names_the_batch_and_what_to_lower(pretraining, tmp_path, monkeypatch, error, place):
    def fail(self, batch, batch_idx):
        sizes.append((len(batch["ids"]), int(batch["lengths"].max()) / 16000))
        raise error("you can't allocate memory. Tried 5 GiB. Read on.\nmore")

    sizes = []
    monkeypatch.setattr(MaskedAcousticModel, place, fail)
    trainer = pretraining.trainer(tmp_path, [FiniteSteps(tmp_path)], enable_checkpointing=False)
    with pytest.raises(ValueError, match="out of memory") as caught, batches_that_fit(trainer):
        trainer.fit(made(), pretraining.data())
    ((number, longest),) = sizes
    where = "at step 1" if place == "training_step" else "in the validation after step 3"
    assert str(caught.value) == (
        f"out of memory {where}, with {number} utterances, the longest of {longest:.4g} s: "
        "lower data.batch_s or data.crop_s (you can't allocate memory. Tried 5 GiB)"
    )


def test_other_errors_stay_what_they_are(pretraining, tmp_path):
    trainer = pretraining.trainer(tmp_path)
    with pytest.raises(RuntimeError, match="something else"), batches_that_fit(trainer):
        raise RuntimeError("something else")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder of two ranks, and the results of each."""
    folder = tmp_path_factory.mktemp("ranks")
    program, started = str(Path(__file__).parents[1] / "skipping_ranks.py"), []
    for rank in range(2):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        started.append(subprocess.Popen([sys.executable, program, str(folder), str(rank)], env=environment))
    assert [process.wait(300) for process in started] == [0, 0]
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_agree_to_skip_the_step_of_which_one_has_a_bad_batch(ranks, strategy, optimizer):
    folder, results = ranks
    for result in results:
        states, skipped, line = result[strategy, optimizer]
        for name, (first, second, third, *_) in states.items():
            assert second.equal(first), name
            assert not third.equal(second), name
            assert all(value.isfinite().all() for value in states[name])
        assert skipped == 3
        assert "in 2 steps in a row, all skipped, the first step 4 (4 utterances: bad 0, bad 1, bad 2, …)" in line
    for name, values in results[0][strategy, optimizer][0].items():
        assert all(map(torch.equal, values, results[1][strategy, optimizer][0][name])), name
    saved = torch.load(folder / strategy / optimizer / "nonfinite.pt", weights_only=True)
    assert (saved["step"], saved["ids"]) == (4, batches(1)[3]["ids"])
    assert saved["tokens"].isnan().any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_skipping_a_compiled_step_on_the_gpu_waits_for_nothing(pretraining):
    torch._dynamo.reset()
    module = made(**FUSED).cuda()
    module.log_loss = lambda loss: None
    module.log_norm = lambda norm: None
    module.clip_gradients = lambda *_, **__: None
    module.compile_step(graphs=True)
    module._trainer = SimpleNamespace(
        accumulate_grad_batches=1, world_size=1, estimated_stepping_batches=9, precision_plugin=SimpleNamespace()
    )
    optimizer = module.configure_optimizers()["optimizer"]
    batch = to_device(next(iter(pretraining.data().train_dataloader())), torch.device("cuda"))
    tokens, *others = module.inputs(batch)
    before = None
    for step in range(7):
        bad = step in (5, 6)
        given = tokens.clone().fill_(torch.nan) if bad else tokens
        torch.cuda.set_sync_debug_mode("error" if bad else "default")
        optimizer.zero_grad()
        module.weighted(module.step_loss(given, *others), step).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert bool(module.latest_skipped) == bad
        after = state_of(module, optimizer)
        assert before is None or all(value.equal(before[name]) for name, value in after.items()) == bad
        before = after
