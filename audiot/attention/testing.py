"""The contract of attention mechanisms as checks, for a mechanism of your own as for those of audiot.

    from audiot.attention.testing import check
    from summary_mixing import SummaryMixing

    check(SummaryMixing)

A rule that is broken raises AssertionError. All is computed in float64 on the CPU, with short sequences, unless a rule says else.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from audiot.attention.mechanism import AttentionMechanism
from audiot.attention.self_attention import SelfAttention
from audiot.base.private import dispatch_mode, without_shape_cache
from audiot.positions import ALiBi, Positions, RelativeBias, Rotary

NUM_HEADS, HEAD_DIM, MAX_FRAMES = 9, 4, 24  # nine heads: the handcrafted patterns of synthesizers take seven
EMBED_DIM = NUM_HEADS * HEAD_DIM
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 17, 24)  # around the block, chunk and cluster sizes of small mechanisms
LONG = 4096  # frames: a matrix of all by all is far larger than all that a cheap mechanism needs


@dataclass(frozen=True)
class Subject:
    """What is checked.

    Args:
        make: The mechanism's class, or a function that is called as classes of mechanisms are.
        options: Parameters of its own. Windows and blocks should be shorter than 24 frames, for the checks to see their edges.
        drops: Whether dropout changes its output in training.
        anywhere: Whether real frames may lie anywhere in a sequence; if not, only at its beginning.
    """

    make: Callable[..., AttentionMechanism]
    options: Mapping[str, Any] = field(default_factory=dict)
    drops: bool = True
    anywhere: bool = True

    def new(
        self, embed_dim: int = EMBED_DIM, num_heads: int = NUM_HEADS, max_frames: int = MAX_FRAMES, **options: Any
    ) -> AttentionMechanism:
        """A new mechanism."""
        return self.make(embed_dim, num_heads, max_frames, **{**self.options, **options})

    def layer(
        self,
        seed: int = 0,
        num_heads: int = NUM_HEADS,
        head_dim: int = HEAD_DIM,
        max_frames: int = MAX_FRAMES,
        positions: Positions | None = None,
        **options: Any,
    ) -> SelfAttention:
        """A layer in float64 whose parameters have left their initial values."""
        torch.manual_seed(seed)
        mechanism = self.new(num_heads * head_dim, num_heads, max_frames, **options)
        attention = SelfAttention(num_heads * head_dim, num_heads, mechanism, positions).double()
        with torch.no_grad():
            for parameter in attention.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return attention


def check(mechanism: Callable[..., AttentionMechanism], *, drops: bool = True, anywhere: bool = True, **options: Any) -> None:
    """Check a mechanism against all rules, which takes some seconds.

    Args:
        mechanism: Its class.
        drops: Whether dropout changes its output in training.
        anywhere: Whether real frames may lie anywhere in a sequence; if not, only at its beginning.
        options: Parameters of the mechanism.

    Raises:
        AssertionError: a rule is broken; the rule's name comes first.
    """
    subject = Subject(mechanism, options, drops, anywhere)
    long = [holds_no_matrix_of_all_frames] if subject.new().subquadratic else []
    for rule in (*RULES, compiles_once_for_all_lengths, *long):
        try:
            rule(subject)
        except Exception as error:
            raise AssertionError(f"{rule.__name__}: {error}") from error


# The rules


def fast_form_equals_the_plain_form(subject: Subject) -> None:
    """Outputs and gradients are those of `SelfAttention.reference`."""
    attention = subject.layer().eval()
    for num_frames in LENGTHS:
        for valid in (None, valid_of([num_frames, max(1, num_frames // 2), 1, 0], num_frames)):
            agree(attention, frames(4, num_frames, EMBED_DIM).requires_grad_(), valid)


def weights_of_real_frames_sum_to_one(subject: Subject) -> None:
    """And are zero for padded frames; rows of frames that may attend to nothing are empty."""
    attention = subject.layer()
    if not attention.has_weights:
        _refuses(lambda: attention.weights(frames(1, 3, EMBED_DIM)), "has no attention weights: ask has_weights before")
        return
    for num_frames in LENGTHS:
        hidden, valid = frames(3, num_frames, EMBED_DIM), valid_of([num_frames, max(1, num_frames // 2), 0], num_frames)
        weights, chosen = attention.weights(hidden, valid), attention.chosen_keys(hidden, valid)
        expected = valid[:, None].expand(-1, NUM_HEADS, -1)
        close(weights.sum(-1), (expected if chosen is None else expected & chosen.any(-1)).double())
        _require((weights.movedim(1, -1)[~(valid[:, :, None] & valid[:, None, :])] == 0).all(), "padded frames have weights")


def padding_changes_neither_real_frames_nor_gradients(subject: Subject) -> None:
    """Whatever padded frames hold."""
    attention = subject.layer().eval()
    parameters = list(attention.parameters())
    for num_frames in (1, 3, 7, 17):
        hidden, direction = frames(2, num_frames, EMBED_DIM), frames(2, num_frames, EMBED_DIM, seed=2)
        junk = 5 * frames(2, MAX_FRAMES - num_frames, EMBED_DIM, seed=3)
        alone = attention(hidden)
        padded = attention(torch.cat([hidden, junk], 1), valid_of([num_frames] * 2, MAX_FRAMES))
        close(padded[:, :num_frames], alone)
        _require((padded[:, num_frames:] == 0).all(), "the output is not zero on padded frames")
        expected = gradients_of(alone, parameters, direction)
        for one, other in zip(gradients_of(padded[:, :num_frames], parameters, direction), expected, strict=True):
            close(one, other)


def real_frames_may_lie_anywhere(subject: Subject) -> None:
    """Padding at the end is not the only kind."""
    if subject.anywhere:
        valid = torch.rand(30, 17, generator=torch.Generator().manual_seed(0)) < 0.6
        agree(subject.layer().eval(), frames(30, 17, EMBED_DIM).requires_grad_(), valid)


def positions_act_alike_in_both_forms(subject: Subject) -> None:
    """Rotary positions and biases of scores act, and in both forms alike, or are refused in one line."""
    mechanism, plain = subject.layer().mechanism, subject.layer().eval()
    for given in (
        Rotary(EMBED_DIM, NUM_HEADS, MAX_FRAMES),
        ALiBi(EMBED_DIM, NUM_HEADS, MAX_FRAMES),
        RelativeBias(EMBED_DIM, NUM_HEADS, MAX_FRAMES, max_offset=3),
    ):
        if "query" not in mechanism.inputs or (given.has_bias and mechanism.no_bias):
            refusal = r"positions (turn|add) .* but \w+ has .*: set positions=sinusoid"
            _refuses(lambda given=given: subject.layer(positions=given), refusal)  # type: ignore[misc]
            continue
        attention, hidden = subject.layer(positions=given).eval(), frames(3, 17, EMBED_DIM).requires_grad_()
        for valid in (None, valid_of([17, 6, 0], 17)):
            agree(attention, hidden, valid)
            same = torch.allclose(attention(hidden, valid), plain(hidden, valid))
            _require(not same, f"{type(given).__name__} positions change nothing")


def a_batch_equals_its_sequences_one_at_a_time(subject: Subject) -> None:
    """In any order."""
    attention, lengths = subject.layer().eval(), [1, 2, 5, 17, 24]
    hidden, valid = frames(len(lengths), MAX_FRAMES, EMBED_DIM), valid_of(lengths, MAX_FRAMES)
    batch = attention(hidden, valid)
    for row, sequence, length in zip(batch, hidden, lengths, strict=True):
        close(row[:length], attention(sequence[None, :length])[0])
    order = [3, 0, 4, 2, 1]
    close(attention(hidden[order], valid[order]), batch[order])


def sequences_without_real_frames_give_zeros_and_finite_gradients(subject: Subject) -> None:
    """Never NaN."""
    attention = subject.layer()
    mechanism = attention.mechanism
    for num_frames in LENGTHS:
        hidden, valid = frames(2, num_frames, EMBED_DIM).requires_grad_(), valid_of([0, num_frames], num_frames)
        context = mechanism(**attention._inputs(hidden, mechanism.inputs, valid))
        _require((context[0] == 0).all(), "the context of a sequence without real frames is not zero")
        results = [attention(hidden, valid)]
        _require((results[0][0] == 0).all(), "the output of a sequence without real frames is not zero")
        if attention.has_weights:
            weights = mechanism.weights(**attention._inputs(hidden, mechanism.weight_inputs, valid))
            _require((weights[0] == 0).all(), "a sequence without real frames has weights")
            results.append(attention.weights(hidden, valid))
        for result in results:
            if not result.requires_grad:  # weights that nothing determines
                continue
            gradients = torch.autograd.grad(
                result.square().sum(), [hidden, *attention.parameters()], allow_unused=True, materialize_grads=True
            )
            _require(all(gradient.isfinite().all() for gradient in gradients), "a gradient is not finite")
            _require((gradients[0][0] == 0).all(), "frames that are not real have a gradient")


def evaluation_is_deterministic_and_training_drops(subject: Subject) -> None:
    """Attention dropout acts in training alone."""
    attention, hidden = subject.layer(dropout=0.5), frames(2, 9, EMBED_DIM)
    same = torch.equal(attention(hidden), attention(hidden))
    _require(same != subject.drops, "dropout changes nothing in training" if subject.drops else "it drops something")
    attention.eval()
    _require(torch.equal(attention(hidden), attention(hidden)), "evaluation is not deterministic")


def state_dict_carries_everything(subject: Subject) -> None:
    """Hash projections, centroids and the like are buffers."""
    one, other, hidden = subject.layer(seed=0).eval(), subject.layer(seed=1).eval(), frames(2, 9, EMBED_DIM)
    _require(not torch.allclose(one(hidden), other(hidden)), "two seeds give the same layer")
    other.load_state_dict(one.state_dict())
    _require(torch.equal(one(hidden), other(hidden)), "a loaded state dict gives other outputs")
    _require(torch.equal(one(hidden), copy.deepcopy(one)(hidden)), "a copy gives other outputs")


def half_precision_is_finite_and_close(subject: Subject) -> None:
    """Under autocast, and in a model of bfloat16; but a choice of keys by what frames hold may change by rounding."""
    hidden = 0.5 * frames(3, 17, EMBED_DIM)  # scores of a few units: larger ones make bfloat16 coarse
    compared = not _chooses_by_content(subject.layer())
    for valid in (None, valid_of([17, 5, 0], 17)):
        for dtype in (torch.bfloat16, torch.float16):
            attention = subject.layer().float().eval()
            expected = attention(hidden.float(), valid)
            with torch.autocast("cpu", dtype):
                output = attention(hidden.float(), valid)
            _require(output.dtype == dtype, f"the output under autocast in {dtype} is {output.dtype}")
            _require(output.isfinite().all(), f"the output in {dtype} is not finite")
            if compared:
                torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
            gradients = gradients_of(output.float().sum(), list(attention.parameters()), None)
            _require(all(gradient.isfinite().all() for gradient in gradients), f"a gradient in {dtype} is not finite")
        attention = subject.layer().eval()
        expected, output = attention(2 * hidden, valid), attention.bfloat16()(2 * hidden.bfloat16(), valid)
        _require(output.dtype == torch.bfloat16, f"the output of a model in bfloat16 is {output.dtype}")
        _require(output.isfinite().all(), "the output of a model in bfloat16 is not finite")
        if compared:
            torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.1)


def gradients_agree_with_finite_differences(subject: Subject) -> None:
    """To the input and to the mechanism's own parameters."""
    attention = subject.layer(num_heads=2, head_dim=2, max_frames=4).eval()
    hidden, parameters = frames(2, 3, 4).requires_grad_(), dict(attention.mechanism.named_parameters())
    for valid in (None, valid_of([3, 2], 3)):

        def run(hidden: Tensor, *values: Tensor, valid: Tensor | None = valid) -> Tensor:
            replaced = dict(zip((f"mechanism.{key}" for key in parameters), values, strict=True))
            return torch.func.functional_call(attention, replaced, (hidden, valid))

        _require(torch.autograd.gradcheck(run, (hidden, *parameters.values())), "gradients differ from finite differences")


