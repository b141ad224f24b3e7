"""What is damaged, and how a command reads it: one class for each kind of input."""

from __future__ import annotations

import csv
import functools
import gzip
import importlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fuzzing.mutations as mutate
import numpy as np
import soundfile
import torch
import yaml
from canary import Pickled, fire
from lhotse import Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import MonoCut
from lhotse.supervision import AlignmentItem
from omegaconf import OmegaConf

from audiot import cli
from audiot.checkpoint import AudioEncoder, load_encoder, load_objective, save_encoder, save_objective
from audiot.commands import environment, launch
from audiot.commands.launch import run_tool
from audiot.data.corpora.folder import FolderCorpus, audio_cut
from audiot.data.corpora.manifest import ManifestCorpus
from audiot.data.corpora.phone_labels import aligned, read_phone_labels
from audiot.data.labels import CharacterLabels, FrameLabels, PhoneSequence, UtteranceLabel, survey
from audiot.data.prepare import prepare
from audiot.features import LogMel
from audiot.objectives.reconstruction import Reconstruction

RATE = 16000
TINY = {
    "features": {"_target_": "audiot.features.LogMel", "n_mels": 8, "stack": 3},
    "model": {
        "_target_": "audiot.model.Encoder",
        "embed_dim": 8,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 16,
        "max_frames": 60,
        "attention": {"_target_": "audiot.attention.query_key.QueryKey"},
        "positions": {"_target_": "audiot.positions.Rotary"},
    },
}
FEATURES = LogMel(n_mels=8)


@dataclass
class Case:
    """Damaged files, and what reads them.

    Args:
        what: What was done.
        read: Reads them as a command does. It may return the fates of single files of many.
        names: A refusal names one of these.
        lines: Lines that a refusal may have beyond the first.
    """

    what: str
    read: Callable[[], object]
    names: tuple[str, ...]
    lines: int = field(default=0)


def noise(seconds=0.6, seed=0, channels=1):
    shape = (int(RATE * seconds), channels) if channels > 1 else int(RATE * seconds)
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def survey_all(corpus, *kinds):
    """Labels of every utterance of a prepared corpus, as a task reads them. A kind that it lacks is refused."""
    cuts = {split: list(corpus.cuts(split)) for split in corpus.counts}
    for labels in kinds:
        labels._features = FEATURES
        names = survey(cuts, labels)
        for cut in next(iter(cuts.values())):
            labels.encode(cut, {name: number for number, name in enumerate(names)})


class Audio:
    """Audio files, of which a preparation gets many: each is prepared, or left out with a reason."""

    name = "audio"
    together = 25
    FORMS = (
        ("wav", "WAV", "PCM_16"),
        ("wav", "WAV", "PCM_24"),
        ("wav", "WAV", "FLOAT"),
        ("wav", "WAV", "PCM_U8"),
        ("wav", "WAVEX", "PCM_16"),
        ("wav", "WAV", "IMA_ADPCM"),
        ("wav", "RF64", "PCM_16"),
        ("w64", "W64", "PCM_16"),
        ("aiff", "AIFF", "PCM_16"),
        ("au", "AU", "PCM_16"),
        ("caf", "CAF", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("flac", "FLAC", "PCM_24"),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
        ("mp3", "MP3", "MPEG_LAYER_III"),
    )

    def make(self):
        self.data = []
        for number, (_, form, subtype) in enumerate(self.FORMS):
            channels = 1 + number % 2
            with io.BytesIO() as stream:
                soundfile.write(stream, noise(seed=number, channels=channels), RATE, format=form, subtype=subtype)
                self.data.append(stream.getvalue())

    def plant(self, rng, home, number):

        names = {}
        for each in self.batch:
            rng = random.Random(f"{self.name} {each}")
            form = rng.randrange(len(self.FORMS))
            suffix = self.FORMS[form][0] if rng.random() < 0.9 else rng.choice(self.FORMS)[0]
            names[each] = f"x{each}.{suffix}"
            mutate.planted(rng, home / "audio" / names[each], mutate.mutated(rng, self.data[form]))
        for number in range(4):
            soundfile.write(home / "audio" / f"good{number}.wav", noise(seed=number), RATE)
        return Case(f"{len(names)} files", lambda: self.read(names), ("audio", "out"))

    def read(self, names):
        corpus = FolderCorpus("audio", valid="path=='good0.wav'", test="path=='good1.wav'")
        found = prepare(lambda: corpus.manifests(progress=False), "out", sources=corpus.sources, num_jobs=1, progress=False)
        there = {}
        for split in found.counts:
            for cut in found.cuts(split):
                samples = cut.load_audio()
                assert np.isfinite(samples).all()
                there[cut.id] = samples.shape[1]
        with open("out/rejected.csv", newline="") as stream:
            refused = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(stream)}
        fates = {}
        for number, name in names.items():
            if Path(name).stem in there:
                fates[str(number)] = {"fate": "accepted", "what": name}
            elif refused.get(name, "").strip() and "\n" not in refused[name]:
                fates[str(number)] = {"fate": "rejected", "what": name, "message": refused[name]}
            elif not os.path.lexists(f"audio/{name}") or Path("audio", name).is_dir():  # no file, so no utterance
                fates[str(number)] = {"fate": "rejected", "what": name, "message": "not there"}
            else:
                fates[str(number)] = {"fate": "fault", "why": "it is neither prepared nor listed with a reason", "what": name}
        return fates


