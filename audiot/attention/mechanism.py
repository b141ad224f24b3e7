"""The contract of an attention mechanism, and the computations that most mechanisms share.

Shape legend: B sequences, T frames, d = `embed_dim`, H heads, D = d / H.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audiot.positions import NO_POSITIONS, Positions

Choice = TypeVar("Choice")


class AttentionMechanism(nn.Module, ABC):
    """How the frames of a sequence exchange information inside one attention layer.

    `SelfAttention` computes what `inputs` names, nothing else, and hands it to `forward`. A padded frame never influences a real
    one, as long as it is finite. The rows of padded frames are finite. A sequence without any real frame gives zeros.

    A subclass writes `attend`, the fast form, and the plain form that it is compared with: `dense_weights`, the weights of
    all frames over all frames. A mechanism that has no such weights says `has_weights = False` and writes `naive` instead.
    All get the tensors that they need by name, and `valid`.

    Args:
        embed_dim: Width d of the model.
        num_heads: Number of heads H, a divisor of `embed_dim`.
        max_frames: Longest sequence that the model has to support; mechanisms without a table of frames ignore it.
        dropout: Probability of dropping an attention weight while training.

    Raises:
        ValueError: a size is not positive, `num_heads` does not divide `embed_dim`, `dropout` is outside [0, 1), or the class
            lacks its plain form.
    """

    inputs: frozenset[str]
    """What `forward` needs, of {"hidden", "query", "key", "value"}; an instance may need less than its class."""

    has_weights: bool = True
    """Whether the context is a matrix of weights times the values. What draws or exports weights asks this first."""

    subquadratic: bool = False
    """Whether time and memory grow more slowly than the square of the number of frames."""

    no_weight_decay: frozenset[str] = frozenset()
    """Names of own parameters that the optimiser must not decay."""

    max_frames: int | None = None
    """Hard limit on the number of frames; None where there is none."""

    no_bias: str | None = "has no scores of queries and keys to add it to"
    """Why the mechanism can't carry a position bias (ALiBi, relative); None where it can."""

    def __init__(self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0) -> None:
        super().__init__()
        at_least_one(embed_dim=embed_dim, num_heads=num_heads, max_frames=max_frames)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}: change one of them, "
                f"for example embed_dim={embed_dim - embed_dim % num_heads + num_heads}"
            )
        check_type(float, dropout=dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"attention dropout is {dropout}: set it to at least 0 and less than 1")
        plain = "dense_weights" if self.has_weights else "naive"
        if getattr(type(self), plain) is getattr(AttentionMechanism, plain):
            raise ValueError(
                f"{type(self).__name__} has no plain form to be compared with: write dense_weights, "
                "or set has_weights = False and write naive"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.dropout = dropout

    def forward(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        valid: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: Input of the layer (B, T, d).
            query: Queries (B, H, T, D), not yet turned by rotary positions.
            key: Keys (B, H, T, D), not yet turned by rotary positions.
            value: Values (B, H, T, D).
            valid: bool (B, T), True = real frame; None when nothing is padded, the fast path.
            positions: Rotary positions, or a bias of the scores.

        Returns:
            The context (B, H, T, D).

        Raises:
            ValueError: an input that the mechanism needs is missing, or T is beyond its limit.
        """
        given = {"hidden": hidden, "query": query, "key": key, "value": value}
        return self.attend(**self._arguments(self.inputs, given, valid, positions), valid=valid)

    def weights(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        valid: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """The plain dense computation of the attention weights (B, H, T, T), without dropout.

        Plots show these weights, and `forward` must agree with them. The arguments are those of `forward`, without the values. A
        mechanism that needs nothing else gets `hidden`, for the shape of the batch.

        Raises:
            ValueError: the mechanism has no weights.
        """
        if not self.has_weights:
            raise ValueError(f"{type(self).__name__} has no attention weights: ask has_weights before weights()")
        given = {"hidden": hidden, "query": query, "key": key}
        return self.dense_weights(**self._arguments(self.weight_inputs, given, valid, positions), valid=valid)

    def chosen_keys(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        valid: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor | None:
        """Which keys each query may attend to, bool (B, H, T, T); None where a mechanism chooses none: all real ones.

        A mechanism without weights has no keys, and chooses none.
        """
        if not self.has_weights:
            return None
        given = {"hidden": hidden, "query": query, "key": key}
        return self.dense_choice(**self._arguments(self.weight_inputs, given, valid, positions), valid=valid)

    def reference(
        self,
        *,
        hidden: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        value: Tensor | None = None,
        valid: Tensor | None = None,
        positions: Positions | None = None,
    ) -> Tensor:
        """The context (B, H, T, D) by the plain form, without dropout: what `forward` must agree with.

        It is `weights` times the values, or `naive` where the mechanism has no weights. Arguments as in `forward`, and those
        of `weights`.
        """
        given = {"hidden": hidden, "query": query, "key": key, "value": value}
        if not self.has_weights:
            return self.naive(**self._arguments(self.inputs, given, valid, positions), valid=valid)
        if value is None:
            raise ValueError(f"{type(self).__name__} needs value but got None: pass {', '.join(sorted(self.reference_inputs))}")
        weights = self.weights(hidden=hidden, query=query, key=key, valid=valid, positions=positions)
        return weights.to(value.dtype) @ value

    @abstractmethod
    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """The fast form: the tensors of `inputs` and `valid` → the context (B, H, T, D)."""

    def dense_weights(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain form: the tensors of `weight_inputs` and `valid` → the weights (B, H, T, T)."""
        raise NotImplementedError

    def naive(self, *args: Any, **kwargs: Any) -> Tensor:
        """The plain form of a mechanism without weights: arguments and result as `attend`, without dropout."""
        raise NotImplementedError

    def dense_choice(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The keys that each query may attend to, as `chosen_keys` returns them; arguments as in `dense_weights`."""
        return None

    def after_step(self) -> None:
        """Update state that isn't trained by gradients. Called once after each step of the optimiser, on every rank."""

    def discard(self, skipped: Tensor) -> None:
        """Forget what the forwards since the last step have left for `after_step`, where the coming step is skipped.

        Then `after_step` must change nothing. Called before each step of the optimiser, on every rank.

        Args:
            skipped: Whether the step is skipped, bool (), on the model's device. Don't wait for it.
        """

    @property
    def weight_inputs(self) -> frozenset[str]:
        """What `weights` needs."""
        return self.inputs - {"value"} or frozenset({"hidden"})

    @property
    def reference_inputs(self) -> frozenset[str]:
        """What `reference` needs."""
        return self.weight_inputs | {"value"} if self.has_weights else self.inputs

    @property
    def dropout_now(self) -> float:
        """The dropout probability that applies in the current mode."""
        return self.dropout if self.training else 0.0

    def check_length(self, num_frames: int) -> None:
        """Raise ValueError if the mechanism has a limit and `num_frames` is beyond it."""
        if self.max_frames is not None and num_frames > self.max_frames:
            raise ValueError(
                f"sequence has {num_frames} frames but max_frames is {self.max_frames} ({type(self).__name__}): "
                "raise max_frames or take shorter audio (data.crop_s in pre-training, data.prepare.max_duration_s everywhere); "
                "an encoder that was pre-trained with model.chunk_frames takes any length"
            )

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        limit = "" if self.max_frames is None else f", max_frames={self.max_frames}"
        return f"{self.embed_dim}, num_heads={self.num_heads}{limit}, dropout={self.dropout}"

    def _arguments(
        self, names: frozenset[str], given: dict[str, Tensor | None], valid: Tensor | None, positions: Positions | None
    ) -> dict[str, Any]:
        """The tensors called `names`, each of which must be given, of no more frames than the mechanism supports."""
        arguments: dict[str, Any] = {}
        for name in sorted(names):
            tensor = given[name]
            if tensor is None:
                raise ValueError(f"{type(self).__name__} needs {name} but got None: pass {', '.join(sorted(names))}")
            self.check_length(tensor.shape[-2])
            if valid is not None and (valid.dtype != torch.bool or valid.shape != (tensor.shape[0], tensor.shape[-2])):
                raise ValueError(
                    f"valid is {valid.dtype} of shape {tuple(valid.shape)}: pass bool, True = real frame, of shape "
                    f"({tensor.shape[0]}, {tensor.shape[-2]})"
                )
            arguments[name] = tensor
        return arguments


class QueryKeyMechanism(AttentionMechanism):
    """Base of the mechanisms that compare queries with keys.

    `attend` and `dense_weights` get `query` and `key` (the queries again if they are shared). Rotary positions have turned
    both, unless `rotates_itself`. They also get `positions`, whose `bias` they add to the scores. A subclass whose weights
    are a softmax over the keys that it chooses writes `attend` and `dense_choice` only.

    The other arguments are those of `AttentionMechanism`.

    Args:
        share_query_key: Whether the queries are the keys too. No key projection is then built, and `key` need not be passed.
    """

    inputs = frozenset({"query", "key", "value"})
    no_bias = None
    rotates_itself = False
    """Whether `attend` and `dense_weights` call `positions.rotate` themselves."""

    def __init__(
        self, embed_dim: int, num_heads: int, max_frames: int, dropout: float = 0.0, share_query_key: bool = False
    ) -> None:
        super().__init__(embed_dim, num_heads, max_frames, dropout)
        check_type(bool, share_query_key=share_query_key)
        self.share_query_key = share_query_key
        if share_query_key:
            self.inputs = self.inputs - {"key"}

    def dense_weights(self, query: Tensor, key: Tensor, valid: Tensor | None, positions: Positions) -> Tensor:
        """softmax(QKᵀ/√D) over the real keys, or those of `dense_choice`, (B, H, T, T)."""
        choice = self.dense_choice(query, key, valid, positions)
        return masked_softmax(query_key_scores(query, key, positions), key_mask(valid) if choice is None else choice)

    def _arguments(
        self, names: frozenset[str], given: dict[str, Tensor | None], valid: Tensor | None, positions: Positions | None
    ) -> dict[str, Any]:
        arguments = super()._arguments(names, given, valid, positions)
        positions = arguments["positions"] = NO_POSITIONS if positions is None else positions
        if not self.rotates_itself:
            for name in ("query", "key"):
                if name in arguments:
                    arguments[name] = positions.rotate(arguments[name])
        return arguments if "key" in arguments else arguments | {"key": arguments["query"]}


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(QKᵀ·scale + bias)V over the keys that `mask` allows, by PyTorch's fused kernels; zeros where it allows none.

    Args:
        query: (B, H, T, D).
        key: (B, H, S, D).
        value: (B, H, S, D).
        mask: bool, broadcast to (B, H, T, S); True = the query may attend to the key. None: all.
        dropout: Probability of dropping a weight.
        scale: Factor of the products; None = 1/√D.
        bias: Numbers that are added to the scores, (H, T, S) or (B, H, T, S).

    Returns:
        (B, H, T, D).
    """
    if bias is not None:
        bias = (bias if bias.dim() == 4 else bias[None]).to(query.dtype)
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=scale)
    some = mask.any(dim=-1, keepdim=True)
    # A softmax over no key at all is NaN in some kernels: such a row attends everywhere and is then blanked.
    mask = mask | ~some
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return context.masked_fill(~some, 0)


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the keys that `mask` allows; rows of zeros, also in the gradients, where it allows none.

    Args:
        scores: (B or 1, H, T, S).
        mask: bool, broadcast to (B, H, T, S), or None.

    Returns:
        (B, H, T, S).
    """
    if mask is None:
        return scores.softmax(dim=-1)
    # The lowest finite number, not -inf: a row that is -inf throughout would be NaN, and so would its gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, lowest).softmax(dim=-1).masked_fill(~mask, 0)


def query_key_scores(query: Tensor, key: Tensor, positions: Positions, scale: float | None = None) -> Tensor:
    """QKᵀ·scale plus the bias of the positions, (B, H, T, T); scale 1/√D unless given."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    bias = position_bias(positions, query.shape[-2], query.device)
    return scores if bias is None else scores + bias


def position_bias(positions: Positions, num_frames: int, device: torch.device) -> Tensor | None:
    """Bias of the scores of all frames with all frames (H, T, T); None where the positions have none."""
    return positions.bias(offsets(num_frames, device)) if positions.has_bias else None


def offsets(num_frames: int, device: torch.device) -> Tensor:
    """j − i for query frame i and key frame j: int64 (T, T)."""
    position = torch.arange(num_frames, device=device)
    return position - position[:, None]


def key_mask(valid: Tensor | None) -> Tensor | None:
    """Mask of the real keys (B, 1, 1, T), or None, of `valid` (B, T) or None."""
    return None if valid is None else valid[:, None, None, :]


def among_real(choice: Tensor, valid: Tensor | None) -> Tensor:
    """The real ones of chosen keys, bool (…, T, T), for `valid` (B, T) or None."""
    return choice if valid is None else choice & valid[:, None, None, :]


def choose(name: str, word: str, choices: Mapping[str, Choice]) -> Choice:
    """The choice that the argument `name` calls `word`.

    Raises:
        ValueError: there is none of that name.
    """
    if word not in choices:
        raise ValueError(f"{name} is {word!r}: set it to one of {', '.join(choices)}")
    return choices[word]


def at_least_one(**sizes: int) -> None:
    """Raise ValueError, naming the argument, if a size is no whole number of 1 or more."""
    check_type(int, **sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: set it to 1 or more")


def check_type(kind: type, **values: Any) -> None:
    """Raise ValueError, naming the argument, if a value is not of a kind: int, float (whole numbers too) or bool."""
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    for name, value in values.items():
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise ValueError(f"{name} is {value!r}: set it to {words[kind]}")
