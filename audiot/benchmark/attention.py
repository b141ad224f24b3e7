"""``audiot benchmark benchmark=attention``: what each attention mechanism costs, beside query-key attention in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor, nn
from tqdm import tqdm

from audiot.attention import SelfAttention, build
from audiot.attention.lsh import LSHAttention, recall
from audiot.attention.mechanism import check_type
from audiot.base.console import say
from audiot.base.devices import free_memory
from audiot.base.files import write_csv, write_text
from audiot.base.groups import options, read_option
from audiot.base.private import many_compilations
from audiot.base.quoting import quoted
from audiot.base.tables import aligned
from audiot.benchmark.attention_report import draw, grid, markdown_report, notes
from audiot.benchmark.attention_results import Panel, Row, panels, rows_of
from audiot.benchmark.entries import BASELINE, Entry, check_labels
from audiot.benchmark.measure import Failed, Measured, MismatchError, attempt, measure
from audiot.benchmark.results import cells, refuse_broken
from audiot.benchmark.settings import check_choices, check_counts, check_seconds, find_device
from audiot.benchmark.standing import sentences
from audiot.positions import Positions

SCOPES = ("operator", "layer")
DIRECTIONS = ("inference", "training")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far outputs may differ, as a share of their norm: the fast form from the plain one (TF32 included), the compiled form from
# the eager one (where rounding may change a choice of keys). A wrong computation differs by more.
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1, "fp16": 0.1}
CHECKED_FRAMES = 80
NUM_CENTRES = 16
MAX_PAIRS = 2**28  # pairs of query and key that recall looks at: all heads where possible


class AttentionBenchmark:
    """Attention by itself (``operator``) and in its layer with projections (``layer``), beside query-key attention.

    ``inference`` is the forward pass in evaluation mode without gradients. ``training`` is forward and backward, with gradients
    of the inputs and of all parameters. The operator gets queries, keys, values and hidden states in the measured precision,
    and no positions. Below fp32 both run under autocast with float32 parameters, as in training. The layer's input is float32.

    Args:
        mechanisms: Names of `conf/attention`, mappings with the keys of `Entry`, or the words of `Entry.all_of`. The plain
            ``query_key`` always comes first.
        lengths: Frames per sequence. A mechanism is built anew for each length, since some have a table of frames.
        frames: Frames per batch. A batch has frames // length sequences, at least one.
        embed_dim: Width of the layer.
        num_heads: Number of heads.
        precisions: Some of ``fp32``, ``bf16`` and ``fp16``.
        scopes: Some of ``operator`` and ``layer``.
        directions: Some of ``inference`` and ``training``.
        compile: Some of ``false`` and ``true``. True compiles with `torch.compile`, anew for each length.
        graphs: Whether CUDA graphs are timed. They leave out the host's work of launching kernels, which a model hides if it
            keeps the GPU busy or is compiled. Without them the host limits fast mechanisms.
        positions: Positions inside the layer: a name of `conf/positions` for all mechanisms, or ``own`` for the choice of each
            mechanism's file.
        padded: Share of padded frames at the end of every sequence. 0 means no mask.
        dropout: Dropout of the attention weights of every mechanism.
        rounds: Rounds of `audiot.benchmark.measure.measure`.
        seconds: Seconds per measurement, as `audiot.benchmark.measure.measure` takes them.
        device: ``auto``, ``cpu``, ``cuda``, …
        seed: Seed of the parameters and the inputs.

    Raises:
        ValueError: an unknown name or an impossible size.
    """

    key = ("mechanism", "scope", "direction", "length", "batch", "precision", "compiled")
    figure = "median_ms"

    def __init__(
        self,
        mechanisms: Sequence[str | Mapping[str, Any]],
        lengths: Sequence[int],
        frames: int,
        embed_dim: int,
        num_heads: int,
        precisions: Sequence[str],
        scopes: Sequence[str],
        directions: Sequence[str],
        compile: Sequence[bool],
        graphs: bool,
        positions: str,
        padded: float,
        dropout: float,
        rounds: int,
        seconds: float,
        device: str,
        seed: int,
    ) -> None:
        for length in lengths:
            check_type(int, **{"benchmark.lengths: one": length})
        sizes = {"frames": frames, "embed_dim": embed_dim, "num_heads": num_heads}
        check_counts(**sizes, rounds=rounds, lengths=min(lengths, default=1))
        for flag in compile:
            check_type(bool, **{"benchmark.compile: one": flag})
        check_type(bool, **{"benchmark.graphs": graphs})
        check_seconds(seconds)
        for name, share in {"padded": padded, "dropout": dropout}.items():
            check_type(float, **{f"benchmark.{name}": share})
            if not 0 <= share < 1:
                raise ValueError(f"benchmark.{name}={share}: expected at least 0 and less than 1")
        if embed_dim % num_heads:
            raise ValueError(
                f"benchmark.embed_dim={embed_dim} is no multiple of benchmark.num_heads={num_heads}: change one of them"
            )
        check_choices("lengths", lengths, lengths)
        check_choices("precisions", precisions, list(PRECISIONS))
        check_choices("scopes", scopes, SCOPES)
        check_choices("directions", directions, DIRECTIONS)
        check_choices("compile", compile, [False, True])
        check_choices("positions", [positions], ["own", *options("positions")])
        plain_baseline = Entry(BASELINE, BASELINE)
        self.entries = [plain_baseline, *(entry for entry in Entry.all_of(mechanisms) if entry != plain_baseline)]
        check_labels(self.entries, "benchmark.mechanisms")
        self.lengths = sorted(set(lengths))
        self.frames = frames
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.precisions = precisions
        self.scopes = scopes
        self.directions = directions
        self.compile = compile
        self.graphs = graphs
        self.positions = positions
        self.padded = padded
        self.dropout = dropout
        self.rounds = rounds
        self.seconds = seconds
        self.device = find_device(device)
        if graphs and self.device.type != "cuda":
            raise ValueError(f"benchmark.graphs=true needs a CUDA device, found {self.device.type}: set benchmark.graphs=false")
        self.seed = seed
        self._wrong: dict[str, Failed] = {}

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure. Write ``results.csv``, ``table.md`` and pictures, and print the main table.

        Raises:
            ValueError: a measurement crashed, or a mechanism computes something wrong. The error comes after all else is done.
        """
        rows: list[Row] = []
        for more in self.run():
            rows += more
            write_csv(run / "results.csv", map(cells, rows))  # each time, so that Ctrl-C leaves something behind
        write_text(run / "table.md", markdown_report(rows, BASELINE, self.describe(machine)))
        tables = panels(rows)
        first = next(iter(tables))
        panel = [panel for panel in tables if panel[:2] == first[:2]][-1]  # the layer in training, if that was asked for
        shown = tables[panel]
        say(f"\n{panel.title}: ms per batch of {self.frames:,} frames (× as fast as {BASELINE})")
        say(aligned(grid(shown)))
        say("\n".join(["", *sentences(shown, BASELINE), *notes(shown), ""]))
        # Drawn after the notes, which say why there may be nothing to draw.
        size = f"{self.num_heads} heads × {self.head_dim}"
        plots = draw(rows, BASELINE, f"Attention, {size}, {machine['device']}", run)
        say(f"run     {run}\nfiles   {', '.join(['table.md', 'results.csv', *plots, 'machine.json'])}")
        say(f"next:   {self.next_command(shown)}")
        refuse_broken(rows, run / "table.md")

    def run(self) -> Iterator[list[Row]]:
        """Check every mechanism, then measure. Yields the rows of one table and length at a time."""
        choices = [Panel(*choice) for choice in product(self.precisions, self.compile, self.scopes, self.directions)]
        steps = len(self.entries) * (1 + len(self.lengths) * len(choices) * (self.rounds + 1))
        form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm(total=steps, desc="check", leave=False, bar_format=form) as bar:
            for entry in self.entries:
                bar.set_postfix_str(entry.label)
                checked = attempt(lambda entry=entry: self._check(entry))  # type: ignore[misc]
                if isinstance(checked, Failed):
                    self._wrong[entry.label] = checked
                bar.update()
            for length in self.lengths:
                bar.set_description_str(f"build, T={length:,}")
                layers = {entry.label: self._prepared(entry, length) for entry in self.entries}
                recalls = {entry.label: self._recall(entry, length) for entry in self.entries}
                for panel in choices:
                    yield self._side_by_side(layers, recalls, length, panel, bar)
                del layers
                free_memory()

    def describe(self, machine: Mapping[str, Any]) -> list[str]:
        """What was measured and how, for the reader of the tables."""
        padding = f"{self.padded:.0%} of the frames padded" if self.padded else "nothing padded, no mask"
        inside = {"own": "each mechanism's own positions", "none": "no positions"}.get(
            self.positions, f"{self.positions} positions"
        )
        return [
            f"{machine['device']}, {machine['threads']} CPU threads, PyTorch {machine['torch']}. {self.num_heads} heads × "
            f"{self.head_dim}, batches of {self.frames:,} frames (at least one sequence), {padding}, "
            f"attention dropout {self.dropout}, seed {self.seed}.",
            ("CUDA graphs, without the host's work of launching kernels. " if self.graphs else "")
            + f"Median of {self.rounds} rounds in which all mechanisms take turns; in brackets how many times as fast as "
            f"`{BASELINE}` in the same rounds.",
            "operator: the mechanism alone on ready queries, keys and values, without positions. layer: with its projections, "
            f"{inside} inside. inference: forward without gradients. training: forward and backward.",
            "recall: the share of the 32 keys with the largest products that hashing finds, where queries and keys lie around "
            f"{NUM_CENTRES} centres.",
            f"`{machine['command']}`",
        ]

    def next_command(self, rows: Sequence[Row]) -> str:
        """How to pre-train with the fastest mechanism at the longest length. Controls, which learn no attention, are left out."""
        longest = max(row.length for row in rows)
        found = {row.mechanism: row.median_ms for row in rows if row.length == longest and row.median_ms is not None}
        entries = [entry for entry in self.entries if entry.label in found and not self._is_control(entry)]
        if not entries:
            return "audiot benchmark --help"
        best = min(entries, key=lambda entry: found[entry.label])
        return " ".join(["audiot pretrain", *map(quoted, best.arguments)])

    def _is_control(self, entry: Entry) -> bool:
        mechanism = self._layer(entry, CHECKED_FRAMES).mechanism
        return mechanism.inputs == {"value"} and not list(mechanism.parameters())

    def _layer(self, entry: Entry, num_frames: int, num_heads: int | None = None) -> SelfAttention:
        """A new layer on the CPU for sequences of up to `num_frames`. It has all heads unless `num_heads` is given."""
        torch.manual_seed(self.seed)
        num_heads = num_heads or self.num_heads
        shape = (num_heads * self.head_dim, num_heads, num_frames)
        return build(entry.name, *shape, self._positions(entry, shape), **{**entry.overrides, "dropout": self.dropout})

    def _positions(self, entry: Entry, shape: tuple[int, int, int]) -> Positions:
        choice = self.positions
        if choice == "own":
            defaults = read_option("attention", entry.name).get("defaults", [])
            chosen = [value for default in defaults for group, value in default.items() if "/positions" in group]
            (choice,) = chosen or ["none"]
        config = read_option("positions", choice)
        return get_class(config.pop("_target_"))(*shape, **config)

    def _check(self, entry: Entry) -> None:
        """Compare the layer with its plain form on few frames, in float32 and in the precisions measured.

        Raises:
            MismatchError: they differ.
        """
        layer = self._layer(entry, CHECKED_FRAMES).to(self.device)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        hidden = torch.randn(2, CHECKED_FRAMES, self.embed_dim, generator=generator, device=self.device)
        valid = self._valid(2, CHECKED_FRAMES)
        for precision, direction in product(dict.fromkeys(["fp32", *self.precisions]), self.directions):
            layer.train(direction == "training" and not self.dropout)
            with self._autocast(precision), torch.set_grad_enabled(direction == "training"):
                what = "weights() @ value" if layer.has_weights else "its naive form"
                _check_equal(layer(hidden, valid), layer.reference(hidden, valid), precision, what)

    def _prepared(self, entry: Entry, length: int) -> SelfAttention | Failed:
        """The layer to measure at a length, on the device, or why it is not measured."""
        if entry.label in self._wrong:
            return self._wrong[entry.label]
        if entry.max_length is not None and length > entry.max_length:
            return Failed(f"skipped: longer than max_length {entry.max_length:,}")
        return attempt(lambda: self._layer(entry, length).to(self.device))

    @torch.no_grad()
    def _recall(self, entry: Entry, length: int) -> float | None:
        """Share of the 32 best keys that hashing finds among clustered queries and keys. None without hashing.

        Each head has centres drawn from N(0, I), the same for queries and keys, which spread around them as N(0, 0.25·I).
        """
        num_heads = min(self.num_heads, MAX_PAIRS // length**2)
        if self.device.type == "cuda":
            num_heads = max(1, num_heads)
        if entry.label in self._wrong or num_heads < 1 or (entry.max_length or length) < length:
            return None
        layer = attempt(lambda: self._layer(entry, length, num_heads))
        if isinstance(layer, Failed) or not isinstance(layer.mechanism, LSHAttention):
            return None
        mechanism = layer.mechanism.to(self.device)
        generator = torch.Generator().manual_seed(self.seed)
        centres = torch.randn(num_heads, NUM_CENTRES, self.head_dim, generator=generator)
        heads = torch.arange(num_heads)[:, None]

        def clustered() -> Tensor:
            nearest = torch.randint(NUM_CENTRES, (num_heads, length), generator=generator)
            spread = torch.randn(num_heads, length, self.head_dim, generator=generator)
            return (centres[heads, nearest] + 0.5 * spread)[None].to(self.device)

        query, key = clustered(), clustered()
        found = attempt(lambda: recall(mechanism, query, key, min(32, length)).item())
        return None if isinstance(found, Failed) else found

    def _side_by_side(
        self,
        layers: Mapping[str, SelfAttention | Failed],
        recalls: Mapping[str, float | None],
        length: int,
        panel: Panel,
        bar: tqdm[Any],
    ) -> list[Row]:
        """Measure all mechanisms at one length."""
        bar.set_description_str(f"{panel.title}, T={length:,}")

        def progress(label: str, steps: int) -> None:
            bar.set_postfix_str(label, refresh=not steps)
            bar.update(steps)

        batch = max(1, self.frames // length)
        inputs = attempt(lambda: self._inputs(batch, length, panel))
        results: dict[str, Measured | Failed] = {}
        calls: dict[str, Callable[[], object]] = {}
        if panel.compiled:
            torch.compiler.reset()
        # All mechanisms are compiled through the same lines of code, more often than PyTorch allows by default.
        with many_compilations() if panel.compiled else nullcontext():
            for label, layer in layers.items():
                progress(label, 0)
                if isinstance(layer, Failed):
                    call: Callable[[], object] | Failed = layer
                elif isinstance(inputs, Failed):
                    call = inputs
                else:
                    call = attempt(lambda layer=layer: self._call(layer, inputs, panel))  # type: ignore[misc]
                if isinstance(call, Failed):
                    results[label] = call
                    progress(label, self.rounds + 1)
                else:
                    calls[label] = call
            results |= measure(calls, self.device, self.rounds, self.seconds, progress, self.graphs)
        measured = {label: results[label] for label in layers}
        facts = {
            label: {"parameters": sum(map(Tensor.numel, _measured(layer, panel).parameters())), "recall": recalls[label]}
            for label, layer in layers.items()
            if not isinstance(layer, Failed)
        }
        return rows_of(measured, BASELINE, panel, length, batch, batch * self._real(length), facts)

    def _inputs(self, batch: int, length: int, panel: Panel) -> dict[str, Tensor | None]:
        """The inputs, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype = PRECISIONS[panel.precision]) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)

        def heads() -> Tensor:  # a view, as after a projection
            return random(batch, length, self.num_heads, self.head_dim).transpose(1, 2)

        if panel.scope == "layer":
            inputs = {"hidden": random(batch, length, self.embed_dim, dtype=torch.float32)}
            gradient = random(batch, length, self.embed_dim)
        else:
            inputs = {name: heads() for name in ("query", "key", "value")} | {"hidden": random(batch, length, self.embed_dim)}
            gradient = heads()
        for tensor in inputs.values():
            tensor.requires_grad_(panel.direction == "training")
        return {**inputs, "gradient": gradient, "valid": self._valid(batch, length)}

    def _call(self, layer: SelfAttention, inputs: Mapping[str, Tensor | None], panel: Panel) -> Callable[[], object]:
        """The call to time.

        Raises:
            MismatchError: the compiled form computes something else than the eager one.
        """
        training = panel.direction == "training"
        module = _measured(layer, panel).train(training)
        names = {"hidden"} if panel.scope == "layer" else layer.mechanism.inputs
        arguments = {name: inputs[name] for name in (*sorted(names), "valid")}
        tensors = [tensor for name in sorted(names) if (tensor := inputs[name]) is not None]
        leaves = [*tensors, *module.parameters()]
        gradient = inputs["gradient"]
        assert gradient is not None
        function: Callable[..., Tensor] = torch.compile(module, dynamic=False, fullgraph=True) if panel.compiled else module

        def forward(function: Callable[..., Tensor] = function) -> Tensor:
            # Autocast is entered at every call, as at every training step, because it keeps converted parameters until it ends.
            with self._autocast(panel.precision), torch.set_grad_enabled(training):
                return function(**arguments)

        def forward_and_backward() -> Sequence[Tensor | None]:
            output = forward()
            # These gradients are freed. Those that `backward` accumulates would count as allocated before the next call.
            return torch.autograd.grad(output, leaves, gradient.to(output.dtype), allow_unused=True)

        if panel.compiled and not (training and self.dropout):
            _check_equal(forward(), forward(module), panel.precision, "the eager form")
        return forward_and_backward if training else forward

    def _autocast(self, precision: str) -> AbstractContextManager[object]:
        return nullcontext() if precision == "fp32" else torch.autocast(self.device.type, PRECISIONS[precision])

    def _real(self, length: int) -> int:
        """Frames of a sequence that are not padding."""
        return max(1, round(length * (1 - self.padded)))

    def _valid(self, batch: int, length: int) -> Tensor | None:
        if not self.padded:
            return None
        return (torch.arange(length, device=self.device) < self._real(length)).expand(batch, -1)


def _measured(layer: SelfAttention, panel: Panel) -> nn.Module:
    return layer if panel.scope == "layer" else layer.mechanism


def _check_equal(output: Tensor, expected: Tensor, precision: str, what: str) -> None:
    """Raise MismatchError if an output differs from the expected one by more than the tolerance of the precision."""
    distance = ((output.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
    if not distance <= TOLERANCE[precision]:
        raise MismatchError(f"its output in {precision} differs from {what} by {distance:.1%} of the norm")
