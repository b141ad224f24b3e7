"""``audiot benchmark benchmark=attention``: what each attention mechanism costs, beside query-key attention in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from audiot.attention import SelfAttention, build, build_mechanism, names, parameters
from audiot.attention.lsh import LSHAttention, recall
from audiot.attention.mechanism import check_type
from audiot.base.console import say
from audiot.base.files import replacing
from audiot.base.groups import nearest, options
from audiot.base.private import many_compilations
from audiot.base.quoting import argument
from audiot.benchmark import measure as benchmark
from audiot.benchmark.measure import Failed, Measured, MismatchError, Panel, Row, attempt
from audiot.positions import Positions

BASELINE = "query_key"
EVERY = ("all", "subquadratic")  # words in a list of mechanisms; see `Entry.all_of`
SCOPES = ("operator", "layer")
DIRECTIONS = ("inference", "training")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far outputs may differ, as a share of their norm: the fast form from the plain one (also in TF32), the compiled form from
# the eager one (where rounding may change a choice of keys). What computes something else differs by more.
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1, "fp16": 0.1}
CHECKED_FRAMES = 80
NUM_CENTRES = 16
MAX_PAIRS = 2**28  # of query and key that recall looks at; all heads where possible


@dataclass(frozen=True)
class Entry:
    """A mechanism to measure.

    Args:
        name: Its file in `conf/attention`.
        label: What tables call it.
        overrides: Parameters that replace those of the file.
        max_length: Longest sequence to measure it at; None = all.
    """

    name: str
    label: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    @classmethod
    def all_of(cls, configs: Sequence[str | Mapping[str, Any]], where: str = "benchmark.mechanisms") -> list[Entry]:
        """The entries of the config's list `where`.

        ``all`` stands for all of conf/attention that no other entry names, as their files have them; ``subquadratic`` for those
        of them that say so of themselves.
        """
        own = [cls.of(config, where) for config in configs if config not in EVERY]
        left = [name for name in names() if name not in {entry.name for entry in own}]
        entries: list[Entry] = []
        for config in configs:
            if config in EVERY:
                entries += [cls(name, name) for name in left if config == "all" or build_mechanism(name, 8, 2, 8).subquadratic]
            else:
                entries.append(own.pop(0))
        return entries

    @classmethod
    def of(cls, config: str | Mapping[str, Any], where: str = "benchmark.mechanisms") -> Entry:
        """An entry of the config's list `where`: a name, or a mapping with some of these keys."""
        if not isinstance(config, (str, Mapping)):
            raise ValueError(f"{where}: {config!r} is neither a name nor {{name: …, overrides: …}}")
        given: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        known = ["name", "label", "overrides", "max_length"]
        for key in given:
            if key not in known:
                raise ValueError(f"{where}: no key {key!r}{nearest(str(key), known)}; keys: {', '.join(known)}")
        name = str(given.get("name"))
        if name not in names():
            raise ValueError(f"{where}: no attention {name!r}{nearest(name, names())}; there are {', '.join(names())}")
        overrides, max_length = given.get("overrides") or {}, given.get("max_length")
        if not isinstance(overrides, Mapping):
            raise ValueError(f"{where}: overrides of {name} are {overrides!r}: expected {{parameter: value}}")
        known = list(parameters(name))
        for key in overrides:
            if key not in known:
                near = nearest(str(key), known)
                raise ValueError(f"{where}: {name} has no parameter {key!r}{near}; there are {', '.join(known)}")
        if max_length is not None:
            check_type(int, **{f"{where}: max_length of {name}": max_length})
            if max_length < 1:
                raise ValueError(f"{where}: max_length of {name} is {max_length}: set it to at least 1")
        overrides = dict(overrides)
        label = str(given.get("label") or "") or " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
        return cls(name, label, overrides, max_length)


