"""Sizes of batches with a memory of a known size, and range tests on a quadratic whose curve is known."""

from __future__ import annotations

import contextlib
import math
import os
import signal

import numpy as np
import pytest
import torch

from audiot.commands.launch import stopped
from audiot.training.tuning import (
    BatchTrials,
    LongestCrops,
    RangeTest,
    Trial,
    limited_memory,
    recommended,
    search,
    smoothed,
    suggestion,
)

# What a search from 1 to 100 utterances finds in a memory for five, by size.
FIVE_FIT = [(1, True), (2, True), (4, True), (5, True), (6, False), (8, False)]


def memory_for(room):
    """A trial that fits if it has at most so many utterances, and the sizes that were tried."""
    tried = []

    def attempt(utterances):
        tried.append(utterances)
        return Trial(utterances, 4.0 * utterances, 100.0 if utterances <= room else None)

    return attempt, tried


@pytest.mark.parametrize(
    ("room", "expected"),
    [(37, [1, 2, 4, 8, 16, 32, 64, 48, 40, 36, 38, 37]), (1, [1, 2]), (0, [1]), (999, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_sizes_are_doubled_and_then_bisected(room, expected):
    attempt, tried = memory_for(room)
    found = search(attempt, 1, 100, resolution=0.0)
    assert tried == expected
    assert [trial.utterances for trial in found] == sorted(expected)
    assert max([trial.utterances for trial in found if trial.fits], default=0) == min(room, 100)


def test_bisecting_ends_at_the_resolution_and_goes_below_the_first_size():
    attempt, tried = memory_for(1000)
    found = search(attempt, 1, 100_000, resolution=0.05)
    low, high = max(trial.utterances for trial in found if trial.fits), min(trial.utterances for trial in found if not trial.fits)
    assert low <= 1000 < high <= 1.05 * low
    attempt, tried = memory_for(5)
    search(attempt, 16, 100, resolution=0.0)
    assert tried == [16, 8, 4, 6, 5]


def test_the_smallest_batch_near_the_best_throughput_is_recommended():
    tried = [Trial(count, 4.0 * count, speed) for count, speed in ((1, 10.0), (2, 19.0), (4, 95.0), (8, 100.0), (16, None))]
    assert recommended(tried, 0.05).utterances == 4
    assert recommended(tried, 0.04).utterances == 8
    assert recommended(tried, 0.9).utterances == 1


@pytest.fixture
def trials(pretraining, tmp_path):
    """Makes trials of a module on a tiny corpus."""

    def make(module, margin=0.1, **given):
        data = pretraining.data()
        options = {"limit_val_batches": 0, "enable_checkpointing": False, "gradient_clip_val": 1.0} | given
        return BatchTrials(
            lambda steps: pretraining_trainer(pretraining, tmp_path, max_steps=steps, **options),
            module,
            LongestCrops(data),
            warmup=1,
            steps=2,
            margin=margin,
        )

    return make


def pretraining_trainer(pretraining, folder, **options):
    """A trainer without callbacks."""
    trainer = pretraining.trainer(folder, **options)
    trainer.callbacks.clear()
    return trainer


def test_a_lack_of_memory_in_a_step_bisects_and_leaves_the_weights_as_they_were(pretraining, trials, monkeypatch):
    module = pretraining.module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step, sizes = module.training_step, []

    def training_step(batch, batch_idx):
        sizes.append(len(batch["waveforms"]))
        if len(batch["waveforms"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(batch, batch_idx)

    monkeypatch.setattr(module, "training_step", training_step)
    found = search(trials(module), 1, 100, 0.0)
    assert [(trial.utterances, trial.fits) for trial in found] == FIVE_FIT
    assert sizes == [1] * 3 + [2] * 3 + [4] * 3 + [8] + [6] + [5] * 3
    assert all(trial.frames_per_s > 0 for trial in found if trial.fits)
    assert module._trainer is None
    assert all(parameter.grad is None for parameter in module.parameters())
    after = module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_full_ends_a_size_and_has_its_memory_again(pretraining, trials, monkeypatch):
    module, gib = pretraining.module(), 2**30
    step = module.training_step

    def training_step(batch, batch_idx):  # with a GiB for each utterance, in pieces as activations are
        pieces = 64 * len(batch["waveforms"])
        ballast = [torch.zeros(gib // 64, dtype=torch.uint8, device=module.device) for _ in range(pieces)]
        loss = step(batch, batch_idx)
        del ballast
        return loss

    monkeypatch.setattr(module, "training_step", training_step)
    torch.cuda.empty_cache()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    room = (reserved + 5.5 * gib) / torch.cuda.get_device_properties(0).total_memory
    found = search(trials(module, margin=1 - room, accelerator="gpu", devices=1), 1, 100, 0.0)
    assert [(trial.utterances, trial.fits) for trial in found] == FIVE_FIT
    assert all(trial.utterances < trial.peak_gib < trial.utterances + 0.5 for trial in found if trial.fits)
    assert torch.cuda.memory_allocated() - allocated < 0.25 * gib  # workspaces of cuBLAS stay
    assert torch.cuda.memory_reserved() - reserved < 0.5 * gib


@pytest.mark.parametrize("fails", [False, True])
def test_a_gpu_has_all_its_memory_again_after_a_trial(monkeypatch, fails):
    shares = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    with contextlib.suppress(ZeroDivisionError), limited_memory(torch.device("cuda"), 0.1):
        assert shares == [0.9]
        if fails:
            raise ZeroDivisionError
    assert shares == [0.9, 1.0]
    with limited_memory(torch.device("cpu"), 0.1):
        assert shares == [0.9, 1.0]


def test_sigterm_ends_a_search_as_ctrl_c_does(pretraining, trials, monkeypatch, tmp_path):
    module = pretraining.module()
    step = module.training_step

    def training_step(batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(batch, batch_idx)

    monkeypatch.setattr(module, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt), stopped("tune", tmp_path, lasts=False):
        trials(module)(1)


def test_an_error_that_is_no_lack_of_memory_ends_the_search(pretraining, trials, monkeypatch):
    module = pretraining.module()

    def training_step(batch, batch_idx):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(module, "training_step", training_step)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        search(trials(module), 1, 100, 0.0)


@pytest.mark.parametrize("options", [{}, {"crop_s": None}, {"lengths": [8000, 16000, 24000]}, {"lengths": [8000, 1_000_000]}])
def test_crops_are_the_longest_that_training_takes(pretraining, options):
    data = pretraining.data(**options)
    crops = LongestCrops(data)
    batches = iter(data.train_dataloader())
    longest = max(int(next(batches)["lengths"].max()) for _ in range(20))
    assert crops.num_samples == longest
    for utterances in (1, 3, 100):
        assert crops.most(crops.seconds(utterances)) == utterances
    crops.utterances, crops.batches = 70, 2
    first, second = crops.train_dataloader()
    assert first["waveforms"].shape == (70, longest)
    assert first["lengths"].tolist() == [longest] * 70
    keys = [*first["keys"].tolist(), *second["keys"].tolist()]
    assert len({*keys}) == 140
    again = LongestCrops(pretraining.data(**options))
    again.utterances, again.batches = 70, 2
    assert torch.equal(next(iter(again.train_dataloader()))["waveforms"], first["waveforms"])


def test_a_batch_of_data_has_as_many_crops_as_a_trial(pretraining):
    lengths = [8000, 16000]
    crops = LongestCrops(pretraining.data(lengths=lengths))
    data = pretraining.data(lengths=lengths, batch_s=crops.seconds(5))
    batches = iter(data.train_dataloader())
    counts = [len(batch["waveforms"]) for batch, _ in zip(batches, range(20), strict=False) if batch["lengths"].max() == 16000]
    assert max(counts) == 5


def descent(curvature, steps=1000, lowest=1e-5, highest=10.0):
    """Rates and losses of gradient descent on ½ · curvature · x², from x = 1."""
    rates, x, losses = np.geomspace(lowest, highest, steps).tolist(), 1.0, []
    for rate in rates:
        losses.append(0.5 * curvature * x * x)
        x -= rate * curvature * x
        if losses[-1] > 1e6:
            break
    return rates[: len(losses)], losses


@pytest.mark.parametrize("curvature", [0.3, 1.0, 20.0])
def test_the_steepest_rate_of_a_quadratic(curvature):
    """With rates that grow by a factor exp(δ), their sum up to η is η / δ, so the loss is exp(−2aη/δ): steepest at η = δ / 2a."""
    rates, losses = descent(curvature)
    growth = math.log(10.0 / 1e-5) / 999
    found = suggestion(rates, losses, window=3)
    assert found.rate == pytest.approx(growth / (2 * curvature), rel=0.03)
    assert found.low < found.rate < found.high < found.best
    assert found.best < 2.2 / curvature, "descent diverges above 2 / curvature"
    # z · exp(−z) is half its highest value, 1/e, at z = 0.2320 and z = 2.6783 (Lambert's W of −1/2e)
    assert found.low == pytest.approx(0.2320 * growth / (2 * curvature), rel=0.03)
    assert found.high == pytest.approx(2.6783 * growth / (2 * curvature), rel=0.03)


def test_noise_of_batches_moves_the_suggestion_little():
    rates, losses = descent(1.0, steps=200)
    clean = suggestion(rates, losses, 21)
    noise = np.random.default_rng(0).normal(0, 0.02, len(losses))
    noisy = suggestion(rates, (np.array(losses) + noise).tolist(), 21)
    assert 0.5 < noisy.rate / clean.rate < 2


@pytest.mark.parametrize("losses", [[1.0] * 30, [1.0 + 0.1 * step for step in range(30)], [3.0, 2.0], [], [float("nan")]])
def test_a_loss_that_does_not_fall_suggests_nothing(losses):
    assert suggestion(np.geomspace(1e-5, 1, 30).tolist()[: len(losses)], losses, 5) is None


def test_smoothing_is_the_mean_of_as_many_steps_on_both_sides():
    losses = [5.0, 1.0, 9.0, 2.0, 4.0, 7.0]
    assert smoothed(losses, 5) == pytest.approx([5.0, 5.0, 21 / 5, 23 / 5, 13 / 3, 7.0])
    assert smoothed([2.0] * 9, 5) == pytest.approx([2.0] * 9)


def test_a_range_test_ends_when_the_mean_explodes_or_a_loss_is_not_finite():
    test = RangeTest(1e-4, 1.0, 100, window=3, stop=4.0)
    means = [(3.0, False), (3.0, False), (3.0, False), (20.0, False), (20.0, True)]  # means 3, 8.67, 14.3 against 4 · 3
    assert [test.take(loss) for loss, _ in means] == [ends for _, ends in means]
    assert RangeTest(1e-4, 1.0, 100, window=3, stop=4.0).take(float("nan"))


@pytest.mark.parametrize("each", [1, 2])
def test_each_step_of_a_training_has_its_rate(pretraining, tmp_path, each):
    """One step over several batches has one rate and one loss."""
    test, taken = RangeTest(1e-4, 1e-2, 5, window=3, stop=1e9), []
    options = {"limit_val_batches": 0, "enable_checkpointing": False, "accumulate_grad_batches": each}
    trainer = pretraining_trainer(pretraining, tmp_path, max_steps=5, **options)
    trainer.callbacks.append(test)
    module = pretraining.module()
    module.hparams["scheduler"] = {"_target_": "audiot.training.optimization.constant", "_partial_": True}
    step = torch.optim.AdamW.step

    def noted(self, *arguments, **rest):
        taken.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", noted)
        trainer.fit(module, pretraining.data())
    expected = [1e-4 * 10 ** (number / 2) for number in range(5)]
    assert [rates[0] for rates in taken] == pytest.approx(expected)
    assert all(len({*rates}) == 1 for rates in taken)
    assert test.rates == pytest.approx(expected)
    assert len(test.losses) == 5
    assert all(map(math.isfinite, test.losses))
