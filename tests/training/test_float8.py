"""Products in float8 compute what others do, to three bits of a mantissa, and leave models and files as they are."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf
from test_cli import succeed
from torch import nn

from audiot.base.config import compose_command
from audiot.commands.finetune import check_tasks_precision
from audiot.model import Encoder
from audiot.pretraining import MaskedAcousticModel
from audiot.training import float8
from audiot.training.averaging import ExponentialAverage, hand_over_average
from audiot.training.float8 import Float8, check_float8, described, float8_product, pays, use
from audiot.training.fsdp import shard
from audiot.training.trainer import known_precision, make_trainer, precision_of

ATTENTION, POSITIONS = {"_target_": "audiot.attention.query_key.QueryKey"}, {"_target_": "audiot.positions.Rotary"}
# e4m3 has 3 bits after the point: rounding moves a number by at most 2⁻⁴ of itself, and by some 2.6% in the mean square. A
# product of two rounded matrices is off by √2 times that, as their errors are independent. e5m2, for gradients, has 2 bits, which
# doubles it.
OUTPUT, GRADIENT = 2**-4, 2**-3
ROUNDED = 2**-7  # less would be no rounding to float8


@pytest.fixture
def product():
    """Float8 products, emulated."""
    pytest.importorskip("torchao")
    return float8_product(emulate=True)


@pytest.fixture
def every_size(monkeypatch):
    """Take layers of any size."""
    monkeypatch.setattr(float8, "LEAST", 0)


def small(seed=0, **options):
    """An encoder whose sizes are multiples of 16, without dropout."""
    torch.manual_seed(seed)
    given = {"num_layers": 2, "attention": ATTENTION, "positions": POSITIONS, "dropout": 0.0}
    given |= {"init_std": 0.2}  # every layer matters
    return Encoder(20, 32, num_heads=2, ffn_dim=64, max_frames=60, **given | options)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def learned(call, given, direction):
    """Output and gradients of a function."""
    output = call()
    return [output.detach(), *torch.autograd.grad((output * direction).sum(), given)]


@pytest.mark.parametrize("frames", [(4, 16), (3, 7)])
def test_output_and_gradients_are_those_of_a_linear_layer_rounded(product, frames):
    torch.manual_seed(0)
    hidden, layer = torch.randn(*frames, 64, requires_grad=True), nn.Linear(64, 96)
    given, direction = [hidden, layer.weight, layer.bias], torch.randn(*frames, 96)
    expected = learned(lambda: layer(hidden), given, direction)
    found = learned(lambda: product(hidden, layer.weight, layer.bias), given, direction)
    assert ROUNDED < distance(found[0], expected[0]) < OUTPUT
    assert ROUNDED < distance(found[1], expected[1]) < GRADIENT
    assert ROUNDED < distance(found[2], expected[2]) < GRADIENT
    torch.testing.assert_close(found[3], expected[3])  # of the bias, a sum


def test_trainers_of_a_process_have_one_product_for_which_layers_are_compiled(product):
    assert float8_product(emulate=True) is product
    assert Float8().product is Float8().product


def test_without_gradients_nothing_is_rounded(product):
    hidden, layer = torch.randn(5, 32), nn.Linear(32, 48)
    with torch.no_grad():
        torch.testing.assert_close(product(hidden, layer.weight, layer.bias), layer(hidden), rtol=0, atol=0)


@pytest.mark.parametrize("frames", [(4, 16), (3, 7), (1, 1)])
def test_products_have_the_sizes_that_tensor_cores_take_whatever_the_number_of_frames(monkeypatch, frames):
    pytest.importorskip("torchao")
    sizes = []

    def scaled(first, second, scale_a, scale_b, out_dtype=None, **options):
        assert first.dtype.itemsize == second.dtype.itemsize == 1
        assert first.stride(1) == second.stride(0) == 1  # rows by columns
        sizes.append((first.shape[1], second.shape[1]))
        return ((first.float() * scale_a) @ (second.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    product, layer = float8_product(), nn.Linear(32, 48)
    hidden, direction = torch.randn(*frames, 32, requires_grad=True), torch.randn(*frames, 48)
    expected = learned(lambda: layer(hidden), [hidden, layer.weight], direction)
    found = learned(lambda: product(hidden, layer.weight, layer.bias), [hidden, layer.weight], direction)
    assert len(sizes) == 3
    assert all(size % 16 == 0 for pair in sizes for size in pair)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < GRADIENT


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("attention", [ATTENTION, {"_target_": "audiot.attention.synthesizer_random.SynthesizerRandom"}])
def test_an_encoder_computes_and_learns_nearly_the_same(product, every_size, attention, norm):
    encoder = small(norm=norm, attention=attention, positions={"_target_": "audiot.positions.Sinusoid"})
    names = {name: value.shape for name, value in encoder.state_dict().items()}
    features, direction = torch.randn(3, 24, 20), torch.randn(3, 24, 32)
    given = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    expected = learned(lambda: encoder(features)[-1], given, direction)
    rounded = use(encoder, product)
    count = sum(isinstance(part, nn.Linear) for part in encoder.modules())
    assert len(rounded) == count - 1  # the input's 20 are no multiple of 16
    found = learned(lambda: encoder(features)[-1], given, direction)
    assert ROUNDED < distance(found[0], expected[0]) < 2 * OUTPUT  # two layers
    alike = torch.cosine_similarity(*(torch.cat([each.flatten() for each in one[1:]]) for one in (found, expected)), dim=0)
    assert alike > 0.98
    assert {name: value.shape for name, value in encoder.state_dict().items()} == names
    with torch.no_grad():
        torch.testing.assert_close(encoder(features)[-1], expected[0])  # validation


def test_copies_of_an_encoder_train_in_float8_too(product, every_size):
    encoder, features = small(), torch.randn(2, 24, 20)
    use(encoder, product)
    torch.testing.assert_close(copy.deepcopy(encoder)(features)[-1], encoder(features)[-1], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_encoder_computes_the_same_with_a_graph_for_multiples_of_16_frames_and_one_for_others(
    product, every_size, checkpointing
):
    torch._dynamo.reset()
    encoder = small(norm="pre", num_layers=1, activation_checkpointing=checkpointing)
    use(encoder, product)
    given, graphs = [parameter for parameter in encoder.parameters() if parameter.requires_grad], []
    aot_eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(encoder, backend=backend, fullgraph=True, dynamic=True)
    for batch, frames in ((2, 24), (3, 40), (4, 32), (5, 24)):
        features, direction = torch.randn(batch, frames, 20), torch.randn(batch, frames, 32)
        expected = learned(lambda x=features: encoder(x)[-1], given, direction)
        found = learned(lambda x=features: compiled(x)[-1], given, direction)
        torch.testing.assert_close(found, expected)
    assert len(graphs) <= 3  # PyTorch makes the first of them anew where it finds that a size is variable


def test_a_sharded_encoder_computes_the_same(product, every_size, tmp_path):
    encoder, features = small(), torch.randn(2, 24, 20)
    use(encoder, product)
    expected = encoder(features)[-1].detach()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        shard(encoder, [], torch.distributed.init_device_mesh("cpu", (1,)))
        output = encoder(features)[-1]
        output.square().sum().backward()
        torch.testing.assert_close(output.detach(), expected)
        assert all(parameter.grad is not None for parameter in encoder.layers.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("inputs", "outputs", "wanted"),
    [
        (2048, 8192, True),  # float8 and its casts took 0.93 and 0.82 of bfloat16's time on an H200
        (2048, 6144, True),
        (2048, 2048, False),
        (1280, 5120, False),  # 1.15 and 1.19
        (1024, 4096, False),  # 1.40
        (160, 2048, False),
        (2056, 8192, False),  # no multiple of 16
        (2048, 8196, False),
    ],
)
def test_layers_that_are_too_small_or_uneven_stay(inputs, outputs, wanted):
    assert pays(inputs, outputs) is pays(outputs, inputs) is wanted


def test_which_layers_stay_is_told(product):
    with torch.device("meta"):
        encoder = Encoder(160, 2048, 2, 16, 8192, 40, ATTENTION, POSITIONS)
    told = described(encoder, use(encoder, product))
    assert told == "10 of 13 linear layers of the encoder; in bfloat16: input (160 → 2048), attention.output (2048 → 2048)"


def test_an_encoder_of_small_layers_is_refused(product):
    told = r"makes no layer of 32 channels faster.* at least 1,300 × .*; set trainer\.precision=bf16-mixed"
    with pytest.raises(ValueError, match=told):
        use(small(), product)


def test_devices_without_float8_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or more.* found cpu: set trainer\.precision=bf16-mixed$"):
        check_float8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"found NVIDIA A100 \(8\.0\): set trainer\.precision=bf16-mixed$"):
        check_float8(torch.device("cuda", 0))


def test_who_lacks_torchao_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs torchao: pip install 'audiot\[fp8\]'$"):
        check_float8(torch.device("cuda", 0))


def test_tasks_are_refused():
    with pytest.raises(ValueError, match=r"fp8 is for pre-training.*set trainer\.precision=bf16-mixed"):
        check_tasks_precision("fp8")


def test_what_does_not_train_takes_a_run_in_float8_in_bfloat16():
    assert known_precision("fp8", "cpu") == "bf16-mixed"


def module(tiny, **model):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "ffn_dim": 64, "dropout": 0.0} | model
    return MaskedAcousticModel(**tiny | {"model": tiny["model"] | sizes}, seed=5)


def test_a_training_in_float8_has_the_checkpoint_of_any_other(product, every_size, tiny, pretraining, tmp_path, monkeypatch):
    monkeypatch.setattr(float8, "float8_product", lambda: product)
    losses = {}
    for name, callbacks in (("plain", []), ("float8", [Float8()])):
        model, average = module(tiny), ExponentialAverage(0.5)
        trainer = pretraining.trainer(tmp_path, [average, *callbacks])
        trainer.fit(model, pretraining.data(lengths=[16000]))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        hand_over_average(trainer, model)
        (validation,) = trainer.validate(model, pretraining.data(lengths=[16000]), verbose=False)
        losses[name] = validation[model.monitor]
        assert precision_of(trainer) == ("fp8" if callbacks else "32-true")
    plain, rounded = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in losses)
    for part in ("state_dict", "current_model_state"):
        assert plain[part].keys() == rounded[part].keys()
        assert not all(torch.equal(value, rounded[part][name]) for name, value in plain[part].items())  # it was used
    assert losses["float8"] == pytest.approx(losses["plain"], rel=0.02)
    resumed = module(tiny)
    pretraining.trainer(tmp_path, [ExponentialAverage(0.5)], max_steps=12).fit(
        resumed, pretraining.data(lengths=[16000]), ckpt_path=tmp_path / "float8.ckpt"
    )
    assert resumed.trained_steps == 9


def test_the_trainer_of_a_config_uses_it(product, monkeypatch, tmp_path):
    monkeypatch.setattr("audiot.training.trainer.check_float8", lambda device: None)
    cfg = compose_command("pretrain", [f"run_dir={tmp_path}", "trainer.accelerator=cpu", "trainer.precision=fp8", "logger=none"])
    OmegaConf.set_struct(cfg, False)
    cfg.callbacks = {}
    trainer = make_trainer(cfg)
    assert (precision_of(trainer), trainer.precision) == ("fp8", "bf16-mixed")


def test_other_commands_take_a_run_in_float8_without_torchao(product, every_size, monkeypatch, tmp_path, blank_pictures):
    monkeypatch.setattr("audiot.training.trainer.check_float8", lambda device: None)
    monkeypatch.setattr(float8, "float8_product", lambda: product)
    (tmp_path / "audio").mkdir()
    noise = np.random.default_rng(0)
    for number in range(8):
        soundfile.write(tmp_path / "audio" / f"{number % 2}_{number}.wav", 0.1 * noise.standard_normal(16000), 16000)
    folder = [
        f"data.root={tmp_path / 'audio'}",
        f"data_dir={tmp_path / 'data'}",
        "data.valid_fraction=0.25",
        "data.num_workers=0",
    ]
    given = ["data=folder", *folder, "data.prepare.num_jobs=1", "data.batch_s=2", "data.crop_s=1", "logger=none", "plots=false"]
    sizes = ["model.embed_dim=32", "model.num_heads=2", "model.ffn_dim=64", "objective.num_clusters=10", "probe=false"]
    trainer, run = ["trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=1"], tmp_path / "run"
    with pytest.warns(UserWarning, match="slower than bf16-mixed where layers are not compiled: set compile=true"):
        out = succeed("pretrain", *given, *sizes, *trainer, "trainer.precision=fp8", f"hydra.run.dir={run}")
    assert "fp8" in out
    assert "float8  18 of 19 linear layers of the encoder; in bfloat16: input (240 → 32)" in out
    assert json.loads((run / "summary.json").read_text())["precision"] == "fp8"
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(float8, "float8_product", None)
    assert "pretrain/val_" in succeed("evaluate", f"run={run}", "accelerator=cpu")
    longer = ["trainer.max_steps=3", "trainer.precision=32-true"]
    succeed("pretrain", f"resume={run}", *longer)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["precision"], summary["steps"], summary["resumed_step"]) == ("32-true", 3, 2)


def multiplies_float8():
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= float8.CAPABILITY


@pytest.mark.skipif(not multiplies_float8(), reason="needs a CUDA device that multiplies float8 matrices")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_on_the_gpu_learns_in_float8_what_it_learns_in_bfloat16(tiny, every_size, compiled):
    pytest.importorskip("torchao")
    torch._dynamo.reset()
    losses = []
    for rounds in (False, True):
        model = module(tiny, embed_dim=1024, num_heads=16, ffn_dim=4096, norm="pre").cuda()
        if rounds:
            Float8().begin(model)
        if compiled:
            model.compile_step()
        optimizer, taken = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True), []
        for step in range(60):  # three batches, again and again
            frames = (24, 40, 56)[step % 3]  # 3 · 24 and so on are no multiples of 16
            lengths = torch.full((3,), model.model.features.num_samples(frames))
            speech = torch.randn(3, int(lengths[0]), generator=torch.Generator().manual_seed(step % 3))
            batch = {"waveforms": speech.cuda(), "lengths": lengths, "keys": torch.arange(3, device="cuda")}
            with torch.autocast("cuda", torch.bfloat16):
                loss = model.step_loss(*model.inputs(batch)).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken.append(loss.detach())
        losses.append(torch.stack(taken).tolist())
    plain, rounded = losses
    latest = [float(np.mean(each[-15:])) for each in losses]
    assert latest[0] < 0.8 * plain[0]
    assert latest[1] == pytest.approx(latest[0], rel=0.06)
    assert rounded != plain
