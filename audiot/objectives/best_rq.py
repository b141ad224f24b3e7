"""BEST-RQ: codes of a frozen random projection (Chiu et al. 2022, arXiv:2202.01855)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from audiot.checkpoint import AudioEncoder
from audiot.objectives.codes import CodePrediction, in_context


class BestRQ(CodePrediction):
    """Predict the codes that frozen random projections give to what is masked.

    Each codebook has its own projection, with Xavier initialisation, and its own codes, normal vectors of length 1. The code of a
    token is the one nearest to its projection, which is normalised to length 1 too (section 3.1). Several codebooks are as in
    USM (Zhang et al. 2023, arXiv:2303.01037). Features must be normalised (``features.cmvn``), else few codes are used.

    Args:
        model: The model to train, for its sizes.
        num_codebooks: Number of codebooks G.
        num_codes: Codes V in each.
        code_dim: Dimension of the projections.
        context: Odd number of tokens that a code is made of, centred on its own.
        options: Parameters of `CodePrediction`.
    """

    deciding: ClassVar[tuple[str, ...]] = (*CodePrediction.deciding, "num_codebooks", "num_codes", "code_dim", "context")
    projection: Tensor
    vectors: Tensor

    def __init__(
        self,
        model: AudioEncoder,
        num_codebooks: int = 4,
        num_codes: int = 1024,
        code_dim: int = 16,
        context: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(model, num_codebooks=num_codebooks, num_codes=num_codes, **options)
        check_context(context)
        if code_dim < 1:
            raise ValueError(f"objective.code_dim must be at least 1, found {code_dim}")
        self.context = context
        inputs = self.target_dim * context
        projection = torch.empty(num_codebooks, inputs, code_dim)
        for book in projection:
            nn.init.xavier_uniform_(book)
        vectors = nn.functional.normalize(torch.randn(num_codebooks, num_codes, code_dim), dim=-1)
        self.register_buffer("projection", projection)
        self.register_buffer("vectors", vectors)

    @torch.no_grad()
    def codes(self, source: Tensor, lengths: Tensor) -> Tensor:
        """Codes (B, T, G) of tokens (B, T, C)."""
        with torch.autocast(source.device.type, enabled=False):
            projected = torch.einsum("btc,gcd->btgd", in_context(source, lengths, self.context), self.projection.to(source.dtype))
            # Of vectors of length 1, the nearest has the largest product; the length of the projection changes nothing.
            return torch.einsum("btgd,gvd->btgv", projected, self.vectors.to(source.dtype)).argmax(-1)


def check_context(context: int) -> None:
    """Refuse a number of tokens that has no middle."""
    if context < 1 or context % 2 == 0:
        raise ValueError(f"objective.context must be an odd number of tokens, found {context}")