def only_the_projections_that_it_names_exist(subject: Subject) -> None:
    """`inputs` of an instance says what is built."""
    attention = subject.layer()
    built = {child for child in ("query", "key", "value") if hasattr(attention, child)}
    _require(built == attention.mechanism.inputs - {"hidden"}, f"projections {sorted(built)} are built")


def undecayed_parameters_exist(subject: Subject) -> None:
    """What `no_weight_decay` names is a parameter."""
    mechanism = subject.layer().mechanism
    own = {key for key, _ in mechanism.named_parameters()}
    named = own & mechanism.no_weight_decay or not mechanism.no_weight_decay
    _require(named, f"no_weight_decay names {sorted(mechanism.no_weight_decay)}; there are {sorted(own)}")


def sequences_beyond_a_hard_limit_are_refused_in_one_line(subject: Subject) -> None:
    """`max_frames` of an instance is the limit; None: there is none."""
    attention, hidden = subject.layer(), frames(1, MAX_FRAMES + 1, EMBED_DIM)
    if attention.mechanism.max_frames is None:
        _require(attention(hidden).shape == hidden.shape, "the output has another shape than the input")
    else:
        _refuses(lambda: attention(hidden), r"^sequence has 25 frames but max_frames is 24 .*: raise max_frames or .*$")