def six_recordings():
    os.mkdir("audio")
    for number in range(6):
        soundfile.write(f"audio/u{number}.wav", noise(seed=number), RATE)


class Manifest:
    """Manifests of Lhotse and NeMo, prepared and read for tasks."""

    name = "manifest"
    together = 1

    def make(self):
        six_recordings()
        self.lhotse = [self._cut(number) for number in range(6)]
        self.nemo = [
            {
                "audio_filepath": f"audio/u{number}.wav",
                "offset": 0.0,
                "duration": 0.6,
                "text": "a b",
                "speaker": f"s{number % 2}",
                "keyword": f"k{number % 2}",
                "lang": "en",
            }
            for number in range(6)
        ]

    def _cut(self, number):
        name = f"u{number}"
        recording = Recording(name, [AudioSource("file", [0], f"audio/{name}.wav")], RATE, 9600, 0.6, channel_ids=[0])
        phones = [AlignmentItem("A", 0.0, 0.3), AlignmentItem("B", 0.3, 0.3)]
        supervision = SupervisionSegment(
            name,
            name,
            0.0,
            0.6,
            text="a b",
            language="en",
            speaker=f"s{number % 2}",
            custom={"keyword": f"k{number % 2}"},
            alignment={"phone": phones},
        )
        cut = MonoCut(name, 0.0, 0.6, 0, [supervision], recording=recording)
        if number == 4:
            cut = cut.mix(MonoCut("other", 0.0, 0.6, 0, [], recording=recording), snr=10).with_id("mixed")
        return (cut.perturb_speed(1.1) if number == 5 else cut).to_dict()

    SOURCES = (
        {"type": "command", "channels": [0], "source": mutate.SHELL},
        {"type": "url", "channels": [0], "source": "http://127.0.0.1:9/x.wav"},
        {"type": "memory", "channels": [0], "source": "UklGRg=="},
        {"type": "shar", "channels": [0], "source": f"pipe:{mutate.SHELL}"},
        {"type": "file", "channels": [0], "source": f"pipe:{mutate.SHELL}"},
        {"type": "file", "channels": [0], "source": "audio"},
        {"type": "file", "channels": [7], "source": "audio/u0.wav"},
        {"name": "Speed", "kwargs": {"factor": 0}},
        {"name": "Reverb", "kwargs": {}},
        {"name": "Resample", "kwargs": {"source_sampling_rate": 16000, "target_sampling_rate": 10**9}},
    )

    def plant(self, rng, home, number):
        (home / "audio").symlink_to(self.folder / "audio")
        kind = rng.choice(("lhotse", "lhotse", "nemo"))
        entries = list(getattr(self, kind))
        how = rng.choice(("tree", "tree", "text", "bytes"))
        if how == "tree":
            at = rng.randrange(len(entries))
            entries[at] = mutate.tree(rng, entries[at], self.SOURCES)
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        data = text.encode()
        if how == "text":
            data = mutate.text(rng, data, ",:{[ ")
        zipped = rng.random() < 0.3
        if zipped:
            data = gzip.compress(data, mtime=0)
        if how == "bytes":
            data = mutate.mutated(rng, data)
        name = "m.jsonl.gz" if zipped else "m.jsonl"
        done = mutate.planted(rng, home / name, data)
        tasks = [
            UtteranceLabel("keyword"),
            CharacterLabels(),
            *([PhoneSequence(), FrameLabels("phone")] if kind == "lhotse" else []),
        ]
        return Case(f"{kind} {how} {done}", lambda: self.read(name, tasks), (name, "out", "utterance", "data.train"))

    def read(self, name, tasks):
        corpus = ManifestCorpus(name, root=".")
        found = prepare(lambda: corpus.manifests(progress=False), "out", sources=corpus.sources, num_jobs=1, progress=False)
        survey_all(found, *tasks)


