"""The command line: ``audiot pretrain …`` is ``python scripts/pretrain.py …``, from any folder.

Light on purpose: worker processes import it again, and ``--help`` should not wait for PyTorch.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from io import TextIOWrapper

from audiot.base.groups import described, groups, nearest

COMMANDS = {
    "adapt": "from a folder of audio and a table of labels to a model and its report",
    "pretrain": "pre-train a masked acoustic model, probe it, draw it",
    "tune": "find a batch and a learning rate for a pre-training on this machine",
    "finetune": "probe or fine-tune an encoder on a speech task",
    "evaluate": "measure a finished run again",
    "analyze": "draw a run: curves, reconstructions, attention",
    "abx": "measure how well layers tell phones apart, without training",
    "prepare": "make a corpus ready for training",
    "align": "write phone or character times of a transcribed corpus",
    "benchmark": "measure the speed and memory of attention mechanisms",
    "superb": "an encoder on SUPERB's tasks, learning rates chosen on validation, in one table",
    "study": "what each mechanism costs and buys, under which objective, over seeds",
}
TOOLS = {  # of plain arguments, without a config
    "compare": "the results of several runs in one table",
    "rerun": "repeat a run, and compare the two",
    "average": "the encoder of a run with the mean weights of its last checkpoints",
    "predict": "what a fine-tuned model says of audio files, or of a microphone",
    "serve": "a web page and a JSON API of a fine-tuned model",
    "extract": "hidden states of a corpus to files",
    "import-s3prl": "make an encoder of an S3PRL checkpoint",
    "export-s3prl": "write an encoder as an S3PRL checkpoint",
    "export-hf": "write an encoder as a Hugging Face model",
    "export-onnx": "write a model as ONNX, features included",
    "export-torch": "write a model as a graph of torch.export, features included",
}
USAGE = """usage: audiot COMMAND [group=option …] [key=value …]
       audiot TOOL ARGUMENT …
       audiot list [GROUP]      options of a config group: attention, data, features, model, …
       audiot --version

commands:
{commands}
tools:
{tools}

`audiot COMMAND --help` shows a command's groups and every key; -m runs a sweep: audiot pretrain -m seed=0,1,2"""


def main(arguments: list[str] | None = None) -> None:
    """Run a command; the exit code is 0 only if it did what was asked."""
    try:
        _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _main(arguments: list[str] | None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may have characters that the locale lacks
    command, *rest = arguments or ["--help"]
    if command in ("--help", "-h"):
        lists = {"commands": COMMANDS, "tools": TOOLS}
        print(USAGE.format(**{kind: _lines(known) for kind, known in lists.items()}))
    elif command == "--version":
        print(f"audiot {version('audiot')}")
    elif command == "-sc":  # Hydra's flag, as its script for a shell calls it
        complete(rest)
    elif command == "list":
        try:
            print(_lines(described(rest[0])) if rest else "\n".join(groups()))
        except ValueError as error:
            sys.exit(f"audiot: error: {error}")
    elif command in COMMANDS:
        _spin_briefly()
        from audiot.commands.launch import run

        run(command, rest)
    elif command in TOOLS:
        if command == "rerun":  # the only one that trains
            _spin_briefly()
        from audiot.commands.launch import run_tool

        run_tool(command, rest)
    else:
        known = [*COMMANDS, *TOOLS, "list"]
        sys.exit(f"audiot: error: no command {command!r}{nearest(command, known)}; commands: {', '.join(known)}")


def _spin_briefly() -> None:
    """Let threads that wait for each other spin a little and then sleep; read when torch loads its OpenMP.

    Endless spinning (the default) is ruinous on cores that data workers or other programs share; sleeping at once costs 40% where
    they don't.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def complete(arguments: list[str]) -> None:
    """Completion for a shell: ``install=bash`` prints the script, which asks with ``query=bash`` for the words that fit."""
    if not arguments:
        sys.exit("audiot: error: -sc install=bash prints the script with which a shell completes words")
    from audiot.commands.launch import run

    line = os.environ.get("COMP_LINE", "")
    words = line.split(" ")
    if arguments[:1] == ["query=bash"] and len(words) < 3:
        print(*(name for name in (*COMMANDS, *TOOLS, "list") if name.startswith(words[-1])))
    elif arguments[:1] != ["query=bash"] or words[1] in COMMANDS:
        os.environ["COMP_LINE"] = " ".join(["audiot", *words[2:]])
        os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
        run(words[1] if words[1:] else "pretrain", ["-sc", *arguments], "audiot")


def _lines(known: dict[str, str]) -> str:
    width = max(12, *map(len, known))
    return "\n".join(f"  {name:{width}} {what}".rstrip() for name, what in known.items())


if __name__ == "__main__":
    main()