def mistakes_are_refused_in_one_line(subject: Subject) -> None:
    """Inputs that are missing, masks of another kind or shape, and impossible sizes."""
    attention = subject.layer()
    _refuses(attention.mechanism, r"needs \w+ but got None: pass ")
    _refuses(attention.mechanism.reference, r"needs \w+ but got None: pass ")
    for valid in (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.bool)):
        message = r"^valid is torch\.\w+ of shape .*: pass bool, .* of shape \(2, 5\)$"
        _refuses(lambda valid=valid: attention(frames(2, 5, EMBED_DIM), valid), message)  # type: ignore[misc]
    _refuses(lambda: subject.new(10, 3, 8), "embed_dim 10 is not a multiple of num_heads 3")
    _refuses(lambda: subject.new(12, 3, 8, dropout=1.0), r"attention dropout is 1\.0")
    _refuses(lambda: subject.new(12, 3, 0), "max_frames is 0")


RULES = (
    fast_form_equals_the_plain_form,
    weights_of_real_frames_sum_to_one,
    padding_changes_neither_real_frames_nor_gradients,
    real_frames_may_lie_anywhere,
    positions_act_alike_in_both_forms,
    a_batch_equals_its_sequences_one_at_a_time,
    sequences_without_real_frames_give_zeros_and_finite_gradients,
    evaluation_is_deterministic_and_training_drops,
    state_dict_carries_everything,
    half_precision_is_finite_and_close,
    gradients_agree_with_finite_differences,
    only_the_projections_that_it_names_exist,
    undecayed_parameters_exist,
    sequences_beyond_a_hard_limit_are_refused_in_one_line,
    mistakes_are_refused_in_one_line,
)