class TextGrid:
    """Phone labels: TextGrids, and a line of integers for each utterance."""

    name = "textgrid"
    together = 1

    LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.6
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.6
        intervals: size = 2
        intervals [1]:
            xmin = 0
            xmax = 0.2
            text = ""
        intervals [2]:
            xmin = 0.2
            xmax = 0.6
            text = "a ""b"" c"
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.6
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.2
            text = "sil"
        intervals [2]:
            xmin = 0.2
            xmax = 0.4
            text = "HH"
        intervals [3]:
            xmin = 0.4
            xmax = 0.6
            text = "AY1"
"""
    SHORT = (
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.6\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n0.6\n2\n'
        '0\n0.3\n"HH"\n0.3\n0.6\n"AY1"\n'
    )
    FRAMES = "".join(f"u{number} {' '.join(str(frame // 7) for frame in range(58))}\n" for number in range(3))

    def make(self):
        for number in range(3):
            soundfile.write(f"u{number}.wav", noise(seed=number), RATE)
        self.cuts = [audio_cut(f"u{number}.wav", f"u{number}") for number in range(3)]
        for cut in self.cuts:
            cut.supervisions = [SupervisionSegment(cut.id, cut.id, 0.0, cut.duration)]

    def plant(self, rng, home, number):
        grid = "grids/u1.TextGrid"
        name, source = rng.choice(((grid, self.LONG), (grid, self.SHORT), ("frames.txt", self.FRAMES)))
        data = source.encode()
        how = rng.choice(("text", "text", "bytes"))
        values = ('"', '""', '"a', "<exists>", "<absent>", "1e400", '"phones"', '"TextTier"', "0.2", "!", "99999999999")
        data = mutate.text(rng, data, " =", values) if how == "text" else mutate.mutated(rng, data)
        if name.startswith("grids"):
            (home / "grids").mkdir()
            (home / "grids" / "u0.TextGrid").write_text(self.SHORT)
        done = mutate.planted(rng, home / name, data)
        place = name.split("/")[0]
        return Case(f"{how} {done}", lambda: self.read(place), (Path(name).name, "frames.txt", "utterance", "grids"))

    def read(self, place):
        tiers = read_phone_labels(place, self.cuts)
        cuts = [aligned(cut, tiers) for cut in self.cuts if cut.id in tiers]
        for labels in (FrameLabels("phone", FEATURES), PhoneSequence(FEATURES)):
            names = survey({"train": cuts}, labels)
            for cut in cuts:
                labels.encode(cut, {name: number for number, name in enumerate(names)})


class Table:
    """Tables of labels with commas or tabs, and lexicons."""

    name = "table"
    together = 1

    def make(self):
        six_recordings()
        rows = [["path", "keyword", "speaker", "text", "take"]]
        rows += [[f"u{number}.wav", f"k{number % 2}", f"s{number % 2}", "AB BA", str(number)] for number in range(6)]
        self.tables = {"t.csv": self._table(rows, ","), "t.tsv": self._table(rows, "\t")}
        self.lexicon = b"AB A B\nAB A\nBA 0.98 B AH0\nC K\n"

    def _table(self, rows, separator):
        with io.StringIO(newline="") as stream:
            csv.writer(stream, delimiter=separator, lineterminator="\n").writerows(rows)
            return stream.getvalue().encode()

    def plant(self, rng, home, number):
        (home / "audio").symlink_to(self.folder / "audio")
        name = rng.choice(("t.csv", "t.tsv"))
        damaged = rng.choice((name, name, name, "lexicon.txt"))
        (home / name).write_bytes(self.tables[name])
        (home / "lexicon.txt").write_bytes(self.lexicon)
        data = (home / damaged).read_bytes()
        how = rng.choice(("text", "text", "bytes"))
        values = ('"', '""', '"a', "path", "keyword", "|", "<blank>")
        data = mutate.text(rng, data, ",\t ", values) if how == "text" else mutate.mutated(rng, data)
        if rng.random() < 0.1:
            data = mutate.mutated(rng, gzip.compress(data, mtime=0))
        done = mutate.planted(rng, home / damaged, data)
        split = rng.choice((None, "take>=4", "keyword=='k1'"))
        return Case(f"{damaged} {how} {done}", lambda: self.read(name, split), (damaged, "out", "utterance", "data."))

    def read(self, name, split):
        corpus = FolderCorpus("audio", labels=name, test=split)
        found = prepare(lambda: corpus.manifests(progress=False), "out", sources=corpus.sources, num_jobs=1, progress=False)
        survey_all(found, UtteranceLabel("keyword"), CharacterLabels(), PhoneSequence(lexicon="lexicon.txt"))


def safetensors(rng, data):
    """A damaged safetensors file: its bytes, or a header that says other shapes."""
    if rng.random() < 0.4:
        return mutate.mutated(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = mutate.tree(rng, header, ("F64", "I64", "BF16", "F8_E4M3", "BOOL", [0, 4], [2**62, 2**62], [-1]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


class Encoder:
    """Exported encoders: read for a task, to go on from, and to be exported."""

    name = "encoder"
    together = 1
    ATTENTIONS = (
        "query_key.QueryKey",
        "local.Local",
        "synthesizer_dense.SynthesizerDense",
        "synthesizer_random.SynthesizerRandom",
    )

    def make(self):
        for number, mechanism in enumerate(self.ATTENTIONS):
            torch.manual_seed(0)
            model = TINY["model"] | {"attention": {"_target_": f"audiot.attention.{mechanism}"}}
            if number:
                model["positions"] = {"_target_": "audiot.positions.Sinusoid"}
            encoder = AudioEncoder(TINY["features"], model)
            save_encoder(str(number), encoder)
            objective = {"_target_": "audiot.objectives.reconstruction.Reconstruction", "span": 3}
            save_objective(str(number), objective, Reconstruction(encoder, span=3))
        pretrain_config("init=encoder")  # composing takes long, and importing libraries of export-hf too
        importlib.import_module("audiot.commands.export_hf")
        first = Path(__file__).parent.parent / "first_format" / "encoder"
        shutil.copytree(first, "first")

    def plant(self, rng, home, number):
        source = rng.choice(sorted(self.folder.iterdir()))
        mutate.copied(source, home / "encoder")
        there = sorted(path.name for path in source.iterdir())
        name = rng.choice([*there, "config.json", "config.json"])
        path = home / "encoder" / name
        data = path.read_bytes()
        if name.endswith("safetensors"):
            data, how = safetensors(rng, data), "tensors"
        else:
            how = rng.choice(("tree", "tree", "tree", "text", "bytes"))
            others = [json.loads((self.folder / each).read_text()) for each in ("1/config.json", "0/objective.json")]
            data = {
                "tree": lambda: mutate.as_json(rng, mutate.tree(rng, json.loads(data), others)),
                "text": lambda: mutate.text(rng, data, ":,"),
                "bytes": lambda: mutate.mutated(rng, data),
            }[how]()
        done = mutate.planted(rng, path, data)
        what = rng.choice(("states", "states", "init", "s3prl", "hf"))
        return Case(f"{source.name}/{name} {how} {done}, for {what}", getattr(self, f"for_{what}"), ("encoder",))

    def for_states(self):
        encoder = load_encoder("encoder")
        with torch.no_grad():
            encoder(torch.from_numpy(noise()).float()[None])

    def for_init(self):
        from audiot.pretraining import build

        build(pretrain_config("init=encoder"))

    def for_s3prl(self):
        run_tool("export-s3prl", ["encoder", "x.ckpt"])

    def for_hf(self):
        run_tool("export-hf", ["encoder", "hf"])


@functools.cache
def pretrain_config(*overrides):
    from hydra import compose, initialize_config_module

    with initialize_config_module("audiot.conf", version_base="1.3"):
        return compose("pretrain", ["run_dir=run", *overrides])


class S3prl:
    """Checkpoints of S3PRL."""

    name = "s3prl"
    together = 1

    def make(self):
        from interop.test_s3prl import VARIANTS, checkpoint

        self.contents = [checkpoint(audio, channels, **options) for audio, channels, options in VARIANTS.values()]

    def plant(self, rng, home, number):
        content = rng.choice(self.contents)
        how = rng.choice(("tree", "tree", "bytes", "tensors"))
        if how == "tree":
            part, values = rng.choice(("Upstream_Config", "Upstream_Config", None)), (Pickled(), fire, os.system, print)
            content = content | {part: mutate.tree(rng, content[part])} if part else mutate.tree(rng, content, values)
        elif how == "tensors":
            content = content | {"Transformer": dict(content["Transformer"])}
            weights = content["Transformer"]
            name = rng.choice(list(weights))
            odd = weights[name]
            weights[name] = rng.choice(
                (
                    odd[:-1],
                    odd.double(),
                    odd.to(torch.complex64),
                    (odd * 100).to(torch.int8),
                    odd.to_sparse(),
                    odd * float("nan"),
                    torch.zeros(1).expand(2**40),
                    torch.zeros(1).expand(*odd.shape),
                    odd.to("meta"),
                    odd.reshape(-1),
                    torch.tensor(1.0),
                    torch.zeros(0),
                    None,
                    "x",
                    torch.nn.Parameter(odd),
                    odd.bool(),
                    torch.quantize_per_tensor(odd, 0.1, 0, torch.qint8),
                )
            )
        with io.BytesIO() as stream:
            torch.save(content, stream, _use_new_zipfile_serialization=rng.random() < 0.8)
            data = stream.getvalue()
        if how == "bytes":
            data = mutate.mutated(rng, data)
        done = mutate.planted(rng, home / "x.ckpt", data)
        return Case(f"{how} {done}", self.read, ("x.ckpt",))

    def read(self):
        run_tool("import-s3prl", ["x.ckpt", "encoder"])
        with torch.no_grad():
            load_encoder("encoder")(torch.from_numpy(noise()).float()[None])


class Run:
    """Folders of runs of pre-training and of a task, read by the commands that take one."""

    name = "run"
    together = 1
    PRETRAINED = ("resume", "evaluate", "analyze", "compare", "finetune")
    FINETUNED = ("predict", "compare", "evaluate")

    def make(self):
        os.mkdir("audio")
        for number in range(8):
            soundfile.write(f"audio/{'ab'[number % 2]}_{number}.wav", noise(seed=number), RATE)
        given = [
            "data=folder",
            "data.root=audio",
            "data.pattern='{keyword}_{take}'",
            "data.valid='take in (4, 5)'",
            "data.test='take>=6'",
            "data.num_workers=0",
            "data.batch_s=10",
            "data.crop_s=0.5",
            "data.prepare.num_jobs=1",
            "data_dir=data",
            "trainer.accelerator=cpu",
            "trainer.max_steps=2",
            "trainer.val_check_interval=1",
        ]
        model = ["model.embed_dim=8", "model.num_heads=2", "model.ffn_dim=16", "model.num_layers=1", "features.n_mels=8"]
        self._quick()
        self._run("pretrain", *given, *model, "probe=false", "hydra.run.dir=pretrained")
        upstream = ["upstream=checkpoint", "upstream.path=pretrained/encoder", "downstream=keyword"]
        self._run("finetune", *given, *upstream, "hydra.run.dir=finetuned")
        os.symlink("pretrained", "run")
        for command in ("evaluate", "analyze"):
            self._run(command, "run=run")

    def _quick(self):
        """Leave out what takes long and reads nothing of a case: pictures, composing the defaults, asking git about audiot."""
        from matplotlib.figure import Figure

        Figure.savefig = lambda figure, path, **options: Path(path).touch()
        compose = launch.compose
        known = functools.lru_cache(maxsize=32)(lambda command, overrides: compose(command, list(overrides)))
        launch.compose = lambda command, overrides: known(command, tuple(overrides))
        environment.git_state = functools.cache(environment.git_state)

    def _run(self, *arguments):
        cli.main(list(arguments))

    def plant(self, rng, home, number):
        kind = rng.choice(("pretrained", "pretrained", "finetuned"))
        mutate.copied(self.folder / kind, home / "run")
        for name in ("audio", "data"):
            mutate.copied(self.folder / name, home / name)
        command = rng.choice(self.PRETRAINED if kind == "pretrained" else self.FINETUNED)
        path = self._path(rng, home / "run", command)
        data = path.read_bytes() if path.is_file() else b"- step: 1\n  overrides:\n  - trainer.max_steps=3\n"
        data, how = self._damaged(rng, path, data)
        done = mutate.planted(rng, path, data)
        what = f"{command} {kind}/{path.relative_to(home / 'run')} {how} {done}"
        return Case(what, lambda: self.read(command), ("run/", "=run", "run:", "run "), lines=1)

    def _path(self, rng, run, command):
        there = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix != ".png"]
        read = {
            "resume": ("config.yaml", ".hydra", "checkpoints", "metrics.csv", "summary.json", "data.json", "targets.json"),
            "evaluate": ("config.yaml", "checkpoints", "summary.json", "metrics.json", "data.json", "resumes.yaml"),
            "analyze": ("config.yaml", "checkpoints", "summary.json", "metrics.csv", "data.json"),
            "compare": ("summary.json", "metrics.json", "overrides.yaml", "resumes.yaml"),
            "finetune": ("encoder",),
            "predict": ("checkpoints",),
        }[command]
        chosen = [path for path in there if any(name in path.relative_to(run).parts for name in read)]
        top = [path for path in chosen if path.name in ("config.yaml", "summary.json", "metrics.json", "best.ckpt")]
        return rng.choice([*chosen, *top, *top, run / ".hydra" / "resumes.yaml"])

    def _damaged(self, rng, path, data):
        how = rng.choice(("tree", "tree", "tree", "text", "bytes"))
        if path.suffix == ".safetensors":
            return safetensors(rng, data), "tensors"
        if path.suffix == ".ckpt" and how != "bytes":
            content = torch.load(io.BytesIO(data), weights_only=True)
            known = ("hyper_parameters", "hyper_parameters", "state_dict", "callbacks", "optimizer_states")
            parts = [name for name in known if name in content]
            part = rng.choice([*parts, None])
            values = (Pickled(), torch.zeros(3), torch.zeros(1).expand(2**40), torch.zeros(2, dtype=torch.complex64))
            content = content | {part: mutate.tree(rng, content[part], values)} if part else mutate.tree(rng, content, values)
            with io.BytesIO() as stream:
                torch.save(content, stream)
                return stream.getvalue(), "tree"
        if path.suffix not in (".yaml", ".json") or how == "bytes":
            how = "text" if path.suffix in (".csv", ".yaml", ".json") and rng.random() < 0.6 else "bytes"
            return (mutate.text(rng, data, ",:", mutate.YAML) if how == "text" else mutate.mutated(rng, data)), how
        if how == "text":
            if rng.random() < 0.1:
                return mutate.BOMB.encode(), "bomb"
            return mutate.text(rng, data, ":", (*mutate.YAML, *map(str, mutate.CODE))), how
        content = yaml.safe_load(data) or {}
        changed = mutate.tree(rng, content)
        if path.suffix == ".json":
            return mutate.as_json(rng, changed), how
        return mutate.encoded(rng, yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)), how

    def read(self, command):
        OmegaConf.register_new_resolver("mark", fire, replace=True)
        if command == "resume":
            self._run("pretrain", "resume=run", "trainer.max_steps=3")
        elif command in ("evaluate", "analyze"):
            self._run(command, "run=run")
        elif command == "compare":
            run_tool("compare", ["run", str(self.folder / "pretrained"), "--output", "table"])
        elif command == "finetune":
            load_encoder("run/encoder")
            load_objective("run/encoder")
        else:
            run_tool("predict", ["run", "audio/a_0.wav", "--device", "cpu"])


def fail(error):
    raise error


class Wrong:
    """Readers that do what none may, for a test of the watch itself."""

    name = "wrong"
    together = 1
    READERS = (
        lambda: None,
        lambda: fail(ValueError("x.txt has no header: add one")),
        lambda: fail(FileNotFoundError("no file at x.txt")),
        lambda: fail(KeyError("header")),
        lambda: fail(ValueError("no header")),
        lambda: fail(ValueError("")),
        lambda: sys.exit(f"audiot: error: x.txt {'is damaged ' * 1000}"),  # not told by `describe`, which shortens
        lambda: print("Traceback (most recent call last)"),
        lambda: fire(),
        lambda: os.system("true"),
        lambda: Path("../outside").write_text("changed"),
        lambda: Path("../new").mkdir(),
        lambda: bytearray(2**34),
        lambda: os._exit(3),
    )

    def make(self):
        pass

    def plant(self, rng, home, number):
        return Case("nothing", self.READERS[number], ("x.txt",))


KINDS = {kind.name: kind() for kind in (Audio, Manifest, TextGrid, Table, Encoder, S3prl, Run, Wrong)}
