"""What loggers show beside numbers. MLflow and W&B are stand-ins that note what they are called with."""

from __future__ import annotations

import textwrap
from types import SimpleNamespace

import numpy as np
import soundfile
import yaml
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from audiot.analysis.plots import plot_scores
from audiot.training.callbacks import ObjectivePictures
from audiot.training.exhibits import ShowConfig, show_audio, show_config, show_picture

CONFIG = {"seed": 3, "model": {"num_layers": 2}, "downstream": None}
TONE = (0.5 * np.sin(np.arange(1600) / 3)).astype(np.float32)


class StandIn(MLFlowLogger):
    """An MLflow logger without MLflow."""

    run_id = "run7"

    def __init__(self):
        self.parameters, self.artifacts = {}, {}
        self.client = SimpleNamespace(log_artifact=self.keep)

    experiment = property(lambda self: self.client)

    def log_hyperparams(self, params):
        self.parameters |= params

    def keep(self, run_id, path, folder):
        assert run_id == "run7"
        with open(path, "rb") as file:
            self.artifacts[folder] = file.read()


def show_all(loggers, folder):
    plot_scores({"same": [0.1, 0.2]}, "x", folder / "codes-step000004.png")
    show_config(loggers, CONFIG)
    show_picture(loggers, folder / "codes-step000004.png", 4)
    show_audio(loggers, TONE, 16000, "utt1", 4)


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def test_tensorboard_has_picture_sound_and_config(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    show_all([logger], tmp_path)
    logger.experiment.flush()
    found = events(tmp_path / "tb")
    assert found.Tags()["images"] == ["codes"]
    (image,) = found.Images("codes")
    assert (image.step, image.width, image.height) == (4, 770, 440)
    (sound,) = found.Audio("utt1")
    assert sound.sample_rate == 16000
    assert sound.length_frames == 1600
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert yaml.safe_load(textwrap.dedent(text)) == CONFIG


class Noting(WandbLogger):
    """A W&B logger that notes its calls. A test of the command line has a real one, offline."""

    experiment = property(lambda self: SimpleNamespace(config=SimpleNamespace(update=self.note)))

    def __init__(self):
        self.calls = []

    def note(self, *given, **options):
        self.calls.append(given)

    def log_image(self, key, images):
        self.note(key, images)

    def log_audio(self, key, audios, sample_rate, caption):
        self.note(key, audios[0].shape, sample_rate, caption)


def test_wandb_has_picture_sound_and_config(tmp_path):
    logger = Noting()
    show_all([logger], tmp_path)
    picture = str(tmp_path / "codes-step000004.png")
    assert logger.calls == [(CONFIG,), ("codes", [picture]), ("utterance", (1600,), [16000], ["utt1"])]


def test_mlflow_keeps_picture_sound_and_parameters(tmp_path):
    logger = StandIn()
    show_all([logger], tmp_path)
    assert logger.parameters == CONFIG
    assert logger.artifacts["plots"] == (tmp_path / "codes-step000004.png").read_bytes()
    (tmp_path / "utterance.wav").write_bytes(logger.artifacts["audio"])
    samples, rate = soundfile.read(tmp_path / "utterance.wav")
    assert rate == 16000
    np.testing.assert_allclose(samples, TONE, atol=1 / 32768)


def test_a_training_shows_its_config_a_picture_of_every_validation_and_one_sound(pretraining, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="tb", version="")
    callbacks = [ObjectivePictures(tmp_path / "plots"), ShowConfig(CONFIG)]
    trainer = pretraining.trainer(tmp_path, callbacks, max_steps=4, val_check_interval=2, logger=logger)
    trainer.fit(pretraining.module(), pretraining.data())
    found = events(tmp_path / "tb")
    assert [image.step for image in found.Images("reconstruction")] == [2, 4]
    (name,) = found.Tags()["audio"]
    assert found.Audio(name)[0].sample_rate == 16000
    assert "config/text_summary" in found.Tags()["tensors"]
