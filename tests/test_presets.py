"""Presets of the published experiments: their numbers, and each one end to end on a miniature LibriSpeech."""

from __future__ import annotations

import json
from functools import cache
from itertools import islice

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lhotse import CutSet
from lhotse.testing.dummies import dummy_cut
from mini_librispeech import demo_speech, make_mini_librispeech
from omegaconf import OmegaConf
from some import some

import audiot.commands.launch  # noqa: F401 (its resolvers)
from audiot.base.groups import options
from audiot.cli import main
from audiot.data.batches import BatchStream

PRETRAINING = [name for name in options("experiment") if "librispeech" in name]
PROBING = [name for name in options("experiment") if name.startswith(("s3prl_", "superb_"))]
# Presets that differ in the corpus alone run once: 100 and 960 hours of Mockingjay, and its 360, which are the study's.
RUNNING = [name for name in PRETRAINING if not name.startswith("mockingjay_librispeech")]
ATTENTION = options("attention")
HOURS = {
    "100": ["train-clean-100"],
    "360": ["train-clean-360"],
    "960": ["train-clean-100", "train-clean-360", "train-other-500"],
}
GIVEN = ["run_dir=run", "data_dir=data"]
TINY = [
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.ffn_dim=48",
    "data.crop_s=2.0",
    "data.batch_s=20",
    "data.num_workers=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "logger=none",
]


@cache
def composed(command, *overrides):
    """A command's config, resolved; not to be changed."""
    with initialize_config_module("audiot.conf", version_base="1.3"):
        cfg = compose(command, [*overrides, *GIVEN])
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("librispeech")
    return make_mini_librispeech(demo_speech(folder / "demo"), folder)


