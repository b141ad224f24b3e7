"""Properties that every mechanism of the group conf/attention must have."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
import torch._dynamo
from hydra.utils import get_class
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode

import audiot.attention
from audiot.attention import AttentionMechanism, build, names
from audiot.base.groups import read_option
from audiot.positions import ALiBi, RelativeBias, Rotary

EMBED_DIM, NUM_HEADS, MAX_FRAMES = 36, 9, 24  # nine heads: the handcrafted patterns take seven
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 17, 24)  # around the block, chunk and cluster sizes of the variants


def chunked(**options):
    return {"search": {"name": "chunked", "chunk_size": 2, **options}, "num_bits": 4}


# Beside every mechanism as its file in conf/attention has it, whose blocks and chunks are longer than these sequences.
VARIANTS = [
    ("query_key", {"share_query_key": True}),
    ("local", {"window": 2}),
    ("local", {"window": 3, "share_query_key": True}),
    ("sparse_strided", {"stride": 4}),
    ("sparse_strided", {"stride": 3, "share_query_key": True}),
    ("sparse_fixed", {"block_size": 4}),
    ("sparse_fixed", {"block_size": 5, "num_summary": 2, "share_query_key": True}),
    *[(name, {"search": {"attended_keys": 5}, "num_bits": 16}) for name in names() if "lsh" in name],
    *[(name, chunked()) for name in names() if "lsh" in name],
    ("lsh_simple", chunked(num_rounds=3) | {"share_query_key": True}),
    ("alsh_xbox", chunked(num_rounds=2)),
    ("routing", {"num_clusters": 4, "cluster_size": 5}),
    ("routing", {"num_clusters": 3, "cluster_size": 8, "share_query_key": True}),
    ("synthesizer_dense", {"per_head": False}),
    ("synthesizer_random", {"anchor": "length"}),
    ("synthesizer_factorized", {"rank": 3}),
    ("synthesizer_mixture", {"partner": "query_key"}),
    ("synthesizer_mixture", {"mixture_of": "weights"}),
    ("synthesizer_mixture", {"partner": "query_key", "mixture_of": "weights", "share_query_key": True}),
    ("local_dense_synthesizer", {"context_width": 5}),
]
CHOOSES_BY_CONTENT = tuple(name for name in names() if "lsh" in name or name == "routing")
MAY_LEAVE_ROWS_EMPTY = ("routing", "sparse_fixed")  # frames in no cluster, or before the first summary frame


def cases(*variants):
    """Every mechanism as its file has it, and these."""
    pairs = [(name, {}) for name in names()] + [(name, overrides) for name, overrides in variants if name in names()]
    return [pytest.param(name, overrides, id="-".join([name, *map(str, overrides.values())])) for name, overrides in pairs]


every_mechanism = pytest.mark.parametrize(("name", "overrides"), cases(*VARIANTS))
both = pytest.mark.parametrize("padded", [False, True])


def layer(name, overrides, seed=0, num_heads=NUM_HEADS, max_frames=MAX_FRAMES, head_dim=4, **kwargs):
    """A float64 layer whose parameters have left their initial values."""
    torch.manual_seed(seed)
    attention = build(name, num_heads * head_dim, num_heads, max_frames, **overrides, **kwargs).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return attention


def frames(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def valid_of(lengths, num_frames):
    return torch.arange(num_frames)[None] < torch.tensor(lengths)[:, None]


def dense(attention, hidden, valid=None):
    """The same layer through `weights()`: the obvious computation."""
    value = attention.value(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    context = attention.weights(hidden, valid) @ value
    output = attention.output(context.transpose(1, 2).flatten(2))
    return output if valid is None else output * valid[..., None]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients_of(output, leaves, direction):
    gradients = torch.autograd.grad(output, leaves, direction, allow_unused=True)
    return [torch.zeros_like(leaf) if got is None else got for leaf, got in zip(leaves, gradients, strict=True)]


def agree_in_gradients(one, other, leaves):
    direction = torch.randn_like(one)
    for got, expected in zip(gradients_of(one, leaves, direction), gradients_of(other, leaves, direction), strict=True):
        close(got, expected)


@every_mechanism
@both
def test_fast_form_equals_weights_times_values_with_gradients(name, overrides, padded):
    attention = layer(name, overrides).eval()
    for num_frames in LENGTHS:
        hidden = frames(4, num_frames, EMBED_DIM).requires_grad_()
        valid = valid_of([num_frames, max(1, num_frames // 2), 1, 0], num_frames) if padded else None
        fast, slow = attention(hidden, valid), dense(attention, hidden, valid)
        close(fast, slow)
        agree_in_gradients(fast, slow, [hidden, *attention.parameters()])
        with torch.no_grad():
            close(attention(hidden, valid), slow)


@every_mechanism
def test_weights_of_real_frames_sum_to_one_over_real_frames(name, overrides):
    attention = layer(name, overrides)
    for num_frames in LENGTHS:
        valid = valid_of([num_frames, max(1, num_frames // 2), 0], num_frames)
        weights = attention.weights(frames(3, num_frames, EMBED_DIM), valid)
        sums, expected = weights.sum(-1), valid[:, None].expand(-1, NUM_HEADS, -1).double()
        if name in MAY_LEAVE_ROWS_EMPTY:
            expected = expected * (sums != 0)
        close(sums, expected)
        assert (weights.movedim(1, -1)[~(valid[:, :, None] & valid[:, None, :])] == 0).all()


@every_mechanism
def test_padding_changes_neither_real_frames_nor_gradients(name, overrides):
    attention = layer(name, overrides).eval()
    for num_frames in (1, 3, 7, 17):
        hidden = frames(2, num_frames, EMBED_DIM)
        direction = frames(2, num_frames, EMBED_DIM, seed=2)
        junk = 5 * frames(2, MAX_FRAMES - num_frames, EMBED_DIM, seed=3)
        alone = attention(hidden)
        padded = attention(torch.cat([hidden, junk], 1), valid_of([num_frames] * 2, MAX_FRAMES))
        close(padded[:, :num_frames], alone)
        assert (padded[:, num_frames:] == 0).all()
        parameters = list(attention.parameters())
        expected = gradients_of(alone, parameters, direction)
        for one, other in zip(gradients_of(padded[:, :num_frames], parameters, direction), expected, strict=True):
            close(one, other)


@every_mechanism
def test_real_frames_may_lie_anywhere(name, overrides):
    if overrides.get("anchor") == "length":
        pytest.skip("patterns that follow the length count from the first frame")
    attention = layer(name, overrides).eval()
    hidden = frames(30, 17, EMBED_DIM).requires_grad_()
    valid = torch.rand(30, 17, generator=torch.Generator().manual_seed(0)) < 0.6
    fast, slow = attention(hidden, valid), dense(attention, hidden, valid)
    close(fast, slow)
    agree_in_gradients(fast, slow, [hidden, *attention.parameters()])


@every_mechanism
@pytest.mark.parametrize("positions", [Rotary, ALiBi, RelativeBias], ids=lambda kind: kind.__name__)
@both
def test_positions_inside_the_layer_act_alike_in_both_forms(name, overrides, positions, padded):
    mechanism = layer(name, overrides).mechanism
    makes = {"max_offset": 3} if positions is RelativeBias else {}
    given = positions(EMBED_DIM, NUM_HEADS, MAX_FRAMES, **makes)
    if "query" not in mechanism.inputs or (given.has_bias and mechanism.no_bias):
        with pytest.raises(ValueError, match=r"positions (turn|add) .* but \w+ has .*: set positions=sinusoid"):
            layer(name, overrides, positions=given)
        return
    attention, plain = layer(name, overrides, positions=given).eval(), layer(name, overrides).eval()
    hidden = frames(3, 17, EMBED_DIM).requires_grad_()
    valid = valid_of([17, 6, 0], 17) if padded else None
    fast, slow = attention(hidden, valid), dense(attention, hidden, valid)
    close(fast, slow)
    agree_in_gradients(fast, slow, [hidden, *attention.parameters()])
    assert not torch.allclose(fast, plain(hidden, valid))


@every_mechanism
def test_a_batch_equals_its_sequences_one_at_a_time(name, overrides):
    attention = layer(name, overrides).eval()
    lengths = [1, 2, 5, 17, 24]
    hidden = frames(len(lengths), MAX_FRAMES, EMBED_DIM)
    batch = attention(hidden, valid_of(lengths, MAX_FRAMES))
    for row, sequence, length in zip(batch, hidden, lengths, strict=True):
        close(row[:length], attention(sequence[None, :length])[0])
    order = [3, 0, 4, 2, 1]
    close(attention(hidden[order], valid_of(lengths, MAX_FRAMES)[order]), batch[order])


@every_mechanism
def test_sequences_without_real_frames_give_zeros_and_finite_gradients(name, overrides):
    attention = layer(name, overrides)
    mechanism = attention.mechanism
    for num_frames in LENGTHS:
        hidden = frames(2, num_frames, EMBED_DIM).requires_grad_()
        valid = torch.zeros(2, num_frames, dtype=torch.bool)
        valid[1] = True
        assert (mechanism(**attention._inputs(hidden, mechanism.inputs, valid))[0] == 0).all()
        assert (mechanism.weights(**attention._inputs(hidden, mechanism.weight_inputs, valid))[0] == 0).all()
        output = attention(hidden, valid)
        assert (output[0] == 0).all()
        leaves = [hidden, *attention.parameters()]
        for result in (output, attention.weights(hidden, valid)):
            if not result.requires_grad:  # weights that nothing determines
                continue
            gradients = torch.autograd.grad(result.square().sum(), leaves, allow_unused=True)
            assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
            assert gradients[0] is None or (gradients[0][0] == 0).all()


@every_mechanism
def test_evaluation_is_deterministic_and_training_drops(name, overrides):
    attention = layer(name, {**overrides, "dropout": 0.5})
    hidden = frames(2, 9, EMBED_DIM)
    assert torch.equal(attention(hidden), attention(hidden)) == (name == "none")
    attention.eval()
    assert torch.equal(attention(hidden), attention(hidden))


def replace(attention):
    for module in attention.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(0.9 * parameter))


def fused_step(attention):
    for parameter in attention.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(attention.parameters(), lr=0.1, fused=True).step()


def each(write):
    """Write every parameter and every buffer."""

    def change(attention):
        for tensor in (*attention.parameters(), *attention.buffers()):
            if tensor.is_floating_point():
                write(tensor)

    return change


def shrunk(attention):
    return {name: 0.9 * tensor if tensor.is_floating_point() else tensor for name, tensor in attention.state_dict().items()}


WAYS_TO_WRITE = {
    "in place": each(lambda tensor: tensor.mul_(0.9)),
    "through a view": each(lambda tensor: tensor.view(-1).copy_(0.9 * tensor.flatten())),
    "through data": each(lambda tensor: tensor.data.mul_(0.9)),
    "other data": each(lambda tensor: setattr(tensor, "data", 0.9 * tensor)),
    "through an array": each(lambda tensor: np.multiply(tensor.detach().numpy(), 0.9, out=tensor.detach().numpy())),
    "another parameter": replace,
    "state dict": lambda attention: attention.load_state_dict(shrunk(attention)),
    "assigned state dict": lambda attention: attention.load_state_dict(shrunk(attention), assign=True),
    "vector": lambda attention: vector_to_parameters(0.9 * parameters_to_vector(attention.parameters()), attention.parameters()),
    "fused optimiser": fused_step,
    "other precision": lambda attention: attention.bfloat16().double(),
    "in inference mode": torch.inference_mode()(each(lambda tensor: tensor.data.mul_(0.9))),
}


@every_mechanism
@both
@torch.no_grad()
def test_evaluation_sees_every_way_of_writing_parameters_and_buffers(name, overrides, padded):
    attention = layer(name, overrides).eval()
    hidden, valid = frames(2, 9, EMBED_DIM), valid_of([9, 4], 9) if padded else None
    for way, write in WAYS_TO_WRITE.items():
        before = attention(hidden, valid)
        write(attention)
        fresh = layer(name, overrides, seed=1).eval()
        fresh.load_state_dict(attention.state_dict())
        after = attention(hidden, valid)
        assert not torch.allclose(after, before, rtol=1e-4), way
        torch.testing.assert_close(after, fresh(hidden, valid), rtol=1e-10, atol=1e-12, msg=way)
    fresh.load_state_dict(shrunk(attention))
    called = torch.func.functional_call(attention, shrunk(attention), (hidden, valid))
    torch.testing.assert_close(called, fresh(hidden, valid), rtol=1e-10, atol=1e-12)


@every_mechanism
def test_state_dict_carries_everything(name, overrides):
    one, other = layer(name, overrides, seed=0).eval(), layer(name, overrides, seed=1).eval()
    hidden = frames(2, 9, EMBED_DIM)
    assert not torch.allclose(one(hidden), other(hidden))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(hidden), other(hidden))
    assert torch.equal(one(hidden), copy.deepcopy(one)(hidden))


@every_mechanism
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_low_precision_autocast_is_finite_and_close(name, overrides, dtype, padded):
    attention = layer(name, overrides).float().eval()
    hidden = 0.5 * frames(3, 17, EMBED_DIM).float()  # scores of a few units: larger ones make bfloat16 coarse
    valid = valid_of([17, 5, 0], 17) if padded else None
    expected = attention(hidden, valid)
    with torch.autocast("cpu", dtype):
        output = attention(hidden, valid)
    assert output.dtype == dtype
    assert output.isfinite().all()
    if name not in CHOOSES_BY_CONTENT:  # rounding may change a choice
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    parameters = list(attention.parameters())
    assert all(got.isfinite().all() for got in gradients_of(output.float().sum(), parameters, None))


@every_mechanism
def test_a_bfloat16_model_is_finite_and_close(name, overrides):
    attention = layer(name, overrides).eval()
    hidden = frames(3, 17, EMBED_DIM)
    valid = valid_of([17, 5, 0], 17)
    expected = attention(hidden, valid)
    output = attention.bfloat16()(hidden.bfloat16(), valid)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()
    if name not in CHOOSES_BY_CONTENT:
        torch.testing.assert_close(output.double(), expected, rtol=0.1, atol=0.1)


@every_mechanism
@both
def test_gradients_agree_with_finite_differences(name, overrides, padded):
    attention = layer(name, overrides, num_heads=2, max_frames=4, head_dim=2).eval()
    hidden = frames(2, 3, 4).requires_grad_()
    valid = valid_of([3, 2], 3) if padded else None
    parameters = dict(attention.mechanism.named_parameters())

    def run(hidden, *values):
        replaced = dict(zip((f"mechanism.{key}" for key in parameters), values, strict=True))
        return torch.func.functional_call(attention, replaced, (hidden, valid))

    assert torch.autograd.gradcheck(run, (hidden, *parameters.values()))


@pytest.mark.parametrize("overrides", [{}, {"anchor": "length"}], ids=str)
@pytest.mark.parametrize("num_heads", [1, 2, 4, 5, 6, 7])
def test_random_synthesizer_works_with_any_number_of_heads(num_heads, overrides):
    attention = layer("synthesizer_random", overrides, num_heads=num_heads).eval()
    hidden = frames(2, 9, attention.embed_dim)
    valid = valid_of([9, 4], 9)
    close(attention(hidden, valid), dense(attention, hidden, valid))


@every_mechanism
def test_only_the_projections_that_the_mechanism_names_exist(name, overrides):
    attention = layer(name, overrides)
    built = {child for child in ("query", "key", "value") if hasattr(attention, child)}
    assert built == attention.mechanism.inputs - {"hidden"}


@every_mechanism
def test_undecayed_parameters_exist(name, overrides):
    mechanism = layer(name, overrides).mechanism
    own = {key for key, _ in mechanism.named_parameters()}
    assert own & mechanism.no_weight_decay or not mechanism.no_weight_decay


@every_mechanism
def test_sequences_beyond_a_hard_limit_are_refused_in_one_line(name, overrides):
    attention = layer(name, overrides)
    hidden = frames(1, MAX_FRAMES + 1, EMBED_DIM)
    if attention.mechanism.max_frames is None:
        assert attention(hidden).shape == hidden.shape
    else:
        with pytest.raises(ValueError, match=r"^sequence has 25 frames but max_frames is 24 .*: raise max_frames or .*$"):
            attention(hidden)


# One of each kind of graph. The lengths of the test lie on both sides of the blocks and windows of the files.
COMPILED = [
    ("sparse_strided", {"stride": 3, "share_query_key": True}),
    ("lsh_simple", chunked(num_rounds=3) | {"share_query_key": True}),
    ("routing", {"num_clusters": 3, "cluster_size": 8, "share_query_key": True}),
    ("synthesizer_dense", {"per_head": False}),
    ("synthesizer_random", {"anchor": "length"}),
    ("synthesizer_factorized", {"rank": 3}),
    ("synthesizer_mixture", {"partner": "query_key", "mixture_of": "weights", "share_query_key": True}),
]


# The cache of operations' shapes costs more than a small graph gets back from it.
@torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
def check_compiled(name, overrides, training):
    if "lsh" in name:
        overrides = {"num_bits": 16, **overrides}  # a step of the graph for every bit
    attention = layer(name, {**overrides, "dropout": 0.0}, max_frames=80).train(training)
    torch._dynamo.reset()
    compiled_frames = []

    def backend(graph, _):
        compiled_frames.append(graph)
        return graph

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for num_frames in (9, 17, 31, 80):
        hidden, valid = frames(2, num_frames, EMBED_DIM).requires_grad_(training), valid_of([num_frames, 4], num_frames)
        with torch.set_grad_enabled(training):
            output, expected = compiled(hidden, valid), attention(hidden, valid)
        close(output, expected)
        if training:
            agree_in_gradients(output, expected, [hidden, *attention.parameters()])
    assert len(compiled_frames) <= 4


@pytest.mark.parametrize(("name", "overrides"), cases(*COMPILED))
def test_compiles_without_graph_breaks_and_a_few_times_for_all_lengths(name, overrides):
    check_compiled(name, overrides, True)


@pytest.mark.parametrize("name", ["lsh_simple", "routing"])  # routing computes less there
def test_compiles_for_evaluation_too(name):
    check_compiled(name, {}, False)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


LINEAR = [
    (name, overrides)
    for name, overrides in [
        ("none", {}),
        ("uniform", {}),
        ("local", {}),
        ("local_dense_synthesizer", {}),
        ("sparse_strided", {}),
        ("sparse_fixed", {}),
        ("routing", {}),
        ("lsh_simple", {"search": "chunked"}),
        ("lsh_simple", {"search": {"name": "chunked", "num_rounds": 2}}),
        ("alsh_xbox", {"search": "chunked"}),
    ]
    if name in names()
]


@pytest.mark.parametrize(("name", "overrides"), LINEAR)
def test_cheap_forms_hold_no_matrix_of_all_frames_by_all_frames(name, overrides):
    num_frames = 4096
    attention = build(name, 16, 2, num_frames, **overrides)
    hidden = torch.randn(1, num_frames, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with LargestTensor() as largest:
        attention(hidden, valid_of([num_frames - 5], num_frames)).sum().backward()
    assert 0 < largest.numel < num_frames**2 / 2


@every_mechanism
def test_a_mechanism_says_which_input_is_missing(name, overrides):
    mechanism = layer(name, overrides).mechanism
    with pytest.raises(ValueError, match=r"needs \w+ but got None: pass "):
        mechanism()


@pytest.mark.parametrize("name", names())
def test_sizes_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match="embed_dim 10 is not a multiple of num_heads 3"):
        build(name, 10, 3, 8)
    with pytest.raises(ValueError, match=r"attention dropout is 1\.0"):
        build(name, 12, 3, 8, dropout=1.0)
    with pytest.raises(ValueError, match="max_frames is 0"):
        build(name, 12, 3, 0)


def targets():
    return {name: read_option("attention", name)["_target_"] for name in names()}


def mechanisms():
    """All concrete mechanisms defined in the package."""
    found = set()
    for module in pkgutil.iter_modules(audiot.attention.__path__, "audiot.attention."):
        if module.name != "audiot.attention.huggingface":  # adapters; needs an extra
            members = vars(importlib.import_module(module.name)).values()
            found |= {member for member in members if inspect.isclass(member) and issubclass(member, AttentionMechanism)}
    return {mechanism for mechanism in found if not inspect.isabstract(mechanism)}


def test_every_yaml_has_a_mechanism():
    for name, target in targets().items():
        assert get_class(target) in mechanisms(), f"conf/attention/{name}.yaml names {target}, which is no mechanism"


def test_every_mechanism_has_a_yaml():
    configured = {get_class(target) for target in targets().values()}
    missing = {mechanism.__name__ for mechanism in mechanisms() - configured}
    assert not missing, f"mechanisms without a file in conf/attention: {sorted(missing)}"


@pytest.mark.parametrize("name", names())
def test_yaml_lists_every_own_parameter_and_no_other(name):
    config = read_option("attention", name)
    parameters = list(inspect.signature(get_class(config["_target_"])).parameters)
    assert parameters[:3] == ["embed_dim", "num_heads", "max_frames"]
    parts = {group for default in config.defaults for group in default if "/" not in group}  # of groups inside this one
    assert set(config) - {"defaults", "_target_"} | parts == set(parameters[3:])
