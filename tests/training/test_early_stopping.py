"""When a training stops early, by validation figures that a test makes up, and how it goes on."""

from __future__ import annotations

import pytest
from pytorch_lightning.callbacks import Callback

from audiot.commands.closing import stop_line
from audiot.runs import Interrupted, newest_checkpoint
from audiot.training.early_stopping import EarlyStopping, stopped_early
from audiot.training.interrupt import GracefulInterrupt
from audiot.training.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:::pytorch_lightning")
FIGURES = {3: 0.5, 6: 0.3, 9: 0.35, 12: 0.31, 15: 0.32, 18: 0.1}  # by step: the third without a better one is at step 15


class Told(Callback):
    """Log the figures, whose negative is as good a measure of the other kind, and stop by a signal after a step."""

    def __init__(self, stop):
        self.stop, self.validated = stop, []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validated.append(trainer.global_step)
        pl_module.log("told", FIGURES[trainer.global_step])
        pl_module.log("negative", -FIGURES[trainer.global_step])

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.stop:
            next(each for each in trainer.callbacks if isinstance(each, GracefulInterrupt)).requested = True


def run(pretraining, folder, resume=False, stop=None, max_steps=18, **options):
    """Steps that were validated, and the trainer."""
    told, folder = Told(stop), folder / "checkpoints"
    stopping = EarlyStopping(**{"monitor": "told", "patience": 3} | options)
    trainer = pretraining.trainer(
        folder, [stopping, told, GracefulInterrupt(folder), CheckpointStore(folder, 4)], max_steps=max_steps
    )
    checkpoint = newest_checkpoint(folder.parent) if resume else None
    trainer.fit(pretraining.module(), pretraining.data(), ckpt_path=checkpoint, weights_only=True if resume else None)
    return told.validated, trainer


@pytest.mark.parametrize("figure", [{}, {"monitor": "negative", "mode": "max"}], ids=["min", "max"])
def test_it_stops_after_validations_in_a_row_without_a_better_one(pretraining, tmp_path, figure):
    validated, trainer = run(pretraining, tmp_path, **figure)
    assert validated == [3, 6, 9, 12, 15]
    assert trainer.global_step == 15
    assert stopped_early(trainer) == {"stopped_patience": 3}


def test_a_small_gain_counts_as_none(pretraining, tmp_path):
    assert run(pretraining, tmp_path, min_delta=0.25, patience=2)[1].global_step == 9


def test_a_training_that_comes_to_its_last_step_was_not_stopped(pretraining, tmp_path):
    for max_steps, patience in ((18, 4), (15, 3)):
        _, trainer = run(pretraining, tmp_path / str(max_steps), max_steps=max_steps, patience=patience)
        assert trainer.global_step == max_steps
        assert stopped_early(trainer) == {}


def test_it_counts_on_when_a_run_goes_on_and_a_stopped_one_goes_on_with_more_patience(pretraining, tmp_path):
    with pytest.raises(Interrupted):
        run(pretraining, tmp_path, stop=12)  # before its validation
    validated, trainer = run(pretraining, tmp_path, resume=True)
    assert validated == [12, 15]
    assert stopped_early(trainer) == {"stopped_patience": 3}
    validated, trainer = run(pretraining, tmp_path, resume=True)
    assert (validated, trainer.global_step) == ([15], 15)  # no step is added
    assert stopped_early(trainer) == {"stopped_patience": 3}
    validated, trainer = run(pretraining, tmp_path, resume=True, patience=4)
    assert validated == [15, 18]
    assert stopped_early(trainer) == {}


def test_without_a_figure_it_is_the_modules(pretraining, tmp_path):
    _, trainer = run(pretraining, tmp_path, monitor=None, min_delta=100.0, patience=1)
    assert trainer.global_step == 6


def test_a_run_says_that_it_stopped():
    assert stop_line({"steps": 1500}) == {}
    assert stop_line({"steps": 1500, "stopped_patience": 3}) == {
        "stopped": "early, at step 1,500: no better validation in 3 in a row (callbacks.early_stopping.patience=3)"
    }


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"callbacks.early_stopping.patience must be at least 1, found 0"):
        EarlyStopping(None, patience=0)
    with pytest.raises(ValueError, match=r"callbacks.early_stopping.min_delta must be at least 0, found -1"):
        EarlyStopping(None, min_delta=-1)