@pytest.fixture
def folder(mini, tmp_path, monkeypatch, blank_pictures):
    """The current folder, an empty one. The miniature is prepared once for all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUDIOT_DATA", str(mini.root.parent / "prepared"))
    monkeypatch.setattr("sys.argv", ["audiot"])
    return tmp_path


# The published recipes, as the papers and the reference toolkit's configs have them.
@pytest.mark.parametrize("name", PRETRAINING)
def test_a_pretraining_preset_is_the_published_recipe(name):
    cfg = composed("pretrain", f"experiment={name}")
    model, data, objective, optimizer = cfg["model"], cfg["data"], cfg["objective"], cfg["optimizer"]
    tera = name.startswith("tera")
    assert (model["embed_dim"], model["num_heads"], model["ffn_dim"]) == (768, 12, 3072)
    assert model["num_layers"] == (12 if "large" in name else 3)
    assert model["share_layers"] == name.startswith("audio_albert")
    assert (model["norm"], model["dropout"], model["init_std"], model["input_init"]) == ("post", 0.1, 0.02, "normal")
    assert model["chunk_frames"] == 1500
    assert cfg["attention"]["dropout"] == 0.1
    assert cfg["positions"] == {"_target_": "audiot.positions.Sinusoid", "scale": 1.0}
    assert (objective["mask_proportion"], objective["span"]) == (0.15, 7)
    assert (objective["zero_probability"], objective["replace_probability"]) == (0.8, 0.1)
    assert (objective["band_width"], objective["noise_std"]) == (16 if tera else 0, 0.2)
    assert (objective["noise_probability"] > 0) == tera
    front_end = instantiate(cfg["features"])
    assert front_end.num_channels == (80 if tera or "albert" in name else 240)
    assert (front_end.cmvn, front_end.stack) == ("utterance", 1)
    assert model["max_frames"] == front_end.num_tokens(round(data["crop_s"] * 16000)) == 1500
    assert data["max_utterances"] == (64 if tera else 32)
    assert data["batch_s"] >= data["max_utterances"] * data["crop_s"]
    assert optimizer["_target_"] == "torch.optim.AdamW"
    assert (optimizer["lr"], optimizer["weight_decay"]) == (5e-4 if tera else 2e-4, 0.01)
    assert cfg["scheduler"]["warmup_proportion"] == (0.08 if tera else 0.07)
    assert (cfg["trainer"]["max_steps"], cfg["trainer"]["gradient_clip_val"]) == (400_000 if tera else 1_000_000, 5.0)
    hours = next((name[-3:] for known in HOURS if name.endswith(known)), "360")
    assert data["pretrain"] == HOURS[hours]
    assert data["train"] == ["train-clean-100"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_pretraining_preset_takes_other_attention_and_strategies(name):
    for attention in ATTENTION[::4] if "study" in name else ("synthesizer_random",):
        cfg = composed("pretrain", f"experiment={name}", f"attention={attention}", "trainer=ddp")
        assert cfg["attention"]["dropout"] == 0.1
        assert cfg["model"]["attention"] == cfg["attention"]
        assert cfg["trainer"]["strategy"]["_target_"] == "audiot.training.ddp.ReplicatedStrategy"


@pytest.mark.parametrize(
    ("name", "lr", "steps", "every", "batch", "accumulate", "clip", "optimizer"),
    [
        ("s3prl_phone_linear", 2e-4, 500_000, 10_000, 32, 1, 1.0, "AdamW"),
        ("s3prl_phone_1hidden", 2e-4, 1_000_000, 20_000, 32, 1, 1.0, "AdamW"),
        ("s3prl_phone_concat", 2e-4, 1_000_000, 20_000, 32, 1, 1.0, "AdamW"),
        ("s3prl_speaker_frame", 2e-4, 500_000, 10_000, 32, 1, 1.0, "AdamW"),
        ("s3prl_speaker_utterance", 2e-4, 300_000, 10_000, 32, 1, 1.0, "AdamW"),
        ("superb_pr", 1e-2, 100_000, 1_000, 16, 2, 1.0, "Adam"),
        ("superb_asr", 1e-4, 200_000, 2_000, 32, 1, 1.0, "Adam"),
        ("superb_ks", 1e-4, 200_000, 5_000, 32, 1, 1.0, "Adam"),
        ("superb_ic", 1e-4, 200_000, 5_000, 32, 1, 1.0, "Adam"),
        ("superb_sid", 1e-4, 200_000, 5_000, 8, 4, 1.0, "Adam"),
        ("superb_asv", 1e-4, 200_000, 10_000, 10, 5, 1000.0, "AdamW"),
    ],
)
def test_a_probing_preset_is_the_references(name, lr, steps, every, batch, accumulate, clip, optimizer):
    cfg = composed("finetune", f"experiment={name}", "upstream.path=encoder")
    trainer = cfg["trainer"]
    assert cfg["optimizer"]["lr"] == lr
    assert cfg["optimizer"]["_target_"] == f"torch.optim.{optimizer}"
    # S3PRL's own AdamW has no decay and ε = 1e-7; SUPERB takes PyTorch's optimisers as they come.
    decay, epsilon = (0.0, 1e-7) if name.startswith("s3prl") else (0.01 if optimizer == "AdamW" else 0.0, 1e-8)
    assert (cfg["optimizer"]["weight_decay"], cfg["optimizer"]["eps"]) == (decay, epsilon)
    assert cfg["scheduler"]["_target_"] == "audiot.training.optimization.constant"
    assert (trainer["max_steps"], trainer["val_check_interval"]) == (steps, every * accumulate)
    assert (cfg["data"]["max_utterances"], trainer["accumulate_grad_batches"]) == (batch, accumulate)
    assert trainer["gradient_clip_val"] == clip
    assert cfg["downstream"]["layers"] == ("weighted_sum" if name.startswith("superb") else "last")
    assert not cfg["downstream"]["train_encoder"]
    assert trainer["precision"] == "32-true"


LSTM = {"hidden_dim": 1024, "num_layers": 2, "dropout": 0.2, "projector_dim": 1024}
POOLED = {"pooling": "mean", "projector_dim": 256, "hidden_dim": None}


@pytest.mark.parametrize(
    ("name", "corpus", "monitor", "head"),
    [
        ("s3prl_phone_linear", "librispeech", "accuracy", {"hidden_dim": None, "context": 1}),
        ("s3prl_phone_1hidden", "librispeech", "accuracy", {"hidden_dim": 768, "context": 1}),
        ("s3prl_phone_concat", "librispeech", "accuracy", {"hidden_dim": None, "context": 9}),
        ("s3prl_speaker_frame", "librispeech", "accuracy", {"hidden_dim": None, "context": 1}),
        ("s3prl_speaker_utterance", "librispeech", "accuracy", POOLED | {"projector_dim": None}),
        ("superb_pr", "librispeech", "per", {"hidden_dim": None, "context": 1}),
        ("superb_asr", "librispeech", "wer", LSTM),
        ("superb_ks", "speech_commands", "accuracy", POOLED),
        ("superb_ic", "fluent_speech_commands", "accuracy", POOLED),
        ("superb_sid", "voxceleb1", "accuracy", POOLED),
        ("superb_asv", "voxceleb1", "eer", {"projector_dim": 512, "channels": 1500}),
    ],
)
def test_a_probing_preset_has_the_references_corpus_metric_and_head(name, corpus, monitor, head):
    cfg = composed("finetune", f"experiment={name}", "upstream.path=encoder")
    task = cfg["downstream"]
    assert (cfg["data"]["name"], task["monitor"]) == (corpus, monitor)
    assert {key: value for key, value in task["head"].items() if key != "_target_"} == head
    assert task["mode"] == ("max" if monitor == "accuracy" else "min")
    if corpus == "librispeech":
        splits = [cfg["data"][role] for role in ("train", "valid", "test")]
        assert splits == [["train-clean-100"], ["dev-clean"], ["test-clean"]]
    if name == "superb_ks":
        assert (cfg["data"]["version"], cfg["data"]["classes"]) == (1, None)  # version 1 has 12 classes
    if name == "superb_asv":
        objective = task["objective"]
        assert (objective["embedding_dim"], objective["scale"], objective["margin"]) == (512, 30.0, 0.4)
        assert objective["trials"] == "data/voxceleb1/veri_test2.txt"


@pytest.mark.parametrize(("name", "utterances"), [("mockingjay_librispeech360", 32), ("tera_librispeech960", 64)])
def test_a_batch_of_long_utterances_is_full_of_crops_of_1500_frames(name, utterances):
    cfg = composed("pretrain", f"experiment={name}")
    data = cfg["data"]
    cuts = CutSet.from_cuts(dummy_cut(number, duration=15.1 + number % 100 / 10) for number in range(1000))
    limits = {key: data[key] for key in ("batch_s", "max_utterances", "num_buckets", "crop_s")}
    front_end = instantiate(cfg["features"])
    for _, batch in islice(BatchStream(cuts, training=True, **limits), 10):
        assert len(batch) == utterances
        assert {front_end.num_tokens(cut.num_samples) for cut in batch} == {1500}


def test_every_downstream_option_has_a_preset():
    def shape(*overrides):
        """Settings that differ between options."""
        task = composed("finetune", *overrides, "upstream.path=encoder")["downstream"]
        head = task["head"]
        return task["task"], head["_target_"], head.get("context"), head.get("hidden_dim")

    presets = {shape(f"experiment={name}") for name in PROBING}
    assert presets == {shape(f"downstream={name}") for name in options("downstream")}


@cache
def published_probes():
    """Name → overrides, as they are written; not to be changed."""
    with initialize_config_module("audiot.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("pretrain", ["probes=librispeech_phones", *GIVEN]).probes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=() if name.startswith("attention_study") else pytest.mark.slow) for name in RUNNING),
        pytest.param("mockingjay_librispeech360 attention=synthesizer_dense", marks=pytest.mark.slow),
    ],
)
def test_a_pretraining_preset_runs_to_its_probes(mini, name, folder):
    short = {"trainer.max_steps=20000": "trainer.max_steps=2", "trainer.val_check_interval=2000": "trainer.val_check_interval=2"}
    probes = {}
    for probe, overrides in published_probes().items():
        # All of them once; the encoder's of frames with every preset.
        if "study" in name or probe in ("probe/phone/encoder", "probe/speaker_frame/encoder"):
            assert set(short) <= set(overrides)
            probes[probe] = [*(short.get(override, override) for override in overrides), "data.batch_s=30"]
    (folder / "probes").mkdir()
    OmegaConf.save(probes, folder / "probes" / "short.yaml")
    layers = ["model.num_layers=4"] if "large" in name else []
    experiment, *more = name.split()
    chosen = [f"experiment={experiment}", *more, f"hydra.searchpath=[file://{folder}]", "probes=short"]
    main(["pretrain", *chosen, *mini.overrides, *TINY, *layers, "hydra.run.dir=run"])
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert {probe for probe in summary if probe.startswith("probe/")} == set(probes)
    assert all(0 <= summary[probe] <= 1 for probe in probes)
    metrics = json.loads((folder / "run" / "probes" / "probe-phone-encoder" / "metrics.json").read_text())
    assert metrics["classes"] > 30  # the demo's phones
    assert (metrics["steps"], metrics["layers"], metrics["fine_tuned"]) == (2, "last", False)


def test_missing_phone_labels_are_told_before_pretraining(mini, folder):
    without = [override for override in mini.overrides if "phone" not in override]
    arguments = ["experiment=attention_study_librispeech", *without, *TINY, "hydra.run.dir=run"]
    with pytest.raises(SystemExit, match=r"no alignment tier 'phone'.*wanted by the probe probe/phone/encoder; probes=none"):
        main(["pretrain", *arguments])
    assert not (folder / "run" / "encoder").exists()


ON_LIBRISPEECH = [name for name in PROBING if name not in ("superb_ks", "superb_ic", "superb_sid", "superb_asv")]


@pytest.mark.parametrize("name", some(ON_LIBRISPEECH, ["s3prl_phone_concat", "superb_pr"]))
def test_a_probing_preset_on_librispeech_runs(mini, name, folder):
    tiny = [override for override in TINY if not override.startswith("data.crop")]
    head = ["downstream.head.hidden_dim=16", "downstream.head.projector_dim=16"] if name == "superb_asr" else []
    more = ["upstream=random", "hydra.run.dir=run", *head]
    if name == "superb_pr":  # two phones do
        words = {word for cut in mini.sources.values() for word in cut.supervisions[0].text.upper().replace(",", "").split()}
        lexicon = folder / "lexicon.txt"
        spelt = {word: " ".join("AB"[ord(letter) % 2] for letter in word) for word in {word.strip(".,?!") for word in words}}
        lexicon.write_text("".join(f"{word} {phones}\n" for word, phones in sorted(spelt.items())))
        more.append(f"downstream.labels.lexicon={lexicon}")
    main(["finetune", f"experiment={name}", *mini.overrides, *tiny, *more])
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 2
