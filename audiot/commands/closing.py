"""The closing lines of a pre-training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiot.base.console import table
from audiot.base.files import finished
from audiot.commands.compare import bracket, cell
from audiot.following import finetune_command
from audiot.runs import read_results

FIRST_MONITOR = "pretrain/val_l1"  # of runs of earlier versions


def validation_loss(summary: Mapping[str, Any]) -> float:
    """The validation loss of a summary. Runs of earlier versions have L1."""
    return float(summary[summary.get("monitor", FIRST_MONITOR)])


def loss_line(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The validation loss in words, beside trivial predictions."""
    figure = summary.get("monitor", FIRST_MONITOR).removeprefix("pretrain/val_")
    trivial = {
        name.removeprefix("pretrain/").removesuffix(f"_{figure}"): value
        for name, value in summary.items()
        if name.endswith(f"_{figure}") and not name.startswith("pretrain/val_")
    }
    words = {"zero": "zeros"}
    beside = ", ".join(f"{words.get(name, name)} {value:.3f}" for name, value in trivial.items())
    accuracy = f"; {summary['pretrain/val_accuracy']:.1%} right" if "pretrain/val_accuracy" in summary else ""
    title = {"l1": "validation L1"}.get(figure, f"validation {figure.replace('_', '-')}")
    return title, f"{validation_loss(summary):.3f}   ({beside}{accuracy})"


def stop_line(figures: Mapping[str, Any]) -> dict[str, str]:
    """The line of a run that `callbacks=early_stopping` has ended; nothing for another one."""
    if "stopped_patience" not in figures:
        return {}
    patience = figures["stopped_patience"]
    words = f"early, at step {figures['steps']:,}: no better validation in {patience} in a row"
    return {"stopped": f"{words} (callbacks.early_stopping.patience={patience})"}


def report(run: Path, follow: bool = True) -> str:
    """The closing lines: what was done, how good it is, and with ``follow`` what to run next."""
    path = run / "summary.json"
    summary: Mapping[str, Any] = read_results(path, ["frames_per_s", "steps", "parameters", "wall_s"])
    read_results(path, [summary.get("monitor", FIRST_MONITOR)])
    title, loss = loss_line(summary)
    since = f"since step {summary['resumed_step']}" if summary.get("resumed_step") else "in all"
    lines = [
        "",
        table(
            {
                title: loss,
                "throughput": f"{summary['frames_per_s']:,} frames/s, {summary['steps']} steps, "
                f"{summary['parameters'] / 1e6:.2f} M parameters, {summary['wall_s']:.0f} s {since}"
                + (f", {summary['first_step_s']:.0f} s to the first step" if summary.get("first_step_s", 0) >= 5 else ""),
                **({"data": f"{summary['read_gb']:.3g} GB read from shards, {since}"} if "read_gb" in summary else {}),
                **stop_line(summary),
            }
        ),
    ]
    results = {tuple(name.split("/")): value for name, value in summary.items() if name.startswith(("probe/", "finetune/"))}
    if results:
        columns = {"encoder": "pre-trained", "random": "untrained"} | {name: name for _, _, name in results if "features" in name}
        rows = {}
        for kind, task in dict.fromkeys((kind, task) for kind, task, _ in results):
            first = next(column for column in columns if (kind, task, column) in results)
            metrics = read_results(run / "probes" / f"{kind}-{task}-{first}" / "metrics.json", ["monitor", "train_utterances"])
            monitor = "" if metrics["monitor"] == "accuracy" else f" ({metrics['monitor']})"
            name = f"{task}{monitor}, {'frozen' if kind == 'probe' else 'fine-tuned'}, {metrics['train_utterances']:,} utterances"
            names = [f"{kind}/{task}/{column}" for column in columns]
            rows[name] = [cell(name, summary.get(name)) + bracket(name, summary) for name in names]
        width = max(38, *map(len, rows))
        bounded = "intervals" in summary
        head, column = ("test accuracy, % (95% interval)", 19) if bounded else ("test accuracy, %", 16)
        lines += ["", f"{head:<{width}}" + "".join(f"{title.replace('_', ' '):>{column}}" for title in columns.values())]
        lines += [f"{name:<{width}}" + "".join(f"{text:>{column}}" for text in cells) for name, cells in rows.items()]
    plots = [path.name for path in finished(run / "plots", "*.png") if "step" not in path.name]
    lines += [
        "",
        f"run     {run}",
        *([f"plots   {run / 'plots'}: {', '.join(plots)}"] if plots else []),
        *([f"next:   {finetune_command(run)}"] if follow else []),
    ]
    return "\n".join(lines)
