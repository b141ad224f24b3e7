"""Plain arguments of the tools; light, so that ``--help`` and a mistake are answered before PyTorch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from audiot.data.audio import MIN_DURATION_S, SILENCE_DBFS
from audiot.data.utterances import LOUD_DBFS

OPSETS = range(18, 24)  # of ONNX, that torch.onnx can write
DTYPES = ("float32", "bfloat16", "float16")


def parse(tool: str, arguments: list[str]) -> argparse.Namespace:
    """Arguments of a tool of `audiot.cli.TOOLS`.

    Raises:
        SystemExit: ``--help`` is asked for, or an argument is not known.
        ValueError: a value is out of range.
    """
    return PARSERS[tool](arguments)


def compare(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot compare``."""
    parser = argparse.ArgumentParser(prog="audiot compare", description="Results of several runs in one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a fine-tuning or pre-training run, or of a sweep")
    parser.add_argument(
        "--output", default=".", metavar="FOLDER", help="where comparison.csv and comparison.md go (default: here)"
    )
    return parser.parse_args(arguments)


def average(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot average``."""
    parser = argparse.ArgumentParser(
        prog="audiot average", description="The encoder of a pre-training run with the mean weights of its last checkpoints."
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("output", metavar="OUT", help="folder to write the encoder to, which is not there yet or empty")
    parser.add_argument("--last", type=int, default=2, metavar="N", help="number of checkpoints (default: 2)")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own mechanisms")
    options = parser.parse_args(arguments)
    if options.last < 1:
        raise ValueError(f"--last must be at least 1, found {options.last}")
    return options


def predict(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot predict``."""
    parser = argparse.ArgumentParser(
        prog="audiot predict",
        description="What a fine-tuned model says of audio files, or of a microphone: labels with scores, segments, text, or how "
        "alike speakers are.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a fine-tuning run, or of a probe: RUN/probes/NAME")
    parser.add_argument("files", nargs="*", metavar="FILE", help="audio of any format and rate; a folder: all audio in it")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K best labels of each file (default: 1)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line and file, with everything there is to say")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own heads or mechanisms"
    )
    parser.add_argument(
        "--silence-dbfs",
        type=float,
        metavar="DB",
        help=f"a file of a lower level is silent and can't be used (default: {SILENCE_DBFS:g}); -inf: none is. What a microphone "
        f"hears below it is no speech (default: {LOUD_DBFS:g})",
    )
    parser.add_argument(
        "--microphone",
        action="store_true",
        help="listen, and predict each utterance; a pause ends one. Of a task that compares speakers, FILE … are the voices",
    )
    parser.add_argument("--input", metavar="N|NAME", help="number or part of the name of a microphone (default: the system's)")
    parser.add_argument(
        "--window", type=float, metavar="S", help="longest utterance of a microphone in seconds (default: 10); it is cut there"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="listen for so long (default: until Ctrl-C)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ValueError(f"--top must be at least 1, found {options.top}")
    if not options.microphone and not options.files:
        raise ValueError(f"nothing to predict: name audio, audiot predict {options.run} FILE …, or give --microphone")
    for name in ("input", "window", "seconds"):
        if getattr(options, name) is not None and not options.microphone:
            raise ValueError(f"--{name} is for --microphone, which is not given")
    if options.window is None:
        options.window = 10.0
    if not MIN_DURATION_S <= options.window <= 3600:
        raise ValueError(f"--window must be from {MIN_DURATION_S:g} to 3600 seconds, found {options.window:g}")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds must be above 0, found {options.seconds:g}")
    if options.silence_dbfs is None:
        options.silence_dbfs = LOUD_DBFS if options.microphone else SILENCE_DBFS
    return options


def serve(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot serve``."""
    parser = argparse.ArgumentParser(
        prog="audiot serve",
        description="A web page and a JSON API of a fine-tuned model: a file goes in, label, scores and spectrogram come out.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a fine-tuning run, or of a probe: RUN/probes/NAME")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine alone); 0.0.0.0: all of them"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000); 0: a free one")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which browsers call the server, besides localhost, --host and addresses of numbers",
    )
    parser.add_argument("--max-mb", type=float, default=20.0, metavar="MB", help="largest file (default: 20)")
    parser.add_argument("--max-s", type=float, default=60.0, metavar="S", help="longest audio in seconds (default: 60)")
    parser.add_argument(
        "--timeout-s", type=float, default=30.0, metavar="S", help="seconds from a request to its answer, at most (default: 30)"
    )
    parser.add_argument(
        "--queue", type=int, default=8, metavar="N", help="requests that come in, wait or are worked on at a time (default: 8)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own heads or mechanisms"
    )
    parser.add_argument(
        "--silence-dbfs",
        type=float,
        default=SILENCE_DBFS,
        metavar="DB",
        help=f"audio of a lower level is silent and refused (default: {SILENCE_DBFS:g}); -inf: none is",
    )
    options = parser.parse_args(arguments)
    for name, least, most in (("max-mb", 0.001, 2000), ("max-s", MIN_DURATION_S, 3600), ("timeout-s", 0.1, 3600)):
        value = getattr(options, name.replace("-", "_"))
        if not least <= value <= most:
            raise ValueError(f"--{name} must be from {least:g} to {most:g}, found {value:g}")
    if options.queue < 1:
        raise ValueError(f"--queue must be at least 1, found {options.queue}")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, found {options.port}")
    return options


def extract(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot extract``; ``part`` as the first shard and the step to the next."""
    parser = argparse.ArgumentParser(
        prog="audiot extract",
        description="Hidden states of a corpus to files (safetensors). An interrupted run goes on when it is started again.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="audio files, folders of them, Lhotse or NeMo manifests (.jsonl, .jsonl.gz), or the folder of a prepared corpus",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--encoder", required=True, metavar="RUN/encoder", help="what gives the hidden states")
    parser.add_argument(
        "--upstream",
        choices=("checkpoint", "s3prl", "hf"),
        default="checkpoint",
        help="its kind: of audiot (default), a checkpoint of S3PRL, or a folder or hub name of Hugging Face",
    )
    parser.add_argument(
        "--layers",
        default="last",
        metavar="last|all|LIST",
        help="hidden states: 0 is the input of the first layer, -1 the last one (default: last); several: --layers=0,-2,-1",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of what is stored (default: float16)")
    parser.add_argument(
        "--compute-dtype", choices=DTYPES, help="of the computation (default: bfloat16 on CUDA devices, float32 elsewhere)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--compile", action="store_true", help="generate faster code first, which takes up to a minute")
    parser.add_argument(
        "--batch-s", type=float, metavar="S", help="seconds of audio in a batch (default: 480 on CUDA devices, 60 elsewhere)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read audio (default: what is of use here)")
    parser.add_argument("--shard-mb", type=float, default=1000.0, metavar="MB", help="size of a file (default: 1000)")
    parser.add_argument(
        "--part",
        default="1/1",
        metavar="K/N",
        help="shards K, K + N, … only: N processes, on any GPUs and machines, share the work",
    )
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own mechanisms")
    parser.add_argument(
        "--sources",
        default="file,memory",
        metavar="KIND,…",
        help="audio sources that a manifest may name; url and command (run in a shell) for manifests that you trust",
    )
    options = parser.parse_args(arguments)
    for name, size in {"batch-s": options.batch_s, "shard-mb": options.shard_mb}.items():
        if size is not None and not size > 0:
            raise ValueError(f"--{name} must be above 0, found {size:g}")
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers must be at least 0, found {options.workers}")
    options.part = _part(options.part)
    return options


def _part(text: str) -> tuple[int, int]:
    """K/N as (K − 1, N)."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--part must be K/N, part K of N with K from 1 to N, found {text!r}")
    return int(first) - 1, int(count)


def import_s3prl(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot import-s3prl``."""
    parser = argparse.ArgumentParser(prog="audiot import-s3prl", description="Make an encoder of an S3PRL checkpoint.")
    parser.add_argument("checkpoint", metavar="X.ckpt", help="of a Mockingjay, TERA or AudioALBERT; no code in it is run")
    parser.add_argument("output", metavar="OUT", help="folder to write the encoder to")
    return parser.parse_args(arguments)


def export_s3prl(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot export-s3prl``."""
    parser = argparse.ArgumentParser(prog="audiot export-s3prl", description="Write an encoder as an S3PRL checkpoint.")
    parser.add_argument("encoder", metavar="ENCODER", help="folder of the encoder: RUN/encoder")
    parser.add_argument("output", metavar="OUT.ckpt", help="file to write")
    return parser.parse_args(arguments)


def export_hf(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot export-hf``."""
    parser = argparse.ArgumentParser(prog="audiot export-hf", description="Write an encoder as a Hugging Face model.")
    parser.add_argument("encoder", type=Path, metavar="ENCODER", help="an exported encoder, RUN/encoder, or its run, RUN")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write, which is not there yet or empty")
    parser.add_argument("--license", help="licence of the weights, as the hub calls it: apache-2.0, cc-by-4.0, other, …")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own mechanisms")
    return parser.parse_args(arguments)


def export_onnx(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot export-onnx``."""
    parser = argparse.ArgumentParser(
        prog="audiot export-onnx",
        description="Write the encoder of a pre-training run, or a fine-tuned model, as an ONNX file with its features inside.",
    )
    _exported(parser, "model.onnx")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="weights of eight bits, and the test of the task with them and with float32 (default file: RUN/model-int8.onnx)",
    )
    parser.add_argument(
        "--utterances", type=int, default=1000, metavar="N", help="utterances of the test for --int8, at most (default: 1000)"
    )
    first, last = OPSETS[0], OPSETS[-1]
    parser.add_argument(
        "--opset", type=int, default=first, metavar="N", help=f"version of the operators, {first} (default) to {last}"
    )
    options = parser.parse_args(arguments)
    if options.opset not in OPSETS:
        raise ValueError(f"--opset must be from {first} to {last}, found {options.opset}")
    if options.utterances < 1:
        raise ValueError(f"--utterances must be at least 1, found {options.utterances}")
    return options


def export_torch(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot export-torch``."""
    parser = argparse.ArgumentParser(
        prog="audiot export-torch",
        description="Write the encoder of a pre-training run, or a fine-tuned model, as a graph that PyTorch alone loads.",
    )
    _exported(parser, "model.pt2")
    return parser.parse_args(arguments)


def _exported(parser: argparse.ArgumentParser, name: str) -> None:
    """Arguments of what writes a run's model."""
    parser.add_argument("run", metavar="RUN", help="folder of a pre-training or fine-tuning run, of a probe, or of an encoder")
    parser.add_argument("-o", "--output", metavar="FILE", help=f"file to write, which is not there yet (default: RUN/{name})")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own heads or mechanisms"
    )


def rerun(arguments: list[str]) -> argparse.Namespace:
    """Arguments of ``audiot rerun``."""
    parser = argparse.ArgumentParser(
        prog="audiot rerun",
        description="Repeat a pre-training or fine-tuning run with its own config, and compare the two. "
        "The exit code is 0 if they are equal or within the tolerance.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--output", metavar="FOLDER", help="folder of the repeat (default: RUN-rerun)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-6,
        metavar="X",
        help="largest difference of a figure or a weight, as a share of it where it is above 1 (default: 1e-6)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="repeat and compare the first N steps of pre-training only")
    parser.add_argument("--compare", action="store_true", help="train nothing: compare with the run that is in FOLDER already")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="a package of your own mechanisms")
    options = parser.parse_args(arguments)
    if not options.tolerance >= 0:
        raise ValueError(f"--tolerance must be at least 0, found {options.tolerance:g}")
    return options


PARSERS: dict[str, Callable[[list[str]], argparse.Namespace]] = {
    "compare": compare,
    "rerun": rerun,
    "average": average,
    "predict": predict,
    "serve": serve,
    "extract": extract,
    "import-s3prl": import_s3prl,
    "export-s3prl": export_s3prl,
    "export-hf": export_hf,
    "export-onnx": export_onnx,
    "export-torch": export_torch,
}
