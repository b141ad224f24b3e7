"""How much the clusters of frames say of their phones (Hsu et al. 2021, HuBERT, arXiv:2106.07447)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audiot.objectives.kmeans import assigned, kmeans


class CodeQuality(NamedTuple):
    """What codes and phones of frames have in common.

    Attributes:
        pnmi: Mutual information of phones and codes over the entropy of phones: the share of what there is to know of a frame's
            phone that its code tells.
        phone_purity: Accuracy of guessing, for each frame, the commonest phone of its code.
        cluster_purity: Accuracy of guessing, for each frame, the commonest code of its phone.
        perplexity: e to the entropy of codes: as many equally common codes would be as hard to guess.
        frames: Number of frames.
    """

    pnmi: float
    phone_purity: float
    cluster_purity: float
    perplexity: float
    frames: int


def quality(phones: np.ndarray, codes: np.ndarray) -> CodeQuality:
    """Quality of the codes of frames (N,), given their phones (N,), both as whole numbers from 0 on.

    Where all frames have one phone, there is nothing to know of it, and ``pnmi`` is 1.
    """
    num_codes = int(codes.max()) + 1
    counts = np.bincount(phones * num_codes + codes, minlength=(int(phones.max()) + 1) * num_codes).reshape(-1, num_codes)
    joint = counts / len(phones)
    entropy_phone, entropy_code = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    information = entropy_phone + entropy_code - _entropy(joint)
    return CodeQuality(
        float(information / entropy_phone) if entropy_phone > 0 else 1.0,
        float(joint.max(0).sum()),
        float(joint.max(1).sum()),
        float(np.exp(entropy_code)),
        len(phones),
    )


def _entropy(shares: np.ndarray) -> float:
    """Entropy in nats."""
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())


def code_quality(frames: Tensor, phones: np.ndarray, num_codes: int, seed: int) -> CodeQuality:
    """Quality of k-means codes that are fitted to the same frames (N, d).

    Raises:
        ValueError: there are fewer frames than codes.
    """
    if len(frames) < num_codes:
        raise ValueError(f"codes={num_codes} need as many labelled frames, found {len(frames)}: lower codes, or set codes=null")
    with torch.inference_mode():
        frames = frames.float()
        return quality(phones, assigned(frames, kmeans(frames, num_codes, seed)).cpu().numpy())
