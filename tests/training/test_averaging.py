"""Averages of weights against plain loops, in validations, checkpoints, tests and resumed runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from audiot.pretraining import MaskedAcousticModel
from audiot.runs import Interrupted, newest_checkpoint
from audiot.training.averaging import ExponentialAverage, StochasticAverage, hand_over_average
from audiot.training.fsdp import ShardedStrategy
from audiot.training.interrupt import GracefulInterrupt
from audiot.training.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")


class Record(Callback):
    """The weights after every step, the latest validation loss, and Ctrl-C after a step."""

    def __init__(self, stop=None):
        self.weights, self.stop = [], stop

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > len(self.weights) and (self.stop is None or trainer.global_step <= self.stop):
            self.weights.append([parameter.detach().double().clone() for parameter in pl_module.parameters()])
        if trainer.global_step == self.stop:
            next(each for each in trainer.callbacks if isinstance(each, GracefulInterrupt)).requested = True


def run(pretraining, folder, average=None, resume=False, stop=None, **options):
    """Nine steps with a validation after every third; the module, what was recorded, and the trainer."""
    record, store = Record(stop), CheckpointStore(folder, 5)
    callbacks = [*([average] if average else []), record, GracefulInterrupt(folder), store]
    trainer, module = pretraining.trainer(folder, callbacks, **options), pretraining.module()
    checkpoint = newest_checkpoint(folder.parent) if resume else None
    trainer.fit(module, pretraining.data(), ckpt_path=checkpoint, weights_only=True if resume else None)
    return module, record, trainer


def exponential(weights, decay=0.75):
    averages = [weights[0]]
    for latest in weights[1:]:
        averages.append([decay * old + (1 - decay) * new for old, new in zip(averages[-1], latest, strict=True)])
    return averages


def stochastic(weights, begin):
    return [torch.stack(each).mean(0) for each in zip(*weights[begin:], strict=True)]


def close(module, expected):
    for one, other in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(one.detach().double(), other, rtol=0, atol=1e-6)


def same(one, other):
    assert all(first.equal(second) for first, second in zip(one.values(), other.values(), strict=True))


@pytest.fixture(scope="module")
def plain(pretraining, tmp_path_factory):
    module, record, _ = run(pretraining, tmp_path_factory.mktemp("plain") / "checkpoints")
    return module.state_dict(), record.weights


@pytest.fixture(scope="module")
def averaged(pretraining, tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged") / "checkpoints"
    module, _, trainer = run(pretraining, folder, ExponentialAverage(0.75))
    return module, trainer, folder


def test_training_itself_is_the_one_without_an_average(plain, averaged):
    module, _, folder = averaged
    saved = torch.load(folder / "step=9.ckpt", weights_only=True)
    same(saved["current_model_state"], plain[0])
    same(module.state_dict(), plain[0])  # until the average is handed over


def test_what_is_validated_and_saved_is_the_exponential_average(pretraining, plain, averaged):
    _, trainer, folder = averaged
    for step in (6, 9):
        close(MaskedAcousticModel.from_checkpoint(folder / f"step={step}.ckpt"), exponential(plain[1])[step - 1])
    saved = MaskedAcousticModel.from_checkpoint(folder / "step=9.ckpt")
    (found,) = pretraining.trainer(folder).validate(saved, pretraining.data(), verbose=False)
    assert found[saved.monitor] == pytest.approx(float(trainer.callback_metrics[saved.monitor]), rel=1e-6)


def test_a_run_that_goes_on_has_the_average_of_an_unbroken_one(pretraining, averaged, tmp_path):
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "checkpoints", ExponentialAverage(0.75), stop=4)
    run(pretraining, tmp_path / "checkpoints", ExponentialAverage(0.75), resume=True)
    one, other = (torch.load(folder / "step=9.ckpt", weights_only=True) for folder in (tmp_path / "checkpoints", averaged[2]))
    for name in ("state_dict", "current_model_state", "averaging_state"):
        same(one[name], other[name])


def test_the_average_is_handed_over_also_where_nothing_was_left_to_train(pretraining, averaged):
    _, _, folder = averaged
    module, _, trainer = run(pretraining, folder, ExponentialAverage(0.75), resume=True)
    hand_over_average(trainer, module)
    same(module.state_dict(), torch.load(folder / "step=9.ckpt", weights_only=True)["state_dict"])
    (validation,) = trainer.validate(module, pretraining.data(), verbose=False)
    assert validation[module.monitor] == float(averaged[1].callback_metrics[module.monitor])


def test_a_checkpoint_that_is_tested_gives_its_average(pretraining, averaged):
    _, _, folder = averaged
    module, _, trainer = run(pretraining, folder, ExponentialAverage(0.75), resume=True)
    expected = torch.load(folder / "step=6.ckpt", weights_only=True)["state_dict"]
    for _ in range(2):
        trainer.validate(module, pretraining.data(), ckpt_path=folder / "step=6.ckpt", weights_only=True, verbose=False)
        same(module.state_dict(), expected)
        hand_over_average(trainer, module)


def test_stochastic_averaging_is_the_mean_over_the_last_steps(pretraining, plain, tmp_path):
    average = StochasticAverage(0.5)  # 4 of 9 steps are before it
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path / "checkpoints", average, stop=3)
    saved = torch.load(newest_checkpoint(tmp_path), weights_only=True)
    same(saved["state_dict"], saved["current_model_state"])  # not yet begun
    module, _, trainer = run(pretraining, tmp_path / "checkpoints", StochasticAverage(0.5), resume=True)
    hand_over_average(trainer, module)
    close(module, stochastic(plain[1], 4))


def test_steps_of_several_batches_count_once(pretraining, tmp_path):
    options = {"accumulate_grad_batches": 2, "max_steps": 4, "val_check_interval": 100}
    module, record, trainer = run(pretraining, tmp_path / "checkpoints", ExponentialAverage(0.75), **options)
    hand_over_average(trainer, module)
    close(module, exponential(record.weights)[-1])


def test_impossible_averages_are_refused():
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"callbacks.average.decay must be in \[0, 1\), found"):
            ExponentialAverage(decay)
        with pytest.raises(ValueError, match=r"callbacks.average.start must be in \[0, 1\), found"):
            StochasticAverage(decay)
    sharded = SimpleNamespace(strategy=ShardedStrategy())
    with pytest.raises(ValueError, match="set trainer=ddp instead of trainer=fsdp"):
        ExponentialAverage().setup(sharded, torch.nn.Linear(2, 2), "fit")
