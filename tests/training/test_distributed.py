"""Two processes train as one does, whether each has all parameters or a share of them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from safetensors.torch import load_file
from test_cli import succeed

from audiot.training.ddp import ReplicatedStrategy, warn_of_slow_strategy

PROGRAM = Path(__file__).parents[2] / "scripts" / "pretrain.py"
BATCH_S = 2
TINY = [
    "data=folder",
    "data.valid_fraction=0.2",
    "data.num_workers=0",
    "data.prepare.num_jobs=1",
    f"data.batch_s={BATCH_S}",
    "data.crop_s=1",
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.ffn_dim=48",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "checkpoint.every_n_steps=2",
    "probe=false",
]


def options(folder, name):
    return [*TINY, f"data.root={folder / 'audio'}", f"data_dir={folder / 'data'}", f"hydra.run.dir={folder / name}"]


def weights(folder, name):
    return load_file(folder / name / "encoder" / "model.safetensors")


def pretrain(folder, name, *overrides):
    """Train in separate processes."""
    given = [*options(folder, name), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, PROGRAM, *given], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with audio, and the weights of one process that adds up two batches per step."""
    folder = tmp_path_factory.mktemp("distributed")
    noise = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for number in range(25):  # three validation batches, which two processes can't share evenly
        soundfile.write(folder / "audio" / f"{number:02d}.wav", 0.1 * noise.standard_normal(16000), 16000)
    succeed("pretrain", *options(folder, "alone"), "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=4")
    return folder, weights(folder, "alone")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_give_the_encoder_of_one_that_adds_up_as_many_batches(alone, trainer):
    folder, expected = alone
    together = ["data.batch_s=60", f"data.global_batch_s={2 * BATCH_S}"]  # 60 would fit, each process takes its share
    together += ["+model.activation_checkpointing=true"]  # which changes nothing but the memory that a step takes
    pretrain(folder, trainer, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", *together)
    found = weights(folder, trainer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_two_processes_whose_layers_are_compiled_give_the_same_encoder(alone):
    folder, expected = alone
    pretrain(folder, "compiled", "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "compile=true")
    for name, value in weights(folder, "compiled").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("kind", "device", "told"),
    [(DDPStrategy, "cuda", True), (DDPStrategy, "cpu", False), (ReplicatedStrategy, "cuda", False)],
)
def test_who_chooses_lightnings_ddp_for_gpus_is_told_what_is_faster(kind, device, told):
    strategy = kind(parallel_devices=[torch.device(device, 0)], cluster_environment=LightningEnvironment())
    with pytest.warns(UserWarning, match="use trainer=ddp") if told else nullcontext():
        warn_of_slow_strategy(strategy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_of_a_replicated_model_stay_where_they_lie(pretraining, tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        strategy = ReplicatedStrategy(parallel_devices=[torch.device("cuda", 0)], cluster_environment=LightningEnvironment())
        module, seen = pretraining.module().cuda(), []
        module.register_forward_pre_hook(lambda _, inputs: seen.extend(each.device.type for each in inputs))
        strategy.model = module
        strategy.configure_ddp()
        strategy.model(torch.randn(2, 16000, device="cuda"), torch.full((2,), 16000))
        assert seen == ["cuda", "cpu"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_process_that_ends_is_known_by_the_error_of_the_other(tmp_path):
    script = """
        import os, sys, torch, torch.distributed as dist
        from audiot.training.ddp import lost_a_process
        rank = int(sys.argv[1])
        assert not lost_a_process(RuntimeError("Connection reset by peer"))  # of something else, as nothing is distributed
        dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
        dist.all_reduce(torch.zeros(1))
        if rank:
            os._exit(9)
        try:
            for _ in range(1000):
                dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            assert not lost_a_process(RuntimeError("shapes differ"))
            sys.exit(0 if lost_a_process(error) else f"not known: {error}")
        sys.exit("no error")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [subprocess.Popen([*command, str(rank), tmp_path / "meet"], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    (_, err), _ = (process.communicate(timeout=120) for process in both)
    assert (both[0].returncode, both[1].returncode) == (0, 9), err