@without_shape_cache()
def compiles_once_for_all_lengths(subject: Subject, training: bool = True) -> None:
    """Without a graph break, in training and, if asked, in evaluation instead; a graph or two more for short lengths may be."""
    attention = subject.layer(max_frames=80, dropout=0.0).train(training)
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for num_frames in (9, 17, 31, 80):
        hidden, valid = frames(2, num_frames, EMBED_DIM).requires_grad_(training), valid_of([num_frames, 4], num_frames)
        with torch.set_grad_enabled(training):
            output, expected = compiled(hidden, valid), attention(hidden, valid)
        close(output, expected)
        if training:
            agree_in_gradients(output, expected, [hidden, *attention.parameters()])
    _require(len(graphs) <= 4, f"{len(graphs)} graphs are compiled for four lengths")


def holds_no_matrix_of_all_frames(subject: Subject) -> None:
    """Nothing of the size T² is ever made, in float32: for mechanisms that say that they are `subquadratic`."""
    torch.manual_seed(0)
    attention, hidden = SelfAttention(16, 2, subject.new(16, 2, LONG)), frames(1, LONG, 16).float().requires_grad_()
    with LargestTensor() as largest:
        attention(hidden, valid_of([LONG - 5], LONG)).sum().backward()
    _require(0 < largest.numel < LONG**2 / 2, f"a tensor of {largest.numel:,} numbers is made for {LONG:,} frames")


class LargestTensor(dispatch_mode()):  # type: ignore[misc]
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


# What they share


def frames(*shape: int, seed: int = 1) -> Tensor:
    """Random frames in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def valid_of(lengths: Sequence[int], num_frames: int) -> Tensor:
    """Mask (B, T) of sequences of these lengths."""
    return torch.arange(num_frames)[None] < torch.tensor(lengths)[:, None]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal to rounding in float64."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def agree(attention: SelfAttention, hidden: Tensor, valid: Tensor | None) -> None:
    """Both forms of a layer agree, in outputs and gradients; the fast form without gradients too."""
    fast, slow = attention(hidden, valid), attention.reference(hidden, valid)
    close(fast, slow)
    agree_in_gradients(fast, slow, [hidden, *attention.parameters()])
    with torch.no_grad():
        close(attention(hidden, valid), slow)


def agree_in_gradients(one: Tensor, other: Tensor, leaves: Sequence[Tensor]) -> None:
    """Two outputs have the same gradients, in a random direction."""
    direction = torch.randn_like(one)
    for got, expected in zip(gradients_of(one, leaves, direction), gradients_of(other, leaves, direction), strict=True):
        close(got, expected)


def gradients_of(output: Tensor, leaves: Sequence[Tensor], direction: Tensor | None) -> Iterator[Tensor]:
    """Gradients of an output, zeros where there is none."""
    yield from torch.autograd.grad(output, leaves, direction, allow_unused=True, materialize_grads=True)


def _chooses_by_content(attention: SelfAttention) -> bool:
    """Whether the keys that a frame may attend to depend on what the frames hold."""
    one, other = (attention.chosen_keys(frames(1, 17, EMBED_DIM, seed=seed)) for seed in (1, 2))
    return one is not None and other is not None and not torch.equal(one, other)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _refuses(call: Callable[[], Any], message: str) -> None:
    """Raises ValueError in one line that matches."""
    try:
        call()
    except ValueError as error:
        _require(re.search(message, str(error)) and "\n" not in str(error), f"{message!r} was expected, but it says: {error}")
        return
    raise AssertionError(f"nothing is refused where this was expected: {message!r}")