class AttentionBenchmark:
    """Attention by itself (``operator``) and in its layer with projections (``layer``), beside query-key attention.

    ``inference`` is the forward pass in evaluation mode without gradients; ``training`` is forward and backward, to the inputs
    and all parameters. The operator gets its queries, keys, values and hidden states ready, in the precision measured, and no
    positions. Below fp32 both run under autocast with float32 parameters as in training, where the layer's input is float32.

    Args:
        mechanisms: Names of `conf/attention`, mappings with the keys of `Entry`, or the words of `Entry.all_of`. The plain
            ``query_key`` always comes first.
        lengths: Frames a sequence; mechanisms with a table of frames are built for each.
        frames: Frames a batch: sequences = frames // length, at least one.
        embed_dim: Width of the layer.
        num_heads: Heads.
        precisions: Of ``fp32``, ``bf16``, ``fp16``.
        scopes: Of ``operator``, ``layer``.
        directions: Of ``inference``, ``training``.
        compile: Of ``false``, ``true``: with `torch.compile`, for each length anew.
        graphs: Time CUDA graphs, which leave out what launching kernels costs the host: a model that keeps a GPU busy, or is
            compiled, hides that cost. False = as calls come; the host then bounds what is fast.
        positions: Inside the layer: a name of `conf/positions` for all, or ``own``: what each mechanism's file chooses.
        padded: Share of padded frames at the end of every sequence; 0 = no mask.
        dropout: On the attention weights of every mechanism.
        rounds: See `audiot.benchmark.measure.measure`.
        seconds: Likewise.
        device: ``auto``, ``cpu``, ``cuda``, …
        seed: Of parameters and inputs.

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
        sizes = {"frames": frames, "embed_dim": embed_dim, "num_heads": num_heads, "rounds": rounds}
        check_type(int, **{f"benchmark.{name}": size for name, size in sizes.items()})
        for length in lengths:
            check_type(int, **{"benchmark.lengths: one": length})
        for flag in compile:
            check_type(bool, **{"benchmark.compile: one": flag})
        check_type(bool, **{"benchmark.graphs": graphs})
        check_type(float, **{"benchmark.seconds": seconds, "benchmark.padded": padded, "benchmark.dropout": dropout})
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"benchmark.seconds is {seconds}: set it to 0 or more, and finite")
        for name, size in {
            "frames": frames,
            "num_heads": num_heads,
            "rounds": rounds,
            "lengths": min(lengths, default=1),
        }.items():
            if size < 1:
                raise ValueError(f"benchmark.{name} must be at least 1, found {size}")
        for name, share in {"padded": padded, "dropout": dropout}.items():
            if not 0 <= share < 1:
                raise ValueError(f"benchmark.{name}={share}: expected at least 0 and less than 1")
        if embed_dim < 1 or embed_dim % num_heads:
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
        labels = [entry.label for entry in self.entries]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"benchmark.mechanisms: {labels.count(label)} entries are called {label!r}: give each a label")
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
        self.device = benchmark.find_device(device)
        if graphs and self.device.type != "cuda":
            raise ValueError(f"benchmark.graphs=true needs a CUDA device, found {self.device.type}: set benchmark.graphs=false")
        self.seed = seed
        self._wrong: dict[str, Failed] = {}

    def report(self, run: Path, machine: dict[str, Any]) -> None:
        """Measure; write ``results.csv``, ``table.md`` and plots; print the main table.

        Raises:
            ValueError: a measurement crashed, or a mechanism computes something wrong; told after all else is done.
        """
        rows: list[Row] = []
        for more in self.run():
            rows += more
            benchmark.write_csv(rows, run / "results.csv")  # now, for Ctrl-C to leave something behind
        with replacing(run / "table.md") as temporary:
            temporary.write_text(benchmark.report(rows, BASELINE, self.describe(machine)), encoding="utf-8")
        tables = benchmark.panels(rows)
        first = next(iter(tables))
        panel = [panel for panel in tables if panel[:2] == first[:2]][-1]  # the layer in training, if that was asked for
        shown = tables[panel]
        say(f"\n{panel.title}: ms a batch of {self.frames:,} frames (× as fast as {BASELINE})")
        say(benchmark.aligned(benchmark.grid(shown)))
        say("\n".join(["", *benchmark.sentences(shown, BASELINE), *benchmark.notes(shown), ""]))
        # After the notes, which say why there may be nothing to draw.
        size = f"{self.num_heads} heads × {self.head_dim}"
        plots = benchmark.draw(rows, BASELINE, f"Attention, {size}, {machine['device']}", run)
        say(f"run     {run}\nfiles   {', '.join(['table.md', 'results.csv', *plots, 'machine.json'])}")
        say(f"next:   {self.next_command(shown)}")
        broken = [row for row in rows if Failed(row.note).broken]
        if broken:
            where = f"{broken[0].mechanism}, {broken[0].panel.title}, T = {broken[0].length:,}"
            raise ValueError(
                f"{len(broken)} of {len(rows)} measurements failed, see {run / 'table.md'}; the first: {where}: {broken[0].note}"
            )

    def run(self) -> Iterator[list[Row]]:
        """Check every mechanism, then measure; the rows of one table and length at a time."""
        panels = [Panel(*choice) for choice in product(self.precisions, self.compile, self.scopes, self.directions)]
        steps = len(self.entries) * (1 + len(self.lengths) * len(panels) * (self.rounds + 1))
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
                for panel in panels:
                    yield self._side_by_side(layers, recalls, length, panel, bar)
                del layers
                benchmark.free_memory()

    def describe(self, machine: Mapping[str, Any]) -> list[str]:
        """What was measured how, for the reader of the tables."""
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
        """How to pre-train with the fastest mechanism of the longest sequences, controls that learn no attention left out."""
        longest = max(row.length for row in rows)
        found = {row.mechanism: row.median_ms for row in rows if row.length == longest and row.median_ms is not None}
        entries = [entry for entry in self.entries if entry.label in found and not self._is_control(entry)]
        if not entries:
            return "audiot benchmark --help"
        best = min(entries, key=lambda entry: found[entry.label])
        overrides = [argument(f"attention.{key}", value) for key, value in best.overrides.items()]
        return " ".join([f"audiot pretrain attention={best.name}", *overrides])

    def _is_control(self, entry: Entry) -> bool:
        mechanism = self._layer(entry, CHECKED_FRAMES).mechanism
        return mechanism.inputs == {"value"} and not list(mechanism.parameters())

    def _layer(self, entry: Entry, num_frames: int, num_heads: int | None = None) -> SelfAttention:
        """A new layer for sequences of up to `num_frames`, of all heads unless told, on the CPU."""
        torch.manual_seed(self.seed)
        num_heads = num_heads or self.num_heads
        shape = (num_heads * self.head_dim, num_heads, num_frames)
        return build(entry.name, *shape, self._positions(entry, shape), **{**entry.overrides, "dropout": self.dropout})

    def _positions(self, entry: Entry, shape: tuple[int, int, int]) -> Positions:
        choice = self.positions
        if choice == "own":
            chosen = [
                value for default in published_config("attention", entry.name).get("defaults", []) for value in default.values()
            ]
            (choice,) = chosen or ["none"]
        config = published_config("positions", choice)
        return get_class(config.pop("_target_"))(*shape, **config)

    def _check(self, entry: Entry) -> None:
        """Compare the layer with its obvious form on few frames, in float32 and in the precisions measured.

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
        """The layer to measure at a length, on the device, or why it won't be measured."""
        if entry.label in self._wrong:
            return self._wrong[entry.label]
        if entry.max_length is not None and length > entry.max_length:
            return Failed(f"skipped: longer than max_length {entry.max_length:,}")
        return attempt(lambda: self._layer(entry, length).to(self.device))

    @torch.no_grad()
    def _recall(self, entry: Entry, length: int) -> float | None:
        """Share of the 32 best keys that hashing finds, where queries and keys lie in clusters; None without hashing.

        Around each of a head's centres, N(0, I), the same for queries and keys, they spread as N(0, 0.25·I).
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
        # All mechanisms are compiled through the same lines of code, more of them than PyTorch expects.
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
            results |= benchmark.measure(calls, self.device, self.rounds, self.seconds, progress, self.graphs)
        measured = {label: results[label] for label in layers}
        facts = {
            label: {"parameters": sum(map(Tensor.numel, _measured(layer, panel).parameters())), "recall": recalls[label]}
            for label, layer in layers.items()
            if not isinstance(layer, Failed)
        }
        return benchmark.rows_of(measured, BASELINE, panel, length, batch, batch * self._real(length), facts)

    def _inputs(self, batch: int, length: int, panel: Panel) -> dict[str, Tensor | None]:
        """What goes in, and the gradient that comes back."""
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def random(*shape: int, dtype: torch.dtype = PRECISIONS[panel.precision]) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=dtype)

        def heads() -> Tensor:  # a view, as projections leave it
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
        """What is to be timed.

        Raises:
            MismatchError: compiled it computes something else.
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
            # Entered at every call, as at every step of training: autocast keeps converted parameters until it ends.
            with self._autocast(panel.precision), torch.set_grad_enabled(training):
                return function(**arguments)

        def forward_and_backward() -> Sequence[Tensor | None]:
            output = forward()
            # To tensors that are then freed: what `backward` accumulates would count as allocated at the next call.
            return torch.autograd.grad(output, leaves, gradient.to(output.dtype), allow_unused=True)

        if panel.compiled and not (training and self.dropout):
            _check_equal(forward(), forward(module), panel.precision, "the eager form")
        return forward_and_backward if training else forward

    def _autocast(self, precision: str) -> AbstractContextManager[object]:
        return nullcontext() if precision == "fp32" else torch.autocast(self.device.type, PRECISIONS[precision])

    def _real(self, length: int) -> int:
        """Real frames of a sequence."""
        return max(1, round(length * (1 - self.padded)))

    def _valid(self, batch: int, length: int) -> Tensor | None:
        if not self.padded:
            return None
        return (torch.arange(length, device=self.device) < self._real(length)).expand(batch, -1)


def _measured(layer: SelfAttention, panel: Panel) -> nn.Module:
    return layer if panel.scope == "layer" else layer.mechanism


def _check_equal(output: Tensor, expected: Tensor, precision: str, what: str) -> None:
    """Raise MismatchError if an output is not what is expected, within the tolerance of the precision."""
    distance = ((output.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30)).item()
    if not distance <= TOLERANCE[precision]:
        raise MismatchError(f"its output in {precision} differs from {what} by {distance:.1%} of the norm")


def check_choices(key: str, given: Sequence[Any], known: Sequence[Any]) -> None:
    """Raise ValueError, naming ``benchmark.KEY``, where nothing is given or something that is not known."""
    if not given:
        raise ValueError(f"benchmark.{key} is empty: nothing to measure")
    for value in given:
        if value not in known:
            near = nearest(str(value), list(map(str, known)))
            raise ValueError(f"benchmark.{key}: no {value!r}{near}; there are {', '.join(map(str, known))}")


def published_config(group: str, name: str) -> dict[str, Any]:
    """The file of an option of a config group, as plain dicts."""
    config = OmegaConf.to_container(OmegaConf.load(str(resources.files("audiot.conf") / group / f"{name}.yaml")))
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
