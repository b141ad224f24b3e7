"""How much audio a step has, whatever the number of processes."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from audiot.base.config import compose_command
from audiot.training.trainer import share_step


def shared(total, batch_s, devices=1, nodes=1, **trainer):
    """A trainer after its step was shared out."""
    made = SimpleNamespace(num_devices=devices, num_nodes=nodes, accumulate_grad_batches=1, val_check_interval=100)
    data = {"global_batch_s": total, "batch_s": batch_s}
    share_step(OmegaConf.create({"data": data, "trainer": {"accumulate_grad_batches": 1} | trainer}), made)
    return made


@pytest.mark.parametrize(
    ("total", "batch_s", "devices", "nodes", "batches"),
    [(256, 256, 1, 1, 1), (256, 256, 8, 1, 1), (256, 50, 1, 1, 6), (256, 50, 2, 1, 3), (256, 50, 8, 2, 1), (0.3, 0.1, 1, 1, 3)],
)
def test_each_process_adds_up_as_many_batches_as_its_share_needs(total, batch_s, devices, nodes, batches):
    made = shared(total, batch_s, devices, nodes)
    assert (made.accumulate_grad_batches, made.val_check_interval) == (batches, 100 * batches)


def test_who_says_both_is_told():
    with pytest.raises(ValueError, match=r"drop trainer\.accumulate_grad_batches"):
        shared(256, 50, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="positive number of seconds or null, found 0"):
        shared(0, 50)


@pytest.mark.parametrize(("processes", "batches"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_a_training_step_has_the_audio_that_the_config_says(pretraining, processes, batches):
    data = pretraining.data(global_batch_s=12.0, lengths=[16000])
    data.trainer = SimpleNamespace(
        global_rank=0, world_size=processes, accumulate_grad_batches=batches, num_devices=processes, overfit_batches=0
    )
    first = next(iter(data.train_dataloader()))
    assert first["lengths"].sum() / 16000 * processes * batches == pytest.approx(12, rel=0.01)


def test_more_processes_than_crops_are_refused(pretraining):
    data = pretraining.data(global_batch_s=12.0)
    data.trainer = SimpleNamespace(world_size=8, accumulate_grad_batches=1)
    with pytest.raises(ValueError, match=r"each of 8 batches 1\.5 s, less than a crop of data\.crop_s=2"):
        _ = data.training_batch_s
    with pytest.raises(ValueError, match="set one to null"):
        pretraining.data(global_batch_s=12.0, max_utterances=4)


def test_other_processes_go_on_at_the_same_place(pretraining):
    two, three = pretraining.data(global_batch_s=12.0), pretraining.data(global_batch_s=12.0)
    two.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=1)
    three.trainer = SimpleNamespace(world_size=3, accumulate_grad_batches=1)
    two.next_batch = (1, 14)  # seven steps of two batches
    three.load_state_dict(two.state_dict())
    assert three.next_batch == (1, 21)


def test_the_default_is_one_batch_for_each_process():
    assert compose_command("pretrain", ["run_dir=run"]).data.global_batch_s is None
